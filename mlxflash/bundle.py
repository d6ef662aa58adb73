"""What lies on disk: a bundle is a directory, a bundle file holds one layer's units as records of fixed stride.

    story.flash/
      manifest.json          what the bundle is: format version, layout, activation, parts, one entry per layer
      config.json, tokenizer files, as the checkpoint had them
      resident*.safetensors  everything that is not streamed, parts that are resident per unit included
      predictors/NAME/000.safetensors ...
      layers/000.bundle ...  header page (16 KiB): "MLXFLASH", u32 version, u32 JSON length, JSON, zeros
                             records: unit i at 16384 + i * stride, its parts adjacent (row-column bundling)
                             zeros up to a multiple of 4096, then one CRC-32 (u32) per record, then the end
    All integers are little-endian. Nothing may follow the trailer.

Every number read from disk is distrusted: opening checks manifest, headers and sizes against each other; payload
bits are checked by `verify`. Imports no MLX, so that `info` and `verify` answer at once.
Source of bundling: LLM in a flash (arXiv 2312.11514), "Bundling Columns and Rows".
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
MAGIC = b"MLXFLASH"
HEADER_BYTES = 16384  # one Apple page: data starts where direct reads and Metal want it
BLOCK_BYTES = 4096  # what direct I/O aligns to
MAX_PADDING = 0.05  # above this share records are packed instead of padded to blocks
LEVEL_FIGURES = ("multiplier", "kl", "kl_se", "ppl_change", "ppl_change_se", "top1", "flagged", "held")
MAX_JSON_BYTES = 64 << 20
VERIFY_BYTES = 16 << 20  # of records in memory at a time

SPARSE_ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu")  # most units' products with most inputs are zero
MODES = ("affine", "mxfp4")  # of quantisation, in MLX's words
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}


class BundleError(ValueError):
    """A bundle on disk that is not what it should be; the message names the file."""


@dataclass(frozen=True)
class Part:
    """A named array of a unit. `offset` is its byte in the record, or None when it is resident per unit."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Record:
    """The bytes of one unit: its streamed parts back to back, padded to `stride`.

    Of a part of every record (`only`), `stride` is what is read of it, `start` where that begins in the record on disk,
    and `pitch` how far records lie apart there (0: as far as they are long).
    """

    parts: tuple[Part, ...]
    stride: int
    start: int = 0
    pitch: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(p.num_bytes for p in self.parts if p.offset is not None)

    def __getitem__(self, name: str) -> Part:
        return next(p for p in self.parts if p.name == name)

    def __contains__(self, name: str) -> bool:
        return any(p.name == name for p in self.parts)

    @property
    def step(self) -> int:
        """Bytes from record to record on disk."""
        return self.pitch or self.stride

    @property
    def aligned(self) -> bool:
        """True when every record starts and ends on a block, so that direct reads need no staging."""
        return not any(size % BLOCK_BYTES for size in (self.stride, self.start, self.pitch))

    def only(self, *names: str) -> "Record":
        """The record as if these of its streamed parts, neighbours, were all of it."""
        kept = [p for p in self.parts if p.name in names]
        start = min(p.offset for p in kept if p.offset is not None)
        parts = tuple(Part(p.name, p.dtype, p.shape, p.offset - start) for p in kept if p.offset is not None)
        size = sum(p.num_bytes for p in parts)
        whole = not any(each % BLOCK_BYTES for each in (start, size, self.stride))
        return Record(parts, size if whole else -(-size // 16) * 16, start, self.stride)


def make_record(parts: list[Part]) -> Record:
    """Lay streamed parts out back to back; pad to blocks where that costs under 5 %, else pack to 16 bytes."""
    placed, offset = [], 0
    for part in parts:
        if part.offset is None:
            placed.append(part)
        else:
            placed.append(Part(part.name, part.dtype, part.shape, offset))
            offset += part.num_bytes
    padded = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
    packed = -(-offset // 16) * 16
    return Record(tuple(placed), padded if padded - offset < MAX_PADDING * offset else packed)


@dataclass(frozen=True)
class Layer:
    file: str
    units: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself; see the module's head for where it stands."""

    model_type: str
    layout: str  # plain | gated | experts | blocks: the meaning of the parts, owned by the FFN
    activation: str
    dtype: str  # of the float parts and of the activations
    d_model: int
    quantization: dict[str, Any] | None  # {"bits", "group_size", "mode"} of the streamed parts; of blocks, of `up`
    record: Record
    layers: tuple[Layer, ...]
    source: str = ""
    threshold: float = 0.0  # of fatrelu: a unit is active where its product is above
    order: str = "identity"  # how units were permuted; unit ids are positions on disk everywhere
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, tuple[int, int]]:
        """Bits and group size of quantised parts that have others than the rest."""
        parts = (self.quantization or {}).get("parts", {})
        return {name: (own["bits"], own["group_size"]) for name, own in parts.items()}

    @property
    def sparse(self) -> bool:
        """Whether units may be left out as inactive; otherwise all are computed and what is absent streams. Experts and
        blocks, which have neurons of their own, may not."""
        return self.activation in SPARSE_ACTIVATIONS and self.layout not in ("experts", "blocks")

    @property
    def routed(self) -> bool:
        """Whether something of the model's own says which units or experts a token needs, and no others count."""
        return self.layout == "experts" or self.activation.startswith("routed ")

    @property
    def rounding(self) -> str:
        """What quantising cost beside the checkpoint's floats, for people; empty where nobody measured it."""
        said = self.calibration.get("rounding")
        if said is None:
            return ""
        return f"{said['bits']}-bit: KL {said['kl']:.4f} from {said['dtype']}, top-1 agreement {said['top1']:.1%}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "mlxflash",
            "version": VERSION,
            "model_type": self.model_type,
            "layout": self.layout,
            "activation": self.activation,
            **({"threshold": self.threshold} if self.threshold else {}),
            "dtype": self.dtype,
            "d_model": self.d_model,
            "quantization": self.quantization,
            "record": _record_json(self.record),
            "layers": [{"file": layer.file, "units": layer.units} for layer in self.layers],
            "source": self.source,
            "order": self.order,
            "calibration": self.calibration,
        }


class Bundle:
    """An opened bundle directory: the manifest and where each file is. Holds no descriptor."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Check manifest, layer headers and sizes. Raises BundleError with the file and the remedy."""
        path = Path(path)
        file = path / "manifest.json"
        if not file.is_file():
            raise BundleError(f"{path}: not a bundle, manifest.json is missing; make one with `mlxflash convert`")
        manifest = _parse_manifest(_load_json(file), str(file))
        bundle = cls(path, manifest)
        for index in range(len(manifest.layers)):
            bundle._check_layer(index)
        if not bundle.resident_files():
            raise BundleError(f"{path}: resident weights (resident*.safetensors) are missing; convert again")
        return bundle

    @property
    def num_layers(self) -> int:
        return len(self.manifest.layers)

    def layer_path(self, index: int) -> Path:
        return self.path / self.manifest.layers[index].file

    def resident_files(self) -> list[Path]:
        return sorted(self.path.glob("resident*.safetensors"))

    def predictor_files(self, name: str) -> list[Path]:
        return sorted((self.path / "predictors" / name).glob("*.safetensors"))

    def predictors(self) -> list[str]:
        folder = self.path / "predictors"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def config(self) -> dict[str, Any]:
        config = _load_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise BundleError(f"{self.path / 'config.json'}: not a JSON object; convert again")
        return config

    def streamed_bytes(self) -> int:
        """Bytes of all records, padding excluded."""
        return sum(layer.units for layer in self.manifest.layers) * self.manifest.record.num_bytes

    def resident_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.resident_files())

    def require_neurons(self) -> None:
        """Raises BundleError where units are not single neurons."""
        if self.manifest.layout == "experts":
            raise BundleError(f"{self.path}: a mixture's own router says which experts a token needs; it is exact")
        if self.manifest.routed:
            raise BundleError(f"{self.path}: the model's own predictor says which units a token needs; it is exact")
        if self.manifest.layout == "blocks":
            raise BundleError(
                f"{self.path}: made of a quantised checkpoint, whose neurons share scales and are read in blocks, "
                "of which none can be left out; it runs exactly, by streaming (--exact)"
            )

    def require_sparse(self) -> None:
        """Raises BundleError where units are never zero, so that predicting which are would be wrong."""
        self.require_neurons()
        if not self.manifest.sparse:
            raise BundleError(
                f"{self.path}: {self.manifest.activation} units are never zero, so none can be left out; "
                "it runs exactly, by streaming (--exact), or lossily, with --sparsity"
            )

    def require_never_zero(self) -> None:
        """Raises BundleError where `--sparsity` is not what leaves units out."""
        self.require_neurons()
        if self.manifest.sparse:
            raise BundleError(
                f"{self.path}: --sparsity is for activations that are never zero; of {self.manifest.activation} units "
                "those that are zero are left out anyway, and --fidelity says how many more"
            )

    def _check_layer(self, index: int) -> None:
        file, layer, record = self.layer_path(index), self.manifest.layers[index], self.manifest.record
        try:
            with open(file, "rb") as f:
                head = f.read(HEADER_BYTES)
                size = os.fstat(f.fileno()).st_size
        except (FileNotFoundError, IsADirectoryError):
            raise BundleError(f"{file}: no such file, though the manifest names it; convert again") from None
        if len(head) < HEADER_BYTES:
            raise BundleError(f"{file}: {size} bytes, shorter than its header page of {HEADER_BYTES}; convert again")
        if head[:8] != MAGIC:
            raise BundleError(f"{file}: does not begin with {MAGIC.decode()}; not a bundle file")
        version, length = struct.unpack("<II", head[8:16])
        if version != VERSION:
            raise BundleError(f"{file}: format version {version}, this mlxflash reads version {VERSION}; convert again")
        if length > HEADER_BYTES - 16:
            raise BundleError(
                f"{file}: header claims {length} bytes, its page holds {HEADER_BYTES - 16}; convert again"
            )
        try:
            said = json.loads(head[16 : 16 + length])
        except (ValueError, RecursionError):
            raise BundleError(f"{file}: header is not JSON; convert again") from None
        expected = _header_json(index, layer.units, record)
        if said != expected:
            raise BundleError(
                f"{file}: header disagrees with manifest.json (another model's or layer's file?); convert again"
            )
        if size != file_bytes(layer.units, record):
            raise BundleError(
                f"{file}: {size} bytes, {layer.units} records need {file_bytes(layer.units, record)}; convert again"
            )

    def checksums(self, index: int) -> np.ndarray:
        """CRC-32 of every record of a layer, uint32 [units]."""
        layer, record = self.manifest.layers[index], self.manifest.record
        return np.fromfile(self.layer_path(index), "<u4", layer.units, offset=trailer_offset(layer.units, record))

    def verify(self, index: int, block_bytes: int = VERIFY_BYTES) -> Iterator[int]:
        """Yield the positions of records of one layer whose bytes do not match their checksum."""
        layer, record = self.manifest.layers[index], self.manifest.record
        sums = self.checksums(index)
        with open(self.layer_path(index), "rb") as f:
            f.seek(HEADER_BYTES)
            step = max(1, block_bytes // record.stride)
            for first in range(0, layer.units, step):
                count = min(step, layer.units - first)
                block = memoryview(f.read(count * record.stride))
                if len(block) != count * record.stride:
                    raise BundleError(f"{self.layer_path(index)}: ends inside record {first}; convert again")
                for i in range(count):
                    start = i * record.stride
                    if zlib.crc32(block[start : start + record.num_bytes]) != sums[first + i]:
                        yield first + i


def trailer_offset(units: int, record: Record) -> int:
    return -(-(HEADER_BYTES + units * record.stride) // BLOCK_BYTES) * BLOCK_BYTES


def file_bytes(units: int, record: Record) -> int:
    return trailer_offset(units, record) + 4 * units


class LayerWriter:
    """Writes one bundle file: header, then blocks of records in order, then the trailer; renamed when whole."""

    def __init__(self, path: Path, index: int, units: int, record: Record):
        self._path, self._units, self._record = path, units, record
        self._part = path.with_suffix(".part")
        self._sums: list[int] = []
        header = json.dumps(_header_json(index, units, record)).encode()
        if len(header) > HEADER_BYTES - 16:
            raise BundleError(f"{path}: header of {len(header)} bytes does not fit its page")
        self._file = open(self._part, "wb")  # noqa: SIM115  closed by finish() or abort()
        self._file.write((MAGIC + struct.pack("<II", VERSION, len(header)) + header).ljust(HEADER_BYTES, b"\0"))

    def write(self, records: np.ndarray) -> None:
        """Append records, uint8 [n, stride]."""
        assert records.dtype == np.uint8
        assert records.shape[1] == self._record.stride
        records = np.ascontiguousarray(records)
        self._file.write(records.data)
        used = self._record.num_bytes
        self._sums.extend(zlib.crc32(row[:used].data) for row in records)

    def finish(self) -> None:
        assert len(self._sums) == self._units, "every unit is written exactly once"
        self._file.write(b"\0" * (trailer_offset(self._units, self._record) - self._file.tell()))
        self._file.write(np.array(self._sums, "<u4").tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)

    def abort(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json durably: it is what makes a directory a bundle, so it comes last."""
    part = path / "manifest.json.part"
    with open(part, "w") as f:
        json.dump(manifest.to_json(), f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path / "manifest.json")


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "stride": record.stride,
        "parts": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape), "offset": p.offset} for p in record.parts],
    }


def _header_json(index: int, units: int, record: Record) -> dict[str, Any]:
    return {"layer": index, "units": units, "record": _record_json(record)}


def _load_json(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{file}: {file.stat().st_size} bytes of JSON, at most {MAX_JSON_BYTES} make sense")
        return json.loads(file.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise BundleError(f"{file}: missing; convert again") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{file}: not JSON ({error}); convert again") from None


def _parse_manifest(data: Any, where: str) -> Manifest:
    if _get(data, "format", str, where) != "mlxflash":
        raise BundleError(f"{where}: not a mlxflash bundle's; make one with `mlxflash convert`")
    version = _get(data, "version", int, where)
    if version != VERSION:
        raise BundleError(f"{where}: format version {version}, this mlxflash reads version {VERSION}; convert again")
    record = _parse_record(_get(data, "record", dict, where), where)
    layers = []
    for i, item in enumerate(_get(data, "layers", list, where)):
        file, units = _get(item, "file", str, f"{where}, layer {i}"), _get(item, "units", int, f"{where}, layer {i}")
        if Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file:
            raise BundleError(f"{where}, layer {i}: file {file!r} points outside the bundle; convert again")
        if not 0 < units < 1 << 31:
            raise BundleError(f"{where}, layer {i}: {units} units make no sense; convert again")
        layers.append(Layer(file, units))
    if not layers:
        raise BundleError(f"{where}: names no layers; convert again")
    quantization = data.get("quantization")
    if quantization is not None:
        for key in ("bits", "group_size"):
            _get(quantization, key, int, f"{where}, quantization")
        for name, own in _get({"parts": {}} | quantization, "parts", dict, f"{where}, quantization").items():
            for key in ("bits", "group_size"):
                _get(own, key, int, f"{where}, quantization of {name!r}")
        if (mode := _get(quantization, "mode", str, f"{where}, quantization")) not in MODES:
            raise BundleError(f"{where}: quantization mode {mode!r} is unknown; convert again")
    dtype = _get(data, "dtype", str, where)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise BundleError(f"{where}: dtype {dtype!r} is not float32, float16 or bfloat16; convert again")
    d_model = _get(data, "d_model", int, where)
    if not 0 < d_model < 1 << 24:
        raise BundleError(f"{where}: d_model {d_model} makes no sense; convert again")
    calibration = _get(data, "calibration", dict, where)
    _check_calibration(calibration, len(layers), where)
    return Manifest(
        model_type=_get(data, "model_type", str, where),
        layout=_get(data, "layout", str, where),
        activation=_get(data, "activation", str, where),
        threshold=_threshold(data, where),
        dtype=dtype,
        d_model=d_model,
        quantization=quantization,
        record=record,
        layers=tuple(layers),
        source=_get(data, "source", str, where),
        order=_get(data, "order", str, where),
        calibration=calibration,
    )


def _threshold(data: dict[str, Any], where: str) -> float:
    threshold = data.get("threshold", 0.0)
    if not (_is_int(threshold) or isinstance(threshold, float)) or not 0 <= threshold < 1e6:
        raise BundleError(f"{where}: an activation's threshold of {threshold!r} makes no sense; convert again")
    return float(threshold)


def _check_calibration(data: dict[str, Any], num_layers: int, where: str) -> None:
    """What `calibrate` measured, as far as it is used: figures, levels and miss curves of the stored predictors."""
    numbers = []
    for predictor, said in _get(data, "fidelity", dict, where).items() if "fidelity" in data else ():
        levels = _get(said, "levels", dict, f"{where}, fidelity of {predictor}")
        for name, measured in levels.items():
            if isinstance(measured, dict):  # bundles of before have one measurement
                levels[name] = [measured]
            for level in _get(levels, name, list, where):
                numbers += [_get(level, key, object, f"{where}, fidelity {name!r}") for key in LEVEL_FIGURES]
                _get(level, "met", bool, f"{where}, fidelity {name!r}")
                _check_misses(level.get("misses"), num_layers, f"{where}, misses of {predictor}, {name}")
    for name in data.keys() & {"low-bit", "low-rank", "bound"}:
        figures = _get(data, name, dict, f"{where}, calibration")
        numbers += [figures.get(key) for key in ("recall", "perplexity_change", "margin")]
        if "misses" in figures:
            _check_misses(figures["misses"], num_layers, f"{where}, misses of {name}")
    if "router" in data:
        routing = _get(data, "router", dict, f"{where}, calibration")
        _check_misses(routing.get("misses"), num_layers, f"{where}, misses of its experts")
        numbers.append(routing.get("tokens"))
        _get(routing, "text", str, f"{where}, routing")
    if "rounding" in data:
        figures = _get(data, "rounding", dict, f"{where}, calibration")
        numbers += [figures.get(key) for key in ("bits", "kl", "kl_se", "top1", "tokens")]
        numbers += [figures[key] for key in ("ppl_change", "ppl_change_se") if key in figures]
        for key in ("dtype", "text"):
            _get(figures, key, str, f"{where}, rounding")
    if "sketch" in data:
        figures = _get(data, "sketch", dict, f"{where}, calibration")
        numbers += [figures.get("kl"), *_get(figures, "bits", list, f"{where}, sketch")]
        _check_misses(figures.get("misses"), num_layers, f"{where}, misses of sketch")
    for number in numbers:
        if not (_is_int(number) or isinstance(number, float)) or not math.isfinite(number):
            raise BundleError(f"{where}: {number!r} in its calibration is not a number; calibrate again")


def _check_misses(data: Any, num_layers: int, where: str) -> None:
    """Shares of a layer's units, rising from 0 to 1, and for every layer as many numbers that never rise."""
    shares, layers = _get(data, "shares", list, where), _get(data, "layers", list, where)
    curves = [shares, *layers]
    good = len(layers) == num_layers and all(isinstance(c, list) and len(c) == len(shares) > 0 for c in curves)
    good = good and all(isinstance(x, float) and 0 <= x < 1 << 31 for c in curves for x in c)
    good = good and all(a < b for a, b in pairwise(shares)) and (shares[0], shares[-1]) == (0, 1)
    if not good or any(a < b for c in layers for a, b in pairwise(c)):
        raise BundleError(f"{where}: not a curve for each of {num_layers} layers; calibrate again")


def _parse_record(data: dict[str, Any], where: str) -> Record:
    parts, end = [], 0
    for item in _get(data, "parts", list, where):
        name, dtype = _get(item, "name", str, where), _get(item, "dtype", str, where)
        shape = tuple(_get(item, "shape", list, where))
        offset = item.get("offset")
        if dtype not in ITEM_BYTES:
            raise BundleError(f"{where}, part {name!r}: unknown dtype {dtype!r}; convert again")
        if not all(_is_int(n) and 0 < n < 1 << 31 for n in shape):
            raise BundleError(f"{where}, part {name!r}: shape {list(shape)} makes no sense; convert again")
        part = Part(name, dtype, shape, offset)
        if offset is not None:
            if not _is_int(offset) or offset != end:
                raise BundleError(
                    f"{where}, part {name!r}: at byte {offset}, the parts before it end at {end}; convert again"
                )
            end += part.num_bytes
        parts.append(part)
    stride = _get(data, "stride", int, where)
    if end == 0 or len({p.name for p in parts}) != len(parts):
        raise BundleError(f"{where}: a record needs streamed parts with names of their own; convert again")
    if not end <= stride <= max(2 * end, end + BLOCK_BYTES):
        raise BundleError(f"{where}: stride {stride} does not fit records of {end} bytes; convert again")
    return Record(tuple(parts), stride)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _get(data: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise BundleError(f"{where}: {key!r} is missing; convert again")
    value = data[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BundleError(f"{where}: {key!r} is {value!r}, not a {kind.__name__}; convert again")
    return value
