"""Dense FFNs that MLX has quantised, one record per block of neurons, their numbers as they are.

MLX groups `down` [d_model, neurons] along the neurons: those of a group share scales, and none can be stored alone. So
a unit is a group: its rows of `gate` and `up` and its columns of `down`, whole matrices as an expert's are, with what
quantisation adds and, where the family has them, the biases of its rows.

All layers have one format. Where they differ in bits (mlx-lm's mixed recipes), the widest holds the others: the same
q's, scales and biases, and so the same weights. What else differs is refused.
"""

from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlxflash.converters import dense
from mlxflash.converters.checkpoint import DTYPES, Checkpoint, CheckpointError

from mlxflash.bundle import Part, make_record

KINDS = {"weight": "", "scales": "_scales", "biases": "_biases", "bias": "_bias"}  # of a module's tensors, and of parts
STEP_BYTES = 64 << 20  # of records in memory, and of rows while they are widened


class Blocks:
    """The FFNs of a quantised checkpoint: what a record is, and records layer by layer."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        layers = range(checkpoint.num_layers())
        formats = {part: [self._format(layer, part) for layer in layers] for part in checkpoint.family.parts}
        for part, found in formats.items():
            for layer in layers:
                one, other = formats["down"][0], formats[part][0]
                if (found[layer]["mode"], found[layer]["group_size"]) != (one["mode"], other["group_size"]):
                    raise self._differs(layer)
        self._bits = {part: max(f["bits"] for f in found) for part, found in formats.items()}
        self._neurons = formats["down"][0]["group_size"]
        self.quantization = formats["up"][0] | {"bits": self._bits["up"]}
        arrays = self._arrays(0)
        if len({a.dtype for name, a in arrays.items() if name.endswith(("_scales", "_biases"))}) > 1:
            raise self._differs(0)
        self.record = make_record([Part(name, DTYPES[a.dtype], a.shape[1:], 0) for name, a in arrays.items()])

    def width(self, checkpoint: Checkpoint) -> int:
        return dense.width(checkpoint)

    def units(self, checkpoint: Checkpoint, layer: int) -> int:
        path = f"{checkpoint.ffn_path(layer)}.{checkpoint.family.parts['down']}.scales"
        return checkpoint.shapes[path][1]

    def residents(self, checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
        """What stays in memory: `down_bias` [d_model]."""
        return {name: bias for name, bias in dense.residents(checkpoint, layer).items() if name == "down_bias"}

    def records(self, layer: int) -> Iterator[np.ndarray]:
        """A layer's records in order, some at a time, uint8 [n, stride]."""
        arrays = self._arrays(layer)
        if {n: (DTYPES[a.dtype], a.shape[1:]) for n, a in arrays.items()} != {
            p.name: (p.dtype, p.shape) for p in self.record.parts
        }:
            raise self._differs(layer)
        units, step = len(arrays["down"]), max(1, STEP_BYTES // self.record.stride)
        for first in range(0, units, step):
            out = np.zeros((min(step, units - first), self.record.stride), np.uint8)
            for name, array in arrays.items():
                part, rows = self.record[name], mx.contiguous(array[first : first + step])
                mx.eval(rows)
                assert part.offset is not None
                raw = np.frombuffer(memoryview(cast(Any, rows)).cast("B"), np.uint8)
                out[:, part.offset : part.offset + part.num_bytes] = raw.reshape(len(out), -1)
            yield out

    def _format(self, layer: int, part: str) -> dict[str, Any]:
        path = f"{self._checkpoint.ffn_path(layer)}.{self._checkpoint.family.parts[part]}"
        found = self._checkpoint.quantised_as(path)
        if found is None:
            raise CheckpointError(
                f"{self._checkpoint.path}: {path} is not quantised, though other weights are; "
                "convert the float checkpoint instead"
            )
        return found

    def _differs(self, layer: int) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint.path}: the feed-forward weights of layer {layer} are quantised otherwise than those "
            "before; a bundle holds one mode, group size and type of scales"
        )

    def _arrays(self, layer: int) -> dict[str, mx.array]:
        """A layer's parts by unit, [units, rows, columns] or of biases [units, rows]."""
        arrays, units = {}, self.units(self._checkpoint, layer)
        for part, path in self._checkpoint.family.parts.items():
            for kind, suffix in KINDS.items():
                if f"{self._checkpoint.ffn_path(layer)}.{path}.{kind}" not in self._checkpoint.shapes:
                    continue
                if (part, kind) == ("down", "bias"):
                    continue
                array = dense.part(self._checkpoint, layer, part, kind)
                if kind == "weight":
                    array = _widened(array, self._format(layer, part)["bits"], self._bits[part])
                if part == "down":
                    array = array.reshape(len(array), units, -1).swapaxes(0, 1)
                else:
                    array = array.reshape(units, self._neurons, *array.shape[1:])
                arrays[f"{part}{suffix}"] = array
        return arrays


def _widened(words: mx.array, bits: int, wanted: int) -> mx.array:
    """Rows of q's of `bits` as rows of the same q's of `wanted` bits, uint32 [rows, ...]: streams of bits, the lowest
    first."""
    if bits == wanted:
        return words
    raw = np.asarray(words).view(np.uint8)
    out = np.empty((len(raw), raw.shape[1] * wanted // bits), np.uint8)
    step = max(1, STEP_BYTES // (8 * out.shape[1]))
    for first in range(0, len(raw), step):
        each = np.unpackbits(raw[first : first + step], axis=1, bitorder="little").reshape(
            -1, raw.shape[1] * 8 // bits, bits
        )
        wide = np.pad(each, ((0, 0), (0, 0), (0, wanted - bits)))
        out[first : first + step] = np.packbits(wide.reshape(len(each), -1), axis=1, bitorder="little")
    return mx.array(out.view(np.uint32))
