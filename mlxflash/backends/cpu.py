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
from mlxflash.backends import FFN, Matrix, Traffic, host_landings
from mlxflash.backends.attention import replace_attention
from mlxflash.backends.experts import MLXExperts, NativeExperts, Slots, floats
from mlxflash.backends.metal import MLXBackend
from mlxflash.bundle import Manifest
from mlxflash.plan import Plan
from mlxflash.pool import Landing, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader
from mlxflash.resident import MLX, HostArray, Tensor, read_host

KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MLX_KINDS = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}


class CPUBackend:
    """Native kernels; made only where the native module is there."""

    name = "cpu"
    discrete = False
    leaves_out_free = True
    carries = ""
    peak_bytes = 0
    product_rounding = 0.0

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._mlx = MLXBackend(mx.cpu)

    def available_memory(self) -> int | None:
        return None

    def landings(self, ffn: FFN, plan: Plan) -> tuple[Any, Any]:
        return host_landings(ffn, plan)

    def activation_dtype(self, manifest: Manifest) -> mx.Dtype:
        return mx.float32

    def rows(self, ffn: FFN, capacity: int, staging: Staging) -> Any:
        if ffn.layout == "experts" and ffn.mode != "affine":  # which the kernels do not know
            return MLXExperts(ffn, capacity, staging, None, mx.float32)
        if ffn.layout == "experts":
            return NativeExperts(ffn, capacity, staging)
        if _left_to_mlx(ffn):
            return self._mlx.rows(ffn, capacity, staging)
        if ffn.layout == "blocks":
            return NativeBlocks(ffn, capacity, staging)
        return NativeRows(ffn, capacity, staging)

    def slot_bytes(self, ffn: FFN) -> int:
        return ffn.record.stride + 4 * sum(p.offset is None for p in ffn.record.parts)

    def layer_bytes(self, ffn: FFN) -> int:
        return self._mlx.layer_bytes(ffn) if _left_to_mlx(ffn) else 0

    def is_staged(self, ffn: FFN) -> bool:
        return self._mlx.is_staged(ffn) if _left_to_mlx(ffn) else not ffn.record.aligned

    def operand(self, x: mx.array) -> np.ndarray:
        return _host(x)

    def multiply(self, x: np.ndarray, weight: Matrix) -> np.ndarray:
        return multiply(x, weight)

    def project(self, x: mx.array | np.ndarray, *weights: Matrix) -> Callable[[], np.ndarray]:
        def product() -> np.ndarray:
            y = _host(x)
            for weight in weights:
                y = multiply(y, weight, weight.hidden)
                if weight.hidden is not None:
                    np.maximum(y, 0, out=y)
            return y

        return product

    def load(self, found: list[Tensor], reader: Reader, direct: bool) -> dict[str, HostArray]:
        return read_host(found, reader, direct)

    def place(self, model: nn.Module, weights: dict[str, Any]) -> None:
        """Replace attention, and linear layers and embeddings by ones that take their weights out of `weights`."""
        for path, module in model.named_modules():
            linear = isinstance(module, (nn.Linear, nn.QuantizedLinear))
            if getattr(module, "mode", "affine") != "affine":  # MLX computes what the kernels do not know
                continue
            if linear or isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
                *parents, name = path.split(".")
                owner: Any = model
                for step in parents:
                    owner = owner[int(step)] if isinstance(owner, list) else getattr(owner, step)
                matrix = _take_matrix(path, module, weights)
                bias = weights.pop(f"{path}.bias").mlx() if "bias" in module else None
                new = NativeLinear(matrix, bias) if linear else NativeEmbedding(matrix)
                if isinstance(owner, list):
                    owner[int(name)] = new
                else:
                    setattr(owner, name, new)
        replace_attention(model)
        for name, array in weights.items():
            weights[name] = array.mlx().astype(mx.float32) if len(array.shape) < 2 else array.mlx()


def _left_to_mlx(ffn: FFN) -> bool:
    """Blocks in formats that the kernels do not know."""
    return ffn.layout == "blocks" and ffn.mode != "affine"


def _take_matrix(path: str, module: nn.Module, weights: dict[str, Any]) -> Matrix:
    weight = weights.pop(f"{path}.weight")
    if tuple(weight.shape) != tuple(module.weight.shape):
        raise KeyError(f"{path}.weight of shape {list(module.weight.shape)}, found {list(weight.shape)}")
    if "scales" not in module:
        return Matrix(weight)
    scales, biases = weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases")
    return Matrix(weight, scales, biases, module.bits, module.group_size)


def _kind(array: mx.array | HostArray) -> str:
    return KINDS[array.dtype] if isinstance(array, HostArray) else MLX_KINDS[array.dtype]


def _buffer(array: mx.array | HostArray) -> Any:
    return array.memory if isinstance(array, HostArray) else array


def multiply(x: mx.array | np.ndarray, weight: Matrix, bias: np.ndarray | None = None) -> np.ndarray:
    """x [..., columns] times a resident matrix [rows, columns], float32 [..., rows]."""
    assert core is not None
    rows, columns = weight.weight.shape[0], x.shape[-1]
    out = np.empty((*x.shape[:-1], rows), np.float32)
    tokens = out.size // rows
    row_bytes = weight.weight.nbytes // rows
    words = _buffer(weight.weight)
    if weight.scales is not None and weight.biases is not None:
        core.matmul(
            out, _host(x), words, "affine", tokens, rows, columns, row_bytes,
            scales=_buffer(weight.scales), biases=_buffer(weight.biases), scale_dtype=_kind(weight.scales),
            group=weight.group_size, bits=weight.bits, bias=bias,
        )  # fmt: skip
    else:
        core.matmul(out, _host(x), words, _kind(weight.weight), tokens, rows, columns, row_bytes, bias=bias)
    return out


def _host(x: mx.array | np.ndarray) -> np.ndarray:
    """The values of x, float32 and contiguous; evaluates it, and nothing else: each evaluation costs 80 us."""
    if isinstance(x, np.ndarray):
        return x
    return np.ascontiguousarray(np.asarray(x if x.dtype == mx.float32 else x.astype(mx.float32)))


class NativeLinear(nn.Module):
    """x W^T + bias, float32."""

    def __init__(self, matrix: Matrix, bias: mx.array | None):
        super().__init__()
        self._matrix = matrix
        self._bias = None if bias is None else np.array(bias.astype(mx.float32))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.array(multiply(x, self._matrix, self._bias))


class NativeEmbedding(nn.Module):
    """Rows of a matrix, float32; also the output head where the two are tied."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self._matrix = matrix

    def __call__(self, ids: mx.array) -> mx.array:
        m, chosen = self._matrix, np.asarray(ids)
        count, least, most = m.weight.shape[0], int(chosen.min(initial=0)), int(chosen.max(initial=0))
        if least < 0 or most >= count:
            raise ValueError(f"token or position {least or most}: this model has {count}, counted from 0")
        rows = [_rows_of(array, chosen) for array in (m.weight, m.scales, m.biases) if array is not None]
        if m.bits:
            scales, biases = rows[1].astype(mx.float32), rows[2].astype(mx.float32)
            return mx.dequantize(rows[0], scales, biases, m.group_size, m.bits)
        return rows[0].astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return mx.array(multiply(x, self._matrix))


def _rows_of(array: mx.array | HostArray, ids: np.ndarray) -> mx.array:
    if isinstance(array, HostArray):
        return mx.array(array.numpy()[ids]).view(MLX[array.dtype])
    return array[mx.array(ids)]


class NativeRows:
    """Record-shaped rows in host memory; see backends.Rows. Results are there when `ffn` returns."""

    leaves_out_free = True

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
        self._call |= {"act": ffn.activation, "threshold": ffn.threshold}

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


class NativeBlocks(Slots):
    """Blocks of quantised neurons in record-shaped slots; see backends.Rows. Results are there when `ffn` returns."""

    leaves_out_free = True

    def __init__(self, ffn: FFN, capacity: int, staging: Staging):
        super().__init__(ffn, capacity, host_memory(capacity * ffn.record.stride), staging)
        record = ffn.record
        self._call: dict[str, Any] = {"act": ffn.activation, "threshold": ffn.threshold}
        for name in ffn.formats:
            offsets = (record[name + end].offset for end in ("", "_scales", "_biases"))
            self._call[name] = *ffn.format(name), *offsets
        self._biases = [p for p in record.parts if p.name in ("gate_bias", "up_bias")]

    def settle(self, discard: bool = False) -> None:
        """Nothing is ever pending: kernels run when they are called."""

    def ffn(self, x: mx.array, n: int, keep: np.ndarray | None = None, watch: int = 0) -> tuple[mx.array, None]:
        assert core is not None
        assert not watch, "blocks are never predicted"
        ffn, record = self._ffn, self._ffn.record
        out = np.zeros((len(x), ffn.d_model), np.float32)
        if n:
            pool = np.frombuffer(self._memory.memory, np.uint8).reshape(-1, record.stride)[:n]
            biases = {
                p.name: floats(np.ascontiguousarray(pool[:, p.offset : p.offset + p.num_bytes]), p.dtype)
                for p in self._biases
                if p.offset is not None
            }
            core.blocks(
                out, _host(x), self._memory.memory, n, len(x), ffn.d_model, ffn.neurons, record.stride,
                KINDS[record["up_scales"].dtype], slots_mask=None if keep is None else keep.astype(np.uint8),
                **biases, **self._call,
            )  # fmt: skip
        return mx.array(out), None
