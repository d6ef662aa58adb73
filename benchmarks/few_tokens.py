"""One token, a few, a prompt: the union of what they need, or everything streamed; and prompts beside their limits.

Each pass of M tokens is run both ways on one loaded model, cold (direct reads, windows as a decoded text leaves them):
`union` reads the missing units of all M tokens at random places, `stream` reads every unit that is not held in large
blocks. `chosen` is what the disk profile forecasts to be faster. Which units tokens need is a trace's word (trace.py),
predictors of the paper's size run beside it; a stream asks no predictor. Limits of a stream: its bytes at the rate at
which the profile says the disk reads sequentially, and all products at the rate of NumPy's BLAS in this run.

    python benchmarks/few_tokens.py --shape opt-6.7b --memory 55% [--dir FOLDER]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from trace import synthetic
from typing import Any

import mlx.core as mx
import numpy as np
from end_to_end import CONTEXT, Paced, prepare
from shapes import SHAPES

from mlxflash.backends import make_backend
from mlxflash.decode import reserved_cache
from mlxflash.diskprofile import disk_profile
from mlxflash.ffn import FEW_TOKENS
from mlxflash.flash import FlashModel
from mlxflash.model import load_bundle
from mlxflash.predictor import Ids

WIDTHS = (1, 2, 4, 8, 32, 128)


class PacedUnion(Paced):
    """The union of as many of the trace's tokens as it is given."""

    def start(self, x: mx.array) -> Ids:
        product = self.backend.project(x, self._down, self._up)

        def ids() -> np.ndarray:
            product()
            last = self.sets.starts.shape[1] - 1
            found = [self.sets.at(self.layer, (self.token + i) % last) for i in range(len(x))]
            self.token += len(x)
            return np.unique(np.concatenate(found))

        return ids


class Forced:
    """Stands where the disk profile does and decides one way."""

    def __init__(self, union: bool):
        self.union = union

    def batch(self, size: float, count: float) -> float:
        return 0.0 if self.union else 1.0

    def sequential(self, num_bytes: float) -> float:
        return 0.0 if not self.union else 1.0


def blas_rate(tokens: int, d_model: int, units: int) -> float:
    """FLOP/s of NumPy's float32 product of an FFN's shape."""
    x, w = np.ones((tokens, d_model), np.float32), np.ones((d_model, units), np.float32)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        x @ w
        times.append(time.perf_counter() - begin)
    return 2 * tokens * d_model * units / float(np.median(times[1:]))


def settle(model: FlashModel, cache: Any, tokens: int) -> None:
    """Decode until windows hold what a text of one token after the other leaves in them."""
    model.flash.forget()
    for _ in range(tokens):
        mx.eval(model(mx.array([[5]]), cache=cache))


def timed(model: FlashModel, width: int, context: int, reps: int) -> dict[str, float]:
    """Median of `reps` passes of `width` tokens, each from a settled window."""
    seconds, num_bytes, reads = [], [], []
    for _ in range(reps):
        cache = reserved_cache(model, None, context)
        settle(model, cache, 6)
        before, begin = model.flash.snapshot(), time.perf_counter()
        mx.eval(model(mx.array([[5] * width]), cache=cache))
        seconds.append(time.perf_counter() - begin)
        after = model.flash.snapshot()
        num_bytes.append(after.num_bytes - before.num_bytes)
        reads.append(after.num_reads - before.num_reads)
    return {
        "ms": 1e3 * float(np.median(seconds)),
        "bytes": float(np.median(num_bytes)),
        "reads": float(np.median(reads)),
    }


def run(shape: str, memory: str, folder: Path, reps: int) -> list[dict[str, Any]]:
    bundle, _ = prepare(shape, folder)
    m, backend = bundle.manifest, make_backend()
    units = m.layers[0].units
    activity = SHAPES[shape].activity
    trace = synthetic(bundle.num_layers, units, 256, activity)
    predictors = PacedUnion.of(bundle, backend, trace.sets["late"], activity)
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"predictor": predictors, "direct": True, "look_ahead": False, "max_kv_size": CONTEXT}
    with load_bundle(bundle.path, memory=memory, backend=backend, bundle=bundle, **settings) as model:
        model.flash.mode = "replayed trace"
        disk = disk_profile([bundle.layer_path(i) for i in range(bundle.num_layers)])
        if disk is None:
            raise SystemExit("few_tokens: this file system has no direct reads")
        parameters = sum(4 * m.d_model**2 + 2 * layer.units * m.d_model for layer in m.layers)
        plan = model.flash.plan
        print(f"{shape}, {memory}: room for {sum(plan.capacities) / sum(plan.units):.1%} of the units")
        print(
            "    M   union ms     MB    reads   stream ms     MB    reads   faster   chosen   x limit (read, BLAS ms)"
        )
        for width in WIDTHS:
            row: dict[str, Any] = {"tokens": width}
            for way in ("union", "stream"):
                if (way == "union" and width > FEW_TOKENS) or (way == "stream" and width == 1):
                    continue  # one token always takes the union, a prompt never does
                for layer in model.flash.layers:
                    layer.disk = Forced(way == "union")  # type: ignore[assignment]
                row[way] = timed(model, width, CONTEXT, reps)
            for layer in model.flash.layers:
                layer.disk = disk
            row["chosen"] = timed(model, width, CONTEXT, 1)
            read_ms = 1e3 * disk.sequential(row["stream"]["bytes"]) if "stream" in row else 0.0
            blas_ms = 1e3 * 2 * parameters * width / blas_rate(width, m.d_model, units)
            row |= {"read_limit_ms": read_ms, "blas_ms": blas_ms}
            rows.append(row)
            print(_line(row))
    return rows


def _line(row: dict[str, Any]) -> str:
    def cells(way: dict[str, float] | None) -> str:
        return (
            f"{way['ms']:9.0f} {way['bytes'] / 1e6:7.0f} {way['reads']:7.0f}" if way else f"{'-':>9} {'-':>7} {'-':>7}"
        )

    union, stream = row.get("union"), row.get("stream")
    faster = "union" if not stream or (union and union["ms"] < stream["ms"]) else "stream"
    chosen = min(
        (w for w in ("union", "stream") if row.get(w)), key=lambda w: abs(row[w]["bytes"] - row["chosen"]["bytes"])
    )
    limit = max(row["read_limit_ms"], row["blas_ms"])
    share = f"{stream['ms'] / limit:7.2f}" if stream else f"{'-':>7}"
    return (
        f"{row['tokens']:5} {cells(union)}   {cells(stream)}   {faster:>6}   {chosen:>6}   "
        f"{share} ({row['read_limit_ms']:.0f}, {row['blas_ms']:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--memory", default="55%", help="budget, as for generate (55%%)")
    parser.add_argument("--reps", type=int, default=2, help="passes per way and width (2)")
    parser.add_argument("--dir", type=Path, default=None, help="where bundles are kept; a temporary folder otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        rows = run(args.shape, args.memory, args.dir or Path(scratch), args.reps)
    print(json.dumps({"shape": args.shape, "memory": args.memory, "rows": rows}))


if __name__ == "__main__":
    main()
