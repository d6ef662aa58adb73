"""Host memory between flash and a device that does not share it: units land here, and those it gives up stay.

One page-aligned buffer of slots shaped like records, in two areas. Units pass through the first, a ring: they land,
the device copies them, and their slots are free again. The second, the tier, keeps what the device gave up, so that a
later miss of the device costs a copy over the bus and no read. Nothing is in both: what a window takes from the tier
leaves it, and what a window overwrites comes to it, over the direction of the bus that is idle. Of streams it keeps
what passes while there is room. Who has been here longest unused leaves.

Copying back is worth it: on traces it leaves 0.15 to 0.8 of the reads of keeping what was read (RESULTS.md).
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from mlxflash.bundle import Record
from mlxflash.pool import Landing, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader

CHUNKS = 4  # so many landings fit the ring at once; larger ones go through in turns


class HostTier:
    """`passing` slots that units pass through and `kept` that keep some; slot s is row s of `rows.memory`."""

    def __init__(self, record: Record, passing: int, kept: int):
        self.record, self.passing, self.kept = record, passing, kept
        self._rows: RecordRows | None = None
        self.reset()

    @property
    def chunk(self) -> int:
        """How many units one visit may bring at most."""
        return max(1, self.passing // CHUNKS)

    @property
    def rows(self) -> RecordRows:
        if self._rows is None:
            size = (self.passing + self.kept) * self.record.stride
            staging = Staging(self.record.stride * self.chunk + (3 << 12), self.record)
            self._rows = RecordRows(self.record, host_memory(size)[:size], staging)
        return self._rows

    def reset(self) -> None:
        """Forget every unit and visit, whatever state an interrupt left; no read may be under way."""
        self._head = self._tail = 0  # of the ring, counted without wrapping
        self._visits: deque[Visit] = deque()
        self._in_use = np.zeros(self.kept, np.int32)
        self._number_of: dict[str, int] = {}  # of files, by path
        self._slot_of: list[np.ndarray] = []  # by file: a unit's slot in the tier, or -1
        self._file = np.zeros(self.kept, np.int32)
        self._unit = np.full(self.kept, -1, np.int64)
        self._order: OrderedDict[int, None] = OrderedDict()  # slots with units, who came or was wanted first the first
        self._free = list(range(self.kept))[::-1]
        if self._rows is not None:
            self._rows._staging.reset()

    def bring(self, reader: Reader, source: Source, units: np.ndarray, takes: bool, owner: Any) -> "Visit | None":
        """Start bringing `units`, int64 [n], ascending, n <= chunk; None where the ring has no room for them now.

        A window `takes` them: what the tier has leaves it. Others, streams, leave it there, and what they read stays
        while there is room. `owner.finish()` completes what a caller waits with.
        """
        map_ = self._map(source, units)
        slots = map_[units].astype(np.int64) if self.kept else np.full(len(units), -1, np.int64)
        missing = np.flatnonzero(slots < 0)
        here = slots[slots >= 0]
        stay = np.empty(0, np.int64) if takes else self._empty(len(missing))
        passing = len(missing) - len(stay)
        start = self._ring(passing)
        if start is None:
            self._free += stay.tolist()
            return None
        self._in_use[stay] += 1
        self._in_use[here] += 1
        if takes:
            self._drop(here)
        else:
            for slot in here.tolist():
                self._order.move_to_end(slot)
        slots[slots >= 0] += self.passing
        slots[missing[: len(stay)]] = self.passing + stay
        slots[missing[len(stay) :]] = start % self.passing + np.arange(passing)
        self._head = start + passing
        kept = np.concatenate((here, stay))
        visit = Visit(self, source, units[missing[: len(stay)]], stay, kept, slots, self._head, owner, len(here))
        self._visits.append(visit)
        if len(missing):
            try:
                visit.landing = self.rows.land(reader, source.file, units[missing], slots[missing])
            except OSError:
                visit.leave(lambda: None)
                raise
        return visit

    def places(self, count: int) -> np.ndarray:
        """At most `count` slots of the tier for units that the device gives up; in use until `keep` fills them."""
        places = self._empty(count)
        if len(places) < count:
            oldest = (slot for slot in self._order if not self._in_use[slot])
            able = np.fromiter(islice(oldest, count - len(places)), np.int64)
            self._drop(able)
            places = np.concatenate((places, self._empty(len(able))))
        self._in_use[places] += 1
        return places

    def keep(self, source: Source, units: np.ndarray, places: np.ndarray) -> None:
        """Units that the device gave up, int64 [n], now lie in `places`."""
        map_ = self._map(source, units)
        self._drop(map_[units][map_[units] >= 0].astype(np.int64))  # a stream's copy, older than this one
        self._note(source, units, places)
        self._in_use[places] -= 1

    def _note(self, source: Source, units: np.ndarray, places: np.ndarray) -> None:
        self._map(source, units)[units] = places
        self._unit[places], self._file[places] = units, self._number_of[source.file.path]
        self._order.update(dict.fromkeys(places.tolist()))

    def oldest(self) -> Any:
        """The owner of the visit that has been here longest."""
        return self._visits[0].owner

    def _map(self, source: Source, units: np.ndarray) -> np.ndarray:
        """The slots of a file's units, -1 for those that are not here; long enough for `units`."""
        file = self._number_of.setdefault(source.file.path, len(self._slot_of))
        if file == len(self._slot_of):
            self._slot_of.append(np.empty(0, np.int32))
        map_ = self._slot_of[file]
        need = int(units.max()) + 1 if len(units) else 0
        if len(map_) < need:
            grown = np.full(2 * need, -1, np.int32)
            grown[: len(map_)] = map_
            self._slot_of[file] = map_ = grown
        return map_

    def _empty(self, count: int) -> np.ndarray:
        """At most `count` slots of the tier where nothing lies, no longer counted as free."""
        if len(self._free) < count and len(self._order) < self.kept:
            self._reap()  # some are only in use
        first = max(0, len(self._free) - count)
        taken, self._free = self._free[first:], self._free[:first]
        return np.array(taken, np.int64)

    def _drop(self, slots: np.ndarray) -> None:
        """What lies in `slots` is no longer to be found; they are free as soon as nobody uses them."""
        for slot in slots.tolist():
            del self._order[slot]
        files = self._file[slots]
        for file in np.unique(files).tolist():
            self._slot_of[file][self._unit[slots[files == file]]] = -1
        self._unit[slots] = -1
        self._free += slots[self._in_use[slots] == 0].tolist()

    def _release(self, slots: np.ndarray) -> None:
        self._in_use[slots] -= 1
        self._free += slots[(self._in_use[slots] == 0) & (self._unit[slots] < 0)].tolist()

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
        self._release(visit.kept)
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
        if len(self._stay):
            self._tier._note(self._source, self._units, self._stay)
        self.landing = None

    def leave(self, copied: Callable[[], object]) -> None:
        """The device was asked to copy the units and `copied()` waits until it has."""
        self.copied = copied
