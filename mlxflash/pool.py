"""Host memory for units: where rows of a window or blocks of a stream lie, and how bytes land there.

Knows slots, records and parts; knows nothing of neurons, tokens or layers. A backend decides what the memory is made
of and computes on it.
"""

import contextlib
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxflash._native import core
from mlxflash.bundle import BLOCK_BYTES, HEADER_BYTES, Record
from mlxflash.reader import File, Reader

HUGE_PAGE = 2 << 20
START = np.ones(1, bool)  # the first record begins a read
STAGING_PIECES = 8  # rounds of reads that cannot land in place: so many may be under way


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
    """A page-aligned buffer between disk and slots, made on first use and shared out in pieces of some records.

    All landings of a model share it. Who came first is given pieces first, and as many as there are: what is wanted
    later (the next layer's units, a stream's next block) is read while what came earlier is copied out and computed.
    """

    def __init__(self, num_bytes: int, record: Record):
        widest = (-(-record.num_bytes // BLOCK_BYTES) + 1) * BLOCK_BYTES  # a record, wherever in a block it begins
        count = min(STAGING_PIECES, num_bytes // widest)
        self.num_bytes, self.piece_bytes = num_bytes, num_bytes // count // BLOCK_BYTES * BLOCK_BYTES if count else 0
        self._pieces: list[memoryview] = []
        self.reset()

    def reset(self) -> None:
        """Forget landings that nobody will wait for; no read may be under way."""
        self.landings: list[_StagedLanding] = []  # that are not done
        self._free = list(self._pieces)

    def enter(self, landing: "_StagedLanding") -> None:
        """Start what `landing` wants to read, as far as there are pieces."""
        if not self._pieces:
            memory = host_memory(self.num_bytes)
            starts = range(0, self.num_bytes - self.piece_bytes + 1, self.piece_bytes)
            self._pieces = [memory[i : i + self.piece_bytes] for i in starts]
            self._free = list(self._pieces)
        self.landings.append(landing)
        self._fill()

    def finish(self, landing: "_StagedLanding") -> None:
        """Until all of `landing` is in its slots; pieces that others have are emptied where it waits for them."""
        while not landing.done:
            first = landing if landing.asked else next(other for other in self.landings if other.asked)
            self._free.append(first.copy_out())
            self._fill()
        if landing in self.landings:
            self.landings.remove(landing)

    def _fill(self) -> None:
        for landing in self.landings:
            while self._free and landing.ask(self._free[-1]):
                self._free.pop()


class RecordRows:
    """Slots shaped like records: slot s is `memory[s * stride :][: stride]`, one contiguous span per unit."""

    def __init__(self, record: Record, memory: memoryview, staging: Staging):
        self.record, self.memory, self._staging = record, memory, staging
        self._rows = np.frombuffer(memory, np.uint8).reshape(-1, record.stride)

    def land(self, reader: Reader, file: File, positions: np.ndarray, slots: np.ndarray) -> Landing:
        """Start reading the records at `positions` (ascending) into `slots`; both int64 [n]."""
        if file.direct and not self.record.aligned:
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


def _spans(record: Record, positions: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Reads that bring records to slots of their shape, uint64 [n, 3].

    Neighbours on disk that land in neighbouring slots become one read. Whole strides are read: what pads a record on
    disk pads its slot.
    """
    joins = (positions[1:] == positions[:-1] + 1) & (slots[1:] == slots[:-1] + 1)
    first = np.flatnonzero(np.concatenate((START, ~joins))[: len(positions)])
    spans = np.empty((len(first), 3), np.uint64)
    if len(first) == 0:
        return spans
    last = np.concatenate((first[1:], [len(positions)]))
    spans[:, 0] = HEADER_BYTES + positions[first] * record.stride
    spans[:, 1] = slots[first] * record.stride
    spans[:, 2] = (last - first) * record.stride
    return spans


@dataclass
class _Round:
    """Records that fit a piece of staging: their slots, the reads into the piece, and where each then begins in it."""

    slots: np.ndarray
    spans: np.ndarray
    starts: np.ndarray


class _StagedLanding:
    """Records through staging: whole blocks are read, in rounds that fit a piece, and each record is copied out."""

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
        self._reader, self._file, self._staging, self._place = reader, file, staging, place
        self._left = deque(_rounds(record, positions, slots, staging.piece_bytes, BLOCK_BYTES if file.direct else 1))
        self.asked: deque[tuple[_Round, memoryview, Landing]] = deque()
        self._error: OSError | None = None
        if self._left:
            staging.enter(self)

    @property
    def done(self) -> bool:
        return not self.asked and not self._left

    def ask(self, piece: memoryview) -> bool:
        """Start the next round, into `piece`; False where it is not needed."""
        if not self._left:
            return False
        try:
            landing = self._reader.submit(self._file, self._left[0].spans, piece)
        except OSError as error:
            return self._fail(error)
        self.asked.append((self._left.popleft(), piece, landing))
        return True

    def copy_out(self) -> memoryview:
        """Until the round asked for first is in its slots, or failed; its piece is free then."""
        part, piece, landing = self.asked[0]
        try:
            landing.wait()
            self._place(np.frombuffer(piece, np.uint8), part.starts, part.slots)
        except OSError as error:
            self._fail(error)
        self.asked.popleft()
        return piece

    def _fail(self, error: OSError) -> bool:
        """Keep the first error for who waits; nothing more is asked for, as all of the landing counts as lost."""
        self._error = self._error or error
        self._left.clear()
        return False

    def wait(self) -> None:
        self._staging.finish(self)
        if self._error is not None:
            raise self._error


def _rounds(record: Record, positions: np.ndarray, slots: np.ndarray, capacity: int, block: int) -> list[_Round]:
    """Reads of whole blocks that cover the records at `positions` (ascending), in rounds of at most `capacity` bytes.

    Records that share or neighbour a block share a read.
    """
    begin = HEADER_BYTES + positions * record.stride
    low = begin // block * block
    high = -(-(begin + record.num_bytes) // block) * block
    if len(positions) and int((high - low).max()) > capacity:
        raise ValueError(f"records of {record.num_bytes} bytes do not fit pieces of staging of {capacity} bytes")
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
        spans = np.stack([lo[first], offset, length], axis=1).astype(np.uint64)
        rounds.append(_Round(slots[start:stop], spans, (offset - lo[first])[extent] + at))
        start = stop
    return rounds
