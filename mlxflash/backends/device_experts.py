"""Experts in memory that the host does not share: the pools, uploads and host tier of cuda.py's rows, gathered from.

A part's pool is [slots, ...] as the gather operations want it, so that weights are multiplied where they lie. What a
layer's router chose is all that crosses back, and what the host waits for; new experts go over in one update per part.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN
from mlxflash.backends.cuda import DeviceBackend, DeviceRows, Door
from mlxflash.backends.experts import GatherExperts
from mlxflash.resident import WORDS


class DeviceExperts(GatherExperts, DeviceRows):
    """See backends.experts.ExpertRows. `widens`: MLX's CPU gathers float32 only, so that of other floats the experts
    used are copied first, on the device."""

    def __init__(self, backend: DeviceBackend, ffn: FFN, capacity: int, door: Door, widens: bool):
        super().__init__(backend, ffn, capacity, door)
        self.routes_on_device = not widens or all(p.dtype in (*WORDS, "float32") for p in ffn.record.parts)

    def chosen(self, x: mx.array, indices: mx.array) -> np.ndarray:
        return self._backend.project(indices.reshape(1, -1))()[0].astype(np.int64)

    def experts(self, x: mx.array, tokens: Any, slots: Any) -> mx.array:
        self._flush()
        y = super().experts(x, tokens, slots)
        self._stamp = self._backend.traffic.syncs
        return y

    def _weights(self, slots: Any) -> tuple[dict[str, mx.array], Any]:
        if self.routes_on_device:
            return self._pools, slots
        used, chosen = np.unique(slots, return_inverse=True)
        at, weights = mx.array(used.astype(np.int32)), {}
        for p in self._ffn.record.parts:
            copy = self._pools[p.name][at]
            weights[p.name] = copy if p.dtype in WORDS else copy.astype(mx.float32)
        return weights, chosen
