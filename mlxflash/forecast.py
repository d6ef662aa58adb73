"""How long a decoded token will take: the plan's bytes at the rates that were measured here.

A layer passes its resident weights, predictor and held rows through memory, and waits for the units it misses; units
that the layer before asked for are read meanwhile. Miss curves say how many they are, the disk profile how long they
take, the machine profile how fast memory passes through each kind of product.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.backends import Backend, Matrix
from mlxflash.bundle import BLOCK_BYTES
from mlxflash.diskprofile import DiskProfile
from mlxflash.kept import Watch, cache_folder, keep, recall
from mlxflash.plan import Plan
from mlxflash.pool import copy_rows

MATRIX_BYTES, COLUMNS = 64 << 20, 4096  # of the matrix a rate is measured with: larger than caches
LEAST_SECONDS, REPEATS = 0.02, 3  # per kind
COPY, COPIED_BYTES = "copy", 16 << 10  # the kind that is no product, and the size of a record to copy
PIECE_BYTES = 1 << 20  # what readers cut a long read into
# What is not bytes, in times that one small operation takes to be asked for and answered; fitted (RESULTS.md): in every
# layer, for predicting and upkeep where a layer streams, for looking ahead, and per token for head, sampler and loop.
LAYER_STEPS, STREAM_STEPS, AHEAD_STEPS, TOKEN_STEPS = 24, 12, 14, 55
BESIDE = 1.15  # how much longer reads take while the processor computes, measured (RESULTS.md)


@dataclass(frozen=True)
class MachineProfile:
    """rates: bytes per second at which a product with one token passes through a matrix, by its kind ("float16", "3"
    for 3 bits), and records are copied ("copy"); step: seconds that MLX takes for one small operation, asked for and
    answered."""

    rates: dict[str, float]
    step: float


def machine_profile(backend: Backend, kinds: set[str]) -> MachineProfile:
    """Rates of `kinds`, as measured on this machine with this backend within a day, or measured now: 0.1 s each."""
    file = cache_folder() / "machines" / f"{platform.node()}-{os.cpu_count()}-{backend.name}.json"
    rates: dict[str, float] = {}
    step = 0.0
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        said = recall(file)
        found = {str(kind): float(rate) for kind, rate in said["rates"].items()}
        if all(0 < number < np.inf for number in (*found.values(), float(said["step"]))):
            rates, step = found, float(said["step"])
    if kinds <= rates.keys():
        return MachineProfile(rates, step)
    watch = Watch()
    small = mx.ones((1, COLUMNS))
    step = step or _median(lambda: np.asarray(small + 1))
    for kind in kinds - rates.keys():
        rates[kind] = _copy_rate() if kind == COPY else _product_rate(kind, backend)
    profile = MachineProfile(rates, step)
    keep(file, asdict(profile), watch.quiet)
    return profile


def _copy_rate() -> float:
    """Bytes per second at which records leave staging for their slots."""
    source, dest = np.ones((2, MATRIX_BYTES // 2), np.uint8)
    slots = np.random.default_rng(0).permutation(source.nbytes // COPIED_BYTES)
    rows = np.arange(len(slots))
    seconds = _median(lambda: copy_rows(dest.data, COPIED_BYTES, slots, source.data, COPIED_BYTES, rows, COPIED_BYTES))
    return source.nbytes / seconds


def _product_rate(kind: str, backend: Backend) -> float:
    matrix, x = _matrix(kind, backend)
    return matrix.nbytes / _median(partial(_multiply, backend, x, matrix))


def _matrix(kind: str, backend: Backend) -> tuple[Matrix, Any]:
    """A matrix of a kind, and what it is multiplied with."""
    bits = int(kind) if kind.isdigit() else 0
    dtype: mx.Dtype = mx.float16 if bits else getattr(mx, kind)
    x = backend.operand(mx.ones((1, COLUMNS), dtype))
    if not bits:
        weight = mx.ones((MATRIX_BYTES // (COLUMNS * dtype.size), COLUMNS), dtype)
        mx.eval(weight)
        return Matrix(weight), x
    rows = MATRIX_BYTES * 8 // (COLUMNS * bits)
    words = mx.zeros((rows, COLUMNS * bits // 32), mx.uint32)
    scales, biases = (mx.ones((rows, COLUMNS // 64), mx.float16) for _ in range(2))
    mx.eval(words, scales, biases)
    return Matrix(words, scales, biases, bits, 64), x


def _multiply(backend: Backend, x: Any, matrix: Matrix) -> None:
    product = backend.multiply(x, matrix)
    if isinstance(product, mx.array):  # the host's products are there
        mx.eval(product)


def _median(work: Callable[[], object]) -> float:
    """Seconds."""
    work()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < LEAST_SECONDS:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


@dataclass(frozen=True)
class Work:
    """What a token passes through, beside the plan; bytes unless said otherwise."""

    resident: int  # matrices that a token multiplies with
    kind: str  # of the resident matrices and the rows
    predictor_kind: str
    slot: int
    stride: int
    kv: int  # key-value cache read per token
    misses: tuple[float, ...]  # units per token, per layer
    recall: float = 0.0  # of the look-ahead: the share of the misses that is asked for a layer early
    over: float = 0.0  # units it asks for beside those it should, as a share of the misses
    wanted: tuple[float, ...] = ()  # units that a token computes, per layer; empty: all rows held, and new ones
    staged: bool = False  # reads pass through staging and are copied
    streams: bool = False  # all units that are not held pass by in blocks
    chance: bool = False  # misses as if routers chose by chance; they choose alike, so fewer units are missed


@dataclass(frozen=True)
class Forecast:
    """Of one decoded token."""

    seconds: float
    compute: float  # were nothing to be waited for
    reads: float  # units
    chance: bool = False  # as in Work: it will be less

    @property
    def rate(self) -> str:
        return f"{1 / self.seconds:.{1 if self.seconds < 1 else 2}f}{' or more' if self.chance else ''}"

    def describe(self) -> str:
        wait = self.seconds - self.compute
        why = ", experts taken as chosen by chance; `mlxflash calibrate` measures them" if self.chance else ""
        return (
            f"  forecast: {1e3 * self.seconds:.0f} ms per token ({self.rate} tokens per second), "
            f"{1e3 * wait:.0f} of them waiting for {self.reads:.0f} units{why}"
        )


def forecast(plan: Plan, work: Work, machine: MachineProfile, disk: DiskProfile | None) -> Forecast:
    """A decoded token of this plan. `disk` None: nothing is read, whatever is missed."""
    layers, rate = len(plan.capacities), machine.rates[work.kind]
    own = work.resident / layers / rate + plan.predictor / layers / machine.rates[work.predictor_kind]
    steps = LAYER_STEPS + (0 if plan.whole else STREAM_STEPS)
    if work.recall:  # the next layer's predictor runs in this one too
        own += plan.predictor / layers / machine.rates[work.predictor_kind]
        steps += AHEAD_STEPS
    own += work.kv / layers / machine.rates["float32"] + steps * machine.step
    if work.streams and disk is not None and not plan.whole:
        return _streamed(plan, work, machine, disk, own)
    extent = work.stride if work.stride % BLOCK_BYTES == 0 else work.stride + BLOCK_BYTES
    seconds = compute = TOKEN_STEPS * machine.step
    reads = 0.0
    cores = os.cpu_count() or 1
    for held, wanted, missed in zip(plan.capacities, work.wanted or plan.units, work.misses, strict=True):
        rows, new = min(held, wanted - missed) * work.slot / rate, missed * work.slot / rate
        late = early = late_cpu = early_cpu = copies = 0.0
        if disk is not None:
            on_time, ahead = missed * (1 - work.recall), missed * (work.recall + work.over)
            late, early = BESIDE * disk.batch(extent, on_time), BESIDE * disk.batch(extent, ahead)
            late_cpu, early_cpu = (count * disk.read_cpu / cores for count in (on_time, ahead))
            copies = (on_time + ahead) * work.stride / machine.rates[COPY] if work.staged else 0.0
        compute += own + rows + new
        seconds += max(own + early_cpu + max(rows + late_cpu, late), early + late) + copies + new
        reads += missed * (1 + work.over)
    return Forecast(seconds, compute, reads, work.chance)


def _streamed(plan: Plan, work: Work, machine: MachineProfile, disk: DiskProfile, own: float) -> Forecast:
    """A token of exact streaming in its steady state: the disk fills two buffers in turn (`ffn.Blocks`), each is free
    again once it is computed, and a layer's own work comes before its first block."""
    rate, steady = machine.rates[work.kind], 3  # tokens, of which the last finds buffers as the one before left them
    now, begin, read, free = 0.0, 0.0, 0.0, [0.0, 0.0]
    absent = [n - held for n, held in zip(plan.units, plan.capacities, strict=True)]
    for _ in range(steady):
        begin, now = now, now + TOKEN_STEPS * machine.step
        for held, left in zip(plan.capacities, absent, strict=True):
            now += own + held * work.slot / rate
            while left > 0:
                units = min(left, plan.block_units)
                left -= units
                size = units * work.stride
                pieces = max(1.0, size / PIECE_BYTES)
                read = max(read, free.pop(0)) + disk.batch(min(size, PIECE_BYTES), 2 * pieces) / 2  # two are under way
                copied = size / machine.rates[COPY] if work.staged else 0.0
                now = max(now, read) + copied + units * work.slot / rate
                free.append(now)
    compute = TOKEN_STEPS * machine.step + sum(plan.units) * work.slot / rate + len(absent) * own
    return Forecast(now - begin, compute, float(sum(absent)))
