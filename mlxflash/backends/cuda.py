"""Rows in memory that the host does not share: NVIDIA GPUs, and MLX's CPU device with the two kept apart to check it.

A pool is one MLX array per part and is never viewed from the host: on CUDA a view would turn it into managed memory
for good. Units land in host memory (hosttier.py), and the new rows of a layer go over together: one array of whole
records, then one update per part, in place. MLX updates an array in place only where nothing else refers to its
buffer, so computations that read rows are finished, and let go of by the device, before rows change (`settle`); a
whole-pool copy that happens all the same is counted. Which unit lies where only the host knows.

Read in MLX's source, 0.32: array updates donate a buffer whose only owner they are; a finished kernel's inputs are let
go of by a worker thread, in order, which `mx.synchronize` waits for.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN, Matrix
from mlxflash.backends.metal import DTYPES, MLXBackend, MLXRows
from mlxflash.hosttier import CHUNKS, HostTier, Visit
from mlxflash.plan import Plan
from mlxflash.pool import Landing, Source
from mlxflash.reader import Reader

MOST_ITEMS = 1 << 31  # MLX's CUDA kernels for vectors count an array's items in 32 bits
COPY_SHARE = 0.5  # of the smallest pool: an update that allocates so much beyond its rows has copied one


class DeviceBackend(MLXBackend):
    """`cuda`, or `discrete`: the same on MLX's CPU device, to check without a GPU what a GPU will do.

    `upload` makes a device array of records at slots [k] of host memory: words [k, stride / size of a word].
    """

    discrete = True

    def __init__(self, device: Any, upload: "Upload | None" = None):
        super().__init__(device, record_rows=False, alias=False)
        self.name = "cuda" if device == mx.gpu else "discrete"
        self.waits = False  # for benchmarks: wait for every update, so that its time is its own
        self._upload = upload or plain_upload

    def available_memory(self) -> int | None:
        if self._device == mx.cpu:
            return None
        free = mx.device_info(mx.gpu).get("free_memory")
        return None if free is None else int(free)

    def landings(self, ffn: FFN, plan: Plan) -> list[Any]:
        """Doors to one host tier."""
        record = ffn.record
        tier = HostTier(record, max(CHUNKS, plan.host_landing // record.stride), plan.host_tier // record.stride)
        return [Door(tier, "worth"), Door(tier, "room"), Door(tier, "room")]

    def rows(self, ffn: FFN, capacity: int, staging: Any) -> MLXRows:
        return DeviceRows(self, ffn, capacity, staging)

    def slot_bytes(self, ffn: FFN) -> int:
        return ffn.record.num_bytes + 4 * sum(p.offset is None for p in ffn.record.parts)

    def layer_bytes(self, ffn: FFN) -> int:
        return 0

    def project(self, x: mx.array, *weights: Matrix) -> Callable[[], np.ndarray]:
        product = super().project(x, *weights)

        def wait() -> np.ndarray:
            self.traffic.syncs += 1
            return product()

        return wait


@dataclass
class Door:
    """A way into the host tier: `keep` says which units of those that come this way may stay."""

    tier: HostTier
    keep: str

    def reset(self) -> None:
        self.tier.reset()


Upload = Callable[[memoryview, np.ndarray, int, int], mx.array]  # host memory, slots, stride and word in bytes


def plain_upload(memory: memoryview, slots: np.ndarray, stride: int, word: int) -> mx.array:
    """Through MLX's own arrays: the host copies once to gather, MLX once more, and the device reads that."""
    rows = np.frombuffer(memory, {1: np.uint8, 2: np.uint16, 4: np.uint32}[word]).reshape(-1, stride // word)
    first, count = int(slots[0]), len(slots)
    together = int(slots[-1]) - first == count - 1 and bool((np.diff(slots) == 1).all())
    return mx.array(rows[first : first + count] if together else rows[slots])


class DeviceRows(MLXRows):
    """Rows of units in device arrays; see backends.Rows. `move` and `take` stay on the device."""

    leaves_out_free = False

    def __init__(self, backend: DeviceBackend, ffn: FFN, capacity: int, door: Door):
        self.capacity = capacity
        self._backend, self._ffn, self._door = backend, ffn, door
        self._pending: mx.array | None = None
        self._stamp = -1  # how often the host had waited for the device when `_pending` was asked for
        self._updated = -1  # the same of the last update
        self._columns: dict[str, slice] = {}
        self._pools: dict[str, mx.array] = {}
        self._unit_at = np.full(capacity, -1, np.int64)
        record = ffn.record
        for p in record.parts:
            dtype = DTYPES[p.dtype] if p.offset is not None else mx.float32
            if capacity * int(np.prod(p.shape)) >= MOST_ITEMS:
                raise ValueError(f"{capacity} units of {p.name!r} are more than one array holds; use less memory")
            self._pools[p.name] = mx.zeros((capacity, *p.shape), dtype)
        mx.clear_cache()  # a buffer that the host once viewed would come from there
        mx.eval(self._pools)
        self._resident = {p.name: np.empty(0) for p in record.parts if p.offset is None}  # only their names count here
        streamed = [p for p in record.parts if p.offset is not None]
        ends = [p.offset + p.num_bytes for p in streamed if p.offset is not None]
        self._word = next(w for w in (4, 2, 1) if not any(end % w for end in ends))  # parts lie back to back
        self._least = min(self._pools[p.name].nbytes for p in record.parts if p.offset is not None)

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing:
        return DeviceLanding(self, reader, source, units, slots)

    def settle(self, discard: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not discard:
            mx.eval(pending)
        if self._stamp == self._backend.traffic.syncs or discard:
            self._backend.traffic.syncs += 1
            mx.synchronize()  # what was only just computed may not be let go of yet

    def ffn(
        self, x: mx.array, n: int, keep: np.ndarray | None = None, watch: int = 0
    ) -> tuple[mx.array, np.ndarray | None]:
        result = super().ffn(x, n, keep, watch)
        self._stamp = self._backend.traffic.syncs
        return result

    def _rows(self, name: str, n: int) -> mx.array:
        return self._pools[name][:n]

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        if len(slots):
            self._copy(slots, self, sources)

    def take(self, slots: np.ndarray, other: Any, sources: np.ndarray) -> None:
        if len(slots):
            self._copy(slots, other, sources)

    def _copy(self, slots: np.ndarray, other: "DeviceRows", sources: np.ndarray) -> None:
        """One gather and one scatter per part; the gather ends first, or its pool would have two owners."""
        at, chosen = _indices(slots), _indices(sources)
        rows = {name: pool[chosen] for name, pool in other._pools.items()}
        mx.eval(rows)
        self._backend.traffic.syncs += 1
        mx.synchronize()
        self._unit_at[slots] = other._unit_at[sources]
        self._update(at, rows)

    def _bring(self, source: Source, visit: Visit, units: np.ndarray, slots: np.ndarray) -> None:
        """Put what a visit brought to the host into `slots`."""
        self.settle()  # a stream's block was read until a moment ago
        begin = time.perf_counter()
        record, traffic, tier = self._ffn.record, self._backend.traffic, self._door.tier
        old = self._unit_at[slots]
        if self._door.keep == "worth":
            tier.given_up(source, old[old >= 0])
        self._unit_at[slots] = units
        records = self._backend._upload(tier.rows.memory, visit.slots, record.stride, self._word)
        new: dict[str, mx.array] = {}
        for p in record.parts:
            if p.offset is None:
                new[p.name] = mx.array(source.resident[p.name][units])
            else:
                part = records[:, p.offset // self._word : (p.offset + p.num_bytes) // self._word]
                new[p.name] = part.view(DTYPES[p.dtype])
        self._update(_indices(slots), new, records)
        visit.leave(lambda: mx.eval(records), self._door.keep == "worth")
        traffic.updates += 1
        traffic.tier_hits += visit.num_hits
        traffic.tier_misses += len(units) - visit.num_hits
        traffic.bytes += len(units) * record.stride
        traffic.seconds += time.perf_counter() - begin

    def _update(self, at: mx.array, new: dict[str, mx.array], *more: mx.array) -> None:
        """Start writing rows [k] of every part to slots `at`; counts a pool that was copied for it."""
        backend = self._backend
        if self._updated == backend.traffic.syncs:  # the update before may be under way, and share the buffer
            backend.traffic.syncs += 1
            mx.eval(self._pools)
        backend.peak_bytes = max(backend.peak_bytes, mx.get_peak_memory())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for name, rows in new.items():
            self._pools[name][at] = rows
        mx.async_eval(self._pools, *more)
        room = 2 * sum(a.nbytes for a in (*new.values(), *more)) + at.nbytes
        if mx.get_peak_memory() - before > room + COPY_SHARE * self._least:
            backend.traffic.pool_copies += 1
        self._updated = backend.traffic.syncs
        if backend.waits:
            backend.traffic.syncs += 1
            mx.eval(self._pools)


def _indices(slots: np.ndarray) -> mx.array:
    return mx.array(slots.astype(np.int32))


class DeviceLanding:
    """Units through the host tier into rows, in turns where they are more than it takes at once.

    The first turns' reads start at once where there is room, the others when somebody waits.
    """

    def __init__(self, rows: DeviceRows, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray):
        self._rows, self._reader, self._source, self._units, self._slots = rows, reader, source, units, slots
        self._done = 0  # units that were asked for
        self._turns: deque[tuple[Visit, np.ndarray, np.ndarray]] = deque()
        self._error: OSError | None = None
        while self._start():
            pass

    def _start(self) -> bool:
        """Ask for the next turn's units; False where none are left or there is no room."""
        door = self._rows._door
        turn = slice(self._done, self._done + door.tier.chunk)
        units, slots = self._units[turn], self._slots[turn]
        if len(units) == 0:
            return False
        keep = door.keep
        if keep == "worth" and (self._rows._unit_at[slots] < 0).all():
            keep = "no"  # the device is not full: what it gets now need not be here as well
        visit = door.tier.bring(self._reader, self._source, units, keep, self)
        if visit is None:
            return False
        self._turns.append((visit, units, slots))
        self._done += len(units)
        return True

    def wait(self) -> None:
        self.finish()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Until all is on the device, or known to have failed; keeps the first error for `wait`."""
        while self._turns or self._done < len(self._units):
            if not self._turns:
                if self._start():
                    continue
                self._rows._door.tier.oldest().finish()  # somebody who has not waited yet is in the way
                continue
            visit, units, slots = self._turns.popleft()
            try:
                visit.wait()
                self._rows._bring(self._source, visit, units, slots)
            except OSError as error:
                self._error = self._error or error
                visit.leave(lambda: None, on_device=False)
                self._done = len(self._units)  # no more: what is under way comes to rest, all of it counts as lost
            self._start()
