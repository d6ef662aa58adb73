"""How long a decoded token will take: the plan's bytes at the rates that were measured here.

A layer passes its resident weights, predictor and held rows through memory, and waits for the units it misses; units
that the layer before asked for are read meanwhile. Miss curves say how many they are, the disk profile how long they
take, the machine profile how fast memory passes through each kind of product.
"""

import contextlib
import json
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
from mlxflash.hub import cache_folder, keep
from mlxflash.plan import Plan

MATRIX_BYTES, COLUMNS = 64 << 20, 4096  # of the matrix a rate is measured with: larger than caches
LEAST_SECONDS, REPEATS = 0.02, 3  # per kind
# What is not bytes, in times that one small operation takes to be asked for and answered; fitted (RESULTS.md): in every
# layer, for predicting and upkeep where a layer streams, for looking ahead, and per token for head, sampler and loop.
LAYER_STEPS, STREAM_STEPS, AHEAD_STEPS, TOKEN_STEPS = 24, 12, 14, 55
BESIDE = 1.15  # how much longer reads take while the processor computes, measured (RESULTS.md)


@dataclass(frozen=True)
class MachineProfile:
    """rates: bytes per second at which a product with one token passes through a matrix, by its kind ("float16", "3"
    for 3 bits); step: seconds that MLX takes for one small operation, asked for and answered."""

    rates: dict[str, float]
    step: float


def machine_profile(backend: Backend, kinds: set[str]) -> MachineProfile:
    """Rates of `kinds`, as measured before on this machine with this backend, or measured now and kept: 0.1 s each."""
    file = cache_folder() / "machines" / f"{platform.node()}-{os.cpu_count()}-{backend.name}.json"
    rates: dict[str, float] = {}
    step = 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads(file.read_text())
        found = {str(kind): float(rate) for kind, rate in kept["rates"].items()}
        if all(0 < number < np.inf for number in (*found.values(), float(kept["step"]))):
            rates, step = found, float(kept["step"])
    if kinds <= rates.keys():
        return MachineProfile(rates, step)
    small = mx.ones((1, COLUMNS))
    step = step or _median(lambda: np.asarray(small + 1))
    for kind in kinds - rates.keys():
        matrix, x = _matrix(kind, backend)
        rates[kind] = matrix.nbytes / _median(partial(_multiply, backend, x, matrix))
    profile = MachineProfile(rates, step)
    keep(file, asdict(profile))
    return profile


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
    stride: int  # read for one missed unit
    kv: int  # key-value cache read per token
    misses: tuple[float, ...]  # units per token, per layer
    used: tuple[float, ...] | None = None  # of the units held those that are computed, per layer; None: all
    recall: float = 0.0  # of the look-ahead: the share of the misses that is asked for a layer early
    over: float = 0.0  # units it asks for beside those it should, as a share of the misses


@dataclass(frozen=True)
class Forecast:
    """Of one decoded token."""

    seconds: float
    compute: float  # were nothing to be waited for
    reads: float  # units

    def describe(self) -> str:
        wait = self.seconds - self.compute
        return (
            f"  forecast: {1e3 * self.seconds:.0f} ms per token ({1 / self.seconds:.1f} tokens per second), "
            f"{1e3 * wait:.0f} of them waiting for {self.reads:.0f} units"
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
    extent = work.stride if work.stride % BLOCK_BYTES == 0 else work.stride + BLOCK_BYTES
    seconds = compute = TOKEN_STEPS * machine.step
    reads = 0.0
    cores = os.cpu_count() or 1
    for held, missed, used in zip(plan.capacities, work.misses, work.used or plan.capacities, strict=True):
        rows, new = min(held, used) * work.slot / rate, missed * work.slot / rate
        late = early = late_cpu = early_cpu = 0.0
        if disk is not None:
            on_time, ahead = missed * (1 - work.recall), missed * (work.recall + work.over)
            late, early = BESIDE * disk.batch(extent, on_time), BESIDE * disk.batch(extent, ahead)
            late_cpu, early_cpu = (count * disk.read_cpu / cores for count in (on_time, ahead))
        compute += own + rows + new
        seconds += max(own + early_cpu + max(rows + late_cpu, late), early + late) + new
        reads += missed * (1 + work.over)
    return Forecast(seconds, compute, reads)
