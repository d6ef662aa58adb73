"""Checkpoint to bundle: one pass over the layers, with the memory of a layer or two whatever the model's size.

A bundle grows in `DST.partial` and is renamed when it is whole; an interrupted conversion finds its finished layers
there and goes on, or starts over when source or options differ. One file per FFN layout says what a unit's parts are.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlxflash.converters import dense
from mlxflash.converters.blocks import Blocks
from mlxflash.converters.checkpoint import Checkpoint, CheckpointError
from mlxflash.converters.experts import Experts
from mlxflash.converters.tokenizer import highest_token

from mlxflash.bundle import Bundle, BundleError, Layer, LayerWriter, Manifest, Part, Record, make_record, write_manifest
from mlxflash.bundle import file_bytes as layer_file_bytes
from mlxflash.predictor import low_bit_matrix, save_arrays, save_low_bit

GROUP_SIZES = (32, 64, 128)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
SHARD_BYTES = 256 << 20  # resident weights are written in shards, so that no more than one is in memory
BLOCK_BYTES = 64 << 20  # of records assembled at a time
KEPT_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "generation_config.json")
Progress = Callable[[str, int, int], None]  # what is done, how much of it, out of


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int = 64,
    predictor: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Convert a checkpoint directory into the bundle directory `target`, which must not exist.

    dtype: of the float parts (None: the checkpoint's). bits: 8 or 4 quantises every matrix in groups of `group_size`
    along its input (None: floats). predictor: make the low-bit predictor, which `calibrate` measures. Raises
    ValueError (CheckpointError, BundleError) with one sentence, OSError when the disk fails; `target` then does not
    exist.
    """
    checkpoint, target = Checkpoint(Path(source)), Path(target)
    if target.exists():
        raise BundleError(f"{target}: already exists; remove it or choose another name")
    dtype = dtype or _dtype_of(checkpoint)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: {', '.join(DTYPES)} are there")
    if bits not in (None, 4, 8):
        raise ValueError(f"{bits} bits: 8 and 4 are there")
    highest, vocabulary = highest_token(checkpoint.path), checkpoint.config["vocab_size"]
    if highest is not None and highest >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer's vocabulary has {highest + 1} tokens, the model's {vocabulary}; "
            "one of them belongs to another model"
        )
    if checkpoint.quantization is not None and (bits is not None or dtype != _dtype_of(checkpoint)):
        raise CheckpointError(f"{checkpoint.path}: already quantised; it is converted as it is, without -q and --dtype")
    layout: Any = dense
    if checkpoint.family.layout == "experts":
        layout = Experts(checkpoint, dtype, bits, group_size)
    elif checkpoint.quantization is not None:
        layout = Blocks(checkpoint)
    job = _Job(checkpoint, layout, target, dtype, bits, group_size, predictor)
    job.prepare()
    try:
        for index in range(checkpoint.num_layers()):
            progress("layers", index, checkpoint.num_layers())
            job.write_layer(index)
        progress("layers", checkpoint.num_layers(), checkpoint.num_layers())
        job.write_resident(progress)
        job.finish()
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; what is done is kept in {job.partial}", str(target)) from None
    return Bundle.open(target)


def _dtype_of(checkpoint: Checkpoint) -> str:
    """The dtype of most of the checkpoint's weights."""
    count: dict[str, int] = {}
    for name, shape in checkpoint.shapes.items():
        if checkpoint.dtypes[name] not in DTYPES:
            continue
        count[checkpoint.dtypes[name]] = count.get(checkpoint.dtypes[name], 0) + int(np.prod(shape, dtype=np.int64))
    return max(count, key=lambda d: count[d])


class _Job:
    """One conversion under way in `target.partial`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Any,
        target: Path,
        dtype: str,
        bits: int | None,
        group_size: int,
        predictor: bool,
    ):
        self.checkpoint, self.layout, self.target = checkpoint, layout, target
        self.dtype, self.bits, self.group_size = dtype, bits, group_size
        self.partial = target.with_name(target.name + ".partial")
        self.d_model = layout.width(checkpoint)
        if bits and group_size not in GROUP_SIZES:
            raise ValueError(f"groups of {group_size}: {', '.join(map(str, GROUP_SIZES))} are there")
        if bits and self.d_model % group_size:
            raise ValueError(f"-q {bits}: groups of {group_size} do not divide a model width of {self.d_model}")
        self.record = self._record()
        self.layers = [
            Layer(f"layers/{index:03d}.bundle", layout.units(checkpoint, index))
            for index in range(checkpoint.num_layers())
        ]
        self.predictor = predictor and self.d_model % 32 == 0 and self.manifest().sparse

    def _record(self) -> Record:
        if self.layout is not dense:
            return cast(Record, self.layout.record)
        d, parts = self.d_model, []
        for name in self.layout.streamed(self.checkpoint):
            if self.bits:
                groups = d // self.group_size
                scales = "float16" if self.dtype == "float32" else self.dtype
                parts.append(Part(name, "uint32", (d * self.bits // 32,), 0))
                parts.append(Part(f"{name}_scales", scales, (groups,), 0))
                parts.append(Part(f"{name}_biases", scales, (groups,), 0))
            else:
                parts.append(Part(name, self.dtype, (d,), 0))
        present = self.layout.residents(self.checkpoint, 0)
        parts += [Part(name, "float32", (), None) for name in self.layout.per_unit(self.checkpoint) if name in present]
        return make_record(parts)

    def manifest(self) -> Manifest:
        quantization = {"bits": self.bits, "group_size": self.group_size, "mode": "affine"} if self.bits else None
        if self.layout is not dense:
            quantization = self.layout.quantization
        return Manifest(
            model_type=self.checkpoint.config["model_type"],
            layout="blocks" if isinstance(self.layout, Blocks) else self.checkpoint.family.layout,
            activation=self.checkpoint.activation,
            threshold=self.checkpoint.threshold,
            dtype=self.dtype,
            d_model=self.d_model,
            quantization=quantization,
            record=self.record,
            layers=tuple(self.layers),
            source=self.checkpoint.path.name,
        )

    def prepare(self) -> None:
        """Make `target.partial`, or take over one that this same job left behind."""
        made_by = {
            "checkpoint": self.checkpoint.fingerprint(),
            "manifest": self.manifest().to_json(),
            "predictor": self.predictor,
        }
        file = self.partial / "conversion.json"
        try:
            same = json.loads(file.read_text()) == json.loads(json.dumps(made_by))
        except (OSError, ValueError):
            same = False
        if not same:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            (self.partial / "layers").mkdir(parents=True)
            if self.predictor:
                (self.partial / "predictors" / "low-bit").mkdir(parents=True)
            file.write_text(json.dumps(made_by))

    def write_layer(self, index: int) -> None:
        """One bundle file and its predictor, unless an earlier run finished them."""
        file = self.partial / self.layers[index].file
        guess = self.partial / "predictors" / "low-bit" / f"{index:03d}.safetensors"
        units = self.layers[index].units
        whole = file.exists() and file.stat().st_size == layer_file_bytes(units, self.record)
        if whole and (guess.exists() or not self.predictor):
            return
        matrices: dict[str, mx.array] = {}
        if self.layout is dense:
            matrices = self.layout.matrices(self.checkpoint, index)
        writer = LayerWriter(file, index, units, self.record)
        try:
            step = max(1, BLOCK_BYTES // self.record.stride)
            for first in range(0, units if matrices else 0, step):
                writer.write(self._records({k: v[first : first + step] for k, v in matrices.items()}))
            if self.layout is not dense:
                for record in self.layout.records(index):
                    writer.write(record)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        if self.predictor:
            deciding = matrices["gate" if "gate" in matrices else "up"]
            unknown = np.zeros(units, np.float32)
            save_low_bit(guess, low_bit_matrix(deciding), unknown, unknown)

    def _records(self, matrices: dict[str, mx.array]) -> np.ndarray:
        """Assemble records, uint8 [n, stride], from matrices [n, d_model]."""
        count = len(next(iter(matrices.values())))
        out = np.zeros((count, self.record.stride), np.uint8)
        for name, matrix in matrices.items():
            arrays = {name: matrix.astype(DTYPES[self.dtype])}
            if self.bits:
                words, scales, biases = mx.quantize(matrix.astype(mx.float32), self.group_size, self.bits)
                arrays = {name: words, f"{name}_scales": scales, f"{name}_biases": biases}
            for part_name, array in arrays.items():
                part = self.record[part_name]
                assert part.offset is not None
                if part.dtype != "uint32":
                    array = array.astype(DTYPES[part.dtype])
                if not mx.isfinite(array.astype(mx.float32)).all().item() and part.dtype != "uint32":
                    raise CheckpointError(f"{self.checkpoint.path}: weights of {name!r} overflow {part.dtype}")
                out[:, part.offset : part.offset + part.num_bytes] = _bytes(array)
        return out

    def write_resident(self, progress: Progress) -> None:
        """Everything outside the FFNs, quantised like mlx-lm does, and the FFNs' resident parts."""
        for old in self.partial.glob("resident*.safetensors"):
            old.unlink()
        ffns = tuple(self.checkpoint.ffn_path(i) + "." for i in range(len(self.layers)))
        names = [name for name in self.checkpoint.names() if not name.startswith(ffns)]
        quantisable = self.checkpoint.quantisable() if self.bits else set()
        shard: dict[str, mx.array] = {}
        count = 0

        def flush() -> None:
            nonlocal count
            if shard:
                save_arrays(self.partial / f"resident-{count:05d}.safetensors", shard)
                shard.clear()
                count += 1

        for done, name in enumerate(names):
            progress("resident weights", done, len(names))
            array, module = self.checkpoint.tensor(name), name.removesuffix(".weight")
            if module in quantisable and array.shape[-1] % self.group_size == 0 and name.endswith(".weight"):
                words, scales, biases = mx.quantize(array.astype(mx.float32), self.group_size, self.bits)
                kind = mx.float16 if self.dtype == "float32" else DTYPES[self.dtype]
                new = {name: words, f"{module}.scales": scales.astype(kind), f"{module}.biases": biases.astype(kind)}
            else:
                new = {name: self._as_stored(array) if self.checkpoint.castable(name) else array}
            mx.eval(list(new.values()))
            shard.update(new)
            if sum(a.nbytes for a in shard.values()) >= SHARD_BYTES:
                flush()
        for index in range(len(self.layers)):
            for part, array in self.layout.residents(self.checkpoint, index).items():
                shard[f"ffn.{index}.{part}"] = self._as_stored(array)
        flush()
        progress("resident weights", len(names), len(names))
        (self.partial / "config.json").write_text(json.dumps(self.checkpoint.config, indent=2))
        for pattern in KEPT_FILES:
            for file in self.checkpoint.path.glob(pattern):
                if file.is_file():
                    shutil.copy(file, self.partial / file.name)

    def _as_stored(self, array: mx.array) -> mx.array:
        """Floats in the bundle's dtype, but of a quantised checkpoint everything as it is."""
        verbatim = self.checkpoint.quantization is not None or array.dtype not in DTYPES.values()
        return array if verbatim else array.astype(DTYPES[self.dtype])

    def finish(self) -> None:
        write_manifest(self.partial, self.manifest())
        (self.partial / "conversion.json").unlink()
        os.rename(self.partial, self.target)


def _bytes(array: mx.array) -> np.ndarray:
    """The bytes of each row of a 2-D array, uint8 [rows, bytes]."""
    array = mx.contiguous(array)
    mx.eval(array)
    return np.frombuffer(memoryview(cast(Any, array)).cast("B"), np.uint8).reshape(array.shape[0], -1)
