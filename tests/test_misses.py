"""Miss curves: the simulation is the window's own, what it says of memory is what a window then reads."""

import numpy as np
import pytest

from mlxflash.misses import ORDERS, SHARES, MissCurve, by_order, miss_curve, misses_per_token
from mlxflash.policy import Belady, Recency


def hot_and_cold(tokens=80, units=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((tokens, units)) < np.linspace(0.5, 0.005, units)


def test_one_slot_misses_what_is_wanted_and_all_slots_what_is_new():
    wanted = hot_and_cold()
    fresh = wanted & (np.cumsum(wanted, axis=0) == 1)
    assert misses_per_token(wanted, 0) == wanted[20:].sum(axis=1).mean()
    assert misses_per_token(wanted, 1) == pytest.approx(misses_per_token(wanted, 0), abs=1)
    assert misses_per_token(wanted, wanted.shape[1]) == fresh[20:].sum(axis=1).mean()


def test_a_cycle_longer_than_memory_is_counted_by_hand():
    """Units 0 and 1 by turns beside unit 2, in two slots: what is not unit 2 is never there."""
    wanted = np.zeros((40, 3), bool)
    wanted[:, 2] = True
    wanted[0::2, 0] = wanted[1::2, 1] = True
    assert misses_per_token(wanted, 2) == 1
    assert misses_per_token(wanted, 3) == 0


def test_the_bound_of_a_cycle_is_counted_by_hand():
    """Three units by turns, two slots: the longest unused one is always the next; who knows that keeps it, and misses
    every other token."""
    wanted = np.tile(np.eye(3, dtype=bool), (20, 1))
    assert misses_per_token(wanted, 2, policy=Recency(3)) == 1
    assert misses_per_token(wanted, 2, policy=Belady(wanted)) == pytest.approx(0.5, abs=0.03)


def test_no_order_reads_less_than_the_bound():
    found = by_order(hot_and_cold())
    assert list(found) == list(ORDERS)
    bound = list(found["Belady, who knows the future"].values())
    for missed in found.values():
        assert (np.array(bound) <= np.array(list(missed.values()))).all()
    assert found["decayed frequency (ours)"][0.3] == misses_per_token(hot_and_cold(), 60) > 1.05 * bound[3]


def test_curves_fall_from_what_is_wanted():
    curve = miss_curve(hot_and_cold())
    assert curve.shares == SHARES
    assert (np.diff(curve.misses) <= 0).all()
    assert curve.misses[0] > 2 * curve.misses[-1]


def test_between_corners_on_a_line():
    curve = MissCurve(100, (0.0, 0.5, 1.0), (40.0, 10.0, 0.0))
    assert [curve.at(n) for n in (0, 25, 50, 75, 100)] == [40, 25, 10, 5, 0]
