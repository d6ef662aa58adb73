"""Unit order: a permutation that carries everything kept per unit with it, so that the same model comes out."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from build import load
from mlxflash.bundle import Bundle, BundleError
from mlxflash.order import order_of, reads_of, reorder
from test_exactness import TOLERANCE, assert_same_logits

TOKENS = np.random.default_rng(0).integers(3, 250, 96)


def groups(tokens=400, units=120, seed=0):
    """Units that fire in groups of six, scattered over the ids."""
    rng = np.random.default_rng(seed)
    where = rng.permutation(units).reshape(-1, 6)
    missed = np.zeros((tokens, units), bool)
    for row in missed:
        for group in where[rng.random(len(where)) < 0.1]:
            row[group[rng.random(6) < 0.9]] = True
    return missed


def test_units_missed_together_come_to_lie_together():
    missed = groups()
    order = order_of(missed[:200])
    assert sorted(order) == list(range(120))
    assert reads_of(missed[200:][:, order]) < 0.4 * reads_of(missed[200:])


@pytest.mark.parametrize("missed", [np.zeros((5, 40), bool), np.ones((5, 40), bool), np.eye(40, dtype=bool)])
def test_any_trace_gives_a_permutation(missed):
    assert sorted(order_of(missed)) == list(range(40))


def test_reads_are_counted_by_hand():
    row = np.zeros((1, 20), bool)
    row[0, [1, 2, 5, 9, 10]] = True
    assert reads_of(np.concatenate((row, row & False))) == 1.5


@pytest.mark.parametrize("bits", [None, 4])
def test_the_same_model_in_another_order(library, tmp_path, bits):
    source = Bundle.open(library.calibrated() if bits is None else library.bundle(bits=bits))
    made, _ = reorder(source, tmp_path / "made.flash", TOKENS)
    assert made.manifest.order != source.manifest.order
    assert made.predictors() == source.predictors()
    for index in range(made.num_layers):
        assert list(made.verify(index)) == []
        assert sorted(made.checksums(index)) == sorted(source.checksums(index))
    tokens = mx.array(TOKENS[None, :24])
    for predictor in ("all", "oracle"):
        with load(source.path, "parts-alias", "part", predictor) as model:
            want = np.array(model(tokens)[0])
        with load(made.path, "parts-alias", "part", predictor) as model:
            assert_same_logits(np.array(model(tokens)[0]), want, TOLERANCE[mx.float32])
            cache = make_prompt_cache(model)
            decoded = [np.array(model(tokens[:, i : i + 1], cache=cache)[0, 0]) for i in range(24)]
        assert_same_logits(np.stack(decoded), want, TOLERANCE[mx.float32])


def test_a_damaged_record_is_not_carried_over(library, tmp_path):
    path = shutil.copytree(library.calibrated(), tmp_path / "ours.flash")
    bundle = Bundle.open(path)
    with open(bundle.layer_path(1), "r+b") as f:
        f.seek(16384 + 5 * bundle.manifest.record.stride + 3)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BundleError, match="record 5 does not match"):
        reorder(bundle, tmp_path / "made.flash", TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ["ours.flash"]


def test_what_is_there_is_not_overwritten(library, tmp_path):
    with pytest.raises(BundleError, match="already exists"):
        reorder(Bundle.open(library.calibrated()), tmp_path, TOKENS)
