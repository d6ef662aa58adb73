"""What a public model will take and how fast it will run here, said before it is downloaded: in floats and in 4 bits.

Sizes are the catalogue's, rates those of this machine and of the disk that the bundle is to lie on. What a token of a
sparse model misses is guessed from how active the model is said to be and how the embedded story model behaves.
"""

import json
from functools import cache

from mlxflash.backends import Backend, make_backend
from mlxflash.catalog import CONTEXT, STORY, Known
from mlxflash.diskprofile import DiskProfile, disk_of
from mlxflash.forecast import COPY, Forecast, Work, forecast, machine_profile
from mlxflash.kept import cache_folder
from mlxflash.misses import MissCurve
from mlxflash.plan import (
    AUTO_SHARE,
    BudgetError,
    Plan,
    Sizes,
    available_memory,
    format_bytes,
    make_plan,
    parse_memory,
)
from mlxflash.predictor import LOW_BITS


def preview(known: Known, memory: str | int | None, bits: int | None = None, context: int | None = None) -> str:
    """A line for floats, one for 4 bits (and for `bits`), which is faster, and what the forecasts rest on.

    memory, context: as load_bundle's memory and max_kv_size. Measures what this machine was not measured for within a
    day: about two seconds.
    """
    backend, disk = make_backend(), disk_of(cache_folder())
    lines = [f"{known.repo}: {format_bytes(known.nbytes())} or more to download, unless the hub's cache has it"]
    forecasts: list[tuple[float, str]] = []
    sized = cached = False
    for choice in (None, 4, *({bits} - {None, 4})):
        flag, sizes = f"-q {choice}" if choice else "float16", known.sizes(choice)
        said = f"  {flag:<8} {format_bytes(known.nbytes(choice)):>9} on disk"
        try:
            plan = make_plan(sizes, parse_memory(memory, sizes.model), min(context or CONTEXT, known.positions))
        except BudgetError as error:
            lines.append(f"{said}, {format_bytes(error.smallest)} of memory at least: more than it may take")
            continue
        misses = _misses(known, plan)
        expected = None
        if plan.whole or disk is not None:
            expected = _forecast(known, choice, plan, sizes, misses, backend, disk)
            forecasts.append((expected.seconds, flag))
        lines.append(f"{said}, {_how(known, plan, sizes, misses)}{_speed(expected)}")
        sized |= known.kind == "sparse" and not plan.whole
        cached |= not plan.whole and known.nbytes(choice) < AUTO_SHARE * available_memory()
    if len(forecasts) > 1:
        (best, flag), (other, _) = sorted(forecasts)[:2]
        word = "would be faster" if other > 1.05 * best else "would take as long as the other"
        lossy = f"; in {flag[3:]} bits it is another model than float16" if flag != "float16" else ""
        lines.append(f"  {flag} {word}{lossy}")
    if sized and known.active:
        lines.append(f"  (guessed from {known.active:.0%} of its units being active, and the story model's behaviour)")
    elif sized:
        lines.append("  (how sparse it is was not published; forecast as for --exact, which reads everything)")
    if cached:
        lines.append("  (forecast as read from the disk; what the system's page cache keeps comes sooner)")
    return "\n".join(lines)


def _how(known: Known, plan: Plan, sizes: Sizes, misses: tuple[float, ...]) -> str:
    """Memory, what is held, what a token reads."""
    if plan.whole:
        used = make_plan(sizes, None, plan.context, 1 << 60).memory
        return f"{format_bytes(used)} of memory: all of it held, nothing read"
    held, read = sum(plan.capacities) / sum(plan.units), format_bytes(sum(misses) * sizes.stride)
    what = "experts" if known.experts else "units"
    line = f"{format_bytes(plan.memory)} of memory: {held:.0%} of the {what} held, {read}"
    if known.experts:
        return f"{line} or less read per token, those of the {known.chosen} chosen in each layer that are not held"
    if known.kind == "sparse" and known.active:
        return f"{line} read per token, those predicted that are not held"
    return f"{line} read per token, exactly as the model is"


def _speed(expected: Forecast | None) -> str:
    return "" if expected is None else f"; forecast {expected.rate} tokens/s"


def _misses(known: Known, plan: Plan) -> tuple[float, ...]:
    """Units per token, per layer."""
    shares = [held / units for held, units in zip(plan.capacities, plan.units, strict=True)]
    if known.experts:  # as if routers chose by chance
        return tuple(known.chosen * (1 - share) for share in shares)
    if known.kind == "sparse" and known.active:
        curve, active = _story()
        scale = known.active / active
        return tuple(
            units * min(1 - share, scale * curve.at(int(share * curve.units)) / curve.units)
            for share, units in zip(shares, plan.units, strict=True)
        )
    return tuple(float(units - held) for held, units in zip(plan.capacities, plan.units, strict=True))


@cache
def _story() -> tuple[MissCurve, float]:
    """How much a layer of the embedded model misses by how much it holds, at its default level as measured with nothing
    held, and the share of its units that is active: means over its layers."""
    manifest = json.loads((STORY / "manifest.json").read_text())
    measured = manifest["calibration"]["fidelity"]["low-bit"]["levels"]["high"]
    said = min(measured, key=lambda level: level["held"])["misses"]
    mean = tuple(sum(column) / len(column) for column in zip(*said["layers"], strict=True))
    units = sum(layer["units"] for layer in manifest["layers"]) // len(manifest["layers"])
    return MissCurve(units, tuple(said["shares"]), mean), manifest["calibration"]["low-bit"]["active"]


def _forecast(
    known: Known,
    bits: int | None,
    plan: Plan,
    sizes: Sizes,
    misses: tuple[float, ...],
    backend: Backend,
    disk: DiskProfile | None,
) -> Forecast:
    kind, guessed = str(bits or "float16"), str(LOW_BITS)
    sparse = known.kind == "sparse" and known.active > 0
    idle = 0 if known.tied else known.vocabulary * known.width  # of the embeddings a token takes one row
    work = Work(
        resident=sizes.resident * (known.weights[1] - idle) // known.weights[1],
        kind=kind,
        predictor_kind=guessed if sparse else kind,
        slot=sizes.slot,
        stride=sizes.stride,
        kv=plan.kv // 2,
        misses=(0.0,) * known.layers if plan.whole else misses,
        wanted=(known.chosen,) * known.layers if known.experts else (),
        staged=sizes.staged,
        streams=not (sparse or known.experts or plan.whole),
        chance=known.experts > 0 and not plan.whole,
    )
    kinds = {kind, guessed, "float32"} | ({COPY} if work.staged else set())
    return forecast(plan, work, machine_profile(backend, kinds), disk)
