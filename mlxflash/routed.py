"""A dense FFN whose own predictor says which units count (models/bamboo.py): those are brought, and all is exact.

Stands where the model's MLP stood. A unit that is held but not named is not computed, as the model has it.
"""

import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import Rows
from mlxflash.ffn import FEW_TOKENS, SEED_TOKENS, FlashLayer


class RoutedFFN(nn.Module):
    """x [batch, tokens, d_model] and which units count for each token, bool [batch, tokens, units], to the output."""

    def __init__(self, layer: FlashLayer):
        super().__init__()
        self._layer = layer

    def __call__(self, x: mx.array, wanted: mx.array) -> mx.array:
        layer = self._layer
        if layer.reader.closed:
            raise ValueError("this model is closed; load it again")
        tokens = x.reshape(-1, x.shape[-1])
        mx.eval(tokens, wanted)
        units = np.asarray(wanted).reshape(len(tokens), -1)
        if layer.window.num_rows == layer.units:
            y = _masked(layer.rows, tokens, units[:, layer.window.unit_at])
        else:
            ids = np.flatnonzero(units.any(axis=0))
            few = len(tokens) <= FEW_TOKENS and len(ids) <= layer.window.capacity
            y = self._bring(tokens, units, ids) if few or len(tokens) == 1 else self._stream(tokens, units)
        if layer.down_bias is not None:
            y = y + layer.down_bias
        return y.reshape(x.shape)

    def _bring(self, x: mx.array, units: np.ndarray, ids: np.ndarray) -> mx.array:
        """Through the window, what all tokens need at once."""
        layer, window, clock = self._layer, self._layer.window, time.perf_counter
        begin, asking = clock(), layer.reader.submitting
        ticket = window.request(ids)
        asked = layer.reader.submitting - asking
        layer.times.manage += clock() - begin - asked
        begin = clock()
        n = window.ready(ticket)
        layer.times.flash += clock() - begin + asked
        layer.num_decoded += len(x)
        y = _masked(layer.rows, x, units[:, window.unit_at[:n]])
        while len(ticket.left):  # the pool is smaller than this token: the rest replaces some of what is computed
            mx.eval(y)
            begin = clock()
            new = window.next(ticket)
            layer.times.flash += clock() - begin
            y = y + _masked(layer.rows, x, units[:, window.unit_at[:n]] & new)
        return y

    def _stream(self, x: mx.array, units: np.ndarray) -> mx.array:
        """Rows held, then the others that any token needs in blocks, each read once; the last tokens' stay."""
        layer, window, blocks = self._layer, self._layer.window, self._layer.blocks
        first, seeds = window.advance(len(x)), min(SEED_TOKENS, len(x))
        first += len(x) - seeds
        left_out = (window.slot_of >= 0) | ~units.any(axis=0)
        blocks.start(layer, left_out, False)
        held = window.unit_at[: window.num_rows]
        window.touch(held, units[-seeds:, held], first)
        y = _masked(layer.rows, x, units[:, held])
        mx.eval(y)  # before admitted rows overwrite any that this product reads
        for rows, passing in blocks.stream():
            keep = units[:, passing] & ~left_out[passing]
            y = y + _masked(rows, x, keep)
            mx.eval(y)
            used = np.flatnonzero(keep[-seeds:].any(axis=0))
            window.touch(passing[used], keep[-seeds:][:, used], first)
            window.admit(passing[used], rows, used)
        return y


def _masked(rows: Rows, x: mx.array, keep: np.ndarray) -> mx.array:
    """The FFN of each token on its own rows, bool [tokens, n]."""
    return mx.concatenate([rows.ffn(x[t : t + 1], keep.shape[1], mask)[0] for t, mask in enumerate(keep)])
