"""The readers' law: every engine lands the same bytes and reports the same errors; the Python one says what is right.

Random spans against NumPy; a span past the end fails with file, offset and length once every read of its batch is at
rest; several batches under way are independent; after `drain` and `close` nothing is in flight. `CheckedReader` adds
that a record which does not match its checksum is an error, whatever extent it came in.
"""

import errno
import os
import zlib

import numpy as np
import pytest

from mlxflash._native import core
from mlxflash.bundle import Part, make_record
from mlxflash.reader import ENGINES, CheckedReader, File, ReadError, make_reader

SIZE = 5 * (1 << 20) + 77
HEADER = 16384


@pytest.fixture(params=ENGINES)
def reader(request):
    try:
        reader = make_reader(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert reader.engine == request.param
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "data"
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    data.tofile(path)
    return path, data


@pytest.fixture
def file(data):
    file = File(data[0])
    yield file
    file.close()


def table(*spans):
    return np.array(spans, np.uint64).reshape(-1, 3)


def random_spans(rng, count, most):
    """Spans that land apart, in random order, and the bytes their destination needs."""
    lengths = rng.integers(1, most + 1, count)
    places = np.cumsum(lengths + rng.integers(0, 5, count)) - lengths
    offsets = rng.integers(0, SIZE - lengths + 1)
    spans = np.stack([offsets, places, lengths], axis=1).astype(np.uint64)
    return rng.permutation(spans), int((places + lengths).max(initial=0)) + 9


def assert_landed(dest, spans, data):
    """Every span's bytes, and not a byte beside them."""
    want = np.full(len(dest), 0xA5, np.uint8)
    for offset, place, length in spans.tolist():
        want[place : place + length] = data[offset : offset + length]
    np.testing.assert_array_equal(dest, want)


def blank(size):
    return np.full(size, 0xA5, np.uint8)


@pytest.mark.parametrize(("count", "most"), [(0, 1), (1, 1), (1, 3 << 20), (3, 3 << 20), (50, 60_000), (900, 700)])
def test_random_spans(reader, file, data, count, most):
    for seed in range(3):
        spans, size = random_spans(np.random.default_rng(seed), count, most)
        dest = blank(size)
        before = reader.num_reads, reader.num_bytes
        reader.submit(file, spans, memoryview(dest)).wait()
        assert_landed(dest, spans, data[1])
        assert (reader.num_reads, reader.num_bytes) == (before[0] + count, before[1] + int(spans[:, 2].sum()))


def test_several_batches(reader, file, data):
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(12):
        spans, size = random_spans(rng, 20, 30_000)
        dest = blank(size)
        batches.append((reader.submit(file, spans, memoryview(dest)), spans, dest))
    for i in rng.permutation(12):
        ticket, spans, dest = batches[i]
        ticket.wait()
        assert_landed(dest, spans, data[1])
        ticket.wait()  # again: nothing happens


def test_a_span_may_change_after_submit(reader, file, data):
    spans, size = random_spans(np.random.default_rng(2), 100, 20_000)
    dest, asked = blank(size), spans.copy()
    ticket = reader.submit(file, spans, memoryview(dest))
    spans[:] = 0
    ticket.wait()
    assert_landed(dest, asked, data[1])


@pytest.mark.parametrize(
    "past", [(SIZE - 10, 0, 11), (SIZE, 0, 1), (SIZE + 5000, 0, 100), (SIZE - (2 << 20), 0, 3 << 20)]
)
def test_past_the_end(reader, file, data, past):
    """A failed span is named; the others of its batch land, and other batches do not notice."""
    spans, size = random_spans(np.random.default_rng(3), 10, 1000)
    bad = (past[0], size, past[2])
    dest, other = blank(size + past[2]), blank(size)
    failing = reader.submit(file, np.concatenate((spans, table(bad))), memoryview(dest))
    fine = reader.submit(file, spans, memoryview(other))
    for _ in range(2):
        with pytest.raises(ReadError, match="the file ends") as caught:
            failing.wait()
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.errno, error.filename) == (errno.EIO, str(data[0]))
    assert past[0] <= error.offset < past[0] + past[2]
    assert 0 < error.length <= past[2]
    assert f"{error.length} bytes at offset {error.offset}" in str(error)
    assert str(data[0]) in str(error)
    fine.wait()
    assert_landed(other, spans, data[1])
    np.testing.assert_array_equal(dest[: size - 9], other[: size - 9])


def test_a_closed_file(reader, data):
    file = File(data[0])
    file.close()
    file.close()
    ticket = reader.submit(file, table((100, 0, 50)), memoryview(bytearray(50)))
    with pytest.raises(ReadError) as caught:
        ticket.wait()
    assert caught.value.errno == errno.EBADF
    assert caught.value.filename == str(data[0])
    assert (caught.value.offset, caught.value.length) == (100, 50)


@pytest.mark.parametrize("span", [(0, 0, 101), (0, 100, 1), (0, 101, 0), (0, 1 << 40, 1), (0, 0, 1 << 40)])
def test_a_span_out_of_its_destination(reader, file, span):
    dest = blank(100)
    with pytest.raises(ValueError, match="dest"):
        reader.submit(file, table((5, 3, 10), span), memoryview(dest))
    reader.drain()
    assert_landed(dest, table(), None)
    assert (reader.num_reads, reader.num_bytes) == (0, 0)


def test_a_destination_that_cannot_be_written(reader, file):
    with pytest.raises((TypeError, ValueError, BufferError)):
        reader.submit(file, table((0, 0, 10)), memoryview(bytes(10))).wait()


def test_drain(reader, file, data):
    """At rest without a wait, even after a failure; the tickets say afterwards how it went."""
    spans, size = random_spans(np.random.default_rng(4), 200, 50_000)
    dest = blank(size)
    ticket = reader.submit(file, spans, memoryview(dest))
    failing = reader.submit(file, table((SIZE, 0, 1)), memoryview(bytearray(1)))
    reader.drain()
    assert_landed(dest, spans, data[1])
    ticket.wait()
    with pytest.raises(ReadError):
        failing.wait()
    reader.drain()


def test_close(reader, file, data):
    spans, size = random_spans(np.random.default_rng(5), 200, 50_000)
    dest = blank(size)
    reader.submit(file, spans, memoryview(dest))
    assert not reader.closed
    reader.drain()
    reader.close()
    assert_landed(dest, spans, data[1])
    assert reader.closed
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.submit(file, spans, memoryview(dest))


def aligned(size):
    raw = np.full(size + 4096, 0xA5, np.uint8)
    skip = -raw.ctypes.data % 4096
    return raw[skip : skip + size]


def test_direct(reader, data):
    file = File(data[0], direct=True)
    if not file.direct:
        pytest.skip("this filesystem refuses direct reads")
    rng = np.random.default_rng(6)
    blocks = rng.permutation(SIZE // 4096)[:200]
    spans = np.stack([blocks * 4096, np.arange(200) * 4096, np.full(200, 4096)], axis=1).astype(np.uint64)
    dest = aligned(200 * 4096)
    reader.submit(file, spans, memoryview(dest)).wait()
    assert_landed(dest, spans, data[1])
    large = aligned(3 << 20)
    reader.submit(file, table((4096, 0, 3 << 20)), memoryview(large)).wait()
    np.testing.assert_array_equal(large, data[1][4096 : 4096 + (3 << 20)])
    file.close()


def test_direct_falls_back_where_it_is_refused(data, monkeypatch):
    """A filesystem without direct I/O says EINVAL on opening; the file is then read through the page cache."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no O_DIRECT")
    real = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    file = File(data[0], direct=True)
    assert not file.direct
    reader = make_reader("python")
    dest = bytearray(7)
    reader.submit(file, table((3, 0, 7)), memoryview(dest)).wait()
    assert dest == data[1][3:10].tobytes()
    reader.close()
    file.close()


def test_a_missing_file(tmp_path):
    for direct in (False, True):
        with pytest.raises(FileNotFoundError):
            File(tmp_path / "nothing", direct)


def test_engines():
    with pytest.raises(ValueError, match="io_uring, threads, python"):
        make_reader("fast")
    for direct in (False, True):
        reader = make_reader(direct=direct)
        assert reader.engine in ENGINES
        assert (reader.engine == "python") == (core is None)
        reader.close()


@pytest.fixture(params=[(48,), (4096,)], ids=["packed", "aligned"])
def records(request, tmp_path):
    """A file of records behind a header page, and their checksums."""
    record = make_record([Part("up", "uint8", request.param, 0), Part("bias", "float32", (), None)])
    rng = np.random.default_rng(7)
    rows = rng.integers(0, 256, (90, record.stride), dtype=np.uint8)
    path = tmp_path / "records"
    path.write_bytes(bytes(HEADER) + rows.tobytes() + bytes(300))
    sums = np.array([zlib.crc32(row[: record.num_bytes].tobytes()) for row in rows], np.uint32)
    return path, record, sums


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_checked_reads(reader, records):
    """A flipped bit is found in every extent that brings its record whole, in no other, and named."""
    path, record, sums = records
    stride = record.stride
    checked = CheckedReader(reader, record, {str(path): sums})
    assert checked.engine == reader.engine
    flip(path, HEADER + 41 * stride + 17)
    file = File(path)
    end = HEADER + 90 * stride
    extents = {
        "itself": (HEADER + 41 * stride, stride, True),
        "it and neighbours": (HEADER + 38 * stride, 9 * stride, True),
        "it, cut records beside it": (HEADER + 40 * stride + 5, 3 * stride - 10, True),
        "all": (HEADER, 90 * stride, True),
        "all and what surrounds them": (HEADER - 100, 90 * stride + 300, True),
        "the one before": (HEADER + 40 * stride, stride, False),
        "the one behind": (HEADER + 42 * stride, stride, False),
        "a part of it": (HEADER + 41 * stride + 1, stride - 1, False),
        "another part": (HEADER + 41 * stride, record.num_bytes - 1, False),
        "the header": (0, HEADER, False),
        "the trailer": (end, 300, False),
    }
    for name, (offset, length, found) in extents.items():
        dest = bytearray(length + 3)
        ticket = checked.submit(file, table((offset, 3, length)), memoryview(dest))
        if found:
            with pytest.raises(ReadError, match="record 41 does not match its checksum") as caught:
                ticket.wait()
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path)), name
            assert (caught.value.offset, caught.value.length) == (HEADER + 41 * stride, record.num_bytes)
        else:
            ticket.wait()
        assert dest[3:] == path.read_bytes()[offset : offset + length]
    assert reader.num_reads == len(extents)
    flip(path, HEADER + 41 * stride + 17)
    checked.submit(file, table((HEADER, 0, 90 * stride)), memoryview(bytearray(90 * stride))).wait()
    file.close()


def test_checked_reads_of_several_spans(reader, records):
    path, record, sums = records
    stride = record.stride
    flip(path, HEADER + 3 * stride)
    checked, file = CheckedReader(reader, record, {str(path): sums}), File(path)
    order = np.random.default_rng(8).permutation(90)
    spans = np.stack([HEADER + order * stride, np.arange(90) * stride, np.full(90, stride)], axis=1).astype(np.uint64)
    with pytest.raises(ReadError, match="record 3 "):
        checked.submit(file, spans, memoryview(bytearray(90 * stride))).wait()
    fine = spans[order != 3]
    checked.submit(file, fine, memoryview(bytearray(90 * stride))).wait()
    with pytest.raises(ReadError, match="the file ends"):
        checked.submit(file, table((HEADER + 90 * stride + 299, 0, 2)), memoryview(bytearray(2))).wait()
    file.close()
