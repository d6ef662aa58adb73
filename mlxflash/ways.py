"""Ways to run a bundle within a budget, what each is forecast to take, and the choice between them."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from mlxflash.backends import FFN, Backend
from mlxflash.bundle import Bundle, BundleError
from mlxflash.diskprofile import DiskProfile, disk_profile
from mlxflash.fidelity import Level
from mlxflash.forecast import COPY, Forecast, Work, forecast, machine_profile
from mlxflash.plan import BudgetError, Plan, Sizes, format_bytes, make_plan, parse_memory
from mlxflash.predictor import LOW_BITS
from mlxflash.resident import Tensor
from mlxflash.sizes import sizes_of
from mlxflash.wishes import STORED, Terms


@dataclass(frozen=True)
class Means:
    """What there is to run a bundle with."""

    bundle: Bundle
    config: dict[str, Any]
    found: list[Tensor]  # resident
    ffn: FFN
    backend: Backend
    memory: str | int | None
    host_memory: str | int | None
    context: int  # tokens
    direct: bool  # reads bypass the page cache


@dataclass(frozen=True)
class Way:
    """One way to run a bundle within its budget."""

    predictor: str
    level: Level | None
    look_ahead: bool
    predicted: bool  # only predicted rows of those held are computed
    plan: Plan
    disk: DiskProfile | None
    expected: Forecast | None
    reads: float | None = None  # bytes per token, by miss curves; None: not measured
    sketched: bool = False  # rows hold only what a sketch does not stand for
    why: str = ""  # it was chosen, for people


def choose(terms: Terms, means: Means) -> Way:
    """The fastest way. Raises BudgetError and BundleError where the leading predictor has none."""
    (leading, levels), *rivals = terms.candidates.items()
    ways = [_fitting(leading, levels, terms, means)]
    for rival, levels in rivals:
        with contextlib.suppress(BudgetError, BundleError):
            ways.append(_fitting(rival, levels, terms, means))
    way, why = fastest(ways)
    skips = "  predicted rows of those held are computed" if way.predicted else ""
    return replace(way, why="\n".join(filter(None, [why, skips])))


def _fitting(predictor: str, levels: list[Level], terms: Terms, means: Means) -> Way:
    """With this predictor: all rows that are held computed or only those predicted, what is forecast to be faster."""
    if terms.sketched(predictor):
        with contextlib.suppress(BudgetError):
            if (whole := _planned("all", [], False, terms, means)).plan.whole:
                return whole  # what holds everything has no use for a sketch
    all_rows = terms.wishes.all_rows
    skips = means.backend.leaves_out_free and predictor in STORED and predictor != "sketch" and all_rows is not True
    choices = (False, True) if skips else (False,)
    ways = [_planned(predictor, levels, predicted, terms, means) for predicted in choices]
    if skips and all_rows is False:
        return ways[1]
    return min(ways, key=lambda way: way.expected.seconds if way.expected else 0)


def _planned(predictor: str, levels: list[Level], predicted: bool, terms: Terms, means: Means) -> Way:
    """With that of the levels, which hold less and less, that holds no more than the budget does."""
    bundle, backend, wishes = means.bundle, means.backend, terms.wishes
    ahead = wishes.look_ahead
    if ahead is None:
        able = predictor == "low-bit" or (predictor == "sketch" and bundle.manifest.layout == "plain")
        ahead = means.direct and able and "look-ahead" in bundle.predictors()
    beside = sum(p.nbytes for p in terms.own) if terms.own else 0
    beside += sum(f.stat().st_size for f in bundle.predictor_files("look-ahead")) if ahead else 0
    sketched = terms.sketched(predictor)
    ffn = means.ffn.sketched() if sketched else means.ffn
    level: Level | None = None
    for level in (*levels, None):
        sizes = sizes_of(bundle, means.config, means.found, backend, ffn, predictor, beside, level)
        tier = parse_memory(means.host_memory, sizes.model) if means.host_memory not in (None, 0, "0") else 0
        memory = parse_memory(means.memory, sizes.model)
        plan = make_plan(sizes, memory, means.context, backend.available_memory(), tier or 0)
        # A window's span gives up what is held, and rows that are not predicted may be left out.
        held = 0 if wishes.window or predicted else sum(plan.capacities) / sum(plan.units)
        if level is None or level.held <= held:
            break
    if level is None and levels and wishes.fidelity:  # a bundle of before, which had one measurement
        raise BundleError(f"{bundle.path}: {wishes.fidelity!r} was measured with more held than here; calibrate again")
    layers = [bundle.layer_path(i) for i in range(bundle.num_layers)]
    disk = disk_profile(layers) if means.direct and not plan.whole else None
    expected = forecast_of(bundle, plan, sizes, means.found, predictor, backend, disk, ahead, predicted)
    if wishes.look_ahead is None and ahead and expected is not None:
        without = forecast_of(bundle, plan, sizes, means.found, predictor, backend, disk, False, predicted)
        if without is not None and without.seconds < expected.seconds:
            ahead, expected = False, without
    misses = missed(plan, sizes)
    reads = None if misses is None else sum(misses) * (sizes.extent or sizes.stride)
    return Way(predictor, level, ahead, predicted and not plan.whole, plan, disk, expected, reads, sketched)


def fastest(ways: list[Way]) -> tuple[Way, str]:
    """Of the ways whose cost in fidelity is known, or else of all: the one with the shortest forecast, or where there
    are none (reads may be cached) with the fewest bytes to read, and why, for people."""
    if ways[0].plan.whole:
        return ways[0], ""
    ways = [way for way in ways if way.level is not None and way.level.met] or ways
    if len(ways) == 1:
        return ways[0], ""
    timed = all(way.expected is not None for way in ways)
    if timed:
        cost = {id(way): way.expected.seconds if way.expected else 0.0 for way in ways}
        said = {id(way): f"{way.predictor} {1e3 * cost[id(way)]:.1f} ms" for way in ways}
    elif all(way.reads is not None for way in ways):
        cost = {id(way): way.reads or 0.0 for way in ways}
        said = {id(way): f"{way.predictor} {format_bytes(cost[id(way)])}" for way in ways}
    else:
        return ways[0], ""
    ways = sorted(ways, key=lambda way: cost[id(way)])
    words = [said[id(way)] for way in ways]
    return ways[
        0
    ], f"  predictor: {words[0]} per token, {', '.join(words[1:])}{'' if timed else ', once memory is full'}"


def forecast_of(
    bundle: Bundle,
    plan: Plan,
    sizes: Sizes,
    found: list[Tensor],
    predictor: str,
    backend: Backend,
    disk: DiskProfile | None,
    look_ahead: bool,
    predicted: bool,
) -> Forecast | None:
    """Of a decoded token; None where reads may be cached, where misses were not measured, and for experts in formats
    whose products are not."""
    manifest = bundle.manifest
    if not plan.whole and disk is None:
        return None
    if manifest.quantization and manifest.quantization["mode"] != "affine":
        return None
    mixture, streams = manifest.layout == "experts", predictor == "all" and not plan.whole
    misses = (0.0,) * len(plan.units)
    if (known := missed(plan, sizes)) is not None:
        misses = known
    elif not plan.whole and mixture:
        misses = tuple(sizes.least_slots * (1 - h / n) for h, n in zip(plan.capacities, plan.units, strict=True))
    elif not (plan.whole or streams):
        return None
    kind = str(manifest.quantization["bits"]) if manifest.quantization else manifest.dtype
    guessed = {"low-bit": str(LOW_BITS), "low-rank": "8", "sketch": str(LOW_BITS), "bound": "8"}.get(predictor, kind)
    head = any(t.name.startswith("lm_head.") for t in found)
    idle = ("embed_tokens.", "embed_positions.") if head else ("embed_positions.",)
    ahead = manifest.calibration.get("look-ahead") if look_ahead else None
    recall = ahead["recall"] if ahead else 0.0
    wanted: tuple[float, ...] = (sizes.least_slots,) * len(plan.units) if mixture else ()
    if (predicted or sizes.partial) and sizes.curves:
        wanted = tuple(curve.misses[0] for curve in sizes.curves)
    work = Work(
        resident=sum(t.num_bytes for t in found if not any(name in t.name for name in idle)),
        kind=kind,
        predictor_kind=guessed,
        slot=sizes.slot,
        stride=sizes.extent or sizes.stride,
        kv=plan.kv // 2,  # of a context that fills
        misses=misses,
        recall=recall,
        over=ahead["flagged"] / max(1e-9, ahead["active"]) - recall if ahead else 0.0,
        wanted=wanted,
        staged=not (manifest.record.aligned or sizes.discrete),
        streams=streams,
        chance=mixture and not plan.whole and sizes.curves is None,
    )
    kinds = {kind, guessed, "float32"} | ({COPY} if work.staged else set())
    return forecast(plan, work, machine_profile(backend, kinds), disk)


def missed(plan: Plan, sizes: Sizes) -> tuple[float, ...] | None:
    """Units that each layer misses per token; None where nobody measured it."""
    if plan.whole or sizes.curves is None:
        return None
    return tuple(curve.at(held) for curve, held in zip(sizes.curves, plan.capacities, strict=True))
