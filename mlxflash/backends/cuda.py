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
from mlxflash.backends.metal import MLXBackend, MLXRows
from mlxflash.backends.pagelocked import Bus
from mlxflash.hosttier import CHUNKS, HostTier, Visit
from mlxflash.plan import Plan
from mlxflash.pool import Landing, Source
from mlxflash.reader import Reader
from mlxflash.resident import MLX

MOST_ITEMS = 1 << 31  # MLX's CUDA kernels for vectors count an array's items in 32 bits
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
COPY_SHARE = 0.5  # of the smallest pool: an update that allocates so much beyond its rows has copied one


class DeviceBackend(MLXBackend):
    """`cuda`, or `discrete`: the same on MLX's CPU device, to check without a GPU what a GPU will do.

    `bus` is page-locked memory where there is a GPU and it was found to work; `carries` says in words what is used.
    """

    discrete = True
    leaves_out_free = False

    def __init__(self, device: Any, bus: Bus | None = None, carries: str = "plain copies"):
        super().__init__(device, record_rows=False, alias=False)
        self.name = "cuda" if device == mx.gpu else "discrete"
        self.waits = False  # for benchmarks: wait for every update, so that its time is its own
        self.bus, self.carries = bus, carries
        self._asked: list[mx.array] = []  # products under way

    def available_memory(self) -> int | None:
        if self._device == mx.cpu:
            return None
        free = mx.device_info(mx.gpu).get("free_memory")
        return None if free is None else int(free)

    def is_staged(self, ffn: FFN) -> bool:
        return False  # not in its own memory

    def landings(self, ffn: FFN, plan: Plan) -> tuple[Any, Any]:
        """Doors to one host tier."""
        record = ffn.record
        tier = HostTier(record, max(CHUNKS, plan.host_landing // record.stride), plan.host_tier // record.stride)
        if self.bus is not None:
            self.bus.lock(tier.rows.memory, tier)  # where that fails, its rows go the plain way
        return Door(tier, takes=True), Door(tier, takes=False)

    def rows(self, ffn: FFN, capacity: int, staging: Any) -> Any:
        if ffn.layout == "experts":
            from mlxflash.backends.device_experts import DeviceExperts

            return DeviceExperts(self, ffn, capacity, staging, widens=self._device == mx.cpu)
        return DeviceRows(self, ffn, capacity, staging)

    def slot_bytes(self, ffn: FFN) -> int:
        return ffn.record.num_bytes + 4 * sum(p.offset is None for p in ffn.record.parts)

    def layer_bytes(self, ffn: FFN) -> int:
        return 0

    def project(self, x: mx.array, *weights: Matrix) -> Callable[[], np.ndarray]:
        """As every backend's; what was asked for before the first answer is wanted is waited for together."""
        y = self.chain(x, weights)
        done, values = (y, lambda: np.asarray(y)) if self.bus is None else self.bus.result(y)
        mx.async_eval(done)
        self._asked.append(done)

        def wait() -> np.ndarray:
            if self._asked:
                asked, self._asked = self._asked, []
                self.traffic.syncs += 1
                mx.eval(asked)
            return values()

        return wait


@dataclass
class Door:
    """A way through the host tier: a window's, which takes what it needs and gives back, or a stream's."""

    tier: HostTier
    takes: bool

    def reset(self) -> None:
        self.tier.reset()


def upload(memory: memoryview, slots: np.ndarray, stride: int, word: int) -> mx.array:
    """Records at slots [k] of host memory as words [k, stride / word], `word` in bytes, through MLX's own arrays: the
    host copies once to gather, MLX once more, and the device reads that."""
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
        self._arrived: list[Arrival] = []  # on the host, not yet here
        self._leaving: list[Leaving] = []  # on their way back
        self._unit_at = np.full(capacity, -1, np.int64)
        record = ffn.record
        for p in record.parts:
            dtype = MLX[p.dtype] if p.offset is not None else mx.float32
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
        self._flush()  # a stream that failed may have left some
        if self._door.takes and self._door.tier.kept:
            self._give_back(source, slots)
        return DeviceLanding(self, reader, source, units, slots)

    def settle(self, discard: bool = False) -> None:
        if discard:
            self._arrived.clear()
            self._leaving.clear()
            self._unit_at[:] = -1
        self._flush()
        self._finish_readers(discard)

    def _finish_readers(self, discard: bool = False) -> None:
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
        self._flush()
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
        self._flush()
        other._flush()
        at, chosen = _indices(slots), _indices(sources)
        rows = {name: pool[chosen] for name, pool in other._pools.items()}
        mx.eval(rows)
        self._backend.traffic.syncs += 1
        mx.synchronize()
        self._unit_at[slots] = other._unit_at[sources]
        self._update(at, rows)

    def _give_back(self, source: Source, slots: np.ndarray) -> None:
        """Start copying what `slots` hold to the host tier, before others come there."""
        backend, tier, record = self._backend, self._door.tier, self._ffn.record
        slots = slots[self._unit_at[slots] >= 0]
        places = tier.places(len(slots))
        slots = slots[: len(places)]
        if len(slots) == 0:
            return
        at, dtype = _indices(slots), WORDS[self._word]
        parts = [self._pools[p.name][at].reshape(len(slots), -1) for p in record.parts if p.offset is not None]
        rows = mx.concatenate([part.view(dtype) for part in parts], axis=1)
        done = (
            rows
            if backend.bus is None
            else backend.bus.store(rows, tier.rows.memory, tier.passing + places, record.stride)
        )
        mx.async_eval(done if done is not None else rows)
        self._leaving.append(Leaving(source, self._unit_at[slots], places, rows, done if done is not rows else None))

    def _end_leaving(self) -> None:
        """Until what was given back is on the host; its copies then no longer keep the pools from changing in place."""
        leaving, self._leaving = self._leaving, []
        tier, used = self._door.tier, self._ffn.record.num_bytes
        for each in leaving:
            if each.done is not None:
                mx.eval(each.done)
            else:
                lying = np.frombuffer(tier.rows.memory, np.uint8).reshape(-1, self._ffn.record.stride)
                lying[tier.passing + each.places, :used] = np.asarray(each.rows).view(np.uint8)
            tier.keep(each.source, each.units, each.places)
            self._backend.traffic.bytes_back += len(each.units) * used
        if leaving:
            leaving.clear()
            self._backend.traffic.syncs += 1
            mx.synchronize()

    def _flush(self) -> None:
        """Put all that arrived on the host into its slots: one upload, one update per part."""
        if self._leaving:
            self._end_leaving()
        if not self._arrived:
            return
        self._finish_readers()  # of a stream's block, which nobody settles
        begin = time.perf_counter()
        record, backend, tier = self._ffn.record, self._backend, self._door.tier
        arrived, self._arrived = self._arrived, []
        slots = np.concatenate([a.slots for a in arrived])
        sources = np.concatenate([a.visit.slots for a in arrived])
        host = tier.rows.memory, sources, record.stride, self._word
        records = backend.bus.rows(*host) if backend.bus is not None else None
        if records is None:
            records = upload(*host)
        new: dict[str, mx.array] = {}
        for p in record.parts:
            if p.offset is None:
                values = [a.source.resident[p.name][a.units] for a in arrived]
                new[p.name] = mx.array(np.concatenate(values))
            else:
                part = records[:, p.offset // self._word : (p.offset + p.num_bytes) // self._word]
                new[p.name] = part.view(MLX[p.dtype]).reshape(len(slots), *p.shape)
        self._update(_indices(slots), new, records)
        for a in arrived:
            self._unit_at[a.slots] = a.units
            a.visit.leave(lambda: mx.eval(records))
            backend.traffic.tier_hits += a.visit.num_hits
            backend.traffic.tier_misses += len(a.units) - a.visit.num_hits
        backend.traffic.updates += 1
        backend.traffic.bytes += len(slots) * record.stride
        backend.traffic.seconds += time.perf_counter() - begin

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


@dataclass
class Leaving:
    """Rows on their way back to the host: words [n, a record's], or an array that is there when they are."""

    source: Source
    units: np.ndarray
    places: np.ndarray
    rows: mx.array
    done: mx.array | None


@dataclass
class Arrival:
    """Units that a visit brought to the host, and the slots they are for."""

    visit: Visit
    source: Source
    units: np.ndarray
    slots: np.ndarray


class DeviceLanding:
    """Units through the host tier into rows, in turns where they are more than it takes at once.

    The first turns' reads start at once where there is room, the others when somebody waits. What arrived last goes to
    the device when its rows are used, together with what other landings brought for them.
    """

    def __init__(self, rows: DeviceRows, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray):
        self._rows, self._reader, self._source, self._units, self._slots = rows, reader, source, units, slots
        self._asked = 0  # units that were asked for
        self._turns: deque[Arrival] = deque()
        self._error: OSError | None = None
        while self._start():
            pass

    def _start(self) -> bool:
        """Ask for the next turn's units; False where none are left or there is no room."""
        door = self._rows._door
        turn = slice(self._asked, self._asked + door.tier.chunk)
        units, slots = self._units[turn], self._slots[turn]
        if len(units) == 0:
            return False
        visit = door.tier.bring(self._reader, self._source, units, door.takes, self)
        if visit is None:
            return False
        self._turns.append(Arrival(visit, self._source, units, slots))
        self._asked += len(units)
        return True

    def wait(self) -> None:
        self._complete()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """As wait, and the device has it all, since others want the room; keeps an error for `wait`."""
        self._complete()
        self._rows._flush()

    def _complete(self) -> None:
        """Until all of it arrived, or failed."""
        while self._turns or self._asked < len(self._units):
            if not self._turns:
                if not self._start():
                    self._rows._door.tier.oldest().finish()  # who has not waited yet is in the way
                continue
            turn = self._turns[0]
            try:
                turn.visit.wait()
                self._rows._arrived.append(turn)
            except OSError as error:
                self._error = self._error or error
                turn.visit.leave(lambda: None)
                self._asked = len(self._units)  # no more: what is under way comes to rest, and all of it counts as lost
            self._turns.popleft()
            if self._asked < len(self._units):
                self._rows._flush()
                self._start()
