"""Host memory between flash and a device that does not share it: units land here, and some of them stay.

One page-aligned buffer of slots shaped like records, in two areas. Units pass through the first, a ring: they land,
the device copies them, and their slots are free again. The second keeps units on their way, as long as nothing worth
more needs the room, so that the next miss of the device costs a copy over the bus and no read.

What the device holds need not be here as well. Nothing is copied back from the device, so a unit is kept from the
moment it is read, not from the moment the device gives it up; but copies of what the device holds leave first, those
the device has had longest before the others. Measured on traces in RESULTS.md ("Host tier").
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxflash.bundle import Record
from mlxflash.pool import Landing, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader

CHUNKS = 4  # so many landings fit the ring at once; larger ones go through in turns


class HostTier:
    """`passing` slots that units pass through and `kept` that keep some; slot s is row s of `rows.memory`."""

    def __init__(self, record: Record, passing: int, kept: int, gap: int = 0):
        self.record, self.passing, self.kept, self._gap = record, passing, kept, gap
        self._rows: RecordRows | None = None
        self._slot_of: dict[str, np.ndarray] = {}  # by file: a unit's kept slot, or -1
        self.reset()

    @property
    def chunk(self) -> int:
        """How many units one visit may bring at most."""
        return max(1, self.passing // CHUNKS)

    @property
    def rows(self) -> RecordRows:
        if self._rows is None:
            size = (self.passing + self.kept) * self.record.stride
            memory = host_memory(size)[:size]
            self._rows = RecordRows(
                self.record, memory, Staging(self.record.stride * self.chunk + (3 << 12), self._gap)
            )
        return self._rows

    def reset(self) -> None:
        """Forget every unit and visit, whatever state an interrupt left; no read may be under way."""
        self._head = self._tail = 0  # of the ring, counted without wrapping
        self._visits: deque[Visit] = deque()
        self._in_use = np.zeros(self.kept, np.int32)
        self._file: list[str | None] = [None] * self.kept
        self._unit = np.full(self.kept, -1, np.int64)
        self._used = np.zeros(self.kept, np.int64)  # when a slot's unit was wanted last
        self._on_device = np.zeros(self.kept, bool)
        self._clock = 0
        self._slot_of.clear()
        if self._rows is not None:
            self._rows._staging.reset()

    def bring(self, reader: Reader, source: Source, units: np.ndarray, keep: str, owner: Any) -> "Visit | None":
        """Start bringing `units`, int64 [n], ascending, n <= chunk; None where the ring has no room for them now.

        `keep` says which of those not kept yet may be: "worth" those for which something worth less can leave,
        "room" only where there is room, "no" none. `owner.finish()` completes what a caller waits with.
        """
        self._clock += 1
        map_ = self._map(source, units)
        slots = map_[units].astype(np.int64) if self.kept else np.full(len(units), -1, np.int64)
        missing = np.flatnonzero(slots < 0)
        here = slots[slots >= 0]
        stay = self._places(len(missing), keep, here) if self.kept and len(missing) else np.empty(0, np.int64)
        passing = len(missing) - len(stay)
        start = self._ring(passing)
        if start is None:
            return None
        slots[slots >= 0] += self.passing
        slots[missing[: len(stay)]] = self.passing + stay
        slots[missing[len(stay) :]] = start % max(self.passing, 1) + np.arange(passing)
        self._head = start + passing
        for slot in stay.tolist():
            self._drop(slot)
        kept = np.concatenate((here, stay))
        self._in_use[kept] += 1
        self._used[kept] = self._clock
        self._on_device[kept] = False
        visit = Visit(self, source, units[missing[: len(stay)]], stay, kept, slots, self._head, owner, len(here))
        self._visits.append(visit)
        if len(missing):
            try:
                visit.landing = self.rows.land(reader, source.file, units[missing], slots[missing])
            except OSError:
                visit.leave(lambda: None, on_device=False)
                raise
        return visit

    def given_up(self, source: Source, units: np.ndarray) -> None:
        """The device no longer holds `units`: copies of them are worth keeping from now on."""
        map_ = self._slot_of.get(source.file.path)
        if map_ is not None:
            slots = map_[units[units < len(map_)]]
            slots = slots[slots >= 0]
            self._on_device[slots] = False
            self._used[slots] = self._clock

    def oldest(self) -> Any:
        """The owner of the visit that has been here longest."""
        return self._visits[0].owner

    def _map(self, source: Source, units: np.ndarray) -> np.ndarray:
        map_ = self._slot_of.get(source.file.path)
        need = int(units[-1]) + 1 if len(units) else 0
        if map_ is None or len(map_) < need:
            grown = np.full(max(need, 1024, 2 * len(map_) if map_ is not None else 0), -1, np.int32)
            if map_ is not None:
                grown[: len(map_)] = map_
            self._slot_of[source.file.path] = map_ = grown
        return map_

    def _places(self, count: int, keep: str, wanted: np.ndarray) -> np.ndarray:
        """At most `count` kept slots for units that come: empty ones, then what is worth least."""
        if keep == "no":
            return np.empty(0, np.int64)
        empty = np.flatnonzero((self._unit < 0) & (self._in_use == 0))[:count]
        if len(empty) == count or keep == "room":
            return empty
        self._reap()
        able = (self._in_use == 0) & (self._unit >= 0)
        able[wanted] = False
        able = np.flatnonzero(able)
        order = np.lexsort((self._used[able], ~self._on_device[able]))
        return np.concatenate((empty, able[order[: count - len(empty)]]))

    def _drop(self, slot: int) -> None:
        file = self._file[slot]
        if file is not None:
            self._slot_of[file][self._unit[slot]] = -1
        self._file[slot], self._unit[slot] = None, -1

    def _ring(self, count: int) -> int | None:
        """Where `count` neighbouring slots of the ring are free, without wrapping; None where they are not."""
        if not count:
            return self._head
        start = self._head
        if start % self.passing + count > self.passing:
            start += self.passing - start % self.passing
        while start + count - self._tail > self.passing:
            if not self._visits:
                self._tail = start
            elif not self._end_oldest():
                return None
        return start

    def _reap(self) -> None:
        while self._visits and self._end_oldest():
            pass

    def _end_oldest(self) -> bool:
        """Wait until the device has copied what the oldest visit brought; False where it was not even asked to."""
        visit = self._visits[0]
        if visit.copied is None:
            return False
        visit.copied()
        self._visits.popleft()
        self._in_use[visit.kept] -= 1
        self._tail = visit.end
        return True


class Visit:
    """Units under way to `slots`, and then in use there until the device has copied them."""

    def __init__(
        self,
        tier: HostTier,
        source: Source,
        units: np.ndarray,
        stay: np.ndarray,
        kept: np.ndarray,
        slots: np.ndarray,
        end: int,
        owner: Any,
        num_hits: int,
    ):
        self.slots, self.kept, self.end, self.owner, self.num_hits = slots, kept, end, owner, num_hits
        self.landing: Landing | None = None
        self.copied: Callable[[], object] | None = None
        self._tier, self._source, self._units, self._stay = tier, source, units, stay

    def wait(self) -> None:
        """Until every unit is there; raises the read's error, and nothing it was to bring is then kept."""
        if self.landing is not None:
            self.landing.wait()
        tier, path = self._tier, self._source.file.path
        if len(self._stay):
            tier._slot_of[path][self._units] = self._stay
            tier._unit[self._stay] = self._units
            for slot in self._stay.tolist():
                tier._file[slot] = path
        self.landing = None

    def leave(self, copied: Callable[[], object], on_device: bool = True) -> None:
        """The device was asked to copy the units and `copied()` waits until it has."""
        self.copied = copied
        self._tier._on_device[self.kept] = on_device
