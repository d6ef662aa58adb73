"""The FFN that stands where mlx-lm had an MLP: which units, bring them, compute.

One token goes `predictor -> window -> rows`, and so do a few when the union of what they need is read sooner than all
the rest. A prompt, or a layer whose every unit is needed, goes through `_stream`: the rows held are computed where they
are, all others pass by in large blocks, so the result is exact.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import Rows
from mlxflash.diskprofile import DiskProfile
from mlxflash.pool import Landing, Source
from mlxflash.predictor import Ids, Predictor
from mlxflash.reader import Reader
from mlxflash.sketch import Sketch
from mlxflash.window import Ticket, Window

FEW_TOKENS = 64  # up to so many, the union of what they need may be less than everything
UNKNOWN_DISK_PENALTY = 3  # how many times longer a random record takes than a streamed one, where nobody measured
SEED_TOKENS = 8  # of a prompt: their active units are worth more than older ones'; the pool's size has the last word


@dataclass
class Block:
    """Some of the units that a layer lacks, on their way to a buffer or still to be asked for."""

    layer: "FlashLayer"
    held: np.ndarray  # what the layer held when its blocks were planned
    units: np.ndarray
    buffer: int = -1
    landing: Landing | None = None


class Blocks:
    """Two buffers that every layer's stream takes in turn: while one is computed the other is read.

    Where it is known that the next layer streams as well, its first blocks are asked for as soon as a buffer is free,
    so that the disk works through attention, norms and sampling too. `gap` is how many held records between two wanted
    ones are cheaper to read again than to step over.
    """

    def __init__(self, pair: tuple[Rows, Rows], gap: int):
        self.pair, self._gap = pair, gap
        self._plans: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}  # of layers, by id: what was held, blocks
        self._now: FlashLayer | None = None
        self._last: FlashLayer | None = None  # whose blocks were planned last
        self.reset()

    def start(self, layer: "FlashLayer", held: np.ndarray, goes_on: bool) -> None:
        """Begin to read what `layer` lacks, unless that was begun; `held`, bool [units], is what it does not lack.
        `goes_on`: the layer after it streams next."""
        if not self._queue or self._queue[0].layer is not layer or not np.array_equal(self._queue[0].held, held):
            self.drain()
            self._plan(layer, held)
        self._now, self._goes_on = layer, goes_on
        self._fill()

    def stream(self) -> Iterator[tuple[Rows, np.ndarray]]:
        """What `start` began, block by block: rows [0, n) and which units they are. A block's memory is written again
        as soon as the next one is asked for."""
        layer = self._now
        while layer is not None and self._queue and self._queue[0].layer is layer:
            block = self._queue.popleft()
            assert block.landing is not None
            begin = time.perf_counter()
            block.landing.wait()
            layer.times.flash += time.perf_counter() - begin
            yield self.pair[block.buffer], block.units
            self._free.append(block.buffer)
            self._fill()

    def drain(self) -> None:
        """Let reads that nobody waits for any more come to rest, and forget them."""
        for block in self._queue:
            if block.landing is not None:
                with contextlib.suppress(OSError):
                    block.landing.wait()
        self.reset()

    def reset(self) -> None:
        """Forget reads that are known to have come to rest."""
        self._queue: deque[Block] = deque()
        self._free = [0, 1]
        self._now = self._last = None
        self._goes_on = False

    def _plan(self, layer: "FlashLayer", held: np.ndarray) -> None:
        plan = self._plans.get(id(layer))
        if plan is None or not np.array_equal(plan[0], held):
            plan = self._plans[id(layer)] = held, _blocks(held, self.pair[0].capacity, self._gap)
        self._queue.extend(Block(layer, held, units) for units in plan[1])
        self._last = layer

    def _fill(self) -> None:
        """Ask for blocks while a buffer is free."""
        while self._free:
            block = next((block for block in self._queue if block.landing is None), None)
            if block is not None:
                block.buffer = self._free.pop(0)
                rows, slots = self.pair[block.buffer], np.arange(len(block.units))
                block.landing = rows.land(block.layer.reader, block.layer.source, block.units, slots)
                continue
            after = self._last.after if self._last is not None and self._goes_on else None
            if after is None or after is self._now or any(block.layer is after for block in self._queue):
                return
            self._plan(after, after.window.slot_of >= 0)


@dataclass
class Times:
    """Where a model's time went, in seconds; flash is asking for reads and waiting, manage is window upkeep."""

    flash: float = 0.0
    manage: float = 0.0
    predict: float = 0.0


@dataclass
class FlashLayer:
    """What one layer's FFN works with."""

    units: int
    source: Source
    rows: Rows
    window: Window
    blocks: Blocks
    reader: Reader
    predictor: Predictor | None  # None: every unit is needed
    down_bias: mx.array | None
    times: Times
    stride: int  # bytes from record to record on disk
    extent: int  # bytes that one unit reads there
    sketch: Sketch | None = None  # the predictor, where its activations are computed with
    disk: DiskProfile | None = None  # None: not measured
    next: "FlashLayer | None" = None
    after: "FlashLayer | None" = None  # the layer that streams next, when this one streamed
    ahead: Predictor | None = None  # what the next layer will need, from this one's input
    ticket: Ticket | None = None  # units that the layer before asked for
    num_decoded: int = 0  # tokens that went through the window
    fixed: bool = False  # what the window holds is there to stay
    predicted: bool = False  # rows that are held and not predicted are left out


class Warming:
    """Predicts what a level reads with nothing held, until a window holds as many rows as another counts on."""

    def __init__(self, cold: Predictor, warm: Predictor, window: Window, rows: int):
        self._cold, self._warm, self._window, self._rows = cold, warm, window, rows
        self.nbytes = warm.nbytes

    def start(self, x: mx.array) -> Ids:
        """As Predictor's."""
        return (self._warm if self._window.num_rows >= self._rows else self._cold).start(x)


class FlashFFN(nn.Module):
    """x [batch, tokens, d_model] to the FFN's output, of the same shape and dtype."""

    def __init__(self, layer: FlashLayer):
        super().__init__()
        self._layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        layer = self._layer
        if layer.reader.closed:
            raise ValueError("this model is closed; load it again")
        tokens = x.reshape(-1, x.shape[-1])
        sparse = layer.predictor is not None and len(tokens) <= FEW_TOKENS
        if layer.window.num_rows == layer.units and layer.ticket is None and not (sparse and layer.predicted):
            y = self._held(tokens)
        else:
            y = self._sparse(tokens) if sparse else self._stream(tokens)
        if layer.down_bias is not None:
            y = y + layer.down_bias
        return y.astype(x.dtype).reshape(x.shape)

    def _held(self, x: mx.array) -> mx.array:
        """Everything is here."""
        layer = self._layer
        if layer.sketch is not None:
            layer.sketch.start(x)()
        return self._rows(layer.rows, x, layer.window.unit_at)[0]

    def _rows(
        self, rows: Rows, x: mx.array, units: np.ndarray, keep: np.ndarray | None = None, watch: int = 0
    ) -> tuple[mx.array, np.ndarray | None]:
        """rows.ffn of the first rows, which are `units`; with the activations that a sketch gave for x."""
        sketch = self._layer.sketch
        if sketch is not None:
            return rows.ffn(np.take(sketch.hidden, units, axis=1), len(units), keep, watch)
        return rows.ffn(x, len(units), keep, watch)

    def _sparse(self, x: mx.array) -> mx.array:
        layer, times = self._layer, self._layer.times
        assert layer.predictor is not None
        clock = time.perf_counter
        t0 = clock()
        late = layer.predictor.start(x)
        early = layer.ahead.start(x) if layer.ahead is not None else None
        ids = late()
        t1 = clock()
        if len(x) > 1 and self._streams_faster(ids):
            times.predict += t1 - t0
            return self._stream(x)
        asking = layer.reader.submitting
        ticket, layer.ticket = layer.ticket, None
        if ticket is None:
            ticket = layer.window.request(ids)
        else:
            layer.window.add(ticket, ids)
        t2 = clock()
        times.predict += t1 - t0
        times.manage += t2 - t1
        if early is not None and layer.next is not None:  # its reads queue behind this layer's
            others = early()
            t3 = clock()
            layer.next.ticket = layer.next.window.request(others)
            times.predict += t3 - t2
            t2 = clock()
            times.manage += t2 - t3
        asked = layer.reader.submitting - asking
        times.flash += asked
        times.manage -= asked
        y, arriving = None, None
        unit_at = layer.window.unit_at
        if layer.rows.leaves_out_free:  # rows that are here are computed while the others are on their way
            arriving = layer.window.arriving(ticket)
            if not arriving.all():
                y, _ = self._rows(layer.rows, x, unit_at[: len(arriving)], self._computed(ids, ~arriving))
        t2 = clock()
        n = layer.window.ready(ticket)
        times.flash += clock() - t2
        layer.num_decoded += len(x)
        if y is None:
            y, _ = self._rows(
                layer.rows, x, unit_at[:n], self._computed(ids, np.ones(n, bool)) if layer.predicted else None
            )
        elif arriving is not None and arriving.any():
            y = y + self._rows(layer.rows, x, unit_at[:n], self._computed(ids, arriving))[0]
        while len(ticket.left):  # the pool is smaller than this token: the rest replaces some of what is computed
            mx.eval(y)
            t2 = clock()
            new = layer.window.next(ticket)
            times.flash += clock() - t2
            y = y + self._rows(layer.rows, x, unit_at[:n], None if new.all() else new)[0]
        return y

    def _computed(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which of `rows`, bool [n], are computed when units `ids` are predicted: bool [n]."""
        if not self._layer.predicted:
            return rows
        slots = self._layer.window.slot_of[ids]
        wanted = np.zeros_like(rows)
        wanted[slots[slots >= 0]] = True
        return wanted & rows

    def _streams_faster(self, ids: np.ndarray) -> bool:
        """Whether all units that are not held pass sooner than those of `ids` are read one by one."""
        layer, stride = self._layer, self._layer.stride
        missing = int(np.count_nonzero(layer.window.slot_of[ids] < 0))
        absent = layer.units - layer.window.num_rows
        if layer.disk is None:
            return missing * UNKNOWN_DISK_PENALTY > absent
        return layer.disk.batch(layer.extent, missing) > layer.disk.sequential(absent * stride)

    def _stream(self, x: mx.array) -> mx.array:
        """Exact for any x: rows held, then all others in blocks; the last tokens' active units enter the window."""
        layer, window, blocks = self._layer, self._layer.window, self._layer.blocks
        layer.ticket = None
        first = window.advance(len(x))
        seeds = min(SEED_TOKENS, len(x)) if layer.predictor is not None else 0
        first += len(x) - seeds
        held = window.slot_of >= 0
        if layer.sketch is not None:
            layer.sketch.start(x)()
        blocks.start(layer, held, layer.predictor is None or len(x) > FEW_TOKENS)
        y, active = self._rows(layer.rows, x, window.unit_at[: window.num_rows], watch=seeds)
        y = y.astype(mx.float32)
        if active is not None:
            window.touch(window.unit_at[: window.num_rows], active, first)
        mx.eval(y)  # before admitted rows overwrite any that this product reads
        for rows, units in blocks.stream():
            keep = ~held[units]
            part, active = self._rows(rows, x, units, None if keep.all() else keep, seeds)
            y = y + part
            mx.eval(y)
            if active is not None:
                used = np.flatnonzero(active.any(axis=0))
                window.touch(units[used], active[:, used], first)
                window.admit(units[used], rows, used)
        return y.astype(x.dtype)


def _blocks(held: np.ndarray, capacity: int, gap: int) -> list[np.ndarray]:
    """Units to stream, ascending, in blocks of at most `capacity`: those not held, and held ones in small gaps."""
    wanted = np.flatnonzero(~held)
    if len(wanted) == 0:
        return []
    step = np.diff(wanted)
    fill = [wanted] + [np.arange(wanted[i] + 1, wanted[i + 1]) for i in np.flatnonzero((step > 1) & (step <= gap + 1))]
    units = np.sort(np.concatenate(fill))
    return [units[i : i + capacity] for i in range(0, len(units), capacity)]
