"""The landing law: whatever records look like and however little staging there is, every unit lands in its slot.

Units of a file of random records are landed in slots shaped like records and in slots by part; buffered and direct,
packed and aligned; with staging for one record or for all; one batch or several that share a staging buffer and wait
in any order. Rows nobody asked for keep what they held. `move` and `take` copy rows whole.
"""

import numpy as np
import pytest

from mlxflash.bundle import HEADER_BYTES, Part, Record, make_record
from mlxflash.pool import PartRows, RecordRows, Staging, copy_rows, host_memory
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
    shared = Staging(size)
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
    assert shared.user is None
    reader.close()
    file.close()


@pytest.mark.parametrize("kind", ["records", "parts"])
def test_rows_move_and_are_taken_whole(units, record, kind):
    path, data = units
    file, reader = File(path), make_reader()
    one, other = (Slots(kind, record, Staging(least_staging(record))) for _ in range(2))
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
    slots = Slots("records", record, Staging(1 << 20))
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
    slots = Slots("parts", record, Staging(record.num_bytes - 1))
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
