"""Laws of the fidelity report: beside a NumPy forward pass, beside exact streaming, and as the command prints it."""

import json
import shutil
import sys

import numpy as np
import pytest

from build import Shape, prompt_of
from reference import read_safetensors, stored_model, write_safetensors

mx = pytest.importorskip("mlx.core")

from mlxflash.bundle import Bundle  # noqa: E402
from mlxflash.cli import main  # noqa: E402
from mlxflash.evaluate import SPANS, Dense, evaluate, new_units, spread  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.predictor import MARGIN  # noqa: E402

SHAPE = Shape(ffn=2048)
TOKENS = np.array(prompt_of(97))
SMALL = "5.5MB"  # streams, and holds some of it
BAD = [(b"", "too short"), (b"It was.", "too short"), (b"\xff\xfe" * 200, "not UTF-8")]


@pytest.fixture(scope="module")
def bundle(library):
    return Bundle.open(library.calibrated(SHAPE))


@pytest.fixture(scope="module")
def dense(bundle):
    with Dense(bundle, TOKENS, context=40, memory=SMALL) as dense:
        yield dense


@pytest.fixture(scope="module")
def reports(dense):
    return {name: evaluate(dense, predictor=name) for name in ("all", "oracle", "low-bit")}


def test_dense_is_the_perplexity_of_an_independent_forward_pass(bundle, dense):
    reference, losses = stored_model(bundle.path), []
    for i in range(0, 96, 40):
        logits = reference.logits(TOKENS[i : min(i + 40, 96)])
        targets = TOKENS[i + 1 : i + 1 + len(logits)]
        losses.extend(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), targets])
    assert len(losses) == 96
    assert dense.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


@pytest.mark.parametrize("name", ["all", "oracle"])
def test_what_is_exact_costs_nothing_and_finds_everything(reports, name):
    r = reports[name]
    assert abs(r.kl) < 1e-6
    assert abs(r.ppl_change) < 1e-5
    assert r.top1 > 0.98  # ties apart
    assert r.recall > 0.999
    assert r.flagged == pytest.approx(1 if name == "all" else r.active, rel=1e-3)
    assert r.precision == pytest.approx(r.active if name == "all" else 1, rel=1e-3)


def test_what_is_approximate_costs_something_and_reads_less(reports):
    all_, oracle, low = (reports[name] for name in ("all", "oracle", "low-bit"))
    assert low.kl > 1e-5
    assert 0.8 < low.recall < 0.999
    assert low.ppl_change == pytest.approx(low.ppl / low.ppl_dense - 1, abs=1e-6)
    assert low.ppl_change_se > 0
    assert low.bytes_per_token < all_.bytes_per_token / 2
    assert low.active == pytest.approx(oracle.active, rel=0.02)


@pytest.mark.parametrize("name", ["all", "oracle", "low-bit"])
def test_bytes_are_the_layers_sum_and_the_kernels_count(bundle, reports, name):
    r = reports[name]
    assert sum(layer.bytes_per_token for layer in r.layers) == pytest.approx(r.bytes_per_token)
    assert r.ffn_share_read == pytest.approx(r.bytes_per_token / bundle.streamed_bytes())
    if sys.platform == "linux":
        assert r.kernel_bytes_per_token == pytest.approx(r.bytes_per_token, abs=2048)
    if name != "all":
        missed = sum((1 - la.hit_rate) * la.flagged * la.units for la in r.layers)
        assert missed * bundle.manifest.record.stride == pytest.approx(r.bytes_per_token, rel=0.01)


def test_recall_by_margin_is_that_of_runs_with_the_margin(dense):
    """The more is flagged, the more is found; a run's own place is on the curve that is drawn of it."""
    for layer in evaluate(dense, predictor="low-bit", margin=MARGIN).layers:
        assert layer.margins[MARGIN] == pytest.approx((layer.flagged, layer.recall))
        flagged, recall = zip(*layer.margins.values(), strict=True)
        assert list(flagged) == sorted(set(flagged))
        assert list(recall) == sorted(recall)


def test_layers_that_come_to_hold_all_their_units_are_measured_on(bundle):
    with load_bundle(bundle.path, max_kv_size=41) as model:
        whole = model.flash.plan.memory
    memory = next(m for m in range(whole, 0, -20_000) if not planned(bundle, m).whole)
    with Dense(bundle, TOKENS, context=40, memory=memory) as dense:
        report = evaluate(dense, predictor="low-bit", margin=20.0)
    for layer in report.layers:
        assert layer.capacity == layer.units
        assert min(layer.flagged, layer.recall) > 0.95


def planned(bundle, memory):
    with load_bundle(bundle.path, memory=memory, max_kv_size=41) as model:
        return model.flash.plan


def test_new_units_are_those_that_no_token_of_the_window_used():
    wanted = np.random.default_rng(0).random((200, 30)) < 0.05
    found = new_units(wanted)
    for k in (1, 5, 64):
        sets = [wanted[t] & ~wanted[t - k : t].any(axis=0) for t in range(SPANS[-1], 200)]
        assert found[k] == pytest.approx(np.mean(sets))


def test_the_spread_of_alike_neighbours_is_that_of_their_blocks():
    values = np.random.default_rng(0).normal(size=64 * 32)
    assert spread(values) == pytest.approx(1 / np.sqrt(64 * 32), rel=0.3)
    assert spread(np.repeat(values[:64], 32)) == pytest.approx(1 / 8, rel=0.3)


def test_an_input_that_is_not_a_number_is_refused(bundle, tmp_path):
    path = shutil.copytree(bundle.path, tmp_path / "copy.flash")
    file = next(path.glob("resident*"))
    tensors = read_safetensors(file)
    name = next(n for n in tensors if "layers.1" in n and "final_layer_norm.weight" in n)
    tensors[name] = np.full_like(tensors[name], np.nan)
    write_safetensors(file, tensors, "float32")
    with (
        Dense(Bundle.open(path), TOKENS, memory=SMALL) as dense,
        pytest.raises(ValueError, match="layer 1 is given NaN"),
    ):
        evaluate(dense)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 8)
    return file


def command(capfd, *args):
    code = 0
    try:
        main(["eval", *map(str, args)])
    except SystemExit as end:
        code = end.code
    return code, *capfd.readouterr()


def test_json_has_the_promised_keys(bundle, text, capfd):
    settings = ["--memory", SMALL, "--tokens", "40", "--json", "--predictor", "low-bit", "all"]
    code, out, err = command(capfd, bundle.path, "--text", text, *settings)
    assert (code, err) == (0, "")
    low, all_ = map(json.loads, out.splitlines())
    wanted = {"recall", "flagged", "bytes_per_token", "ffn_share_read", "hit_rate"}
    assert low.keys() >= wanted | {"ppl_dense", "ppl", "kl", "top1", "memory_bytes"}
    assert all(layer.keys() >= wanted for layer in low["layers"])
    assert (low["predictor"], all_["predictor"]) == ("low-bit", "all")
    assert low["memory_bytes"] == 5_500_000
    assert low["ppl_dense"] == all_["ppl_dense"]


def test_the_table_has_a_line_per_setting_and_layer(bundle, text, capfd):
    code, out, _ = command(capfd, bundle.path, "--text", text, "--memory", SMALL, "--tokens", "40")
    assert code == 0
    head, _, row, *layers = out.splitlines()
    assert "40 tokens" in head
    assert row.startswith("low-bit")
    assert len(layers) == 2 + SHAPE.layers


@pytest.mark.parametrize(("content", "words"), BAD)
def test_a_text_that_cannot_be_measured_on_is_refused(bundle, tmp_path, capfd, content, words):
    (tmp_path / "bad").write_bytes(content)
    code, out, err = command(capfd, bundle.path, "--text", tmp_path / "bad")
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("settings", [["--tokens", "3"], ["--context", "3"], ["--plot", "x.doc"], ["--text", "none"]])
def test_settings_that_cannot_work_are_refused(bundle, text, capfd, settings):
    code, out, err = command(capfd, bundle.path, "--text", text, *settings)
    assert (code, out) == (1, "")
    assert settings[1] in err


def test_a_picture_is_drawn_or_its_package_named(bundle, text, tmp_path, capfd):
    file = tmp_path / "out.svg"
    code, _, err = command(
        capfd, bundle.path, "--text", text, "--memory", SMALL, "--tokens", "40", "--plot", file, "--json"
    )
    if "needs matplotlib" in err:
        assert code == 1
        assert not file.exists()
        return
    assert code == 0
    drawn = file.read_text()
    for words in ("Activity by layer", "Recall against flagged", "the paper", "New units", "Belady"):
        assert words in drawn
