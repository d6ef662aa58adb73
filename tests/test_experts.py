"""The exactness law for mixtures of experts: streamed equals mlx-lm's own model of the same checkpoint.

The reference is loaded by mlx-lm from the checkpoint's files and computes in float32, whatever they store; ours reads
a bundle. Teacher-forced logits, one token per pass and whole prompts, agree within 2e-5 of their range, and the most
likely token is the same.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mixtures
from build import load

mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlxflash.converters import convert  # noqa: E402
from mlxflash.converters.checkpoint import CheckpointError  # noqa: E402

from mlxflash.bundle import Bundle, BundleError  # noqa: E402
from mlxflash.evaluate import Dense, evaluate  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.models import FAMILIES, kv_values_per_token, state_values  # noqa: E402
from mlxflash.plan import BudgetError  # noqa: E402

GOLDEN = Path(__file__).with_name("golden") / "mixtures"
TOLERANCE = 2e-5
EXPERTS = ("native", "parts-alias", "parts-copy", "discrete")  # record- or part-shaped is one thing for experts
AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
MIXED = AFFINE | {"model.layers.0.mlp.gate": {"group_size": 32, "bits": 8}, "lm_head": {"group_size": 64, "bits": 6}}
STORED = {
    "f32": ("float32", None),
    "f16": ("float16", None),
    "bf16": ("bfloat16", None),
    "q4": ("bfloat16", AFFINE),
    "q8": ("float16", AFFINE | {"bits": 8}),
    "mixed": ("float32", MIXED),
    "mxfp4": ("bfloat16", {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Checkpoints, bundles and reference logits, made once."""
    root, made = tmp_path_factory.mktemp("mixtures"), {}

    def get(kind, stored="f32", naming="hub"):
        if (kind, stored, naming) not in made:
            dtype, quantized = STORED[stored]
            source = root / f"{kind}-{stored}-{naming}"
            mixtures.write(source, kind, naming, dtype, quantized)
            target = source.with_suffix(".flash")
            convert(source, target)
            made[kind, stored, naming] = source, target
        return made[kind, stored, naming]

    return get


_logits = {}


def dense_logits(source, tokens):
    if (source, tuple(tokens)) not in _logits:
        _logits[source, tuple(tokens)] = mixtures.logits_of(mixtures.reference(source), tokens)
    return _logits[source, tuple(tokens)]


def assert_same(got, want, tolerance=TOLERANCE):
    assert np.isfinite(got).all()
    span = np.ptp(want, axis=-1)
    assert (np.abs(got - want).max(axis=-1) / span).max() <= tolerance
    best = np.sort(want, axis=-1)
    clear = best[:, -1] - best[:, -2] > tolerance * span
    assert clear.mean() >= 0.5, "the reference must be decided, or equal choices say nothing"
    assert (got.argmax(axis=-1) == want.argmax(axis=-1))[clear].all()


def decode(model, tokens):
    """Logits one token at a time [n, vocabulary], and bytes read by each."""
    cache, got, read = make_prompt_cache(model), [], []
    for token in tokens:
        before = model.flash.snapshot().num_bytes
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        got.append(np.array(logits.astype(mx.float32)))
        read.append(model.flash.snapshot().num_bytes - before)
    for layer in model.flash.layers:
        layer.window.check()
    assert model.flash.exact
    return np.array(got), read


def prompt(length, seed=0):
    return [2, *np.random.default_rng(seed).integers(3, 300, length - 1).tolist()]


@pytest.mark.parametrize("naming", ["hub", "mlx"])
@pytest.mark.parametrize("kind", mixtures.CONFIGS)
def test_every_family(zoo, kind, naming):
    source, target = zoo(kind, naming=naming)
    tokens = prompt(16, seed=4)
    for backend in ("native", "parts-alias", "discrete"):
        with load(target, backend, predictor=None) as model:
            assert max(model.flash.plan.capacities) == mixtures.config_of(kind)["num_experts_per_tok"]
            got, read = decode(model, tokens)
            assert_same(got, dense_logits(source, tokens))
            assert min(read) > 0


@pytest.mark.parametrize("kind", mixtures.CONFIGS)
def test_transformers_logits(zoo, kind):
    """What transformers' own classes computed, kept by golden/make_mixtures.py."""
    _, target = zoo(kind)
    with np.load(GOLDEN / f"{kind}.npz") as kept:
        tokens, want = kept["tokens"].tolist(), kept["logits"]
    with load(target, "native", predictor=None) as model:
        assert_same(decode(model, tokens)[0], want)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("backend", EXPERTS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "nemotron_h"])
def test_every_way_of_storing(zoo, kind, backend, stored):
    source, target = zoo(kind, stored, "mlx")
    tokens = prompt(12, seed=1)
    with load(target, backend, predictor=None) as model:
        got, read = decode(model, tokens)
        assert_same(got, dense_logits(source, tokens))
        assert min(read) > 0


@pytest.mark.parametrize("stored", ["q4", "mxfp4"])
def test_biases_beside_quantised_experts(zoo, stored):
    source, target = zoo("gpt_oss", stored, "mlx")
    tokens = prompt(12, seed=2)
    for backend in ("native", "parts-alias", "discrete"):
        with load(target, backend, predictor=None) as model:
            assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


@pytest.mark.parametrize("budget", ["whole", "room", "part", "least"])
@pytest.mark.parametrize("backend", EXPERTS)
def test_every_budget(zoo, backend, budget):
    source, target = zoo("qwen2_moe")
    tokens = prompt(24, seed=3)
    with load(target, backend, budget, predictor=None) as model:
        got, read = decode(model, tokens)
        assert_same(got, dense_logits(source, tokens))
        if budget == "whole":
            assert max(read) == 0
        elif budget == "room":
            assert sum(read[:5]) > 3 * sum(read[-5:])
        elif budget == "least":
            assert min(read) > 0
        else:
            assert np.mean(read[12:]) < np.mean(read[:4])


@pytest.mark.parametrize(("kind", "length"), [("mixtral", 2), ("nemotron_h", 17), ("qwen3_moe", 200)])
@pytest.mark.parametrize("budget", ["whole", "part", "least"])
@pytest.mark.parametrize("backend", EXPERTS)
def test_prompts(zoo, backend, budget, kind, length):
    """A chunk reads each expert that it needs and that is not held once per layer; decoding then goes on."""
    source, target = zoo(kind)
    tokens = prompt(length, seed=length)
    with load(target, backend, budget, predictor=None) as model:
        cache, got = make_prompt_cache(model), []
        for first in range(0, length, 64):
            before, held = model.flash.snapshot().num_bytes, [la.window.num_rows for la in model.flash.layers]
            got.append(np.array(model(mx.array([tokens[first : first + 64]]), cache=cache)[0]))
            read = model.flash.snapshot().num_bytes - before
            most = sum(la.units - n for la, n in zip(model.flash.layers, held, strict=True))
            assert read <= most * model.flash.bundle.manifest.record.stride
            assert (read > 0) == (budget != "whole" and most > 0)
        more = prompt(4, seed=9)
        for token in more:
            got.append(np.array(model(mx.array([[token]]), cache=cache)[0]))
        assert_same(np.concatenate(got), dense_logits(source, tokens + more))


@pytest.mark.parametrize("backend", EXPERTS)
def test_batches(zoo, backend):
    """Tokens of several sequences choose more experts than the smallest window holds."""
    source, target = zoo("mixtral")
    rows = [prompt(10, seed=20 + i) for i in range(4)]
    with load(target, backend, predictor=None) as model:
        cache, got = make_prompt_cache(model), []
        for column in np.array(rows).T:
            got.append(np.array(model(mx.array(column[:, None]), cache=cache)[:, -1]))
        for i, row in enumerate(rows):
            assert_same(np.array(got)[:, i], dense_logits(source, row))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("backend", EXPERTS)
def test_windows_and_ways_of_reading(zoo, backend, window, direct):
    source, target = zoo("olmoe")
    tokens = prompt(16, seed=5)
    with load(target, backend, "part", predictor=None, window=window, direct=direct, check_reads=True) as model:
        assert model.flash.bundle.manifest.record.aligned
        assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_from_floats(zoo, tmp_path, bits):
    """As mlx-lm's model of the weights that the bundle's records and resident tensors stand for."""
    source, _ = zoo("qwen3_moe", "bf16", "hub")
    target = tmp_path / "q.flash"
    bundle = convert(source, target, bits=bits, group_size=32)
    model = mixtures.reference(source)
    weights = {k: v for file in bundle.resident_files() for k, v in mx.load(str(file)).items()}
    for name in [n for n in weights if n.endswith(".scales")]:
        base = name.removesuffix(".scales")
        q = [weights.pop(f"{base}.{part}") for part in ("weight", "scales", "biases")]
        weights[f"{base}.weight"] = mx.dequantize(q[0], q[1].astype(mx.float32), q[2].astype(mx.float32), 32, bits)
    for i, entry in enumerate(bundle.manifest.layers):
        for part in ("gate", "up", "down"):
            arrays = [records_part(bundle, entry, f"{part}{end}") for end in ("", "_scales", "_biases")]
            matrix = mx.dequantize(arrays[0], *(a.astype(mx.float32) for a in arrays[1:]), 32, bits)
            weights[f"model.layers.{i}.mlp.switch_mlp.{part}_proj.weight"] = matrix
    model.load_weights([(k, v.astype(mx.float32)) for k, v in weights.items()])
    tokens = prompt(12, seed=6)
    want = mixtures.logits_of(model, tokens)
    float_ = dense_logits(source, tokens)
    assert np.abs(want - float_).max() > 100 * TOLERANCE  # quantised is not float, or nothing was tested
    for backend in EXPERTS:
        with load(target, backend, predictor=None) as streamed:
            assert_same(decode(streamed, tokens)[0], want)


def records_part(bundle, entry, name):
    record = bundle.manifest.record
    raw = np.fromfile(bundle.path / entry.file, np.uint8, entry.units * record.stride, offset=16384)
    part = record[name]
    data = np.ascontiguousarray(raw.reshape(entry.units, -1)[:, part.offset : part.offset + part.num_bytes])
    kind = {"uint32": np.uint32}.get(part.dtype, np.uint16)
    array = mx.array(data.view(kind).reshape(entry.units, *part.shape))
    return array if part.dtype == "uint32" else array.view(getattr(mx, part.dtype))


@pytest.mark.parametrize("low", [2, 3, 4, 5])
def test_layers_of_other_bits_and_groups(tmp_path, low):
    """As mlx-lm's recipes mix them: more bits for some layers' down; besides, smaller groups for another's."""
    more = {"model.layers.1.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 6}}
    more["model.layers.2.mlp.switch_mlp.up_proj"] = {"group_size": 32, "bits": 8}
    settings = {"group_size": 64, "bits": low, "mode": "affine"} | more
    source, changes = tmp_path / "m", {"moe_intermediate_size": 128, "hidden_size": 128}
    mixtures.write(source, "qwen3_moe", "mlx", "float16", settings, **changes)
    bundle = convert(source, tmp_path / "m.flash")
    assert bundle.manifest.quantization["bits"] == 8
    assert bundle.manifest.formats == {"gate": (low, 64), "down": (6, 32)}
    tokens = prompt(12, seed=13)
    for backend in EXPERTS:
        with load(tmp_path / "m.flash", backend, predictor=None) as model:
            assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


def test_quantised_experts_are_copied_verbatim(zoo):
    source, target = zoo("qwen3_moe", "q4", "mlx")
    stored, bundle = mx.load(str(source / "model.safetensors")), Bundle.open(target)
    for i, entry in enumerate(bundle.manifest.layers):
        for part in ("gate", "up", "down"):
            for kind, end in (("weight", ""), ("scales", "_scales"), ("biases", "_biases")):
                want = stored[f"model.layers.{i}.mlp.switch_mlp.{part}_proj.{kind}"]
                assert mx.array_equal(records_part(bundle, entry, part + end), want)


def test_dense_layers_among_the_mixtures_stay_resident(zoo):
    _, target = zoo("deepseek_v3")
    bundle = Bundle.open(target)
    assert bundle.num_layers == bundle.config()["num_hidden_layers"] - 1
    with load(target, "native", predictor=None) as model:
        assert type(model.layers[0].mlp).__name__ == "DeepseekV3MLP"


def test_what_corrects_scores_is_not_rounded(tmp_path):
    """float32 beside bfloat16 weights: rounded, it would choose other experts."""
    mixtures.write(tmp_path / "m", "deepseek_v3", dtype="bfloat16")
    file = tmp_path / "m" / "model.safetensors"
    weights = mx.load(str(file))
    name = next(n for n in weights if n.endswith("e_score_correction_bias"))
    weights[name] = mx.random.uniform(shape=weights[name].shape)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    convert(tmp_path / "m", tmp_path / "m.flash")
    with load(tmp_path / "m.flash", "parts-alias", predictor=None) as model:
        kept = dict(tree_flatten(model.parameters()))[name]
        assert kept.dtype == mx.float32
        assert mx.array_equal(kept, weights[name])


@pytest.mark.parametrize("backend", EXPERTS)
def test_the_law_notices(zoo, backend):
    """One pair of token and expert computed with another expert's weights is no longer the same model."""
    source, target = zoo("mixtral")
    tokens = prompt(12, seed=7)
    with load(target, backend, predictor=None) as model:
        rows = model.flash.layers[0].rows
        experts = rows.experts
        rows.experts = lambda x, tokens, slots: experts(x, tokens, np.roll(slots, 1))
        with pytest.raises(AssertionError):
            assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


def test_failed_reads_leave_the_model_usable(zoo, tmp_path):
    source, target = zoo("mixtral")
    tokens = prompt(8, seed=8)
    with load(target, "native", predictor=None) as model:
        land, left = model.flash.layers[1].rows.land, [2]

        def failing(*call):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(5, "as if the disk had failed")
            return land(*call)

        model.flash.layers[1].rows.land = failing
        with pytest.raises(OSError, match="as if"):
            decode(model, tokens)
        assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


class Interrupted(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("budget", ["least", "part", "room"])
@pytest.mark.parametrize("backend", EXPERTS)
def test_interrupted_passes_leave_no_trace(zoo, backend, budget):
    """Cut off between any two steps of a prompt's or a token's pass, the model computes the same afterwards."""
    source, target = zoo("mixtral")
    tokens, rng, interrupted = prompt(12, seed=10), np.random.default_rng(11), 0
    with load(target, backend, budget, predictor=None) as model:

        def interrupting(step):
            def either(*call, **named):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Interrupted
                return step(*call, **named)

            return either

        for layer in model.flash.layers:
            for owner, name in (
                (layer.window, "_land"), (layer.window, "_assign"), (layer.window, "_finish"), (layer.window, "admit"),
                (layer.window._policy, "use"), (layer.rows, "land"), (layer.rows, "experts"), (layer.rows, "settle"),
                (layer.rows, "join"), (layer.blocks, "start"), (layer.blocks, "_fill"),
            ):  # fmt: skip
                setattr(owner, name, interrupting(getattr(owner, name)))
        for _ in range(12):
            left = int(rng.integers(1, 90))
            cache = make_prompt_cache(model)
            try:
                for part in (tokens, [5], [6], [7]):
                    model(mx.array([part]), cache=cache)
            except Interrupted:
                interrupted += 1
            left = 0
            got = np.array(model(mx.array([tokens]), cache=make_prompt_cache(model))[0])
            assert_same(got, dense_logits(source, tokens))
        assert_same(decode(model, tokens)[0], dense_logits(source, tokens))
        assert interrupted > 4


def poison(rows, slots):
    if hasattr(rows, "_pools"):
        for pool in rows._pools.values():
            pool[mx.array(slots.astype(np.int32))] = float("nan")
    else:
        np.frombuffer(rows._memory.memory, np.uint8).reshape(rows.capacity, -1)[slots] = 0xFF


def test_what_other_slots_hold_never_matters(zoo):
    """Slots that no chosen expert is in are filled with NaN before every token."""
    source, target = zoo("qwen3_moe")
    tokens = prompt(10, seed=12)
    for backend in EXPERTS:
        with load(target, backend, "part", predictor=None) as model:
            for layer in model.flash.layers:

                def poisoned(x, tokens, slots, layer=layer, experts=layer.rows.experts):
                    poison(layer.rows, np.setdiff1d(np.arange(layer.window.num_rows, layer.window.capacity), slots))
                    return experts(x, tokens, slots)

                layer.rows.experts = poisoned
            assert_same(decode(model, tokens)[0], dense_logits(source, tokens))


# --- bad input ------------------------------------------------------------------------------------------------


def test_budgets(zoo):
    _, target = zoo("qwen3_moe")
    with pytest.raises(BudgetError) as refused:
        load_bundle(target, memory=1)
    load_bundle(target, memory=refused.value.smallest).close()
    with pytest.raises(BudgetError):
        load_bundle(target, memory=refused.value.smallest - 4096)


@pytest.mark.parametrize("predictor", ["low-bit", "low-rank", "oracle"])
def test_predictors_are_refused(zoo, predictor):
    _, target = zoo("mixtral")
    with pytest.raises(ValueError, match="router"):
        load_bundle(target, predictor=predictor)


def test_fidelity_is_not_measured(zoo):
    _, target = zoo("mixtral")
    with Dense(Bundle.open(target), np.arange(100)) as dense, pytest.raises(ValueError, match="computed exactly"):
        evaluate(dense)


@pytest.mark.parametrize("kind", ["nemotron_h", "deepseek_v3", "mixtral"])
def test_a_sequence_takes_what_is_planned_for_it(zoo, kind):
    _, target = zoo(kind)
    with load(target, "parts-alias", predictor=None) as model:
        cache = make_prompt_cache(model)
        model(mx.array([prompt(256)]), cache=cache)  # key-value caches grow by 256
        config = model.flash.bundle.config()
        planned = 256 * kv_values_per_token(config) + state_values(config)
        held = [a for _, a in tree_flatten([c.state for c in cache]) if isinstance(a, mx.array)]
        assert sum(a.nbytes for a in held) == 4 * planned


def test_more_experts_per_token_than_there_are(zoo, tmp_path):
    source, target = zoo("mixtral")
    for path, make in ((source, lambda p: convert(p, tmp_path / "x.flash")), (target, load_bundle)):
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 17}))
        with pytest.raises(ValueError, match="num_experts_per_tok"):
            make(copy)


@pytest.mark.parametrize("change", [
    {"hidden_act": "gelu"}, {"hidden_act": "relu"}, {"model_type": "mixture"}, {"num_local_experts": 7},
    {"intermediate_size": 96}, {"num_experts_per_tok": 0}, {"num_experts_per_tok": "two"},
])  # fmt: skip
def test_bad_configs(zoo, tmp_path, change):
    source, target = zoo("mixtral")
    for path, make in ((source, lambda p: convert(p, tmp_path / "x.flash")), (target, load_bundle)):
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"config|hidden_act") as refused:
            make(copy)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "x.flash").exists()


@pytest.mark.parametrize("change", [
    {"hybrid_override_pattern": "M*"}, {"hybrid_override_pattern": "ME*X"}, {"hybrid_override_pattern": "MEE"},
    {"moe_latent_size": 32}, {"mlp_hidden_act": "silu"}, {"n_group": 2}, {"mamba_hidden_act": "relu"},
])  # fmt: skip
def test_hybrids_that_are_not_computed(zoo, tmp_path, change):
    source, _ = zoo("nemotron_h")
    shutil.copytree(source, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"config\.json|mlp_hidden_act") as refused:
        convert(tmp_path / "m", tmp_path / "m.flash")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("own", "said"), [
    (False, "'down' of the experts of layer 1 is not quantised, 'up' of layer 0 is 4-bit affine"),
    ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "'down' of the experts of layer 1 is 4-bit mxfp4"),
])  # fmt: skip
def test_experts_that_one_record_cannot_hold(tmp_path, own, said):
    settings = AFFINE | {"model.layers.1.mlp.switch_mlp.down_proj": own}
    mixtures.write(tmp_path / "m", "qwen3_moe", "mlx", "bfloat16", settings)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "m", tmp_path / "m.flash")
    assert not (tmp_path / "m.flash").exists()


def test_quantised_twice(zoo, tmp_path):
    source, _ = zoo("qwen3_moe", "q4", "mlx")
    with pytest.raises(ValueError, match="already quantised"):
        convert(source, tmp_path / "m.flash", bits=4)


@pytest.mark.parametrize(
    "damage", ["part", "shape", "bits", "mode", "order", "dtype", "scales", "activation", "format", "formats"]
)
def test_damaged_manifests(zoo, tmp_path, damage):
    _, target = zoo("qwen3_moe", "q4", "mlx")
    copy = tmp_path / "b.flash"
    shutil.copytree(target, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    parts = manifest["record"]["parts"]
    if damage == "part":
        parts[0]["name"] = "gaet"
    elif damage == "shape":
        parts[0]["shape"].reverse()
    elif damage == "bits":
        manifest["quantization"]["bits"] = 8
    elif damage == "mode":
        manifest["quantization"]["mode"] = "mxfp4"
    elif damage == "format":
        manifest["quantization"]["parts"] = {"down": {"bits": 6, "group_size": 32}}
    elif damage == "formats":
        manifest["quantization"]["parts"] = {"down": {"bits": 4}}
    elif damage == "order":
        parts[0]["name"], parts[3]["name"] = "up", "gate"
    elif damage == "dtype":
        parts[0]["dtype"] = "float32"
    elif damage == "scales":
        parts[1]["dtype"] = "float16"
    else:
        manifest["activation"] = "relu"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    head = [manifest["record"]]
    for file in sorted((copy / "layers").iterdir()):  # headers agree, so that the meaning of parts is what is checked
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[12:16], "little")
        said = json.loads(raw[16 : 16 + length]) | {"record": head[0]}
        text = json.dumps(said).encode()
        raw[12:16], raw[16:16384] = len(text).to_bytes(4, "little"), text.ljust(16384 - 16, b"\0")
        file.write_bytes(raw)
    if damage == "order":  # two parts of one shape, exchanged: nothing on disk says otherwise, so this is allowed
        load_bundle(copy).close()
        return
    with pytest.raises(BundleError):
        load_bundle(copy)


def test_every_mixture_of_the_table_is_tested():
    assert {name for name, family in FAMILIES.items() if family.layout == "experts"} == set(mixtures.CONFIGS)


def test_a_calibrated_mixture_misses_what_its_curves_say(zoo, tmp_path, monkeypatch):
    """Teacher-forced through the decode path, on the text they were measured on; the forecast takes them from there."""
    from mlxflash.routing import measure_routing

    monkeypatch.setenv("MLXFLASH_CACHE", str(tmp_path / "cache"))
    path = shutil.copytree(zoo("qwen3_moe")[1], tmp_path / "ours.flash")
    with load(path, "native", "part", None, direct=True) as model:
        before = model.flash.forecast
        said = model.flash.describe()
    text = np.random.default_rng(3).integers(3, 300, 128)
    curves = measure_routing(Bundle.open(path), text).manifest.calibration["router"]["misses"]
    with load(path, "native", "part", None, direct=True) as model:
        held = model.flash.plan.capacities
        cache = make_prompt_cache(model)
        counts = []
        for i, token in enumerate(text.tolist()):
            if i == 64:  # sequences of half the text
                cache = make_prompt_cache(model)
            model(mx.array([[token]]), cache=cache)
            counts.append([layer.window.num_misses for layer in model.flash.layers])
        after = model.flash.forecast
    missed = (np.array(counts[-1]) - counts[len(text) // 4 - 1]) / (len(text) * 3 // 4)
    for n, curve, real in zip(held, curves["layers"], missed, strict=True):
        assert real == pytest.approx(np.interp(n / 16, curves["shares"], curve), abs=0.25)
        assert curve[0] > 3 * curve[-1]
    if before is None:
        pytest.skip("this file system has no direct reads")
    assert before.chance
    assert not after.chance
    assert before.reads == pytest.approx(sum(4 * (1 - n / 16) for n in held))
    assert after.reads == pytest.approx(missed.sum(), abs=0.75)
    assert "or more tokens per second" in said
    damaged = json.loads((path / "manifest.json").read_text())
    damaged["calibration"]["router"]["misses"]["layers"].pop()
    (path / "manifest.json").write_text(json.dumps(damaged))
    with pytest.raises(BundleError, match="misses of its experts"):
        Bundle.open(path)


def test_calibrate_and_info_tell_of_a_router(zoo, tmp_path, capsys):
    from mlxflash.cli import main

    path = shutil.copytree(zoo("mixtral")[1], tmp_path / "ours.flash")
    main(["calibrate", str(path), "--tokens", "64"])
    assert (
        "experts missed per token and layer, half held (64 tokens of the model's own text)" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        main(["eval", str(path), "--text", "unread"])
    assert "a mixture is computed exactly" in capsys.readouterr().err
