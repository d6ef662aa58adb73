"""Memory that the host does not share, on MLX's CPU device: what a GPU would make slow or wrong must not happen here.

    nothing looks at a pool from the host: what does is caught by its address, and the catch is tried out;
    rows change in place: no update copies a pool, and one that must (a slice is held) is counted;
    a decoded token waits for the device at most once per layer;
    the host tier holds what it says it holds, whatever is asked of it and whatever fails, nothing that the device holds
    too, and what it has is not read again.

Exactness on the same device is test_exactness.py's, as for every backend.
"""

import numpy as np
import pytest

import mixtures
from build import BACKENDS, Shape, load, prompt_of

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from test_exactness import assert_exact  # noqa: E402 isort: skip

from mlxflash.backends import cuda  # noqa: E402
from mlxflash.backends.cuda import DeviceBackend  # noqa: E402
from mlxflash.bundle import HEADER_BYTES, Part, make_record  # noqa: E402
from mlxflash.hosttier import HostTier  # noqa: E402
from mlxflash.model import load_bundle  # noqa: E402
from mlxflash.plan import BudgetError  # noqa: E402
from mlxflash.pool import Source  # noqa: E402
from mlxflash.reader import File, ReadError, make_reader  # noqa: E402

WIDE = Shape(d_model=512, ffn=1024, heads=8, dtype="float16", layers=3)


def decode(model, tokens, cache=None):
    cache = cache or make_prompt_cache(model)
    for token in tokens:
        mx.eval(model(mx.array([[token]]), cache=cache))
    return cache


class TouchedError(AssertionError):
    pass


@pytest.fixture
def guard(monkeypatch):
    """Arrays whose memory the host must not see; NumPy, memoryview and MLX's own ways out are watched."""
    forbidden = []
    view, asarray = memoryview, np.asarray

    def span(array):
        raw = asarray(view(array).cast("B"))
        return raw.ctypes.data, raw.ctypes.data + raw.nbytes

    def check(array):
        if isinstance(array, mx.array) and array.size:
            first, end = span(array)
            for pool in forbidden:
                begin, stop = span(pool)
                if first < stop and begin < end:
                    raise TouchedError

    def watched(call):
        def either(array, *more, **named):
            check(array)
            return call(array, *more, **named)

        return either

    for name in ("asarray", "array", "frombuffer", "ascontiguousarray"):
        monkeypatch.setattr(np, name, watched(getattr(np, name)))
    for name in ("item", "tolist", "__array__"):
        monkeypatch.setattr(mx.array, name, watched(getattr(mx.array, name)))
    monkeypatch.setattr("builtins.memoryview", type("Watched", (), {"__new__": lambda _, a: (check(a), view(a))[1]}))
    yield forbidden
    forbidden.clear()


@pytest.mark.parametrize("touch", ["asarray", "slice", "memoryview", "tolist"])
def test_the_guard_notices(guard, touch):
    pool = mx.zeros((8, 4))
    mx.eval(pool)
    guard.append(pool)
    np.asarray(pool + 1)
    with pytest.raises(TouchedError):
        {
            "asarray": lambda: np.asarray(pool),
            "slice": lambda: np.array(pool[2:3]),
            "memoryview": lambda: memoryview(pool),
            "tolist": pool.tolist,
        }[touch]()


@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("budget", ["whole", "part", "least"])
def test_nothing_touches_a_pool_from_the_host(library, guard, budget, predictor):
    with load(library.bundle(), "discrete", budget, predictor, window=None if predictor == "all" else 3) as model:
        flash = model.flash
        owners = {id(r): r for layer in flash.layers for r in (layer.rows, *layer.blocks.pair)}.values()
        for rows in owners:
            guard.extend(rows._pools.values())
        assert len(guard) > 4
        cache = make_prompt_cache(model)
        model(mx.array([prompt_of(40)]), cache=cache)
        decode(model, prompt_of(10), cache)
        flash.forget()
        decode(model, prompt_of(5))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("budget", ["part", "least"])
def test_no_update_copies_a_pool(library, budget, predictor, bits):
    with load(library.bundle(WIDE, bits), "discrete", budget, predictor, host_memory=200_000) as model:
        cache = make_prompt_cache(model)
        model(mx.array([prompt_of(40)]), cache=cache)
        decode(model, prompt_of(20), cache)
        traffic = model.flash.backend.traffic
        assert traffic.updates > 20
        assert traffic.bytes > 1_000_000
        assert traffic.pool_copies == 0


def test_a_copy_is_counted_and_does_no_harm(library):
    path = library.bundle(WIDE)
    with load(path, "discrete", "part") as model, load(path, "parts-copy", "part") as other:
        tokens = prompt_of(12)
        held = [pool[:5] for layer in model.flash.layers for pool in layer.rows._pools.values()]
        mx.eval(held)
        got, want = (
            [np.array(m(mx.array([[t]]), cache=c).astype(mx.float32)) for t in tokens]
            for m, c in ((m, make_prompt_cache(m)) for m in (model, other))
        )
        assert model.flash.backend.traffic.pool_copies > 0
        assert model.flash.stats(model.flash.snapshot(), 1).pool_copies == 0
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_peak_memory_is_not_forgotten(library):
    """The count of copies resets MLX's own peak."""
    with load(library.bundle(WIDE), "discrete", "part") as model:
        large = mx.zeros((1 << 22,))
        mx.eval(large)
        del large
        decode(model, prompt_of(5))
        assert max(mx.get_peak_memory(), model.flash.backend.peak_bytes) >= 1 << 24


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_token_waits_at_most_once_per_layer(library, look_ahead):
    """What a layer predicts for itself and for the next is waited for together."""
    with load(library.calibrated(WIDE), "discrete", "part", look_ahead=look_ahead) as model:
        cache = decode(model, prompt_of(10))
        before = model.flash.backend.traffic.syncs
        decode(model, prompt_of(10), cache)
        assert model.flash.backend.traffic.syncs - before <= 10 * WIDE.layers


# Experts


@pytest.fixture(scope="module", params=["qwen3_moe", "nemotron_h"])
def mixture(request, tmp_path_factory):
    """A quantised mixture's bundle, with a gate and without."""
    from mlxflash.converters import convert

    folder = tmp_path_factory.mktemp("mixture")
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    mixtures.write(folder / "m", request.param, "mlx", "float32", settings)
    convert(folder / "m", folder / "m.flash")
    return folder / "m.flash"


@pytest.mark.parametrize("budget", ["whole", "part", "least"])
def test_nothing_touches_experts_from_the_host(mixture, guard, budget):
    with load(mixture, "discrete", budget, None) as model:
        for layer in model.flash.layers:
            for rows in (layer.rows, *layer.blocks.pair):
                guard.extend(rows._pools.values())
        cache = make_prompt_cache(model)
        model(mx.array([prompt_of(40)]), cache=cache)
        decode(model, prompt_of(10), cache)
        model.flash.forget()
        decode(model, prompt_of(5))


def test_a_token_waits_for_the_choice_of_experts_only(mixture):
    """New experts of a layer go over together."""
    with load(mixture, "discrete", "part", None) as model:
        layers, traffic = len(model.flash.layers), model.flash.backend.traffic
        cache = decode(model, prompt_of(20))
        syncs, updates = traffic.syncs, traffic.updates
        decode(model, prompt_of(20, seed=3), cache)
        assert traffic.syncs - syncs <= 20 * layers
        assert 10 < traffic.updates - updates <= 20 * layers


def test_experts_come_back_from_the_host(mixture):
    """What the device gives up is copied to the host tier, not read again, and no pool is copied for it."""
    with load(mixture, "discrete", "part", None, host_memory="3MB") as model:
        cache = make_prompt_cache(model)
        model(mx.array([prompt_of(40)]), cache=cache)
        decode(model, prompt_of(20), cache)
        traffic, read = model.flash.backend.traffic, model.flash.snapshot().num_bytes
        back, hits = traffic.bytes_back, traffic.tier_hits
        decode(model, prompt_of(20, seed=3), cache)
        assert model.flash.snapshot().num_bytes == read > 0
        assert traffic.bytes_back > back
        assert traffic.tier_hits > hits
        assert traffic.pool_copies == 0


# Budgets


def test_a_budget_beyond_the_device_is_refused(library):
    backend = BACKENDS["discrete"]()
    backend.available_memory = lambda: 400_000
    with pytest.raises(BudgetError, match=r"does not fit this device, which has 400\.0 kB free: --memory"):
        load_bundle(library.bundle(), memory="1MB", backend=backend)
    with load_bundle(library.bundle(WIDE), memory=None, backend=DeviceBackend(mx.cpu)) as model:
        assert model.flash.plan.whole
        needed = model.flash.plan.memory
    backend.available_memory = lambda: needed
    with load_bundle(library.bundle(WIDE), memory=None, predictor="oracle", backend=backend) as model:
        assert 0.6 * needed < model.flash.plan.memory < 0.8 * needed  # as nobody said how much
        assert not model.flash.plan.whole
        text = model.flash.describe()
    assert "of device memory:" in text
    assert "of host memory:" in text


def test_out_of_device_memory_names_a_budget(library, monkeypatch):
    upload = cuda.upload

    def full(*_):
        raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")

    with load(library.bundle(), "discrete", "part") as model:
        decode(model, prompt_of(3))
        monkeypatch.setattr(cuda, "upload", full)
        model.flash.backend.available_memory = lambda: 1000
        with pytest.raises(BudgetError, match=r"ran out of memory with a budget of .*; --memory \d+MB leaves room"):
            decode(model, prompt_of(20, seed=5))
        monkeypatch.setattr(cuda, "upload", upload)
        decode(model, prompt_of(3))
    monkeypatch.setattr(cuda, "upload", full)
    backend = DeviceBackend(mx.cpu)
    with pytest.raises(RuntimeError, match="out of memory"):  # MLX's CPU device does not know what it has
        load_bundle(library.bundle(), backend=backend)
    backend.available_memory = lambda: 10**9
    with pytest.raises(BudgetError, match="ran out of memory"):
        load_bundle(library.bundle(), backend=backend)


def test_host_memory_is_for_devices_that_do_not_share_it(library):
    with pytest.raises(ValueError, match="devices with memory of their own"):
        load_bundle(library.bundle(), memory="1MB", host_memory="1MB", device="mlx-cpu")
    with load(library.bundle(), "discrete", "part", host_memory="300kB") as model:
        assert model.flash.plan.host_tier == 300_000
        assert "host tier" in model.flash.describe()


# The host tier

UNITS = 120
RECORDS = {
    "packed": make_record([Part("up", "float16", (24,), 0), Part("down", "float16", (24,), 0)]),
    "aligned": make_record([Part("up", "float32", (512,), 0), Part("down", "float32", (512,), 0)]),
}


@pytest.fixture(params=RECORDS)
def files(request, tmp_path):
    """Two bundle files' records: the record, their paths and uint8 [units, stride] each."""
    record, rng, made = RECORDS[request.param], np.random.default_rng(0), []
    for i in range(2):
        raw = rng.integers(0, 256, (UNITS, record.stride), dtype=np.uint8)
        (tmp_path / str(i)).write_bytes(bytes(HEADER_BYTES) + raw.tobytes() + bytes(-raw.nbytes % 4096 + 4096))
        made.append((tmp_path / str(i), raw))
    return record, made


class Counting:
    """A reader that counts the units it is asked for and fails when told to."""

    def __init__(self, stride):
        self.reader, self.stride, self.units, self.fail = make_reader(), stride, 0, False

    def submit(self, file, spans, dest):
        self.units += int(spans[:, 2].sum()) // self.stride
        ticket = self.reader.submit(file, spans, dest)
        if self.fail:
            ticket.wait()
            raise ReadError(5, "broken", file.path, 0, 0)
        return ticket


def lying(tier):
    return np.frombuffer(tier.rows.memory, np.uint8).reshape(-1, tier.record.stride)


class Owner:
    def finish(self):
        raise AssertionError("nobody else waits")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 30, 2 * UNITS])
def test_the_tier_brings_what_is_asked(files, kept, direct):
    record, made = files
    tier, reader, rng = HostTier(record, 40, kept), Counting(record.stride), np.random.default_rng(1)
    sources = [Source(File(path, direct), {}) for path, _ in made]
    if direct and not sources[0].file.direct:
        pytest.skip("this filesystem refuses direct reads")
    under_way, asked = [], 0
    for _ in range(300):
        which = int(rng.integers(2))
        units = np.sort(rng.choice(UNITS, int(rng.integers(1, tier.chunk + 1)), replace=False))
        visit = tier.bring(reader, sources[which], units, bool(rng.random() < 0.5), Owner())
        if visit is None:
            assert under_way
        else:
            asked += len(units)
            under_way.append((visit, made[which][1][units]))
        while under_way and (visit is None or rng.random() < 0.6):
            done, want = under_way.pop(0)
            done.wait()
            np.testing.assert_array_equal(lying(tier)[done.slots], want)
            done.leave(lambda: None)
            if visit is None:
                break
        given = rng.choice(UNITS, int(rng.integers(1, 20)), replace=False)  # what a window gives up, from time to time
        places = tier.places(len(given))
        assert len(places) == len(np.unique(places)) <= kept
        given = given[: len(places)]
        lying(tier)[tier.passing + places, : record.num_bytes] = made[which][1][given]
        tier.keep(sources[which], given, places)
    if not direct or record.aligned:
        assert reader.units == asked if kept == 0 else reader.units < asked
        assert kept < 2 * UNITS or reader.units < asked / 2
    for source in sources:
        source.file.close()


def bring(tier, reader, source, units, takes):
    """How many units were read for it."""
    before = reader.units
    visit = tier.bring(reader, source, np.array(units), takes, Owner())
    visit.wait()
    raw = np.fromfile(source.file.path, np.uint8, UNITS * tier.record.stride, offset=HEADER_BYTES)
    np.testing.assert_array_equal(lying(tier)[visit.slots], raw.reshape(UNITS, -1)[units])
    visit.leave(lambda: None)
    return reader.units - before


def give(tier, source, units):
    """How many of the units that a device gives up there is a place for."""
    places = tier.places(len(units))
    raw = np.fromfile(source.file.path, np.uint8, UNITS * tier.record.stride, offset=HEADER_BYTES)
    lying(tier)[tier.passing + places] = raw.reshape(UNITS, -1)[units][: len(places)]
    tier.keep(source, np.array(units)[: len(places)], places)
    return len(places)


def test_what_failed_is_not_kept(files):
    record, made = files
    tier, reader = HostTier(record, 40, 60), Counting(record.stride)
    source = Source(File(made[0][0]), {})
    reader.fail = True
    for _ in range(9):  # more than would fit if they stayed in use
        with pytest.raises(ReadError):
            tier.bring(reader, source, np.arange(8), False, Owner())
    reader.fail, reader.units = False, 0
    assert bring(tier, reader, source, range(8), False) == 8
    assert bring(tier, reader, source, range(8), False) == 0
    source.file.close()


def test_nothing_is_in_both_memories(files):
    record, made = files
    tier, reader = HostTier(record, 40, 10), Counting(record.stride)
    source, other = (Source(File(path), {}) for path, _ in made)
    assert bring(tier, reader, source, range(10), True) == 10
    assert bring(tier, reader, source, range(10), True) == 10  # it went to the device, not into the tier
    assert give(tier, source, [5, 3, 7, 4]) == 4
    assert bring(tier, reader, source, range(3, 8), False) == 1  # a stream leaves it, and 6 stays while there is room
    assert bring(tier, reader, source, range(3, 8), True) == 0
    assert bring(tier, reader, source, range(3, 8), True) == 5
    assert give(tier, source, range(10)) == 10
    assert bring(tier, reader, other, range(10), False) == 10  # no room for it
    assert bring(tier, reader, other, range(10), False) == 10
    assert give(tier, other, [8, 9]) == 2  # in the place of who has been there longest
    assert bring(tier, reader, source, range(10), False) == 2
    assert bring(tier, reader, other, [8, 9], True) == 0
    for s in (source, other):
        s.file.close()


def test_places_in_use_are_nobody_elses(files):
    record, made = files
    tier, reader = HostTier(record, 40, 6), Counting(record.stride)
    source = Source(File(made[0][0]), {})
    give(tier, source, range(6))
    visit = tier.bring(reader, source, np.arange(4), True, Owner())  # the device will copy these
    assert len(tier.places(6)) == 2
    visit.wait()
    visit.leave(lambda: None)
    assert len(tier.places(6)) == 4
    assert len(tier.places(6)) == 0
    tier.reset()
    assert len(tier.places(6)) == 6
    source.file.close()


@pytest.mark.parametrize(("predictor", "bits", "look_ahead"), [
    ("all", None, False), ("all", 4, False), ("oracle", None, False), ("oracle", 4, False), ("oracle", None, True),
])  # fmt: skip
@pytest.mark.parametrize("host_memory", [1_000, 40_000, 1_000_000])
def test_exact_with_a_host_tier(library, host_memory, predictor, bits, look_ahead):
    """And what the tier has is not read: with room for all, a second text reads next to nothing."""
    shape = Shape(dtype="float16", layers=3)
    path = library.calibrated(shape) if look_ahead else library.bundle(shape, bits)
    with load(path, "discrete", "part", predictor, host_memory=host_memory, look_ahead=look_ahead) as model:
        for seed in range(3):
            model(mx.array([prompt_of(20, seed=seed)]), cache=make_prompt_cache(model))
            assert_exact(model, path, prompt_of(30, seed=seed))
        before = model.flash.snapshot()
        assert_exact(model, path, prompt_of(30, seed=1))
        traffic, read = model.flash.backend.traffic, model.flash.stats(before, 30)
        assert traffic.pool_copies == 0
        assert traffic.tier_hits > 0 or host_memory < 40_000
        if host_memory == 1_000_000:
            assert read.tier_hit_rate > 0.9
            assert read.bytes_per_token < 0.1 * read.transfer_bytes
