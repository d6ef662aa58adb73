"""Write a bundle or a checkpoint of a real model's shape with random weights, at disk speed.

Shows nothing by itself: the other benchmarks run on what it makes, so that speed can be measured at sizes nobody has
to download. Weights are random floats of small magnitude (LayerNorm weights 1, biases 0), so logits are finite and
about half of all ReLU units are active, at random: who wants realistic activity replays a trace (trace.py). Text that
comes out is noise, and quality cannot be measured on it.

How it is fast: one block of random records is made per model. Every block written is that block XORed with a fresh
random record (sign and mantissa bits only, so values stay sane), which makes no two pages of a file alike; CRC-32 is
linear, so a record's checksum follows from the block's without another pass. Files hold no holes. Sign and mantissa
are random, the exponent takes four values: as incompressible as real weights, not quite as random bytes. Writes go
around the page cache where the system can.

    python benchmarks/shapes.py opt-6.7b /data/opt-6.7b.flash --dtype float16 --predictor
"""

import argparse
import fcntl
import functools
import json
import mmap
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlxflash.bundle import ITEM_BYTES, Bundle, Layer, LayerWriter, Manifest, Part, Record, make_record, write_manifest
from mlxflash.models import FAMILIES, build_model, family_of
from mlxflash.predictor import LOW_BITS

BLOCK_BYTES = 32 << 20  # large beside any cache, small beside memory
BUFFER_BYTES = 16 << 20  # one write
SHARD_BYTES = {"resident": 256 << 20, "checkpoint": 2 << 30}
GROUP = 64
# Bits that may be drawn at random without changing a value's magnitude by more than a factor of two.
FREE_BITS = {"float16": 0x83FF, "bfloat16": 0x807F, "float32": 0x807FFFFF, "uint32": 0xFFFFFFFF}
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint32": "U32"}
WORDS = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Activity:
    """What is published of a sparse model, as shares of a layer's units: those a predictor flags for a token, those it
    flags for 5 tokens together, those flagged for a token and none of the 4 before. And the ranks of its low-rank
    predictors, in most layers and in an eighth of them."""

    flagged: float
    union: float
    new: float
    ranks: tuple[int, int]


# LLM in a flash (arXiv 2312.11514), section 3.1 and appendix.
OPT = Activity(0.10, 0.24, 0.024, (128, 1024))
# The same: 95 % sparse, a window of 4 reads 3.1 % and holds 33 %. Flagged is thrice what is active, as for OPT.
FALCON = Activity(0.15, 0.33, 0.031, (256, 1152))
# PowerInfer's predictor of ProSparse-7B, 89 % sparse, flags 21 % (its model card). Nothing is published of the rest: in
# OPT's proportions, by which a window of 2 reads about 9 %; that is what LLM in a flash's 279 ms of reads amount to.
LLAMA = Activity(0.21, 0.50, 0.05, (256, 1024))


@dataclass(frozen=True)
class Shape:
    layers: int
    d_model: int
    ffn: int
    heads: int
    vocabulary: int
    positions: int
    family: str = "opt"
    activation: str = "relu"  # as config.json has it
    kv_heads: int = 0  # 0: as many as heads
    activity: Activity = OPT

    @property
    def sparse(self) -> bool:
        return self.activation == "relu"

    def first(self, layers: int | None) -> "Shape":
        """Its first layers, and of the vocabulary what keeps its share of the whole."""
        layers = min(layers or self.layers, self.layers)
        return replace(self, layers=layers, vocabulary=max(512, self.vocabulary * layers // self.layers))

    def stored(self, name: str) -> str:
        """What a checkpoint calls a parameter."""
        return name.replace(".mlp.", ".") if self.family == "opt" else name

    @property
    def biased(self) -> bool:
        return self.family == "opt"

    def config(self, dtype: str) -> dict[str, Any]:
        """A config.json, as Hugging Face's checkpoints have it."""
        numbers = {
            "model_type": self.family,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "torch_dtype": dtype,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }
        if self.family == "falcon":
            way = {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False}
            return numbers | way | {"activation": self.activation, "ffn_hidden_size": self.ffn, "bias": False}
        if self.family == "llama":
            more = {"num_key_value_heads": self.kv_heads or self.heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
            act = {"hidden_act": self.activation, "tie_word_embeddings": False}
            return numbers | more | act | {"intermediate_size": self.ffn}
        return numbers | {
            "architectures": ["OPTForCausalLM"],
            "activation_function": self.activation,
            "pad_token_id": 1,
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True,
            "word_embed_proj_dim": self.d_model,
            "ffn_dim": self.ffn,
        }


SHAPES = {
    # The smallest whose records are whole blocks, as real ones are, and that streams at half of its size.
    "tiny": Shape(layers=4, d_model=1024, ffn=8192, heads=16, vocabulary=512, positions=512),
    "tiny-llama": Shape(4, 1024, 4096, 8, 512, 512, "llama", "silu"),
    "tiny-llama-relu": Shape(4, 1024, 4096, 8, 512, 512, "llama", "relu", activity=LLAMA),
    "tiny-falcon-relu": Shape(4, 1088, 4352, 17, 512, 512, "falcon", "relu", activity=FALCON),
    "opt-1.3b": Shape(layers=24, d_model=2048, ffn=8192, heads=32, vocabulary=50272, positions=2048),
    "opt-2.7b": Shape(layers=32, d_model=2560, ffn=10240, heads=32, vocabulary=50272, positions=2048),
    "opt-6.7b": Shape(layers=32, d_model=4096, ffn=16384, heads=32, vocabulary=50272, positions=2048),
    "tinyllama": Shape(22, 2048, 5632, 32, 32000, 2048, "llama", "silu", kv_heads=4),
    "llama-2-7b-relu": Shape(32, 4096, 11008, 32, 32000, 4096, "llama", "relu", activity=LLAMA),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 128256, 8192, "llama", "silu", kv_heads=8),
    "falcon-7b": Shape(32, 4544, 18176, 71, 65024, 2048, "falcon", "gelu"),
    "falcon-7b-relu": Shape(32, 4544, 18176, 71, 65024, 2048, "falcon", "relu", activity=FALCON),
}


def float_words(rng: np.random.Generator, dtype: str, count: int, rms: float) -> np.ndarray:
    """`count` random floats of root mean square about `rms`, as unsigned words of the dtype's size."""
    word = WORDS[ITEM_BYTES[dtype]]
    raw = np.frombuffer(rng.bytes(count * np.dtype(word).itemsize), word).copy()
    bias, shift = (15, 10) if dtype == "float16" else (127, 7 if dtype == "bfloat16" else 23)
    top = int(np.floor(np.log2(rms / 0.88))) + bias  # four exponents, top - 3 ... top, have 0.88 * 2^top
    exponent = np.arange(top, top - 4, -1).astype(word) << word(shift)
    raw &= word(FREE_BITS[dtype])
    raw |= exponent[np.frombuffer(rng.bytes(count), np.uint8) & 3]
    return raw


class Noise:
    """Endless random bytes of one kind of row, made by XORing one random block with a fresh random row each time.

    A row is parts of (dtype, items, value): value None for weights of root mean square `rms` (uint32: random words),
    else that number everywhere.
    """

    def __init__(self, rng: np.random.Generator, parts: list[tuple[str, int, float | None]], rms: float):
        self._rng, self._parts = rng, parts
        self.row_bytes = sum(ITEM_BYTES[dtype] * items for dtype, items, _ in parts)
        rows = max(1, BLOCK_BYTES // self.row_bytes)
        self.block = np.empty((rows, self.row_bytes), np.uint8)
        at = 0
        for dtype, items, value in parts:
            size = ITEM_BYTES[dtype] * items
            if value is not None:
                data = np.full((rows, items), value, dtype)
            elif dtype == "uint32":
                data = np.frombuffer(rng.bytes(rows * size), np.uint32)
            else:
                data = float_words(rng, dtype, rows * items, rms)
            self.block[:, at : at + size] = np.ascontiguousarray(data).view(np.uint8).reshape(rows, size)
            at += size
        self._sums = np.array([zlib.crc32(row.data) for row in self.block], np.uint32)
        self._zero = zlib.crc32(bytes(self.row_bytes))
        self._out = np.empty_like(self.block)

    def blocks(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Fresh rows, uint8 [n, row_bytes], with their CRC-32, uint32 [n]; what is yielded lives until the next."""
        for first in range(0, rows, len(self.block)):
            count = min(len(self.block), rows - first)
            mask = self._mask()
            wide = np.uint64 if self.row_bytes % 8 == 0 else np.uint8
            np.bitwise_xor(self.block[:count].view(wide), mask.view(wide), out=self._out[:count].view(wide))
            yield self._out[:count], self._sums[:count] ^ np.uint32(zlib.crc32(mask.data) ^ self._zero)

    def _mask(self) -> np.ndarray:
        parts = []
        for dtype, items, value in self._parts:
            word = WORDS[ITEM_BYTES[dtype]]
            raw = np.frombuffer(self._rng.bytes(items * np.dtype(word).itemsize), word)
            parts.append((raw & word(FREE_BITS[dtype] if value is None else 0)).view(np.uint8))
        return np.concatenate(parts)


@functools.cache
def write_buffers() -> tuple[memoryview, memoryview]:
    """Aligned memory for the one file that is being written."""
    return memoryview(mmap.mmap(-1, BUFFER_BYTES)), memoryview(mmap.mmap(-1, BUFFER_BYTES))


class DirectFile:
    """An unbuffered file being written: two aligned buffers, one filled while the other goes to disk.

    As a page cache full of dirty pages is slower than the disk and pushes other programs' pages out.
    """

    def __init__(self, file: Path, offset: int = 0):
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o644)
        if sys.platform == "darwin":  # what the cache holds is served from it, to readers with F_NOCACHE too
            fcntl.fcntl(self._fd, fcntl.F_NOCACHE, 1)
        os.lseek(self._fd, offset, os.SEEK_SET)
        self._buffers = list(write_buffers())
        self._thread = ThreadPoolExecutor(1)
        self._write: Future[None] | None = None
        self._used, self._done = 0, offset

    def write(self, data: Any) -> None:
        data = memoryview(data).cast("B")
        while len(data):
            part = data[: BUFFER_BYTES - self._used]
            self._buffers[0][self._used : self._used + len(part)] = part
            self._used += len(part)
            data = data[len(part) :]
            if self._used == BUFFER_BYTES:
                self._send(BUFFER_BYTES)

    def _send(self, count: int) -> None:
        if self._write is not None:
            self._write.result()
        self._write = self._thread.submit(_write_all, self._fd, self._buffers[0][:count])
        self._buffers.reverse()
        self._done, self._used = self._done + count, 0

    def tell(self) -> int:
        return self._done + self._used

    def flush(self) -> None:
        """Write what is left; only the end of the file, which need not be whole blocks, goes through the cache."""
        whole, rest = self._used // 4096 * 4096, bytes(self._buffers[0][: self._used])
        self._send(whole)
        self._write.result()  # type: ignore[union-attr]
        if hasattr(os, "O_DIRECT"):
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        _write_all(self._fd, memoryview(rest)[whole:])

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._fd)


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]


class FastWriter(LayerWriter):
    """A LayerWriter that is told the checksums and writes around the page cache."""

    def __init__(self, path: Path, index: int, units: int, record: Record):
        super().__init__(path, index, units, record)
        begin = self._file.tell()
        self._file.close()
        self._file = DirectFile(self._part, begin)  # type: ignore[assignment]

    def append(self, records: np.ndarray, sums: np.ndarray) -> None:
        padding = self._record.stride - records.shape[1]
        self._file.write(np.pad(records, ((0, 0), (0, padding))).data if padding else records.data)
        self._sums.extend(sums.tolist())


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: noise, or one number everywhere."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: float | None = None

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class TensorWriter:
    """Writes safetensors files of noise; one block of noise per dtype serves all."""

    def __init__(self, rng: np.random.Generator, rms: float):
        self._rng, self._rms = rng, rms
        self._noise: dict[str, Noise] = {}

    def write(self, file: Path, tensors: list[Tensor], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "mlx"}}
        end = 0
        for t in tensors:
            header[t.name] = {
                "dtype": SAFETENSORS[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [end, end + t.num_bytes],
            }
            end += t.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        f = DirectFile(file)
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            for chunk in self._chunks(t):
                f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
        f.close()

    def write_shards(self, name: str, folder: Path, tensors: list[Tensor], limit: int) -> list[tuple[str, list[str]]]:
        """Files of about `limit` bytes, `name` with {index} and {count} filled in; their names and tensors'."""
        shards: list[list[Tensor]] = [[]]
        for t in tensors:
            if shards[-1] and sum(x.num_bytes for x in shards[-1]) + t.num_bytes > limit:
                shards.append([])
            shards[-1].append(t)
        files = [name.format(index=i, number=i + 1, count=len(shards)) for i in range(len(shards))]
        for file, shard in zip(files, shards, strict=True):
            self.write(folder / file, shard)
        return [(file, [t.name for t in shard]) for file, shard in zip(files, shards, strict=True)]

    def _chunks(self, t: Tensor) -> Iterator[memoryview]:
        if t.value is not None:
            kind = np.dtype("float32") if t.dtype == "bfloat16" else np.dtype(t.dtype)
            data = np.full(t.shape, t.value, kind)
            yield (data.view(np.uint32) >> 16).astype(np.uint16).data if t.dtype == "bfloat16" else data.data
            return
        if t.dtype not in self._noise:
            self._noise[t.dtype] = Noise(self._rng, [(t.dtype, 4096 // ITEM_BYTES[t.dtype], None)], self._rms)
        noise, left = self._noise[t.dtype], t.num_bytes
        for rows, _ in noise.blocks(-(-left // noise.row_bytes)):
            part = rows.reshape(-1)[:left]
            left -= len(part)
            yield part.data


def weight_rms(shape: Shape) -> float:
    """Keeps pre-activations near one: LayerNorm gives each matrix unit variance."""
    return float(shape.d_model**-0.5)


def quantised_parts(
    name: str, rows: int | None, columns: int, bits: int, rms: float, scales: str
) -> list[tuple[str, str, tuple[int, ...], float | None]]:
    """Words, scales and biases that uniformly random words turn into numbers around zero of that rms."""
    lead = () if rows is None else (rows,)
    scale = rms * 12**0.5 / 2**bits
    return [
        (name, "uint32", (*lead, columns * bits // 32), None),
        ("scales", scales, (*lead, columns // GROUP), scale),
        ("biases", scales, (*lead, columns // GROUP), -scale * (2**bits - 1) / 2),
    ]


def record_of(shape: Shape, dtype: str, bits: int | None) -> tuple[Record, list[tuple[str, int, float | None]]]:
    """The record as converters lay it out, and its streamed parts for Noise."""
    parts: list[Part] = []
    noise: list[tuple[str, int, float | None]] = []
    for name in FAMILIES[shape.family].parts:
        if bits:
            scales = "float16" if dtype == "float32" else dtype
            for what, kind, size, value in quantised_parts("", None, shape.d_model, bits, weight_rms(shape), scales):
                parts.append(Part(f"{name}_{what}" if what else name, kind, size, 0))
                noise.append((kind, size[0], value))
        else:
            parts.append(Part(name, dtype, (shape.d_model,), 0))
            noise.append((dtype, shape.d_model, None))
    if shape.biased:
        parts.append(Part("up_bias", "float32", (), None))
    return make_record(parts), noise


def model_tensors(
    config: dict[str, Any], dtype: str, bits: int | None, rms: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Every tensor of the model by parameter path: those outside the FFNs (quantised with `bits`), and the FFNs'."""
    family, *_ = family_of(config, "shape")
    model = build_model(config, "shape")
    matrices = {name for name, module in model.named_modules() if hasattr(module, "to_quantized")}
    outside, inside = [], []
    for name, array in tree_flatten(model.parameters()):
        module, kind = name.rsplit(".", 1)
        is_norm = any(word in module for word in ("norm", "ln_"))
        value = 1.0 if is_norm and kind == "weight" else 0.0 if kind == "bias" else None
        tensor = Tensor(name, dtype, tuple(array.shape), value)
        if f".{family.ffn}." in name:
            inside.append(tensor)
        elif bits and module in matrices and kind == "weight":
            scales = "float16" if dtype == "float32" else dtype
            for what, t, size, v in quantised_parts("weight", array.shape[0], array.shape[1], bits, rms, scales):
                outside.append(Tensor(f"{module}.{what}", t, size, v))
        else:
            outside.append(tensor)
    return outside, inside


def write_bundle(
    shape: str | Shape,
    path: str | Path,
    dtype: str = "float16",
    bits: int | None = None,
    predictor: bool = False,
    seed: int = 0,
) -> Path:
    """A bundle of `shape` at `path`. Raises ValueError where it exists or cannot be. The predictor's words are random:
    it takes the memory and the time of a real one and flags about half of all units."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    target, partial = start(Path(path), shape, dtype, bits)
    rng = np.random.default_rng(seed)
    record, noise_parts = record_of(shape, dtype, bits)
    layers = tuple(Layer(f"layers/{i:03d}.bundle", shape.ffn) for i in range(shape.layers))
    (partial / "layers").mkdir()
    noise = Noise(rng, noise_parts, weight_rms(shape))
    for i, layer in enumerate(layers):
        writer = FastWriter(partial / layer.file, i, layer.units, record)
        for rows, sums in noise.blocks(layer.units):
            writer.append(rows, sums)
        writer.finish()
    del noise
    tensors = TensorWriter(rng, weight_rms(shape))
    outside, _ = model_tensors(shape.config(dtype), dtype, bits, weight_rms(shape))
    for i in range(shape.layers if shape.biased else 0):
        outside.append(Tensor(f"ffn.{i}.up_bias", dtype, (shape.ffn,), 0.0))
        outside.append(Tensor(f"ffn.{i}.down_bias", dtype, (shape.d_model,), 0.0))
    tensors.write_shards("resident-{index:05d}.safetensors", partial, outside, SHARD_BYTES["resident"])
    if predictor:
        write_predictors(partial, shape, tensors)
    write_texts(partial, shape, dtype)
    quantization = {"bits": bits, "group_size": GROUP, "mode": "affine"} if bits else None
    family, activation, _ = family_of(shape.config(dtype), "shape")
    kind = shape.family, family.layout, activation
    manifest = Manifest(*kind, dtype, shape.d_model, quantization, record, layers, source="random weights")
    write_manifest(partial, manifest)
    os.rename(partial, target)
    return target


def write_checkpoint(shape: str | Shape, path: str | Path, dtype: str = "float16", seed: int = 0) -> Path:
    """The same as a Hugging Face checkpoint: config, tokenizer, sharded safetensors and their index."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    target, partial = start(Path(path), shape, dtype, None)
    tensors = TensorWriter(np.random.default_rng(seed), weight_rms(shape))
    outside, inside = model_tensors(shape.config(dtype), dtype, None, weight_rms(shape))
    named = [Tensor(shape.stored(t.name), t.dtype, t.shape, t.value) for t in outside + inside]
    named.sort(key=lambda t: t.name)
    files = tensors.write_shards(
        "model-{number:05d}-of-{count:05d}.safetensors", partial, named, SHARD_BYTES["checkpoint"]
    )
    index = {
        "metadata": {"total_size": sum(t.num_bytes for t in named)},
        "weight_map": {name: file for file, names in files for name in names},
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    write_texts(partial, shape, dtype)
    os.rename(partial, target)
    return target


def start(target: Path, shape: Shape, dtype: str, bits: int | None) -> tuple[Path, Path]:
    """The directory to make and the one to make it in; refuses what would fail later."""
    if target.exists():
        raise ValueError(f"{target}: exists already")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    outside, inside = model_tensors(shape.config(dtype), dtype, bits, 1.0)
    streamed = record_of(shape, dtype, bits)[0].stride * shape.ffn * shape.layers if bits else 0
    need = sum(t.num_bytes for t in outside) + (streamed or sum(t.num_bytes for t in inside))
    free = shutil.disk_usage(partial).free
    if free < 1.15 * need:
        partial.rmdir()
        raise ValueError(f"{target}: {need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
    return target, partial


def write_predictors(path: Path, shape: Shape, tensors: TensorWriter) -> None:
    """Low-bit predictor files as converters write them, with random words."""
    folder = path / "predictors" / "low-bit"
    folder.mkdir(parents=True)
    parts = quantised_parts("weight", shape.ffn, shape.d_model, LOW_BITS, weight_rms(shape), "float16")
    arrays = [Tensor(*part) for part in parts]
    arrays += [Tensor(name, "float32", (shape.ffn,), 0.0) for name in ("shift", "error")]
    for i in range(shape.layers):
        tensors.write(folder / f"{i:03d}.safetensors", arrays, {"bits": str(LOW_BITS), "group_size": str(GROUP)})


def write_texts(path: Path, shape: Shape, dtype: str) -> None:
    """config.json and a tokenizer of single bytes; tokens beyond them are words like ` t0300`, only ever decoded."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = ["<s>", "<pad>", "</s>", *letters]
    words += [f"\u0120t{i:04d}" for i in range(len(words), shape.vocabulary)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i], **special} for i in range(3)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
    }
    (path / "config.json").write_text(json.dumps(shape.config(dtype), indent=1))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def folder_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument(
        "--bits", type=int, choices=[2, 3, 4, 6, 8], help="quantised as `convert -q` does; bundles only"
    )
    parser.add_argument("--checkpoint", action="store_true", help="a Hugging Face checkpoint instead of a bundle")
    parser.add_argument("--predictor", action="store_true", help="low-bit predictor files with random words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="read the bundle back and compare every checksum")
    args = parser.parse_args()
    if args.checkpoint and (args.bits or args.predictor or args.verify):
        parser.error("--bits, --predictor and --verify are for bundles")
    begin = time.perf_counter()
    try:
        if args.checkpoint:
            write_checkpoint(args.shape, args.path, args.dtype, args.seed)
        else:
            write_bundle(args.shape, args.path, args.dtype, args.bits, args.predictor, args.seed)
    except ValueError as error:
        raise SystemExit(f"shapes: {error}") from None
    seconds, size = time.perf_counter() - begin, folder_bytes(args.path)
    print(f"{args.path}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s, on disk")
    if args.verify:
        bundle = Bundle.open(args.path)
        bad = sum(1 for i in range(bundle.num_layers) for _ in bundle.verify(i))
        print(f"{bad} records do not match their checksum" if bad else "every record matches its checksum")


if __name__ == "__main__":
    main()
