"""What quantising cost: the figures are those of dense NumPy models, and they stay with the bundle."""

import json
import shutil

import numpy as np
import pytest
from mlxflash.converters import convert

import mixtures
from build import Shape
from mlxflash import rounding
from mlxflash.bundle import Bundle, BundleError
from mlxflash.calibrate import calibrate
from mlxflash.rounding import measure_rounding
from test_cli import command  # noqa: F401  a fixture
from test_exactness import dense_logits

SHAPE = Shape()
TOKENS = np.random.default_rng(0).integers(3, SHAPE.vocab, 64)


def logprobs(path, pieces):
    logits = np.concatenate([dense_logits(path, tuple(piece.tolist())) for piece in pieces]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_figures_are_the_dense_models(library, tmp_path, bits):
    source = library.checkpoint(SHAPE)
    bundle = convert(source, tmp_path / "b.flash", bits=bits, group_size=32)
    said = measure_rounding(bundle, source, TOKENS).manifest.calibration["rounding"]
    pieces = TOKENS[:32], TOKENS[32:-1]
    floats, rounded = (logprobs(path, pieces) for path in (library.bundle(SHAPE), bundle.path))
    assert said["tokens"] == 63
    assert said["kl"] == pytest.approx((np.exp(floats) * (floats - rounded)).sum(axis=-1).mean(), rel=2e-3)
    assert said["kl"] > 10 * 8.0**-bits
    assert said["top1"] == np.mean(floats.argmax(axis=-1) == rounded.argmax(axis=-1))
    targets = np.arange(63), TOKENS[1:]
    assert said["ppl_change"] == pytest.approx(np.exp((floats - rounded)[targets].mean()) - 1, abs=1e-4)
    assert (said["bits"], said["dtype"], said["text"]) == (bits, "float32", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["b.flash"]


def test_its_own_text_is_short_where_time_is(library, tmp_path, monkeypatch):
    source = library.checkpoint(SHAPE)
    bundle = convert(source, tmp_path / "b.flash", bits=4, group_size=32)
    assert measure_rounding(bundle, source).manifest.calibration["rounding"]["tokens"] == 255
    monkeypatch.setattr(rounding, "SECONDS", 0.0)
    said = measure_rounding(bundle, source).manifest.calibration["rounding"]
    assert (said["tokens"], said["text"]) == (15, "the float model's own text")
    assert "ppl_change" not in said


def test_a_mixture(tmp_path):
    mixtures.write(tmp_path / "m", "qwen3_moe", "mlx", "float32")
    said = {}
    for bits in (8, 4):
        bundle = convert(tmp_path / "m", tmp_path / f"{bits}.flash", bits=bits, group_size=32)
        said[bits] = measure_rounding(bundle, tmp_path / "m", num_tokens=64).manifest
    assert 1e-5 < 10 * said[8].calibration["rounding"]["kl"] < said[4].calibration["rounding"]["kl"]
    assert said[8].rounding.startswith("8-bit: KL 0.0")


def test_a_full_disk_is_one_sentence_and_no_obstacle(library, tmp_path, monkeypatch, command):  # noqa: F811
    monkeypatch.setattr(rounding.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    run = command("convert", library.checkpoint(SHAPE), tmp_path / "b.flash", "-q", "4", "--calibrate", "none")
    assert run.code == 0
    assert "what 4 bits cost was not measured: the floats would take" in run.err
    assert "rounding" not in run.out


def test_the_cost_stays_with_the_bundle(library, tmp_path, command):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20, encoding="utf-8")
    made = tmp_path / "b.flash"
    run = command("convert", library.checkpoint(SHAPE), made, "-q", "4", "--calibrate", "none", "--text", text)
    assert run.code == 0
    [line] = [line for line in run.out.splitlines() if line.startswith("  rounding    4-bit: KL ")]
    assert "top-1 agreement" in line
    assert ", perplexity " in line
    words = made / "manifest.json"
    calibrate(Bundle.open(made), TOKENS, levels=False)
    assert line in command("info", made).out.splitlines()
    run = command("generate", "--model", made, "-p", "It was", "-m", "4")
    assert "; 4-bit: KL " in run.err.splitlines()[0]
    said = json.loads(words.read_text())
    said["calibration"]["rounding"]["kl"] = "little"
    words.write_text(json.dumps(said))
    with pytest.raises(BundleError, match="'little' in its calibration"):
        Bundle.open(made)


def test_generate_rounds_a_checkpoint_and_says_what_it_cost(library, command):  # noqa: F811
    run = command("generate", "--model", library.checkpoint(SHAPE), "-p", "It was", "-m", "4", "-q", "4")
    assert run.code == 0
    converting, mode, *_ = run.err.splitlines()
    assert "-q4-" in converting
    assert "; 4-bit: KL " in mode


def test_it_can_be_left_out(library, tmp_path, command):  # noqa: F811
    made = tmp_path / "b.flash"
    run = command("convert", library.checkpoint(SHAPE), made, "-q", "8", "--calibrate", "none", "--no-rounding")
    assert run.code == 0
    assert "rounding" not in run.out
