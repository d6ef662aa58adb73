"""load(): mlx-lm's kind of model built from a bundle, its FFNs streamed.

The model class comes from the family table, its FFNs are replaced by FlashFFN before any weight is read, and all
else is resident. `model.flash` holds what the streaming needs and tells what it did. What was asked for is checked in
`wishes`, and what of it is done is chosen in `ways`; here it is built.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.assemble import described, load_resident
from mlxflash.backends import FFN, Backend, make_backend
from mlxflash.bound import load_bound
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError
from mlxflash.experts import FlashExperts
from mlxflash.ffn import Blocks, FlashFFN, FlashLayer, Warming
from mlxflash.fidelity import Cuts, Level, needs, read_cuts
from mlxflash.flash import Flash, FlashModel
from mlxflash.lookahead import AHEAD_MARGIN, LookAhead, read_look_ahead
from mlxflash.models import Family, build_model, ffn_layers, graft, max_positions
from mlxflash.plan import AUTO_SHARE, Plan, available_memory
from mlxflash.pool import Source
from mlxflash.predictor import MARGIN, Predictor, Projection, deciding_matrix, load_low_bit, load_low_rank
from mlxflash.reader import CheckedReader, File, make_reader
from mlxflash.resident import tensors
from mlxflash.routed import RoutedFFN
from mlxflash.sketch import Sketch, read_sketch
from mlxflash.ways import Means, Way, choose
from mlxflash.window import Window
from mlxflash.wishes import STORED, Terms, Wishes

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
    predictor: "low-bit", "low-rank" (trained), "all" (exact), "bound" (exact too, and sparse), "sketch"
    (calibrated: its activations are computed with and only down rows read), "oracle" (needs the deciding matrices in
    memory; shows the least that is to be read), or predictors of your own, one per layer, of which all or none are
    Sketches. None: low-bit, or low-rank or a sketch where its forecast is the shorter one.
    window: drop units that the last `window` tokens did not use (the paper's rule; None keeps them until their memory
    is wanted).
    max_kv_size: tokens of key-value cache to plan for. fidelity: "high" (default), "balanced" or "fast", how far the
    reading of active units is thinned out, where `calibrate` measured it for the predictor; "exact" is predictor "all",
    or "bound" where its forecast is the shorter one.
    sparsity: where activations are never zero, the percentage of units, those that add least, that are left out, where
    `calibrate --sparsity` measured it (lossy; None or 0: none).
    margin: instead of a level, flag every unit whose estimate exceeds minus this many of its standard errors (low-bit;
    log-odds for low-rank). check_reads: compare every record read with its checksum.
    look_ahead: ask for the next layer's units while this one computes; of low-bit predictors and plain layers'
    sketches (None: where reads wait for a disk, the bundle was calibrated for it, and the forecast with it is the
    shorter one).
    all_rows: compute all units that are held, whatever a stored predictor says of them (None: or only those predicted,
    at the price measured with nothing held, where that is forecast to be faster).
    direct: bypass the page cache (None: when what streams is more than 0.7 of the memory available).

    Raises ValueError (BundleError, BudgetError) with one sentence.
    """
    bundle = bundle or Bundle.open(path)
    config, family = described(bundle)
    terms = Wishes(predictor, window, fidelity, sparsity, margin, look_ahead, all_rows).checked(bundle)
    if direct is None:
        direct = bundle.streamed_bytes() > AUTO_SHARE * available_memory()
    means = Means(
        bundle=bundle,
        config=config,
        backend=backend or make_backend(device),
        ffn=FFN.of(bundle.manifest, str(bundle.path / "manifest.json")),
        found=tensors(bundle),
        memory=memory,
        host_memory=host_memory,
        context=max_kv_size or min(max_positions(config), DEFAULT_CONTEXT),
        direct=direct,
    )
    way = choose(terms, means)
    mx.set_cache_limit(way.plan.cache)
    model: Any = build_model(config, str(bundle.path), FlashModel)
    owners = ffn_layers(model, family)
    if len(owners) != bundle.num_layers:
        raise BundleError(f"{bundle.path}: made of {bundle.num_layers} layers, config.json describes {len(owners)}")
    if check_reads and way.sketched:
        raise ValueError("--check-reads compares whole records, and a sketch reads a part of each; use --exact")
    name = "all" if way.plan.whole else way.predictor
    cuts = read_cuts(bundle, name, way.level.multiplier) if way.level is not None and name in STORED else None
    mode = "; ".join(filter(None, [_mode(bundle, name, way.plan, margin, way.level), bundle.manifest.rounding]))
    reader = _reader(bundle, direct, check_reads)
    flash = Flash(bundle, way.plan, reader, means.backend, mode, name, way.level, way.expected, way.why)
    flash.owners = owners
    model.flash = flash
    try:
        resident = load_resident(means.found, bundle, model, family, means.backend, reader, direct)
        _add_layers(flash, resident, family, terms, way, means, cuts)
        _link(flash, way, means.ffn, cuts)
        _warm_up(flash, way)
    except BaseException as error:
        flash.close()
        if isinstance(error, RuntimeError):
            raise flash.explain(error) from None
        raise
    return model


def _reader(bundle: Bundle, direct: bool, check_reads: bool) -> Any:
    reader = make_reader(direct=direct)
    if not check_reads:
        return reader
    sums = {str(bundle.layer_path(i)): bundle.checksums(i) for i in range(bundle.num_layers)}
    return CheckedReader(reader, bundle.manifest.record, sums)


def _add_layers(
    flash: Flash,
    resident: list[dict[str, np.ndarray]],
    family: Family,
    terms: Terms,
    way: Way,
    means: Means,
    cuts: Cuts | None,
) -> None:
    """Put a streaming FFN into each of the model's layers; resident: what each keeps of its FFN beside records."""
    bundle, plan, backend, reader, name = flash.bundle, flash.plan, flash.backend, flash.reader, flash.predictor
    manifest, wishes = bundle.manifest, terms.wishes
    ffn = means.ffn.sketched() if way.sketched else means.ffn
    dtype = backend.activation_dtype(manifest)
    mixture = family.layout == "experts"
    kind = FlashExperts if mixture else RoutedFFN if manifest.routed else FlashFFN
    staging, passing = flash.stagings = backend.landings(ffn, plan)
    blocks = None
    if not plan.whole:
        pair = [backend.rows(ffn, plan.block_units, passing) for _ in range(2)]
        gap = way.disk.gap_bytes() if way.disk else DEFAULT_GAP_BYTES
        blocks = Blocks((pair[0], pair[1]), 0 if mixture else gap // manifest.record.stride)
    for i, (entry, owner) in enumerate(zip(manifest.layers, flash.owners, strict=True)):
        file = File(bundle.layer_path(i), means.direct)
        flash.files.append(file)
        source = Source(file, resident[i])
        rows = backend.rows(ffn, plan.capacities[i], staging)
        if name == "own" and terms.own:
            predictor: Predictor | None = terms.own[i]
        else:
            predictor = _predictor(
                name, bundle, i, backend, means.ffn, source, wishes.margin, cuts[i] if cuts else None
            )
        bias = resident[i].get("down_bias")
        layer = FlashLayer(
            units=entry.units,
            source=source,
            rows=rows,
            window=Window(entry.units, rows, reader, source, None if name == "all" else wishes.window),
            blocks=blocks or Blocks((rows, rows), 0),
            reader=reader,
            predictor=predictor,
            sketch=predictor if isinstance(predictor, Sketch) else None,
            fixed=name == "all",
            down_bias=None if bias is None else mx.array(bias).astype(dtype),
            times=flash.times,
            stride=manifest.record.stride,
            extent=ffn.record.stride,
            disk=way.disk,
            predicted=way.predicted,
        )
        if name == "all":
            layer.window.hold(np.arange(plan.capacities[i]))
            rows.settle()  # what is on its way to a device goes there now
        flash.layers.append(layer)
        graft(owner, family.ffn, kind(layer))


def _link(flash: Flash, way: Way, ffn: FFN, cuts: Cuts | None) -> None:
    """Tell every layer which one streams after it, and how to name its units where it looks ahead."""
    for here, there in pairwise(flash.layers):
        here.after = there
    if flash.predictor == "all":  # the next token begins where this one ends
        flash.layers[-1].after = flash.layers[0]
    if way.look_ahead and flash.predictor in ("low-bit", "sketch", "oracle"):
        _look_ahead(flash.layers, flash.bundle, flash.backend, ffn, cuts)


def _warm_up(flash: Flash, way: Way) -> None:
    """Where a level counts on units that are held, let layers name more of them until they are."""
    level, plan = way.level, flash.plan
    if level is None or not level.held or plan.whole:
        return
    counts_on = FULL * level.held / (sum(plan.capacities) / sum(plan.units))  # of what a layer can hold
    cold = read_cuts(flash.bundle, flash.predictor, needs(flash.bundle, flash.predictor, level.name)[-1].multiplier)
    for layer, (base, least) in zip(flash.layers, cold, strict=True):
        warm, until = layer.predictor, int(counts_on * layer.rows.capacity)
        assert isinstance(warm, Projection | Sketch)
        layer.predictor = Warming(warm.above(base + least), warm, layer.window, until)


def _look_ahead(layers: list[FlashLayer], bundle: Bundle, backend: Backend, ffn: FFN, cuts: Cuts | None) -> None:
    """Let every layer name the next one's units, those that are worth a read where there are `cuts`."""
    files = bundle.predictor_files("look-ahead")
    if len(files) != bundle.num_layers - 1:
        raise BundleError(f"{bundle.path}: {len(files)} look-ahead files for {bundle.num_layers} layers; calibrate")
    for i, (file, (here, there)) in enumerate(zip(files, pairwise(layers), strict=True), 1):
        fit, shift, error = read_look_ahead(file, bundle.manifest.d_model, there.units)
        least = cuts[i][1] if cuts else np.float32(0)
        if isinstance(there.predictor, Sketch):
            here.next, here.ahead = there, LookAhead(backend, fit, there.predictor.above(least - AHEAD_MARGIN * error))
            continue
        assert isinstance(there.predictor, Projection)
        bias = ffn.offset(there.source.resident.get(f"{ffn.first}_bias"), there.units)
        offset = np.asarray(bias - shift + AHEAD_MARGIN * error - least, np.float32)
        here.next, here.ahead = there, LookAhead(backend, fit, there.predictor.at(offset))


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
