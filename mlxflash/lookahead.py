"""The next layer's units, named a layer early, so that their reads run while this layer computes.

What an FFN is given changes little from layer to layer, and most of the change is linear in it: an affine map of small
rank, fitted by least squares on calibration text, turns this layer's input into a guess at the next one's, and the next
layer's own low-bit copy turns that into unit ids. On the story model the map finds half as many again as the unchanged
input would, and fewer in vain (RESULTS.md). Deja Vu (arXiv 2310.17157, section 4.3) looks ahead likewise, with a
network trained for each layer.
"""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import Backend, Matrix
from mlxflash.bundle import BundleError
from mlxflash.predictor import Ids, Predictor, save_arrays

RANK, WIDTH_PER_RANK = 64, 16  # of the map: at most 64, and no more than it is worth in a narrow model
TOKENS_PER_RANK = 16  # fewer, and the map fits the text it was made from
MOST_TOKENS = 2048  # the fit costs their third power
RIDGE = 0.1  # of the inputs' mean variance
AHEAD_MARGIN = -0.25  # in standard errors; a unit named in vain is a read, one not named only waits for its layer


class LookAhead:
    """Runs in one layer on its FFN's input and names the units of the next layer."""

    def __init__(self, backend: Backend, fit: "Fit", then: Predictor):
        self._backend, self._then = backend, then
        self._scale, self._offset = (backend.operand(mx.array(a)) for a in (fit.scale, fit.offset))
        self._down, self._up = (Matrix(mx.array(m.astype(np.float16, order="C"))) for m in (fit.down, fit.up))
        mx.eval(self._down.weight, self._up.weight)
        self.nbytes = self._scale.nbytes + self._offset.nbytes + self._down.nbytes + self._up.nbytes + then.nbytes

    def start(self, x: mx.array) -> Ids:
        """x [tokens, d_model] of this layer to ids of the next."""
        return self._then.start(self.guess(self._backend.operand(x)))

    def guess(self, x: Any) -> Any:
        """The next layer's input, as far as this layer's tells it: operands [tokens, d_model]."""
        low = self._backend.multiply(x, self._down)
        return x * self._scale + self._offset + self._backend.multiply(low, self._up).astype(x.dtype)


class Fit:
    """y ~ scale * x + up (down x) + offset: scale and offset [d], down [rank, d], up [d, rank]."""

    def __init__(self, scale: np.ndarray, offset: np.ndarray, down: np.ndarray, up: np.ndarray):
        self.scale, self.offset, self.down, self.up = scale, offset, down, up

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Fit":
        """From pairs of rows, float32 [tokens, d]: each dimension by itself, then ridge regression of reduced rank
        for what that leaves (Izenman 1975), in its dual form, which needs no d x d matrix."""
        if len(x) > MOST_TOKENS:
            chosen = np.linspace(0, len(x) - 1, MOST_TOKENS).astype(np.int64)
            x, y = x[chosen], y[chosen]
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x, y = x - mean_x, y - mean_y
        scale = (x * y).sum(axis=0) / np.maximum((x * x).sum(axis=0), 1e-6)
        rank = max(1, min(RANK, x.shape[1] // WIDTH_PER_RANK, len(x) // TOKENS_PER_RANK))
        rest = y - x * scale
        gram = x @ x.T
        ridge = max(RIDGE * float(np.trace(gram)) / x.shape[1], 1e-6)  # inputs that never change have no variance
        weights = np.linalg.solve(gram + ridge * np.eye(len(x), dtype=x.dtype), rest)
        fitted = gram @ weights
        _, vectors = np.linalg.eigh(fitted @ fitted.T)
        main = fitted.T @ vectors[:, len(x) - rank :]  # the largest last
        up = main / np.maximum(np.linalg.norm(main, axis=0), 1e-6)
        down = (x.T @ (weights @ up)).T
        return cls(scale, mean_y - mean_x * scale - up @ (down @ mean_x), down, up)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """As LookAhead.guess, on the host."""
        return x * self.scale + self.offset + (x @ self.down.T) @ self.up.T


def save_look_ahead(file: Path, fit: Fit, shift: np.ndarray, error: np.ndarray) -> None:
    """One layer's map, and of each of the next layer's units the mean and standard error of its estimate, [units]."""
    arrays = {"scale": fit.scale, "offset": fit.offset, "down": fit.down, "up": fit.up, "shift": shift, "error": error}
    file.parent.mkdir(parents=True, exist_ok=True)
    halves = {k: mx.array(a.astype(np.float16 if a.ndim == 2 else np.float32)) for k, a in arrays.items()}
    save_arrays(file, halves)


def read_look_ahead(file: Path, d_model: int, units: int) -> tuple[Fit, np.ndarray, np.ndarray]:
    """What save_look_ahead wrote. Raises BundleError when the file is damaged or another model's."""
    try:
        loaded = cast(dict[str, mx.array], mx.load(str(file)))
        names = ("scale", "offset", "down", "up", "shift", "error")
        scale, offset, down, up, shift, error = (np.array(loaded[name].astype(mx.float32)) for name in names)
    except (RuntimeError, KeyError, ValueError) as problem:
        raise BundleError(f"{file}: not a look-ahead predictor ({problem}); calibrate again") from None
    rank = len(down)
    shapes = [a.shape for a in (scale, offset, down, up, shift, error)]
    if not rank or shapes != [(d_model,), (d_model,), (rank, d_model), (d_model, rank), (units,), (units,)]:
        raise BundleError(f"{file}: made for another model; calibrate again")
    return Fit(scale, offset, down, up), shift, error
