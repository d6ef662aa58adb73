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
from mlxflash.bound import load_bound
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError
from mlxflash.diskprofile import disk_profile
from mlxflash.experts import FlashExperts
from mlxflash.ffn import Blocks, FlashFFN, FlashLayer, Warming
from mlxflash.fidelity import DEFAULT, FIDELITIES, Cuts, Level, levels_of, needs, read_cuts, sparsity_levels
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
    may_cast,
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
from mlxflash.predictor import MARGIN, Predictor, Projection, deciding_matrix, load_low_bit, load_low_rank
from mlxflash.reader import CheckedReader, File, Reader, make_reader
from mlxflash.resident import MLX, WORDS, Tensor, ffn_parts, tensors
from mlxflash.routed import RoutedFFN
from mlxflash.sketch import Sketch, read_sketch
from mlxflash.ways import RIVALS, STORED, Way, fastest, forecast_of, missed, sizes_of
from mlxflash.window import Window

PREDICTORS = ("all", "oracle", *STORED)
DEFAULT_GAP_BYTES = 256 << 10  # between two records of a stream: cheaper read than stepped over
FULL = 0.9  # of what a level counts on: some units are never wanted, so a window may never be quite full
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
    all_rows: bool | None = None,
    backend: Backend | None = None,
    bundle: Bundle | None = None,
) -> FlashModel:
    """The model of a bundle, ready to compute.

    memory: budget for everything but the interpreter ("2GB", "60%" of the converted model, bytes; None: enough to
    hold it whole, within what is available); the device's own memory on cuda. host_memory: what of the host's memory
    keeps what such a device gives up (None: nothing).
    predictor: "low-bit", "low-rank" (trained), "all" (exact), "bound" (exact too, and sparse), "oracle" (needs the
    deciding matrices in memory; shows the least that is to be read), or predictors of your own, one per layer. None:
    low-bit, or low-rank where its forecast is the shorter one.
    window: drop units that the last `window` tokens did not use (the paper's rule; None keeps them until their memory
    is wanted).
    max_kv_size: tokens of key-value cache to plan for. fidelity: "high" (default), "balanced" or "fast", how far the
    reading of active units is thinned out, where `calibrate` measured it for the predictor; "exact" is predictor "all",
    or "bound" where its forecast is the shorter one.
    sparsity: where activations are never zero, the percentage of units, those that add least, that are left out, where
    `calibrate --sparsity` measured it (lossy; None or 0: none).
    margin: instead of a level, flag every unit whose estimate exceeds minus this many of its standard errors (low-bit;
    log-odds for low-rank). check_reads: compare every record read with its checksum.
    look_ahead: ask for the next layer's units while this one computes; of low-bit predictors (None: where reads wait
    for a disk, the bundle was calibrated for it, and the forecast with it is the shorter one).
    all_rows: compute all units that are held, whatever a stored predictor says of them (None: or only those predicted,
    at the price measured with nothing held, where that is forecast to be faster).
    direct: bypass the page cache (None: when what streams is more than 0.7 of the memory available).

    Raises ValueError (BundleError, BudgetError) with one sentence.
    """
    bundle = bundle or Bundle.open(path)
    where = str(bundle.path)
    config = settings(bundle.config(), where)
    family, *activation = family_of(config, where)
    manifest = bundle.manifest
    mixture = family.layout == "experts"  # of which dense layers may be a part
    layout = "blocks" if manifest.layout == "blocks" and not mixture else family.layout
    if [manifest.layout, manifest.activation, manifest.threshold] != [layout, *activation]:
        raise BundleError(f"{where}: made as {manifest.layout}/{manifest.activation}, config.json says otherwise")
    if manifest.d_model != config["hidden_size"]:
        raise BundleError(f"{where}: made of layers of width {manifest.d_model}, config.json says otherwise")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a window spans at least 1 token")
    if fidelity not in (None, *FIDELITIES):
        raise ValueError(f"fidelity {fidelity!r} is unknown: {', '.join(FIDELITIES)} are there")
    if fidelity is not None and margin is not None:
        raise ValueError("fidelity and margin contradict each other: give one")
    if sparsity and (predictor, fidelity, margin) != (None, None, None):
        raise ValueError("sparsity is a choice of units by itself: give no predictor, fidelity or margin beside it")
    if fidelity == "exact" and predictor not in (None, "all", "bound"):
        raise ValueError(f"fidelity 'exact' and predictor {predictor!r} contradict each other")
    if predictor == "bound" and (margin is not None or fidelity not in (None, "exact")):
        raise ValueError("predictor 'bound' is exact: it has neither levels of fidelity nor a margin")
    own = None if predictor is None or isinstance(predictor, str) else list(predictor)
    if own is not None and len(own) != bundle.num_layers:
        raise ValueError(f"{len(own)} predictors for {bundle.num_layers} layers")
    if own is None and predictor not in (None, *PREDICTORS):
        raise ValueError(f"predictor {predictor!r} is unknown: {', '.join(PREDICTORS)} are there")
    if manifest.routed and (look_ahead or own is not None):
        bundle.require_sparse()
    if predictor == "sketch":
        bundle.require_neurons()
    elif predictor not in (None, "all") and (own is None or manifest.layout == "blocks"):
        bundle.require_sparse()
    if isinstance(predictor, str) and predictor in STORED and predictor not in bundle.predictors():
        raise BundleError(f"{where}: has no {predictor} predictor; {STORED[predictor]}")
    free = predictor is None and margin is None  # to choose between what the bundle has
    if fidelity == "exact":
        predictor = predictor or "all"
    if own is not None:
        predictor = "own"
    elif predictor is None:
        predictor = "low-bit" if manifest.sparse and "low-bit" in bundle.predictors() else "all"
    if manifest.routed:
        predictor = "router"
    levels: list[Level] = []
    if sparsity:
        predictor, levels, free = "sketch", sparsity_levels(bundle, sparsity), False
    elif predictor in STORED and margin is None and fidelity != "exact":
        levels = needs(bundle, str(predictor), fidelity) if fidelity else levels_of(bundle, str(predictor), DEFAULT)
    elif fidelity not in (None, "exact"):
        raise ValueError(f"fidelity {fidelity!r} needs a stored predictor ({', '.join(STORED)}), not {predictor!r}")
    backend = backend or make_backend(device)
    ffn = FFN.of(manifest, str(bundle.path / "manifest.json"))
    context = max_kv_size or min(max_positions(config), DEFAULT_CONTEXT)
    own_bytes = sum(p.nbytes for p in own) if own else 0
    found = tensors(bundle)
    if direct is None:
        direct = bundle.streamed_bytes() > AUTO_SHARE * available_memory()
    if look_ahead and predictor in ("low-rank", "sketch", "bound"):
        raise ValueError("look-ahead is fitted to the low-bit predictor; use it, or no look-ahead")

    def way(predictor: str, levels: list[Level]) -> Way:
        """With the level of those, which hold less and less, that holds no more than the budget does."""
        if predictor == "sketch":
            with contextlib.suppress(BudgetError):
                if (whole := way("all", [])).plan.whole:  # what holds everything has no use for a sketch
                    return whole
        skips = backend.leaves_out_free and predictor in STORED and predictor != "sketch" and all_rows is not True
        ways = [_way(predictor, levels, predicted) for predicted in ((False, True) if skips else (False,))]
        return (
            ways[1] if skips and all_rows is False else min(ways, key=lambda w: w.expected.seconds if w.expected else 0)
        )

    def _way(predictor: str, levels: list[Level], predicted: bool) -> Way:
        ahead = look_ahead
        if ahead is None:
            ahead = direct and predictor == "low-bit" and "look-ahead" in bundle.predictors()
        more = sum(f.stat().st_size for f in bundle.predictor_files("look-ahead")) if ahead else 0
        kept = ffn.sketched() if predictor == "sketch" else ffn
        level: Level | None = None
        for level in (*levels, None):
            sizes = sizes_of(bundle, config, found, backend, kept, predictor, own_bytes + more, level)
            tier = parse_memory(host_memory, sizes.model) if host_memory not in (None, 0, "0") else 0
            plan = make_plan(sizes, parse_memory(memory, sizes.model), context, backend.available_memory(), tier or 0)
            # A window's span gives up what is held, and rows that are not predicted may be left out.
            held = 0 if window or predicted else sum(plan.capacities) / sum(plan.units)
            if level is None or level.held <= held:
                break
        if level is None and levels and fidelity:  # a bundle of before, which had one measurement
            raise BundleError(f"{where}: {fidelity!r} was measured with more held than here; calibrate again")
        layers = [bundle.layer_path(i) for i in range(bundle.num_layers)]
        disk = disk_profile(layers) if direct and not plan.whole else None
        expected = forecast_of(bundle, plan, sizes, found, predictor, backend, disk, ahead, predicted)
        if look_ahead is None and ahead and expected is not None:
            without = forecast_of(bundle, plan, sizes, found, predictor, backend, disk, False, predicted)
            if without is not None and without.seconds < expected.seconds:
                ahead, expected = False, without
        misses = missed(plan, sizes)
        reads = None if misses is None else sum(misses) * (sizes.extent or sizes.stride)
        return Way(predictor, level, ahead, predicted and not plan.whole, plan, disk, expected, reads)

    ways = [way(str(predictor), levels)]
    for rival in RIVALS.get(str(predictor), ()) if free and not look_ahead else ():
        measured = levels_of(bundle, rival, fidelity or DEFAULT)
        if rival in bundle.predictors() and (measured or rival == "bound"):
            with contextlib.suppress(BudgetError, BundleError):
                ways.append(way(rival, measured))
    chosen, said = fastest(ways)
    predictor, level, look_ahead, plan = chosen.predictor, chosen.level, chosen.look_ahead, chosen.plan
    disk = chosen.disk
    if chosen.predicted:
        said = "\n".join(filter(None, [said, "  predicted rows of those held are computed"]))
    mx.set_cache_limit(plan.cache)
    model: Any = build_model(config, where, FlashModel)
    streamed = ffn_layers(model, family)
    if len(streamed) != bundle.num_layers:
        raise BundleError(f"{where}: made of {bundle.num_layers} layers, config.json describes {len(streamed)}")
    name = "all" if plan.whole else str(predictor)
    if check_reads and name == "sketch":
        raise ValueError("--check-reads compares whole records, and a sketch reads a part of each; use --exact")
    kept = ffn.sketched() if name == "sketch" else ffn
    cuts = read_cuts(bundle, name, level.multiplier) if level is not None and name in STORED else None
    mode = "; ".join(filter(None, [_mode(bundle, name, plan, margin, level), manifest.rounding]))
    reader: Any = make_reader(direct=direct)
    if check_reads:
        sums = {str(bundle.layer_path(i)): bundle.checksums(i) for i in range(bundle.num_layers)}
        reader = CheckedReader(reader, manifest.record, sums)
    flash = Flash(bundle, plan, reader, backend, mode, name, level, chosen.expected, said)
    flash.owners = streamed
    model.flash = flash
    try:
        resident = _load_resident(found, bundle, model, family, backend, flash.reader, direct)
        staging, passing = flash.stagings = backend.landings(kept, plan)
        blocks = None
        if not plan.whole:
            pair = [backend.rows(kept, plan.block_units, passing) for _ in range(2)]
            apart = 0 if mixture else (disk.gap_bytes() if disk else DEFAULT_GAP_BYTES) // manifest.record.stride
            blocks = Blocks((pair[0], pair[1]), apart)
        for i, (entry, owner) in enumerate(zip(manifest.layers, streamed, strict=True)):
            file = File(bundle.layer_path(i), direct)
            flash.files.append(file)
            source = Source(file, resident[i])
            rows = backend.rows(kept, plan.capacities[i], staging)
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
                extent=kept.record.stride,
                disk=disk,
                predicted=chosen.predicted,
            )
            if isinstance(layer.predictor, Sketch):
                layer.sketch = layer.predictor
            if name == "all":
                layer.window.hold(np.arange(plan.capacities[i]))
                rows.settle()  # what is on its way to a device goes there now
            flash.layers.append(layer)
            kind = FlashExperts if mixture else RoutedFFN if manifest.routed else FlashFFN
            graft(owner, family.ffn, kind(layer))
        for here, there in pairwise(flash.layers):
            here.after = there
        if name == "all":  # the next token begins where this one ends
            flash.layers[-1].after = flash.layers[0]
        if look_ahead and name in ("low-bit", "oracle"):
            _link(flash.layers, bundle, backend, ffn, cuts)
        if level is not None and level.held and not plan.whole:
            counts_on = FULL * level.held / (sum(plan.capacities) / sum(plan.units))  # of what a layer can hold
            cold = read_cuts(bundle, name, needs(bundle, name, level.name)[-1].multiplier)
            for layer, (base, least) in zip(flash.layers, cold, strict=True):
                warm, until = layer.predictor, int(counts_on * layer.rows.capacity)
                assert isinstance(warm, Projection | Sketch)
                layer.predictor = Warming(warm.above(base + least), warm, layer.window, until)
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
        if name == "bound":
            return load_bound(bundle, index, backend, ffn, bias)
        if name == "sketch":
            return Sketch(
                backend,
                ffn,
                read_sketch(files[index], ffn, layer),
                np.zeros(layer.units, np.float32) if cut is None else cut[1],
            )
        margin = MARGIN if margin is None else margin
        if name == "low-rank":
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
    if predictor in ("oracle", "router", "bound"):
        return f"exact ({predictor})"
    if level is not None:
        return f"approximate ({level.describe()})"
    said = bundle.manifest.calibration.get(predictor)
    if said and predictor == "sketch":
        return f"approximate (sketch: perplexity {np.expm1(said['kl']):+.2%})"
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
