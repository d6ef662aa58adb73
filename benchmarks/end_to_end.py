"""Decoding at the scale of the paper: a real shape, about half of it in memory, each token beside its limits.

One run, one table, cold (direct reads; the page cache never holds what is read):

    naive      every weight, resident ones too, read again for every token, sequential, while the layer before computes
    hybrid     the budget resident, the rest of the feed-forward weights streamed for every token
    resident4  the same shape in 4 bits, which fits the budget: nothing is read
    flash      units a trace says, in pools of the same budget; look-ahead reads run while layers compute

Weights are random, so which units a token needs is a trace's word (trace.py; the published statistics of OPT-6.7B by
default). A predictor of the paper's size and ranks runs beside it in every layer, its memory and time counted; the
trace's early ids are released only when a predictor a layer ahead could have named them, its late ids when the one
inside the layer could, each after the predictor's products. `flash, no look-ahead` and `perfect look-ahead` (every
late id early: a bound, no predictor does that) stand beside it.

What it does not show: fidelity (nothing here can; see fidelity.py), other victim orders, a MacBook.

    python benchmarks/end_to_end.py --shape opt-6.7b --memory 55% [--dir FOLDER] [--tokens 24]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from trace import Sets, Trace, describe, synthetic
from typing import Any

import mlx.core as mx
import numpy as np
from naive import Outcome, decode, run_hybrid, run_naive
from shapes import SHAPES, write_bundle

from mlxflash._native import core
from mlxflash.backends import Matrix
from mlxflash.backends.cpu import CPUBackend, multiply
from mlxflash.bundle import Bundle
from mlxflash.lookahead import RANK, WIDTH_PER_RANK, Fit, LookAhead
from mlxflash.model import FlashModel, load_bundle
from mlxflash.plan import format_bytes, parse_memory
from mlxflash.predictor import Ids

CONTEXT = 384
RECALL, OVER = 0.587, 0.658  # the look-ahead as measured on the story model, layers 1-5, held-out text (RESULTS.md)
LATE_LAYERS, RANKS = 4, (128, 1024)  # LLM in a flash, OPT-6.7B: rank 128, in the last four layers 1024


class Paced:
    """A low-rank predictor of the paper's size, computed for its time; what it answers is the trace's."""

    def __init__(self, units: int, d_model: int, rank: int, sets: Sets, layer: int):
        rank = min(rank, d_model // 4)
        self._down = Matrix(mx.random.normal((rank, d_model)).astype(mx.float16))
        self._up = Matrix(mx.random.normal((units, rank)).astype(mx.float16))
        mx.eval(self._down.weight, self._up.weight)
        self.nbytes = self._down.nbytes + self._up.nbytes
        self.sets, self.layer, self.token = sets, layer, 0

    def start(self, x: mx.array) -> Ids:
        return lambda: self._answer(x)

    def _answer(self, x: mx.array) -> np.ndarray:
        multiply(mx.array(np.maximum(multiply(x, self._down), 0)), self._up)
        ids = self.sets.at(self.layer, self.token % (self.sets.starts.shape[1] - 1))
        self.token += 1
        return ids

    def ahead(self, sets: Sets, rng: np.random.Generator) -> LookAhead:
        """What looks a layer ahead: a map of our rank, then the next layer's matrices, answering with other sets."""
        d_model = self._down.weight.shape[1]
        rank = min(RANK, d_model // WIDTH_PER_RANK)
        vectors, down = rng.normal(size=(2, d_model)), rng.normal(size=(rank, d_model))
        fit = Fit(*vectors.astype(np.float32), down.astype(np.float32), down.T.astype(np.float32))
        twin: Any = object.__new__(Paced)
        twin.__dict__.update(self.__dict__, sets=sets, nbytes=0, token=0)
        return LookAhead(CPUBackend(), fit, twin)


def run_flash(bundle: Bundle, memory: str, tokens: np.ndarray, warm: int, trace: Trace, early: str | None) -> Outcome:
    """Decode with the trace's late sets; `early` names the sets that are asked for a layer ahead, None: none."""
    m = bundle.manifest
    predictors = []
    for i, layer in enumerate(m.layers):
        rank = RANKS[i >= len(m.layers) - LATE_LAYERS]
        predictors.append(Paced(layer.units, m.d_model, rank, trace.sets["late"], i))
    begin = time.perf_counter()
    with load_bundle(
        bundle.path,
        memory=memory,
        predictor=predictors,
        direct=True,
        look_ahead=False,
        max_kv_size=CONTEXT,
        bundle=bundle,
    ) as model:
        ready = time.perf_counter() - begin
        if early is not None:
            link(model, trace.sets[early])
        model.flash.mode = "replayed trace"
        name = {None: "flash, no look-ahead", "early": "flash", "late": "perfect look-ahead"}[early]
        outcome = decode(model, tokens, warm, name)
        outcome.held_bytes = held_bytes(model)
        outcome.ready_s, outcome.memory_bytes = ready, model.flash.plan.memory
        outcome.plan = model.flash.describe()
        return outcome


def link(model: FlashModel, sets: Sets) -> None:
    layers: Any = model.flash.layers
    rng = np.random.default_rng(0)
    for here, there in pairwise(layers):
        here.next, here.ahead = there, there.predictor.ahead(sets, rng)


def held_bytes(model: FlashModel) -> int:
    """What a decoded token passes through memory at most: resident matrices, predictors, rows held."""
    plan = model.flash.plan
    return (
        plan.resident
        + plan.predictor
        + int(model.flash.held_share() * sum(plan.units)) * (plan.pools // sum(plan.capacities))
    )


def run_resident4(bundle: Bundle, memory: str, full: Bundle, tokens: np.ndarray, warm: int) -> Outcome:
    size = parse_memory(memory, full.streamed_bytes() + full.resident_bytes())
    with load_bundle(bundle.path, memory=size, predictor="all", max_kv_size=CONTEXT, bundle=bundle) as model:
        return decode(model, tokens, warm, "resident4")


def fio_rate(file: Path, size: int, random: bool, seconds: float = 2.0) -> float | None:
    """GB/s of fio on this file: io_uring, depth 32, direct. None where fio is missing."""
    if shutil.which("fio") is None:
        return None
    command = [
        "fio", "--name=x", f"--filename={file}", "--readonly", "--ioengine=io_uring", "--direct=1", "--iodepth=32",
        f"--rw={'randread' if random else 'read'}", f"--bs={size}", f"--runtime={seconds}", "--time_based",
        "--output-format=json", "--norandommap", "--randrepeat=0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"]) / 1e9


def memory_rate() -> float:
    buffer = np.ones(512 << 20, np.uint8)
    return float(np.median([core.read_bandwidth(buffer) for _ in range(5)]))


def prepare(shape: str, folder: Path) -> tuple[Bundle, Bundle]:
    paths = folder / f"{shape}.flash", folder / f"{shape}-q4.flash"
    for path, bits in zip(paths, (None, 4), strict=True):
        if not (path / "manifest.json").exists():
            write_bundle(shape, path, dtype="float16", bits=bits)
    return Bundle.open(paths[0]), Bundle.open(paths[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--memory", default="55%", help="budget, as for generate (55%%)")
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens counted for flash (24)")
    parser.add_argument("--recall", type=float, default=RECALL, help=f"of the early sets ({RECALL})")
    parser.add_argument("--over", type=float, default=OVER, help=f"size of the early sets beside the late ({OVER})")
    parser.add_argument("--dir", type=Path, default=None, help="where bundles are kept; a temporary folder otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        run(args, args.dir or Path(scratch))


def run(args: argparse.Namespace, folder: Path) -> None:
    bundle, quantised = prepare(args.shape, folder)
    manifest, file = bundle.manifest, bundle.layer_path(bundle.num_layers // 2)
    units = manifest.layers[0].units
    warm = 8  # tokens until the window is full of what tokens use
    trace = synthetic(bundle.num_layers, units, args.tokens + warm, recall=args.recall, over=args.over)
    print(describe(trace))
    few = np.full(3, 5)
    many = np.full(args.tokens + warm, 5)
    rates = {"memory": memory_rate(), "sequential": fio_rate(file, 1 << 20, False), "random": None}
    outcomes = [
        run_naive(bundle, args.memory, few, 1, CONTEXT),
        run_hybrid(bundle, args.memory, few, 1, CONTEXT),
        run_resident4(quantised, args.memory, bundle, np.full(6, 5), 2),
    ]
    rates["random"] = fio_rate(file, manifest.record.stride, True)
    flash = run_flash(bundle, args.memory, many, warm, trace, "early")
    outcomes += [
        flash,
        run_flash(bundle, args.memory, many, warm, trace, None),
        run_flash(bundle, args.memory, many, warm, trace, "late"),
    ]
    report(args, outcomes, flash, rates, bundle)


def report(
    args: argparse.Namespace, outcomes: list[Outcome], flash: Any, rates: dict[str, Any], bundle: Bundle
) -> None:
    naive, hybrid, resident4 = outcomes[:3]
    print(flash.plan)
    print(f"memory {rates['memory']:.1f} GB/s read; fio, io_uring, depth 32, direct: sequential 1 MiB ", end="")
    print(
        f"{rates['sequential'] or 0:.2f} GB/s, random {bundle.manifest.record.stride} B {rates['random'] or 0:.2f} GB/s"
    )
    print("                        ms  compute  wait  manage  predict       bytes   reads  GB/s   naive/  hybrid/")
    for o in outcomes:
        ms = 1e3 * float(np.median(o.seconds))
        rest = ms - 1e3 * (o.flash_s + o.manage_s)
        print(
            f"{o.mode:<21}{ms:6.0f}  {rest:7.0f}  {1e3 * o.flash_s:4.0f}  {1e3 * o.manage_s:6.1f}"
            f"  {1e3 * o.predict_s:7.1f}"
            f"  {format_bytes(o.bytes_per_token):>10}  {o.reads_per_token:6.0f}  {o.bytes_per_token / ms / 1e6:4.2f}"
            f"  {1e3 * np.median(naive.seconds) / ms:6.1f}x  {1e3 * np.median(hybrid.seconds) / ms:6.1f}x"
        )
    ms = 1e3 * float(np.median(flash.seconds))
    io = flash.bytes_per_token / (rates["random"] or float("nan")) / 1e6
    memory = flash.held_bytes / rates["memory"] / 1e6
    print(f"limits of flash: {io:.0f} ms bytes / fio's random rate, {memory:.0f} ms held bytes / memory rate;")
    print(f"the token takes {ms / max(io, memory):.2f} of the larger; management {1e3 * flash.manage_s / ms:.1%} of it")
    if rates["sequential"]:
        shares = [
            f"{o.mode} {o.bytes_per_token / np.median(o.seconds) / 1e9 / rates['sequential']:.2f}" for o in outcomes[:2]
        ]
        print("share of fio's sequential rate: " + ", ".join(shares))
    print(f"ready to decode after {flash.ready_s:.1f} s ({format_bytes(bundle.resident_bytes())} resident weights)")
    print(
        json.dumps(
            {
                "shape": args.shape,
                "memory_bytes": flash.memory_bytes,
                "peak_rss_bytes": int(flash.peak_rss_gb * 1e9),
                "naive_ms": 1e3 * float(np.median(naive.seconds)),
                "hybrid_ms": 1e3 * float(np.median(hybrid.seconds)),
                "resident4_ms": 1e3 * float(np.median(resident4.seconds)),
                "flash_ms": ms,
                "compute_ms": ms - 1e3 * (flash.flash_s + flash.manage_s),
                "wait_ms": 1e3 * flash.flash_s,
                "manage_ms": 1e3 * flash.manage_s,
                "bytes": flash.bytes_per_token,
                "reads": flash.reads_per_token,
                "io_limit_ms": io,
                "memory_limit_ms": memory,
                "ready_s": flash.ready_s,
                "rates": rates,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
