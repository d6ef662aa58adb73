"""Host memory for units: where rows of a window or blocks of a stream lie, and how bytes land there.

Knows slots, records and parts; knows nothing of neurons, tokens or layers. A backend decides what the memory is made
of and computes on it.
"""

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxflash._native import core
from mlxflash.bundle import BLOCK_BYTES, HEADER_BYTES, Record
from mlxflash.reader import File, Reader

HUGE_PAGE = 2 << 20
START = np.ones(1, bool)  # the first record begins a read
DENSE = 2  # positions per unit wanted, at most, of a stream's block
STAGING_BYTES = 2 << 20  # one round of reads that cannot land in place


class Landing(Protocol):
    """Bytes on their way."""

    def wait(self) -> None:
        """Block until they are where they belong and nothing more can arrive; raises the read's error."""


def host_memory(num_bytes: int) -> memoryview:
    """Zeroed page-aligned bytes outside any allocator's cache: they go back to the system when dropped.

    Whole huge pages are asked for where they fit, and no more, so that nothing is rounded up: scattered small pages
    make a disk segment each, and direct reads of 16 KiB then run at 0.6 of their speed, of 1 MiB at a third
    (RESULTS.md). Huge pages are touched here, one by one: threads that read into a fresh one at the same time each
    zero a page for it, which takes that much memory for a moment, and gets processes killed in a cgroup. Python's mmap
    is shared memory by default, which stays in small pages.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    huge = num_bytes // HUGE_PAGE * HUGE_PAGE
    if not huge or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, max(num_bytes, 1), flags=flags))
    raw = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    data = np.frombuffer(raw, np.uint8)
    skip = -data.ctypes.data % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        raw.madvise(mmap.MADV_HUGEPAGE, skip, huge)
    data[skip : skip + huge : HUGE_PAGE] = 0
    return memoryview(raw)[skip : skip + num_bytes]


@dataclass(frozen=True)
class Source:
    """Where a layer's units come from: its bundle file, and its parts that are resident per unit, [units] each."""

    file: File
    resident: dict[str, np.ndarray]


class Staging:
    """A page-aligned buffer between disk and slots, made on first use.
    The windows of a model share one; `user` is the landing that has it, from its first read to its last copy.
    """

    def __init__(self, num_bytes: int = STAGING_BYTES):
        self.num_bytes = num_bytes
        self.user: _StagedLanding | None = None
        self._memory: memoryview | None = None

    @property
    def memory(self) -> memoryview:
        if self._memory is None:
            self._memory = host_memory(self.num_bytes)
        return self._memory

    def reset(self) -> None:
        """Forget a landing that nobody will wait for; no read may be under way."""
        self.user = None


class RecordRows:
    """Slots shaped like records: slot s is `memory[s * stride :][: stride]`, one contiguous span per unit."""

    def __init__(self, record: Record, memory: memoryview, staging: Staging):
        self.record, self.memory, self._staging = record, memory, staging
        self._rows = np.frombuffer(memory, np.uint8).reshape(-1, record.stride)

    def land(self, reader: Reader, file: File, positions: np.ndarray, slots: np.ndarray) -> Landing:
        """Start reading the records at `positions` (ascending) into `slots`; both int64 [n]."""
        if _apart(self.record, positions) or (file.direct and not self.record.aligned):
            return _StagedLanding(reader, file, self.record, self._staging, positions, slots, self._place)
        return reader.submit(file, _spans(self.record, positions, slots), self.memory)

    def _place(self, source: np.ndarray, starts: np.ndarray, slots: np.ndarray) -> None:
        copy_rows(self.memory, self.record.stride, slots, source.data, 1, starts, self.record.num_bytes)

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        """Copy rows `sources` over `slots`, disjoint sets: the copy of swap-with-last deletion."""
        self._rows[slots] = self._rows[sources]

    def take(self, slots: np.ndarray, other: "RecordRows", sources: np.ndarray) -> None:
        """Copy rows `sources` of another pool to `slots`, so that what was streamed need not be read again."""
        stride = self.record.stride
        copy_rows(self.memory, stride, slots, other.memory, stride, sources, self.record.num_bytes)


class PartRows:
    """One array per part, slot s its row s: what kernels want that need every part row-contiguous.

    Bytes always pass through staging: a record's parts lie apart here.
    """

    def __init__(self, record: Record, views: dict[str, memoryview], staging: Staging):
        self.record, self._staging = record, staging
        self._parts = [(part, views[part.name]) for part in record.parts if part.offset is not None]

    def land(self, reader: Reader, file: File, positions: np.ndarray, slots: np.ndarray) -> Landing:
        """As RecordRows.land."""
        return _StagedLanding(reader, file, self.record, self._staging, positions, slots, self._place)

    def _place(self, source: np.ndarray, starts: np.ndarray, slots: np.ndarray) -> None:
        for part, view in self._parts:
            assert part.offset is not None
            copy_rows(view, part.num_bytes, slots, source.data, 1, starts + part.offset, part.num_bytes)

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        """As RecordRows.move."""
        for part, view in self._parts:
            rows = np.frombuffer(view, np.uint8).reshape(-1, part.num_bytes)
            rows[slots] = rows[sources]

    def take(self, slots: np.ndarray, other: "PartRows", sources: np.ndarray) -> None:
        """As RecordRows.take."""
        for (part, view), (_, source) in zip(self._parts, other._parts, strict=True):
            copy_rows(view, part.num_bytes, slots, source, part.num_bytes, sources, part.num_bytes)


def copy_rows(
    dest: memoryview,
    dest_stride: int,
    slots: np.ndarray,
    source: memoryview,
    source_stride: int,
    rows: np.ndarray,
    num_bytes: int,
) -> None:
    """For every i: dest[slots[i] * dest_stride :][: num_bytes] = source[rows[i] * source_stride :][: num_bytes]."""
    slots, rows = np.ascontiguousarray(slots, np.int64), np.ascontiguousarray(rows, np.int64)
    if core is not None:
        core.copy_rows(dest, dest_stride, slots, source, source_stride, rows, num_bytes)
        return
    for slot, row in zip((slots * dest_stride).tolist(), (rows * source_stride).tolist(), strict=True):
        dest[slot : slot + num_bytes] = source[row : row + num_bytes]


def _apart(record: Record, positions: np.ndarray) -> bool:
    """Whether these are parts of records that lie apart on disk, and so many of them side by side that reading through
    what lies between costs less than a read each: a stream's, never a token's."""
    if record.step == record.stride or len(positions) < 2:
        return False
    return bool(positions[-1] - positions[0] < DENSE * len(positions))


def _spans(record: Record, positions: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Reads that bring records to slots of their shape, uint64 [n, 3].

    Neighbours on disk that land in neighbouring slots become one read. Whole strides are read: what pads a record on
    disk pads its slot.
    """
    joins = (positions[1:] == positions[:-1] + 1) & (slots[1:] == slots[:-1] + 1) & (record.step == record.stride)
    first = np.flatnonzero(np.concatenate((START, ~joins))[: len(positions)])
    spans = np.empty((len(first), 3), np.uint64)
    if len(first) == 0:
        return spans
    last = np.concatenate((first[1:], [len(positions)]))
    spans[:, 0] = HEADER_BYTES + positions[first] * record.step + record.start
    spans[:, 1] = slots[first] * record.stride
    spans[:, 2] = (last - first) * record.stride
    return spans


class _StagedLanding:
    """Records through staging: whole blocks are read, in rounds that fit the buffer, and each is copied out.

    The first round starts at once when the buffer is free, the others when somebody waits.
    """

    def __init__(
        self,
        reader: Reader,
        file: File,
        record: Record,
        staging: Staging,
        positions: np.ndarray,
        slots: np.ndarray,
        place: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
    ):
        self._reader, self._file, self._staging, self._slots, self._place = reader, file, staging, slots, place
        self._rounds = _extents(record, positions, staging.num_bytes, BLOCK_BYTES if file.direct else 1)
        self._first: Landing | None = None
        self._error: OSError | None = None
        if self._rounds and staging.user is None:
            staging.user = self
            self._first = self._read(0)

    def _read(self, index: int) -> Landing:
        return self._reader.submit(self._file, self._rounds[index][0], self._staging.memory)

    def wait(self) -> None:
        staging = self._staging
        if self._rounds and self._first is None and staging.user is not None:
            staging.user._finish()
        self._finish()
        if self._error is not None:
            raise self._error

    def _finish(self) -> None:
        try:
            source, done = np.frombuffer(self._staging.memory, np.uint8), 0
            for index, (_, starts) in enumerate(self._rounds):
                (self._first or self._read(index)).wait()
                self._first = None
                self._place(source, starts, self._slots[done : done + len(starts)])
                done += len(starts)
        except OSError as error:
            self._error = error
        finally:
            self._rounds, self._first = [], None
            if self._staging.user is self:
                self._staging.user = None


def _extents(record: Record, positions: np.ndarray, capacity: int, block: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reads of whole blocks that cover the records at `positions` (ascending), in rounds of at most `capacity` bytes.

    A round is its spans, uint64 [n, 3], packed into the buffer, and where each of its records then begins, int64.
    Records that share or neighbour a block share an extent.
    """
    begin = HEADER_BYTES + positions * record.step + record.start
    low = begin // block * block
    high = -(-(begin + record.num_bytes) // block) * block
    if len(positions) and int((high - low).max()) > capacity:
        raise ValueError(f"records of {record.num_bytes} bytes do not fit a staging buffer of {capacity} bytes")
    if _apart(record, positions):  # what lies between neighbours is read too
        beside = np.flatnonzero(np.diff(positions) == 1)
        high[beside] = np.maximum(high[beside], low[beside + 1])
    added = np.cumsum(high - np.maximum(low, np.concatenate(([0], high[:-1]))))
    rounds, start = [], 0
    while start < len(positions):
        # A round that begins inside a shared block reads that block again, hence the one block kept in hand.
        done = int(added[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(added, done + capacity - block, "right")))
        lo, hi, at = low[start:stop], high[start:stop], begin[start:stop]
        first = np.flatnonzero(np.concatenate(([True], lo[1:] > hi[:-1])))
        length = hi[np.append(first[1:], len(lo)) - 1] - lo[first]
        offset = np.cumsum(length) - length
        extent = np.repeat(np.arange(len(first)), np.diff(first, append=len(lo)))
        rounds.append(
            (np.stack([lo[first], offset, length], axis=1).astype(np.uint64), (offset - lo[first])[extent] + at)
        )
        start = stop
    return rounds
