"""The order of units on disk: those that are missed together lie together, so that one read brings several.

What a memory of a quarter of the units misses on recorded text is simulated; units are linked to the neighbours they
are missed with most often, best links first, into paths, and the paths are laid out one after the other. Each unit is
stored once. After Ripple (arXiv 2410.19274, section 4.1), which links units that are active together; what is held
already is no reason to lie anywhere, so misses are what counts here.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import FFN, make_backend
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError, LayerWriter, trailer_offset, write_manifest
from mlxflash.calibrate import recorded
from mlxflash.evaluate import check_length
from mlxflash.fidelity import read_cuts, save_cuts
from mlxflash.misses import missed_units
from mlxflash.predictor import MARGIN, read_low_bit, save_arrays
from mlxflash.resident import one_part

HELD = 0.25  # of a layer's units, when it is simulated what a token misses
LINKS = 16  # neighbours considered for each unit
RARE = 3.0  # added to the norm of a pair's counts: units missed once or twice say little
BLOCK_BYTES = 64 << 20
PER_UNIT = {  # arrays of a predictor's file that have a row per unit
    "low-bit": ("weight", "scales", "biases", "shift", "error"),
    "low-rank": ("outer.weight", "outer.scales", "outer.biases", "offset"),
    "look-ahead": ("shift", "error"),  # of the next layer's
}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reads:
    """Per token, all layers, on text the order was not made from, neighbours at once: as stored, in the order."""

    before: float
    after: float


def reorder(
    bundle: Bundle,
    target: str | Path,
    tokens: np.ndarray,
    *,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Bundle, Reads]:
    """A copy of `bundle` at `target`, which must not exist, in an order made from text, int [n] token ids.

    Half of the tokens make the order, the other half count reads.
    Raises ValueError (BundleError) with one sentence; `target` then does not exist.
    """
    target = Path(target)
    if target.exists():
        raise BundleError(f"{target}: already exists; remove it or choose another name")
    if "low-bit" not in bundle.predictors():
        raise BundleError(f"{bundle.path}: has no low-bit predictor to say which units are read; convert again")
    check_length(tokens)
    _, inputs = recorded(bundle, tokens, len(tokens), memory, device, progress)
    orders, counts = [], np.zeros(2)
    for index, x in enumerate(inputs):
        progress("order", index, len(inputs))
        missed = missed_units(_flagged(bundle, index, x, device), HELD)
        half = len(missed) // 2
        order = order_of(missed[:half])
        orders.append(order)
        counts += [reads_of(missed[half:]), reads_of(missed[half:][:, order])]
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        _write(bundle, orders, partial, len(tokens) // 2, progress)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Bundle.open(target), Reads(*counts.tolist())


def order_of(missed: np.ndarray) -> np.ndarray:
    """A permutation of units: position to unit, int64 [units], from bool [tokens, units]."""
    units = missed.shape[1]
    seen = missed.astype(np.float32)
    count = seen.sum(axis=0)
    norm = np.sqrt(count)
    links: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first in range(0, units, 1024):
        ids = np.arange(first, min(first + 1024, units))
        together = seen[:, ids].T @ seen
        worth = together / (norm[ids, None] * norm + RARE)
        worth[np.arange(len(ids)), ids] = 0
        best = np.argpartition(-worth, min(LINKS, units - 1) - 1, axis=1)[:, :LINKS]
        links.append((np.repeat(ids, best.shape[1]), best.ravel(), np.take_along_axis(worth, best, 1).ravel()))
    left, right, worth = (np.concatenate(part) for part in zip(*links, strict=True))
    good = worth > 0
    ranked = np.argsort(-worth[good], kind="stable")
    joined: list[list[int]] = [[] for _ in range(units)]
    path = list(range(units))

    def end_of(unit: int) -> int:
        while path[unit] != unit:
            path[unit] = path[path[unit]]
            unit = path[unit]
        return unit

    for a, b in zip(left[good][ranked].tolist(), right[good][ranked].tolist(), strict=True):
        if len(joined[a]) < 2 and len(joined[b]) < 2 and (one := end_of(a)) != (other := end_of(b)):
            path[one] = other
            joined[a].append(b)
            joined[b].append(a)
    ends = [unit for unit in np.argsort(-count, kind="stable").tolist() if len(joined[unit]) < 2]
    return np.fromiter(_walk(joined, ends), np.int64, units)


def _walk(joined: list[list[int]], ends: list[int]) -> Iterator[int]:
    """Every unit once, path by path."""
    done = [False] * len(joined)
    for unit in ends:
        while not done[unit]:
            done[unit] = True
            yield unit
            unit = next((n for n in joined[unit] if not done[n]), unit)


def reads_of(missed: np.ndarray) -> float:
    """Reads per token where neighbours on disk are one: bool [tokens, units], by position."""
    starts = missed.copy()
    starts[:, 1:] &= ~missed[:, :-1]
    return float(starts.sum() / len(missed))


def _flagged(bundle: Bundle, index: int, x: np.ndarray, device: str | None) -> np.ndarray:
    """What the low-bit predictor flags for an FFN's inputs x [tokens, d_model]: bool [tokens, units]."""
    ffn, layer = FFN.of(bundle.manifest), bundle.manifest.layers[index]
    matrix, shift, error = read_low_bit(bundle.predictor_files("low-bit")[index], ffn, layer)
    offset = one_part(bundle, index, f"{ffn.first}_bias", layer.units) - shift + MARGIN * error
    flagged: np.ndarray = make_backend(device).project(mx.array(x), matrix)() > -offset
    return flagged


def _write(bundle: Bundle, orders: list[np.ndarray], target: Path, tokens: int, progress: Progress) -> None:
    """The bundle with each layer's units permuted, whatever is kept per unit too."""
    manifest, record = bundle.manifest, bundle.manifest.record
    for source in bundle.path.iterdir():
        if source.is_file() and source.suffix != ".safetensors" and source.name != "manifest.json":
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / source.name)
    (target / "layers").mkdir()
    for index, (layer, order) in enumerate(zip(manifest.layers, orders, strict=True)):
        progress("layers", index, len(orders))
        stored = np.memmap(bundle.layer_path(index), np.uint8, "r", HEADER_BYTES, (layer.units, record.stride))
        writer = LayerWriter(target / layer.file, index, layer.units, record)
        try:
            step = max(1, BLOCK_BYTES // record.stride)
            for first in range(0, layer.units, step):
                writer.write(stored[order[first : first + step]])
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        written = np.fromfile(target / layer.file, "<u4", layer.units, offset=trailer_offset(layer.units, record))
        damaged = order[written != bundle.checksums(index)[order]]
        if len(damaged):
            raise BundleError(
                f"{bundle.layer_path(index)}: record {damaged.min()} does not match its checksum; convert again"
            )
    progress("layers", len(orders), len(orders))
    per_unit = {f"ffn.{i}.{p.name}": order for i, order in enumerate(orders) for p in record.parts if p.offset is None}
    for file in bundle.resident_files():
        _permute(file, target / file.name, per_unit)
    for name in bundle.predictors():
        (target / "predictors" / name).mkdir(parents=True)
        for index, file in enumerate(bundle.predictor_files(name)):
            order = orders[index + 1 if name == "look-ahead" else index]
            _permute(file, target / "predictors" / name / file.name, dict.fromkeys(PER_UNIT[name], order))
    for name in manifest.calibration.get("fidelity", {}):
        cuts = read_cuts(bundle, name)
        save_cuts(
            target, name, [(base[order], least[order]) for (base, least), order in zip(cuts, orders, strict=True)]
        )
    write_manifest(target, replace(manifest, order=f"missed together in {tokens} tokens"))


def _permute(source: Path, target: Path, orders: dict[str, np.ndarray]) -> None:
    """Copy a safetensors file, the rows of the arrays that `orders` names in the new order."""
    arrays, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(source), return_metadata=True))
    for name in arrays.keys() & orders.keys():
        arrays[name] = arrays[name][mx.array(orders[name])]
    save_arrays(target, arrays, meta)
