"""`mlxflash models`, `info` and `verify`: which models have names, what a bundle is, whether it is whole. No MLX."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from mlxflash.bundle import Bundle, BundleError
from mlxflash.catalog import KNOWN, Known
from mlxflash.commands.terminal import Progress, say
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
    bundle = Bundle.open(_story(args.bundle))
    print(json.dumps(facts(bundle), indent=1) if args.json else describe(bundle))


def run_verify(args: argparse.Namespace) -> None:
    bundle = Bundle.open(_story(args.bundle))
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


def _story(path: Path) -> Path:
    from mlxflash.hub import STORY

    return STORY if str(path) == "story" else path


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
        "runs": "sparse: predicted units only" if m.sparse else "exact: every unit, streamed where it is not held",
        "calibration": m.calibration,
        "source": m.source,
    }


def describe(bundle: Bundle) -> str:
    """What `info` tells, for people."""
    f, m = facts(bundle), bundle.manifest
    bits = f"{m.quantization['bits']}-bit, groups of {m.quantization['group_size']}" if m.quantization else m.dtype
    names = " | ".join(p.name for p in m.record.parts if p.offset is not None)
    lines = [
        f"{bundle.path}: {m.model_type} from {m.source}, {bits}",
        f"  layers      {f['layers']} of {f['units_per_layer']} units, {m.layout}, {m.activation}, width {m.d_model}",
        f"  records     {f['record_bytes']} bytes every {f['record_stride']}: {names}",
        f"  streamed    {format_bytes(f['streamed_bytes'])}",
        f"  resident    {format_bytes(f['resident_bytes'])}",
        f"  runs        {f['runs']}",
    ]
    for name, size in f["predictors"].items():
        said = "for --sparsity" if name == "sparsity" else _said(m.calibration.get(name))
        lines.append(f"  predictor   {name}, {format_bytes(size)}: {said}")
        lines += [f"  {'sparsity' if name == 'sparsity' else 'fidelity'}    {line}" for line in _levels(bundle, name)]
    return "\n".join(lines)


def _levels(bundle: Bundle, predictor: str) -> list[str]:
    """The fidelity report: a line per level of a predictor, as measured with nothing held from earlier tokens."""
    found = bundle.manifest.calibration.get("fidelity", {}).get(predictor)
    if not found:
        return []
    size = sum(layer.units for layer in bundle.manifest.layers) * bundle.manifest.record.num_bytes
    lines = []
    for name, level in found["levels"].items():
        reached = "" if level["met"] else ", as near as the predictor comes"
        reached += f", with {level['held']:.0%} of the units held" if level["held"] else ""
        share = "% of the units left out" if predictor == "sparsity" else ""
        lines.append(
            f"{name}{share}: perplexity {math.expm1(level['kl']):+.2%}, top-1 agreement {level['top1']:.1%}, at most "
            f"{format_bytes(level['flagged'] * size)} per token{reached}"
        )
    return lines


def _said(said: dict[str, Any] | None) -> str:
    if not said:
        return "not measured; `mlxflash calibrate` does"
    text = f"recall {said['recall']:.1%}, {said['flagged']:.1%} of units flagged ({said['active']:.1%} active)"
    if "perplexity_change" in said:
        text += f", perplexity {said['perplexity_change']:+.2%} ({said['tokens']} tokens of {said['text']})"
    return text
