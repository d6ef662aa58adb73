"""What streaming costs in fidelity: perplexity through the decode path beside the dense model's, on held-out text.

Teacher-forced, one token per pass, the window warm within each 512-token stretch. For each window and budget:
perplexity, bytes per token as counted and as the kernel counted them (/proc/self/io, direct reads), hit rate; then
recall and share flagged per layer against the truly active units.
Says nothing about speed. Dense is the same bundle held whole.

    python benchmarks/fidelity.py BUNDLE --text FILE --memory 36MB 40MB [--stretches 8]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.api import load_tokenizer
from mlxflash.bundle import Bundle
from mlxflash.evaluate import decode_losses, perplexity
from mlxflash.model import load_bundle
from mlxflash.predictor import Ids, Predictor

STRETCH = 512
WINDOWS = (1, 3, 5, 8, None)


class Watched:
    """A predictor beside the truth: counts what it finds, misses and flags in vain."""

    def __init__(self, predictor: Predictor, truth: Predictor):
        self.nbytes = predictor.nbytes
        self.found = self.active = self.flagged = 0
        self._predictor, self._truth = predictor, truth

    def start(self, x: mx.array) -> Ids:
        ids, truth = self._predictor.start(x)(), self._truth.start(x)()
        self.found += len(np.intersect1d(ids, truth, assume_unique=True))
        self.active += len(truth)
        self.flagged += len(ids)
        return lambda: ids


def kernel_bytes() -> int:
    """Bytes this process has had read from storage, as Linux counts them; 0 elsewhere."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.split("read_bytes:")[1].split()[0])


def losses(model: Any, stretches: list[np.ndarray]) -> np.ndarray:
    out: list[float] = []
    for tokens in stretches:
        model.flash.forget()
        out.extend(decode_losses(model, tokens))
    return np.array(out)


def measure(
    bundle: Bundle, stretches: list[np.ndarray], memory: str, window: int | None, dense: float, predictor: str
) -> dict[str, Any]:
    """One row: decode the stretches at one budget and window."""
    with load_bundle(
        bundle.path,
        memory=memory,
        window=window,
        predictor=predictor,
        direct=True,
        max_kv_size=STRETCH,
        bundle=bundle,
    ) as model:
        before, counted = model.flash.snapshot(), kernel_bytes()
        said = losses(model, stretches)
        stats, counted = model.flash.stats(before, len(said)), kernel_bytes() - counted
        held = model.flash.plan.pools / bundle.streamed_bytes()
    return {
        "memory": memory,
        "window": window,
        "pool_share": held,
        "perplexity": perplexity(said),
        "change": perplexity(said) / dense - 1,
        "bytes_per_token": stats.bytes_per_token,
        "kernel_bytes_per_token": counted / len(said),
        "reads_per_token": stats.reads_per_token,
        "hit_rate": stats.hit_rate,
    }


def recall(
    bundle: Bundle, stretches: list[np.ndarray], memory: str, whole: int, predictor: str
) -> list[dict[str, float]]:
    """Recall and share flagged of each layer's predictor, against the truly active units."""
    with (
        load_bundle(bundle.path, memory=whole - 1, predictor="oracle", max_kv_size=STRETCH, bundle=bundle) as oracle,
        load_bundle(bundle.path, memory=memory, predictor=predictor, max_kv_size=STRETCH, bundle=bundle) as model,
    ):
        watched = []
        for layer, truth in zip(model.flash.layers, oracle.flash.layers, strict=True):
            assert layer.predictor is not None
            assert truth.predictor is not None
            watched.append(Watched(layer.predictor, truth.predictor))
            layer.predictor = watched[-1]
        losses(model, stretches)
        tokens = sum(len(s) - 1 for s in stretches)
        units = [layer.units for layer in model.flash.layers]
    return [
        {"recall": w.found / max(1, w.active), "active": w.active / tokens / n, "flagged": w.flagged / tokens / n}
        for w, n in zip(watched, units, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text, never the one calibrated on")
    parser.add_argument("--stretches", type=int, default=8, help=f"stretches of {STRETCH} tokens (8)")
    parser.add_argument("--memory", nargs="+", required=True, help="budgets, as for generate")
    parser.add_argument("--predictor", default="low-bit", help="low-bit (the default) or low-rank")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=WINDOWS, help="tokens that units stay, 0: as long as they can"
    )
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    ids = np.array(load_tokenizer(args.bundle).encode(args.text.read_text()), np.int64)
    stretches = [ids[i * STRETCH : (i + 1) * STRETCH] for i in range(args.stretches)]
    with load_bundle(args.bundle, max_kv_size=STRETCH, bundle=bundle) as model:
        whole = model.flash.plan
        assert whole.whole, "the dense reference must be held whole"
        dense = perplexity(losses(model, stretches))
    print(f"{args.bundle}: dense perplexity {dense:.4f} on {sum(map(len, stretches))} tokens of {args.text.name}")
    rows = []
    print("  pool  memory  window  perplexity  change   bytes/token   kernel's     reads  hit rate")
    for memory in args.memory:
        for window in args.windows:
            row = measure(bundle, stretches, memory, window or None, dense, args.predictor)
            rows.append(row)
            print(
                f"{row['pool_share']:6.1%}  {memory:>6}  {window or 'none':>6}  {row['perplexity']:10.4f}"
                f"  {row['change']:+.3%}  {row['bytes_per_token']:12.0f}  {row['kernel_bytes_per_token']:9.0f}"
                f"  {row['reads_per_token']:8.1f}  {row['hit_rate']:.1%}",
                flush=True,
            )
    layers = recall(bundle, stretches, args.memory[0], whole.memory, args.predictor)
    print("layer  active   flagged  flagged/active  recall")
    for i, r in enumerate(layers):
        print(f"{i:5}  {r['active']:6.2%}  {r['flagged']:7.2%}  {r['flagged'] / r['active']:14.3f}  {r['recall']:.2%}")
    active = sum(r["active"] for r in layers)
    print(
        f"  all  {active / len(layers):6.2%}  {sum(r['flagged'] for r in layers) / len(layers):7.2%}"
        f"  {sum(r['flagged'] for r in layers) / active:14.3f}"
        f"  {sum(r['active'] * r['recall'] for r in layers) / active:.2%}"
    )
    print(json.dumps({"bundle": bundle.path.name, "dense": dense, "rows": rows, "layers": layers}))


if __name__ == "__main__":
    sys.exit(main())
