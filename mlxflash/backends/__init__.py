"""Where units live and how the FFN is computed on them: one file per device behind one small interface.

A backend makes `Rows` (memory for units of one layer), multiplies by resident matrices, and says in which dtype
activations are. The rest of the package never asks which device it runs on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.bundle import BundleError, Manifest, Record
from mlxflash.plan import Plan
from mlxflash.pool import Landing, Source, Staging
from mlxflash.reader import Reader
from mlxflash.resident import Tensor

FLOATS = ("float32", "float16", "bfloat16")
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # of MLX's affine quantisation
PARTIAL_SUMS = 128  # of blocks, each [d_model] of a token, that MLX makes before they are added up
AFFINE_FORMATS, MXFP4_FORMATS = tuple(product(BITS, GROUPS)), ((4, 32),)


@dataclass(frozen=True)
class FFN:
    """What the parts of a record mean: `plain` is act(up.x) * down, `gated` is act(gate.x) * (up.x) * down; `experts`
    and `blocks` (of neurons, gated where there is a gate) are whole matrices.

    The activation `drelu` is gated and a ReLU of both products; `fatrelu` passes what is above `threshold`.
    """

    layout: str
    activation: str
    record: Record
    d_model: int
    bits: int = 0  # 0: parts are float rows, else words, scales and biases in groups along d_model
    group_size: int = 0
    threshold: float = 0.0
    mode: str = "affine"  # of quantisation
    formats: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of parts whose bits and groups are their own

    @classmethod
    def of(cls, manifest: Manifest, where: str = "manifest.json") -> "FFN":
        """Raises BundleError when the record's parts are not what the layout computes with."""
        if manifest.layout == "experts":
            return cls._of_experts(manifest, where)
        if manifest.layout == "blocks":
            return cls._of_blocks(manifest, where)
        q = manifest.quantization or {"bits": 0, "group_size": 0, "mode": "affine"}
        if q["mode"] != "affine":
            raise BundleError(f"{where}: {manifest.layout} units of mode {q['mode']!r} are unknown; convert again")
        ffn = cls(
            manifest.layout,
            manifest.activation.removeprefix("routed "),
            manifest.record,
            manifest.d_model,
            q["bits"],
            q["group_size"],
            manifest.threshold,
        )
        if ffn.bits and (ffn.bits not in (4, 8) or ffn.group_size not in (32, 64, 128) or ffn.d_model % ffn.group_size):
            raise BundleError(f"{where}: {ffn.bits} bits in groups of {ffn.group_size} make no sense; convert again")
        parts = {p.name: (p.dtype, p.shape) for p in ffn.record.parts if p.offset is not None}
        if parts != ffn._streamed(manifest.dtype):
            raise BundleError(f"{where}: these are not {ffn.layout} parts of width {ffn.d_model}; convert again")
        for p in ffn.record.parts:
            if p.offset is None and (p.name not in ffn._biases() or (p.dtype, p.shape) != ("float32", ())):
                raise BundleError(f"{where}: part {p.name!r} means nothing to {ffn.layout} units; convert again")
        return ffn

    def format(self, name: str) -> tuple[int, int]:
        """Bits and group size of a quantised matrix."""
        return self.formats.get(name, (self.bits, self.group_size))

    def _products(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("up",)

    def _biases(self) -> list[str]:
        """Names of the parts that may be resident per unit."""
        return [f"{name}_bias" for name in self._products()]

    def _streamed(self, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to dtype and shape of every part that a unit of this layout streams."""
        names = [*self._products(), "down"]
        if not self.bits:
            return {name: (dtype, (self.d_model,)) for name in names}
        scale = "float16" if dtype == "float32" else dtype
        groups = (self.d_model // self.group_size,)
        parts: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in names:
            parts[name] = "uint32", (self.d_model * self.bits // 32,)
            parts[f"{name}_scales"] = parts[f"{name}_biases"] = scale, groups
        return parts

    @classmethod
    def _of_experts(cls, manifest: Manifest, where: str) -> "FFN":
        """An expert's parts are whole matrices as MLX has them: gate, of gated ones, and up [hidden, d_model], down
        [d_model, hidden]; of all of them the bias or of none."""
        q = manifest.quantization or {"bits": 0, "group_size": 0, "mode": "affine"}
        record, d = manifest.record, manifest.d_model
        kind = "experts", manifest.activation, record, d, q["bits"], q["group_size"]
        ffn = cls(*kind, mode=q["mode"], formats=manifest.formats)
        for bits, group in {ffn.format(name) for name in ("gate", "up", "down")} if ffn.bits else ():
            if (bits, group) not in (AFFINE_FORMATS if q["mode"] == "affine" else MXFP4_FORMATS):
                raise BundleError(f"{where}: {bits} bits in groups of {group} make no sense; convert again")
        parts = {p.name: (p.dtype, p.shape) for p in record.parts if p.offset is not None}
        hidden = next((p.shape[0] for p in record.parts if p.name == "up" and len(p.shape) == 2), 0)
        scales = parts.get("up_scales", ("",))[0]
        known = scales == "uint8" if q["mode"] == "mxfp4" else scales in FLOATS
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        whole = not ffn.bits or known
        for name, rows, columns in (("gate", hidden, d), ("up", hidden, d), ("down", d, hidden)):
            if name == "gate" and name not in parts:
                continue
            if ffn.bits:
                bits, group = ffn.format(name)
                whole = whole and columns % group == 0
                wanted[name] = "uint32", (rows, columns * bits // 32)
                wanted[f"{name}_scales"] = scales, (rows, columns // group)
                if q["mode"] == "affine":
                    wanted[f"{name}_biases"] = scales, (rows, columns // group)
            else:
                wanted[name] = manifest.dtype, (rows, columns)
            if "up_bias" in parts:
                wanted[f"{name}_bias"] = manifest.dtype, (rows,)
        if parts != wanted or len(parts) != len(record.parts) or not whole:
            raise BundleError(f"{where}: these are not the parts of experts of width {d}; convert again")
        return ffn

    @classmethod
    def _of_blocks(cls, manifest: Manifest, where: str) -> "FFN":
        """A block's parts are quantised matrices as MLX has them: gate, where there is one, and up [neurons, d_model],
        down [d_model, neurons], each of its own bits and group size (of down, all the neurons), and perhaps biases of
        gate and up."""
        record, d = manifest.record, manifest.d_model
        q = manifest.quantization or {"bits": 0, "group_size": 0, "mode": ""}
        parts = {p.name: (p.dtype, p.shape) for p in record.parts if p.offset is not None}
        up, (scales, _) = parts.get("up", ("", ()))[1], parts.get("up_scales", ("", ()))
        neurons = up[0] if up else 0
        choices = AFFINE_FORMATS if q["mode"] == "affine" and scales in FLOATS else ()
        choices = MXFP4_FORMATS if q["mode"] == "mxfp4" and scales == "uint8" else choices
        formats: dict[str, tuple[int, int]] = {}
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in ("gate", "up", "down") if "gate" in parts else ("up", "down"):
            rows, columns = (d, neurons) if name == "down" else (neurons, d)
            for bits, group in choices:
                if columns % group or (name == "down" and columns != group):
                    continue
                matrix = {name: ("uint32", (rows, columns * bits // 32))}
                matrix[f"{name}_scales"] = scales, (rows, columns // group)
                if q["mode"] == "affine":
                    matrix[f"{name}_biases"] = scales, (rows, columns // group)
                if matrix.items() <= parts.items():
                    formats[name] = bits, group
                    wanted |= matrix
            if name != "down" and parts.get(f"{name}_bias", ("",))[0] in FLOATS:
                wanted[f"{name}_bias"] = parts[f"{name}_bias"][0], (rows,)
        same = formats.get("up") == (q["bits"], q["group_size"]) and len(parts) == len(record.parts)
        if parts != wanted or not same:
            raise BundleError(f"{where}: these are not the parts of blocks of width {d}; convert again")
        return cls("blocks", manifest.activation, record, d, q["bits"], q["group_size"], manifest.threshold, q["mode"],
                   formats)  # fmt: skip

    @property
    def gated(self) -> bool:
        return self.layout == "gated" or (self.layout == "blocks" and "gate" in self.record)

    @property
    def neurons(self) -> int:
        """Of one unit."""
        return self.record["up"].shape[0] if self.layout in ("experts", "blocks") else 1

    @property
    def first(self) -> str:
        """The part whose product with x decides whether a unit is active."""
        return self._products()[0]

    def offset(self, bias: np.ndarray | None, units: int) -> np.ndarray:
        """What is added to the deciding products, so that a unit is active where the sum is above zero: [units]."""
        return (np.zeros(units, np.float32) if bias is None else bias) - np.float32(self.threshold)


@dataclass
class Traffic:
    """What went to a discrete device, and what that took; all zero elsewhere."""

    updates: int = 0
    bytes: int = 0
    bytes_back: int = 0  # of units that the device gave up, to the host tier
    seconds: float = 0.0  # in which the host asked for it, or waited for it where the backend's `waits` is set
    pool_copies: int = 0  # updates that copied a whole pool
    syncs: int = 0  # times that the host waited for the device
    tier_hits: int = 0  # units that came from the host tier
    tier_misses: int = 0


class Rows(Protocol):
    """Slots for units of one layer and the FFN on them. The window's view of it is `window.Rows`."""

    capacity: int
    leaves_out_free: bool  # whether rows that `ffn` leaves out cost nothing and are not even read

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing: ...

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None: ...

    def take(self, slots: np.ndarray, other: Any, sources: np.ndarray) -> None: ...

    def settle(self, discard: bool = False) -> None:
        """Finish, or `discard`, computations that still read rows: they may be overwritten afterwards."""

    def ffn(
        self, x: mx.array, n: int, keep: np.ndarray | None = None, watch: int = 0
    ) -> tuple[mx.array, np.ndarray | None]:
        """The FFN of rows [0, n) for x [tokens, d_model]: y [tokens, d_model], without the layer's output bias.

        `keep`, bool [n], leaves rows out. With `watch` the second value is bool [watch, n]: which rows were active
        (a product other than zero) for each of the last `watch` tokens. What lies in rows from n on, NaN included,
        never reaches y.
        """


class Backend(Protocol):
    """One device."""

    name: str
    discrete: bool  # whether the host and the device have memory of their own
    leaves_out_free: bool  # of its rows: whether those that are left out cost nothing
    traffic: Traffic
    carries: str  # what brings units to a discrete device, for people
    peak_bytes: int  # of MLX's memory, before the last time that the backend reset it
    product_rounding: float  # how much products round what they multiply, relatively: 0 where they are float32's

    def available_memory(self) -> int | None:
        """Bytes of its own memory that a discrete device has free; None where it uses the host's or cannot say."""

    def landings(self, ffn: FFN, plan: Plan) -> tuple[Any, Any]:
        """Where units land on their way to a window's rows, and to a stream's blocks: what `rows` wants as its third
        argument."""

    def activation_dtype(self, manifest: Manifest) -> mx.Dtype: ...

    def rows(self, ffn: FFN, capacity: int, staging: Any) -> Rows: ...

    def slot_bytes(self, ffn: FFN) -> int:
        """Memory that one slot of `rows` takes."""

    def layer_bytes(self, ffn: FFN) -> int:
        """Memory that `rows` takes beside its slots."""

    def is_staged(self, ffn: FFN) -> bool:
        """Whether units pass through staging, as not all reads can land in `rows` in place."""

    def operand(self, x: mx.array) -> Any:
        """x where this device computes on it: an array of MLX's, or of NumPy's where the host computes."""

    def multiply(self, x: Any, weight: "Matrix") -> Any:
        """x [tokens, columns], an operand, times a resident matrix: an operand [tokens, rows]."""

    def project(self, x: Any, *weights: "Matrix") -> Callable[[], np.ndarray]:
        """x [tokens, columns] times resident matrices in turn, for the host: what is returned gives float32
        [tokens, rows].

        The device may compute between the two calls, so that several products cost one synchronisation.
        """

    def load(self, found: list[Tensor], reader: Reader, direct: bool) -> dict[str, Any]:
        """Read resident tensors to where this device wants them."""

    def place(self, model: nn.Module, weights: dict[str, Any]) -> None:
        """Give a model's modules what `load` returned, in the form that this device computes best.

        What remains in `weights` afterwards are MLX arrays for the model's own parameters. Raises KeyError for a
        tensor that is missing or misshapen.
        """


@dataclass(frozen=True)
class Matrix:
    """A resident matrix [rows, columns], float or quantised in groups along its columns."""

    weight: Any  # an mx.array, or a HostArray where the backend loads those
    scales: Any = None
    biases: Any = None
    bits: int = 0
    group_size: int = 0
    hidden: np.ndarray | None = None  # float32 [rows]: `project` adds it, and a ReLU follows before the next matrix

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.weight, self.scales, self.biases, self.hidden) if a is not None)


def host_landings(ffn: FFN, plan: Plan) -> tuple[Staging, Staging]:
    """`Backend.landings` where the device uses the host's memory: one buffer for all."""
    staging = Staging(plan.staging, ffn.record)
    return staging, staging


NO_CUDA = "this MLX was built without it: pip uninstall -y mlx-cpu; pip install 'mlxflash[cuda13]' (or cuda12)"


def make_backend(device: str | None = None) -> Backend:
    """The backend for `device`: "cuda", "metal", "cpu", or for checks "mlx-cpu" (MLX's own CPU operations) and
    "discrete" (the same, as if the host did not share its memory); None picks the best here."""
    from mlxflash._native import core
    from mlxflash.backends.metal import MLXBackend

    has_metal = mx.metal.is_available()
    has_cuda = mx.cuda.is_available() and mx.device_count(mx.gpu) > 0  # the first alone is true without a GPU
    if device is None:
        device = "metal" if has_metal else "cuda" if has_cuda else "cpu"
    if device == "metal":
        if not has_metal:
            raise ValueError("device metal: this MLX has no Metal; use --device cpu")
        return MLXBackend(mx.gpu)
    if device == "cuda":
        from mlxflash.backends.cuda import DeviceBackend
        from mlxflash.backends.pagelocked import open_bus
        from mlxflash.install import conflict

        if not mx.cuda.is_available():
            raise ValueError(f"device cuda: {conflict() or NO_CUDA}")
        if not has_cuda:
            raise ValueError("device cuda: MLX finds no NVIDIA GPU here; use --device cpu")
        return DeviceBackend(mx.gpu, *open_bus())
    if device == "cpu" and core is not None:
        from mlxflash.backends.cpu import CPUBackend

        return CPUBackend()
    if device in ("cpu", "mlx-cpu"):
        return MLXBackend(mx.cpu)
    if device == "discrete":
        from mlxflash.backends.cuda import DeviceBackend

        return DeviceBackend(mx.cpu)
    raise ValueError(f"unknown device {device!r}: cuda, metal, cpu, mlx-cpu and discrete are there")
