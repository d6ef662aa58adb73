"""`mlxflash models`, `info` and `verify`: which models have names, what a bundle is, whether it is whole. No MLX."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mlxflash.bundle import SPARSE_ACTIVATIONS, Bundle, BundleError, Manifest
from mlxflash.catalog import KNOWN, Known
from mlxflash.commands.terminal import Progress, open_bundle, say
from mlxflash.plan import format_bytes


def add_info(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run=run_info)


def add_verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.set_defaults(run=run_verify)


def add_models(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run=run_models)


def run_models(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({name: _known_facts(known) for name, known in KNOWN.items()}, indent=1))
        return
    print(f"{'name':<18}{'runs':<8}{'f16':>9}{'needs':>10}{'4-bit':>10}{'needs':>10}  hub")
    for name, known in KNOWN.items():
        sizes = (known.nbytes(), known.smallest(), known.nbytes(4), known.smallest(4))
        shown = "".join(f"{format_bytes(size):>{width}}" for size, width in zip(sizes, (9, 10, 10, 10), strict=True))
        print(f"{name:<18}{known.kind:<8}{shown}  {known.repo}")
    print("runs: sparse, predicted units only; experts, those the router chose; exact, every unit, streamed")
    print("needs: the smallest --memory, with 4096 tokens of context")


def _known_facts(known: Known) -> dict[str, Any]:
    return {
        "hub": known.repo,
        "kind": known.kind,
        "bytes": {"f16": known.nbytes(), "q4": known.nbytes(4)},
        "smallest_memory": {"f16": known.smallest(), "q4": known.smallest(4)},
    }


def run_info(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle)
    print(json.dumps(facts(bundle), indent=1) if args.json else describe(bundle))


def run_verify(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle)
    bad = []
    with Progress() as progress:
        for index in range(bundle.num_layers):
            progress("layers", index, bundle.num_layers)
            bad += [(bundle.layer_path(index), record) for record in bundle.verify(index)]
        progress("layers", bundle.num_layers, bundle.num_layers)
    for file, record in bad[:20]:
        say(f"{file}: record {record} does not match its checksum")
    if bad:
        raise BundleError(f"{bundle.path}: {len(bad)} records are damaged; convert again")
    print(f"{bundle.path}: all {sum(layer.units for layer in bundle.manifest.layers)} records match their checksums")


def facts(bundle: Bundle) -> dict[str, Any]:
    """What `info` tells, for machines."""
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        "model_type": m.model_type,
        "layout": m.layout,
        "activation": m.activation,
        "dtype": m.dtype,
        "quantization": m.quantization,
        "d_model": m.d_model,
        "layers": len(m.layers),
        "units_per_layer": m.layers[0].units,
        "record_bytes": m.record.num_bytes,
        "record_stride": m.record.stride,
        "streamed_bytes": bundle.streamed_bytes(),
        "resident_bytes": bundle.resident_bytes(),
        "predictors": {n: sum(f.stat().st_size for f in bundle.predictor_files(n)) for n in bundle.predictors()},
        "runs": _runs(m),
        "calibration": m.calibration,
        "source": m.source,
    }


def _runs(manifest: Manifest) -> str:
    if manifest.sparse:
        return "sparse: predicted units only"
    if manifest.routed:
        return "routed: what the model's own router names, exactly"
    said = "exact: every unit, streamed where it is not held"
    if manifest.layout == "blocks" and manifest.activation in SPARSE_ACTIVATIONS:
        said += f" ({manifest.activation} makes neurons zero, but they share scales and are read in blocks)"
    return said


def describe(bundle: Bundle) -> str:
    """What `info` tells, for people."""
    f, m = facts(bundle), bundle.manifest
    q = m.quantization
    bits = f"{q['bits']}-bit {q['mode']}, groups of {q['group_size']}" if q else m.dtype
    bits += "".join(f", {name} {n}-bit in {group}" for name, (n, group) in m.formats.items())
    units = f"{f['units_per_layer']} units" + (f" of {m.record['up'].shape[0]} neurons" if m.layout == "blocks" else "")
    names = " | ".join(p.name for p in m.record.parts if p.offset is not None)
    lines = [
        f"{bundle.path}: {m.model_type} from {m.source}, {bits}",
        f"  layers      {f['layers']} of {units}, {m.layout}, {m.activation}, width {m.d_model}",
        f"  records     {f['record_bytes']} bytes every {f['record_stride']}: {names}",
        f"  streamed    {format_bytes(f['streamed_bytes'])}",
        f"  resident    {format_bytes(f['resident_bytes'])}",
        f"  runs        {f['runs']}",
    ]
    if routing := m.calibration.get("router"):
        misses = [np.interp(0.5, routing["misses"]["shares"], curve) for curve in routing["misses"]["layers"]]
        measured = f"{routing['tokens']} tokens of {routing['text']}"
        lines.append(f"  routing     {np.mean(misses):.2f} experts missed per token and layer, half held ({measured})")
    if m.rounding:
        lines.append(f"  rounding    {m.rounding}{_of_text(m.calibration['rounding'])}")
    for name, size in f["predictors"].items():
        said = m.calibration.get(name)
        lines.append(f"  predictor   {name}, {format_bytes(size)}: {_said(said)}")
        lines += [f"  fidelity    {line}" for line in _levels(bundle, name)]
    if m.sparse and not m.routed and "sketch" not in f["predictors"]:
        lines.append("  predictor   no sketch, which reads least: `mlxflash calibrate --predictor sketch` makes one")
    return "\n".join(lines)


def _of_text(said: dict[str, Any]) -> str:
    """What the cost of rounding was measured on; perplexity where that was a text of the user's."""
    change = ""
    if "ppl_change" in said:
        change = f", perplexity {said['ppl_change']:+.2%} +-{said['ppl_change_se']:.2%}"
    return f"{change} ({said['tokens']} tokens of {said['text']})"


def _levels(bundle: Bundle, predictor: str) -> list[str]:
    """The fidelity report: a line per level of a predictor and share of the units held from earlier tokens."""
    found = bundle.manifest.calibration.get("fidelity", {}).get(predictor)
    if not found:
        return []
    record = bundle.manifest.record
    part = record.only("down", "down_scales", "down_biases") if predictor == "sketch" else record
    units, lines = sum(layer.units for layer in bundle.manifest.layers), []
    for name, level in ((name, level) for name, measured in found["levels"].items() for level in measured):
        reached = "" if level["met"] else ", as near as the predictor comes"
        held, read = "", level["flagged"] * units
        out = "% of the units left out" if name.isdecimal() else ""
        if level["held"]:
            held, misses = f" with {level['held']:.0%} of the units held", level["misses"]
            read = sum(float(np.interp(level["held"], misses["shares"], curve)) for curve in misses["layers"])
        lines.append(
            f"{name}{out}{held}: perplexity {math.expm1(level['kl']):+.2%}, top-1 agreement {level['top1']:.1%}, "
            f"at most {format_bytes(read * part.num_bytes)} per token{reached}"
        )
    return lines


def _said(said: dict[str, Any] | None) -> str:
    if not said:
        return "not measured; `mlxflash calibrate` does"
    if "bits" in said:
        return f"{', '.join(map(str, said['bits']))} bits by layer, perplexity {math.expm1(said['kl']):+.2%}"
    text = f"recall {said['recall']:.1%}, {said['flagged']:.1%} of units flagged ({said['active']:.1%} active)"
    if "perplexity_change" in said:
        text += f", perplexity {said['perplexity_change']:+.2%} ({said['tokens']} tokens of {said['text']})"
    return text
