"""Ready-made predictors of others: PowerInfer's kind, one file per layer, to a bundle's `low-rank` predictor.

A layer's file has fc1.weight [rank, d_model] and fc2.weight [units, rank], with or without biases: log-odds that a
unit fires are relu(x fc1^T) fc2^T, x the FFN's input. Its author's threshold is a probability of a half. What they are
worth on this model `calibrate` says.

Source: PowerInfer (arXiv 2312.12456) and its hub folders, `model_0.pt` and so on; Deja Vu (arXiv 2310.17157) has the
same network.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxflash.bundle import Bundle, BundleError, write_manifest
from mlxflash.converters.torch_zip import TorchFileError, as_safetensors
from mlxflash.fidelity import cuts_file
from mlxflash.predictor import MARGIN, low_bit_matrix, save_low_rank
from mlxflash.train import BITS, Steps

GROUP = 32  # factors are quantised in groups: ranks are filled up with zeros to whole ones
PARTS = ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")


def import_predictor(bundle: Bundle, folder: Path, progress: Steps = lambda done, total: None) -> Bundle:
    """Make `folder`'s predictor the bundle's low-rank one, in 8 bits, in place of any it had; returns it, reopened.

    Raises ValueError (BundleError) with one sentence for what does not fit; the bundle then is as it was.
    """
    bundle.require_sparse()
    if bundle.manifest.order != "identity":
        raise BundleError(f"{bundle.path}: its units are in an order of their own: import before `mlxflash reorder`")
    if bundle.manifest.d_model % GROUP:
        raise BundleError(f"{bundle.path}: width {bundle.manifest.d_model} is not in groups of 32, as factors are")
    files = _files(folder)
    if len(files) != bundle.num_layers:
        raise BundleError(f"{folder}: predictors of {len(files)} layers, {bundle.path} has {bundle.num_layers}")
    target = bundle.path / "predictors" / "low-rank"
    partial = bundle.path / "import.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for index, file in enumerate(files):
            progress(index, len(files))
            _import_layer(bundle, index, file, partial / f"{index:03d}.safetensors")
        progress(len(files), len(files))
        _forget(bundle)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Bundle.open(bundle.path)


def _files(folder: Path) -> list[Path]:
    """A file for each layer, named by its number: model_0.pt, model_1.pt, ..."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such directory")
    found: dict[int, Path] = {}
    for file in folder.iterdir():
        match = re.search(r"(\d+)\.(pt|pth|bin|safetensors)$", file.name)
        if match is not None and found.setdefault(int(match[1]), file) != file:
            raise BundleError(f"{folder}: {found[int(match[1])].name} and {file.name} are both of layer {match[1]}")
    if not found or set(found) != set(range(len(found))):
        raise BundleError(f"{folder}: no predictor: a file for each layer is wanted, model_0.pt, model_1.pt and so on")
    return [found[index] for index in sorted(found)]


def _import_layer(bundle: Bundle, index: int, file: Path, target: Path) -> None:
    units, width = bundle.manifest.layers[index].units, bundle.manifest.d_model
    parts = _read(file)
    first, second = parts["fc1.weight"], parts["fc2.weight"]
    rank = first.shape[0]
    wanted = {"fc1.weight": (rank, width), "fc1.bias": (rank,), "fc2.weight": (units, rank), "fc2.bias": (units,)}
    for name, array in ((name, parts[name]) for name in PARTS if name in parts):
        if array.shape != wanted[name] or not rank:
            raise BundleError(
                f"{file}: {name} is {list(array.shape)}, {list(wanted[name])} would fit this bundle: another model's?"
            )
        if not np.isfinite(array).all():
            raise BundleError(f"{file}: {name} has values that are no numbers")
    fill = (0, -rank % GROUP)
    hidden = np.pad(parts.get("fc1.bias", np.zeros(rank, np.float32)), fill)
    inner = low_bit_matrix(mx.array(np.pad(first, (fill, (0, 0)))), BITS)
    outer = low_bit_matrix(mx.array(np.pad(second, ((0, 0), fill))), BITS)
    offset = parts.get("fc2.bias", np.zeros(units, np.float32)) - np.float32(MARGIN)  # MARGIN is added when it runs
    save_low_rank(target, replace(inner, hidden=hidden), outer, offset)


def _read(file: Path) -> dict[str, np.ndarray]:
    """The PARTS of a file, float32, whatever module they lie in."""
    try:
        torch = file.suffix != ".safetensors"
        loaded = mx.load(cast(Any, as_safetensors(file)), format="safetensors") if torch else mx.load(str(file))
        arrays = cast(dict[str, mx.array], loaded)
        parts = {part: array for name, array in arrays.items() for part in PARTS if f".{name}".endswith(f".{part}")}
        if len(parts) != len(arrays) or not {"fc1.weight", "fc2.weight"} <= parts.keys():
            raise BundleError(f"{file}: has {', '.join(sorted(arrays)[:6])}; fc1.weight and fc2.weight are wanted")
        return {part: np.array(array.astype(mx.float32)) for part, array in parts.items()}
    except (TorchFileError, RuntimeError) as problem:
        raise BundleError(f"{file}: cannot be read ({problem})") from None


def _forget(bundle: Bundle) -> None:
    """What was measured of the predictor that goes."""
    calibration = {name: said for name, said in bundle.manifest.calibration.items() if name != "low-rank"}
    if "fidelity" in calibration:
        calibration["fidelity"] = {k: v for k, v in calibration["fidelity"].items() if k != "low-rank"}
    write_manifest(bundle.path, replace(bundle.manifest, calibration=calibration))
    cuts_file(bundle.path, "low-rank").unlink(missing_ok=True)
