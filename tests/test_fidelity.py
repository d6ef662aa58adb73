"""Laws of the levels of fidelity: what is recorded is what the decode path does, thresholds are importance, and what
cannot be had is said."""

import json
import os
import shutil

import numpy as np
import pytest

from build import Shape, load, prompt_of
from reference import read_records, stored_model, write_safetensors

mx = pytest.importorskip("mlx.core")

from mlxflash import thinning, ways  # noqa: E402
from mlxflash.backends import make_backend  # noqa: E402
from mlxflash.bundle import Bundle, BundleError  # noqa: E402
from mlxflash.calibrate import calibrate  # noqa: E402
from mlxflash.cli import main  # noqa: E402
from mlxflash.commands.inspect import describe  # noqa: E402
from mlxflash.evaluate import Dense, decode_logprobs, evaluate  # noqa: E402
from mlxflash.fidelity import LEVELS, levels_of, read_cuts  # noqa: E402
from mlxflash.forecast import Forecast  # noqa: E402
from mlxflash.misses import computed, simulated  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.order import reorder  # noqa: E402
from mlxflash.thinning import HELD, Point, Thin  # noqa: E402

SHAPE = Shape(ffn=2048)
TOKENS = np.random.default_rng(0).integers(3, SHAPE.vocab, 256)  # as Library.calibrated has them
SMALL = "5.5MB"


@pytest.fixture(scope="module")
def bundle(library):
    return Bundle.open(library.calibrated(SHAPE))


def alone(bundle, name):
    """A level as measured with nothing held."""
    return levels_of(bundle, "low-bit", name)[-1]


@pytest.fixture
def ours(bundle, tmp_path):
    """A bundle of one's own."""
    return shutil.copytree(bundle.path, tmp_path / "ours.flash")


@pytest.fixture(scope="module")
def reports(bundle):
    """The text that was reported on, every token's flagged units alone, and with what is held."""
    with Dense(bundle, TOKENS[128:], context=127, memory=SMALL) as dense:
        alone = {name: evaluate(dense, fidelity=name, window=1) for name in LEVELS}
        held = {name: evaluate(dense, fidelity=name) for name in LEVELS}
    return alone, held


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_costs_through_the_decode_path_what_is_recorded(bundle, reports, name):
    level, report = alone(bundle, name), reports[0][name]
    assert report.fidelity == name
    assert report.kl == pytest.approx(level.kl, rel=0.02, abs=1e-6)
    assert report.ppl_change == pytest.approx(level.ppl_change, rel=0.02, abs=1e-5)
    assert report.top1 == pytest.approx(level.top1, abs=0.01)


def test_levels_meet_their_price_and_read_less_and_less(bundle, reports):
    for name, change in LEVELS.items():
        for level in levels_of(bundle, "low-bit", name):
            assert level.met
            assert 0 < level.kl <= np.log1p(change)
    levels = [alone(bundle, name) for name in LEVELS]
    assert levels[0].multiplier < levels[1].multiplier < levels[2].multiplier
    for side in reports:
        read = [side[name].bytes_per_token for name in LEVELS]
        assert read == sorted(read, reverse=True)
    assert levels[2].flagged < 0.8 * levels[0].flagged


def test_thresholds_are_the_same_importance_for_all_units_of_a_layer(bundle):
    record = json.loads((bundle.path / "manifest.json").read_text())["record"]
    for layer, (_, threshold) in enumerate(read_cuts(bundle, "low-bit", 1.0)):
        records = read_records(bundle.layer_path(layer), SHAPE.ffn, record)
        norm = np.linalg.norm(records["down"], axis=1)
        np.testing.assert_allclose(threshold * norm, (threshold * norm).mean(), rtol=1e-4)


def test_thinned_by_nothing_is_the_independent_forward_pass(bundle):
    tokens = prompt_of(30)
    with load_bundle(bundle.path, predictor="all") as model:
        for i, layer in enumerate(model.layers):
            layer.mlp = Thin(bundle, i, model.flash.layers[i].down_bias, lambda r, x, a: a * (r < 2))
        whole, same, none = np.array(model(mx.array([tokens] * 3)))
    np.testing.assert_allclose(whole, stored_model(bundle.path).logits(tokens), atol=2e-3)
    np.testing.assert_array_equal(whole, same)
    assert np.abs(none - whole).max() > 1


def test_the_bound_decides_what_is_met():
    fine = Point(1.0, kl=0.002, kl_se=0.0005, ppl_change=0.001, ppl_change_se=0.001, top1=1.0)
    assert fine.meets(0.003)
    assert not fine.meets(0.0025)


def test_a_price_that_cannot_be_met_says_what_was_reached(ours, monkeypatch, capfd):
    monkeypatch.setattr(thinning, "LEVELS", dict.fromkeys(LEVELS, 1e-12))
    bundle = calibrate(Bundle.open(ours), TOKENS[:48])
    assert not alone(bundle, "high").met
    assert "as near as the predictor comes" in describe(bundle)
    with load_bundle(ours, memory=SMALL) as model:
        assert model.flash.mode.startswith("approximate (high not reached: perplexity +")


def test_a_level_that_nobody_measured_is_refused(library, bundle, ours):
    with pytest.raises(BundleError, match="'fast' of its low-bit predictor was not measured; `mlxflash calibrate`"):
        load_bundle(library.bundle(SHAPE), memory=SMALL, fidelity="fast")
    calibrate(Bundle.open(ours), TOKENS, levels=False)  # other errors: the old levels would be wrong
    assert not levels_of(Bundle.open(ours), "low-bit", "high")
    with load_bundle(ours, memory=SMALL) as model:
        assert model.flash.mode.startswith("approximate (recall")


CONTRADICTIONS = [
    ({"fidelity": "exact", "predictor": "low-bit"}, "contradict"),
    ({"fidelity": "fast", "margin": 1.0}, "contradict"),
    ({"fidelity": "fast", "predictor": "oracle"}, "needs a stored predictor"),
    ({"fidelity": "lossless"}, "unknown"),
]


@pytest.mark.parametrize(("settings", "words"), CONTRADICTIONS)
def test_contradictions_are_refused(bundle, settings, words):
    with pytest.raises(ValueError, match=words):
        load_bundle(bundle.path, memory=SMALL, **settings)


CUTS = [f"{i:03d}.{name}" for i in range(SHAPE.layers) for name in ("base", "threshold")]
NANS = np.full(SHAPE.ffn, np.nan, np.float32)
DAMAGE = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: os.truncate(file, 1000),
    "another model's": lambda file: write_safetensors(file, {"000.base": np.zeros(3, np.float32)}, "float32"),
    "not a number": lambda file: write_safetensors(file, {name: NANS for name in CUTS}, "float32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_thresholds_are_refused(ours, damage):
    file = ours / "fidelity/low-bit.safetensors"
    DAMAGE[damage](file)
    with pytest.raises(BundleError, match=str(file)):
        load_bundle(ours, memory=SMALL)
    load_bundle(ours, memory=SMALL, fidelity="exact").close()


@pytest.mark.parametrize(("key", "value"), [("kl", None), ("multiplier", float("nan")), ("met", 1), ("misses", [])])
def test_damaged_levels_are_refused(ours, key, value):
    manifest = json.loads((ours / "manifest.json").read_text())
    manifest["calibration"]["fidelity"]["low-bit"]["levels"]["fast"][1][key] = value
    (ours / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(ours)


def test_look_ahead_names_what_the_level_would_read(bundle):
    named = {}
    for name in LEVELS:
        with load(bundle.path, "native", "part", "low-bit", look_ahead=True, fidelity=name) as model:
            x = mx.random.normal((4, SHAPE.d_model), key=mx.random.key(0))
            named[name] = len(model.flash.layers[0].ahead.start(x)())
    assert named["high"] > named["balanced"] > named["fast"] > 0


def test_another_order_on_disk_reads_the_same_units(bundle, tmp_path):
    made, _ = reorder(bundle, tmp_path / "made.flash", TOKENS)
    reports = []
    for path in (bundle, made):
        with Dense(path, TOKENS[:41], memory=SMALL) as dense:
            reports.append(evaluate(dense, fidelity="fast", window=1))
    assert reports[0].flagged == reports[1].flagged
    assert reports[0].kl == pytest.approx(reports[1].kl, rel=1e-3)


def test_the_command_names_the_level(bundle, capfd):
    said = {}
    for name in ("exact", *LEVELS):
        settings = ["--prompt", "It was the best", "-m", "4", "--memory", SMALL, "--fidelity", name, "--json"]
        main(["generate", "--model", str(bundle.path), *settings])
        said[name] = json.loads(capfd.readouterr().out)
    assert said["exact"]["mode"] == "exact (streaming)"
    assert said["fast"]["mode"].startswith("approximate (fast: perplexity +")
    assert said["exact"]["bytes_per_token"] > said["high"]["bytes_per_token"] > said["fast"]["bytes_per_token"]
    with pytest.raises(SystemExit):
        main(["generate", "-p", "It was", "--exact", "--fidelity", "fast"])
    assert "contradict" in capfd.readouterr().err


def test_a_simulated_window_computes_what_is_wanted_and_what_it_holds():
    wanted = np.random.default_rng(0).random((60, 50)) < np.linspace(0.3, 0.0, 50)
    found = computed(simulated(50, 20), wanted)
    assert (found | ~wanted).all()
    held = found.sum(axis=1)
    assert ((held == 20) | (held == wanted.sum(axis=1)))[20:].all()
    assert held.mean() > 1.5 * wanted.sum(axis=1).mean()
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[0] | wanted[1])


def test_more_held_reads_less_at_the_same_price(bundle):
    text = describe(bundle)
    for name in LEVELS:
        held = [level.held for level in levels_of(bundle, "low-bit", name)]
        assert held == pytest.approx(sorted(HELD, reverse=True), abs=0.001)
        assert f"{name} with 30% of the units held: perplexity +" in text
        assert f"{name}: perplexity +" in text
    most, some, none = (level.multiplier for level in levels_of(bundle, "low-bit", "fast"))
    assert most > some > none
    prices = {}
    for point in bundle.manifest.calibration["fidelity"]["low-bit"]["points"]:
        prices.setdefault(point["multiplier"], []).append(point["kl"])
    shared = [kl for kl in prices.values() if len(kl) == len(HELD)]
    assert len(shared) >= 4
    for none, some, most in shared:
        assert most <= 1.01 * some <= 1.02 * none
    assert shared[-1][2] < 0.8 * shared[-1][0]


def held_share(model):
    return sum(model.flash.plan.capacities) / sum(model.flash.plan.units)


def test_a_run_takes_the_level_with_the_most_held_that_it_has(bundle):
    """And pays, on the text that was reported on, what the level promises."""
    seen = set()
    for memory in ("5.2MB", "5.5MB", "5.8MB", "6MB"):
        with load_bundle(bundle.path, memory=memory, fidelity="fast") as model:
            level, held = model.flash.level, held_share(model)
            assert level.held == max(one.held for one in levels_of(bundle, "low-bit", "fast") if one.held <= held)
            assert (f"measured with {level.held:.0%} of the units held" in model.flash.mode) == (level.held > 0)
            assert model.flash.mode in model.flash.describe()
        seen.add(level.held)
        with Dense(bundle, TOKENS[128:], context=127, memory=memory) as dense:
            assert 0.2 * level.kl < evaluate(dense, fidelity="fast").kl < 1.1 * level.kl
    assert len(seen) == len(HELD)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_predicted_rows_alone_cost_what_was_measured_with_nothing_held(bundle, look_ahead):
    """Through the decode path with units held, of which all but the predicted ones are left out; tokens that go through
    in turns included. With units asked for a layer early, the outputs are the same."""
    if not make_backend("cpu").leaves_out_free:
        pytest.skip("the native module is not built")
    level, settings = alone(bundle, "fast"), {"fidelity": "fast", "predictor": "low-bit", "all_rows": False}
    for memory in ("5.25MB", SMALL, "6MB"):
        with load_bundle(bundle.path, memory=memory, device="cpu", look_ahead=look_ahead, **settings) as model:
            assert model.flash.level == level
            assert "predicted rows of those held are computed" in model.flash.describe()
            with Dense(bundle, TOKENS[128:], context=127, memory=memory, device="cpu") as dense:
                said = dense.compare(decode_logprobs(model, TOKENS[128:255]))
            assert float(np.mean(said.kl)) == pytest.approx(level.kl, rel=0.02)
            assert model.flash.stats(model.flash.snapshot(), 1).held_share > 0


def test_the_forecast_decides_whether_rows_are_left_out(bundle, monkeypatch):
    if not make_backend("cpu").leaves_out_free:
        pytest.skip("the native module is not built")
    for seconds in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0)):

        def forecast(*args, seconds=seconds):
            return Forecast(seconds[args[-1]], seconds[args[-1]], 1.0)

        monkeypatch.setattr(ways, "forecast_of", forecast)
        with load_bundle(bundle.path, memory="6MB", device="cpu") as loaded:
            predicted = seconds == (2.0, 1.0)
            assert [layer.predicted for layer in loaded.flash.layers] == [predicted] * SHAPE.layers
            assert (loaded.flash.level.held == 0) == predicted
        with load_bundle(bundle.path, memory="6MB", device="cpu", fidelity="exact") as loaded:
            assert not any(layer.predicted for layer in loaded.flash.layers)


def test_a_level_that_counts_on_memory_waits_until_it_is_filled(ours):
    """A cold window's tokens read what the level measured with nothing held would, and a full one's less."""
    manifest = json.loads((ours / "manifest.json").read_text())
    for level in manifest["calibration"]["fidelity"]["low-bit"]["levels"]["fast"]:
        level["multiplier"] += level["held"]  # further apart than they are
    (ours / "manifest.json").write_text(json.dumps(manifest))
    x = mx.random.normal((1, SHAPE.d_model), key=mx.random.key(0))
    settings = {"memory": SMALL, "fidelity": "fast", "device": "cpu"}
    with load_bundle(ours, window=1, **settings) as model:
        named = [layer.predictor.start(x)() for layer in model.flash.layers]
    with load_bundle(ours, all_rows=True, **settings) as model:
        assert model.flash.level.held > 0
        for layer, cold in zip(model.flash.layers, named, strict=True):
            np.testing.assert_array_equal(layer.predictor.start(x)(), cold)
        for _ in decode_logprobs(model, TOKENS[:30]):
            pass
        for layer, cold in zip(model.flash.layers, named, strict=True):
            warm = layer.predictor.start(x)()
            assert np.isin(warm, cold).all()
            assert len(warm) < len(cold)
        model.flash.forget()
        np.testing.assert_array_equal(model.flash.layers[0].predictor.start(x)(), named[0])


def test_a_window_that_gives_up_units_counts_on_none(bundle):
    with load_bundle(bundle.path, memory=SMALL, window=5) as model:
        assert model.flash.level.held == 0 < held_share(model)


def test_a_bundle_with_one_measurement_opens(bundle, ours):
    """As calibrated before levels were measured with several shares held; with more held than there is, it is none."""
    manifest = json.loads((ours / "manifest.json").read_text())
    levels = manifest["calibration"]["fidelity"]["low-bit"]["levels"]
    for held, words in ((0.0, "approximate (high: perplexity"), (0.9, "approximate (recall")):
        manifest["calibration"]["fidelity"]["low-bit"]["levels"] = {
            name: one[0] | {"held": held} for name, one in levels.items()
        }
        (ours / "manifest.json").write_text(json.dumps(manifest))
        with load_bundle(ours, memory=SMALL) as model:
            assert model.flash.mode.startswith(words)
    with pytest.raises(BundleError, match="'fast' was measured with more held than here; calibrate again"):
        load_bundle(ours, memory=SMALL, fidelity="fast")
