"""Experts, one record each: the whole matrices gate (where they have one) and up [hidden, d_model] and down
[d_model, hidden] as MLX's gather operations take them, with what quantisation adds and, where the family has them,
biases.

What is quantised already is copied as it is: a record's bytes are then the checkpoint's, and the output is mlx-lm's.
Where layers differ in bits or groups, those with fewer bits are written with as many as the others have, in their
groups: every layer then has one format, and no value changes.
(By rows of neurons, as dense layouts are stored, `down`, which is quantised along the neurons, would have to be
quantised again.) One expert is in memory at a time where the checkpoint stores it as tensors of its own or as a slice
of a stacked one; where the model's class computes it of others (fused or interleaved), one part of a layer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxflash.converters.checkpoint import Checkpoint, CheckpointError

from mlxflash.bundle import Part, make_record

ALIASES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}  # in `experts.N`
KINDS = {"weight": "", "scales": "_scales", "biases": "_biases", "bias": "_bias"}  # of a module's tensors, and of parts
CODES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16", mx.uint32: "uint32", mx.uint8: "uint8"}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file."""

    file: Path
    dtype: mx.Dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, index: int | None = None) -> mx.array:
        """All of it, or one of a stack; only those bytes are read."""
        shape = self.shape if index is None else self.shape[1:]
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.size
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[self.dtype.size]
        with open(self.file, "rb") as f:
            f.seek(self.offset + (index or 0) * size)
            raw = f.read(size)
        if len(raw) < size:
            raise CheckpointError(f"{self.file}: ends inside a tensor")
        return mx.array(np.frombuffer(raw, bits).reshape(shape)).view(self.dtype)


class Experts:
    """The experts of a checkpoint: what a record is, and records layer by layer."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, bits: int | None, group_size: int):
        self._checkpoint = checkpoint
        self._stored = _index(checkpoint.files)
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self._bits, self._group = bits, group_size
        self._whole: dict[str, mx.array] = {}  # a layer's stacked tensors, where the model's class computes them
        layers = range(checkpoint.num_layers())  # how each part is quantised: in every layer, and to be stored
        self._own = {
            part: [checkpoint.quantised_as(self._path(layer, part, "weight")[: -len(".weight")]) for layer in layers]
            for part in checkpoint.family.parts
        }
        self._formats = {part: self._common(part) for part in checkpoint.family.parts}
        first = self._arrays(0, 0)
        hidden = checkpoint.shapes[self._path(0, "up", "weight")][1]
        if bits and hidden % group_size:
            raise ValueError(f"-q {bits}: groups of {group_size} do not divide experts of {hidden} neurons")
        self.record = make_record([Part(name, DTYPES[a.dtype], tuple(a.shape), 0) for name, a in first.items()])

    def width(self, checkpoint: Checkpoint) -> int:
        return checkpoint.shapes[self._path(0, "down", "weight")][1]

    def units(self, checkpoint: Checkpoint, layer: int) -> int:
        return checkpoint.shapes[self._path(layer, "down", "weight")][0]

    def residents(self, checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
        """Nothing: what belongs to an expert streams with it."""
        return {}

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the experts are quantised, as a manifest says it."""
        if self._bits:
            return {"bits": self._bits, "group_size": self._group, "mode": "affine"}
        most = self._formats["up"]
        if most is None:
            return None
        keys = ("bits", "group_size")
        other = {part: {k: own[k] for k in keys} for part, own in self._formats.items() if own and own != most}
        return most | ({"parts": other} if other else {})

    def _common(self, part: str) -> dict[str, Any] | None:
        """Of a matrix of every layer's experts: the most bits and the smallest groups of any, which hold what other
        layers have without a change of any value."""
        first = self._own["up"][0]
        for layer, own in enumerate(self._own[part]):
            if (own and own["mode"]) != (first and first["mode"]):
                raise CheckpointError(
                    f"{self._checkpoint.path}: {part!r} of the experts of layer {layer} is {_words(own)}, 'up' of layer"
                    f" 0 is {_words(first)}; a bundle holds experts of one kind"
                )
        formats = [own for own in self._own[part] if own is not None]
        if not formats:
            return None
        bits, group = max(own["bits"] for own in formats), min(own["group_size"] for own in formats)
        return formats[0] | {"bits": bits, "group_size": group}

    def records(self, layer: int) -> Iterator[np.ndarray]:
        """One expert's record at a time, uint8 [1, stride]."""
        self._whole.clear()
        for expert in range(self.units(self._checkpoint, layer)):
            out = np.zeros((1, self.record.stride), np.uint8)
            arrays = self._arrays(layer, expert)
            given = {name: (DTYPES[a.dtype], tuple(a.shape)) for name, a in arrays.items()}
            if given != {p.name: (p.dtype, p.shape) for p in self.record.parts}:
                raise CheckpointError(
                    f"{self._checkpoint.path}: the experts of layer {layer} are not stored as layer 0's are; "
                    "a bundle holds one format"
                )
            for name, array in arrays.items():
                part = self.record[name]
                assert part.offset is not None
                array = mx.contiguous(array)
                mx.eval(array)
                out[0, part.offset : part.offset + part.num_bytes] = np.frombuffer(_bytes(array), np.uint8)
            yield out

    def _arrays(self, layer: int, expert: int) -> dict[str, mx.array]:
        """An expert's parts as they are to be stored."""
        arrays: dict[str, mx.array] = {}
        for part in self._checkpoint.family.parts:
            for kind, suffix in KINDS.items():
                path = self._path(layer, part, kind)
                if path not in self._checkpoint.shapes:
                    continue
                array = self._read(path, part, expert)
                if array.dtype in FLOATS:
                    _check_finite(array, f"{self._checkpoint.path}: {path} of expert {expert} holds NaN or infinity")
                    if kind in ("weight", "bias"):
                        array = array.astype(self._dtype)
                        _check_finite(array, f"{self._checkpoint.path}: {path} overflows {DTYPES[self._dtype]}")
                array = self._in_common(array, kind, layer, part)
                if kind == "weight" and self._bits:
                    arrays[part], arrays[f"{part}_scales"], arrays[f"{part}_biases"] = mx.quantize(
                        array, self._group, self._bits
                    )
                else:
                    arrays[f"{part}{suffix}"] = array
        return arrays

    def _in_common(self, array: mx.array, kind: str, layer: int, part: str) -> mx.array:
        """Words, scales or biases of a quantised matrix in the format that this part has in all layers."""
        own, common = self._own[part][layer], self._formats[part]
        if own == common or own is None or common is None or kind == "bias":
            return array
        if kind == "weight":
            return widen(array, own["bits"], common["bits"])
        return mx.repeat(array, own["group_size"] // common["group_size"], axis=-1)

    def _path(self, layer: int, part: str, kind: str) -> str:
        return f"{self._checkpoint.ffn_path(layer)}.{self._checkpoint.family.parts[part]}.{kind}"

    def _read(self, path: str, part: str, expert: int) -> mx.array:
        """One expert's share of the parameter at `path`, as cheaply as it is stored."""
        module, _, kind = path.rpartition(".")
        block = module.rsplit(".", 2)[0]
        shape, dtype = self._checkpoint.shapes[path], self._checkpoint.dtypes[path]
        names = [f"{block}.experts.{expert}.{alias}.{kind}" for alias in ALIASES[part]]
        for name, index in [(path, expert), *((name, None) for name in names)]:
            found = self._stored.get(name)
            if found and (found.shape, DTYPES[found.dtype]) == (shape if index is not None else shape[1:], dtype):
                return found.read(index)
        if path not in self._whole:
            self._whole[path] = self._checkpoint.tensor(path)
        return self._whole[path][expert]


def widen(words: mx.array, bits: int, to: int) -> mx.array:
    """The same numbers in `to` bits each for `bits`: uint32 [rows, n] as MLX packs them, one after another from the
    lowest bit on. With the same scales and biases they stand for the same weights."""
    rows = []
    for row in np.array(words):  # unpacked, a bit is a byte
        numbers = np.unpackbits(row.view(np.uint8), bitorder="little").reshape(-1, bits)
        rows.append(np.packbits(np.pad(numbers, ((0, 0), (0, to - bits))), bitorder="little").view(np.uint32))
    return mx.array(np.stack(rows))


def _words(own: dict[str, Any] | None) -> str:
    return f"{own['bits']}-bit {own['mode']}" if own else "not quantised"


def _check_finite(array: mx.array, message: str) -> None:
    if not mx.isfinite(array).all().item():
        raise CheckpointError(message)


def _index(files: list[Path]) -> dict[str, _Stored]:
    """Every tensor of safetensors files whose structure has been checked."""
    found = {}
    for file in files:
        if file.suffix != ".safetensors":  # PyTorch's: the model's class stacks what they hold
            continue
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header: dict[str, Any] = json.loads(f.read(length))
        for name, said in header.items():
            if name != "__metadata__" and said["dtype"] in CODES:
                begin = 8 + length + said["data_offsets"][0]
                found[name] = _Stored(file, CODES[said["dtype"]], tuple(said["shape"]), begin)
    return found


def _bytes(array: mx.array) -> memoryview:
    view: Any = array
    return memoryview(view).cast("B")
