"""The native batch reader: bytes, tickets, refusals, failures, and what it leaves behind."""

import contextlib
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlxflash._native import core

if core is None:
    pytest.skip("the native module is not built", allow_module_level=True)

SIZE = 8 << 20
MIB = 1 << 20


def engines():
    kinds = [{"threads": n} for n in (1, 2, 16)]
    try:
        core.Reader(engine="io_uring").close()
    except OSError:
        return kinds
    return [*kinds, {"engine": "io_uring"}, {"engine": "io_uring", "depth": 1}]


ENGINES = engines()


@pytest.fixture(params=ENGINES, ids=str)
def reader(request):
    reader = core.Reader(**request.param)
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "data"
    np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tofile(path)
    return path


@pytest.fixture(scope="module")
def data(path):
    return np.fromfile(path, dtype=np.uint8)


@pytest.fixture
def fd(path):
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def table(*spans):
    return np.array(spans, dtype=np.uint64).reshape(-1, 3)


def random_batch(rng, count, most):
    """Random spans laid out in dest with gaps, in shuffled order; and the size of dest."""
    length = rng.integers(1, most, count, endpoint=True)
    gap = rng.integers(0, 9, count)
    place = np.cumsum(gap + length) - length
    offset = rng.integers(0, SIZE - length, endpoint=True)
    spans = np.stack([offset, place, length], axis=1).astype(np.uint64)
    return rng.permutation(spans), int(place[-1] + length[-1] + 5)


def expected(data, spans, size, fill=0xA5):
    dest = np.full(size, fill, np.uint8)
    for offset, place, length in spans.tolist():
        dest[place : place + length] = data[offset : offset + length]
    return dest


@pytest.mark.parametrize("size", [1, 511, 4096, 18432, 512 << 10, (512 << 10) + 1, 3 * MIB])
def test_one_span(reader, fd, data, size):
    dest = np.full(size + 2, 0xA5, np.uint8)
    spans = table((SIZE - size, 1, size))
    assert reader.wait(reader.submit(fd, spans, dest)) == size
    np.testing.assert_array_equal(dest, expected(data, spans, size + 2))


@pytest.mark.parametrize(("count", "most"), [(1000, 3000), (60, 100_000), (5, 3 * MIB)])
def test_random_spans(reader, fd, data, count, most):
    spans, size = random_batch(np.random.default_rng(count), count, most)
    dest = np.full(size, 0xA5, np.uint8)
    assert reader.wait(reader.submit(fd, spans, memoryview(dest))) == spans[:, 2].sum()
    np.testing.assert_array_equal(dest, expected(data, spans, size))


def neighbours(rng, count, least, most, first=0):
    """Spans that follow each other in the file, scattered in dest; and the size of dest."""
    length = rng.integers(least, most, count, endpoint=True)
    offset = first + np.cumsum(length) - length
    order = rng.permutation(count)
    place = np.empty(count, np.int64)
    place[order] = np.cumsum(length[order] + 3) - length[order] - 3
    return np.stack([offset, place, length], axis=1).astype(np.uint64), int((length + 3).sum())


@pytest.mark.parametrize(("count", "least", "most"), [(2, 1, 9), (64, 4096, 4096), (65, 4096, 4096), (300, 1, 20_000)])
def test_neighbours_are_read_together_and_land_apart(reader, fd, data, count, least, most):
    spans, size = neighbours(np.random.default_rng(count), count, least, most, 1000)
    dest = np.full(size, 0xA5, np.uint8)
    assert reader.wait(reader.submit(fd, spans, dest)) == spans[:, 2].sum()
    np.testing.assert_array_equal(dest, expected(data, spans, size))
    assert count - reader.joined == max(-(-count // 64), -(-int(spans[:, 2].sum()) // (512 << 10)))


def test_a_file_that_gives_less_than_it_is_asked_for(reader):
    """Kernel tables come a page at a time, whatever is asked: joined reads go on inside a span and after it."""
    try:
        fd = os.open("/proc/kallsyms", os.O_RDONLY)
    except OSError:
        pytest.skip("no /proc/kallsyms")
    try:
        pieces, at = [], 0
        while at < 60_000 and (piece := os.pread(fd, 60_000, at)):
            pieces.append(piece)
            at += len(piece)
        if at < 40_000 or len(pieces) == 1:
            pytest.skip("it is too short, or comes at once")
        table_bytes = np.frombuffer(b"".join(pieces), np.uint8)
        spans, size = neighbours(np.random.default_rng(0), 12, 1500, 3000)
        dest = np.full(size, 0xA5, np.uint8)
        reader.wait(reader.submit(fd, spans, dest))
        assert reader.joined == 11
        np.testing.assert_array_equal(dest, expected(table_bytes, spans, size))
    finally:
        os.close(fd)


@pytest.mark.parametrize("failing", [1, 5, 9])
def test_the_end_of_the_file_inside_a_joined_read(reader, fd, failing):
    spans, size = neighbours(np.random.default_rng(3), 10, 4096, 4096)
    spans[:, 0] += SIZE - np.uint64(failing * 4096 + 100)
    with pytest.raises(core.ReadError) as caught:
        reader.wait(reader.submit(fd, spans, np.zeros(size, np.uint8)))
    assert (caught.value.index, caught.value.offset, caught.value.length) == (failing, spans[failing, 0], 4096)


def test_spans_are_copied(reader, fd, data):
    spans, size = random_batch(np.random.default_rng(1), 500, 5000)
    want = expected(data, spans, size)
    dest = np.full(size, 0xA5, np.uint8)
    ticket = reader.submit(fd, spans, dest)
    spans[:] = 0
    reader.wait(ticket)
    np.testing.assert_array_equal(dest, want)


def test_tickets_in_any_order(reader, fd, data):
    rng = np.random.default_rng(2)
    batches = []
    for count in rng.integers(0, 50, 20):
        spans, size = random_batch(rng, count, 40_000) if count else (table(), 0)
        dest = np.full(size, 0xA5, np.uint8)
        batches.append((reader.submit(fd, spans, dest), spans, dest))
    assert len({ticket for ticket, _, _ in batches}) == 20
    for i in rng.permutation(20):
        ticket, spans, dest = batches[i]
        assert reader.wait(ticket) == spans[:, 2].sum()
        assert np.array_equal(dest, expected(data, spans, len(dest)))
        with pytest.raises(ValueError, match="already waited"):
            reader.wait(ticket)


def test_several_threads(reader, fd, data):
    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            spans, size = random_batch(rng, 30, 20_000)
            dest = np.full(size, 0xA5, np.uint8)
            reader.wait(reader.submit(fd, spans, dest))
            if not np.array_equal(dest, expected(data, spans, size)):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_one_ticket_has_one_waiter(reader, fd):
    ticket = reader.submit(fd, table((0, 0, 4 * MIB)), bytearray(4 * MIB))

    def wait(_):
        with contextlib.suppress(ValueError):
            return reader.wait(ticket)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(map(str, pool.map(wait, range(4)))) == [str(4 * MIB), "None", "None", "None"]


def test_done(reader, fd):
    ticket = reader.submit(fd, table((0, 0, MIB)), bytearray(MIB))
    while not reader.done(ticket):
        pass
    assert reader.wait(ticket) == MIB
    with pytest.raises(ValueError, match="unknown"):
        reader.done(ticket)


@pytest.mark.parametrize("spans", [table(), memoryview(b"").cast("Q")], ids=["numpy", "memoryview"])
def test_empty_batch(reader, fd, spans):
    ticket = reader.submit(fd, spans, bytearray(1))
    assert reader.done(ticket)
    assert reader.wait(ticket) == 0


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (table((0, 0, 8)).astype(np.int64), "uint64 triples"),
        (table((0, 0, 8)).astype(np.float64), "uint64 triples"),
        (table((0, 0, 8)).astype(">u8"), "uint64 triples"),
        (table((0, 0, 8)).astype(np.uint32), "uint64 triples"),
        (np.zeros(4, np.uint64), "uint64 triples"),
        (b"\0" * 24, "uint64 triples"),
        (table((0, 0, 8), (0, 0, 0)), "span 1 .* is empty"),
        (table((0, 0, 8), (0, 93, 8)), "span 1 .* does not fit in dest"),
        (table((0, 101, 1)), "does not fit in dest"),
        (table((0, HUGE, 8)), "does not fit in dest"),
        (table((0, 8, HUGE)), "does not fit in dest"),
        (table((HUGE, 0, 8)), "impossible file offset"),
        (table((2**63 - 8, 0, 8)), "impossible file offset"),
    ],
)
def test_refused_spans(reader, fd, spans, message):
    dest = bytearray(100)
    with pytest.raises(ValueError, match=message):
        reader.submit(fd, spans, dest)
    assert dest == bytes(100)
    dest.append(0)  # BufferError if it were still held


def test_refused_buffers(reader, fd):
    spans = table((0, 0, 8), (0, 0, 8))
    with pytest.raises(ValueError, match="contiguous"):
        reader.submit(fd, spans[:, ::-1], bytearray(8))
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    for dest in (bytes(8), memoryview(bytes(8)), frozen, np.zeros(16, np.uint8)[::2]):
        with pytest.raises(ValueError, match="dest must be a writable contiguous"):
            reader.submit(fd, spans, dest)
    with pytest.raises(TypeError):
        reader.submit(fd, spans, None)
    with pytest.raises(TypeError):
        reader.submit(fd, [(0, 0, 8)], bytearray(8))


def test_past_the_end(reader, fd, data):
    dest = np.zeros(100_000, np.uint8)
    spans = table((0, 0, 1000), (5000, 1000, 1000), (SIZE - 10, 2000, 11), (SIZE + 5, 3000, 20))
    with pytest.raises(core.ReadError, match="end of file in read 2") as caught:
        reader.wait(reader.submit(fd, spans, dest))
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.errno, error.offset, error.length, error.index) == (errno.EIO, SIZE - 10, 11, 2)
    np.testing.assert_array_equal(dest[:2000], expected(data, spans[:2], 2000))
    assert reader.wait(reader.submit(fd, spans[:2], dest)) == 2000


def test_failure_inside_a_long_span(reader, fd):
    length = 3 * MIB
    spans = table((0, 0, 10), (SIZE - length + 1, 0, length), (0, 0, 10))
    with pytest.raises(core.ReadError) as caught:
        reader.wait(reader.submit(fd, spans, bytearray(length)))
    error = caught.value
    assert (error.offset, error.length, error.index) == (SIZE - length + 1, length, 1)


def test_failed_batch_leaves_others_alone(reader, fd, data):
    rng = np.random.default_rng(3)
    spans, size = random_batch(rng, 100, 10_000)
    good, bad = np.full(size, 0xA5, np.uint8), bytearray(10)
    tickets = [reader.submit(fd, table((SIZE, 0, 10)), bad), reader.submit(fd, spans, good)]
    assert reader.wait(tickets[1]) == spans[:, 2].sum()
    np.testing.assert_array_equal(good, expected(data, spans, size))
    with pytest.raises(core.ReadError, match="end of file"):
        reader.wait(tickets[0])


def test_bad_descriptor(reader, fd):
    for bad in (-1, 1 << 20):
        with pytest.raises(core.ReadError) as caught:
            reader.wait(reader.submit(bad, table((0, 0, 10)), bytearray(10)))
        assert caught.value.errno == errno.EBADF


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")
def test_direct(reader, tmp_path, data):
    path = tmp_path / "odd"
    data[: 3 * 4096 + 100].tofile(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    try:
        with mmap.mmap(-1, 8 * 4096) as dest:
            assert reader.wait(reader.submit(fd, table((4096, 4096, 8192)), dest)) == 8192
            assert dest[4096:12288] == data[4096:12288].tobytes()
            # The file ends inside this span: not EINVAL, though no direct read can go on there.
            with pytest.raises(core.ReadError, match="end of file"):
                reader.wait(reader.submit(fd, table((4096, 0, 16384)), dest))
            with contextlib.suppress(core.ReadError):  # some file systems take any alignment
                reader.wait(reader.submit(fd, table((1, 3, 1000)), dest))
                pytest.skip("the file system does not ask for alignment")
            with pytest.raises(OSError, match="Invalid argument") as caught:
                reader.wait(reader.submit(fd, table((1, 3, 1000)), dest))
            assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_closed(fd):
    for kind in ENGINES:
        reader = core.Reader(**kind)
        ticket = reader.submit(fd, table((0, 0, 10)), bytearray(10))
        reader.close()
        reader.close()
        for call in (reader.wait, reader.done):
            with pytest.raises(ValueError, match="reader is closed"):
                call(ticket)
        with pytest.raises(ValueError, match="reader is closed"):
            reader.submit(fd, table((0, 0, 10)), bytearray(10))


def test_close_releases_what_was_not_waited_for(reader, fd):
    dest = bytearray(SIZE)
    for _ in range(4):
        reader.submit(fd, table((0, 0, SIZE)), dest)
    with pytest.raises(BufferError):
        dest.append(0)
    reader.close()
    dest.append(0)


def test_close_while_another_thread_waits(fd, data):
    for kind in ENGINES:
        reader = core.Reader(**kind)
        dest = np.zeros(SIZE, np.uint8)
        ticket = reader.submit(fd, table((0, 0, SIZE)), dest)
        outcome = []

        def wait(reader=reader, ticket=ticket, outcome=outcome):
            try:
                outcome.append(reader.wait(ticket))
            except ValueError as error:  # close() came first
                outcome.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        reader.close()
        thread.join()
        assert outcome[0] in (SIZE, "reader is closed")
        assert outcome[0] != SIZE or np.array_equal(dest, data)


def test_dest_is_kept_alive(reader, fd):
    class Memory(bytearray):
        pass

    dest = Memory(SIZE)
    alive = weakref.ref(dest)
    ticket = reader.submit(fd, table((0, 0, SIZE)), dest)
    del dest
    gc.collect()
    assert alive() is not None
    assert reader.wait(ticket) == SIZE
    assert alive() is None


def test_signal_while_waiting(reader, fd):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled in the main thread")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    dest, seen = bytearray(SIZE), 0
    spans = table((0, 0, SIZE))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.01)
        while seen < 5:
            try:
                reader.wait(reader.submit(fd, spans, dest))
            except KeyboardInterrupt:
                seen += 1
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reader.wait(reader.submit(fd, spans, dest)) == SIZE


def test_construction():
    reader = core.Reader()
    assert (reader.engine, reader.threads) == ("threads", 16)
    assert core.Reader(3).threads == 3
    with pytest.raises(ValueError, match="'threads' or 'io_uring', not 'aio'"):
        core.Reader(engine="aio")
    for name in ("threads", "depth"):
        for wrong in (-1, 0, 10**6):
            with pytest.raises(ValueError, match=f"{name} must be from 1 to"):
                core.Reader(**{name: wrong})
    if len(ENGINES) > 3:
        reader = core.Reader(threads=7, engine="io_uring")
        assert (reader.engine, reader.threads) == ("io_uring", 1)


def open_things():
    return [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
@pytest.mark.parametrize("kind", ENGINES[1:4:2], ids=str)
def test_nothing_is_left_behind(kind, fd):
    before = open_things()
    for i in range(300):
        reader = core.Reader(**kind)
        reader.submit(fd, table((0, 0, 5000)), bytearray(5000))
        if i % 2:
            reader.close()
        del reader
    deadline = time.monotonic() + 5
    while open_things() != before and time.monotonic() < deadline:
        time.sleep(0.001)  # a joined thread leaves /proc a moment after it has been joined
    assert open_things() == before


FORK = """
import os, sys
from mlxflash._native import core
kind, path = eval(sys.argv[1]), sys.argv[2]
reader, fd, dest = core.Reader(**kind), os.open(path, os.O_RDONLY), bytearray(1 << 20)
spans = memoryview(bytes(16) + (1 << 20).to_bytes(8, sys.byteorder)).cast("Q")
ticket = reader.submit(fd, spans, dest)
child = os.fork()
if not child:
    try:
        reader.wait(ticket)
    except RuntimeError:
        reader.close()
        del reader
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert reader.wait(ticket) == reader.wait(reader.submit(fd, spans, dest)) == 1 << 20
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ENGINES[1:4:2], ids=str)
def test_forked_child_is_refused(kind, path):
    # In a process of its own: newer Pythons warn of every fork beside threads.
    command = [sys.executable, "-W", "ignore", "-c", FORK, repr(kind), path]
    subprocess.run(command, check=True, timeout=60)
