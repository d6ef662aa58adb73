"""The FFN that stands where mlx-lm had an MLP: which units, bring them, compute.

One token goes `predictor -> window -> rows`, and so do a few when the union of what they need is read sooner than all
the rest. A prompt, or a layer whose every unit is needed, goes through `_stream`: the rows held are computed where they
are, all others pass by in large blocks, so the result is exact.
"""

import time
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import Rows
from mlxflash.diskprofile import DiskProfile
from mlxflash.pool import Landing, Source
from mlxflash.predictor import Predictor
from mlxflash.reader import Reader
from mlxflash.window import Ticket, Window

FEW_TOKENS = 64  # up to so many, the union of what they need may be less than everything
UNKNOWN_DISK_PENALTY = 3  # how many times longer a random record takes than a streamed one, where nobody measured
SEED_TOKENS = 8  # of a prompt: their active units are worth more than older ones'; the pool's size has the last word


class Blocks:
    """Two buffers that every layer's stream takes in turn: while one is computed the other is read.

    `gap` is how many held records between two wanted ones are cheaper to read again than to step over.
    """

    def __init__(self, pair: tuple[Rows, Rows], gap: int):
        self.pair, self.gap = pair, gap
        self._landings: list[Landing | None] = [None, None]

    def start(self, i: int, reader: Reader, source: Source, units: np.ndarray) -> None:
        """Read block number `i` of a stream, `units`, into its buffer."""
        self._landings[i % 2] = self.pair[i % 2].land(reader, source, units, np.arange(len(units)))

    def wait(self, i: int) -> None:
        """Until block number `i` is there."""
        landing = self._landings[i % 2]
        if landing is not None:
            landing.wait()
            self._landings[i % 2] = None

    def reset(self) -> None:
        """Forget reads that are known to have come to rest."""
        self._landings = [None, None]

    def drain(self) -> None:
        """Let reads that an abandoned stream left behind come to rest."""
        for i in range(2):
            try:
                self.wait(i)
            except OSError:
                self._landings[i] = None


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
    disk: DiskProfile | None = None  # None: not measured
    next: "FlashLayer | None" = None
    ahead: Predictor | None = None  # what the next layer will need, from this one's input
    ticket: Ticket | None = None  # units that the layer before asked for
    num_decoded: int = 0  # tokens that went through the window


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
        if layer.window.num_rows == layer.units and layer.ticket is None:
            y, _ = layer.rows.ffn(tokens, layer.units)
        elif layer.predictor is None or len(tokens) > FEW_TOKENS:
            y = self._stream(tokens)
        else:
            y = self._sparse(tokens)
        if layer.down_bias is not None:
            y = y + layer.down_bias
        return y.reshape(x.shape)

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
            ids = early()
            t3 = clock()
            layer.next.ticket = layer.next.window.request(ids)
            times.predict += t3 - t2
            t2 = clock()
            times.manage += t2 - t3
        asked = layer.reader.submitting - asking
        times.flash += asked
        times.manage -= asked
        y, arriving = None, None
        if layer.rows.leaves_out_free:  # rows that are here are computed while the others are on their way
            arriving = layer.window.arriving(ticket)
            if not arriving.all():
                y, _ = layer.rows.ffn(x, len(arriving), ~arriving)
        t2 = clock()
        n = layer.window.ready(ticket)
        times.flash += clock() - t2
        layer.num_decoded += len(x)
        if y is None:
            y, _ = layer.rows.ffn(x, n)
        elif arriving is not None and arriving.any():
            y = y + layer.rows.ffn(x, n, arriving)[0]
        while len(ticket.left):  # the pool is smaller than this token: the rest replaces some of what is computed
            mx.eval(y)
            t2 = clock()
            new = layer.window.next(ticket)
            times.flash += clock() - t2
            y = y + layer.rows.ffn(x, n, None if new.all() else new)[0]
        return y

    def _streams_faster(self, ids: np.ndarray) -> bool:
        """Whether all units that are not held pass sooner than those of `ids` are read one by one."""
        layer, stride = self._layer, self._layer.stride
        missing = int(np.count_nonzero(layer.window.slot_of[ids] < 0))
        absent = layer.units - layer.window.num_rows
        if layer.disk is None:
            return missing * UNKNOWN_DISK_PENALTY > absent
        return layer.disk.batch(stride, missing) > layer.disk.sequential(absent * stride)

    def _stream(self, x: mx.array) -> mx.array:
        """Exact for any x: rows held, then all others in blocks; the last tokens' active units enter the window."""
        layer, window = self._layer, self._layer.window
        layer.ticket = None
        first = window.advance(len(x))
        seeds = min(SEED_TOKENS, len(x)) if layer.predictor is not None else 0
        first += len(x) - seeds
        held = window.slot_of >= 0
        y, active = layer.rows.ffn(x, window.num_rows, watch=seeds)
        y = y.astype(mx.float32)
        if active is not None:
            window.touch(window.unit_at[: window.num_rows], active, first)
        blocks = layer.blocks
        runs = _blocks(held, blocks.pair[0].capacity, blocks.gap)
        blocks.drain()
        mx.eval(y)  # before admitted rows overwrite any that this product reads
        for i, units in enumerate(runs[:2]):
            blocks.start(i, layer.reader, layer.source, units)
        for i, units in enumerate(runs):
            t0 = time.perf_counter()
            blocks.wait(i)
            layer.times.flash += time.perf_counter() - t0
            rows, keep = blocks.pair[i % 2], ~held[units]
            part, active = rows.ffn(x, len(units), None if keep.all() else keep, seeds)
            y = y + part
            mx.eval(y)
            if active is not None:
                used = np.flatnonzero(active.any(axis=0))
                window.touch(units[used], active[:, used], first)
                window.admit(units[used], rows, used)
            if i + 2 < len(runs):  # the other buffer's read has been under way: the disk never waits for a computation
                blocks.start(i + 2, layer.reader, layer.source, runs[i + 2])
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
