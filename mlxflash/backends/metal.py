"""Rows in MLX arrays and the FFN in plain MLX operations: Apple Silicon, and MLX's CPU device to check it there.

Unified memory: reads land in the arrays through host views. Rules that keep this safe (measured, see the law tests):
an array with a host view is never assigned to by MLX; every computation that reads a row is evaluated before the row
is overwritten (`settle`); slices handed to MLX are prefixes, so that nothing is copied.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import FFN, PARTIAL_SUMS, Matrix, Traffic, host_landings
from mlxflash.backends.experts import MLXExperts
from mlxflash.bundle import ITEM_BYTES, Manifest
from mlxflash.plan import Plan
from mlxflash.pool import Landing, PartRows, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader
from mlxflash.resident import MLX, Tensor, read_mlx

PAGE = 16384

ACTIVATIONS = {
    "relu": nn.relu,
    "drelu": nn.relu,  # of the gate; the other product's stands in `activate`
    "relu2": lambda x: mx.square(nn.relu(x)),
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
}


def activate(ffn: FFN, first: mx.array, up: mx.array | None) -> mx.array:
    """What multiplies the down rows, from the deciding products and, of gated units, those of `up`."""
    if ffn.activation == "fatrelu":
        h = mx.where(first > ffn.threshold, first, mx.zeros((), first.dtype))
    else:
        h = ACTIVATIONS[ffn.activation](first)
    if up is None:
        return h
    return h * (nn.relu(up) if ffn.activation == "drelu" else up)


def shared_array(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, memoryview]:
    """An MLX array on page-aligned memory and a writable view of its bytes.

    The view keeps the memory alive; because it and the array share one buffer MLX never updates the array in place.
    """
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.size
    raw = mx.zeros((-(-(num_bytes + PAGE) // 4),), mx.uint32)  # uint32: dimensions are int32, pools pass 2 GiB
    mx.eval(raw)
    view = memoryview(cast(Any, raw)).cast("B")
    skip = -np.frombuffer(view, np.uint8).ctypes.data % PAGE // 4
    array = raw[skip : skip + -(-num_bytes // 4)]
    array = array.view(dtype)[: num_bytes // dtype.size].reshape(shape)
    mx.eval(array)
    return array, view[4 * skip : 4 * skip + num_bytes]


def views_alias(device: Any) -> bool:
    """Whether bytes written through a host view are what MLX computes with, on this machine and this MLX."""
    try:
        array, view = shared_array((4, 8), mx.float32)
    except (ValueError, RuntimeError, BufferError):
        return False
    with mx.stream(device):
        for value in (1.0, 3.0):
            np.frombuffer(view, np.float32)[:] = value
            if mx.sum(array[:2]).item() != 16 * value:
                return False
    return True


class MLXBackend:
    """MLX arrays and operations on one MLX device; `record_rows` keeps a unit's parts in one contiguous slot.

    Metal takes column splits of record-shaped rows without a copy, MLX's CPU and every quantised kernel want each
    part row-contiguous.
    """

    discrete = False
    leaves_out_free = False
    carries = ""

    def __init__(self, device: Any, record_rows: bool | None = None, alias: bool | None = None):
        self.traffic = Traffic()
        self.peak_bytes = 0
        self.product_rounding = 0.0 if device == mx.cpu else 2.0**-11  # GPUs may take float32 as TF32
        self.name = "metal" if device == mx.gpu else "mlx-cpu"
        self._device = device
        self._record_rows = device == mx.gpu if record_rows is None else record_rows
        self._alias = views_alias(device) if alias is None else alias

    def available_memory(self) -> int | None:
        return None

    def landings(self, ffn: FFN, plan: Plan) -> tuple[Any, Any]:
        return host_landings(ffn, plan)

    def activation_dtype(self, manifest: Manifest) -> mx.Dtype:
        """The weights' dtype; on the CPU float32 beside quantised weights, whose half-precision kernels crawl."""
        if (manifest.quantization is not None or manifest.layout == "experts") and self._device == mx.cpu:
            return mx.float32
        return MLX[manifest.dtype]

    def rows(self, ffn: FFN, capacity: int, staging: Any) -> Any:
        if ffn.layout == "experts":
            compute = mx.float32 if self._device == mx.cpu else None
            return MLXExperts(ffn, capacity, staging, shared_array if self._alias else None, compute)
        return MLXRows(ffn, capacity, staging, self._has_records(ffn), self._alias)

    def _has_records(self, ffn: FFN) -> bool:
        return ffn.layout == "experts" or (self._record_rows and not ffn.bits)

    def slot_bytes(self, ffn: FFN) -> int:
        streamed = ffn.record.stride if self._has_records(ffn) else ffn.record.num_bytes
        return streamed + 4 * sum(p.offset is None for p in ffn.record.parts)

    def is_staged(self, ffn: FFN) -> bool:
        return not (self._has_records(ffn) and ffn.record.aligned)

    def layer_bytes(self, ffn: FFN) -> int:
        return PAGE * len(ffn.record.parts)  # what aligning an array costs

    def operand(self, x: mx.array) -> mx.array:
        return x

    def multiply(self, x: mx.array, weight: Matrix) -> mx.array:
        if weight.scales is None:
            return x @ weight.weight.T
        x = x.astype(mx.float32) if self._device == mx.cpu else x  # half-precision x is 40 times slower there
        return mx.quantized_matmul(
            x, weight.weight, weight.scales, weight.biases, True, weight.group_size, weight.bits
        )  # fmt: skip

    def chain(self, x: mx.array, weights: tuple[Matrix, ...]) -> mx.array:
        """What `project` hands over, float32."""
        for weight in weights:
            x = self.multiply(x, weight)
            if weight.hidden is not None:
                x = mx.maximum(x + mx.array(weight.hidden), 0)
        return x.astype(mx.float32)

    def project(self, x: mx.array, *weights: Matrix) -> Callable[[], np.ndarray]:
        y = self.chain(x, weights)
        mx.async_eval(y)
        return lambda: np.asarray(y)

    def load(self, found: list[Tensor], reader: Reader, direct: bool) -> dict[str, mx.array]:
        return read_mlx(found)

    def place(self, model: nn.Module, weights: dict[str, Any]) -> None:
        """Modules stay as MLX makes them."""


class MLXRows:
    """Rows of units in MLX arrays; see backends.Rows."""

    leaves_out_free = False

    def __init__(self, ffn: FFN, capacity: int, staging: Staging, record_rows: bool, alias: bool):
        self.capacity = capacity
        self._ffn, self._alias = ffn, alias
        self._pending: mx.array | None = None
        self._arrays: dict[str, mx.array] = {}
        self._host: dict[str, tuple[memoryview, mx.Dtype, tuple[int, ...]]] = {}
        self._resident: dict[str, np.ndarray] = {}
        self._columns: dict[str, slice] = {}
        record = ffn.record
        streamed = [p for p in record.parts if p.offset is not None]
        self._memory: Any
        if record_rows:
            item = ITEM_BYTES[streamed[0].dtype]
            view = self._make("record", (capacity, record.stride // item), MLX[streamed[0].dtype])
            for p in streamed:
                assert p.offset is not None
                self._columns[p.name] = slice(p.offset // item, (p.offset + p.num_bytes) // item)
            self._memory = RecordRows(record, view, staging)
        else:
            views = {p.name: self._make(p.name, (capacity, *p.shape), MLX[p.dtype]) for p in streamed}
            self._memory = PartRows(record, views, staging)
        for p in record.parts:
            if p.offset is None:
                view = self._make(p.name, (capacity,), mx.float32)
                self._resident[p.name] = np.frombuffer(view, np.float32)

    def _make(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> memoryview:
        if self._alias:
            self._arrays[name], view = shared_array(shape, dtype)
        else:
            num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.size
            view = host_memory(num_bytes)[:num_bytes]  # on a page, which direct reads want
            self._host[name] = view, dtype, shape[1:]
        return view

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing:
        for name, rows in self._resident.items():
            rows[slots] = source.resident[name][units]
        landing: Landing = self._memory.land(reader, source.file, units, slots)
        return landing

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        self._memory.move(sources, slots)
        for rows in self._resident.values():
            rows[slots] = rows[sources]

    def take(self, slots: np.ndarray, other: "MLXRows", sources: np.ndarray) -> None:
        self._memory.take(slots, other._memory, sources)
        for name, rows in self._resident.items():
            rows[slots] = other._resident[name][sources]

    def settle(self, discard: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and not discard:
            mx.eval(pending)

    def _rows(self, name: str, n: int) -> mx.array:
        """The live prefix of a part, without a copy; where views do not alias, a copy of the host's rows."""
        stored = "record" if name in self._columns else name
        if self._alias:
            rows = self._arrays[stored][:n]
        else:
            view, dtype, shape = self._host[stored]
            bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.size]
            raw = np.frombuffer(view, bits).reshape(self.capacity, *shape)[:n]
            rows = mx.array(raw).view(dtype)
        return rows[:, self._columns[name]] if name in self._columns else rows

    def _product(self, x: mx.array, name: str, n: int, transpose: bool) -> mx.array:
        if not self._ffn.bits:
            rows = self._rows(name, n)
            return x @ (rows.T if transpose else rows)
        operands = self._quantised(name, n)
        if self._ffn.layout == "blocks":  # their rows, one block's after the other
            operands = [a if a is None else a.reshape(-1, a.shape[-1]) for a in operands]
        return self._quantised_matmul(x, name, operands, transpose)

    def _quantised(self, name: str, n: int) -> list[Any]:
        """Words, scales and, but in mxfp4, biases of the live prefix."""
        ends = ("", "_scales", "_biases")
        return [self._rows(name + end, n) if name + end in self._ffn.record else None for end in ends]

    def _quantised_matmul(self, x: mx.array, name: str, operands: list[Any], transpose: bool) -> mx.array:
        bits, group = self._ffn.format(name)
        words, scales, biases = operands
        return mx.quantized_matmul(x, words, scales, biases, transpose, group, bits, self._ffn.mode)

    def _biased(self, x: mx.array, name: str, n: int) -> mx.array:
        y = self._product(x, name, n, True)
        if f"{name}_bias" not in self._ffn.record:
            return y
        return y + self._rows(f"{name}_bias", n).reshape(-1).astype(x.dtype)

    def _blocks_down(self, h: mx.array, n: int) -> mx.array:
        """h [tokens, n * neurons] times the blocks' down matrices, some at a time: float32 [tokens, d_model]."""
        h = h.reshape(len(h), n, -1).swapaxes(0, 1)
        step = max(1, PARTIAL_SUMS // h.shape[1])
        y = mx.zeros((h.shape[1], self._ffn.d_model))
        for first in range(0, n, step):
            some = slice(first, first + step)
            operands = [a if a is None else a[some] for a in self._quantised("down", n)]
            y = y + self._quantised_matmul(h[some], "down", operands, True).astype(mx.float32).sum(axis=0)
        return y

    def ffn(
        self, x: mx.array, n: int, keep: np.ndarray | None = None, watch: int = 0
    ) -> tuple[mx.array, np.ndarray | None]:
        if n == 0:  # the quantised kernels of MLX's CPU device die of zero rows
            return mx.zeros_like(x), np.zeros((watch, 0), bool) if watch else None
        first = self._biased(x, self._ffn.first, n)
        h = activate(self._ffn, first, self._biased(x, "up", n) if self._ffn.gated else None)
        if keep is not None:
            h = mx.where(mx.array(np.repeat(keep, self._ffn.neurons)), h, mx.zeros((), h.dtype))
        whole = self._ffn.layout == "blocks"
        y = (self._blocks_down(h, n) if whole else self._product(h, "down", n, False)).astype(x.dtype)
        active = None
        if watch:
            used = h[-watch:] != 0
            mx.eval(y, used)
            active = np.asarray(used)
        self._pending = y
        return y, active
