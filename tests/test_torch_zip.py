"""PyTorch's .bin files: what PyTorch saved is read bit for bit, and nothing in a file is ever carried out."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
from mlxflash.converters import convert  # noqa: E402
from mlxflash.converters.checkpoint import CheckpointError  # noqa: E402
from mlxflash.converters.torch_zip import TorchFileError, as_safetensors, tensors  # noqa: E402

import families  # noqa: E402
import torch_file as made  # noqa: E402
from golden.make_torch import SHAPES  # noqa: E402
from reference import decode, encode, write_safetensors  # noqa: E402
from test_convert import assert_same_files  # noqa: E402

REAL = Path(__file__).with_name("golden") / "torch.bin"


def test_what_pytorch_saved():
    arrays = mx.load(as_safetensors(REAL), format="safetensors")
    want = {name: families.tensor("torch", name, shape) for name, shape in SHAPES.items()}
    for name, kind in (("half", "float16"), ("brain", "bfloat16")):
        want[name] = decode(encode(want[name], kind).ravel().view(np.uint8), kind).reshape(want[name].shape)
        assert arrays[name].dtype == getattr(mx, kind)
    want |= {"view": want["whole"][2:5], "tied": want["whole"], "scalar": np.float32(3.5), "count": np.arange(4)}
    assert set(arrays) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(np.array(arrays[name].astype(mx.float32)), array, strict=False, err_msg=name)
        assert arrays[name].shape == array.shape


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_of_bin_files_converts_to_the_same_bytes(tmp_path, dtype):
    weights = families.weights_of("falcon-7b")
    for kind in ("safetensors", "bin"):
        families.write_case(tmp_path / kind / "checkpoint", "falcon-7b")
        (tmp_path / kind / "checkpoint" / "model.safetensors").unlink()
    write_safetensors(tmp_path / "safetensors" / "checkpoint" / "model.safetensors", weights, dtype)
    names = sorted(weights)
    where = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        part = {name: weights[name] for name in names[i::2]}
        made.write_bin(tmp_path / "bin" / "checkpoint" / file, part, dtype)
        where |= dict.fromkeys(part, file)
    index = tmp_path / "bin" / "checkpoint" / "pytorch_model.bin.index.json"
    index.write_text(f'{{"weight_map": {str(where).replace(chr(39), chr(34))}}}')
    for kind in ("safetensors", "bin"):
        convert(tmp_path / kind / "checkpoint", tmp_path / kind / "made.flash")
    assert_same_files(tmp_path / "bin" / "made.flash", tmp_path / "safetensors" / "made.flash")
    (tmp_path / "bin" / "checkpoint" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing, though"):
        convert(tmp_path / "bin" / "checkpoint", tmp_path / "again.flash")


GOOD = made.view("0", "FloatStorage", 4, (2, 2))
DATA = {"0": bytes(16)}
BAD = {
    "os.system": ({"w": made.call("os", "system", made.text("touch {probe}"))}, "asks for 'os.system'"),
    "posix.system": ({"w": made.call("posix", "system", made.text("touch {probe}"))}, "asks for 'posix.system'"),
    "eval": (
        {"w": made.call("builtins", "eval", made.text("__import__('os').system('touch {probe}')"))},
        "asks for 'builtins.eval'",
    ),
    "open": ({"w": made.call("io", "open", made.text("x"), made.text("w"))}, "asks for 'io.open'"),
    "torch.load": ({"w": made.call("torch", "load", made.text("x"))}, "asks for 'torch.load'"),
    "a class": ({"w": made.name("builtins", "list") + b")\x81"}, "asks for 'builtins.list'"),
    "new object": ({"w": made.name("collections", "OrderedDict") + b")\x81"}, "NEWOBJ"),
    "instance": ({"w": b"(ibuiltins\nlist\n"}, "INST"),
    "object": ({"w": b"(" + made.name("builtins", "list") + b"o"}, "asks for"),
    "extension": ({"w": b"\x82\x01"}, "EXT1"),
    "persistent name": ({"w": b"Pname\n"}, "PERSID"),
    "a set": ({"w": b"\x8f"}, "EMPTY_SET"),
    "a number": ({"w": made.number(3)}, "no flat table of tensors"),
    "nested": ({"model": b"}" + made.text("w") + GOOD + b"s"}, "no flat table of tensors"),
    "key is a tensor": ({"w": b"}" + GOOD + b"Ns"}, "damaged pickle"),
    "call of a tensor": ({"w": GOOD + b")R"}, "damaged pickle"),
    "storage is a name": ({"w": made.name("torch", "FloatStorage") + b"Q"}, "damaged pickle"),
    "unknown storage": ({"w": made.view("0", "QInt8Storage", 4, (2, 2))}, "asks for 'torch.QInt8Storage'"),
    "column by column": ({"w": made.view("0", "FloatStorage", 4, (2, 2), (1, 2))}, "not stored row by row"),
    "negative size": ({"w": made.view("0", "FloatStorage", 4, (-2, 2))}, "row by row"),
    "negative place": ({"w": made.view("0", "FloatStorage", 4, (2, 2), first=-1)}, "damaged pickle"),
    "past its storage": ({"w": made.view("0", "FloatStorage", 4, (2, 3))}, "reaches past its storage"),
    "place past its storage": ({"w": made.view("0", "FloatStorage", 4, (2, 2), first=1)}, "reaches past"),
    "storage missing": ({"w": made.view("1", "FloatStorage", 4, (2, 2))}, "whose storage is missing"),
    "storage elsewhere": ({"w": made.view("../data.pkl", "FloatStorage", 4, (2, 2))}, "whose storage is missing"),
    "unmarked": ({"w": b"t"}, "damaged pickle"),
    "memo of nothing": ({"w": b"h\x07"}, "damaged pickle"),
}


@pytest.mark.parametrize("kind", BAD)
def test_nothing_but_tensors_is_built(tmp_path, kind):
    entries, said = BAD[kind]
    probe = tmp_path / "probe"
    pickled = made.table(entries)
    if b"{probe}" in pickled:
        for was in ("touch {probe}", "__import__('os').system('touch {probe}')"):
            pickled = pickled.replace(made.text(was), made.text(was.replace("{probe}", str(probe))))
        assert made.is_dangerous(pickled, probe.exists), "this file must be one that pickle itself would obey"
        probe.unlink()
    made.archive(tmp_path / "x.bin", pickled, DATA)
    with pytest.raises(TorchFileError, match=said):
        tensors(tmp_path / "x.bin")
    assert not probe.exists()


def test_a_good_table_is_read(tmp_path):
    made.archive(tmp_path / "x.bin", made.table({"w": GOOD}), DATA)
    (stored,) = tensors(tmp_path / "x.bin").values()
    assert (stored.dtype, stored.shape, stored.num_bytes) == ("F32", (2, 2), 16)
    assert (tmp_path / "x.bin").read_bytes()[stored.offset :][:16] == DATA["0"]


@pytest.mark.parametrize("what", ["compressed", "big-endian", "no pickle", "two pickles", "not a zip", "empty"])
def test_other_files(tmp_path, what):
    file = tmp_path / "x.bin"
    if what == "compressed":
        made.archive(file, made.table({"w": GOOD}), DATA, zipfile.ZIP_DEFLATED)
    elif what == "big-endian":
        made.archive(file, made.table({"w": GOOD}), DATA, byteorder=b"big")
    elif what in ("no pickle", "two pickles"):
        with zipfile.ZipFile(file, "w") as out:
            for i in range(2 * (what == "two pickles")):
                out.writestr(f"archive{i}/data.pkl", made.table({"w": GOOD}))
    else:
        file.write_bytes(b"" if what == "empty" else b"\x80\x02l\x0a\xfcF\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(TorchFileError):
        tensors(file)


def test_every_truncation_and_every_changed_byte_of_a_real_file_is_a_sentence_or_no_harm(tmp_path):
    data = REAL.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(400):
        changed = bytearray(data)
        if i % 2:
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            del changed[rng.integers(len(data)) :]
        (tmp_path / "x.bin").write_bytes(changed)
        try:
            tensors(tmp_path / "x.bin")
        except TorchFileError:
            refused += 1
    assert refused >= 200  # every truncation loses the archive's directory


def test_every_truncated_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(REAL) as real:
        pickled = real.read("torch/data.pkl")
    for length in range(len(pickled)):
        made.archive(tmp_path / "x.bin", pickled[:length])
        with pytest.raises(TorchFileError):
            tensors(tmp_path / "x.bin")


def test_a_checkpoint_names_the_file(tmp_path):
    families.write_case(tmp_path / "c", "falcon-7b")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        convert(tmp_path / "c", tmp_path / "made.flash")
    shutil.copy(REAL, tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is missing"):
        convert(tmp_path / "c", tmp_path / "made.flash")
    made.archive(tmp_path / "c" / "pytorch_model.bin", made.table({"w": made.call("os", "getpid")}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle that asks for 'os.getpid'"):
        convert(tmp_path / "c", tmp_path / "made.flash")
