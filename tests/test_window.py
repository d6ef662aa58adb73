"""The window's laws: what its maps claim is what its memory holds, whatever is asked of it and whatever fails.

A fake memory holds unit ids. It forgets a row when a read towards it starts, shows the unit when the read ends, and
refuses to be touched while a computation still reads it. A plain model beside it knows each unit's uses. Random
requests, corrections, prompts, failures and interruptions must leave, after every step:

    maps that are inverse and dense (`check`), and in every live row the unit that the maps name;
    hits and misses counted as the units were held or not;
    every unit of the token in a row, or left for another turn; all turns together bring every unit exactly once;
    victims that are worth least by the policy's plain words (the longest unused, or the fewest uses, each counting
    less with its age), none of them the token's own; none at all while there is room;
    with a span, no unit held that the last `span` tokens did not use;
    after a failure nothing in flight, and no unit held whose bytes did not arrive.

Below it the same promise for the real memories: what lies in rows that are not live never reaches a result.
"""

import contextlib

import numpy as np
import pytest

from build import BACKENDS, Shape, load, prompt_of

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlxflash.policy import DECAY, Frequency, Recency  # noqa: E402
from mlxflash.window import Window  # noqa: E402

GARBAGE = -7
ROUNDING = 1e-5  # of float32 sums


class Interrupted(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


class FakeRows:
    """Memory of unit ids; `failing` says what becomes of each landing: None, "start", "end" or "interrupt"."""

    def __init__(self, capacity, failing=lambda: None):
        self.capacity = capacity
        self.memory = np.full(capacity, GARBAGE)
        self.flying = np.zeros(capacity, bool)
        self.read = False  # a computation on the rows is not finished
        self.failing = failing
        self.settled = 0

    def settle(self, discard=False):
        self.settled += self.read
        self.read = False

    def land(self, reader, source, units, slots):
        assert len(units) == len(slots) == len(np.unique(slots)) == len(np.unique(units)) > 0
        assert (np.diff(units) > 0).all()
        self._free(slots)
        fate = self.failing()
        if fate == "start":
            raise OSError(5, "cannot start")
        self.memory[slots] = GARBAGE
        self.flying[slots] = True
        return FakeLanding(self, units.copy(), slots.copy(), fate)

    def move(self, sources, slots):
        assert not np.isin(sources, slots).any()
        self._free(np.concatenate((sources, slots)))
        self.memory[slots] = self.memory[sources]
        self.memory[sources] = GARBAGE

    def take(self, slots, other, sources):
        assert len(np.unique(slots)) == len(slots) == len(sources)
        self._free(slots)
        self.memory[slots] = other.memory[sources]

    def _free(self, slots):
        assert not self.read, "a row is changed that a computation may still read"
        assert not self.flying[slots].any(), "a row is changed while bytes arrive in it"


class FakeLanding:
    def __init__(self, rows, units, slots, fate):
        self._rows, self._units, self._slots, self._fate = rows, units, slots, fate

    def wait(self):
        if self._fate == "interrupt":
            self._fate = None
            raise Interrupted
        self._rows.flying[self._slots] = False
        half = len(self._units) // 2 if self._fate else len(self._units)
        self._rows.memory[self._slots[:half]] = self._units[:half]
        if self._fate:
            raise OSError(5, "cannot end")


class World:
    """A window on fake memory and the plain model of what it may hold."""

    def __init__(self, seed, span=None, decay=None, failures=0.0):
        self.rng = np.random.default_rng(seed)
        self.units = int(self.rng.integers(5, 60))
        self.rows = FakeRows(int(self.rng.integers(1, self.units + 1)), self.fate)
        policy = None if span or decay == DECAY else Frequency(self.units, decay) if decay else Recency(self.units)
        self.window = Window(self.units, self.rows, None, None, span, policy)
        self.span, self.decay, self.failures = span, decay, failures
        self.uses = {}  # unit: the tokens that used it, ascending
        self.token = 0
        self.seen = set()  # what happened at all

    def fate(self):
        if self.rng.random() >= self.failures:
            return None
        return self.rng.choice(["start", "end", "interrupt"], p=[0.2, 0.6, 0.2])

    def last(self, unit):
        return self.uses[unit][-1]

    def worth(self, unit):
        if self.decay is None:
            return float(self.last(unit))
        return sum(self.decay ** (self.token - token) for token in self.uses[unit])

    def held(self):
        return set(self.window.unit_at[: self.window.num_rows].tolist())

    def assert_sound(self, flying=False):
        window = self.window
        window.check()
        if not flying:
            assert not self.rows.flying.any()
            assert self.rows.memory[: window.num_rows].tolist() == window.unit_at[: window.num_rows].tolist()

    def some_units(self):
        """Ids as predictors give them: near the previous token's, sometimes none, sometimes all."""
        count = int(self.rng.integers(0, self.units + 1) * self.rng.choice([0.1, 0.3, 1.0]))
        if self.rng.random() < 0.5:
            recent = sorted(self.uses, key=self.last)[-count:]
            return np.unique(np.array(recent, np.int64))
        return np.sort(self.rng.choice(self.units, count, replace=False))

    def use(self, ids, token):
        for unit in ids.tolist():
            tokens = self.uses.setdefault(unit, [])
            if tokens[-1:] != [token]:  # a correction names units again
                tokens.append(token)

    def assert_counted(self, counted, ids, held):
        """Hits and misses since `counted` are what ids, none of them counted yet, found in `held`."""
        now = self.window.num_hits, self.window.num_misses
        hits = len(held & set(ids.tolist()))
        assert (now[0] - counted[0], now[1] - counted[1]) == (hits, len(ids) - hits)

    def assert_victims(self, before, after, ids, first):
        """From `before` to `after` only those worth least left, none of the `first` known ids, none without need.

        What a correction names may have been given up before it was named.
        """
        assert not (before - after) & set(first.tolist())
        ids = set(ids.tolist())
        gone = before - after - ids
        kept = (before & after) - ids
        if gone and kept:
            assert max(map(self.worth, gone)) <= min(map(self.worth, kept)) * (1 + ROUNDING)
        young = {u for u in before if self.span is None or self.last(u) > self.token - self.span}
        assert len(after) == min(self.rows.capacity, len(young | ids))
        self.seen |= {"victims"} if young - after else {"room"}
        if self.span is not None:
            assert all(self.last(u) > self.token - self.span for u in after)
            self.seen |= {"dropped"} if before - young - after - ids else set()

    def decode(self):
        """One token: request, perhaps a correction, all its turns."""
        window = self.window
        lossy = self.failures and self.rng.random() < 0.5  # an abandoned ticket may lose units only now
        if self.failures and not lossy:
            window.drain()
        before, counted = self.held(), (window.num_hits, window.num_misses)
        ids = first = self.some_units()
        self.token += 1
        self.use(ids, self.token)
        ticket = window.request(ids)
        if not lossy:
            self.assert_counted(counted, ids, before)
        self.assert_sound(flying=True)
        if self.rng.random() < 0.2:
            self.seen.add("abandoned")
            return
        more = None
        if self.rng.random() < 0.4:
            more = np.setdiff1d(self.some_units(), ids) if self.rng.random() < 0.5 else self.some_units()
            held, counted = self.held(), (window.num_hits, window.num_misses)
            self.use(more, self.token)
            window.add(ticket, more)
            self.seen.add("corrected")
            self.assert_counted(counted, np.setdiff1d(more, ids), held)
            ids = np.union1d(ids, more)
            if self.rng.random() < 0.5:
                more = None
        self.assert_here(window.arriving(ticket))
        here = None if more is not None else window.unit_at[: window.num_rows][~window.arriving(ticket)].tolist()
        n = window.ready(ticket, more)
        assert here is None or set(here) <= self.held()
        assert n == window.num_rows
        self.assert_sound()
        after = self.held()
        if not lossy:
            self.assert_victims(before, after, ids, first)
        turns = [u for u in after if u in ids]
        assert set(turns) | set(ticket.left.tolist()) == set(ids.tolist())
        self.compute()
        while len(ticket.left):
            self.seen.add("turns")
            before = self.held()
            new = window.next(ticket)
            self.assert_sound()
            assert len(new) == window.num_rows == self.rows.capacity
            turns += window.unit_at[new].tolist()
            gone, kept = before - self.held(), before & self.held()
            if kept:
                self.seen.add("kept in a turn")
                assert max(map(self.worth, gone)) <= min(map(self.worth, kept)) * (1 + ROUNDING)
            self.compute()
        assert sorted(turns) == ids.tolist()

    def assert_here(self, arriving):
        """What is not on its way is in its row, and may be computed while the rest comes."""
        window = self.window
        here = np.flatnonzero(~arriving)
        assert len(arriving) == window.num_rows
        assert not self.rows.flying[here].any()
        assert self.rows.memory[here].tolist() == window.unit_at[here].tolist()
        self.seen |= {"computed early"} if 0 < len(here) < len(arriving) else set()

    def compute(self):
        self.rows.read = self.rng.random() < 0.7

    def prompt(self):
        """A prompt streams by: rows held are touched, others admitted from a block."""
        window = self.window
        count = int(self.rng.integers(1, 9))
        first = window.advance(count)
        assert first == self.token + 1
        self.token += count
        before = self.held()
        self.touch(window.unit_at[: window.num_rows].copy(), first)
        streamed = self.rng.permutation([u for u in range(self.units) if u not in before]).astype(np.int64)
        streamed = np.sort(streamed[: int(self.rng.integers(0, len(streamed) + 1))])
        block = FakeRows(len(streamed))
        block.memory[:] = streamed
        used = np.flatnonzero(self.touch(streamed, first))
        self.compute()
        window.admit(streamed[used], block, used)
        coming = set(streamed[used].tolist())
        self.assert_sound()
        after = self.held()
        assert after <= before | coming
        best = sorted(map(self.worth, before | coming), reverse=True)[: self.rows.capacity]
        np.testing.assert_allclose(sorted(map(self.worth, after), reverse=True), best, rtol=ROUNDING)
        self.seen |= {"admitted"} if after & coming else set()
        self.seen |= {"refused"} if coming - after else set()

    def touch(self, ids, first):
        """Tokens from `first` on use some of `ids`; returns which are used at all."""
        used = self.rng.random((self.token - first + 1, len(ids))) < self.rng.choice([0.05, 0.3])
        self.window.touch(ids, used, first)
        for token, row in enumerate(used, first):
            self.use(ids[row], token)
        return used.any(axis=0)

    def clear(self):
        self.compute()
        self.window.clear()
        self.uses = {}
        assert self.window.num_rows == 0
        self.assert_sound()

    def drain(self):
        self.window.drain()
        self.assert_sound()

    def come_to_rest(self):
        while self.window._pending is not None:
            with contextlib.suppress(Interrupted):
                self.window.drain()
        self.assert_sound()

    def step(self):
        """Anything; a failure may surface, and then what is held must be true."""
        action = self.rng.choice(["decode", "prompt", "clear", "drain"], p=[0.8, 0.12, 0.03, 0.05])
        uses = {unit: tokens.copy() for unit, tokens in self.uses.items()}
        try:
            getattr(self, action)()
            return
        except OSError as error:
            self.seen.add(error.strerror)
            if error.strerror == "cannot start":
                self.come_to_rest()
        except Interrupted:
            self.seen.add("interrupt")
            self.window.check()
            if self.rng.random() < 0.5:
                self.come_to_rest()
            else:  # nothing that was under way is trusted
                self.rows.flying[:] = self.rows.read = False
                self.window.reset()
                self.uses, uses = {}, {}
                assert self.window.num_rows == 0
        self.assert_sound()
        if self.window._token < self.token:  # it was the last ticket's rest that was cut off
            self.token, self.uses = self.window._token, uses


@pytest.mark.parametrize(
    ("span", "decay"),
    [(None, None), (None, DECAY), (None, 0.9), (None, 0.5), (1, None), (2, None), (5, None), (8, None)],
)
def test_any_sequence(span, decay):
    seen = set()
    for seed in range(60):
        world = World(seed, span, decay)
        for _ in range(40):
            world.step()
        seen |= world.seen
    wanted = {"victims", "room", "computed early", "abandoned", "corrected", "turns", "admitted", "refused"}
    wanted |= {"kept in a turn"}
    assert seen == wanted | ({"dropped"} if span else set())


@pytest.mark.parametrize(("span", "decay"), [(None, None), (None, 0.7), (3, None)])
def test_any_sequence_with_failures(span, decay):
    seen = set()
    for seed in range(50):
        world = World(seed, span, decay, failures=0.2)
        for _ in range(40):
            world.step()
        seen |= world.seen
        world.come_to_rest()
        world.failures = 0.0
        for _ in range(5):  # and it works again
            world.decode()
    assert {"cannot start", "cannot end", "interrupt", "victims", "turns", "admitted"} <= seen


@pytest.mark.parametrize("decay", [0.5, 0.9, DECAY])
def test_scores_are_decayed_counts(decay):
    """Over thousands of tokens, so that scores change their origin many times; and wherever tokens start."""
    rng = np.random.default_rng(3)
    early, late, counts = Frequency(50, decay), Frequency(50, decay), np.zeros(50)
    late.use(np.arange(50), 5)
    late.reset()
    for token in range(1, 5000):
        ids = np.flatnonzero(rng.random(50) < np.linspace(0.001, 0.5, 50))
        early.use(ids, token)
        late.use(ids, token + 10**6)
        counts *= decay
        counts[ids] += 1
        if token % 7 == 0:
            worth = early.worth(np.arange(50)).astype(np.float64)
            np.testing.assert_allclose(worth / worth.max(), counts / counts.max(), rtol=1e-4, atol=1e-30)
            np.testing.assert_array_equal(late.worth(np.arange(50)), early.worth(np.arange(50)))


def test_who_returns_is_remembered():
    window = Window(5, FakeRows(3), None, None)

    def held(*ids):
        window.ready(window.request(np.array(ids)))
        return sorted(window.unit_at.tolist())

    for _ in range(4):
        held(0)
    for _ in range(2):
        assert held(1, 2, 3) == [1, 2, 3]
    others = held(0)[1:]
    assert held(*others) == [0, *others]
    assert held(4)[0] == 0  # the longest unused, and used once since its return; the others three times


def test_computations_are_settled_before_rows_change():
    world = World(1)
    for _ in range(100):
        world.step()
    assert world.rows.settled > 10


@pytest.mark.parametrize("fate", [None, "start", "end", "interrupt"])
def test_held_from_the_start(fate):
    fates = iter([None, fate])
    rows = FakeRows(20, lambda: next(fates, None))
    window = Window(30, rows, None, None)
    window.hold(np.arange(3, 10))
    if fate is None:
        window.hold(np.arange(12, 15))
    else:
        with pytest.raises(Interrupted if fate == "interrupt" else OSError):
            window.hold(np.arange(12, 15))
        window.drain()
    window.check()
    live = window.unit_at[: window.num_rows]
    arrived = fate in (None, "interrupt")
    assert live.tolist() == [*range(3, 10), *(range(12, 15) if arrived else ())]
    assert rows.memory[: len(live)].tolist() == live.tolist()


@contextlib.contextmanager
def memory_of(rows):
    """Bytes of a real memory to change, [slots, bytes] per array: its parts or records, and what is resident per unit.

    A device's are copies that go back at the end.
    """
    if hasattr(rows, "_pools"):
        copies = {name: np.array(pool.view(mx.uint8)) for name, pool in rows._pools.items()}
        yield [raw.reshape(rows.capacity, -1) for raw in copies.values()]
        for name, pool in rows._pools.items():
            rows._pools[name] = mx.array(copies[name].reshape(rows.capacity, -1)).view(pool.dtype).reshape(pool.shape)
        mx.eval(rows._pools)
        return
    inner = rows._memory
    views = [inner.memory] if hasattr(inner, "memory") else [view for _, view in inner._parts]
    raw = [np.frombuffer(view, np.uint8).reshape(rows.capacity, -1) for view in views]
    yield raw + [array.view(np.uint8).reshape(rows.capacity, -1) for array in rows._resident.values()]


def spoil(rows, live, how, row=0):
    """Fill every row from `live` on with NaN, or with copies of row `row`."""
    with memory_of(rows) as memory:
        for raw in memory:
            raw[live:] = 0xFF if how == "nan" else raw[row].copy()


def numbers(array):
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("how", ["nan", "duplicates"])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", None), ("float16", None), ("bfloat16", None), ("float16", 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stale_rows_do_not_matter(library, backend, dtype, bits, how):
    path = library.bundle(Shape(dtype=dtype), bits)
    with load(path, backend, "part") as model:
        layer = model.flash.layers[1]
        kind = model.flash.backend.activation_dtype(model.flash.bundle.manifest)
        x = mx.random.normal((3, 64), key=mx.random.key(0)).astype(kind)
        layer.window.hold(np.arange(20, 120))
        _, active = layer.rows.ffn(x, 100, watch=3)
        strong = int(active[0].argmax())
        assert active[0, strong]
        for n, tokens in ((100, 3), (100, 1), (37, 1), (1, 2), (0, 1)):
            clean, active = layer.rows.ffn(x[:tokens], n, watch=1)
            clean = numbers(clean)
            assert n < 30 or np.abs(clean).max() > 0.1
            with memory_of(layer.rows) as memory:
                held = [raw.copy() for raw in memory]
            layer.rows.settle()
            spoil(layer.rows, n, how, strong)
            again, active_again = layer.rows.ffn(x[:tokens], n, watch=1)
            np.testing.assert_array_equal(numbers(again), clean)
            np.testing.assert_array_equal(active_again, active)
            with memory_of(layer.rows) as memory:
                for raw, old in zip(memory, held, strict=True):
                    raw[:] = old
        clean = numbers(layer.rows.ffn(x, 99)[0])
        spoil(layer.rows, 99, "duplicates", strong)  # and a live row does matter
        assert not np.array_equal(numbers(layer.rows.ffn(x, 100)[0]), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_left_out_do_not_matter(library, backend):
    with load(library.bundle(), backend, "part") as model:
        layer = model.flash.layers[0]
        x = mx.random.normal((3, 64), key=mx.random.key(0))
        layer.window.hold(np.arange(100))
        keep = np.arange(100) % 3 != 0
        want = np.array(layer.rows.ffn(x, 100, keep)[0])
        everything = np.array(layer.rows.ffn(x, 100)[0])
        assert np.abs(want - everything).max() > 0.1
        layer.rows.settle()
        with memory_of(layer.rows) as memory:
            for raw in memory:
                raw[:100][~keep] = raw[1]
        np.testing.assert_array_equal(np.array(layer.rows.ffn(x, 100, keep)[0]), want)
        if layer.rows.leaves_out_free:  # not even read: bytes may be on their way there
            with memory_of(layer.rows) as memory:
                for raw in memory:
                    raw[:100][~keep] = 0xFF
            np.testing.assert_array_equal(np.array(layer.rows.ffn(x, 100, keep)[0]), want)


@pytest.mark.parametrize("how", ["nan", "duplicates"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stale_rows_do_not_matter_while_decoding(library, backend, how):
    """Every token finds all memory that is not live spoilt, the streaming blocks included."""

    def logits(before_token):
        with load(library.bundle(), backend, "room", window=2) as model:
            cache, out = make_prompt_cache(model), []
            prompt = prompt_of(30)
            model(mx.array([prompt[:10]]), cache=cache)
            for token in prompt[10:]:
                before_token(model)
                out.append(np.array(model(mx.array([[token]]), cache=cache)))
            return out

    def spoil_all(model):
        mx.eval(model.parameters())
        for layer in model.flash.layers:
            layer.rows.settle()
            assert layer.window.num_rows < layer.rows.capacity
            spoil(layer.rows, layer.window.num_rows, how)
            for block in layer.blocks.pair:
                spoil(block, 0, how)

    np.testing.assert_array_equal(logits(spoil_all), logits(lambda model: None))
