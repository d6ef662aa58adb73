"""The landing law: whatever records look like and however little staging there is, every unit lands in its slot.

Units of a file of random records are landed in slots shaped like records and in slots by part; buffered and direct,
packed and aligned; with staging for one record or for all; one batch or several that share a staging buffer and wait
in any order. Rows nobody asked for keep what they held. `move` and `take` copy rows whole.
"""

from itertools import pairwise, permutations

import numpy as np
import pytest

from build import BACKENDS
from mlxflash.backends import FFN
from mlxflash.bundle import HEADER_BYTES, Part, Record, make_record
from mlxflash.pool import STAGING_PIECES, PartRows, RecordRows, Source, Staging, copy_rows, host_memory
from mlxflash.reader import File, make_reader

UNITS, SLOTS = 150, 60
RECORDS = {
    "packed": make_record([Part("up", "float16", (24,), 0), Part("down", "float16", (24,), 0)]),
    "padded": make_record([Part("up", "uint8", (37,), 0), Part("down", "uint8", (30,), 0)]),
    "across blocks": make_record([Part("up", "float32", (700,), 0), Part("down", "float32", (700,), 0)]),
    "larger than blocks": make_record([Part("up", "uint8", (9001,), 0), Part("down", "uint8", (500,), 0)]),
    "aligned": make_record([Part("up", "float32", (512,), 0), Part("down", "float32", (512,), 0)]),
}


def least_staging(record: Record):
    return record.stride + 3 * 4096


class Slots:
    """Rows of one kind and what they should hold."""

    def __init__(self, kind, record, staging):
        self.record = record
        if kind == "records":
            self._views = {"record": host_memory(SLOTS * record.stride)[: SLOTS * record.stride]}
            self.rows = RecordRows(record, self._views["record"], staging)
        else:
            self._views = {p.name: memoryview(bytearray(SLOTS * p.num_bytes)) for p in record.parts}
            self.rows = PartRows(record, self._views, staging)
        for view in self._views.values():
            np.frombuffer(view, np.uint8)[:] = 0xA5
        self.want = np.full((SLOTS, record.num_bytes), 0xA5, np.uint8)

    def assert_held(self):
        raw = [np.frombuffer(view, np.uint8).reshape(SLOTS, -1) for view in self._views.values()]
        np.testing.assert_array_equal(np.concatenate(raw, axis=1)[:, : self.record.num_bytes], self.want)


@pytest.fixture(params=RECORDS)
def record(request):
    return RECORDS[request.param]


@pytest.fixture
def units(record, tmp_path):
    """A bundle file's records: its path and uint8 [units, bytes]."""
    raw = np.random.default_rng(0).integers(0, 256, (UNITS, record.stride), dtype=np.uint8)
    end = HEADER_BYTES + raw.nbytes
    tail = -end % 4096 + 4096
    (tmp_path / "layer").write_bytes(bytes(HEADER_BYTES) + raw.tobytes() + bytes(tail))
    return tmp_path / "layer", raw[:, : record.num_bytes]


def some(rng, slots=SLOTS):
    """Units, ascending, and slots for them: neighbours often, as after a long prompt, or scattered."""
    count = int(rng.integers(0, slots + 1))
    first = int(rng.integers(0, UNITS - count + 1))
    dense = first + np.arange(count)
    picked = dense if rng.random() < 0.3 else np.sort(rng.choice(UNITS, count, replace=False))
    into = np.arange(count) if rng.random() < 0.3 else rng.permutation(slots)[:count]
    return picked, into


@pytest.mark.parametrize("staging", ["one record", "a few", "all"])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["records", "parts"])
def test_units_land_in_their_slots(units, record, kind, direct, staging):
    path, data = units
    file, reader = File(path, direct), make_reader()
    if direct and not file.direct:
        pytest.skip("this filesystem refuses direct reads")
    size = {"one record": 1, "a few": 4, "all": UNITS}[staging] * least_staging(record)
    shared = Staging(size, record)
    pools = [Slots(kind, record, shared) for _ in range(3)]
    rng = np.random.default_rng(1)
    for _ in range(6):
        under_way = []
        for slots in pools:
            picked, into = some(rng)
            under_way.append(slots.rows.land(reader, file, picked, into))
            slots.want[into] = data[picked]
        for i in rng.permutation(3):
            under_way[i].wait()
        for slots in pools:
            slots.assert_held()
    assert not shared.landings
    reader.close()
    file.close()


class Slow:
    """A reader whose batches are done by whoever waits for them: `under_way` are those that nobody waited for yet."""

    def __init__(self, fails=()):
        self.under_way, self.asked, self._reader, self._fails = [], [], make_reader("python"), fails

    def submit(self, file, spans, dest):
        ticket = SlowTicket(self, file, spans, np.frombuffer(dest, np.uint8))
        self.asked.append(file.path)
        if file.path in self._fails:
            raise OSError(5, "refused", file.path)
        self.under_way.append(ticket)
        return ticket


class SlowTicket:
    def __init__(self, reader, *batch):
        self._reader, self.batch = reader, batch

    @property
    def memory(self):
        """Addresses that are written."""
        first, dest = self.batch[2].ctypes.data, self.batch[2].nbytes
        return first, first + dest

    def wait(self):
        if self in self._reader.under_way:
            self._reader.under_way.remove(self)
            file, spans, dest = self.batch
            self._reader._reader.submit(file, spans, dest.data).wait()


@pytest.mark.parametrize("kind", ["records", "parts"])
def test_landings_share_staging(units, record, kind):
    """Who comes later is read while nobody has waited for who came first, as far as there are pieces; batches under
    way never write the same memory, nor more than the buffer has."""
    path, data = units
    file, reader = File(path, direct=True), Slow()
    if kind == "records" and record.aligned:
        pytest.skip("lands in place")
    shared = Staging(STAGING_PIECES * least_staging(record), record)
    pools = [Slots(kind, record, shared) for _ in range(4)]
    rng = np.random.default_rng(4)
    for count in (1, 1, 2, 5, 40):
        under_way = []
        for slots in pools:
            picked = np.sort(rng.choice(UNITS, count, replace=False))
            into = rng.permutation(SLOTS)[:count]
            under_way.append(slots.rows.land(reader, file, picked, into))
            slots.want[into] = data[picked]
            places = sorted(ticket.memory for ticket in reader.under_way)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
            assert sum(end - begin for begin, end in places) <= shared.num_bytes
        asked = sum(len(ticket.batch[1]) for ticket in reader.under_way)
        assert len(reader.under_way) == STAGING_PIECES if count == 40 else asked >= len(pools)
        for i in rng.permutation(len(pools)):
            under_way[i].wait()
        for slots in pools:
            slots.assert_held()
        assert not reader.under_way
        assert not shared.landings


@pytest.mark.parametrize("when", ["asked", "waited for"])
def test_a_landing_that_fails_leaves_staging_to_others(tmp_path, when):
    record = RECORDS["across blocks"]
    raw = np.random.default_rng(0).integers(0, 256, (UNITS, record.stride), dtype=np.uint8)
    pad = bytes(-(HEADER_BYTES + raw.nbytes) % 4096)
    (tmp_path / "whole").write_bytes(bytes(HEADER_BYTES) + raw.tobytes() + pad)
    (tmp_path / "short").write_bytes(bytes(HEADER_BYTES))
    whole, short = File(tmp_path / "whole", direct=True), File(tmp_path / "short", direct=True)
    reader = Slow({short.path} if when == "asked" else ())
    shared = Staging(3 * least_staging(record), record)
    good, bad, other = (Slots("parts", record, shared) for _ in range(3))
    for order in permutations(range(3)):
        under_way = []
        for slots, file in ((good, whole), (bad, short), (other, whole)):
            under_way.append(slots.rows.land(reader, file, np.arange(20), np.arange(20)))
            if file is whole:
                slots.want[:20] = raw[:20, : record.num_bytes]
        for i in order:
            if i == 1:
                with pytest.raises(OSError, match="refused" if when == "asked" else "ends"):
                    under_way[i].wait()
            else:
                under_way[i].wait()
        good.assert_held()
        other.assert_held()
        assert not reader.under_way
        assert reader.asked.count(short.path) <= len(shared._pieces) < 10  # of ten rounds
        reader.asked.clear()
    for file in (whole, short):
        file.close()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "discrete"])
@pytest.mark.parametrize("name", ["packed", "aligned"])
def test_a_backend_says_whether_it_needs_staging(tmp_path, backend, name):
    """So that the budget has it: without any, land raises where it does."""
    record = RECORDS[name]
    (tmp_path / "layer").write_bytes(bytes(HEADER_BYTES + 8 * 4096))
    width = record.parts[0].shape[0]
    ffn = FFN("plain", "relu", record, width)
    made, reader, source = BACKENDS[backend](), make_reader(), Source(File(tmp_path / "layer", direct=True), {})
    rows = made.rows(ffn, 4, Staging(0, record))
    if made.is_staged(ffn):
        with pytest.raises(ValueError, match="staging"):
            rows.land(reader, source, np.arange(2), np.arange(2))
    else:
        rows.land(reader, source, np.arange(2), np.arange(2)).wait()
    reader.close()
    source.file.close()


@pytest.mark.parametrize("kind", ["records", "parts"])
def test_rows_move_and_are_taken_whole(units, record, kind):
    path, data = units
    file, reader = File(path), make_reader()
    one, other = (Slots(kind, record, Staging(least_staging(record), record)) for _ in range(2))
    for slots, first in ((one, 0), (other, 70)):
        slots.rows.land(reader, file, first + np.arange(SLOTS), np.arange(SLOTS)).wait()
        slots.want[:] = data[first : first + SLOTS]
    rng = np.random.default_rng(2)
    for _ in range(5):
        order = rng.permutation(SLOTS)
        one.rows.move(order[:20], order[20:40])
        one.want[order[20:40]] = one.want[order[:20]]
        into, sources = rng.permutation(SLOTS)[:15], rng.permutation(SLOTS)[:15]
        one.rows.take(into, other.rows, sources)
        one.want[into] = other.want[sources]
        one.assert_held()
        other.assert_held()
    reader.close()
    file.close()


def test_neighbours_on_disk_are_one_read_wherever_they_land(tmp_path):
    record = RECORDS["aligned"]
    raw = np.random.default_rng(0).integers(0, 256, (40, record.stride), dtype=np.uint8)
    (tmp_path / "layer").write_bytes(bytes(HEADER_BYTES) + raw.tobytes())
    file, reader = File(tmp_path / "layer", direct=True), make_reader()
    slots = Slots("records", record, Staging(1 << 20, record))
    picked, into = np.array([3, 4, 6, 10, 11, 30]), np.array([9, 2, 5, 0, 1, 7])
    slots.rows.land(reader, file, picked, into).wait()
    slots.want[into] = raw[picked, : record.num_bytes]
    slots.assert_held()
    assert reader.num_bytes == 6 * record.stride
    if reader.engine != "python":  # which reads a span at a time
        assert reader.num_reads == 4
    reader.close()
    file.close()


def test_a_record_larger_than_staging(units, record):
    file, reader = File(units[0]), make_reader()
    slots = Slots("parts", record, Staging(record.num_bytes - 1, record))
    with pytest.raises(ValueError, match="staging"):
        slots.rows.land(reader, file, np.arange(3), np.arange(3))
    reader.close()
    file.close()


@pytest.mark.parametrize("native", [False, True])
def test_copied_rows(monkeypatch, native):
    if not native:
        monkeypatch.setattr("mlxflash.pool.core", None)
    rng = np.random.default_rng(3)
    source, dest = rng.integers(0, 256, 4000, dtype=np.uint8), np.zeros(3000, np.uint8)
    slots, rows = rng.permutation(30)[:20], rng.integers(0, 90, 20)
    want = dest.copy()
    for slot, row in zip(slots, rows, strict=True):
        want[slot * 100 : slot * 100 + 77] = source[row * 41 : row * 41 + 77]
    copy_rows(dest.data, 100, slots, source.data, 41, rows, 77)
    np.testing.assert_array_equal(dest, want)


@pytest.mark.parametrize("size", [0, 1, 4097, (16 << 20) - 1, (16 << 20) + 5])
def test_host_memory(size):
    memory = host_memory(size)
    assert memory.nbytes >= size
    raw = np.frombuffer(memory, np.uint8)
    assert raw.ctypes.data % 4096 == 0
    assert not raw[:: max(1, size // 1000)].any()
    raw[:] = 1
