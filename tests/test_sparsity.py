"""Laws of `--sparsity`: nothing left out is the dense model, more left out reads less, what is recorded is what the
decode path does, the label is there, and what cannot be had is said."""

import json
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest

import families
import mixtures
from build import load, write_tokenizer
from families import golden
from reference import read_records, write_safetensors

mx = pytest.importorskip("mlx.core")
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlxflash.converters import convert  # noqa: E402

from mlxflash.bundle import Bundle, BundleError  # noqa: E402
from mlxflash.calibrate import calibrate, recorded  # noqa: E402
from mlxflash.cli import main  # noqa: E402
from mlxflash.commands.inspect import describe  # noqa: E402
from mlxflash.evaluate import Dense, evaluate  # noqa: E402
from mlxflash.fidelity import level_of, read_cuts  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.predictor import Magnitude  # noqa: E402
from mlxflash.sparsity import calibrate_sparsity  # noqa: E402

CASES = ("llama", "gemma", "falcon-7b")  # gated SiLU, gated GELU, plain GELU
BIASED = "phi"  # plain GELU, a bias per unit
QUANTISED = "qwen2"  # gated SiLU, here in 8 bits
PERCENTS = (30, 50, 70, 90)
UNITS, VOCABULARY, TOKENS = 256, 300, np.random.default_rng(0).integers(3, 300, 160)


def write_wide(path, case):
    """A family's case with more units and a vocabulary that has room for every byte."""
    config, shapes = golden(case)["config"], golden(case)["shapes"]
    units = config.get("intermediate_size", 4 * config["hidden_size"])
    widened = {
        name: [UNITS if "mlp" in name and n == units else VOCABULARY if n == 96 and i == 0 and is_word(name) else n
               for i, n in enumerate(shape)]
        for name, shape in shapes.items()
    }  # fmt: skip
    path.mkdir()
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": UNITS, "ffn_hidden_size": UNITS}
    (path / "config.json").write_text(json.dumps(config | sizes))
    weights = {name: families.tensor(case, name, shape) for name, shape in widened.items()}
    for name in weights:
        if name.endswith("mlp.up_proj.weight"):
            weights[name][5] = 0  # as pruned
    write_safetensors(path / "model.safetensors", weights, "float32")
    write_tokenizer(path, VOCABULARY)


def is_word(name):
    return "embed" in name or "lm_head" in name


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    """Case to its calibrated bundle."""
    made = {}

    def bundle(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            write_wide(folder / "c", case)
            made[case] = calibrate_sparsity(
                convert(folder / "c", folder / "made.flash", bits=8 if case == QUANTISED else None, group_size=32),
                TOKENS,
                PERCENTS,
            )
        return made[case]

    return bundle


@pytest.fixture
def ours(bundle_of, tmp_path):
    """A bundle of one's own."""
    return shutil.copytree(bundle_of("llama").path, tmp_path / "ours.flash")


def decode(model, tokens):
    """Logits [n, vocabulary], one token per pass."""
    cache = make_prompt_cache(model)
    return np.array([np.array(model(mx.array([[t]]), cache=cache)[0, -1].astype(mx.float32)) for t in tokens.tolist()])


@pytest.mark.parametrize(("backend", "budget"), [("native", "least"), ("parts-alias", "part"), ("discrete", "least")])
@pytest.mark.parametrize("case", [*CASES, BIASED, QUANTISED])
def test_nothing_left_out_equals_dense(bundle_of, tmp_path, case, backend, budget):
    """With a threshold that every unit exceeds, by the same way as any other."""
    path = shutil.copytree(bundle_of(case).path, tmp_path / "ours.flash")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["calibration"]["fidelity"]["sparsity"]["levels"]["50"]["multiplier"] = -1.0
    (path / "manifest.json").write_text(json.dumps(manifest))
    want = np.array(families.dense_model(path)(mx.array([TOKENS[:12].tolist()]))[0])
    for sparsity, mode in ((50, "approximate"), (0, "exact (streaming)")):
        with load(path, backend, budget, None, sparsity=sparsity) as model:
            assert model.flash.mode.startswith(mode)
            np.testing.assert_allclose(decode(model, TOKENS[:12]), want, atol=2e-4 * np.ptp(want))
            assert model.flash.snapshot().num_bytes > 0


@pytest.mark.parametrize("case", [*CASES, BIASED, QUANTISED])
def test_what_is_recorded_is_what_the_decode_path_costs(bundle_of, case):
    bundle = bundle_of(case)
    with Dense(bundle, TOKENS[80:], context=79, memory=least(bundle)) as dense:
        for percent in PERCENTS:
            report, level = evaluate(dense, sparsity=percent, window=1), level_of(bundle, "sparsity", str(percent))
            assert (report.predictor, report.fidelity) == ("sparsity", str(percent))
            assert report.kl == pytest.approx(level.kl, rel=0.02, abs=1e-6)
            assert report.ppl_change == pytest.approx(level.ppl_change, rel=0.02, abs=1e-5)
            assert report.top1 == pytest.approx(level.top1, abs=0.01)
            assert report.flagged == pytest.approx(level.flagged, abs=0.02)
            assert report.flagged == pytest.approx(1 - percent / 100, abs=0.03)
            assert report.recall == report.flagged  # no unit is ever zero


def least(bundle):
    with load(bundle.path, "native", "least", None, sparsity=PERCENTS[0]) as model:
        return model.flash.plan.memory


@pytest.mark.parametrize("backend", ["native", "parts-alias", "discrete"])
@pytest.mark.parametrize("case", CASES)
def test_more_left_out_never_reads_more(bundle_of, case, backend):
    read, wrong, wanted = [], [], []
    x = mx.random.normal((1, 64), key=mx.random.key(1))
    with load(bundle_of(case).path, backend, "whole", None) as model:
        want = decode(model, TOKENS[:24])
    for percent in (0, *PERCENTS):
        with load(bundle_of(case).path, backend, "least", None, sparsity=percent) as model:
            wrong.append(np.square(decode(model, TOKENS[:24]) - want).mean())
            read.append(model.flash.snapshot().num_bytes)
            if percent:
                wanted.append(set(model.flash.layers[0].predictor.start(x)().tolist()))
    assert read == sorted(read, reverse=True)
    assert read[-1] < 0.4 * read[0]
    assert wrong == sorted(wrong)
    assert all(less < more for more, less in pairwise(wanted))


@pytest.mark.parametrize("case", CASES)
def test_what_is_held_makes_it_better(bundle_of, case):
    """Units in memory are computed whatever is predicted; with all of them there, nothing is approximate."""
    wrong = []
    for budget in ("whole", "least", "part", "room"):
        with load(bundle_of(case).path, "native", budget, None, sparsity=90) as model:
            logits = decode(model, TOKENS[:40])
            if budget == "whole":
                want = logits
                assert model.flash.mode == "exact (all resident)"
            else:
                assert model.flash.mode.startswith("approximate (90% of the units left out: perplexity +")
                wrong.append(np.square(logits - want)[20:].mean())
    assert wrong[0] > wrong[1] > wrong[2]


@pytest.mark.parametrize("case", [*CASES, BIASED])
def test_the_units_left_out_are_those_that_add_least(bundle_of, case):
    """By |activation| |down row| of the stored weights: what is left out is almost as little as the least there is."""
    bundle = bundle_of(case)
    _, inputs = recorded(bundle, TOKENS, len(TOKENS), None, None, lambda *_: None)
    with load(bundle.path, "native", "least", None, sparsity=50) as model:
        predictors = [layer.predictor for layer in model.flash.layers]
        resident = [layer.source.resident for layer in model.flash.layers]
    record = json.loads((bundle.path / "manifest.json").read_text())["record"]
    for layer, (x, predictor) in enumerate(zip(inputs, predictors, strict=True)):
        parts, x = read_records(bundle.layer_path(layer), UNITS, record), x[::4]
        up = x @ parts["up"].T + resident[layer].get("up_bias", 0)
        gate = x @ parts["gate"].T if "gate" in parts else up
        first = gate / (1 + np.exp(-(1.0 if case == "llama" else 1.702) * gate))
        adds = np.abs(first * (up if "gate" in parts else 1)) * np.linalg.norm(parts["down"], axis=1)
        read = np.zeros(adds.shape, bool)
        for row, flags in zip(x, read, strict=True):
            flags[predictor.start(mx.array(row[None]))()] = True
        worst = np.square(np.sort(adds, axis=None)[: np.count_nonzero(~read)]).sum()
        lost, all_of_it = np.square(adds * ~read).sum(), np.square(adds).sum()
        assert lost < max(4 * worst, 0.005 * all_of_it)
        assert 0.2 < read.mean() < 0.8


def test_magnitudes_are_those_of_the_activation(bundle_of):
    """Of MLX's own functions, with a gate's other product and without; at no input they are what biases make."""
    products = np.linspace(-6, 6, 40, dtype=np.float32).reshape(1, -1)
    bias = np.linspace(1, 0, 40, dtype=np.float32)
    for activation, exact in (("silu", nn.silu), ("gelu", nn.gelu), ("gelu_tanh", nn.gelu_approx)):
        for units in (40, 20):
            first, up = np.split(products + bias, [units], axis=1)
            want = np.abs(np.array(exact(mx.array(first)))) * (np.abs(up) if units == 20 else 1)
            np.testing.assert_allclose(Magnitude(activation, bias, units)(products), want, atol=4e-3)
    with load(bundle_of(BIASED).path, "native", "least", None, sparsity=50) as model:
        for layer in model.flash.layers:
            want = np.abs(np.array(nn.gelu(mx.array(layer.source.resident["up_bias"]))))
            np.testing.assert_allclose(layer.predictor.estimates(mx.zeros((1, 64)))()[0], want, atol=4e-3)


def test_thresholds_count_the_down_rows(bundle_of):
    """Units alike but for their down rows have thresholds in the rows' inverse proportion."""
    bundle = bundle_of("falcon-7b")
    record = json.loads((bundle.path / "manifest.json").read_text())["record"]
    for layer, (base, threshold) in enumerate(read_cuts(bundle, "sparsity")):
        norm = np.linalg.norm(read_records(bundle.layer_path(layer), UNITS, record)["down"], axis=1)
        assert not base.any()
        assert np.corrcoef(np.log(threshold), -np.log(norm))[0, 1] > 0.6


def test_commands_make_it_and_name_it(bundle_of, ours, tmp_path, capfd):
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times, " * 20)
    model, text = ["--model", str(ours)], ["--text", str(tmp_path / "text")]
    main(["calibrate", str(ours), *text, "--tokens", "32", "--sparsity", "80", "40", "80"])
    said = capfd.readouterr().out
    assert "  sparsity    40% of the units left out: perplexity +" in said
    assert list(Bundle.open(ours).manifest.calibration["fidelity"]["sparsity"]["levels"]) == ["40", "80"]
    budget, found = str(least(bundle_of("llama"))), {}
    for more in ([], ["--sparsity", "40"], ["--sparsity", "80"], ["--exact"]):
        main(["generate", *model, "-p", "It was", "-m", "8", "--memory", budget, "--json", *more])
        found[more[-1] if more else ""] = json.loads(capfd.readouterr().out)
    assert found[""]["mode"] == found["--exact"]["mode"] == "exact (streaming)"
    level = level_of(Bundle.open(ours), "sparsity", "80")
    assert found["80"]["mode"] == (
        f"approximate (80% of the units left out: perplexity {np.expm1(level.kl):+.2%}, "
        f"top-1 agreement {level.top1:.1%})"
    )
    assert found[""]["bytes_per_token"] > found["40"]["bytes_per_token"] > found["80"]["bytes_per_token"]
    main(["eval", str(ours), *text, "--tokens", "32", "--memory", budget, "--sparsity", "40", "80"])
    lines = [line.split()[:2] for line in capfd.readouterr().out.splitlines()]
    assert lines[2:4] == [["sparsity", "40"], ["sparsity", "80"]]
    with pytest.raises(SystemExit):
        main(["generate", *model, "-p", "It was", "--exact", "--sparsity", "40"])
    assert "contradict" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["calibrate", str(ours), "--sparsity", "40", "--predictor", "low-rank"])
    assert "leave out --predictor" in capfd.readouterr().err


def test_a_point_that_nobody_measured_names_the_command(bundle_of):
    path = bundle_of("llama").path
    with pytest.raises(
        BundleError,
        match=f"60 was not measured; `mlxflash calibrate {path} --text FILE --sparsity 30 50 60 70 90` does",
    ):
        load_bundle(path, sparsity=60)


CONTRADICTIONS = [{"fidelity": "fast"}, {"predictor": "low-bit"}, {"margin": 1.0}, {"look_ahead": True}]


@pytest.mark.parametrize("settings", CONTRADICTIONS)
def test_contradictions_are_refused(bundle_of, settings):
    with pytest.raises(ValueError, match=r"give no predictor|no look-ahead"):
        load_bundle(bundle_of("llama").path, sparsity=50, **settings)


@pytest.mark.parametrize("percent", [-1, 100, 1000])
def test_percentages_that_make_no_sense_are_refused(bundle_of, percent):
    for attempt in (
        lambda: load_bundle(bundle_of("llama").path, sparsity=percent),
        lambda: calibrate_sparsity(bundle_of("llama"), TOKENS, [50, percent]),
    ):
        with pytest.raises(ValueError, match=f"sparsity {percent}: a percentage of the units, 1 to 99"):
            attempt()


def test_what_has_another_way_is_refused(library, tmp_path):
    mixtures.write(tmp_path / "c", next(iter(mixtures.CONFIGS)))
    mixture = convert(tmp_path / "c", tmp_path / "made.flash")
    for bundle, words in ((Bundle.open(library.bundle()), "--fidelity"), (mixture, "router")):
        for attempt in (load_bundle, lambda path, sparsity: calibrate_sparsity(Bundle.open(path), TOKENS, [sparsity])):
            with pytest.raises(BundleError, match=words):
                attempt(bundle.path, sparsity=50)
        assert "sparsity" not in bundle.predictors()


def test_a_bundle_without_it_says_what_would_help(bundle_of):
    for attempt in (lambda path: load_bundle(path, predictor="low-bit"), lambda path: calibrate(Bundle.open(path))):
        with pytest.raises(BundleError, match=r"silu units are never zero.*--sparsity"):
            attempt(bundle_of("llama").path)


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: os.truncate(file, 100),
    "another model's": lambda file: halve(file),
    "not a copy": lambda file: write_safetensors(file, {"x": np.zeros(3, np.float32)}, "float32"),
}


def halve(file):
    """As of a model with half of the units."""
    arrays, meta = mx.load(str(file), return_metadata=True)
    mx.save_safetensors(str(file), {name: mx.contiguous(a[: len(a) // 2]) for name, a in arrays.items()}, meta)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["predictors/sparsity/001.safetensors", "fidelity/sparsity.safetensors"])
def test_damaged_files_are_refused(bundle_of, ours, name, damage):
    DAMAGE[damage](ours / name)
    with pytest.raises(BundleError, match=r"; .*calibrate"):
        load_bundle(ours, memory=least(bundle_of("llama")), sparsity=50)
    load_bundle(ours, memory=least(bundle_of("llama"))).close()
    calibrate_sparsity(Bundle.open(ours), TOKENS[:32], [50])
    with load_bundle(ours, memory=least(bundle_of("llama")), sparsity=50) as model:
        assert "50% of the units left out" in model.flash.mode
    assert "sparsity" in describe(Bundle.open(ours))
