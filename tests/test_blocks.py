"""The exactness law for dense checkpoints that mlx-lm quantised: streamed equals mlx-lm's own model of the checkpoint.

The reference is loaded by mlx-lm from the checkpoint's files and computes in float32, whatever its scales are; ours
reads a bundle. Teacher-forced logits, one token per pass and whole prompts, agree within 2e-5 of their range.
"""

import json
import shutil

import numpy as np
import pytest

import mixtures
import quantised
from build import BACKENDS, load
from test_experts import assert_same, decode, prompt

mx = pytest.importorskip("mlx.core")
from mlx_lm.convert import mixed_quant_predicate_builder  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from mlxflash.converters import convert  # noqa: E402
from mlxflash.converters.checkpoint import CheckpointError  # noqa: E402

from mlxflash.bundle import Bundle, BundleError  # noqa: E402
from mlxflash.cli import main  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.plan import BudgetError  # noqa: E402

KINDS = ("native", "parts-alias", "parts-copy", "discrete")  # records have one shape in them, whatever MLX is asked
PARTS = (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
TENSORS = (("weight", ""), ("scales", "_scales"), ("biases", "_biases"))
STORED = {
    "q4": {},
    "q4-32-f32": {"group_size": 32, "dtype": "float32"},
    "q4-128": {"group_size": 128},
    "q8-f16": {"bits": 8, "dtype": "float16"},
    "q8-128": {"bits": 8, "group_size": 128},
    "q2-32": {"bits": 2, "group_size": 32},
    "q3": {"bits": 3},
    "q5-32": {"bits": 5, "group_size": 32},
    "q6-128": {"bits": 6, "group_size": 128},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Checkpoints and bundles, made once."""
    root, kept = tmp_path_factory.mktemp("quantised"), {}

    def get(kind="qwen3", stored="q4"):
        if (kind, stored) not in kept:
            source = root / f"{kind}-{stored}"
            quantised.write(source, kind, **STORED[stored])
            kept[kind, stored] = source, source.with_suffix(".flash")
            convert(source, kept[kind, stored][1])
        return kept[kind, stored]

    return get


_logits = {}


def dense_logits(source, tokens):
    if (source, tuple(tokens)) not in _logits:
        _logits[source, tuple(tokens)] = mixtures.logits_of(mixtures.reference(source), tokens)
    return _logits[source, tuple(tokens)]


@pytest.mark.parametrize("kind", quantised.CONFIGS)
def test_every_family(made, kind):
    source, target = made(kind)
    tokens = prompt(12, seed=4)
    for backend in ("native", "parts-alias"):
        with load(target, backend, predictor=None) as model:
            assert model.flash.plan.capacities == (1, 1, 1)
            assert model.flash.mode == "exact (streaming)"
            got, read = decode(model, tokens)
            assert_same(got, dense_logits(source, tokens))
            assert min(read) > 0


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_every_format(made, stored, backend):
    source, target = made(stored=stored)
    assert Bundle.open(target).manifest.layers[0].units == 384 // STORED[stored].get("group_size", 64)
    tokens = prompt(9, seed=5)
    with load(target, backend, predictor=None, check_reads=True) as model:
        got, read = decode(model, tokens)
        assert_same(got, dense_logits(source, tokens))
        assert min(read) > 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("budget", ["whole", "part", "least"])
@pytest.mark.parametrize("backend", KINDS)
def test_budgets_and_prompts(made, backend, budget, direct):
    """Chunks of a prompt of many lengths, then tokens; what is read is what is not held, once per pass."""
    source, target = made("llama", "q4-32-f32")
    tokens = prompt(150, seed=6)
    with load(target, backend, budget, predictor=None, direct=direct) as model:
        plan, stride = model.flash.plan, model.flash.bundle.manifest.record.stride
        cache, got, first = make_prompt_cache(model), [], 0
        for length in (1, 2, 3, 100, 40, 1, 1, 1, 1):
            before = model.flash.snapshot().num_bytes
            got.append(np.array(model(mx.array([tokens[first : first + length]]), cache=cache)[0]))
            read, first = model.flash.snapshot().num_bytes - before, first + length
            assert (read > 0) == (budget != "whole")
            if not direct:
                assert read <= 2 * (sum(plan.units) - sum(plan.capacities)) * stride
        assert_same(np.concatenate(got), dense_logits(source, tokens))


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_layers_of_different_bits(tmp_path, recipe):
    """mlx-lm's recipes give some layers' `down` more bits: the widest holds the others, q by q."""
    model, _ = quantised.make("llama", num_hidden_layers=9)
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    quantised.write(tmp_path / "c", "llama", group_size=32, predicate=predicate, num_hidden_layers=9)
    low, high = (int(bits) for bits in recipe.split("_")[1:])
    stored = mx.load(str(tmp_path / "c" / "model.safetensors"))
    widths = {stored[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(9)}
    assert widths == {384 * low // 32, 384 * high // 32}
    bundle = convert(tmp_path / "c", tmp_path / "b")
    assert {p.name: p.shape for p in bundle.manifest.record.parts if p.dtype == "uint32"} == {
        "gate": (32, 128 * low // 32), "up": (32, 128 * low // 32), "down": (128, high)
    }  # fmt: skip
    tokens = prompt(6, seed=7)
    for backend in ("native", "parts-alias"):
        with load(bundle.path, backend, predictor=None) as model:
            assert_same(decode(model, tokens)[0], dense_logits(tmp_path / "c", tokens))


def part_of(bundle, index, name):
    """A part of all records of a layer, [units, ...]."""
    record, entry = bundle.manifest.record, bundle.manifest.layers[index]
    raw = np.fromfile(bundle.path / entry.file, np.uint8, entry.units * record.stride, offset=16384)
    part = record[name]
    data = np.ascontiguousarray(raw.reshape(entry.units, -1)[:, part.offset : part.offset + part.num_bytes])
    kind = {"uint32": np.uint32, "uint8": np.uint8}.get(part.dtype, np.uint16)
    array = mx.array(data.view(kind).reshape(entry.units, *part.shape))
    return array.view(getattr(mx, part.dtype))


@pytest.mark.parametrize("stored", ["q4", "mxfp4"])
def test_what_is_stored_is_the_checkpoints(made, stored):
    source, target = made(stored=stored)
    given, bundle = mx.load(str(source / "model.safetensors")), Bundle.open(target)
    for i in range(bundle.num_layers):
        for part, path in PARTS:
            for kind, end in TENSORS[: 2 if stored == "mxfp4" else 3]:
                want, got = given.pop(f"model.layers.{i}.mlp.{path}.{kind}"), part_of(bundle, i, part + end)
                rows = mx.concatenate(list(got), axis=1 if part == "down" else 0)
                assert mx.array_equal(rows, want)
                assert rows.dtype == want.dtype
    resident = {k: v for file in bundle.resident_files() for k, v in mx.load(str(file)).items()}
    assert resident.keys() == given.keys()
    assert all(mx.array_equal(resident[name], given[name]) for name in given)


def rectified(source):
    """mlx-lm's model, whose class computes SiLU whatever config.json says, with ReLU between its own matrices."""
    model = mixtures.reference(source)
    for layer in model.layers:
        mlp = layer.mlp
        layer.mlp = lambda x, m=mlp: m.down_proj(mx.maximum(m.gate_proj(x), 0) * m.up_proj(x))
    return model


def test_relu_runs_exactly_and_says_so(tmp_path, capsys):
    quantised.write(tmp_path / "c", "llama", hidden_act="relu")
    bundle = convert(tmp_path / "c", tmp_path / "b")
    assert not bundle.predictors()
    tokens = prompt(8, seed=8)
    for backend in KINDS:
        with load(bundle.path, backend, predictor=None) as model:
            assert model.flash.mode == "exact (streaming)"
            assert_same(decode(model, tokens)[0], mixtures.logits_of(rectified(tmp_path / "c"), tokens))
    for predictor in ("low-bit", "low-rank", "oracle", [None] * 3):
        with pytest.raises(BundleError, match="neurons share scales"):
            load_bundle(bundle.path, predictor=predictor)
    main(["info", str(bundle.path)])
    assert "exact: every unit, streamed where it is not held (relu makes neurons" in capsys.readouterr().out


def test_floats_of_several_types(tmp_path):
    """What mlx-lm leaves in float32 is not rounded to the type of the others."""

    def change(weights):
        other = ("up_proj.bias", "down_proj.bias", "norm.weight")
        return {k: v.astype(mx.float32) * 1.001 if k.endswith(other) else v for k, v in weights.items()}

    quantised.write(tmp_path / "c", "llama", change=change)
    bundle = convert(tmp_path / "c", tmp_path / "b")
    assert [bundle.manifest.record[f"{name}_bias"].dtype for name in ("gate", "up")] == ["bfloat16", "float32"]
    tokens = prompt(5, seed=11)
    for backend in ("native", "parts-alias"):
        with load(bundle.path, backend, predictor=None) as model:
            assert_same(decode(model, tokens)[0], dense_logits(tmp_path / "c", tokens))


def test_opt(tmp_path):
    """A family that mlx-lm lacks, with plain units and biases."""
    quantised.write_opt(tmp_path / "c")
    bundle = convert(tmp_path / "c", tmp_path / "b")
    assert {"up_bias"} == {p.name for p in bundle.manifest.record.parts if p.name.endswith("_bias")}
    tokens = prompt(8, seed=9)
    want = mixtures.logits_of(quantised.opt(tmp_path / "c"), tokens)
    for backend in KINDS:
        with load(bundle.path, backend, predictor=None) as model:
            assert_same(decode(model, tokens)[0], want)


@pytest.mark.parametrize("backend", ["native", "parts-alias"])
def test_the_law_notices(made, backend):
    """One block taken for another is no longer the same model, nor is one left out."""
    source, target = made()
    tokens = prompt(6, seed=10)
    for change in ("swap", "leave"):
        with load(target, backend, "whole", predictor=None) as model:
            rows = model.flash.layers[1].rows
            ffn, keep = rows.ffn, np.arange(6) != 3
            if change == "swap":  # of two blocks that is the same sum: so one is there twice
                rows.settle()
                rows.move(np.array([2]), np.array([3]))
            else:
                rows.ffn = lambda x, n, *_, ffn=ffn, keep=keep: ffn(x, n, keep)
            with pytest.raises(AssertionError):
                assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


@pytest.mark.parametrize("stored", ["q4-32-f32", "mxfp4"])
@pytest.mark.parametrize("backend", KINDS)
def test_blocks_left_out_add_nothing(made, backend, stored):
    source, target = made("llama", stored)
    mlp = mixtures.reference(source).layers[0].mlp
    x = mx.random.normal((3, 128), key=mx.random.key(0))
    h = mx.sigmoid(mlp.gate_proj(x)) * mlp.gate_proj(x) * mlp.up_proj(x)
    with load(target, backend, "whole", predictor=None) as model:
        rows = model.flash.layers[0].rows
        for n, kept in ((12, range(12)), (12, (0, 3, 11)), (5, (1, 4)), (5, range(5))):
            keep = np.isin(np.arange(n), kept)
            masked = h * mx.array(np.repeat(np.isin(np.arange(12), kept), 32))
            want = np.array(mlp.down_proj(masked) - mlp.down_proj.bias)
            got = np.array(rows.ffn(x, n, None if keep.all() else keep)[0])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_half_precision_where_a_device_computes_in_it(made):
    """As Metal does: activations in the scales' dtype, hardly further from float32 than mlx-lm's are."""
    source, target = made(stored="q4")
    x = mx.random.normal((64, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    want = mixtures.reference(source).layers[0].mlp(x.astype(mx.float32))
    theirs = load_model(source)[0].layers[0].mlp(x)
    with load(target, "parts-alias", "whole", predictor=None) as model:
        ours, _ = model.flash.layers[0].rows.ffn(x, 6)
    assert ours.dtype == theirs.dtype == mx.bfloat16
    off = [mx.sqrt(mx.square(y - want).mean()).item() for y in (ours, theirs)]
    assert 0 < off[0] < 1.2 * off[1]


def test_budgets_are_met(made):
    _, target = made()
    with pytest.raises(BudgetError) as refused:
        load_bundle(target, memory=1)
    load_bundle(target, memory=refused.value.smallest).close()
    with pytest.raises(BudgetError):
        load_bundle(target, memory=refused.value.smallest - 4096)


def test_commands(made, capsys, tmp_path):
    source, _ = made("llama", "q4")
    target = tmp_path / "b.flash"
    (tmp_path / "text").write_text(
        "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    )
    main(["convert", str(source), str(target)])
    assert "4-bit affine, groups of 64" in capsys.readouterr().out
    main(["info", str(target), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["layout"], said["units_per_layer"], said["predictors"]) == ("blocks", 6, {})
    main(["verify", str(target)])
    assert "all 18 records" in capsys.readouterr().out
    main(
        [
            "generate",
            "--model",
            str(target),
            "-p",
            "It was",
            "-m",
            "3",
            "--memory",
            "5MB",
            "--max-kv-size",
            "64",
            "--json",
        ]
    )
    assert json.loads(capsys.readouterr().out)["mode"] == "exact (streaming)"
    main(
        [
            "eval",
            str(target),
            "--text",
            str(tmp_path / "text"),
            "--fidelity",
            "exact",
            "--tokens",
            "32",
            "--memory",
            "5MB",
            "--json",
        ]
    )
    said = json.loads(capsys.readouterr().out)
    assert (said["mode"], said["active"]) == ("exact (streaming)", 1)
    assert said["kl"] == pytest.approx(0, abs=1e-6)
    for command in (["calibrate", str(target)], ["train", str(target), "--text", str(tmp_path / "text")]):
        with pytest.raises(SystemExit):
            main(command)
        assert "it runs exactly" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "twice"), "-q", "4"])
    assert "already quantised" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj"


def without(name):
    return lambda w: {k: v for k, v in w.items() if k != name}


BAD = {
    "no scales": (without(f"{DOWN}.scales"), {}, "down_proj"),
    "no biases": (without(f"{DOWN}.biases"), {}, r"down_proj.biases' is missing"),
    "short scales": (lambda w: w | {f"{DOWN}.scales": w[f"{DOWN}.scales"][:, :5]}, {}, "has shape"),
    "scales of another type": (
        lambda w: w | {f"{DOWN}.{k}": w[f"{DOWN}.{k}"].astype(mx.float32) for k in ("scales", "biases")},
        {},
        "layer 1 are quantised otherwise",
    ),
    "scales of two types in every layer": (
        lambda w: {k: v.astype(mx.float32) if "up_proj.scales" in k else v for k, v in w.items()},
        {},
        "layer 0 are quantised otherwise",
    ),
    "NaN": (lambda w: w | {f"{DOWN}.scales": w[f"{DOWN}.scales"] * mx.nan}, {}, "NaN"),
    "groups that do not divide": (None, {"quantization": {"group_size": 80, "bits": 4}}, "cannot be quantised so"),
    "other groups than are stored": (None, {"quantization": {"group_size": 32, "bits": 4}}, "has shape"),
    "other bits than are stored": (None, {"quantization": {"group_size": 64, "bits": 8}}, "has shape"),
    "unknown mode": (None, {"quantization": {"group_size": 64, "bits": 4, "mode": "nf4"}}, "'nf4' is not supported"),
    "another's": (None, {"quantization": {"quant_method": "gptq", "bits": 4}}, "not as MLX does it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path, case):
    change, config, match = BAD[case]
    quantised.write(tmp_path / "c", "qwen2", change=change or (lambda w: w))
    said = json.loads((tmp_path / "c" / "config.json").read_text())
    if config:
        said.pop("quantization_config", None)
    (tmp_path / "c" / "config.json").write_text(json.dumps(said | config))
    with pytest.raises(ValueError, match=match) as refused:
        convert(tmp_path / "c", tmp_path / "b")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "b").exists()


MIXED = {
    "groups": ({"group_size": 32, "bits": 4}, "layer 1 are quantised otherwise"),
    "mode": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "layer 1 are quantised otherwise"),
    "floats": (False, r"layers.1.mlp.down_proj is not quantised"),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_one_format_cannot_hold(tmp_path, case):
    own, match = MIXED[case]
    quantised.write(tmp_path / "c", "qwen2", predicate=lambda path, module: own if path == DOWN else True)
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "c", tmp_path / "b")


@pytest.mark.parametrize("damage", ["part", "shape", "bits", "mode", "none", "units", "gate", "bias", "dtype"])
def test_damaged_manifests(made, tmp_path, damage):
    _, target = made()
    copy = tmp_path / "b.flash"
    shutil.copytree(target, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    record = manifest["record"]
    parts = record["parts"]
    if damage == "part":
        parts[0]["name"] = "gaet"
    elif damage == "shape":
        parts[0]["shape"].reverse()
    elif damage == "bits":
        manifest["quantization"]["bits"] = 8
    elif damage == "mode":
        manifest["quantization"]["mode"] = "mxfp4"
    elif damage == "none":
        manifest["quantization"] = None
    elif damage == "units":  # twice the blocks, of half the neurons
        record["parts"] = [p | {"shape": [n // 2 if n in (64, 8) else n for n in p["shape"]]} for p in parts]
    elif damage == "gate":  # a plain FFN, with as many neurons more
        for p in parts[:3]:
            p["name"] = p["name"].replace("gate", "side")
    elif damage == "bias":
        parts.append({"name": "up_bias", "dtype": "bfloat16", "shape": [64], "offset": record["stride"] - 128})
    else:
        parts[1]["dtype"] = "float16"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for file in sorted((copy / "layers").iterdir()):  # headers agree, so that the meaning of parts is what is checked
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[12:16], "little")
        said = json.loads(raw[16 : 16 + length]) | {"record": record}
        text = json.dumps(said).encode()
        raw[12:16], raw[16:16384] = len(text).to_bytes(4, "little"), text.ljust(16384 - 16, b"\0")
        file.write_bytes(raw)
    with pytest.raises(BundleError):
        load_bundle(copy)


def test_a_config_of_another_model(made, tmp_path):
    _, target = made()
    shutil.copytree(target, tmp_path / "b")
    config = json.loads((target / "config.json").read_text())
    for change in ({"intermediate_size": 320}, {"hidden_act": "gelu"}, {"num_hidden_layers": 2}):
        (tmp_path / "b" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_bundle(tmp_path / "b")


def test_every_backend_is_tested():
    assert {name.removeprefix("records").removeprefix("parts") for name in BACKENDS} == {
        name.removeprefix("parts") for name in KINDS
    }
