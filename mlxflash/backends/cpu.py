"""Rows in plain host memory and the FFN in native kernels: Linux CPUs, where MLX's own matmuls use one scalar thread.

Activations are float32 whatever the weights are. Resident linear layers and embeddings are replaced by modules that
multiply the weights as stored, without a float32 copy. Kernels outrun BLAS here at every number of tokens (RESULTS.md),
so prompts take the same path.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash._native import core
from mlxflash.backends import FFN, Matrix
from mlxflash.bundle import Manifest
from mlxflash.pool import Landing, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader

KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MLX_KINDS = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}


class CPUBackend:
    """Native kernels; made only where the native module is there."""

    name = "cpu"

    def activation_dtype(self, manifest: Manifest) -> mx.Dtype:
        return mx.float32

    def rows(self, ffn: FFN, capacity: int, staging: Staging) -> "NativeRows":
        return NativeRows(ffn, capacity, staging)

    def slot_bytes(self, ffn: FFN) -> int:
        return ffn.record.stride + 4 * sum(p.offset is None for p in ffn.record.parts)

    def project(self, x: mx.array, weight: Matrix) -> Callable[[], np.ndarray]:
        return lambda: multiply(x, weight)

    def place(self, model: nn.Module) -> None:
        """Replace linear layers and embeddings by native ones on the same weights."""
        for path, module in model.named_modules():
            linear = type(module) in (nn.Linear, nn.QuantizedLinear)
            if linear or type(module) in (nn.Embedding, nn.QuantizedEmbedding):
                *parents, name = path.split(".")
                owner: Any = model
                for step in parents:
                    owner = owner[int(step)] if isinstance(owner, list) else getattr(owner, step)
                setattr(owner, name, NativeLinear(module) if linear else NativeEmbedding(module))


def multiply(x: mx.array, weight: Matrix, bias: np.ndarray | None = None) -> np.ndarray:
    """x [tokens, columns] times a resident matrix [rows, columns], float32 [tokens, rows]."""
    assert core is not None
    rows, columns = weight.weight.shape[0], x.shape[-1]
    out = np.empty((len(x), rows), np.float32)
    row_bytes = weight.weight.nbytes // rows
    if weight.bits:
        core.matmul(
            out, _host(x), weight.weight, "affine", len(x), rows, columns, row_bytes,
            scales=weight.scales, biases=weight.biases, scale_dtype=MLX_KINDS[weight.scales.dtype],  # type: ignore[union-attr]
            group=weight.group_size, bits=weight.bits, bias=bias,
        )  # fmt: skip
    else:
        core.matmul(
            out, _host(x), weight.weight, MLX_KINDS[weight.weight.dtype], len(x), rows, columns, row_bytes, bias=bias
        )
    return out


def _host(x: mx.array) -> np.ndarray:
    """The values of x, float32 and contiguous; evaluates it."""
    return np.ascontiguousarray(np.asarray(x.astype(mx.float32)))


def _matrix(module: nn.Module) -> Matrix:
    if "scales" in module:
        return Matrix(module.weight, module.scales, module.biases, module.bits, module.group_size)
    return Matrix(module.weight)


class NativeLinear(nn.Module):
    """x W^T + bias on the weights of an mlx.nn linear layer."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._matrix = _matrix(module)
        self._bias = np.array(module.bias.astype(mx.float32)) if "bias" in module else None
        self._rows = self._matrix.weight.shape[0]

    def __call__(self, x: mx.array) -> mx.array:
        out = multiply(x.reshape(-1, x.shape[-1]), self._matrix, self._bias)
        return mx.array(out).reshape(*x.shape[:-1], self._rows)


class NativeEmbedding(nn.Module):
    """An mlx.nn embedding whose rows come out float32; also the output head where the two are tied."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module, self._matrix = module, _matrix(module)

    def __call__(self, ids: mx.array) -> mx.array:
        return self._module(ids).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        out = multiply(x.reshape(-1, x.shape[-1]), self._matrix)
        return mx.array(out).reshape(*x.shape[:-1], self._matrix.weight.shape[0])


class NativeRows:
    """Record-shaped rows in host memory; see backends.Rows. Results are there when `ffn` returns."""

    def __init__(self, ffn: FFN, capacity: int, staging: Staging):
        self.capacity = capacity
        self._ffn = ffn
        stride = ffn.record.stride
        self._memory = RecordRows(ffn.record, host_memory(capacity * stride), staging)
        self._resident = {p.name: np.zeros(capacity, np.float32) for p in ffn.record.parts if p.offset is None}
        names = [p.name for p in ffn.record.parts if p.offset is not None]
        self._call: dict[str, Any] = {name: ffn.record[name].offset for name in names}
        self._kind = KINDS.get(ffn.record[ffn.first].dtype, "affine")
        if ffn.bits:
            scales = KINDS[ffn.record[f"{ffn.first}_scales"].dtype]
            self._call |= {"bits": ffn.bits, "group": ffn.group_size, "scale_dtype": scales}
        self._call["act"] = ffn.activation

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing:
        for name, rows in self._resident.items():
            rows[slots] = source.resident[name][units]
        return self._memory.land(reader, source.file, units, slots)

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        self._memory.move(sources, slots)
        for rows in self._resident.values():
            rows[slots] = rows[sources]

    def take(self, slots: np.ndarray, other: "NativeRows", sources: np.ndarray) -> None:
        self._memory.take(slots, other._memory, sources)
        for name, rows in self._resident.items():
            rows[slots] = other._resident[name][sources]

    def settle(self, discard: bool = False) -> None:
        """Nothing is ever pending: kernels run when they are called."""

    def ffn(
        self, x: mx.array, n: int, keep: np.ndarray | None = None, watch: int = 0
    ) -> tuple[mx.array, np.ndarray | None]:
        assert core is not None
        tokens = len(x)
        out = np.zeros((tokens, self._ffn.d_model), np.float32)
        active = np.zeros((tokens, n), np.uint8) if watch else None
        mask = None if keep is None else keep.astype(np.uint8)
        if n:
            core.ffn(
                out, _host(x), self._memory.memory, n, self._kind, tokens, self._ffn.d_model, self._ffn.record.stride,
                slots_mask=mask, active=active, **self._resident, **self._call,
            )  # fmt: skip
        return mx.array(out), None if active is None else active[-watch:].astype(bool)
