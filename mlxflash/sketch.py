"""A sketch: resident copies in few bits of what makes a layer's activations, good enough to be used as they are.

A low-bit predictor estimates each unit's activation, to decide whether its record is worth a read, and then throws the
estimate away. Here it stays: the copies are rounded so that their products with the inputs that the layer really gets
err least: 3 bits then cost a third to a fifth of what 3 rounded to the nearest do (RESULTS.md). A unit then needs only
its `down` row: half of a plain record, a third of a gated one, is read, held and computed with, so that the same memory
holds two or three times as many units. What this costs is measured like every level of fidelity; each layer gets as
many bits as it wants.

Source of the rounding: GPTQ (arXiv 2210.17323), section 3: columns are rounded one after another, and what is lost goes
to those still to come, as the inputs' covariance says.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN, Backend, Matrix
from mlxflash.backends.metal import ACTIVATIONS
from mlxflash.bundle import BundleError, Layer
from mlxflash.predictor import Ids, floats, has_shape, nearest_range, packed, read_matrix, save_arrays

BITS = 3  # that a layer gets first
CHOICES = (2, 3, 4, 5, 6, 8)
ERROR = 0.0005  # KL divergence that rounding may cost, all layers together: half of what the level `high` may
DAMPING = (0.01, 0.1, 1.0, 10.0)  # of the mean variance, added to every input's: the fewer tokens, the more
SAMPLE = 256  # units that the damping is chosen with
Product = tuple[Matrix, np.ndarray]  # [units, d_model], and what is added to x times it, float32 [units]


def products_of(ffn: FFN) -> tuple[str, ...]:
    """The parts that a sketch stands for, what decides first."""
    return ("gate", "up") if ffn.layout == "gated" else ("up",)


class Sketch:
    """x to a layer's activations, and to the units whose down rows are worth a read: |activation| above `cut`."""

    def __init__(self, backend: Backend, ffn: FFN, products: list[Product], cut: np.ndarray):
        self._backend, self._ffn, self._products, self._cut = backend, ffn, products, cut
        self.nbytes = sum(m.nbytes + bias.nbytes for m, bias in products) + cut.nbytes
        self.hidden = np.empty((0, len(cut)), np.float32)  # of the x that was asked about last, [tokens, units]

    def start(self, x: mx.array) -> Ids:
        """As a predictor's. When the ids are there, `hidden` is."""
        asked = [self._backend.project(x, matrix) for matrix, _ in self._products]

        def ids() -> np.ndarray:
            values = [answer() + bias for answer, (_, bias) in zip(asked, self._products, strict=True)]
            self.hidden = activations(self._ffn, values[0], values[-1])
            return self.units_above(self._cut)

        return ids

    def units_above(self, cut: np.ndarray) -> np.ndarray:
        """Ids of the units of which some token's activation in `hidden` is above `cut`, [units], in size."""
        size = np.abs(self.hidden)
        return np.flatnonzero((size[0] if len(size) == 1 else size.max(axis=0)) > cut)

    def above(self, cut: np.ndarray) -> "Above":
        """The same with another cut."""
        return Above(self, cut)


class Above:
    """A sketch that names units by another cut."""

    def __init__(self, sketch: Sketch, cut: np.ndarray):
        self._sketch, self._cut = sketch, cut
        self.nbytes = cut.nbytes

    def start(self, x: mx.array) -> Ids:
        """As the sketch's."""
        fill = self._sketch.start(x)

        def ids() -> np.ndarray:
            fill()
            return self._sketch.units_above(self._cut)

        return ids


def activations(ffn: FFN, first: np.ndarray, up: np.ndarray) -> np.ndarray:
    """What multiplies the down rows, from the deciding products and those of `up`, float32 [tokens, units]."""
    if ffn.activation in ("relu", "drelu"):
        out = np.maximum(first, 0)
    elif ffn.activation == "fatrelu":
        out = first * (first > ffn.threshold)
    else:
        out = np.array(ACTIVATIONS[ffn.activation](mx.array(first)))
    if ffn.layout != "gated":
        return out
    return out * (np.maximum(up, 0) if ffn.activation == "drelu" else up)


def fit(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, test: np.ndarray, bits: int) -> Product:
    """A copy of `weight` [units, d_model] in `bits`, rounded for inputs like x [tokens, d_model] and damped as `test`,
    more of them, says; and what to add to its products beside `bias`."""
    mean = x.mean(axis=0)
    covariance = (x.T @ x / len(x)).astype(np.float64)
    sample = weight[:: max(1, len(weight) // SAMPLE)]

    def error(damping: float) -> float:
        off = floats(_rounded(sample, covariance, bits, damping)) - sample
        return float(np.square(test @ off.T - off @ mean).sum())

    matrix = _rounded(weight, covariance, bits, min(DAMPING, key=error))
    return matrix, (bias - (floats(matrix) - weight) @ mean).astype(np.float32)


def _rounded(weight: np.ndarray, covariance: np.ndarray, bits: int, damping: float) -> Matrix:
    d = weight.shape[1]
    group = 64 if d % 64 == 0 else 32
    damped = covariance + (damping * np.trace(covariance) / d + 1e-9) * np.eye(d)
    spread = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)  # upper: how an error moves what is to come
    weight = weight.astype(np.float32)  # a copy, used up
    codes = np.empty(weight.shape, np.uint8)
    scales, biases = (np.empty((len(weight), d // group), np.float32) for _ in range(2))
    for g, first in enumerate(range(0, d, group)):
        block, lost = weight[:, first : first + group].copy(), np.empty((len(weight), group), np.float32)
        scale, low = (np.array(a)[:, 0] for a in nearest_range(mx.array(block[:, None]), bits))
        scales[:, g], biases[:, g] = scale[:, 0], low[:, 0]
        inner = spread[first : first + group, first : first + group]
        for i in range(group):
            column = block[:, i]
            code = np.clip(np.rint((column - low[:, 0]) / scale[:, 0]), 0, 2**bits - 1)
            codes[:, first + i] = code
            lost[:, i] = (column - code * scale[:, 0] - low[:, 0]) / inner[i, i]
            block[:, i + 1 :] -= np.outer(lost[:, i], inner[i, i + 1 :])
        weight[:, first + group :] -= lost @ spread[first : first + group, first + group :]
    return packed(codes, mx.array(scales), mx.array(biases), bits, group)


def choose_bits(costs: list[float], allowed: float = ERROR) -> list[int]:
    """Bits of every layer, as few as keep the KL divergence within `allowed`; costs: what BITS cost each.

    An error halves with every bit, and costs its square.
    """
    bits = [CHOICES[0]] * len(costs)

    def cost(layer: int, b: int) -> float:
        return max(costs[layer], 0.0) * 4.0 ** (BITS - b)

    while sum(cost(i, b) for i, b in enumerate(bits)) > allowed:
        able = [i for i, b in enumerate(bits) if b < CHOICES[-1]]
        if not able:
            break
        after = {i: CHOICES[CHOICES.index(bits[i]) + 1] for i in able}
        best = max(able, key=lambda i: (cost(i, bits[i]) - cost(i, after[i])) / (after[i] - bits[i]))
        bits[best] = after[best]
    return bits


def save_sketch(file: Path, ffn: FFN, products: list[Product]) -> None:
    """One layer's, whole or not at all."""
    arrays: dict[str, mx.array] = {}
    meta: dict[str, str] = {}
    for name, (m, bias) in zip(products_of(ffn), products, strict=True):
        arrays |= {f"{name}.weight": m.weight, f"{name}.scales": m.scales, f"{name}.biases": m.biases}
        arrays[f"{name}.offset"] = mx.array(bias.astype(np.float32))
        meta |= {f"{name}.bits": str(m.bits), f"{name}.group_size": str(m.group_size)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(file, arrays, meta)


def read_sketch(file: Path, ffn: FFN, layer: Layer) -> list[Product]:
    """What save_sketch wrote. Raises BundleError when the file is damaged or another model's."""
    products: list[Product] = []
    try:
        arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        for name in products_of(ffn):
            products.append((read_matrix(arrays, meta, name), np.array(arrays[f"{name}.offset"].astype(mx.float32))))
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise BundleError(f"{file}: not a sketch ({problem}); calibrate again") from None
    for m, bias in products:
        if not has_shape(m, layer.units, ffn.d_model) or bias.shape != (layer.units,) or not np.isfinite(bias).all():
            raise BundleError(f"{file}: made for another model; calibrate again")
    mx.eval([getattr(m, part) for m, _ in products for part in ("weight", "scales", "biases")])
    return products


Answer = Callable[[np.ndarray], np.ndarray]


def answer(backend: Backend, ffn: FFN, products: list[Product]) -> Answer:
    """x [tokens, d_model] to the activations of a sketch, float32 [tokens, units], both on the host."""
    sketch = Sketch(backend, ffn, products, np.zeros(len(products[0][1]), np.float32))

    def hidden(x: np.ndarray) -> np.ndarray:
        sketch.start(cast(Any, mx.array(x)))()
        return sketch.hidden

    return hidden
