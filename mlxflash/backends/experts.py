"""Experts in slots, and what a token's chosen experts compute: act(gate x, up x) or act(up x), times down.

A slot has the shape of a record: one contiguous span per expert, so that a direct read lands where it is computed and
nothing is copied. MLX takes each part as a strided view of the whole pool: `gather_mm` and `gather_qmm` need the last
two dimensions contiguous only (checked by memory: RESULTS.md), so that the same file serves kernels that want whole
matrices and reads that want whole records.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn import relu2
from mlx_lm.models.activations import swiglu, swiglu_oai

from mlxflash._native import core
from mlxflash.backends import FFN
from mlxflash.bundle import ITEM_BYTES
from mlxflash.pool import Landing, RecordRows, Source, Staging, host_memory
from mlxflash.reader import Reader
from mlxflash.resident import MLX

KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
SORTED = 64  # pairs of token and expert from which MLX's kernels gain by knowing that slots ascend (as in mlx-lm)


class ExpertRows(Protocol):
    """Slots for experts of one layer. The window's view of it is `window.Rows`."""

    capacity: int
    leaves_out_free: bool  # whether computing in several pieces costs nothing
    routes_on_device: bool  # whether `experts` takes MLX arrays, so that a layer held whole needs no synchronisation

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing: ...

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None: ...

    def take(self, slots: np.ndarray, other: Any, sources: np.ndarray) -> None: ...

    def settle(self, discard: bool = False) -> None: ...

    def chosen(self, x: mx.array, indices: mx.array) -> np.ndarray:
        """What the router chose, int64 [n] of any shape, for the host; waits for it, and for x where that is shared."""

    def experts(self, x: mx.array, tokens: Any, slots: Any) -> Any:
        """Row i is the expert in slots[i] (ascending) for x[tokens[i]]: [pairs, d_model] of x [tokens, d_model].

        What lies in other slots, NaN included, never reaches it.
        """

    def join(self, pieces: list[Any], pairs: list[np.ndarray]) -> mx.array:
        """Results of `experts`, each with where its rows belong: [pairs, d_model], evaluated where slots may change."""


class Slots:
    """Record-shaped slots: the part of a backend's rows that the window sees."""

    def __init__(self, ffn: FFN, capacity: int, memory: memoryview, staging: Staging):
        self.capacity = capacity
        self._ffn = ffn
        self._memory = RecordRows(ffn.record, memory, staging)

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing:
        return self._memory.land(reader, source.file, units, slots)

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        self._memory.move(sources, slots)

    def take(self, slots: np.ndarray, other: Any, sources: np.ndarray) -> None:
        self._memory.take(slots, other._memory, sources)

    def chosen(self, x: mx.array, indices: mx.array) -> np.ndarray:
        mx.eval(x, indices)
        return np.asarray(indices).reshape(-1).astype(np.int64)


# --- native ---------------------------------------------------------------------------------------------------


def _silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-gate) is infinite where the product is zero
        return gate / (1 + np.exp(-gate)) * up


def _clamped(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gpt-oss: SwiGLU with alpha 1.702, both sides clamped at 7, and up + 1."""
    gate = np.minimum(gate, np.float32(7))
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(np.float32(-1.702) * gate)) * (np.clip(up, -7, 7) + 1)


def _relu2(up: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(up, 0))


# Of the products with gate and up, or with up alone where experts have no gate
HOST_ACTIVATIONS: dict[str, Callable[..., np.ndarray]] = {"silu": _silu, "clamped": _clamped, "relu2": _relu2}


class NativeExperts(Slots):
    """Native kernels on host memory, one expert after another with all of its tokens. Results are float32, and
    there when `experts` returns."""

    leaves_out_free = True
    routes_on_device = False

    def __init__(self, ffn: FFN, capacity: int, staging: Staging):
        super().__init__(ffn, capacity, host_memory(capacity * ffn.record.stride), staging)
        self._act = HOST_ACTIVATIONS[ffn.activation]
        self._spans = {p.name: (p.offset or 0, (p.offset or 0) + p.num_bytes) for p in ffn.record.parts}
        matrices = [p for p in ffn.record.parts if p.name in ("gate", "up", "down")]
        self._first = [p.name for p in matrices if p.name != "down"]
        self._rows = {p.name: (p.shape[0], p.num_bytes // p.shape[0]) for p in matrices}
        self._call: dict[str, Any] = {}
        self._kind = KINDS.get(matrices[0].dtype, "affine")
        if ffn.bits:
            self._call = {"scale_dtype": KINDS[ffn.record["up_scales"].dtype]}

    def settle(self, discard: bool = False) -> None:
        """Nothing is ever pending: kernels run when they are called."""

    def experts(self, x: mx.array, tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
        host = np.asarray(x if x.dtype == mx.float32 else x.astype(mx.float32))
        out = np.empty((len(slots), self._ffn.d_model), np.float32)
        edges = np.flatnonzero(np.diff(slots, prepend=-1, append=-1))
        for begin, end in pairwise(edges):
            slot, rows = int(slots[begin]), host[tokens[begin:end]]
            hidden = self._act(*(self._multiply(rows, slot, name) for name in self._first))
            self._multiply(hidden, slot, "down", out[begin:end])
        return out

    def _multiply(self, x: np.ndarray, slot: int, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """x [tokens, columns] times a matrix of a slot's: float32 [tokens, rows]."""
        assert core is not None
        rows, row_bytes = self._rows[name]
        out = np.empty((len(x), rows), np.float32) if out is None else out
        words = self._bytes(slot, name)
        more: dict[str, Any] = {}
        if self._ffn.bits:
            more = {"scales": self._bytes(slot, f"{name}_scales"), "biases": self._bytes(slot, f"{name}_biases")}
            more["bits"], more["group"] = self._ffn.format(name)
        if f"{name}_bias" in self._spans:
            more["bias"] = floats(self._bytes(slot, f"{name}_bias"), self._ffn.record[f"{name}_bias"].dtype)
        core.matmul(out, x, words, self._kind, len(x), rows, x.shape[1], row_bytes, **self._call, **more)
        return out

    def _bytes(self, slot: int, name: str) -> memoryview:
        begin, end = self._spans[name]
        base = slot * self._ffn.record.stride
        return self._memory.memory[base + begin : base + end]

    def join(self, pieces: list[np.ndarray], pairs: list[np.ndarray]) -> mx.array:
        if len(pieces) == 1 and (np.diff(pairs[0]) == 1).all():
            return mx.array(pieces[0])
        out = np.empty((sum(len(p) for p in pairs), self._ffn.d_model), np.float32)
        for piece, where in zip(pieces, pairs, strict=True):
            out[where] = piece
        return mx.array(out)


def floats(raw: Any, dtype: str) -> np.ndarray:
    """Stored numbers, bytes one after the other, as float32."""
    if dtype == "bfloat16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype).astype(np.float32)


# --- MLX ------------------------------------------------------------------------------------------------------


MLX_ACTIVATIONS: dict[str, Callable[..., mx.array]] = {"silu": swiglu, "clamped": swiglu_oai, "relu2": relu2}


class GatherExperts:
    """Experts by gather operations, whose shapes do not depend on which experts are held. For rows whose slots
    `_weights` gives as arrays."""

    _ffn: FFN
    _pending: mx.array | None = None

    def _weights(self, slots: Any) -> tuple[dict[str, mx.array], Any]:
        """Parts stacked [n, ...] in the dtype that is computed in, and where in them `slots` are."""
        raise NotImplementedError

    def experts(self, x: mx.array, tokens: Any, slots: Any) -> mx.array:
        weights, chosen = self._weights(slots)
        count, index = len(slots), mx.array(chosen).astype(mx.uint32)
        rows = mx.expand_dims(x[mx.array(tokens)], -2)
        first = [self._gather(rows, weights, name, index, count) for name in ("gate", "up") if name in weights]
        hidden = MLX_ACTIVATIONS[self._ffn.activation](*first)
        y = self._gather(hidden, weights, "down", index, count).squeeze(-2)
        self._pending = y
        return y

    def _gather(self, x: mx.array, weights: dict[str, mx.array], name: str, index: mx.array, count: int) -> mx.array:
        if self._ffn.bits:
            bits, group = self._ffn.format(name)
            y = mx.gather_qmm(
                x, weights[name], weights[f"{name}_scales"], weights.get(f"{name}_biases"),
                rhs_indices=index, transpose=True, group_size=group, bits=bits,
                mode=self._ffn.mode, sorted_indices=count >= SORTED,
            )  # fmt: skip
        else:
            y = mx.gather_mm(x, weights[name].swapaxes(-1, -2), rhs_indices=index, sorted_indices=count >= SORTED)
        if f"{name}_bias" in weights:
            y = y + mx.expand_dims(weights[f"{name}_bias"][index], -2)
        return y

    def join(self, pieces: list[mx.array], pairs: list[np.ndarray]) -> mx.array:
        y = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        where = np.concatenate(pairs)
        return y if (np.diff(where) == 1).all() else y[mx.array(np.argsort(where))]


class MLXExperts(GatherExperts, Slots):
    """Strided views of one MLX array.

    `compute`: the dtype that weights are multiplied in, None: their own. Where it is not theirs (MLX's CPU gathers
    float32 only), or where MLX does not see what the host writes, the experts used are copied first.
    """

    leaves_out_free = False

    def __init__(
        self,
        ffn: FFN,
        capacity: int,
        staging: Staging,
        shared: Callable[[tuple[int, ...], mx.Dtype], tuple[mx.array, memoryview]] | None,
        compute: mx.Dtype | None,
    ):
        stride = ffn.record.stride
        pool: mx.array | None = None
        if shared is None:
            memory = host_memory(capacity * stride)[: capacity * stride]
        else:
            pool, memory = shared((capacity, stride // 4), mx.uint32)
        super().__init__(ffn, capacity, memory, staging)
        self._compute = compute
        parts = [p for p in ffn.record.parts if p.offset is not None]
        floats = {MLX[p.dtype] for p in parts if p.dtype in KINDS}
        self._views: dict[str, mx.array] = {}
        aligned = all((p.offset or 0) % ITEM_BYTES[p.dtype] == 0 for p in parts)
        self.routes_on_device = pool is not None and aligned and (compute is None or floats <= {compute})
        if pool is not None and self.routes_on_device:
            for p in parts:
                assert p.offset is not None
                size = ITEM_BYTES[p.dtype]
                inner = (p.shape[1], 1) if len(p.shape) == 2 else (1,)
                flat = pool.view(MLX[p.dtype])
                self._views[p.name] = mx.as_strided(
                    flat, (capacity, *p.shape), (stride // size, *inner), p.offset // size
                )
            mx.eval(self._views)

    def settle(self, discard: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and not discard:
            mx.eval(pending)

    def _weights(self, slots: Any) -> tuple[dict[str, mx.array], Any]:
        self.settle()
        if self._views:
            return self._views, slots
        used, chosen = np.unique(slots, return_inverse=True)
        return {p.name: self._copy(p, used) for p in self._ffn.record.parts}, chosen

    def _copy(self, part: Any, used: np.ndarray) -> mx.array:
        """A part of the slots in `used`, in the dtype that is computed in."""
        size, stride = ITEM_BYTES[part.dtype], self._ffn.record.stride
        raw = np.frombuffer(self._memory.memory, np.uint8).reshape(self.capacity, stride)
        rows = raw[used, part.offset : part.offset + part.num_bytes]
        bits = rows.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size]).reshape(len(used), *part.shape)
        array = mx.array(bits).view(MLX[part.dtype])
        return array.astype(self._compute) if self._compute and part.dtype in KINDS else array
