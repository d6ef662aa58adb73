"""Resident weights from a bundle's safetensors files: checked, sized for the planner, read once at the disk's speed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlxflash.bundle import BLOCK_BYTES, Bundle, BundleError
from mlxflash.pool import host_memory
from mlxflash.reader import File, Reader

CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "U8": "uint8"}
ITEMS = {"float32": np.float32, "uint32": np.uint32, "uint8": np.uint8, "float16": np.uint16, "bfloat16": np.uint16}
MLX = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "uint32": mx.uint32,
    "uint8": mx.uint8,
}
WORDS = ("uint32", "uint8")  # quantised weights, and the scales of some modes: never converted


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def is_small(self) -> bool:
        """Vectors, scales and biases are kept in the activations' dtype, matrices as stored."""
        return (len(self.shape) < 2 or self.name.endswith((".scales", ".biases"))) and self.dtype not in WORDS


@dataclass(frozen=True)
class HostArray:
    """A tensor's bytes in host memory that MLX does not own."""

    dtype: str
    shape: tuple[int, ...]
    memory: memoryview

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def numpy(self) -> np.ndarray:
        """A view; half precision comes as its bits, uint16."""
        return np.frombuffer(self.memory, ITEMS[self.dtype]).reshape(self.shape)

    def mlx(self) -> mx.array:
        """A copy."""
        return mx.array(self.numpy()).view(MLX[self.dtype])


def tensors(bundle: Bundle) -> list[Tensor]:
    """Every resident tensor, structure checked, nothing read. Raises BundleError naming the file."""
    found = []
    for file in bundle.resident_files():
        try:
            with safe_open(file, "numpy"):  # checks the header and every offset against the file's size
                pass
            with open(file, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"{file}: not a readable safetensors file ({error}); convert again") from None
        for name, said in header.items():
            if name == "__metadata__":
                continue
            if said["dtype"] not in CODES:
                raise BundleError(f"{file}: tensor {name!r} is {said['dtype']}; convert again")
            begin, end = said["data_offsets"]
            found.append(
                Tensor(name, CODES[said["dtype"]], tuple(said["shape"]), file, 8 + length + begin, end - begin)
            )
    return found


def read_mlx(found: list[Tensor]) -> dict[str, mx.array]:
    """All of them as MLX arrays, read by MLX."""
    arrays: dict[str, mx.array] = {}
    for file in sorted({t.file for t in found}):
        try:
            arrays |= cast(dict[str, mx.array], mx.load(str(file)))
            mx.eval(list(arrays.values()))
        except RuntimeError as error:
            raise BundleError(f"{file}: cannot be read ({error}); convert again") from None
    return arrays


def read_host(found: list[Tensor], reader: Reader, direct: bool) -> dict[str, HostArray]:
    """All of them in host memory, a whole file at a time in one batch: offsets in memory are offsets in the file."""
    arrays: dict[str, HostArray] = {}
    for path in sorted({t.file for t in found}):
        file = File(path, direct)
        try:
            size = os.fstat(file.fd).st_size
            memory = host_memory(size)
            whole = size // BLOCK_BYTES * BLOCK_BYTES if file.direct else size
            reader.submit(file, np.array([[0, 0, whole]] if whole else [], np.uint64).reshape(-1, 3), memory).wait()
            if whole < size:  # direct reads end on a block, the file need not
                with open(path, "rb") as tail:
                    tail.seek(whole)
                    memory[whole:size] = tail.read(size - whole)
        finally:
            file.close()
        for t in found:
            if t.file == path:
                arrays[t.name] = HostArray(t.dtype, t.shape, memory[t.offset : t.offset + t.num_bytes])
    return arrays


def ffn_parts(found: list[Tensor], arrays: dict[str, Any], num_layers: int) -> list[dict[str, np.ndarray]]:
    """Take the FFNs' resident arrays (`ffn.LAYER.PART`) out of `arrays`: float32, by layer and part."""
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(num_layers)]
    for t in found:
        if t.name.startswith("ffn."):
            _, index, part = t.name.split(".")
            array = arrays.pop(t.name)
            array = array.mlx() if isinstance(array, HostArray) else array
            parts[int(index)][part] = np.array(array.astype(mx.float32))
    return parts


def one_part(bundle: Bundle, index: int, name: str, units: int) -> np.ndarray:
    """One part of one layer that is resident per unit, float32 [units]; zeros where the family has none."""
    for t in tensors(bundle):
        if t.name == f"ffn.{index}.{name}":
            array = cast(dict[str, mx.array], mx.load(str(t.file)))[t.name]
            return np.array(array.astype(mx.float32))
    return np.zeros(units, np.float32)
