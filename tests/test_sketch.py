"""Sketches: activations come from resident low-bit copies, and only down rows are read.

The law: a model streamed by its sketches equals the dense model whose deciding matrices are the copies' values, for
every backend, dtype and budget; dense is the NumPy forward pass of `reference.py`, or mlx-lm's own class.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from build import BACKENDS, POST_NORM, Shape, load, prompt_of
from reference import Reference, stored_model

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from test_exactness import TOLERANCE, assert_same_logits  # noqa: E402 isort: skip

from mlxflash.assemble import described  # noqa: E402
from mlxflash.backends import FFN  # noqa: E402
from mlxflash.bundle import Bundle, BundleError, Part, make_record  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.pool import RecordRows, Staging, host_memory  # noqa: E402
from mlxflash.predictor import floats, low_bit_matrix  # noqa: E402
from mlxflash.reader import File, make_reader  # noqa: E402
from mlxflash.resident import tensors  # noqa: E402
from mlxflash.sketch import ERROR, Sketch, activations, choose_bits, fit, products_of, read_sketch, save_sketch  # noqa: E402
from mlxflash.thinning import Weights  # noqa: E402
from mlxflash.ways import Means, choose  # noqa: E402
from mlxflash.wishes import Wishes  # noqa: E402

SMALL = Shape()
WIDE = Shape(d_model=512, ffn=256, heads=8, dtype="float16", layers=3)
SKETCHED = {}  # made once per session and shape


def sketched(library, shape=SMALL, bits=None):
    """A bundle with sketches in 4 bits, made for random inputs; no level is measured."""
    key = (*vars(shape).values(), bits)
    if key not in SKETCHED:
        source = library.bundle(shape, bits)
        path = source.with_name(f"sketched-{len(SKETCHED)}")
        shutil.copytree(source, path)
        bundle = Bundle.open(path)
        ffn, rng = FFN.of(bundle.manifest), np.random.default_rng(0)
        for index in range(bundle.num_layers):
            weights, x = Weights(bundle, index), rng.normal(size=(200, shape.d_model)).astype(np.float32)
            stored = [(weights.first, weights.bias), (weights.up, weights.up_bias)][: len(products_of(ffn))]
            made = [fit(w, bias, x, x, 4) for w, bias in stored]
            save_sketch(path / "predictors" / "sketch" / f"{index:03d}.safetensors", ffn, made)
        SKETCHED[key] = path
    return SKETCHED[key]


def reference(path):
    """The dense model with the sketches' values in the place of fc1."""
    bundle, dense = Bundle.open(path), stored_model(path)
    ffn = FFN.of(bundle.manifest)
    for i, file in enumerate(bundle.predictor_files("sketch")):
        ((matrix, bias),) = read_sketch(file, ffn, bundle.manifest.layers[i])
        dense.weights[f"layers.{i}.fc1.weight"], dense.weights[f"layers.{i}.fc1.bias"] = floats(matrix), bias
    return Reference(dense.config, dense.weights)


def decoded(model, tokens):
    cache, got = make_prompt_cache(model), []
    for token in tokens:
        got.append(np.array(model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)))
    return np.array(got)


# The law


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", ["least", "part", "room"])
def test_streamed_equals_dense_with_the_copies(library, backend, budget):
    path, tokens = sketched(library), prompt_of(16)
    with load(path, backend, budget, "sketch") as model:
        got, flash = decoded(model, tokens), model.flash
        assert not flash.exact
        read = flash.stats(flash.snapshot(), 1).held_share if budget == "room" else flash.reader.num_bytes
    assert read
    assert_same_logits(got, reference(path).logits(tokens), TOLERANCE[mx.float32])


@pytest.mark.parametrize("backend", ["native", "parts-alias", "records-copy", "discrete"])
@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        (Shape(dtype="float16"), None),
        (Shape(dtype="bfloat16"), None),
        (Shape(dtype="float16"), 8),
        (Shape(dtype="bfloat16"), 4),
        (WIDE, None),
        (POST_NORM, None),
    ],
    ids=["f16", "bf16", "q8", "q4", "wide", "post-norm"],
)
def test_every_dtype(library, backend, shape, bits):
    path, tokens = sketched(library, shape, bits), prompt_of(12)
    with load(path, backend, "part", "sketch") as model:
        got = decoded(model, tokens)
        dtype = model.flash.backend.activation_dtype(model.flash.bundle.manifest)
    assert_same_logits(got, reference(path).logits(tokens), TOLERANCE[dtype])


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("backend", ["native", "parts-copy", "discrete"])
def test_prompts_and_few_tokens(library, backend, direct):
    """Prompts stream down rows, of neighbours in one read, and leave some in the window."""
    path, tokens = sketched(library, WIDE), prompt_of(90)
    want = reference(path).logits(tokens)
    with load(path, backend, "part", "sketch", direct=direct) as model:
        cache, got, at = make_prompt_cache(model), [], 0
        for length in (70, 1, 3, 1, 1, 14):
            part = model(mx.array([tokens[at : at + length]]), cache=cache)
            got.append(np.array(part[0].astype(mx.float32)))
            at += length
    assert_same_logits(np.concatenate(got), want, TOLERANCE[mx.float16])


def test_it_looks_ahead_and_stays_the_same(library, tmp_path):
    """The map that calibrating the low-bit predictor fitted names a sketch's units a layer early too."""
    path = shutil.copytree(sketched(library, WIDE), tmp_path / "ours.flash")
    shutil.copytree(library.calibrated(WIDE) / "predictors" / "look-ahead", path / "predictors" / "look-ahead")
    tokens = prompt_of(16)
    with load(path, "native", "part", "sketch", direct=True, look_ahead=True) as model:
        got, layers = decoded(model, tokens), model.flash.layers
        x, named = mx.random.normal((1, WIDE.d_model), key=mx.random.key(0)), []
        for layer in layers[:-1]:
            early = layer.ahead.start(x)()
            named.append((len(early), layer.next.units))
    assert_same_logits(got, reference(path).logits(tokens), TOLERANCE[mx.float16])
    assert all(0 < n < units for n, units in named)
    with load(path, "native", "part", "sketch", direct=True, look_ahead=False) as model:
        assert all(layer.ahead is None for layer in model.flash.layers)


def test_the_law_notices(library):
    """With another layer's copy the logits are others."""
    path = sketched(library)
    twisted = path.with_name("twisted")
    shutil.copytree(path, twisted)
    files = Bundle.open(twisted).predictor_files("sketch")
    shutil.copy(files[0], files[1])
    with load(twisted, "parts-alias", "part", "sketch") as model:
        got = decoded(model, prompt_of(8))
    with pytest.raises(AssertionError):
        assert_same_logits(got, reference(path).logits(prompt_of(8)), TOLERANCE[mx.float32])


def test_reads_half_of_a_record_and_holds_twice_as_many(library):
    shape, bytes_read, held = Shape(d_model=512, ffn=256, heads=8, layers=3), {}, {}
    path = sketched(library, shape)
    with load(path, "native", "part", "oracle") as model:
        memory = model.flash.plan.memory
    for predictor in ("oracle", "sketch"):
        with load_bundle(path, memory=memory, predictor=predictor, backend=BACKENDS["native"]()) as model:
            before = model.flash.snapshot()
            decoded(model, prompt_of(20))
            stats = model.flash.stats(before, 20)
            bytes_read[predictor] = stats.bytes_per_token / max(1, model.flash.snapshot().misses - before.misses)
            held[predictor] = sum(model.flash.plan.capacities)
    assert bytes_read["sketch"] <= 0.55 * bytes_read["oracle"]
    assert held["sketch"] > 1.5 * held["oracle"]


@pytest.mark.parametrize("budget", ["least", "part", "room"])
def test_sketches_of_ones_own_are_sketches(library, budget):
    """Rows hold down parts alone, and a margin of 0 is what those of the bundle have without a level."""
    path, tokens = sketched(library), prompt_of(12)
    with load(path, "native", budget, "sketch", margin=0) as model:
        want, plan = decoded(model, tokens), model.flash.plan
    own = own_sketches(path)
    memory = plan.memory + 20_000  # in memory they are some bytes larger than in files
    with load_bundle(path, memory=memory, predictor=own, backend=BACKENDS["native"]()) as model:
        flash = model.flash
        assert [layer.sketch for layer in flash.layers] == own
        assert flash.mode == "approximate (not measured)"
        assert all(layer.extent < 0.6 * layer.stride for layer in flash.layers)
        assert_same_logits(decoded(model, tokens), want, TOLERANCE[mx.float32])
        assert flash.reader.num_bytes > 0
    with load_bundle(path, predictor=own, device="cpu") as model:
        assert model.flash.mode == "exact (all resident)"
    with pytest.raises(ValueError, match="some of these predictors are sketches and some are not"):
        load_bundle(path, predictor=[own[0].above(np.zeros(SMALL.ffn)), *own[1:]])
    with pytest.raises(ValueError, match="compares whole records, and a sketch reads a part of each"):
        load_bundle(path, memory=memory, predictor=own, device="cpu", check_reads=True)


def own_sketches(path):
    bundle, backend = Bundle.open(path), BACKENDS["native"]()
    ffn, layers = FFN.of(bundle.manifest), bundle.manifest.layers
    return [
        Sketch(backend, ffn, read_sketch(file, ffn, layer), np.zeros(layer.units, np.float32))
        for file, layer in zip(bundle.predictor_files("sketch"), layers, strict=True)
    ]


# Rounding


def test_rounding_for_inputs_errs_less_on_them():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(8, 128)) * 3
    x = (rng.normal(size=(600, 8)) @ mix + rng.normal(size=(600, 128)) * 0.3 + 1).astype(np.float32)
    weight = rng.normal(size=(96, 128)).astype(np.float32)
    bias = rng.normal(size=96).astype(np.float32)
    matrix, offset = fit(weight, bias, x[:400], x[400:], 3)
    nearest = low_bit_matrix(mx.array(weight), 3)
    want = x[400:] @ weight.T + bias
    fitted = np.square(x[400:] @ floats(matrix).T + offset - want).mean()
    plain = x[400:] @ floats(nearest).T + bias - want
    assert fitted < 0.2 * np.square(plain - plain.mean(axis=0)).mean()
    assert matrix.nbytes == nearest.nbytes


def test_with_few_tokens_it_is_no_worse_than_rounding_to_the_nearest():
    rng = np.random.default_rng(0)
    x, test = (rng.normal(size=(n, 128)).astype(np.float32) for n in (20, 400))
    weight = rng.normal(size=(96, 128)).astype(np.float32)
    matrix, offset = fit(weight, np.zeros(96, np.float32), x, test, 3)
    plain = np.square(test @ (floats(low_bit_matrix(mx.array(weight), 3)) - weight).T).mean()
    assert np.square(test @ floats(matrix).T + offset - test @ weight.T).mean() < 1.25 * plain


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_more_bits_err_less(bits):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(300, 64)).astype(np.float32), rng.normal(size=(40, 64)).astype(np.float32)
    matrix, offset = fit(weight, np.zeros(40, np.float32), x, x, bits)
    error = np.square(x @ floats(matrix).T + offset - x @ weight.T).mean() / np.square(x @ weight.T).mean()
    assert 0.02 * 4.0**-bits < error < 4 * 4.0**-bits


def test_layers_get_the_bits_they_want():
    bits = choose_bits([0.0013, 0.00002, 0.00005, 0.0001])
    assert bits[0] == max(bits)
    assert bits[1] == min(bits) == 2
    assert sum(c * 4.0 ** (3 - b) for c, b in zip([0.0013, 0.00002, 0.00005, 0.0001], bits, strict=True)) <= ERROR
    assert choose_bits([-1e-6, 0.0]) == [2, 2]
    assert choose_bits([10.0]) == [8]


# Parts of records


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [(4096, 8192), (1000, 544), (100, 6)], ids=["blocks", "packed", "small"])
def test_a_part_of_every_record_lands(tmp_path, direct, sizes):
    record = make_record([Part("up", "uint8", (sizes[0],), 0), Part("down", "uint8", (sizes[1],), 0)])
    part, units = record.only("down"), 300
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (units, record.stride), np.uint8)
    path = tmp_path / "layer"
    path.write_bytes(b"\0" * 16384 + stored.tobytes() + b"\0" * 8192)
    want = stored[:, sizes[0] : sum(sizes)]
    assert part.aligned == (sizes[0] == 4096)
    reader, file = make_reader(direct=direct), File(path, direct)
    rows = RecordRows(part, host_memory(units * part.stride)[: units * part.stride], Staging(1 << 21, part))
    memory = np.frombuffer(rows.memory, np.uint8).reshape(units, part.stride)
    for positions in (rng.permutation(units)[:20], np.arange(units), np.arange(40, 280, 2), np.array([7])):
        positions = np.sort(positions)
        memory[:] = 0
        before = reader.num_reads
        slots = rng.permutation(units)[: len(positions)]
        rows.land(reader, file, positions, slots).wait()
        np.testing.assert_array_equal(memory[slots, : part.num_bytes], want[positions])
        if len(positions) == units:
            assert reader.num_reads - before < units / 4  # what lies between neighbours is read through
    file.close()
    reader.close()


# Choice and words


def test_activations_are_those_of_the_layout():
    rng = np.random.default_rng(0)
    first, up = rng.normal(size=(2, 3, 8)).astype(np.float32)
    positive = np.maximum(first, 0)
    silu = first / (1 + np.exp(-first))
    for layout, activation, want in (
        ("plain", "relu", positive),
        ("plain", "relu2", positive**2),
        ("gated", "relu", positive * up),
        ("gated", "drelu", positive * np.maximum(up, 0)),
        ("gated", "fatrelu", first * (first > 0.3) * up),
        ("gated", "silu", silu * up),
    ):
        ffn = FFN(layout, activation, make_record([Part("down", "float32", (4,), 0)]), 4, threshold=0.3)
        np.testing.assert_allclose(activations(ffn, first, up), want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def calibrated(library, tmp_path_factory):
    from mlxflash.calibrate import calibrate

    path = tmp_path_factory.mktemp("sketch") / "calibrated"
    shutil.copytree(library.bundle(WIDE), path)
    return calibrate(Bundle.open(path), np.random.default_rng(0).integers(3, 200, 200), predictor="sketch")


def test_it_is_calibrated_and_then_chosen(calibrated):
    from mlxflash.commands.inspect import describe

    bundle, path = calibrated, calibrated.path
    said = bundle.manifest.calibration
    assert said["sketch"]["kl"] <= ERROR
    assert all(each["met"] for level in said["fidelity"]["sketch"]["levels"].values() for each in level)
    assert "bits by layer" in describe(bundle)
    with load(path, "native", "part", "sketch") as model:
        memory = model.flash.plan.memory
    with load_bundle(path, memory=memory, device="cpu") as model:  # low-bit was not measured
        assert model.flash.predictor == "sketch"
        assert model.flash.mode.startswith("approximate (high")
    with load_bundle(path, memory=memory, device="cpu", predictor="sketch", margin=0) as model:
        assert model.flash.mode.startswith("approximate (sketch: perplexity +")
    with load_bundle(path, memory=memory, device="cpu", fidelity="exact") as model:
        assert model.flash.exact


def test_a_way_is_chosen_without_building_a_model(calibrated):
    config, _ = described(calibrated)
    with load(calibrated.path, "native", "part", "sketch") as model:
        plan = model.flash.plan
    backend, ffn = BACKENDS["native"](), FFN.of(calibrated.manifest)
    means = Means(calibrated, config, tensors(calibrated), ffn, backend, plan.memory, None, plan.context, False)
    for wishes, predictor, level in (
        (Wishes(), "sketch", "high"),
        (Wishes(fidelity="exact"), "all", None),
        (Wishes(predictor="sketch", margin=0), "sketch", None),
    ):
        way = choose(wishes.checked(calibrated), means)
        assert (way.predictor, way.level and way.level.name, way.sketched) == (predictor, level, predictor == "sketch")
    assert choose(Wishes("sketch").checked(calibrated), replace(means, memory=None)).plan.whole
    with pytest.raises(BundleError, match="fidelity 'fast' of its low-bit predictor was not measured"):
        Wishes(fidelity="fast").checked(calibrated)


def test_a_level_that_counts_on_memory_waits_until_it_is_filled(calibrated, tmp_path):
    """Until windows are full, layers name what the level measured with nothing held would; then fewer."""
    path = shutil.copytree(calibrated.path, tmp_path / "ours.flash")
    manifest = json.loads((path / "manifest.json").read_text())
    for level in manifest["calibration"]["fidelity"]["sketch"]["levels"]["fast"]:
        level["multiplier"] += level["held"]  # further apart than they are
    (path / "manifest.json").write_text(json.dumps(manifest))
    x = mx.random.normal((1, WIDE.d_model), key=mx.random.key(0))
    with load(path, "native", "part", "sketch", fidelity="fast", window=1) as model:
        named, memory = [layer.predictor.start(x)() for layer in model.flash.layers], model.flash.plan.memory
        assert model.flash.level.held == 0
    settings = {"memory": memory, "fidelity": "fast", "predictor": "sketch", "backend": BACKENDS["native"]()}
    with load_bundle(path, **settings) as model:
        assert model.flash.level.held > 0
        for layer, cold in zip(model.flash.layers, named, strict=True):
            np.testing.assert_array_equal(layer.predictor.start(x)(), cold)
        decoded(model, prompt_of(40))
        for layer, cold in zip(model.flash.layers, named, strict=True):
            warm = layer.predictor.start(x)()
            assert np.isin(warm, cold).all()
            assert len(warm) < len(cold)
        model.flash.forget()
        np.testing.assert_array_equal(model.flash.layers[0].predictor.start(x)(), named[0])


def test_bad_input_is_one_sentence(library, tmp_path):
    path = library.bundle()
    with pytest.raises(BundleError, match="has no sketch predictor; `mlxflash calibrate --predictor sketch` makes one"):
        load(path, "native", "least", "sketch")
    path = tmp_path / "damaged"
    shutil.copytree(sketched(library), path)
    with pytest.raises(ValueError, match="compares whole records, and a sketch reads a part of each"):
        load(path, "native", "part", "sketch", check_reads=True)
    file = Bundle.open(path).predictor_files("sketch")[1]
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(BundleError, match=r"001\.safetensors: not a sketch"):
        load(path, "native", "least", "sketch")
    shutil.copy(sketched(library, WIDE) / "predictors" / "sketch" / "001.safetensors", file)
    with pytest.raises(BundleError, match=r"001\.safetensors: made for another model; calibrate again"):
        load(path, "native", "least", "sketch")
