"""A memory budget to settings: what is resident, how many units each layer holds, how long a prompt chunk may be.

The budget is all-in: resident weights, predictors, key-value cache, activations, staging and blocks, MLX's buffer
cache, and what is left over is pools. Only the interpreter itself (Python, MLX, the tokenizer) is not counted. What
cannot work is refused before anything is read. Imports no MLX.
"""

import contextlib
import os
import re
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

from mlxflash.misses import MissCurve

ROOM = 1.25  # slots for what a token wants, beside the mean of it
MIN_SLOTS = 8  # rows a layer needs at least: a token that needs more goes through in turns
LAYER_OBJECTS = 150_000  # bytes of Python and MLX objects that a layer takes beside its weights, measured
PREFILL_TOKENS = (512, 256, 128, 64, 32, 16)
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 64 << 10, 8 << 20  # a streaming block: sequential speed needs some MiB
RUNTIME_BYTES = 2_000_000  # stacks and page tables of some 25 threads, allocators' slack: measured in cgroups
AUTO_SHARE = 0.7  # of the memory available now, when no budget is given
DEVICE_SHARE = 0.9  # of a device's free memory: what is not in the budget (contexts, kernels, a stray copy) wants some
LANDING_BLOCKS, LEAST_LANDING = 4, 8  # a landing on the host: so many blocks, a block of so many records at least


class BudgetError(ValueError):
    """A memory budget that cannot work; `smallest` bytes would."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class Sizes:
    """What the planner needs to know of a model on a device; bytes unless said otherwise."""

    model: int  # the converted model: resident and streamed weights
    resident: int  # as loaded
    objects: int  # of Python and MLX, per layer; threads' stacks and what the allocator rounds up come on top
    predictor: int
    units: tuple[int, ...]  # per layer
    curves: tuple[MissCurve, ...] | None  # per layer; capacities follow them (None: the same share of every layer)
    slot: int  # one unit in a pool
    stride: int  # one record on disk
    kv_token: int  # key-value cache of one token
    activation_token: int  # activations of one prompt token, but for attention scores and the FFN
    score_token: int  # attention scores of one prompt token against one held token
    activation_item: int  # one number of an activation
    vocabulary: int
    staged: bool  # whether reads pass through a staging buffer
    least_slots: int = MIN_SLOTS  # of a layer; of experts, as many as one token chooses
    expert_token: int = 0  # what one prompt token's chosen experts, or a layer's blocks, compute before it is added up
    discrete: bool = False  # the budget is a device's own memory; what the host holds is planned beside it


@dataclass(frozen=True)
class Plan:
    """Bytes for everything and the settings that follow; `whole` is a model held completely."""

    memory: int
    resident: int
    objects: int
    predictor: int
    kv: int
    activations: int
    blocks: int
    staging: int
    cache: int
    pools: int
    capacities: tuple[int, ...]
    units: tuple[int, ...]
    block_units: int
    prefill_tokens: int
    context: int
    whole: bool
    discrete: bool = False
    host_objects: int = 0  # host memory beside a discrete device: Python, MLX and threads,
    host_landing: int = 0  # what units pass through,
    host_tier: int = 0  # and what keeps some of them

    def describe(self) -> str:
        """One line per use of the budget, for people."""
        rows = [
            ("resident weights", self.resident, ""),
            ("threads, objects", self.objects, ""),
            ("predictors", self.predictor, ""),
            ("key-value cache", self.kv, f"{self.context} tokens"),
            ("activations", self.activations, f"prompt chunks of {self.prefill_tokens} tokens"),
            ("streaming blocks", self.blocks, f"2 of {self.block_units} units" if self.blocks else "nothing streams"),
            ("staging", self.staging, ""),
            ("MLX buffer cache", self.cache, ""),
            ("pools", self.pools, f"{sum(self.capacities) / sum(self.units):.1%} of the feed-forward units"),
        ]
        lines = [f"plan for {format_bytes(self.memory)}{' of device memory' if self.discrete else ''}:"]
        lines += [_line(*row) for row in rows if row[1]]
        if self.discrete:
            on_host = [
                ("threads, objects", self.host_objects, ""),
                ("landing", self.host_landing, "units on their way to the device"),
                ("host tier", self.host_tier, f"{self.host_tier / self.streamed:.1%} of the feed-forward units"),
            ]
            lines.append(f"and {format_bytes(sum(size for _, size, _ in on_host))} of host memory:")
            lines += [_line(*row) for row in on_host if row[1]]
        return "\n".join(lines)

    @property
    def streamed(self) -> int:
        """Bytes of all feed-forward units in a pool."""
        return max(1, sum(self.units) * self.pools // max(1, sum(self.capacities)))


def _line(name: str, size: int, note: str) -> str:
    return f"  {name:<18}{format_bytes(size):>10}  {note}".rstrip()


def make_plan(sizes: Sizes, memory: int | None, context: int, available: int | None = None, host_tier: int = 0) -> Plan:
    """Settings for `memory` bytes (None: what holds everything, within what is available) and `context` tokens.

    `available` is what the device has free, where that is not the host's. Raises BudgetError, naming the smallest
    budget that would work, or the largest.
    """
    if host_tier and not sizes.discrete:
        raise ValueError("host memory beside the budget is for devices with memory of their own: leave it out")
    whole = _whole(sizes, context)
    room = available_memory() if available is None else available
    if memory is None:
        memory = min(whole.memory, int(AUTO_SHARE * room))
    elif available is not None and min(memory, whole.memory) > available:
        raise BudgetError(
            f"a memory budget of {format_bytes(memory)} does not fit this device, which has {format_bytes(available)}"
            f" free: --memory {as_typed(int(DEVICE_SHARE * available))} would",
            int(DEVICE_SHARE * available),
        )
    if memory >= whole.memory:
        return replace(whole, memory=memory)  # nothing streams, so that a tier would stay empty
    slots = sum(min(sizes.least_slots, n) for n in sizes.units)
    objects, beside = _objects(sizes)
    fixed = sizes.resident + objects + sizes.predictor + context * sizes.kv_token
    least = fixed + slots * sizes.slot
    least += sum(_reserves(sizes, context, 0).values())
    if memory < least:
        least = min(least, whole.memory)  # buffers and a predictor may outweigh what streaming saves
        raise BudgetError(
            f"a memory budget of {format_bytes(memory)} cannot work for this model: "
            f"the smallest that would is {format_bytes(_round_up(least))}"
            f" ({format_bytes(sizes.resident)} resident weights, {format_bytes(context * sizes.kv_token)} key-value"
            f" cache of {context} tokens)",
            least,
        )
    reserves = _reserves(sizes, context, memory - least)
    pools = memory - fixed - sum(reserves.values())
    capacities = split_slots(sizes.units, sizes.curves, pools // sizes.slot, sizes.least_slots)
    return Plan(
        memory=memory,
        resident=sizes.resident,
        objects=objects,
        predictor=sizes.predictor,
        kv=context * sizes.kv_token,
        pools=sum(capacities) * sizes.slot,
        capacities=capacities,
        units=sizes.units,
        block_units=min(reserves["blocks"] // (2 * sizes.slot), max(sizes.units)),
        discrete=sizes.discrete,
        host_objects=beside,
        host_landing=LANDING_BLOCKS * max(reserves["blocks"] // 2, LEAST_LANDING * sizes.stride) * sizes.discrete,
        host_tier=host_tier,
        prefill_tokens=_prefill(sizes, context, reserves["activations"]),
        context=context,
        whole=False,
        **reserves,
    )


def _reserves(sizes: Sizes, context: int, spare: int) -> dict[str, int]:
    """What work in progress may take when `spare` bytes are left above the least: it grows with the budget, and so
    slowly that the pools never shrink when the budget grows."""
    block = max(sizes.slot, min(MOST_BLOCK_BYTES, max(sizes.slot, LEAST_BLOCK_BYTES) + spare // 64))
    return {
        # A chunk of a prompt reads every expert that any of its tokens chose: longer ones are worth more there.
        "activations": _activations(sizes, PREFILL_TOKENS[-1], context) + spare // (8 if sizes.expert_token else 16),
        "blocks": 2 * block,
        "staging": 3 * (block + _least_staging(sizes)) if sizes.staged else 0,
        "cache": min(64 << 20, (1 << 20) + spare // 64),
    }


def _whole(sizes: Sizes, context: int) -> Plan:
    """Everything held: no predictor and no blocks, long prompt chunks, staging only while loading."""
    prefill = min(PREFILL_TOKENS[0], max(PREFILL_TOKENS[-1], context))
    pools, kv = sum(sizes.units) * sizes.slot, context * sizes.kv_token
    # A held layer's activations are as wide as the layer.
    activations = _activations(sizes, prefill, context) + prefill * max(sizes.units) * sizes.activation_item
    staging, cache = MOST_BLOCK_BYTES + _least_staging(sizes) if sizes.staged else 0, 16 << 20
    objects, beside = _objects(sizes)
    return Plan(
        memory=sizes.resident + objects + kv + activations + staging + cache + pools,
        resident=sizes.resident,
        objects=objects,
        predictor=0,
        kv=kv,
        activations=activations,
        blocks=0,
        staging=staging,
        cache=cache,
        pools=pools,
        capacities=sizes.units,
        units=sizes.units,
        block_units=0,
        prefill_tokens=prefill,
        context=context,
        whole=True,
        discrete=sizes.discrete,
        host_objects=beside,
        host_landing=LANDING_BLOCKS * MOST_BLOCK_BYTES * sizes.discrete,
    )


def _objects(sizes: Sizes) -> tuple[int, int]:
    """Bytes of Python's and MLX's objects in the budget, and beside it."""
    objects = sizes.objects + RUNTIME_BYTES
    return (0, objects) if sizes.discrete else (objects, 0)


def _prefill(sizes: Sizes, context: int, room: int) -> int:
    """The longest prompt chunk whose activations fit."""
    return next(t for t in PREFILL_TOKENS if _activations(sizes, t, context) <= room)


def _activations(sizes: Sizes, tokens: int, context: int) -> int:
    """Peak of a forward pass: a prompt chunk's, or the logits of one token."""
    prompt = tokens * (sizes.activation_token + sizes.expert_token + context * sizes.score_token)
    return prompt + 4 * sizes.vocabulary * sizes.activation_item


def _least_staging(sizes: Sizes) -> int:
    """One record, widened to blocks."""
    return sizes.stride + (3 << 12)


def split_slots(
    units: tuple[int, ...], curves: tuple[MissCurve, ...] | None, slots: int, least: int = MIN_SLOTS
) -> tuple[int, ...]:
    """`slots` shared out to layers of `units`: by miss curves where there are any, else evenly; to each the `least`.

    A layer too small for what a token wants takes it in turns, each a wait of its own: so up to half of the slots make
    room for a token, in the layers that want least first. All others go where each saves most misses, along the lower
    convex hull of every layer's curve.
    """
    capacities = [min(least, n) for n in units]
    left = slots - sum(capacities)
    room = slots // 2
    for want, layer in sorted((int(ROOM * c.misses[0]), layer) for layer, c in enumerate(curves or ())):
        more = min(want, units[layer]) - capacities[layer]
        if 0 < more <= room - sum(capacities):
            capacities[layer] += more
            left -= more
    steps = [(saved, layer, until) for layer, n in enumerate(units) for saved, until in _steps(curves, layer, n)]
    for _, group in groupby(sorted(steps, key=itemgetter(0), reverse=True), key=itemgetter(0)):
        wanted = {layer: until - capacities[layer] for _, layer, until in group if until > capacities[layer]}
        share = min(1.0, left / max(1, sum(wanted.values())))
        for layer, count in wanted.items():
            capacities[layer] += int(share * count)
        left = slots - sum(capacities)
    for layer, n in enumerate(units):  # what rounding left: of experts a slot is much
        if left > 0 and capacities[layer] < n:
            capacities[layer] += 1
            left -= 1
    return tuple(capacities)


def _steps(curves: tuple[MissCurve, ...] | None, layer: int, units: int) -> list[tuple[float, int]]:
    """A layer's slots in steps of falling worth: misses that each slot of a step saves, and where the step ends."""
    if curves is None:
        return [(0.0, units)]
    corners: list[tuple[int, float]] = []
    for share, misses in zip(curves[layer].shares, curves[layer].misses, strict=True):
        point = (int(share * units), misses)
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return [(-_slope(a, b), b[0]) for a, b in pairwise(corners) if b[0] > a[0]]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / max(1, b[0] - a[0])


def parse_memory(text: str | int | None, model_bytes: int) -> int | None:
    """ "2GB", "1.5GiB", "500MB", "60%" of the converted model, or bytes; ValueError says what is accepted."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b?|b|%)?\s*", str(text), re.IGNORECASE)
    unit = (match[2] or "b").lower() if match else ""
    if match is None:
        raise ValueError(f"memory {text!r} is not a size: write 2GB, 1.5GiB or 60% (of the converted model)")
    if unit == "%":
        value = float(match[1]) / 100 * model_bytes
    else:
        base = 1024 if "i" in unit else 1000
        value = float(match[1]) * base ** " kmgt".index(unit[0] if unit[0] in "kmgt" else " ")
    if value < 1:
        raise ValueError(f"memory {text!r} is nothing: write 2GB, 1.5GiB or 60% (of the converted model)")
    return int(value)


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def available_memory() -> int:
    """Bytes this process could still take: what the system reports, and no more than its cgroups' least limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/proc/meminfo").read_text()
        total = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        pass  # not Linux: physical memory is the best there is
    return min([total, *cgroup_limits()])


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Limits in bytes of this process's cgroups, of both versions, and of all that these lie in.

    root, own: where cgroups are mounted, and the file that names this process's, as Linux has them.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        mounts = [(root / "memory", "memory.limit_in_bytes")] if "memory" in controllers.split(",") else []
        if not controllers:  # the second version; beside the first it is mounted apart
            mounts = [(root, "memory.max"), (root / "unified", "memory.max")]
        for mount, name in mounts:
            here = mount / inside.lstrip("/")
            for folder in (here, *here.parents):
                with contextlib.suppress(OSError, ValueError):  # none there: another mount, or "max"
                    limits.append(int((folder / name).read_text()))
                if folder == mount:
                    break
    return limits


def as_typed(count: int) -> str:
    """A size as it can be typed back, rounded down."""
    return f"{count // 10**6}MB"


def _round_up(count: int) -> int:
    """To what `format_bytes` shows, so that the size named in a message works when typed back."""
    step = 1 if count < 1000 else 100 if count < 10**6 else 10**5 if count < 10**9 else 10**7
    return -(-count // step) * step
