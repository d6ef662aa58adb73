"""The model that config.json describes, without its FFNs: that a bundle is that model, and its resident weights."""

from operator import attrgetter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflash.backends import Backend
from mlxflash.bundle import Bundle, BundleError
from mlxflash.models import Family, family_of, ffn_layers, find, graft, may_cast, quantise, quantization_of, settings
from mlxflash.reader import Reader
from mlxflash.resident import MLX, WORDS, Tensor, ffn_parts


def described(bundle: Bundle) -> tuple[dict[str, Any], Family]:
    """config.json with its defaults, and its family. Raises BundleError where the bundle was made of another model."""
    where, manifest = str(bundle.path), bundle.manifest
    config = settings(bundle.config(), where)
    family, *activation = family_of(config, where)
    mixture = family.layout == "experts"  # of which dense layers may be a part
    layout = "blocks" if manifest.layout == "blocks" and not mixture else family.layout
    if [manifest.layout, manifest.activation, manifest.threshold] != [layout, *activation]:
        raise BundleError(f"{where}: made as {manifest.layout}/{manifest.activation}, config.json says otherwise")
    if manifest.d_model != config["hidden_size"]:
        raise BundleError(f"{where}: made of layers of width {manifest.d_model}, config.json says otherwise")
    return config, family


def load_resident(
    found: list[Tensor], bundle: Bundle, model: nn.Module, family: Any, backend: Backend, reader: Reader, direct: bool
) -> list[dict[str, np.ndarray]]:
    """Read resident weights into the model; return the per-unit and bias arrays of each layer's FFN, float32."""
    manifest = bundle.manifest
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}  # name to shape and kind of number
    for i, layer in enumerate(ffn_layers(model, family)):
        ffn = find(layer, family.ffn)
        if manifest.layout == "experts":
            _check_experts(bundle, i, ffn, family)
        elif manifest.layout == "blocks":
            _check_blocks(bundle, i, ffn, family)
        for part, path in family.parts.items():
            own = part == "down" if manifest.layout == "blocks" else manifest.layout != "experts"
            if own and "bias" in attrgetter(path)(ffn):
                size = manifest.d_model if part == "down" else manifest.layers[i].units
                wanted[f"ffn.{i}.{part}_bias"] = (size,), "float"
        graft(layer, family.ffn, nn.Identity())
    if hasattr(model, "sanitize"):  # where some classes learn that they have no head of their own
        model.sanitize({t.name: mx.zeros(t.shape) for t in found})
    given = {t.name: (t.shape, t.dtype if t.dtype in WORDS else "float") for t in found}
    quantization = quantization_of(bundle.config(), str(bundle.path)) or manifest.quantization
    if quantization is not None:
        quantise(model, quantization, given, str(bundle.path))
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    wanted |= {name: (a.shape, next((w for w in WORDS if MLX[w] == a.dtype), "float")) for name, a in parameters}
    if wrong := [name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)]:
        raise BundleError(f"{bundle.path}: resident {min(wrong)!r} is missing, misshapen or extra; convert again")
    if len(given) < len(found):
        raise BundleError(f"{bundle.path}: two resident tensors have one name; convert again")
    biases = {f"ffn.0.{p.name}" for p in manifest.record.parts if p.offset is None}
    if biases != {name for name in wanted if name.startswith("ffn.0.")} - {"ffn.0.down_bias"}:
        raise BundleError(f"{bundle.path / 'manifest.json'}: its biases are not the model's; convert again")
    weights = backend.load(found, reader, direct)
    parts = ffn_parts(found, weights, bundle.num_layers)
    dtype = backend.activation_dtype(manifest)
    small = {t.name for t in found if t.is_small and (dtype == mx.float32 or may_cast(model, t.name))}
    backend.place(model, weights)
    model.load_weights([(name, a.astype(dtype) if name in small else a) for name, a in weights.items()])
    mx.eval(model.parameters())
    model.eval()
    return parts


def _check_experts(bundle: Bundle, index: int, switch: Any, family: Family) -> None:
    """That a layer's records are the experts which config.json describes."""
    manifest = bundle.manifest
    shapes = {part: tuple(attrgetter(path)(switch).weight.shape) for part, path in family.parts.items()}
    hidden = manifest.record["up_scales" if manifest.quantization else "up"].shape[0]
    units, d = manifest.layers[index].units, manifest.d_model
    biased = "bias" in attrgetter(family.parts["up"])(switch)
    said = {part: (units, d, hidden) if part == "down" else (units, hidden, d) for part in family.parts}
    as_said = [f"{part}_bias" in manifest.record for part in family.parts] == [biased] * len(said)
    if shapes != said or not as_said or ("gate" in manifest.record) != ("gate" in said):
        raise BundleError(f"{bundle.path}: its experts are not those that config.json describes; convert again")


def _check_blocks(bundle: Bundle, index: int, mlp: Any, family: Family) -> None:
    """That a layer's records are the FFN which config.json describes."""
    record = bundle.manifest.record
    parts = {part: attrgetter(path)(mlp) for part, path in family.parts.items()}
    width = (bundle.manifest.d_model, bundle.manifest.layers[index].units * record["up"].shape[0])
    biased = {f"{part}_bias" for part, module in parts.items() if part != "down" and "bias" in module}
    names = {p.name for p in record.parts}
    same = parts.keys() == names & {"gate", "up", "down"} and biased == {n for n in names if n.endswith("_bias")}
    if parts["down"].weight.shape != width or not same:
        raise BundleError(f"{bundle.path}: its blocks are not the layers that config.json describes; convert again")
