"""PyTorch's files made by hand: a zip archive of a pickle, written opcode by opcode, and of storages."""

import pickle
import struct
import zipfile

import numpy as np

from reference import encode

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def text(said):
    return b"X" + struct.pack("<I", len(said.encode())) + said.encode()


def number(n):
    return b"J" + struct.pack("<i", n)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def view(key, kind, count, shape, strides=None, first=0):
    """The opcodes of one tensor."""
    strides = strides or [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"
    sizes = tuple_of(*map(number, shape)), tuple_of(*map(number, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(storage, number(first), *sizes, b"\x89", hooks) + b"R"


def table(entries):
    """The pickle of {name: opcodes}."""
    items = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02" + name("collections", "OrderedDict") + b")R(" + items + b"u."


def archive(path, pickled, storages=None, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        out.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            out.writestr(f"archive/data/{key}", data)


def write_bin(path, tensors, dtype):
    """float32 `tensors` rounded to `dtype`, as torch.save writes a state dict."""
    entries, storages = {}, {}
    for key, (said, array) in enumerate(tensors.items()):
        storages[str(key)] = encode(array, dtype).tobytes()
        entries[said] = view(str(key), KINDS[dtype], array.size, array.shape)
    archive(path, table(entries), storages)


def call(module, attribute, *arguments):
    """The opcodes of a call, which pickle would carry out."""
    return name(module, attribute) + tuple_of(*arguments) + b"R"


def is_dangerous(pickled, probe):
    """Whether Python's own unpickler does what the pickle asks: `probe` says whether it was done."""
    pickle.loads(pickled)
    return probe()
