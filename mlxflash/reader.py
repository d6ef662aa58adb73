"""Extents to bytes: many reads of one file into one buffer, submitted together and waited for once.

A span is (file offset, offset in the destination, bytes). The Python engine here is the specification: the native
one (`_native/reader.c`) takes the same calls, lands the same bytes and reports the same errors, only faster. Reader
threads see memory views and file descriptors, never an MLX array.
"""

import contextlib
import errno
import os
import sys
import threading
import time
import zlib
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from mlxflash._native import core
from mlxflash.bundle import HEADER_BYTES, Record

RING_DEPTH = 128  # reads io_uring keeps in flight; batches of hundreds of small reads gain up to it
PIECE_BYTES = 1 << 20  # a large span is cut into pieces, so that one sequential read keeps several threads busy


class ReadError(OSError):
    """A read that failed: carries errno, filename, and the span's `offset` and `length` in bytes."""

    def __init__(self, errno: int, reason: str, path: str, offset: int, length: int):
        super().__init__(errno, f"{reason}, reading {length} bytes at offset {offset}", path)
        self.offset, self.length = offset, length


class File:
    """One file opened for reading, buffered or direct (O_DIRECT; F_NOCACHE on macOS).

    `direct` tells what was granted: a filesystem without direct I/O is read through the page cache. Offsets, sizes
    and addresses of direct reads are multiples of 4096, which the caller keeps.
    """

    def __init__(self, path: Path, direct: bool = False):
        self.path = str(path)
        self.direct = False
        self.fd = -1
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self.direct = True
            except OSError:
                self.fd = -1  # the filesystem refuses O_DIRECT, such as some network and memory ones
        if self.fd < 0:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if direct and sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self.fd, fcntl.F_NOCACHE, 1)
            self.direct = True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Ticket:
    """A batch under way. `wait` returns when no read of it can touch the destination any more."""

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._results: dict[int, Exception | None] = {}
        self._news: SimpleQueue[None] = SimpleQueue()

    def end(self, job: int, error: Exception | None) -> None:
        """Called by the thread that did a job."""
        self._results[job] = error
        self._news.put(None)

    @property
    def done(self) -> bool:
        return len(self._results) == self._jobs

    def settle(self) -> None:
        """As wait, silent about errors."""
        while not self.done:
            self._news.get()

    def wait(self) -> None:
        """Raises the ReadError of the batch's first span that failed, after every read has come to rest."""
        self.settle()
        for job in range(self._jobs):
            if (error := self._results[job]) is not None:
                raise error


class Reader:
    """The Python engine: threads that call `preadv`, which releases the GIL.

    `num_reads` and `num_bytes` count what was asked of the operating system since the reader was made, `submitting` the
    seconds that took: the kernel's part of a read before the disk's, about a microsecond each. Queues carry
    the jobs because they survive an interrupt at any moment, which the locks of concurrent.futures do not.
    """

    engine = "python"

    def __init__(self, threads: int = 16):
        self.threads = threads
        self.num_reads = 0
        self.num_bytes = 0
        self.submitting = 0.0
        self.closed = False
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._running: list[Ticket] = []
        self._start()

    def submit(self, file: File, spans: np.ndarray, dest: memoryview) -> Ticket:
        """Start reading `spans`, uint64 [n, 3], into `dest` (writable bytes), which must live until `wait`.

        Raises ValueError when a span does not lie in `dest`.
        """
        if self.closed:
            raise ValueError("the reader is closed")
        begin = time.perf_counter()
        if len(spans) and int((spans[:, 1] + spans[:, 2]).max()) > dest.nbytes:
            raise ValueError(f"a span ends beyond its destination of {dest.nbytes} bytes")
        self.num_reads += len(spans)
        self.num_bytes += int(spans[:, 2].sum())
        pieces = [piece for span in spans.tolist() for piece in _cut(*span)]
        share = max(1, -(-len(pieces) // self.threads))
        starts = range(0, len(pieces), share)
        ticket = Ticket(len(starts))
        self._running = [t for t in self._running if not t.done] + [ticket]
        for job, start in enumerate(starts):
            self._jobs.put((ticket, job, file, pieces[start : start + share], dest))
        self.submitting += time.perf_counter() - begin
        return ticket

    def drain(self) -> None:
        """Let every read under way come to rest, whoever asked for it."""
        for ticket in self._running:
            ticket.settle()

    def restart(self) -> None:
        """As drain, for reads too that nobody knows of since an interrupt; none of their tickets may be waited for."""
        self._stop()
        self._start()

    def close(self) -> None:
        """Let every read come to rest and end the threads."""
        self.closed = True
        self._stop()

    def _start(self) -> None:
        self._running = []
        self._workers = [threading.Thread(target=_work, args=(self._jobs,), daemon=True) for _ in range(self.threads)]
        for worker in self._workers:
            worker.start()

    def _stop(self) -> None:
        while not self._jobs.empty():
            with contextlib.suppress(Empty):
                if job := self._jobs.get_nowait():
                    job[0].end(job[1], ReadError(errno.ECANCELED, "cancelled", job[2].path, 0, 0))
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._workers = []


def _work(jobs: "SimpleQueue[Any]") -> None:
    while _serve(jobs.get()):
        pass


def _serve(item: Any) -> bool:
    """Do one job, None being the sign to stop; its memory is let go of before the next one is waited for."""
    if item is None:
        return False
    ticket, job, file, pieces, dest = item
    try:
        _read(file, pieces, dest)
        ticket.end(job, None)
    except Exception as error:
        ticket.end(job, error)
    return True


def _cut(offset: int, at: int, length: int) -> list[tuple[int, int, int]]:
    return [(offset + i, at + i, min(PIECE_BYTES, length - i)) for i in range(0, length, PIECE_BYTES)]


def _read(file: File, pieces: list[tuple[int, int, int]], dest: memoryview) -> None:
    for offset, at, length in pieces:
        done = 0
        while done < length:
            try:
                count = os.preadv(file.fd, [dest[at + done : at + length]], offset + done)
            except OSError as error:
                raise ReadError(error.errno or 0, error.strerror or "failed", file.path, offset, length) from None
            if count == 0:
                raise ReadError(errno.EIO, "the file ends", file.path, offset, length)
            done += count


class CheckedReader:
    """A reader that compares every whole record it lands with the checksum of its bundle file.

    `checksums` maps a bundle file's path to its records' CRC-32, uint32 [units]; other files have none. A mismatch is
    a ReadError.
    """

    def __init__(self, reader: Reader, record: Record, checksums: dict[str, np.ndarray]):
        self._reader, self._record, self._checksums = reader, record, checksums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def submit(self, file: File, spans: np.ndarray, dest: memoryview) -> "CheckedTicket":
        return CheckedTicket(self, self._reader.submit(file, spans, dest), file, spans, dest)

    def check(self, file: File, spans: np.ndarray, dest: memoryview) -> None:
        sums = self._checksums.get(file.path)
        if sums is None:
            return
        stride, used = self._record.stride, self._record.num_bytes
        for offset, at, length in spans.tolist():
            first = max(0, -(-(offset - HEADER_BYTES) // stride))
            last = min(len(sums), (offset + length - HEADER_BYTES - used) // stride + 1)
            for index in range(first, last):
                start = at + HEADER_BYTES + index * stride - offset
                if zlib.crc32(dest[start : start + used]) != sums[index]:
                    where = HEADER_BYTES + index * stride
                    raise ReadError(errno.EIO, f"record {index} does not match its checksum", file.path, where, used)


class CheckedTicket:
    """Waits as Ticket does, then checks what arrived."""

    def __init__(self, reader: CheckedReader, ticket: Ticket, file: File, spans: np.ndarray, dest: memoryview):
        self._reader, self._ticket, self._batch = reader, ticket, (file, spans, dest)

    def wait(self) -> None:
        self._ticket.wait()
        self._reader.check(*self._batch)


class NativeReader:
    """The native engines, `threads` or `io_uring`, under the Python one's contract."""

    def __init__(self, engine: str, threads: int = 16):
        assert core is not None
        self.engine, self.threads = engine, threads
        self.num_reads = 0
        self.num_bytes = 0
        self.submitting = 0.0
        self.closed = False
        self._core = core.Reader(threads, engine, RING_DEPTH)
        self._running: dict[int, NativeTicket] = {}

    def submit(self, file: File, spans: np.ndarray, dest: memoryview) -> "NativeTicket":
        """As Reader.submit."""
        if self.closed:
            raise ValueError("the reader is closed")
        begin = time.perf_counter()
        joined = self._core.joined
        ticket = NativeTicket(self, file, self._core.submit(file.fd, spans, dest))
        self.submitting += time.perf_counter() - begin
        self._running[ticket.number] = ticket
        self.num_reads += len(spans) - (self._core.joined - joined)
        self.num_bytes += int(spans[:, 2].sum())
        return ticket

    def drain(self) -> None:
        """As Reader.drain."""
        for ticket in list(self._running.values()):
            with contextlib.suppress(ReadError):
                ticket.wait()

    def restart(self) -> None:
        """As Reader.restart."""
        old, self._core = self._core, core.Reader(self.threads, self.engine, RING_DEPTH)
        old.close()
        self._running = {}

    def close(self) -> None:
        """As Reader.close."""
        self.closed = True
        self._core.close()


class NativeTicket:
    """As Ticket."""

    def __init__(self, reader: NativeReader, file: File, number: int):
        self.number = number
        self._reader, self._file = reader, file
        self._error: ReadError | None = None

    def wait(self) -> None:
        """As Ticket.wait; a batch whose wait was interrupted counts as failed, since nobody saw it succeed."""
        if self._reader._running.pop(self.number, None) is not None:
            self._error = ReadError(errno.EINTR, "interrupted", self._file.path, 0, 0)
            try:
                self._reader._core.wait(self.number)
                self._error = None
            except core.ReadError as error:
                reason = "the file ends" if "end of file" in str(error) else os.strerror(error.errno)
                self._error = ReadError(error.errno, reason, self._file.path, error.offset, error.length)
        if self._error is not None:
            raise self._error


ENGINES = ("io_uring", "threads", "python")


def make_reader(engine: str | None = None, direct: bool = False) -> Any:
    """A reader of the named engine, or the best this machine has for direct or buffered reads.

    Measured (RESULTS.md): io_uring needs a half to a third of the CPU time of threads on direct reads and is at least
    as fast; on what the page cache holds threads are twice as fast.
    """
    if engine not in (None, *ENGINES):
        raise ValueError(f"reader {engine!r} is unknown: {', '.join(ENGINES)} are there")
    if core is None and engine in ("io_uring", "threads"):
        raise ValueError(f"reader {engine!r}: mlxflash was installed without its native part")
    if core is None or engine == "python":
        return Reader()
    if engine == "io_uring" or (engine is None and direct):
        try:
            return NativeReader("io_uring")
        except OSError as error:
            if engine is not None:
                raise ValueError(f"reader io_uring: this system does not allow it ({error.strerror})") from None
    return NativeReader("threads")
