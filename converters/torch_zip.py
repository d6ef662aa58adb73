"""PyTorch's `.bin` files (zip archives, PyTorch 1.6 and later) without PyTorch: where each tensor's bytes lie.

The archive's pickle is interpreted by a machine of its own that knows containers, numbers, strings and tensors, calls
nothing and imports nothing; any other opcode or name is refused. Tensors' bytes lie in the file uncompressed, so
`as_safetensors` shows MLX the file as the safetensors file it might have been, and MLX reads a tensor when it needs it.
Sources: Python's pickletools; torch/serialization.py and torch/_utils.py say what is pickled.
"""

import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_PICKLE_BYTES = 64 << 20
STORAGES = {  # of torch: safetensors' name of the type, bytes of an item
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
CALLS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
NAMES = {*CALLS, *(f"torch.{name}" for name in STORAGES)}


class TorchFileError(ValueError):
    """A .bin file that cannot be read, or must not be; the message does not name the file."""


@dataclass(frozen=True)
class Stored:
    """A tensor's type, in safetensors' words, shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _Name:
    """Something the pickle names and nobody imports."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    item: int
    key: str


@dataclass(frozen=True)
class _View:
    """A contiguous tensor in a storage, in items."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]


def tensors(file: Path) -> dict[str, Stored]:
    """Every tensor of a .bin file by name. Raises TorchFileError with one clause, OSError when it cannot be read."""
    with open(file, "rb") as raw:
        if raw.read(4) != b"PK\x03\x04":
            raise TorchFileError("not a zip archive, as PyTorch 1.6 and later write them (or not all of it)")
        try:
            with zipfile.ZipFile(raw) as archive:
                return _tensors(archive, raw)
        except TorchFileError:
            raise
        except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, IndexError) as error:
            raise TorchFileError(f"a damaged zip archive ({error})") from None


def _tensors(archive: zipfile.ZipFile, raw: io.BufferedReader) -> dict[str, Stored]:
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise TorchFileError(f"an archive with {len(pickles)} files data.pkl, PyTorch writes one")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise TorchFileError(
            f"a pickle of {members[pickles[0]].file_size} bytes, at most {MAX_PICKLE_BYTES} make sense"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
        raise TorchFileError("numbers that are not little-endian")
    end = raw.seek(0, io.SEEK_END)
    found = {}
    for name, view in _table(_run(archive.read(pickles[0]))).items():
        info = members.get(f"{folder}data/{view.storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise TorchFileError(f"tensor {name!r}, whose storage is missing, compressed or encrypted")
        count = 1
        for n in view.shape:
            count *= n
        item = view.storage.item
        begin = _data_offset(raw, info) + view.first * item
        if (view.first + count) * item > info.file_size or begin + count * item > end:
            raise TorchFileError(f"tensor {name!r}, which reaches past its storage")
        found[name] = Stored(view.storage.dtype, view.shape, begin, count * item)
    return found


def _data_offset(raw: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose lengths the directory does not know."""
    raw.seek(info.header_offset)
    header = raw.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise TorchFileError("a damaged zip archive (a member's header is missing)")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _table(said: Any) -> dict[str, _View]:
    if not isinstance(said, dict) or not said or not all(isinstance(view, _View) for view in said.values()):
        raise TorchFileError("no flat table of tensors")
    return said


_MARK = object()


def _run(data: bytes) -> Any:
    """What the pickle builds of dicts, lists, tuples, plain values and tensors."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    try:
        for opcode, arg, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    (said,) = stack
                    return said
                case "MARK":
                    stack.append(_MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "BINFLOAT" | "FLOAT":
                    stack.append(arg)
                case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(arg)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "APPEND":
                    item = stack.pop()
                    _of(stack[-1], list).append(item)
                case "APPENDS":
                    items = pop_to_mark()
                    _of(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop_to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        _of(stack[-1], dict)[_of(key, str)] = value
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[_of(arg, int)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[_of(arg, int)])
                case "GLOBAL":
                    stack.append(_named(".".join(_of(arg, str).split(" ", 1))))
                case "STACK_GLOBAL":
                    name = _of(stack.pop(), str)
                    stack.append(_named(f"{_of(stack.pop(), str)}.{name}"))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    arguments = _of(stack.pop(), tuple)
                    stack.append(_made(stack.pop(), arguments))
                case "BUILD":  # an OrderedDict's attributes, which nothing here needs
                    stack.pop()
                    _of(stack[-1], dict)
                case name:
                    raise TorchFileError(f"a pickle with {name}, which no table of tensors needs; it is not read")
    except TorchFileError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise TorchFileError(f"a damaged pickle ({type(error).__name__}: {str(error)[:80]})") from None
    raise TorchFileError("a damaged pickle (it does not end)")


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} should be")
    return value


def _named(name: str) -> _Name:
    if name not in NAMES:
        raise TorchFileError(f"a pickle that asks for {name[:80]!r}, which no table of tensors needs; it is not read")
    return _Name(name)


def _storage(said: Any) -> _Storage:
    """("storage", torch.FloatStorage, key, device, items)."""
    what, kind, key, *_ = _of(said, tuple)
    if what != "storage":
        raise TypeError(f"a persistent {what!r}")
    return _Storage(*STORAGES[_of(kind, _Name).name.removeprefix("torch.")], _of(key, str))


def _made(call: Any, arguments: tuple[Any, ...]) -> Any:
    """What the three calls that are known would return."""
    name = _of(call, _Name).name
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_parameter":
        return _of(arguments[0], _View)
    if name != "torch._utils._rebuild_tensor_v2":
        raise TypeError(f"a call of {name} with {len(arguments)} arguments")
    storage, first, shape, strides = arguments[:4]
    step = 1
    for size, stride in zip(reversed(_of(shape, tuple)), reversed(_of(strides, tuple)), strict=True):
        if _of(size, int) < 0 or (size > 1 and stride != step and 0 not in shape):
            raise TorchFileError(f"a tensor of shape {list(shape)} that is not stored row by row")
        step *= size
    if _of(first, int) < 0 or step >= 1 << 62:
        raise ValueError("a tensor outside its storage")
    return _View(_of(storage, _Storage), first, shape)


class _Shown(io.RawIOBase):
    """A safetensors file that is nowhere: a header of its own, then pieces of another file."""

    def __init__(self, file: Path, header: bytes, pieces: list[tuple[int, int, int]], size: int):
        self._file = open(file, "rb")  # noqa: SIM115  closed with this object
        self._header, self._pieces, self._size, self._at = header, pieces, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        for begin, end, source in self._spans():
            if begin <= self._at < end and done < len(view):
                count = min(end - self._at, len(view) - done)
                if source < 0:
                    view[done : done + count] = self._header[self._at : self._at + count]
                else:
                    self._file.seek(source + self._at - begin)
                    count = self._file.readinto(view[done : done + count])
                self._at += count
                done += count
        return done

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        yield 0, len(self._header), -1
        yield from self._pieces

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def as_safetensors(file: Path) -> io.RawIOBase:
    """A .bin file as a readable safetensors file object. Raises as `tensors` does."""
    header: dict[str, Any] = {}
    pieces, at = [], 0
    for name, t in tensors(file).items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.num_bytes]}
        pieces.append((at, at + t.num_bytes, t.offset))
        at += t.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    shifted = [(begin + len(head), end + len(head), source) for begin, end, source in pieces]
    return _Shown(file, head, shifted, len(head) + at)
