"""The experts' side of a mixture: bring the experts that the router chose, compute them, each token's side by side.

Stands where mlx-lm's SwitchGLU stood, inside its own block: router, scores and shared experts stay as they are. The
router is the predictor, and it is exact: so is all that comes out.

What a token chose goes through the window, and so does a prompt as long as its experts fit in. Otherwise the experts
held are computed where they are and the others pass by in two buffers, one being read while the other is computed:
each is read once per layer and chunk, with all of its tokens, and stays if later tokens are likelier to want it.
"""

import time
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends.experts import SORTED, ExpertRows
from mlxflash.ffn import FlashLayer

SEED_TOKENS = 64  # of a prompt: what they chose says what comes next; a use 64 tokens back counts a quarter


class FlashExperts(nn.Module):
    """x [..., d_model] and the experts chosen, [..., k], to what each computes: [..., k, d_model]."""

    def __init__(self, layer: FlashLayer):
        super().__init__()
        self._layer = layer

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        layer = self._layer
        if layer.reader.closed:
            raise ValueError("this model is closed; load it again")
        tokens, k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
        rows: Any = layer.rows
        if layer.fixed and rows.routes_on_device:
            y = _resident(rows, tokens, indices.reshape(-1), k)
        else:
            y = self._route(rows, tokens, rows.chosen(tokens, indices), k)
        return y.reshape(*indices.shape, x.shape[-1])

    def _route(self, rows: ExpertRows, x: mx.array, chosen: np.ndarray, k: int) -> mx.array:
        window = self._layer.window
        if self._layer.fixed:
            pieces = [_Piece(rows, x, chosen, k, window.slot_of)]
        elif len(ids := np.unique(chosen)) <= window.capacity:
            pieces = self._bring(rows, x, chosen, ids, k)
        else:
            pieces = self._stream(rows, x, chosen, ids, k)
        return rows.join([p.result for p in pieces], [p.pairs for p in pieces])

    def _bring(self, rows: ExpertRows, x: mx.array, chosen: np.ndarray, ids: np.ndarray, k: int) -> list["_Piece"]:
        """Through the window, all at once; what is here is computed while the rest is on its way."""
        layer, window, clock = self._layer, self._layer.window, time.perf_counter
        begin, asking = clock(), layer.reader.submitting
        ticket = window.request(ids)
        asked = layer.reader.submitting - asking
        layer.times.flash += asked
        layer.times.manage += clock() - begin - asked
        pieces = []
        here = np.full(layer.units, -1)
        if rows.leaves_out_free:
            here = window.slot_of.copy()
            here[window.unit_at[: window.num_rows][window.arriving(ticket)]] = -1
            pieces.append(_Piece(rows, x, chosen, k, here))
        begin = clock()
        window.ready(ticket)
        layer.times.flash += clock() - begin
        pieces.append(_Piece(rows, x, chosen, k, np.where(here < 0, window.slot_of, -1)))
        layer.num_decoded += len(x)
        return [p for p in pieces if len(p.pairs)]

    def _stream(self, rows: ExpertRows, x: mx.array, chosen: np.ndarray, ids: np.ndarray, k: int) -> list["_Piece"]:
        """Those held first, then the others in blocks; the window keeps what is worth more than what it has."""
        layer, window, blocks = self._layer, self._layer.window, self._layer.blocks
        first = window.advance(len(x))
        seeds = min(SEED_TOKENS, len(x))
        window.touch(ids, _used(chosen.reshape(-1, k)[-seeds:], ids), first + len(x) - seeds)
        left_out = np.ones(layer.units, bool)
        left_out[ids[window.slot_of[ids] < 0]] = False
        blocks.start(layer, left_out, False)
        pieces = [_Piece(rows, x, chosen, k, window.slot_of)]
        for passing, units in blocks.stream():
            block: Any = passing
            slot_of = np.full(layer.units, -1)
            slot_of[units] = np.arange(len(units))
            pieces.append(_Piece(block, x, chosen, k, slot_of))
            block.settle()
            window.admit(units, block, np.arange(len(units)))
        return [p for p in pieces if len(p.pairs)]


class _Piece:
    """Some of the pairs of token and expert: those whose expert has a slot in `slot_of`, [units], not -1."""

    def __init__(self, rows: ExpertRows, x: mx.array, chosen: np.ndarray, k: int, slot_of: np.ndarray):
        slots = slot_of[chosen]
        pairs = np.flatnonzero(slots >= 0)
        order = np.argsort(slots[pairs], kind="stable")
        self.pairs = pairs[order]
        self.result = rows.experts(x, self.pairs // k, slots[self.pairs]) if len(pairs) else None


def _resident(rows: ExpertRows, x: mx.array, chosen: mx.array, k: int) -> mx.array:
    """Every expert is in the slot of its number: nothing to ask, nothing to wait for."""
    if len(chosen) < SORTED:
        return cast(mx.array, rows.experts(x, mx.arange(len(chosen)) // k, chosen))
    order = mx.argsort(chosen)
    y: mx.array = rows.experts(x, order // k, chosen[order])
    return y[mx.argsort(order)]


def _used(chosen: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which of `ids`, ascending, each token chose: bool [tokens, ids] of [tokens, k]."""
    used = np.zeros((len(chosen), len(ids)), bool)
    used[np.arange(len(chosen))[:, None], np.searchsorted(ids, chosen)] = True
    return used
