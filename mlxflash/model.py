"""load(): mlx-lm's kind of model built from a bundle, its FFNs streamed.

The model class comes from the family table, its FFNs are replaced by FlashFFN before any weight is read, and all
else is resident. `model.flash` holds what the streaming needs and tells what it did.
"""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflash.backends import FFN, Backend, make_backend
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError
from mlxflash.diskprofile import disk_profile
from mlxflash.experts import FlashExperts
from mlxflash.ffn import Blocks, FlashFFN, FlashLayer
from mlxflash.fidelity import DEFAULT, FIDELITIES, Cuts, Level, level_of, needs, read_cuts, sparsity_level
from mlxflash.flash import Flash, FlashModel
from mlxflash.lookahead import AHEAD_MARGIN, LookAhead, read_look_ahead
from mlxflash.models import (
    Family,
    build_model,
    family_of,
    ffn_layers,
    find,
    graft,
    max_positions,
    quantise,
    quantization_of,
    settings,
)
from mlxflash.plan import (
    AUTO_SHARE,
    BudgetError,
    Plan,
    available_memory,
    make_plan,
    parse_memory,
)
from mlxflash.pool import Source
from mlxflash.predictor import (
    MARGIN,
    Predictor,
    Projection,
    deciding_matrix,
    load_low_bit,
    load_low_rank,
    load_magnitude,
)
from mlxflash.reader import CheckedReader, File, Reader, make_reader
from mlxflash.resident import MLX, WORDS, Tensor, ffn_parts, tensors
from mlxflash.ways import STORED, Way, faster, forecast_of, sizes_of
from mlxflash.window import Window

PREDICTORS = ("all", "oracle", *STORED)
DEFAULT_GAP_BYTES = 256 << 10  # between two records of a stream: cheaper read than stepped over
DEFAULT_CONTEXT = 4096  # tokens of key-value cache planned for when nobody says how many


def load_bundle(
    path: str | Path,
    *,
    memory: str | int | None = None,
    host_memory: str | int | None = None,
    predictor: str | Sequence[Predictor] | None = None,
    window: int | None = None,
    device: str | None = None,
    max_kv_size: int | None = None,
    fidelity: str | None = None,
    sparsity: int | None = None,
    margin: float | None = None,
    check_reads: bool = False,
    direct: bool | None = None,
    look_ahead: bool | None = None,
    backend: Backend | None = None,
    bundle: Bundle | None = None,
) -> FlashModel:
    """The model of a bundle, ready to compute.

    memory: budget for everything but the interpreter ("2GB", "60%" of the converted model, bytes; None: enough to
    hold it whole, within what is available); the device's own memory on cuda. host_memory: what of the host's memory
    keeps what such a device gives up (None: nothing).
    predictor: "low-bit", "low-rank" (trained), "all" (exact), "oracle" (needs the deciding matrices in memory; a
    bound), or predictors of your own, one per layer. None: low-bit, or low-rank where its forecast is the shorter one.
    window: drop units that the last `window` tokens did not use (the paper's rule; None keeps them until their memory
    is wanted).
    max_kv_size: tokens of key-value cache to plan for. fidelity: "high" (default), "balanced" or "fast", how far the
    reading of active units is thinned out, where `calibrate` measured it for the predictor; "exact" is predictor "all".
    sparsity: where activations are never zero, the percentage of units, those that add least, that are left out, where
    `calibrate --sparsity` measured it (lossy; None or 0: none).
    margin: instead of a level, flag every unit whose estimate exceeds minus this many of its standard errors (low-bit;
    log-odds for low-rank). check_reads: compare every record read with its checksum.
    look_ahead: ask for the next layer's units while this one computes; of low-bit predictors (None: where reads wait
    for a disk, the bundle was calibrated for it, and the forecast with it is the shorter one).
    direct: bypass the page cache (None: when what streams is more than 0.7 of the memory available).

    Raises ValueError (BundleError, BudgetError) with one sentence.
    """
    bundle = bundle or Bundle.open(path)
    where = str(bundle.path)
    config = settings(bundle.config(), where)
    family, *activation = family_of(config, where)
    manifest = bundle.manifest
    if [manifest.layout, manifest.activation, manifest.threshold] != [family.layout, *activation]:
        raise BundleError(f"{where}: made as {manifest.layout}/{manifest.activation}, config.json says otherwise")
    mixture = family.layout == "experts"  # of which dense layers may be a part
    layers = bundle.num_layers if mixture else config["num_hidden_layers"]
    if (manifest.d_model, bundle.num_layers) != (config["hidden_size"], layers):
        raise BundleError(
            f"{where}: made of {bundle.num_layers} layers of width {manifest.d_model}, config.json says otherwise"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a window spans at least 1 token")
    if fidelity not in (None, *FIDELITIES):
        raise ValueError(f"fidelity {fidelity!r} is unknown: {', '.join(FIDELITIES)} are there")
    if fidelity is not None and margin is not None:
        raise ValueError("fidelity and margin contradict each other: give one")
    if sparsity and (predictor, fidelity, margin) != (None, None, None):
        raise ValueError("sparsity is a choice of units by itself: give no predictor, fidelity or margin beside it")
    if fidelity == "exact" and predictor not in (None, "all"):
        raise ValueError(f"fidelity 'exact' and predictor {predictor!r} contradict each other")
    predictor = "all" if fidelity == "exact" else predictor
    own = None if predictor is None or isinstance(predictor, str) else list(predictor)
    if own is not None and len(own) != bundle.num_layers:
        raise ValueError(f"{len(own)} predictors for {bundle.num_layers} layers")
    if own is None and predictor not in (None, *PREDICTORS):
        raise ValueError(f"predictor {predictor!r} is unknown: {', '.join(PREDICTORS)} are there")
    if mixture and (look_ahead or own is not None):
        raise ValueError(f"{where}: a mixture's own router says which experts a token needs; it is exact")
    if own is None and predictor not in (None, "all"):
        bundle.require_sparse()
    if isinstance(predictor, str) and predictor in STORED and predictor not in bundle.predictors():
        raise BundleError(f"{where}: has no {predictor} predictor; {STORED[predictor]}")
    free = predictor is None and margin is None  # to choose between what the bundle has
    if own is not None:
        predictor = "own"
    elif predictor is None:
        predictor = "low-bit" if manifest.sparse and "low-bit" in bundle.predictors() else "all"
    if mixture:
        predictor = "router"
    level = None
    if sparsity:
        predictor, level = "sparsity", sparsity_level(bundle, sparsity)
    elif predictor in STORED and margin is None:
        level = needs(bundle, str(predictor), fidelity) if fidelity else level_of(bundle, str(predictor), DEFAULT)
    elif fidelity not in (None, "exact"):
        raise ValueError(f"fidelity {fidelity!r} needs a stored predictor ({', '.join(STORED)}), not {predictor!r}")
    backend = backend or make_backend(device)
    ffn = FFN.of(manifest, str(bundle.path / "manifest.json"))
    context = max_kv_size or min(max_positions(config), DEFAULT_CONTEXT)
    own_bytes = sum(p.nbytes for p in own) if own else 0
    found = tensors(bundle)
    if direct is None:
        direct = bundle.streamed_bytes() > AUTO_SHARE * available_memory()
    if look_ahead and predictor in ("low-rank", "sparsity"):
        raise ValueError("look-ahead is fitted to the low-bit predictor; use it, or no look-ahead")

    def way(predictor: str, level: Level | None) -> Way:
        ahead = look_ahead
        if ahead is None:
            ahead = direct and predictor == "low-bit" and "look-ahead" in bundle.predictors()
        more = sum(f.stat().st_size for f in bundle.predictor_files("look-ahead")) if ahead else 0
        sizes = sizes_of(bundle, config, found, backend, ffn, predictor, own_bytes + more, level)
        tier = parse_memory(host_memory, sizes.model) if host_memory not in (None, 0, "0") else 0
        plan = make_plan(sizes, parse_memory(memory, sizes.model), context, backend.available_memory(), tier or 0)
        layers = [bundle.layer_path(i) for i in range(bundle.num_layers)]
        disk = disk_profile(layers) if direct and not plan.whole else None
        expected = forecast_of(bundle, plan, sizes, found, predictor, backend, disk, ahead)
        if look_ahead is None and ahead and expected is not None:
            without = forecast_of(bundle, plan, sizes, found, predictor, backend, disk, False)
            if without is not None and without.seconds < expected.seconds:
                ahead, expected = False, without
        return Way(predictor, level, ahead, plan, disk, expected)

    chosen = way(str(predictor), level)
    other = level_of(bundle, "low-rank", fidelity or DEFAULT) if free and predictor == "low-bit" else None
    said = ""
    if other is not None and not look_ahead and "low-rank" in bundle.predictors() and chosen.expected is not None:
        with contextlib.suppress(BudgetError):
            chosen, said = faster(chosen, way("low-rank", other))
    predictor, level, look_ahead, plan = chosen.predictor, chosen.level, chosen.look_ahead, chosen.plan
    disk = chosen.disk
    mx.set_cache_limit(plan.cache)
    model: Any = build_model(config, where, FlashModel)
    streamed = ffn_layers(model, family)
    if len(streamed) != bundle.num_layers:
        raise BundleError(f"{where}: made of {bundle.num_layers} layers, config.json describes {len(streamed)}")
    name = "all" if plan.whole else str(predictor)
    cuts = read_cuts(bundle, name, level.multiplier) if level is not None and name in STORED else None
    mode = _mode(bundle, name, plan, margin, level)
    reader: Any = make_reader(direct=direct)
    if check_reads:
        sums = {str(bundle.layer_path(i)): bundle.checksums(i) for i in range(bundle.num_layers)}
        reader = CheckedReader(reader, manifest.record, sums)
    flash = Flash(bundle, plan, reader, backend, mode, name, level, chosen.expected, said)
    model.flash = flash
    try:
        resident = _load_resident(found, bundle, model, family, backend, flash.reader, direct)
        staging, *others = flash.stagings = backend.landings(ffn, plan)
        blocks = None
        if not plan.whole:
            pair = [backend.rows(ffn, plan.block_units, other) for other in others]
            apart = 0 if mixture else (disk.gap_bytes() if disk else DEFAULT_GAP_BYTES) // manifest.record.stride
            blocks = Blocks((pair[0], pair[1]), apart)
        for i, (entry, owner) in enumerate(zip(manifest.layers, streamed, strict=True)):
            file = File(bundle.layer_path(i), direct)
            flash.files.append(file)
            source = Source(file, resident[i])
            rows = backend.rows(ffn, plan.capacities[i], staging)
            layer = FlashLayer(
                units=entry.units,
                source=source,
                rows=rows,
                window=Window(entry.units, rows, reader, source, None if name == "all" else window),
                blocks=blocks or Blocks((rows, rows), 0),
                reader=reader,
                predictor=own[i]
                if name == "own" and own
                else _predictor(name, bundle, i, backend, ffn, source, margin, cuts[i] if cuts else None),
                fixed=name == "all",
                down_bias=flash_bias(resident[i], backend, bundle),
                times=flash.times,
                stride=manifest.record.stride,
                disk=disk,
            )
            if name == "all":
                layer.window.hold(np.arange(plan.capacities[i]))
                rows.settle()  # what is on its way to a device goes there now
            flash.layers.append(layer)
            graft(owner, family.ffn, FlashExperts(layer) if mixture else FlashFFN(layer))
        for here, there in pairwise(flash.layers):
            here.after = there
        if name == "all":  # the next token begins where this one ends
            flash.layers[-1].after = flash.layers[0]
        if look_ahead and name in ("low-bit", "oracle"):
            _link(flash.layers, bundle, backend, ffn, cuts)
    except BaseException as error:
        flash.close()
        if isinstance(error, RuntimeError):
            raise flash.explain(error) from None
        raise
    return model


def _link(layers: list[FlashLayer], bundle: Bundle, backend: Backend, ffn: FFN, cuts: Cuts | None) -> None:
    """Let every layer name the next one's units, those that are worth a read where there are `cuts`."""
    files = bundle.predictor_files("look-ahead")
    if len(files) != bundle.num_layers - 1:
        raise BundleError(f"{bundle.path}: {len(files)} look-ahead files for {bundle.num_layers} layers; calibrate")
    for i, (file, (here, there)) in enumerate(zip(files, pairwise(layers), strict=True), 1):
        fit, shift, error = read_look_ahead(file, bundle.manifest.d_model, there.units)
        assert isinstance(there.predictor, Projection)
        bias = ffn.offset(there.source.resident.get(f"{ffn.first}_bias"), there.units)
        offset = np.asarray(bias - shift + AHEAD_MARGIN * error - (cuts[i][1] if cuts else 0), np.float32)
        here.next, here.ahead = there, LookAhead(backend, fit, there.predictor.at(offset))


def flash_bias(resident: dict[str, np.ndarray], backend: Backend, bundle: Bundle) -> mx.array | None:
    """The FFN's output bias in the activations' dtype, or None where the family has none."""
    bias = resident.get("down_bias")
    return None if bias is None else mx.array(bias).astype(backend.activation_dtype(bundle.manifest))


def _predictor(
    name: str,
    bundle: Bundle,
    index: int,
    backend: Backend,
    ffn: FFN,
    source: Source,
    margin: float | None,
    cut: tuple[np.ndarray, np.ndarray] | None,
) -> Predictor | None:
    """One layer's predictor, of a level where there is its `cut`."""
    if name in ("all", "router"):
        return None
    layer = bundle.manifest.layers[index]
    bias = ffn.offset(source.resident.get(f"{ffn.first}_bias"), layer.units)
    if name in STORED:
        files = bundle.predictor_files(name)
        if len(files) != bundle.num_layers:
            raise BundleError(
                f"{bundle.path}: {len(files)} predictor files for {bundle.num_layers} layers; {STORED[name]}"
            )
        margin = MARGIN if margin is None else margin
        if name == "sparsity":
            made = load_magnitude(bundle, index, backend)
        elif name == "low-rank":
            made = load_low_rank(files[index], backend, ffn, layer, margin)
        else:
            made = load_low_bit(files[index], backend, ffn, layer, bias, margin)
        return made if cut is None else made.above(cut[0] + cut[1])
    stride = ffn.record.stride
    raw = np.fromfile(bundle.layer_path(index), np.uint8, layer.units * stride, offset=HEADER_BYTES)
    matrix = deciding_matrix(ffn, raw.reshape(layer.units, stride))
    mx.eval(matrix.weight)
    return Projection(backend, (matrix,), bias)


def _mode(bundle: Bundle, predictor: str, plan: Plan, margin: float | None, level: Level | None) -> str:
    """`exact`, or `approximate` with what calibration measured."""
    if predictor == "all":
        return "exact (all resident)" if plan.whole else "exact (streaming)"
    if predictor in ("oracle", "router"):
        return f"exact ({predictor})"
    if level is not None:
        less = sum(plan.capacities) / sum(plan.units) < level.held - 0.01
        return f"approximate ({level.describe()}{f', measured with {level.held:.0%} held' if less else ''})"
    said = bundle.manifest.calibration.get(predictor)
    if not said or (MARGIN if margin is None else margin) != said["margin"]:
        return "approximate (not measured)"
    return f"approximate (recall {said['recall']:.1%}, perplexity {said['perplexity_change']:+.2%})"


def _load_resident(
    found: list[Tensor], bundle: Bundle, model: nn.Module, family: Any, backend: Backend, reader: Reader, direct: bool
) -> list[dict[str, np.ndarray]]:
    """Read resident weights into the model; return the per-unit and bias arrays of each layer's FFN, float32."""
    manifest = bundle.manifest
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}  # name to shape and kind of number
    for i, layer in enumerate(ffn_layers(model, family)):
        ffn = find(layer, family.ffn)
        if family.layout == "experts":
            _check_experts(bundle, i, ffn, family)
        for part, path in family.parts.items():
            if family.layout != "experts" and "bias" in attrgetter(path)(ffn):
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
    small, dtype = {t.name for t in found if t.is_small}, backend.activation_dtype(manifest)
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
    said = {"gate": (units, hidden, d), "up": (units, hidden, d), "down": (units, d, hidden)}
    if shapes != said or biased != ("up_bias" in manifest.record):
        raise BundleError(f"{bundle.path}: its experts are not those that config.json describes; convert again")
