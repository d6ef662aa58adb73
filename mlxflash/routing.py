"""Which experts a mixture's tokens choose on text: how many of them a layer misses, by how many it holds.

The router needs no measuring to be right; its habits say how memory is best shared out, and how long a token takes.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.bundle import Bundle, write_manifest
from mlxflash.calibrate import sequences_of
from mlxflash.evaluate import check_length
from mlxflash.misses import SHARES, miss_curve
from mlxflash.model import load_bundle
from mlxflash.models import family_of, find, graft

Progress = Callable[[str, int, int], None]


class _Listener(nn.Module):
    """Stands before a layer's experts and notes which are asked for: bool [experts] per token."""

    def __init__(self, experts: nn.Module, units: int):
        super().__init__()
        self._experts, self._units = experts, units
        self._heard: list[np.ndarray] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        chosen = np.asarray(indices).reshape(-1, indices.shape[-1]).astype(np.int64)
        wanted = np.zeros((len(chosen), self._units), bool)
        wanted[np.arange(len(chosen))[:, None], chosen] = True
        self._heard.append(wanted)
        return self._experts(x, indices)

    def heard(self) -> np.ndarray:
        return np.concatenate(self._heard)


def measure_routing(
    bundle: Bundle,
    tokens: np.ndarray | None = None,
    *,
    num_tokens: int = 256,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Record a mixture's miss curves on `tokens` (int [n]; None: text the model makes up itself) in its manifest.

    Returns the bundle, reopened. Raises ValueError when the text is too short.
    """
    if tokens is not None:
        check_length(tokens)
    with load_bundle(bundle.path, memory=memory, device=device, bundle=bundle) as model:
        sequences = sequences_of(model, tokens, num_tokens, progress)
        family, *_ = family_of(bundle.config(), str(bundle.path))
        listeners = []
        for owner, layer in zip(model.flash.owners, bundle.manifest.layers, strict=True):
            listeners.append(_Listener(find(owner, family.ffn), layer.units))
            graft(owner, family.ffn, listeners[-1])
        for i, sequence in enumerate(sequences):
            progress("exact pass", i, len(sequences))
            mx.eval(model(mx.array(sequence[None])))
        progress("exact pass", len(sequences), len(sequences))
    curves = [miss_curve(listener.heard()).misses for listener in listeners]
    found = {
        "tokens": sum(map(len, sequences)),
        "text": "text" if tokens is not None else "the model's own text",
        "misses": {"shares": SHARES, "layers": curves},
    }
    write_manifest(bundle.path, replace(bundle.manifest, calibration=bundle.manifest.calibration | {"router": found}))
    return Bundle.open(bundle.path)
