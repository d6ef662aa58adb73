"""The bound's law: what it rules out does not fire, and with it streamed equals dense.

Whether a unit fires is decided here in float64, on the records as other code reads them, for inputs that try to break
the proof: in the direction of a unit's own error, which makes Cauchy-Schwarz an equality, under offsets that leave the
sum a hair above zero, so that nothing but the allowance for rounding keeps it; huge, tiny, zero and no numbers at all.
"""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from build import BACKENDS, Shape, load, prompt_of
from mlxflash import ways
from mlxflash.backends import FFN
from mlxflash.bound import BITS, Bound, bound_file, load_bound, lost, make_bound
from mlxflash.bundle import Bundle, BundleError
from mlxflash.calibrate import calibrate
from mlxflash.commands.inspect import describe
from mlxflash.model import load_bundle
from mlxflash.order import reorder
from mlxflash.plan import BudgetError
from mlxflash.predictor import deciding, floats, low_bit_matrix
from reference import dequantize, read_records
from test_diskprofile import made as disk_like
from test_exactness import SOME, STORED, assert_exact, bundle_of

WIDE = Shape(d_model=512, ffn=160, heads=8)
TEXT = np.random.default_rng(5).integers(3, 300, 160)


@pytest.fixture(scope="module")
def measured(library, tmp_path_factory):
    """A stored dtype to a bundle with a bound, made once; not to be changed."""
    made = {}

    def get(stored="f32", shape=Shape()):  # noqa: B008
        if (stored, shape) not in made:
            path = tmp_path_factory.mktemp("bound") / f"{stored}.flash"
            shutil.copytree(bundle_of(library, stored, shape), path)
            calibrate(Bundle.open(path), TEXT, predictor="bound")
            made[stored, shape] = path
        return made[stored, shape]

    return get


def weights_of(path):
    """Layer 0's deciding matrix as it lies on disk, float64 [units, d_model]; scales and biases as they are stored."""
    manifest = json.loads((path / "manifest.json").read_text())
    layer, quantization = manifest["layers"][0], manifest["quantization"]
    parts = read_records(path / layer["file"], layer["units"], manifest["record"])
    if not quantization:
        return parts["up"].astype(np.float64)
    scales, biases = (parts[f"up_{name}"].astype(np.float64) for name in ("scales", "biases"))
    codes = dequantize(parts["up"], np.ones_like(scales), np.zeros_like(biases), quantization["bits"])
    return codes * np.repeat(scales, quantization["group_size"], 1) + np.repeat(biases, quantization["group_size"], 1)


def attacks(weight, copy, mean):
    """Inputs float32 [n, d_model]; the first third lies in the direction of units' errors."""
    rng = np.random.default_rng(1)
    width = weight.shape[1]
    error = (weight - floats(copy))[rng.permutation(len(weight))[:24]]
    along = error / np.maximum(np.linalg.norm(error, axis=1, keepdims=True), 1e-30)
    along *= 10.0 ** rng.uniform(-3, 4, (len(along), 1))
    usual = rng.normal(size=(8, width)) + mean
    inputs = [along, mean + along, usual, np.eye(width)[:4] * 300, np.sign(weight[:4]), 0 * usual[:1], mean[None]]
    scaled = [usual[:1] * 10.0**power for power in (-44, -38, -30, -20, -12, 12, 16, 20, 30, 37)]
    return np.concatenate([*inputs, *scaled]).astype(np.float32)


def a_hair_above(product):
    """Offsets, float32, that leave the sum of a product and them just above zero."""
    return np.nextafter((-product).astype(np.float32), np.float32(np.inf))


def wrongly_ruled_out(backend, weight, copy, mean, loss, x):
    """How often a unit is ruled out that fires, over inputs x and offsets of many kinds."""
    product = x.astype(np.float64) @ weight.T

    def wrong(rows, offset):
        with np.errstate(over="ignore", invalid="ignore"):
            possible = Bound(backend, copy, mean, loss, np.asarray(offset, np.float32)).possible(mx.array(x[rows]))()
        return int((~possible & (product[rows] + np.asarray(offset, np.float32).astype(np.float64) > 0)).sum())

    everywhere = np.zeros(len(weight)), -np.median(product, axis=0)
    count = sum(wrong(slice(None), offset) for offset in everywhere)
    return count + sum(wrong(slice(i, i + 1), a_hair_above(product[i])) for i in range(len(x)))


@pytest.mark.parametrize("backend", SOME)
@pytest.mark.parametrize("stored", STORED)
def test_what_is_ruled_out_does_not_fire(library, stored, backend):
    path = bundle_of(library, stored, WIDE if backend == "native" else Shape())
    exact, _, _ = deciding(Bundle.open(path), 0)
    weight = weights_of(path)
    mean = np.random.default_rng(0).normal(size=weight.shape[1]).astype(np.float32)
    copies = [low_bit_matrix(mx.array(weight.astype(np.float32)), bits) for bits in BITS]
    for copy in [*copies, exact] if exact.bits else copies:
        x = attacks(weight, copy, mean)
        assert wrongly_ruled_out(BACKENDS[backend](), weight, copy, mean, lost(exact, copy, mean), x) == 0


def test_the_law_notices_a_bound_without_its_parts(library):
    """Without the error's length, or the allowance for rounding, units that fire are ruled out."""
    path = bundle_of(library, "f32", WIDE)
    exact, _, _ = deciding(Bundle.open(path), 0)
    weight, mean = weights_of(path), np.zeros(512, np.float32)
    copy = low_bit_matrix(mx.array(weight.astype(np.float32)), 6)
    loss, x = lost(exact, copy, mean), attacks(weight, copy, mean)
    for broken in (replace(loss, length=0 * loss.length), replace(loss, size=0 * loss.size)):
        assert wrongly_ruled_out(BACKENDS["native"](), weight, copy, mean, broken, x) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_is_ruled_out_for_what_is_no_number(measured, value):
    bundle = Bundle.open(measured())
    bound = load_bound(bundle, 0, BACKENDS["native"](), FFN.of(bundle.manifest), np.full(256, -1e9, np.float32))
    x = np.zeros((2, 64), np.float32)
    assert len(bound.start(mx.array(x))()) == 0
    x[1, 3] = value
    with np.errstate(invalid="ignore"):
        assert len(bound.start(mx.array(x))()) == 256


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED)
def test_streamed_equals_dense(measured, stored, backend):
    path = measured(stored)
    with load(path, backend, "part", "bound") as model:
        assert model.flash.mode == "exact (bound)"
        read = assert_exact(model, path, prompt_of(20))
        stride = model.flash.bundle.manifest.record.stride
    assert 0 < np.mean(read) < 0.5 * 2 * 256 * stride  # half of what would stream


def test_at_the_smallest_budget_and_for_several_tokens_at_once(measured):
    with load(measured(), "native", "least", "bound") as model:
        assert_exact(model, measured(), [prompt_of(12), prompt_of(12, seed=3)])


def test_most_units_are_ruled_out_and_none_that_fires(measured):
    bundle = Bundle.open(measured())
    said = bundle.manifest.calibration["bound"]
    assert said["recall"] == 1
    assert said["active"] <= said["flagged"] < 0.6
    assert said["misses"]["layers"][0][0] > 20 * said["misses"]["layers"][0][-1]
    assert "bound, " in describe(bundle)
    assert "fidelity" not in describe(bundle)


def test_more_memory_takes_more_bits(library, tmp_path):
    bundle = Bundle.open(shutil.copytree(library.bundle(WIDE), tmp_path / "ours.flash"))
    exact, _, bias = deciding(bundle, 0)
    x = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    sizes = [make_bound(bundle, 0, BACKENDS["native"](), exact, bias, x, share).nbytes for share in (0.1, 0.8)]
    assert 0 < sizes[0] < 0.7 * sizes[1]


def test_it_moves_with_its_units(measured, tmp_path):
    made, _ = reorder(Bundle.open(measured()), tmp_path / "made.flash", TEXT)
    with load(made.path, "native", "part", "bound") as model:
        assert_exact(model, made.path, prompt_of(12))
    shutil.copy(bound_file(Bundle.open(measured()), 0), bound_file(made, 0))
    with pytest.raises(BundleError, match="made for another model; calibrate again"):
        load(made.path, predictor="bound")


def test_exact_takes_the_shorter_forecast_and_says_so(measured, monkeypatch):
    def mode(overhead, **settings):
        monkeypatch.setattr(ways, "disk_profile", lambda files: disk_like(overhead, rate=1e7, latency=1e-5))
        with pytest.raises(BudgetError) as small:
            load_bundle(measured("f32", WIDE), memory=1, max_kv_size=64, predictor="bound")
        memory = small.value.smallest + 60_000
        settings = {"memory": memory, "max_kv_size": 64, "fidelity": "exact"} | settings
        with load_bundle(measured("f32", WIDE), direct=True, **settings) as model:
            return model.flash.mode, model.flash.describe()

    assert mode(1e-7)[0] == "exact (bound)"
    assert "predictor: bound" in mode(1e-7)[1]
    slow = mode(1e-2)  # where a read of one unit takes as long as many megabytes
    assert slow[0] == "exact (streaming)"
    assert "predictor: all" in slow[1]
    assert mode(1e-2, predictor="bound")[0] == "exact (bound)"
    assert mode(1e-7, predictor="all")[0] == "exact (streaming)"


@pytest.mark.parametrize(
    "settings",
    [{"fidelity": "high"}, {"margin": 0.5}, {"look_ahead": True}],
)
def test_what_makes_no_sense_with_it_is_refused(measured, settings):
    with pytest.raises(ValueError, match=r"exact: it has neither|look-ahead is fitted"):
        load_bundle(measured(), predictor="bound", **settings)


def test_where_there_is_none_the_remedy_is_named(library):
    with pytest.raises(BundleError, match="no bound predictor; `mlxflash calibrate --predictor bound` makes one"):
        load_bundle(library.bundle(), predictor="bound")


@pytest.mark.parametrize("harm", ["cut", "bits", "mean", "length", "records", "nan"])
def test_a_damaged_file_is_refused(measured, tmp_path, harm):
    path = shutil.copytree(measured(), tmp_path / "ours.flash")
    file = bound_file(Bundle.open(path), 1)
    arrays, meta = mx.load(str(file), return_metadata=True)
    match harm:
        case "cut":
            file.write_bytes(file.read_bytes()[:900])
        case "bits":
            meta["copy.bits"] = "7"
        case "mean":
            arrays["mean"] = arrays["mean"][:-1]
        case "length":
            arrays["length"] = arrays["length"][1:]
        case "records":
            arrays["records"] = arrays["records"] + 1
        case "nan":
            arrays["size"] = arrays["size"] * float("nan")
    if harm != "cut":
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, meta)
    with pytest.raises(BundleError, match=str(file)) as refusal:
        load(path, predictor="bound")
    assert "calibrate again" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_odd_width_is_refused(library, tmp_path):
    path = shutil.copytree(library.bundle(Shape(d_model=48)), tmp_path / "odd.flash")
    with pytest.raises(BundleError, match="width 48"):
        calibrate(Bundle.open(path), TEXT, predictor="bound")
    assert "bound" not in Bundle.open(path).predictors()
