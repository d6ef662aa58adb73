"""x to unit ids: which units of a layer this token needs. One call, `ids = predictor.start(x)()`.

A false negative is a small error, a false positive is a read. `all` is no predictor: every unit is needed, and the
FFN streams. `oracle` knows the truly active units from full weights (a law and a bound, not a way to save memory).
`low-bit` estimates the deciding product from a copy of its matrix in a few bits; training-free. `low-rank` is the
paper's: two small matrices that `train` made. `sparsity` estimates how large activations are that are never zero.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN, Backend, Matrix
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError, Layer, Record
from mlxflash.resident import one_part

LOW_BITS = 3
MARGIN = 0.75  # recall 96 % at 1.05 times the active units on the story model (RESULTS.md)
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


Ids = Callable[[], np.ndarray]  # the units any of the tokens needs: int64 [k], ascending


class Predictor(Protocol):
    """`nbytes` counts against the memory budget."""

    nbytes: int

    def start(self, x: mx.array) -> Ids:
        """x [tokens, d_model], an FFN's input; the device may compute until the ids are asked for."""


class Projection:
    """Flags units whose estimate x W1^T ... Wn^T + offset is above zero; serves every predictor that is stored.

    Source of a margin in units of the estimate's own error: after PowerInfer's and SparseInfer's (arXiv 2411.12692)
    conservative thresholds; here it is `margin` times each neuron's calibrated root-mean-square error.
    `of` says what of the product [tokens, rows] is the estimate [tokens, units] (None: the product itself).
    """

    def __init__(
        self, backend: Backend, weights: tuple[Matrix, ...], offset: np.ndarray, of: "Magnitude | None" = None
    ):
        self._backend, self._weights, self._offset, self._of = backend, weights, offset, of
        self.nbytes = sum(w.nbytes for w in weights) + offset.nbytes

    def at(self, offset: np.ndarray) -> "Projection":
        """The same matrices under another offset, [units]; `nbytes` counts the offset alone."""
        twin = Projection(self._backend, self._weights, offset)
        twin.nbytes = offset.nbytes
        return twin

    def above(self, least: np.ndarray) -> "Projection":
        """The same that flags estimates above `least`, [units], whatever the offset was."""
        return Projection(self._backend, self._weights, -least, self._of)

    def estimates(self, x: mx.array) -> Callable[[], np.ndarray]:
        """Without the offset, float32 [tokens, units], of x [tokens, d_model]; the device may compute until asked."""
        product, of = self._backend.project(x, *self._weights), self._of
        return product if of is None else lambda: of(product())

    def start(self, x: mx.array) -> Ids:
        estimates = self.estimates(x)

        def ids() -> np.ndarray:
            estimate = estimates()
            return np.flatnonzero((estimate[0] if len(estimate) == 1 else estimate.max(axis=0)) > -self._offset)

        return ids


@dataclass(frozen=True)
class Magnitude:
    """How large activations are that are never zero, |act(gate) up| or |act(up)|, float32 [tokens, units], of products
    with a copy of the deciding matrix and, below it, of a gated layer's `up`; `bias` [rows] is added first.

    After CATS (arXiv 2404.08763), which compares |SiLU(gate)| of the true gate.
    """

    activation: str
    bias: np.ndarray
    units: int

    def __call__(self, products: np.ndarray) -> np.ndarray:
        p = products + self.bias
        first, up = p[:, : self.units], p[:, self.units :]
        inner = first / 2 if self.activation == "silu" else 0.7978846 * (first + 0.044715 * first**3)  # of GELU
        size = np.abs(first / 2 * (1 + np.tanh(inner)))  # a sigmoid is a tanh
        return size * np.abs(up) if up.shape[1] else size


def low_bit_matrix(weight: mx.array, bits: int = LOW_BITS) -> Matrix:
    """The resident copy of a deciding matrix [units, d_model]: MLX-affine, groups along d_model, float16 scales.

    MLX's quantiser spans a group's extremes. At few bits that wastes codes on outliers, so each group keeps the
    narrowed range of SHRINK with the least squared error.
    """
    group = 64 if weight.shape[1] % 64 == 0 else 32
    rows = [_quantize_rows(weight[i : i + 1024], bits, group) for i in range(0, len(weight), 1024)]
    words, scales, biases = (mx.concatenate(list(part)) for part in zip(*rows, strict=True))
    return Matrix(words, scales, biases, bits, group)


def _quantize_rows(weight: mx.array, bits: int, group: int) -> tuple[mx.array, mx.array, mx.array]:
    w = weight.astype(mx.float32).reshape(len(weight), -1, group)
    low, high = w.min(axis=-1, keepdims=True), w.max(axis=-1, keepdims=True)
    best: mx.array | None = None
    kept: tuple[mx.array, mx.array, mx.array] = (low, low, low)
    for shrink in SHRINK:
        middle, half = (high + low) / 2, (high - low) / 2 * shrink
        scale = mx.maximum(2 * half / (2**bits - 1), 1e-7).astype(mx.float16).astype(mx.float32)
        bias = (middle - half).astype(mx.float16).astype(mx.float32)
        codes = mx.clip(mx.round((w - bias) / scale), 0, 2**bits - 1)
        error = mx.square(codes * scale + bias - w).sum(axis=-1, keepdims=True)
        if best is None:
            best, kept = error, (codes, scale, bias)
        else:
            better = error < best
            kept = mx.where(better, codes, kept[0]), mx.where(better, scale, kept[1]), mx.where(better, bias, kept[2])
            best = mx.minimum(error, best)
        mx.eval(best, *kept)
    values = np.array(kept[0].astype(mx.uint8)).reshape(len(weight), -1)
    stream = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little").reshape(len(weight), -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
    return mx.array(words), kept[1][..., 0].astype(mx.float16), kept[2][..., 0].astype(mx.float16)


def save_low_bit(file: Path, matrix: Matrix, shift: np.ndarray, error: np.ndarray) -> None:
    """One layer's predictor: the matrix, and of each unit's estimate the mean and the standard error, [units]."""
    assert matrix.scales is not None
    assert matrix.biases is not None
    arrays = {"weight": matrix.weight, "scales": matrix.scales, "biases": matrix.biases}
    arrays |= {"shift": mx.array(shift), "error": mx.array(error)}
    meta = {"bits": str(matrix.bits), "group_size": str(matrix.group_size)}
    save_arrays(file, arrays, meta)


def save_arrays(file: Path, arrays: dict[str, mx.array], meta: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all. Raises OSError when the disk fails."""
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as f:  # given a name, MLX reports a full disk without saying so
            mx.save_safetensors(cast(Any, f), arrays, meta)
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_low_bit(file: Path, backend: Backend, ffn: FFN, layer: Layer, offset: np.ndarray, margin: float) -> Projection:
    """The low-bit predictor of one layer; `offset` is the deciding product's bias minus its threshold, [units]."""
    matrix, shift, error = read_low_bit(file, ffn, layer)
    return Projection(backend, (matrix,), (offset - shift + margin * error).astype(np.float32))


def read_low_bit(file: Path, ffn: FFN, layer: Layer) -> tuple[Matrix, np.ndarray, np.ndarray]:
    """What save_low_bit wrote. Raises BundleError when the file is damaged or another model's."""
    try:
        arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        bits, group = int(meta["bits"]), int(meta["group_size"])
        matrix = Matrix(arrays["weight"], arrays["scales"], arrays["biases"], bits, group)
        shift, error = (np.array(arrays[name].astype(mx.float32)) for name in ("shift", "error"))
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise BundleError(f"{file}: not a low-bit predictor ({problem}); convert again") from None
    groups = (layer.units, ffn.d_model // group if group else 0)
    per_unit = shift.shape == error.shape == (layer.units,)
    good = per_unit and matrix.weight.shape == (layer.units, ffn.d_model * bits // 32)
    if not good or matrix.scales.shape != groups or matrix.biases.shape != groups:
        raise BundleError(f"{file}: made for another model, {matrix.weight.shape[0]} units; convert again")
    mx.eval(matrix.weight, matrix.scales, matrix.biases)
    return matrix, shift, error


def save_low_rank(file: Path, inner: Matrix, outer: Matrix, offset: np.ndarray) -> None:
    """One layer's trained predictor: log-odds (x inner^T) outer^T + offset; [rank, d_model], [units, rank], [units]."""
    arrays: dict[str, mx.array] = {"offset": mx.array(offset)}
    meta: dict[str, str] = {}
    for name, m in (("inner", inner), ("outer", outer)):
        arrays |= {f"{name}.weight": m.weight, f"{name}.scales": m.scales, f"{name}.biases": m.biases}
        meta |= {f"{name}.bits": str(m.bits), f"{name}.group_size": str(m.group_size)}
    save_arrays(file, arrays, meta)


def load_low_rank(file: Path, backend: Backend, ffn: FFN, layer: Layer, margin: float) -> Projection:
    """The trained predictor of one layer; `margin` is in log-odds: one more flags what is e times less likely."""
    inner, outer, offset = read_low_rank(file, ffn, layer)
    return Projection(backend, (inner, outer), (offset + margin).astype(np.float32))


def save_copy(file: Path, copy: Matrix) -> None:
    """One layer's low-bit copy of the deciding matrix and, below it, of a gated layer's `up`."""
    arrays = {"copy.weight": copy.weight, "copy.scales": copy.scales, "copy.biases": copy.biases}
    save_arrays(file, arrays, {"copy.bits": str(copy.bits), "copy.group_size": str(copy.group_size)})


def load_magnitude(bundle: Bundle, index: int, backend: Backend) -> Projection:
    """What save_copy wrote, as a predictor that flags all that is above zero.

    Raises BundleError when the file is damaged or another model's.
    """
    ffn, layer = FFN.of(bundle.manifest), bundle.manifest.layers[index]
    names, file = dict.fromkeys((ffn.first, "up")), bundle.predictor_files("sparsity")[index]
    bias = np.concatenate([one_part(bundle, index, f"{name}_bias", layer.units) for name in names])
    try:
        arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        copy = _read_matrix(arrays, meta, "copy")
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise BundleError(f"{file}: not a copy for --sparsity ({problem}); calibrate again") from None
    if not _has_shape(copy, len(bias), ffn.d_model):
        raise BundleError(f"{file}: made for another model, {copy.weight.shape[0]} rows; calibrate again")
    mx.eval(copy.weight, copy.scales, copy.biases)
    magnitude = Magnitude(ffn.activation, bias, layer.units)
    return Projection(backend, (copy,), np.zeros(layer.units, np.float32), magnitude)


def read_low_rank(file: Path, ffn: FFN, layer: Layer) -> tuple[Matrix, Matrix, np.ndarray]:
    """What save_low_rank wrote. Raises BundleError when the file is damaged or another model's."""
    try:
        arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        inner, outer = (_read_matrix(arrays, meta, name) for name in ("inner", "outer"))
        offset = np.array(arrays["offset"].astype(mx.float32))
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise BundleError(f"{file}: not a low-rank predictor ({problem}); train again") from None
    rank = inner.weight.shape[0] if inner.weight.ndim else 0
    good = _has_shape(inner, rank, ffn.d_model) and _has_shape(outer, layer.units, rank)
    if not good or offset.shape != (layer.units,):
        raise BundleError(f"{file}: made for another model, {offset.size} units; train again")
    mx.eval([getattr(m, part) for m in (inner, outer) for part in ("weight", "scales", "biases")])
    return inner, outer, offset


def _read_matrix(arrays: dict[str, mx.array], meta: dict[str, str], name: str) -> Matrix:
    words, scales, biases = (arrays[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    return Matrix(words, scales, biases, int(meta[f"{name}.bits"]), int(meta[f"{name}.group_size"]))


def _has_shape(m: Matrix, rows: int, columns: int) -> bool:
    """Whether a quantised matrix is [rows, columns], in every part, of types and groups that kernels take."""
    if m.bits not in (2, 3, 4, 5, 6, 8) or m.group_size not in (32, 64, 128) or not rows or columns % m.group_size:
        return False
    groups, kinds = (rows, columns // m.group_size), (mx.uint32, mx.float16, mx.float16)
    shapes = (m.weight.shape, m.scales.shape, m.biases.shape) == ((rows, columns * m.bits // 32), groups, groups)
    return shapes and (m.weight.dtype, m.scales.dtype, m.biases.dtype) == kinds


def deciding(bundle: Bundle, index: int) -> tuple[Matrix, np.ndarray, np.ndarray]:
    """A layer's deciding matrix as stored, the same as float32 [units, d_model], and its bias [units]."""
    ffn, units = FFN.of(bundle.manifest), bundle.manifest.layers[index].units
    raw = np.fromfile(bundle.layer_path(index), np.uint8, units * ffn.record.stride, offset=HEADER_BYTES)
    m = deciding_matrix(ffn, raw.reshape(units, ffn.record.stride))
    return m, floats(m), ffn.offset(one_part(bundle, index, f"{ffn.first}_bias", units), units)


def floats(m: Matrix) -> np.ndarray:
    """A matrix's values, float32 [rows, columns]."""
    if not m.bits:
        return np.array(m.weight.astype(mx.float32))
    scales, biases = m.scales.astype(mx.float32), m.biases.astype(mx.float32)  # or the result is in half precision
    return np.array(mx.dequantize(m.weight, scales, biases, m.group_size, m.bits))


def deciding_matrix(ffn: FFN, raw: np.ndarray) -> Matrix:
    """The stored deciding part of every unit as one matrix, from a layer's records, uint8 [units, stride]."""
    return part_matrix(ffn, raw, ffn.first)


def part_matrix(ffn: FFN, raw: np.ndarray, name: str) -> Matrix:
    """The same of any streamed part, quantised or not."""
    if not ffn.bits:
        return Matrix(stored_part(ffn.record, raw, name))
    words, scales, biases = (stored_part(ffn.record, raw, name + s) for s in ("", "_scales", "_biases"))
    return Matrix(words, scales, biases, ffn.bits, ffn.group_size)


def stored_part(record: Record, raw: np.ndarray, name: str) -> mx.array:
    """One part of records uint8 [n, stride] as an array [n, *shape]."""
    part = record[name]
    assert part.offset is not None
    data = np.ascontiguousarray(raw[:, part.offset : part.offset + part.num_bytes])
    bits = {"float32": np.float32, "uint32": np.uint32}.get(part.dtype, np.uint16)
    array = mx.array(data.view(bits).reshape(len(raw), *part.shape))
    return array.view({"float16": mx.float16, "bfloat16": mx.bfloat16}.get(part.dtype, array.dtype))
