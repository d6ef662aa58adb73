"""The planner's laws.

What a plan spends is at most its budget, and every layer gets slots, none more than it has units.
A budget that cannot work is refused before anything is read, naming the smallest that would; that one works, as
it stands and as the message spells it.
More memory never holds fewer units, never shortens a prompt's chunks, never shrinks what reads pass through.
A size is read as written, and nothing that is no size is read as one.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from build import Shape, load, prompt_of
from mlxflash.misses import MissCurve
from mlxflash.model import load_bundle
from mlxflash.plan import (
    MIN_SLOTS,
    ROOM,
    RUNTIME_BYTES,
    BudgetError,
    Plan,
    Sizes,
    cgroup_limits,
    format_bytes,
    make_plan,
    parse_memory,
    split_slots,
)
from test_exactness import assert_exact

KB, MB, GB = 1000, 1000**2, 1000**3

SHARES = (0.0, 0.05, 0.2, 0.5, 1.0)


def curves_of(units, wanted):
    """Miss curves that fall as real ones do: fast at first."""
    falls = (1.0, 0.6, 0.25, 0.05, 0.0)
    return tuple(MissCurve(n, SHARES, tuple(w * f for f in falls)) for n, w in zip(units, wanted, strict=True))


OPT_67B = Sizes(
    model=13_316 * MB, resident=4_440 * MB, objects=5 * MB, predictor=940 * MB, units=(16384,) * 32,
    curves=curves_of((16384,) * 32, (300.0,) * 32), slot=16388, stride=16384, kv_token=524_288,
    activation_token=131_072, score_token=256, activation_item=2, vocabulary=50272, staged=False,
)  # fmt: skip
STAGED = replace(OPT_67B, slot=18180, stride=18176, staged=True, units=(18176,) * 32)
UNEVEN = replace(
    OPT_67B,
    units=(4096, 100, 5, 16384) * 3,
    curves=curves_of((4096, 100, 5, 16384) * 3, (10.0, 80.0, 0.0, 700.0) * 3),
)
NO_CURVES = replace(OPT_67B, predictor=0, units=(64, 512), curves=None)
TINY = Sizes(
    model=700 * KB, resident=200 * KB, objects=9 * KB, predictor=0, units=(2048, 2048),
    curves=curves_of((2048, 2048), (256.0, 256.0)), slot=516, stride=512, kv_token=1024, activation_token=4096,
    score_token=32, activation_item=4, vocabulary=300, staged=True,
)  # fmt: skip
MODELS = {"6.7b": OPT_67B, "staged": STAGED, "uneven": UNEVEN, "no curves": NO_CURVES, "tiny": TINY}
CONTEXTS = (1, 512, 4096)


def smallest(sizes, context):
    with pytest.raises(BudgetError) as caught:
        make_plan(sizes, 1, context)
    return caught.value.smallest


def held(plan):
    return sum(plan.capacities)


def assert_sound(plan: Plan, sizes: Sizes, memory, context):
    parts = (
        plan.resident
        + plan.objects
        + plan.predictor
        + plan.kv
        + plan.activations
        + plan.blocks
        + plan.staging
        + plan.cache
    ) + plan.pools
    assert parts <= memory == plan.memory
    assert plan.resident == sizes.resident
    assert plan.kv == context * sizes.kv_token
    assert plan.context == context
    assert plan.pools == held(plan) * sizes.slot
    for capacity, units in zip(plan.capacities, sizes.units, strict=True):
        assert min(MIN_SLOTS, units) <= capacity <= units
    if plan.whole:
        assert plan.capacities == sizes.units
        assert plan.predictor == plan.blocks == 0
    else:
        assert plan.predictor == sizes.predictor
        assert plan.block_units >= 1
        assert plan.blocks >= 2 * plan.block_units * sizes.slot
        assert sizes.staged * 3 * (sizes.stride + 8192) <= plan.staging <= sizes.staged * 3 * (plan.blocks + (1 << 20))
    assert 16 <= plan.prefill_tokens <= 512
    assert plan.activations >= plan.prefill_tokens * (sizes.activation_token + context * sizes.score_token)


def budgets(sizes, context):
    """Budgets from the smallest to beyond the whole model, closely around every power of the ratio and at the ends."""
    least = smallest(sizes, context)
    spread = np.geomspace(least, 2 * least + 2 * sum(sizes.units) * sizes.slot + GB, 300)
    near = least + np.arange(0, 64) * sizes.slot // 3
    return sorted({int(m) for m in np.concatenate((spread, spread + 1, near))})


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up(name, context):
    sizes = MODELS[name]
    plans = [make_plan(sizes, memory, context) for memory in budgets(sizes, context)]
    for plan in plans:
        assert_sound(plan, sizes, plan.memory, context)
    assert plans[-1].whole
    assert not plans[0].whole


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_more_memory_never_holds_less(name, context):
    sizes = MODELS[name]
    before = None
    for memory in budgets(sizes, context):
        plan = make_plan(sizes, memory, context)
        if before is not None:
            assert held(plan) >= held(before), (before.memory, memory)
            if not plan.whole:
                assert plan.prefill_tokens >= before.prefill_tokens
                assert plan.block_units >= before.block_units
                assert plan.cache >= before.cache
        before = plan


@pytest.mark.parametrize("name", MODELS)
def test_a_longer_context_never_holds_more(name):
    sizes = MODELS[name]
    memory = smallest(sizes, 4096) + sum(sizes.units) * sizes.slot // 2
    plans = [make_plan(sizes, memory, context) for context in (1, 16, 512, 2048, 4096)]
    assert [held(p) for p in plans] == sorted((held(p) for p in plans), reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_put_to_use(name):
    """Of what a budget leaves beyond the smallest, at least two thirds hold units, until all are held."""
    sizes = MODELS[name]
    least = smallest(sizes, 512)
    for memory in budgets(sizes, 512):
        plan = make_plan(sizes, memory, 512)
        wanted = min(sum(sizes.units) * sizes.slot, (memory - least) * 2 // 3)
        assert plan.pools >= wanted - len(sizes.units) * sizes.slot


def missed(curves, capacities):
    return sum(curve.at(held) for curve, held in zip(curves, capacities, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_split_of_the_slots_misses_less(seed):
    """Beside a thousand random splits that leave a token room everywhere, for random convex curves."""
    rng = np.random.default_rng(seed)
    units, wanted = (16384,) * 6, rng.uniform(10, 3000, 6)
    shares = (0.0, *np.sort(rng.uniform(0.02, 0.9, 4)), 1.0)
    curves = []
    for w in wanted:
        slopes = np.sort(rng.uniform(0, 1, 5))[::-1] * np.diff(shares)
        falls = np.cumsum(np.concatenate(([0.0], slopes / slopes.sum())))
        curves.append(MissCurve(16384, shares, tuple(w * (1 - falls))))
    sizes = replace(OPT_67B, units=units, curves=tuple(curves), predictor=0, resident=1 * GB)
    plan = make_plan(sizes, 2 * GB, 512)
    total = sum(plan.capacities)
    assert MIN_SLOTS * 6 < total < sum(units)
    ours = missed(curves, plan.capacities)
    floor = (ROOM * wanted).astype(int)
    assert (np.array(plan.capacities) >= floor).all()
    for _ in range(1000):
        split = floor + (total - floor.sum()) * rng.dirichlet(np.ones(6))
        if (split <= 16384).all():
            assert ours <= missed(curves, split) + 1e-3 * sum(wanted)


def test_a_token_fits_into_the_small_layers_before_the_large_ones_get_more():
    curves = curves_of((2048,) * 3, (40.0, 100.0, 900.0))
    assert split_slots((2048,) * 3, curves, 400) == (50, 125, 225)
    assert split_slots((2048,) * 3, curves, 60)[0] < 40  # half of them would not do


def test_layers_without_curves_share_evenly():
    plan = make_plan(replace(NO_CURVES, units=(4096, 16384)), smallest(NO_CURVES, 512) + 100 * MB, 512)
    first, second = (capacity - MIN_SLOTS for capacity in plan.capacities)
    assert abs(second / first - (16384 - MIN_SLOTS) / (4096 - MIN_SLOTS)) < 0.01


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_refused_budgets_name_one_that_works(name, context):
    sizes = MODELS[name]
    least = smallest(sizes, context)
    assert_sound(make_plan(sizes, least, context), sizes, least, context)
    for memory in (1, least // 2, int(0.95 * least)):
        with pytest.raises(BudgetError) as caught:
            make_plan(sizes, memory, context)
        assert caught.value.smallest == least
        assert format_bytes(memory) in str(caught.value)
        spelt = re.search(r"the smallest that would is ([0-9.]+ [kMG]?B)", str(caught.value))[1]
        make_plan(sizes, parse_memory(spelt, sizes.model), context)
    with pytest.raises(BudgetError):
        make_plan(sizes, least - 1, context)


def test_a_model_that_streaming_makes_no_smaller():
    """Buffers and a predictor may outweigh what they save; the budget named is then the whole model's."""
    sizes = replace(TINY, units=(64, 64), predictor=100 * MB)
    least = smallest(sizes, 512)
    assert make_plan(sizes, least, 512).whole
    with pytest.raises(BudgetError):
        make_plan(sizes, least - 1, 512)


@pytest.mark.parametrize("predictor", ["all", "oracle", "low-bit"])
@pytest.mark.parametrize("backend", ["native", "parts-alias"])
def test_the_smallest_budget_loads_and_computes(library, backend, predictor):
    path = library.bundle(Shape(dtype="float16"))
    with load(path, backend, "least", predictor) as model:
        plan = model.flash.plan
        assert_sound(plan, replace(_sizes_of(plan), slot=plan.pools // held(plan)), plan.memory, plan.context)
        if predictor != "low-bit":
            assert_exact(model, path, prompt_of(5))
    with pytest.raises(BudgetError, match="the smallest that would is"):
        load_bundle(path, memory=plan.memory // 2, predictor=predictor)


def _sizes_of(plan):
    return replace(TINY, resident=plan.resident, objects=plan.objects - RUNTIME_BYTES, predictor=plan.predictor,
                   kv_token=plan.kv // plan.context,
                   units=plan.units, activation_token=0, score_token=0, stride=0, staged=plan.staging > 0)  # fmt: skip


def test_percent_of_the_converted_model(library):
    """100 % is what resident and streamed weights take on disk, so that words about a model need no arithmetic."""
    path = library.bundle()
    stored = sum(f.stat().st_size for f in path.glob("resident*")) + 2 * 256 * 512
    with pytest.raises(BudgetError) as caught:
        load_bundle(path, memory="50%", predictor="all")
    said = re.search(r"a memory budget of ([0-9.]+) kB", str(caught.value))[1]
    assert float(said) * 1000 == pytest.approx(stored / 2, rel=0.02)


def test_without_a_budget_all_is_held(library):
    with load_bundle(library.bundle(), predictor="all") as model:
        assert model.flash.plan.whole
        assert model.flash.held_share() == 1


GOOD = {
    None: None, 1: 1, 123456789: 123456789, "2GB": 2 * GB, "2 GB": 2 * GB, " 2gb ": 2 * GB, "2G": 2 * GB,
    "2g": 2 * GB, "1.5GiB": 3 << 29, "1.5gib": 3 << 29, "1Gi": 1 << 30, ".5kB": 500, "0.5k": 500, "500MB": 500 * MB,
    "3TB": 3000 * GB, "1TiB": 1 << 40, "7": 7, "7b": 7, "7 B": 7, "60%": 600, "12.5 %": 125, "0.1%": 1, "250%": 2500,
    "1000000": MB,
}  # fmt: skip
BAD = ["", " ", "GB", "%", "two", "2GBB", "2 G B", "-1", "-2GB", "+2GB", "2,5GB", "1e9", "1_000", "0", "0GB", "0%",
       "0.5", "0.4b", "0.01%", "2XB", "2PB", "nan", "inf", "infGB", "2GB4", "60%%", "1.2.3GB", ".", "٣GB", "0x10", 0,
       -5, True, float("nan")]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_sizes(text):
    assert parse_memory(text, 1000) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r"2GB, 1\.5GiB or 60%"):
        parse_memory(text, 1000)


@pytest.mark.parametrize("count", [1, 999, 1000, 1234, 999_949, 10**6, 123_456_789, 999_900_000, 10**9, 13_316_000_000])
def test_sizes_as_people_read_them(count):
    text = format_bytes(count)
    assert parse_memory(text, 1) == pytest.approx(count, rel=0.05)
    assert len(text) <= 9


TREES = {  # what the system says, files of limits, limits that hold
    "second kind, nested": ("0::/a/b\n", {"memory.max": 9, "a/memory.max": 5, "a/b/memory.max": "max"}, {9, 5}),
    "a sibling": ("0::/a\n", {"a/memory.max": 5, "b/memory.max": 3}, {5}),
    "first kind, nested": (
        "9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n",
        {f"memory/{folder}memory.limit_in_bytes": n for folder, n in (("", 9), ("a/", 7), ("a/b/", 8), ("c/", 1))},
        {9, 7, 8},
    ),
    "both": ("4:memory:/\n0::/u\n", {"memory/memory.limit_in_bytes": 6, "unified/u/memory.max": 4}, {6, 4}),
    "another mount": ("0::/docker/1\n", {"memory.max": 5}, {5}),
    "none": ("0::/\n", {"memory.max": "max"}, set()),
}


@pytest.mark.parametrize("case", TREES)
def test_limits_of_nested_cgroups_hold_all_the_way_up(tmp_path, case):
    own, files, limits = TREES[case]
    (tmp_path / "own").write_text(own)
    for name, limit in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert set(cgroup_limits(tmp_path / "cgroup", tmp_path / "own")) == limits
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "nowhere") == []
