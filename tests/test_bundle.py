"""The bundle's laws: it holds what was written, byte for byte as documented, and nothing else passes for one.

written by hand from the description at the head of `bundle.py`, a bundle opens; written by our code it is the
same bytes;
a bundle that is not what it should be is refused by BundleError with the damaged file's name, never by another
exception and never by a model that computes something else;
a payload bit that flipped is found by `verify`, and by `check_reads` while generating: an OSError that names file
and offset, after which the model still generates, exactly, once the file is whole again.
"""

import copy
import errno
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest

from build import POST_NORM, Shape, load, prompt_of
from mlxflash.bundle import Bundle, BundleError, Layer, LayerWriter, Manifest, Part, make_record, write_manifest
from mlxflash.decode import stream_generate
from mlxflash.model import load_bundle
from reference import read_safetensors, write_safetensors
from test_exactness import SOME, assert_greedy, tokenizer_of

HEADER = 16384
UNITS = (5, 4099)
PARTS = [
    {"name": "up", "dtype": "bfloat16", "shape": [64], "offset": 0},
    {"name": "down", "dtype": "bfloat16", "shape": [64], "offset": 128},
    {"name": "up_bias", "dtype": "float32", "shape": [], "offset": None},
]
STRIDE = 256
MANIFEST = {
    "format": "mlxflash", "version": 1, "model_type": "opt", "layout": "plain", "activation": "relu",
    "dtype": "bfloat16", "d_model": 64, "quantization": None, "record": {"stride": STRIDE, "parts": PARTS},
    "layers": [{"file": f"layers/{i:03d}.bundle", "units": n} for i, n in enumerate(UNITS)],
    "source": "by hand", "order": "identity", "calibration": {},
}  # fmt: skip


def payload(index):
    return np.random.default_rng(index).integers(0, 256, (UNITS[index], STRIDE), dtype=np.uint8)


def layer_bytes(index, records, record=None):
    """A bundle file as the format's description says."""
    said = {"layer": index, "units": len(records), "record": record or MANIFEST["record"]}
    text = json.dumps(said).encode()
    data = (b"MLXFLASH" + struct.pack("<II", 1, len(text)) + text).ljust(HEADER, b"\0") + records.tobytes()
    data += b"\0" * (-len(data) % 4096)
    return data + b"".join(struct.pack("<I", zlib.crc32(row.tobytes())) for row in records)


@pytest.fixture
def by_hand(tmp_path):
    path = tmp_path / "hand.flash"
    (path / "layers").mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps(MANIFEST))
    for i in range(len(UNITS)):
        (path / "layers" / f"{i:03d}.bundle").write_bytes(layer_bytes(i, payload(i)))
    write_safetensors(path / "resident.safetensors", {"x": np.ones(1)}, "float32")
    return path


@pytest.fixture
def ours(library, tmp_path):
    """A copy of a tiny model's bundle."""
    return shutil.copytree(library.bundle(), tmp_path / "ours.flash")


def assert_refused(path, *names, match="."):
    """Neither opens nor loads: BundleError, and it names the damaged file."""
    for attempt in (Bundle.open, load_bundle):
        with pytest.raises(BundleError, match=match) as caught:
            attempt(path)
        assert any(str(path / name) in str(caught.value) for name in names), caught.value
        assert "\n" not in str(caught.value)


def test_written_by_hand(by_hand):
    bundle = Bundle.open(by_hand)
    assert bundle.manifest.to_json() == MANIFEST
    assert bundle.num_layers == 2
    assert bundle.streamed_bytes() == sum(UNITS) * 256
    for i in range(2):
        assert list(bundle.verify(i)) == []
        assert bundle.checksums(i).tolist() == [zlib.crc32(row.tobytes()) for row in payload(i)]


def test_round_trip(by_hand, tmp_path):
    parts = [Part(p["name"], p["dtype"], tuple(p["shape"]), p["offset"]) for p in PARTS]
    record = make_record(parts)
    path = tmp_path / "ours.flash"
    (path / "layers").mkdir(parents=True)
    layers = tuple(Layer(f"layers/{i:03d}.bundle", n) for i, n in enumerate(UNITS))
    for i, layer in enumerate(layers):
        writer = LayerWriter(path / layer.file, i, layer.units, record)
        assert not (path / layer.file).exists()
        for block in np.array_split(payload(i), 3):
            writer.write(block)
        writer.finish()
        assert (path / layer.file).read_bytes() == (by_hand / layer.file).read_bytes()
    manifest = Manifest("opt", "plain", "relu", "bfloat16", 64, None, record, layers, source="by hand")
    write_manifest(path, manifest)
    shutil.copy(by_hand / "resident.safetensors", path)
    assert Bundle.open(path).manifest == manifest
    assert sorted(f.name for f in path.rglob("*.part*")) == []


def test_an_abandoned_layer_leaves_nothing(tmp_path):
    writer = LayerWriter(tmp_path / "000.bundle", 0, 5, make_record([Part("up", "float32", (4,), 0)]))
    writer.write(np.zeros((2, 16), np.uint8))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nums", [(4096,), (1000,), (2048, 2048), (9088, 9088), (63, 63), (1,), (4090, 2), (3900,)])
def test_records_are_padded_to_blocks_or_packed(nums):
    record = make_record([Part(str(i), "uint8", (n,), 0) for i, n in enumerate(nums)])
    total = sum(nums)
    assert record.num_bytes == total
    assert [p.offset for p in record.parts] == [0, *np.cumsum(nums)[:-1].tolist()]
    blocks = -(-total // 4096) * 4096
    assert record.stride == (blocks if blocks < 1.05 * total else -(-total // 16) * 16)
    assert record.aligned == (record.stride % 4096 == 0)


LAYER_FILE = {
    "empty": lambda b: b"",
    "of eight bytes": lambda b: b[:8],
    "cut in its header": lambda b: b[: HEADER - 1],
    "cut after its header": lambda b: b[:HEADER],
    "cut in a record": lambda b: b[: HEADER + 100],
    "cut before its trailer": lambda b: b[: -4 * 256],
    "cut by a byte": lambda b: b[:-1],
    "a byte too long": lambda b: b + b"\0",
    "a block too long": lambda b: b + bytes(4096),
    "zeros": lambda b: bytes(len(b)),
    "of another kind": lambda b: b"MLXFLASX" + b[8:],
    "of version 0": lambda b: b[:8] + struct.pack("<I", 0) + b[12:],
    "of version 2": lambda b: b[:8] + struct.pack("<I", 2) + b[12:],
    "of a big-endian version": lambda b: b[:8] + struct.pack(">I", 1) + b[12:],
    "with an empty header": lambda b: b[:12] + struct.pack("<I", 0) + b[16:],
    "with a header too short": lambda b: b[:12] + struct.pack("<I", struct.unpack("<I", b[12:16])[0] - 1) + b[16:],
    "with a header too long": lambda b: b[:12] + struct.pack("<I", HEADER - 15) + b[16:],
    "with a header of 4 GB": lambda b: b[:12] + struct.pack("<I", 0xFFFFFFFF) + b[16:],
    "with a header not JSON": lambda b: b[:16] + b"{{{{" + b[20:],
    "with a header not UTF-8": lambda b: b[:16] + b"\xff\xfe" + b[18:],
    "with a header of brackets": lambda b: b[:12] + struct.pack("<I", HEADER - 16) + b"[" * (HEADER - 16) + b[HEADER:],
    "with a header null": lambda b: lie(b, lambda said: None),
    "of another layer": lambda b: lie(b, lambda said: said | {"layer": 0}),
    "of more units": lambda b: lie(b, lambda said: said | {"units": said["units"] + 1}),
    "of fewer units": lambda b: lie(b, lambda said: said | {"units": said["units"] - 1}),
    "of no units": lambda b: lie(b, lambda said: said | {"units": 0}),
    "of -1 units": lambda b: lie(b, lambda said: said | {"units": -1}),
    "of 2**64 units": lambda b: lie(b, lambda said: said | {"units": 2**64}),
    "of another stride": lambda b: lie(b, lambda said: said | {"record": said["record"] | {"stride": 4096}}),
    "without parts": lambda b: lie(b, lambda said: said | {"record": said["record"] | {"parts": []}}),
    "without a record": lambda b: lie(b, lambda said: {"layer": 1, "units": said["units"]}),
}


def lie(data, change):
    """A bundle file whose header says something else."""
    (length,) = struct.unpack("<I", data[12:16])
    text = json.dumps(change(json.loads(data[16 : 16 + length]))).encode()
    return (data[:12] + struct.pack("<I", len(text)) + text).ljust(HEADER, b"\0") + data[HEADER:]


@pytest.mark.parametrize("damage", LAYER_FILE)
def test_a_layer_file(ours, damage):
    name = "layers/001.bundle"
    data = (ours / name).read_bytes()
    (ours / name).write_bytes(LAYER_FILE[damage](data))
    assert_refused(ours, name)
    (ours / name).write_bytes(data)
    load_bundle(ours).close()


def test_a_layer_file_missing_or_not_a_file(ours):
    (ours / "layers/001.bundle").unlink()
    assert_refused(ours, "layers/001.bundle")
    (ours / "layers/001.bundle").mkdir()
    assert_refused(ours, "layers/001.bundle")


def test_layer_files_exchanged(ours):
    os.rename(ours / "layers/000.bundle", ours / "layers/x")
    os.rename(ours / "layers/001.bundle", ours / "layers/000.bundle")
    os.rename(ours / "layers/x", ours / "layers/001.bundle")
    assert_refused(ours, "layers/000.bundle")


def test_of_another_model(ours, library):
    shutil.copy(library.bundle(Shape(ffn=240)) / "layers/001.bundle", ours / "layers/001.bundle")
    assert_refused(ours, "layers/001.bundle")


def test_no_bundle(tmp_path):
    assert_refused(tmp_path / "nowhere", "")
    assert_refused(tmp_path, "", match="not a bundle")
    (tmp_path / "manifest.json").mkdir()
    assert_refused(tmp_path, "", match="not a bundle")


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 100, b"\xff\xfe{}", b"[" * 200_000, b'{"version": ' + b"9" * 9999],
                         ids=["empty", "brace", "zeros", "not utf-8", "brackets", "digits"])  # fmt: skip
@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_not_json(ours, name, data):
    (ours / name).write_bytes(data)
    if name == "manifest.json":
        assert_refused(ours, name)
    else:
        with pytest.raises(BundleError, match=name):
            load_bundle(ours)


@pytest.mark.parametrize("data", ["null", "[]", "1", '"manifest"', "{}", "true", "NaN"])
def test_json_of_another_kind(ours, data):
    text = (ours / "manifest.json").read_text()
    (ours / "manifest.json").write_text(data)
    assert_refused(ours, "manifest.json")
    (ours / "manifest.json").write_text(text)
    (ours / "config.json").write_text(data)
    with pytest.raises(ValueError, match=str(ours)):
        load_bundle(ours)


def places(value, path=()):
    """Every place in a JSON value: keys and indices from the top."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def changed(value, path, new):
    """A copy of a JSON value with another value, or nothing, at a place."""
    value = copy.deepcopy(value)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    if new is DELETE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return value


def how_it_loads(path, kind=BundleError):
    """`well`, or `refused` by one sentence that names the bundle, or what else came of it."""
    try:
        load_bundle(path, predictor="all").close()
    except kind as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else f"badly said: {error}"
    except Exception as error:
        return repr(error)
    return "well"


DELETE = object()
NUMBERS = [True, False, -1, 0, 1 << 40, 10**30, 1.5, float("nan")]
BAD = [DELETE, None, *NUMBERS, "x", "", [], [0], {}, "../x", "/etc/passwd"]
TOLD = {"source", "order", "model_type"}  # of a manifest: for people, nothing is computed with it
FIGURES = [("low-bit", "recall"), ("low-bit", "perplexity_change"), ("low-bit", "margin")]
FIGURES += [("rounding", key) for key in ("bits", "kl", "kl_se", "top1", "tokens")]
WORDS = [("rounding", key) for key in ("dtype", "text")]
MISSES = {"shares": [0.0, 0.5, 1.0], "layers": [[30.5, 20.0, 1.5], [25.0, 2.5, 0.5]]}
ROUNDING = {"bits": 4, "kl": 0.01, "kl_se": 0.001, "top1": 0.9, "tokens": 255, "dtype": "float32", "text": "text"}
CALIBRATION = {
    "low-bit": {"recall": 0.95, "perplexity_change": 0.01, "margin": 0.75, "misses": MISSES},
    "rounding": ROUNDING,
}


@pytest.mark.parametrize("place", ["record", "record in headers too", "quantization", "rest"])
@pytest.mark.parametrize("bits", [None, 4])
def test_any_value_of_a_manifest(library, tmp_path, bits, place):
    """One value anywhere is wrong, and the bundle is refused, unless the new value means the same or nothing."""
    path = shutil.copytree(library.bundle(bits=bits), tmp_path / "ours.flash")
    manifest = json.loads((path / "manifest.json").read_text()) | {"calibration": CALIBRATION}
    files = {f: f.read_bytes() for f in (path / "layers").iterdir()}
    outcome = {}
    for where in places(manifest):
        if (where[0] if where[0] in ("record", "quantization") else "rest") not in place:
            continue
        for bad in BAD:
            said = changed(manifest, where, bad)
            (path / "manifest.json").write_text(json.dumps(said))
            if place == "record in headers too":
                for file, data in files.items():
                    file.write_bytes(lie(data, lambda old, said=said: old | {"record": said.get("record")}))
            if json.dumps(said) != json.dumps(manifest):  # True is not 1 here
                outcome[(*where, "nothing" if bad is DELETE else repr(bad))] = how_it_loads(path)
    same = {("calibration", "nothing"), ("calibration", "{}"), ("quantization", "nothing")}
    same |= {(*where, "nothing") for where in places(manifest) if where[-1] == "offset" or where[0] == "calibration"}
    same |= {("calibration", *which, str(bad)) for which in FIGURES for bad in (-1, 0, 1 << 40, 10**30, 1.5)}
    same |= {("calibration", *which, repr(bad)) for which in WORDS for bad in ("x", "", "../x", "/etc/passwd")}
    same |= {("calibration", "low-bit", "misses", "nothing"), ("calibration", "rounding", "nothing")}
    same |= {
        ("calibration", "low-bit", "misses", "layers", i, j, "1.5") for i in range(2) for j in range(3)
    }  # still falling
    assert not {w: what for w, what in outcome.items() if what != "refused" and w not in same and w[0] not in TOLD}
    assert "refused" in outcome.values()


@pytest.mark.parametrize("name", ["../x.bundle", "layers/../../x.bundle", "/x.bundle", "", ".", "layers", "a\0b"])
def test_a_file_outside_the_bundle(ours, name):
    shutil.copy(ours / "layers/001.bundle", ours.parent / "x.bundle")
    manifest = json.loads((ours / "manifest.json").read_text())
    manifest["layers"][1]["file"] = name
    (ours / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(ours, "manifest.json", name.replace("\0", "\\x00"))


def test_any_value_of_a_config(ours):
    """Refused by one sentence that names the bundle, or harmless: the model loads."""
    config = json.loads((ours / "config.json").read_text())
    used = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "num_attention_heads",
            "max_position_embeddings", "activation_function"}  # fmt: skip
    outcome = {}
    for path in places({key: config[key] for key in used | {"word_embed_proj_dim", "do_layer_norm_before"}}):
        for bad in BAD:
            if config[path[0]] == bad:
                continue
            (ours / "config.json").write_text(json.dumps(changed(config, path, bad)))
            outcome[(*path, "nothing" if bad is DELETE else repr(bad))] = how_it_loads(ours, ValueError)
    assert not {where: what for where, what in outcome.items() if what != "refused" and where[0] in used}
    assert set(outcome.values()) == {"refused", "well"}


RESIDENT = {
    "empty": lambda b: b"",
    "cut in its header": lambda b: b[:100],
    "cut in a tensor": lambda b: b[: len(b) // 2],
    "cut by a byte": lambda b: b[:-1],
    "a byte too long": lambda b: b + b"\0",
    "of zeros": lambda b: bytes(len(b)),
    "with a header of 2**60 bytes": lambda b: struct.pack("<Q", 1 << 60) + b[8:],
    "with a header of brackets": lambda b: struct.pack("<Q", 9999) + b"[" * 9999,
    "with another shape": lambda b: tamper(b, lambda t: t | {"shape": [*t["shape"][::-1], 1]}),
    "with another size": lambda b: tamper(b, lambda t: t | {"shape": [2**40]}),
    "with a negative size": lambda b: tamper(b, lambda t: t | {"shape": [-1]}),
    "with another type": lambda b: tamper(b, lambda t: t | {"dtype": "F64"}),
    "of integers": lambda b: tamper(b, lambda t: t | {"dtype": "I32"}),
    "of words": lambda b: tamper(b, lambda t: t | {"dtype": "U32"}),
    "with offsets beyond": lambda b: tamper(b, lambda t: t | {"data_offsets": [2**40, 2**40 + 4]}),
    "with offsets exchanged": lambda b: tamper(b, lambda t: t | {"data_offsets": t["data_offsets"][::-1]}),
}


def tamper(data, change, wanted="embed_positions"):
    """A safetensors file whose header says something else of a tensor."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if wanted in name)
    header[name] = change(header[name])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize("damage", RESIDENT)
def test_resident_weights(ours, damage):
    file = next(ours.glob("resident*"))
    data = file.read_bytes()
    file.write_bytes(RESIDENT[damage](data))
    with pytest.raises(BundleError) as caught:
        load_bundle(ours)
    assert str(file) in str(caught.value) or "resident" in str(caught.value)
    assert str(ours) in str(caught.value)
    file.unlink()
    assert_refused(ours, "", match="missing")


def renamed(old, new):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def resized(name, change):
    return lambda tensors: {k: change(v) if k == name else v for k, v in tensors.items()}


TENSORS = {
    "one missing": renamed("model.decoder.layers.1.final_layer_norm.bias", "model.decoder.layers.1.other"),
    "one too many": lambda t: t | {"model.extra": np.ones(3)},
    "a bias missing": lambda t: {k: v for k, v in t.items() if k != "ffn.1.up_bias"},
    "a bias of another layer": renamed("ffn.1.up_bias", "ffn.7.up_bias"),
    "a bias of a negative layer": renamed("ffn.1.up_bias", "ffn.-1.up_bias"),
    "a bias of no layer": renamed("ffn.1.up_bias", "ffn.one.up_bias"),
    "a bias without a name": renamed("ffn.1.up_bias", "ffn.1"),
    "a bias too short": resized("ffn.1.up_bias", lambda a: a[:-1]),
    "a bias of two dimensions": resized("ffn.1.up_bias", lambda a: a[None]),
    "an output bias too short": resized("ffn.1.down_bias", lambda a: a[:-1]),
    "an output bias of one number": resized("ffn.1.down_bias", lambda a: a[:1]),
    "an output bias of two dimensions": resized("ffn.1.down_bias", lambda a: a[None]),
    "an output bias missing": lambda t: {k: v for k, v in t.items() if k != "ffn.1.down_bias"},
    "an unknown part": renamed("ffn.1.down_bias", "ffn.1.sideways_bias"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_resident_tensors(ours, change):
    file = next(ours.glob("resident*"))
    tensors = read_safetensors(file)
    write_safetensors(file, tensors, "float32")
    load_bundle(ours).close()  # rewritten, it is still the same
    write_safetensors(file, TENSORS[change](tensors), "float32")
    with pytest.raises(BundleError, match=str(ours)):
        load_bundle(ours)


def test_resident_weights_twice(ours):
    shutil.copy(next(ours.glob("resident*")), ours / "resident-00001.safetensors")
    with pytest.raises(BundleError, match=str(ours)):
        load_bundle(ours)


PREDICTOR = {
    name: RESIDENT[name]
    for name in ("empty", "cut in its header", "cut in a tensor", "cut by a byte", "of zeros")
} | {
    "with another shape": lambda b: tamper(b, lambda t: t | {"shape": t["shape"][::-1]}, "scales"),
    "with offsets beyond": lambda b: tamper(b, lambda t: t | {"data_offsets": [2**40, 2**40 + 4]}, "scales"),
    "of other bits": lambda b: tamper(b, lambda t: t | {"bits": "7"}, "__metadata__"),
    "of no bits": lambda b: tamper(b, lambda t: t | {"bits": "0"}, "__metadata__"),
    "of bits in words": lambda b: tamper(b, lambda t: t | {"bits": "three"}, "__metadata__"),
    "of another group": lambda b: tamper(b, lambda t: t | {"group_size": "0"}, "__metadata__"),
    "without metadata": lambda b: tamper(b, lambda t: {}, "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("damage", PREDICTOR)
def test_predictors(ours, damage):
    file = ours / "predictors/low-bit/001.safetensors"
    file.write_bytes(PREDICTOR[damage](file.read_bytes()))
    with pytest.raises(BundleError, match=str(file)):
        load(ours, predictor="low-bit")
    load_bundle(ours, predictor="all").close()
    file.unlink()
    with pytest.raises(BundleError, match=str(ours)):
        load(ours, predictor="low-bit")


def flip(file, offset, bit=0):
    with open(file, "r+b") as f:
        f.seek(offset)
        (value,) = f.read(1)
        f.seek(offset)
        f.write(bytes([value ^ 1 << bit]))


def test_verify_names_records(by_hand):
    bundle = Bundle.open(by_hand)
    file, units = by_hand / "layers/001.bundle", UNITS[1]
    rng = np.random.default_rng(0)
    flipped = {0, units - 1, 4095, 4096, *rng.integers(0, units, 5).tolist()}
    for record in flipped:
        flip(file, HEADER + record * STRIDE + int(rng.integers(STRIDE)), int(rng.integers(8)))
    assert set(bundle.verify(1)) == flipped
    assert set(bundle.verify(1, block_bytes=7 * bundle.manifest.record.stride)) == flipped
    assert list(bundle.verify(0)) == []
    flip(by_hand / "layers/000.bundle", HEADER + 4096 + 4 * UNITS[0] - 1)  # the last checksum itself
    assert list(bundle.verify(0)) == [UNITS[0] - 1]


def test_verify_of_a_file_that_shrank(by_hand):
    bundle = Bundle.open(by_hand)
    os.truncate(by_hand / "layers/001.bundle", HEADER + 1000)
    with pytest.raises(BundleError, match=r"001\.bundle"):
        list(bundle.verify(1))


def generated(model, path, prompt):
    return [r.token for r in stream_generate(model, tokenizer_of(path), prompt, 6)]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("backend", SOME)
def test_check_reads(ours, backend, predictor, direct):
    file, record = ours / "layers/001.bundle", json.loads((ours / "manifest.json").read_text())["record"]
    down = record["parts"][1]["offset"]
    with load(ours, backend, predictor=predictor, check_reads=True, direct=direct) as model:
        assert_greedy(model, ours, prompt_of(5), 6)
        damaged = range(0, 256, 3)
        offsets = [HEADER + i * record["stride"] + down + 5 for i in damaged]
        for prompt in (prompt_of(1), prompt_of(20)):  # the read fails while decoding, while the prompt streams
            for offset in offsets:
                flip(file, offset, 6)
            with pytest.raises(OSError, match="record") as caught:
                generated(model, ours, prompt)
            error = caught.value
            assert error.errno == errno.EIO
            assert error.filename == str(file)
            assert (error.offset - HEADER) // record["stride"] in damaged
            assert f"offset {error.offset}" in str(error)
            for offset in offsets:
                flip(file, offset, 6)
            assert_greedy(model, ours, prompt_of(5), 6)
    with load(ours, backend, predictor=predictor, direct=direct) as model:
        for offset in offsets:
            flip(file, offset, 6)
        assert generated(model, ours, prompt_of(20)) != []  # unchecked, nobody notices


@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("backend", SOME)
def test_a_file_that_shrinks_while_generating(ours, backend, predictor):
    file = ours / "layers/000.bundle"
    data = file.read_bytes()
    with load(ours, backend, predictor=predictor) as model:
        for prompt in (prompt_of(1), prompt_of(20)):
            os.truncate(file, HEADER + 100)
            with pytest.raises(OSError, match="the file ends") as caught:
                generated(model, ours, prompt)
            assert caught.value.filename == str(file)
            assert caught.value.offset >= HEADER
            assert caught.value.length > 0
            with open(file, "r+b") as f:
                f.write(data)
            for layer in model.flash.layers:
                layer.window.check()
            assert_greedy(model, ours, prompt_of(5), 6)


def test_of_a_post_norm_model(library, tmp_path):
    """What one kind of OPT has and another has not is missed too."""
    path = shutil.copytree(library.bundle(POST_NORM), tmp_path / "post")
    shutil.copy(library.bundle() / "config.json", path)
    with pytest.raises(BundleError, match=str(path)):
        load_bundle(path)
