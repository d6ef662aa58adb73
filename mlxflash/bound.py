"""A predictor that is never wrong: it rules out the units that cannot fire, by proof, and all others are computed.

Of each row w of the deciding matrix a copy q in a few bits is resident, and of e = w - q, what it lost, the length and
the product with the inputs' mean:

    w.x = q.x + e.mean + e.(x - mean) <= q.x + e.mean + |e| |x - mean|

A unit is ruled out where that and its bias, with all that rounding may have done to the sum (and to a float32 product
of w itself), come to nothing above zero. The mean only makes it tight: it holds for any x. Knowing e along the inputs'
principal directions too, or its length in groups of columns, costs memory that another bit uses better (RESULTS.md).

Rounding: a sum of n products, each rounded a few times, is off by at most (n + few) u times the sum of the products'
magnitudes, in whatever order it is computed (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN, Backend, Matrix
from mlxflash.bundle import Bundle, BundleError
from mlxflash.misses import misses_per_token
from mlxflash.predictor import Ids, add_matrix, floats, has_shape, low_bit_matrix, read_matrix, save_arrays

BITS = (4, 5, 6, 8)  # of the copy, to choose from
UNIT = 2.0**-24  # float32 rounds by so much at most, relatively
FEW = 64  # roundings beside those of a sum's terms
LARGEST = 1e15  # a norm from which on sums of products might overflow: nothing is ruled out
LEAST = 1e-15  # added to a norm, for what underflows
ROWS = 1024
SIMULATED = 512  # tokens that a choice of bits is judged on


@dataclass(frozen=True)
class Loss:
    """What is known of each unit's e, float32 [units]: its product with the mean; its length, and that of the
    magnitudes which w and q are made of, neither too small."""

    shift: np.ndarray
    length: np.ndarray
    size: np.ndarray


class Bound:
    """See above; a `predictor.Predictor`."""

    def __init__(self, backend: Backend, copy: Matrix, mean: np.ndarray, loss: Loss, offset: np.ndarray):
        """copy [units, d_model], mean [d_model]; offset [units]: the deciding product's bias minus its threshold."""
        self._backend, self._copy = backend, copy
        self._mean = backend.operand(mx.array(mean))
        rounding = (2 * backend.product_rounding + (len(mean) + FEW) * UNIT) * loss.size.astype(np.float64)
        self._slope = _up(loss.length + rounding)
        known = offset.astype(np.float64) + loss.shift
        self._offset = _up(known + 8 * UNIT * np.abs(known) + rounding * np.linalg.norm(mean.astype(np.float64)))
        self.nbytes = copy.nbytes + mean.nbytes + self._slope.nbytes + self._offset.nbytes

    def start(self, x: mx.array) -> Ids:
        """x [tokens, d_model]; the ids of all units that any of the tokens may activate."""
        possible = self.possible(x)
        return lambda: np.flatnonzero(possible().any(axis=0))

    def possible(self, x: mx.array) -> Callable[[], np.ndarray]:
        """Which units x [tokens, d_model] may activate: bool [tokens, units]."""
        operand = self._backend.operand(x.astype(mx.float32))
        centred, estimate = operand - self._mean, self._backend.project(operand, self._copy)

        def flags() -> np.ndarray:
            value = estimate()
            norms = np.linalg.norm(np.asarray(centred, np.float64), axis=1) + LEAST
            norms[~(norms < LARGEST)] = np.inf
            value = value + (self._offset + norms[:, None].astype(np.float32) * self._slope)
            return cast(np.ndarray, ~(value <= 0))  # what is no number is not ruled out

        return flags


def _up(values: np.ndarray) -> np.ndarray:
    """float32, a little above float64 `values`: more than rounding them, and the few sums they enter, takes away."""
    return (values + 8 * UNIT * np.abs(values) + 1e-37).astype(np.float32)


def lost(exact: Matrix, copy: Matrix, mean: np.ndarray) -> Loss:
    """What `copy` lost of a deciding matrix [units, d_model], as computed from both in float64."""
    parts = []
    for w, q in _by_rows(exact, copy):
        (true, true_size), (kept, size) = _values(w), _values(q)
        error = true - kept
        lengths = [np.linalg.norm(a, axis=1) for a in (error, true_size, size)]
        parts.append((error @ mean.astype(np.float64), lengths[0], lengths[1] + lengths[2] + 1e-6))
    shift, length, size = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Loss(shift.astype(np.float32), _up(length), _up(size))


def _by_rows(*matrices: Matrix) -> Iterator[list[Matrix]]:
    """The same ROWS rows of each, part by part."""
    for i in range(0, len(matrices[0].weight), ROWS):
        cut = slice(i, i + ROWS)
        yield [
            Matrix(m.weight[cut], m.scales[cut], m.biases[cut], m.bits, m.group_size)
            if m.bits
            else Matrix(m.weight[cut])
            for m in matrices
        ]


def _values(m: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """A matrix's values, exactly, and the magnitudes of what they are added up from: float64 [rows, columns]."""
    if not m.bits:
        values = floats(m).astype(np.float64)
        return values, np.abs(values)
    ones = mx.ones(m.scales.shape)
    codes = np.array(mx.dequantize(m.weight, ones, mx.zeros_like(ones), m.group_size, m.bits), np.float64)
    scales, biases = (
        np.repeat(np.array(a.astype(mx.float32), np.float64), m.group_size, axis=1) for a in (m.scales, m.biases)
    )
    return codes * scales + biases, np.abs(codes * scales) + np.abs(biases)


def bound_file(bundle: Bundle, index: int) -> Path:
    return bundle.path / "predictors" / "bound" / f"{index:03d}.safetensors"


def make_bound(
    bundle: Bundle, index: int, backend: Backend, exact: Matrix, offset: np.ndarray, x: np.ndarray, share: float
) -> Bound:
    """Make and save one layer's predictor from its deciding matrix, offset and inputs x [tokens, d_model].

    The copy has the number of bits that reads least on x, where `share` of the layer's bytes hold predictor and units.
    A matrix that is stored in so few bits is its own best copy: nothing is lost but by rounding.
    """
    units, unit_bytes, mean = len(offset), bundle.manifest.record.num_bytes, x.mean(axis=0)
    if len(mean) % 32:
        raise BundleError(f"{bundle.path}: width {len(mean)} is not in groups of 32, as a low-bit copy is")
    weight = mx.array(floats(exact))
    copies = [low_bit_matrix(weight, bits) for bits in BITS if not exact.bits or bits < exact.bits]
    best: tuple[float, Bound, Matrix, Loss] | None = None
    for copy in [*copies, exact] if exact.bits else copies:
        loss = lost(exact, copy, mean)
        made = Bound(backend, copy, mean, loss, offset)
        held = int(share * units - made.nbytes / unit_bytes)
        wanted = made.possible(mx.array(x[-SIMULATED:]))()
        reads = misses_per_token(wanted, held) if held > 0 else float(units)
        if best is None or reads < best[0]:
            best = reads, made, copy, loss
    assert best is not None
    _, made, copy, loss = best
    arrays = {"mean": mx.array(mean), "records": mx.array(bundle.checksums(index))}  # of which alone the bound is true
    arrays |= {field.name: mx.array(getattr(loss, field.name)) for field in fields(loss)}
    meta: dict[str, str] = {}
    add_matrix("copy", copy, arrays, meta)
    file = bound_file(bundle, index)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(file, arrays, meta)
    return made


def load_bound(bundle: Bundle, index: int, backend: Backend, ffn: FFN, offset: np.ndarray) -> Bound:
    """What make_bound saved. Raises BundleError when the file is damaged or was made of other records."""
    file, units = bound_file(bundle, index), bundle.manifest.layers[index].units
    try:
        arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        copy = read_matrix(arrays, meta, "copy")
        mean, records, *numbers = (np.array(arrays[n]) for n in ("mean", "records", *(f.name for f in fields(Loss))))
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise BundleError(f"{file}: not a bound ({problem}); calibrate again") from None
    good = has_shape(copy, units, ffn.d_model) and mean.shape == (ffn.d_model,)
    good = good and all(a.shape == (units,) for a in numbers)
    good = good and all(a.dtype == np.float32 and np.isfinite(a).all() for a in (mean, *numbers))
    if not good or not np.array_equal(records, bundle.checksums(index)):
        raise BundleError(f"{file}: made for another model; calibrate again")
    mx.eval(copy.weight, copy.scales, copy.biases)
    return Bound(backend, copy, mean, Loss(*numbers), offset)
