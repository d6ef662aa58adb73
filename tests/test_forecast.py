"""The forecast: adds up by hand, moves the right way, and its machine profile is measured once and distrusted after."""

import json
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import pytest

from build import UNTIED
from mlxflash import forecast as forecasts
from mlxflash.backends import make_backend
from mlxflash.forecast import (
    AHEAD_STEPS,
    BESIDE,
    LAYER_STEPS,
    STREAM_STEPS,
    TOKEN_STEPS,
    Forecast,
    MachineProfile,
    Work,
    forecast,
    machine_profile,
)
from mlxflash.kept import Watch
from mlxflash.model import load_bundle
from mlxflash.plan import BudgetError, make_plan
from mlxflash.ways import Way, faster
from test_diskprofile import made
from test_plan import GB, OPT_67B

MACHINE = MachineProfile({"float16": 40e9, "3": 20e9, "float32": 50e9}, 5e-5)
PLAN = make_plan(OPT_67B, 8 * GB, 384)
WORK = Work(
    resident=4 * GB, kind="float16", predictor_kind="3", slot=16384, stride=16384, kv=100_000_000, misses=(300.0,) * 32
)


def seconds(disk=None, **changes):
    return forecast(PLAN, replace(WORK, **changes), MACHINE, disk).seconds


def test_what_is_held_takes_its_bytes_over_its_rate():
    own = (
        WORK.resident / 40e9
        + PLAN.predictor / 20e9
        + WORK.kv / 50e9
        + (TOKEN_STEPS + 32 * (LAYER_STEPS + STREAM_STEPS)) * 5e-5
    )
    rows = sum(PLAN.capacities) * 16384 / 40e9
    assert seconds(misses=(0.0,) * 32) == pytest.approx(own + rows)


def test_reads_hide_behind_held_rows_but_not_behind_what_names_them():
    fast, slow = made(overhead=1e-9, rate=1e12, latency=1e-9), made(overhead=1e-3)
    nothing_read = seconds()
    assert seconds(fast) == pytest.approx(nothing_read, rel=1e-6)
    own = nothing_read - (sum(PLAN.capacities) + 300 * 32) * 16384 / 40e9
    assert seconds(slow) == pytest.approx(own + 32 * BESIDE * slow.batch(16384, 300) + 300 * 32 * 16384 / 40e9)


@pytest.mark.parametrize("overhead", [1e-6, 1e-5, 1e-4])
def test_looking_ahead_without_error_never_takes_longer(overhead):
    disk = made(overhead=overhead, latency=1e-9)  # where two batches cost what one does
    times = [seconds(disk, recall=recall) for recall in (0.1, 0.3, 0.6, 1.0)]
    assert all(b <= a * 1.01 for a, b in pairwise(times))


def test_looking_ahead_costs_a_second_prediction():
    twice = PLAN.predictor / 20e9 + 32 * AHEAD_STEPS * 5e-5
    assert seconds(recall=0.5) - seconds() == pytest.approx(twice)


def test_of_two_ways_the_shorter_forecast_is_taken_and_said():
    ways = [
        Way(name, None, False, False, PLAN, None, Forecast(s, s, 1.0))
        for name, s in (("low-bit", 0.3), ("low-rank", 0.2))
    ]
    for one, other in (ways, ways[::-1]):
        chosen, said = faster(one, other)
        assert chosen.predictor == "low-rank"
        assert said == "  predictor: low-rank 200.0 ms per token, low-bit 300.0 ms"
    unknown = replace(ways[1], expected=None)
    assert faster(ways[0], unknown) == (ways[0], "")


def test_of_rows_that_are_held_those_predicted_take_their_bytes():
    """All that a token wants, held or new; no more than all that is held."""
    few, nothing = (seconds(wanted=(n,) * 32) for n in (400.0, 300.0))
    assert few - nothing == pytest.approx(32 * 100 * 16384 / 40e9)
    assert seconds() - nothing == pytest.approx(sum(PLAN.capacities) * 16384 / 40e9)
    assert seconds(wanted=(1e6,) * 32) == seconds()


def test_what_passes_through_staging_is_copied():
    disk = made()
    machine = replace(MACHINE, rates=MACHINE.rates | {"copy": 5e9})
    without = forecast(PLAN, WORK, machine, disk).seconds
    staged = forecast(PLAN, replace(WORK, staged=True), machine, disk).seconds
    assert staged - without == pytest.approx(32 * 300 * WORK.stride / 5e9)


def test_of_experts_those_chosen_are_computed():
    """Rows that are held and not chosen cost nothing; a chosen one costs the same wherever it comes from."""
    few = replace(WORK, misses=(2.0,) * 32, wanted=(8.0,) * 32)
    own = seconds(misses=(0.0,) * 32) - sum(PLAN.capacities) * 16384 / 40e9
    assert forecast(PLAN, few, MACHINE, None).seconds == pytest.approx(own + 32 * 8 * 16384 / 40e9)


STREAM = replace(WORK, streams=True, misses=(0.0,) * 32)
ABSENT = sum(PLAN.units) - sum(PLAN.capacities)


def test_a_stream_takes_what_is_longer_reading_or_computing():
    """Whole blocks at two under way; beside the disk, all that the processor does is hidden."""
    slow, fast = made(overhead=0, rate=1e8, latency=1e-9), made(overhead=0, rate=1e14, latency=1e-12)
    assert forecast(PLAN, STREAM, MACHINE, slow).seconds == pytest.approx(ABSENT * WORK.stride / 1e8, rel=0.01)
    said = forecast(PLAN, STREAM, MACHINE, fast)
    own = seconds(misses=(0.0,) * 32)
    assert said.seconds == pytest.approx(own + ABSENT * WORK.slot / 40e9, rel=1e-6)
    assert said.compute == pytest.approx(said.seconds, rel=1e-6)
    assert said.reads == ABSENT


def test_two_buffers_hide_no_more_than_they_hold():
    """Where a layer's own work takes longer than both buffers take to fill, the disk waits for it."""
    disk = made(overhead=0, rate=1e9, latency=1e-9)
    machine = replace(MACHINE, step=1e-2)  # own work alone: 36 steps a layer
    said = forecast(PLAN, STREAM, machine, disk).seconds
    own = (TOKEN_STEPS + 32 * (LAYER_STEPS + STREAM_STEPS)) * 1e-2
    blocks = -(-(PLAN.units[0] - PLAN.capacities[0]) // PLAN.block_units)
    assert blocks > 2
    assert own < said < own + ABSENT * (WORK.stride / 1e9 + WORK.slot / 40e9) + 1
    assert said > own + 31 * (blocks - 2) * PLAN.block_units * WORK.stride / 1e9 * 0.9


def test_a_streams_copies_are_not_hidden_from_the_processor():
    machine = replace(MACHINE, rates=MACHINE.rates | {"copy": 5e9})
    fast = made(overhead=0, rate=1e14, latency=1e-12)
    more = forecast(PLAN, replace(STREAM, staged=True), machine, fast).seconds
    less = forecast(PLAN, STREAM, machine, fast).seconds
    assert more - less == pytest.approx(ABSENT * WORK.stride / 5e9, rel=1e-3)


def test_fewer_misses_take_less():
    disk = made()
    times = [seconds(disk, misses=(n,) * 32) for n in (0.0, 10.0, 100.0, 1000.0)]
    assert times == sorted(times)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Watch, "quiet", True)
    monkeypatch.setattr(forecasts, "MATRIX_BYTES", 1 << 20)
    return tmp_path / "cache" / "machines"


def test_a_kind_is_measured_once(kept, monkeypatch):
    with mx.stream(mx.cpu):
        backend = make_backend("cpu")
        first = machine_profile(backend, {"float32", "3"})
        more = machine_profile(backend, {"float16", "copy"})
        monkeypatch.setattr(forecasts, "_median", None)  # measuring again would fail
        assert machine_profile(backend, {"float32", "3", "float16", "copy"}) == more
    assert first.rates.items() <= more.rates.items()
    assert first.step == more.step > 0


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"rates": {"3": -1.0}, "step": 1.0}', '{"rates": {"3": NaN}, "step": 1.0}', '{"rates": 3}'],
)
def test_a_damaged_profile_is_measured_again(kept, damage):
    with mx.stream(mx.cpu):
        backend = make_backend("cpu")
        machine_profile(backend, {"3"})
        [file] = kept.iterdir()
        file.write_text(damage)
        assert machine_profile(backend, {"3"}).rates["3"] > 0
    assert json.loads(file.read_text())["rates"]["3"] > 0


def test_a_model_held_whole_has_a_forecast_and_cached_reads_have_none(kept, library):
    path = library.bundle(UNTIED)
    with load_bundle(path, memory="1GB", max_kv_size=64, direct=False) as model:
        assert model.flash.plan.whole
        assert "forecast" in model.flash.describe()
    with pytest.raises(BudgetError) as caught:
        load_bundle(path, memory=1, max_kv_size=64)
    with load_bundle(path, memory=caught.value.smallest, max_kv_size=64, direct=False) as model:
        assert not model.flash.plan.whole
        assert model.flash.forecast is None
