"""Decoding at the scale of the paper: a real shape, about half of it in memory, each token beside its limits.

One run, one table, cold (direct reads; the page cache never holds what is read):

    naive      every weight, resident ones too, read again for every token, sequential, while the layer before computes
    hybrid     the budget resident, the rest of the feed-forward weights streamed for every token, beside its limit:
               the same reads with nothing computed
    resident4  the same shape in 4 bits, which fits the budget: nothing is read
    flash      units a trace says, in pools of the same budget; look-ahead reads run while layers compute

A shape whose activation is never zero (falcon-7b, tinyllama) has the first three: hybrid is how it runs. Weights are
random, so which units a token needs is a trace's word (trace.py, to the statistics published of the shape, shapes.py).
A predictor of the paper's size and ranks runs beside it in every layer, its memory and time counted; the trace's early
ids are released only when a predictor a layer ahead could have named them, its late ids when the one inside the layer
could, each after the predictor's products. `flash, no look-ahead` and `perfect look-ahead` (every late id early: a
bound, no predictor does that) stand beside it; `sketch` has copies of what makes the activations in SKETCH_BITS in
memory, as `calibrate --predictor sketch` makes them, and reads the down rows of the same ids, with and without.

Limits are fio's rates, our own reader's where there is no fio, and the memory rate of the device that computes.

What it does not show: fidelity (nothing here can; see fidelity.py), other victim orders, a MacBook.

    python benchmarks/end_to_end.py --shape opt-6.7b --memory 55% [--dir FOLDER] [--tokens 24]
    python benchmarks/end_to_end.py --shape falcon-7b-relu --layers 4    # a quick look, in proportion

`--layers` runs the shape's first layers, with as small a part of its vocabulary.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from trace import Sets, Trace, describe, synthetic
from typing import Any

import mlx.core as mx
import numpy as np
from disk import BATCH_BYTES, Op, measure_ours
from naive import Outcome, decode, load_exact, run_naive
from shapes import SHAPES, Activity, write_bundle
from streaming import read_seconds

from mlxflash import pool
from mlxflash._native import core
from mlxflash.backends import FFN, Backend, Matrix, make_backend
from mlxflash.backends.cuda import DeviceBackend
from mlxflash.bundle import Bundle
from mlxflash.diskprofile import disk_profile
from mlxflash.flash import FlashModel
from mlxflash.forecast import COPY, Work, forecast, machine_profile
from mlxflash.lookahead import RANK, WIDTH_PER_RANK, Fit, LookAhead
from mlxflash.misses import misses_per_token
from mlxflash.model import load_bundle
from mlxflash.plan import format_bytes, parse_memory
from mlxflash.pool import host_memory
from mlxflash.predictor import Ids
from mlxflash.reader import make_reader
from mlxflash.sketch import Sketch, products_of

CONTEXT = 384
ON_GPU = ("metal", "cuda")
RECALL, OVER = 0.587, 0.658  # the look-ahead as measured on the story model, layers 1-5, held-out text (RESULTS.md)
SKETCH_BITS = 3
WIDE = 8  # one layer of so many has a predictor of the larger rank


class Paced:
    """A low-rank predictor of the paper's size, computed for its time; what it answers is the trace's."""

    def __init__(self, backend: Backend, units: int, d_model: int, rank: int, sets: Sets, layer: int):
        rank = min(rank, d_model // 4)
        self._down = Matrix(mx.random.normal((rank, d_model)).astype(mx.float16))
        self._up = Matrix(mx.random.normal((units, rank)).astype(mx.float16))
        mx.eval(self._down.weight, self._up.weight)
        self.nbytes = self._down.nbytes + self._up.nbytes
        self.backend, self.sets, self.layer, self.token = backend, sets, layer, 0

    @classmethod
    def of(cls, bundle: Bundle, backend: Backend, sets: Sets, activity: Activity) -> list["Paced"]:
        """One per layer."""
        m, ranks = bundle.manifest, activity.ranks
        wide = len(m.layers) - max(1, len(m.layers) // WIDE)
        return [cls(backend, x.units, m.d_model, ranks[i >= wide], sets, i) for i, x in enumerate(m.layers)]

    def start(self, x: mx.array) -> Ids:
        product = self.backend.project(x, self._down, self._up)
        return lambda: self._answer(product())

    def _answer(self, _: np.ndarray) -> np.ndarray:
        ids = self.sets.at(self.layer, self.token % (self.sets.starts.shape[1] - 1))
        self.token += 1
        return ids

    def ahead(self, sets: Sets, rng: np.random.Generator) -> LookAhead:
        """What looks a layer ahead: a map of our rank, then the next layer's matrices, answering with other sets."""
        return looking(self, self._down.weight.shape[1], sets, rng)


def looking(predictor: Any, d_model: int, sets: Sets, rng: np.random.Generator) -> LookAhead:
    """A map of our rank before a twin of the next layer's predictor that answers with other sets."""
    rank = min(RANK, d_model // WIDTH_PER_RANK)
    vectors, down = rng.normal(size=(2, d_model)), rng.normal(size=(rank, d_model))
    fit = Fit(*vectors.astype(np.float32), down.astype(np.float32), down.T.astype(np.float32))
    twin: Any = object.__new__(type(predictor))
    twin.__dict__.update(predictor.__dict__, sets=sets, nbytes=0, token=0)
    return LookAhead(predictor.backend, fit, twin)


class Drawn(Sketch):
    """A sketch of random words, computed for its time; what it answers is the trace's, activations of 1."""

    def __init__(self, backend: Backend, ffn: FFN, units: int, sets: Sets, layer: int):
        words, groups = ffn.d_model * SKETCH_BITS // 32, ffn.d_model // 64
        zeros, scales = np.zeros(units, np.float32), mx.zeros((units, groups), mx.float16)
        matrices = [mx.random.randint(0, 1 << 31, (units, words)).astype(mx.uint32) for _ in products_of(ffn)]
        mx.eval(matrices, scales)
        products = [(Matrix(m, scales, scales + 0, SKETCH_BITS, 64), zeros) for m in matrices]
        super().__init__(backend, ffn, products, zeros)
        self.backend, self.width = backend, ffn.d_model
        self.sets, self.layer, self.token = sets, layer, 0

    @classmethod
    def of(cls, bundle: Bundle, backend: Backend, sets: Sets) -> list["Drawn"]:
        """One per layer."""
        ffn = FFN.of(bundle.manifest)
        return [cls(backend, ffn, x.units, sets, i) for i, x in enumerate(bundle.manifest.layers)]

    def start(self, x: mx.array) -> Ids:
        draw = super().start(x)

        def ids() -> np.ndarray:
            draw()
            named = self.sets.at(self.layer, self.token % (self.sets.starts.shape[1] - 1))
            self.token += 1
            self.hidden = np.zeros_like(self.hidden)
            self.hidden[:, named] = 1
            return named

        return ids

    def ahead(self, sets: Sets, rng: np.random.Generator) -> LookAhead:
        """As Paced's."""
        return looking(self, self.width, sets, rng)


def run_flash(
    bundle: Bundle,
    memory: str,
    tokens: np.ndarray,
    warm: int,
    backend: Backend,
    trace: Trace,
    activity: Activity,
    early: str | None,
    host_memory_size: str | None = None,
    foresee: bool = True,
    sketched: bool = False,
) -> Outcome:
    """Decode with the trace's late sets; `early` names the sets that are asked for a layer ahead, None: none. To
    `foresee` the time, the machine may have to be measured, which takes memory of its own."""
    predictors: list[Any] = Paced.of(bundle, backend, trace.sets["late"], activity)
    if sketched:
        predictors = list(Drawn.of(bundle, backend, trace.sets["late"]))
    # A virtual machine's host takes back memory that was freed, and gives it again at 0.4 GB/s (RESULTS.md).
    host_memory(bundle.resident_bytes()).release()
    begin = time.perf_counter()
    with load_bundle(
        bundle.path,
        memory=memory,
        host_memory=host_memory_size,
        predictor=predictors,
        direct=True,
        look_ahead=False,
        max_kv_size=CONTEXT,
        backend=backend,
        bundle=bundle,
    ) as model:
        ready = time.perf_counter() - begin
        if early is not None:
            link(model, trace.sets[early])
        model.flash.mode = "replayed trace"
        name = {None: "flash, no look-ahead", "early": "flash", "late": "perfect look-ahead"}[early]
        if sketched:
            name = name.replace("flash", "sketch")
        read = model.flash.snapshot().num_bytes
        with timed_copies() as copies:
            outcome = decode(model, tokens, warm, name + (", host tier" if host_memory_size else ""))
        read = model.flash.snapshot().num_bytes - read
        outcome.staged_bytes = sum(size for size, _ in copies) * outcome.bytes_per_token / read
        outcome.staged_s = sum(seconds for _, seconds in copies) * outcome.bytes_per_token / read
        outcome.held_bytes = held_bytes(model)
        outcome.ready_s, outcome.memory_bytes = ready, model.flash.plan.memory
        outcome.plan = model.flash.describe()
        knows = foresee and not model.flash.plan.whole
        if knows and backend.name in ("cpu", "mlx-cpu", "metal"):  # the forecast knows no bus
            outcome.forecast_s = foreseen(model, trace, early, backend)
        return outcome


@contextlib.contextmanager
def timed_copies() -> Iterator[list[tuple[int, float]]]:
    """Bytes and seconds of every copy out of staging, where records that are no whole blocks pass through."""
    copy, copies = pool.copy_rows, []

    def timed(*args: Any) -> None:
        begin = time.perf_counter()
        copy(*args)
        copies.append((len(args[5]) * args[6], time.perf_counter() - begin))

    pool.copy_rows = timed
    try:
        yield copies
    finally:
        pool.copy_rows = copy


def foreseen(model: FlashModel, trace: Trace, early: str | None, backend: Backend) -> float:
    """The planner's forecast of a token, seconds, with the trace's misses at the plan's capacities in place of a
    calibrated bundle's curves."""
    flash, units = model.flash, model.flash.plan.units
    manifest = flash.bundle.manifest
    late = [trace.sets["late"].matrix(i, n) for i, n in enumerate(units)]
    misses = tuple(misses_per_token(w, held) for w, held in zip(late, flash.plan.capacities, strict=True))
    right = wrong = 0.0
    if early is not None:
        asked = [trace.sets[early].matrix(i, n) for i, n in enumerate(units)]
        needed = sum(int(w.sum()) for w in late)
        right = sum(int((a & w).sum()) for a, w in zip(asked, late, strict=True)) / needed
        wrong = sum(int((a & ~w).sum()) for a, w in zip(asked, late, strict=True)) / needed
    work = Work(
        resident=flash.plan.resident,
        kind=manifest.dtype,
        predictor_kind=str(SKETCH_BITS) if flash.layers[0].sketch else "float16",
        slot=flash.plan.pools // sum(flash.plan.capacities),
        stride=flash.layers[0].extent,
        wanted=tuple(float(w.sum(axis=1).mean()) for w in late) if flash.layers[0].sketch else (),
        kv=0,  # the context is short here
        misses=misses,
        recall=right,
        over=wrong,
        staged=not manifest.record.aligned,
    )
    disk = disk_profile([flash.bundle.layer_path(i) for i in range(flash.bundle.num_layers)])
    machine = machine_profile(backend, {manifest.dtype, work.predictor_kind, "float32", COPY})
    return forecast(flash.plan, work, machine, disk).seconds


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


def run_hybrid(bundle: Bundle, memory: str, tokens: np.ndarray, warm: int, backend: Backend, rounds: int) -> Outcome:
    """Exact streaming, taking turns with the reads of a token alone."""
    with load_exact(bundle, memory, CONTEXT, backend) as model:
        turns, alone = [], []
        for _ in range(rounds):
            turns.append(decode(model, tokens, warm, "hybrid"))
            model.flash.layers[0].blocks.drain()
            if not isinstance(backend, DeviceBackend):  # whose units pass through the host
                alone.append(read_seconds(model))
        outcome = Outcome.pooled(turns)
        outcome.plan, outcome.memory_bytes = model.flash.describe(), model.flash.plan.memory
        outcome.alone_s = float(np.median(alone)) if alone else 0.0
        return outcome


def run_resident4(
    bundle: Bundle, memory: str, full: Bundle, tokens: np.ndarray, warm: int, backend: Backend
) -> Outcome:
    size = parse_memory(memory, total_bytes(full))
    with load_bundle(
        bundle.path, memory=size, predictor="all", max_kv_size=CONTEXT, backend=backend, bundle=bundle
    ) as model:
        return decode(model, tokens, warm, "resident4")


def total_bytes(bundle: Bundle) -> int:
    return bundle.streamed_bytes() + bundle.resident_bytes()


def disk_rate(file: Path, size: int, order: str, seconds: float) -> tuple[float, str]:
    """GB/s of direct reads of this file, and whose: fio's (io_uring, depth 32), ours where fio is missing or fails."""
    if shutil.which("fio") is not None:
        command = [
            "fio", "--name=x", f"--filename={file}", "--readonly", "--ioengine=io_uring", "--direct=1", "--iodepth=32",
            f"--rw={'randread' if order == 'random' else 'read'}", f"--bs={size}", f"--runtime={1000 * seconds:.0f}ms",
            "--time_based", "--output-format=json", "--norandommap", "--randrepeat=0",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"]) / 1e9, "fio"
    reader = make_reader(direct=True)
    try:
        buffers = [host_memory(BATCH_BYTES) for _ in range(2)]
        return measure_ours(reader, file, Op(order, size), seconds, buffers).mb_s / 1e3, "our reader"
    finally:
        reader.close()


def memory_rate(backend: Backend) -> float:
    """GB/s at which the device that computes reads memory; without native code a copy's, reads and writes."""
    if backend.name in ON_GPU:
        matrix, x = mx.ones((1 << 16, 1 << 12), mx.float16), mx.ones((1, 1 << 12), mx.float16)
        mx.eval(matrix, x)
        return timed_rate(lambda: mx.eval(x @ matrix.T), matrix.nbytes)
    buffer = np.ones(512 << 20, np.uint8)
    if core is not None:
        return float(np.median([core.read_bandwidth(buffer) for _ in range(5)]))
    half = len(buffer) // 2
    return timed_rate(lambda: np.copyto(buffer[:half], buffer[half:]), len(buffer))


def timed_rate(work: Callable[[], object], num_bytes: int) -> float:
    """GB/s, the median of five."""
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return num_bytes / float(np.median(seconds[1:])) / 1e9


def prepare(name: str, folder: Path, layers: int | None = None) -> tuple[Bundle, Bundle]:
    """The shape's bundles, in float16 and 4 bits, made where they are not there."""
    shape, name = SHAPES[name].first(layers), f"{name}-{layers}" if layers else name
    paths = folder / f"{name}.flash", folder / f"{name}-q4.flash"
    for path, bits in zip(paths, (None, 4), strict=True):
        if not (path / "manifest.json").exists():
            write_bundle(shape, path, dtype="float16", bits=bits)
    return Bundle.open(paths[0]), Bundle.open(paths[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--layers", type=int, default=None, help="only so many of the shape's")
    parser.add_argument("--memory", default="55%", help="budget, as for generate (55%%)")
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens counted for flash (24)")
    parser.add_argument("--recall", type=float, default=RECALL, help=f"of the early sets ({RECALL})")
    parser.add_argument("--over", type=float, default=OVER, help=f"size of the early sets beside the late ({OVER})")
    parser.add_argument("--device", help="cuda, metal, cpu or mlx-cpu; the best here otherwise")
    parser.add_argument("--host-memory", default=None, help="cuda: of a row with a host tier, as for generate")
    parser.add_argument("--dir", type=Path, default=None, help="where bundles are kept; a temporary folder otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        run(args, args.dir or Path(scratch))


def run(args: argparse.Namespace, folder: Path) -> None:
    shape = SHAPES[args.shape]
    bundle, quantised = prepare(args.shape, folder, args.layers)
    manifest, file = bundle.manifest, bundle.layer_path(bundle.num_layers // 2)
    units = manifest.layers[0].units
    warm = 8  # tokens until the window is full of what tokens use
    backend = make_backend(args.device)
    if backend.name not in ON_GPU:
        mx.set_default_device(mx.cpu)  # on a Mac MLX would compute on its GPU whatever the backend is
    few = np.full(3, 5)
    rates: dict[str, Any] = {}
    seconds = 0.5 if args.shape.startswith("tiny") else 2.0
    rates["sequential"], rates["by"] = disk_rate(file, 1 << 20, "sequential", seconds)
    outcomes = [
        run_naive(bundle, args.memory, few, 1, CONTEXT, backend),
        run_hybrid(bundle, args.memory, few, 1, backend, rounds=1 if shape.sparse else 3),
        run_resident4(quantised, args.memory, bundle, np.full(6, 5), 2, backend),
    ]
    for outcome, all_of in zip(outcomes, (bundle, bundle, quantised), strict=True):
        outcome.held_bytes = total_bytes(all_of)
    if shape.sparse:
        rates["random"], rates["by"] = disk_rate(file, manifest.record.stride, "random", seconds)
        trace = synthetic(
            bundle.num_layers, units, args.tokens + warm, shape.activity, recall=args.recall, over=args.over
        )
        print(describe(trace))
        many = np.full(args.tokens + warm, 5)

        def flash(early: str | None, host: str | None = None) -> Outcome:
            return run_flash(bundle, args.memory, many, warm, backend, trace, shape.activity, early, host)

        outcomes += [flash("early"), flash(None), flash("late")]
        for early in (None,) if "gate" in manifest.record else ("early", None):  # gated sketches look not ahead
            outcomes.append(
                run_flash(bundle, args.memory, many, warm, backend, trace, shape.activity, early, sketched=True)
            )
        if isinstance(backend, DeviceBackend):
            backend.waits = True  # their time alone, at the price of what they overlap
            outcomes.append(flash("early"))
            outcomes[-1].mode += ", transfers waited for"
            backend.waits = False
        if args.host_memory:
            outcomes.append(flash("early", args.host_memory))
    rates["memory"] = memory_rate(backend)  # last: its buffer is none of the budget's
    rows = [row_of(o, rates["sequential" if o in outcomes[:3] else "random"], rates["memory"]) for o in outcomes]
    report(args, rows, outcomes, rates, bundle)


def row_of(o: Outcome, disk: float, memory: float) -> dict[str, Any]:
    """Where the median token's time went: compute, wait and manage add up to ms; compute contains predict."""
    ms = 1e3 * float(np.median(o.seconds))
    return {
        "mode": o.mode,
        "ms": ms,
        "compute_ms": ms - 1e3 * (o.flash_s + o.manage_s),
        "wait_ms": 1e3 * o.flash_s,
        "manage_ms": 1e3 * o.manage_s,
        "predict_ms": 1e3 * o.predict_s,
        "bytes": o.bytes_per_token,
        "reads": o.reads_per_token,
        "forecast_ms": 1e3 * o.forecast_s,
        "alone_ms": 1e3 * o.alone_s,
        "staged_ms": 1e3 * o.staged_s,
        "staged_bytes": o.staged_bytes,
        "transfer_ms": 1e3 * o.transfer_s,
        "transfer_bytes": o.transfer_bytes,
        "tier_hit_rate": o.tier_hit_rate,
        "pool_copies": o.pool_copies,
        "io_limit_ms": o.bytes_per_token / disk / 1e6,
        "memory_limit_ms": o.held_bytes / memory / 1e6,
    }


def report(
    args: argparse.Namespace, rows: list[dict[str, Any]], outcomes: list[Outcome], rates: dict[str, Any], b: Bundle
) -> None:
    best, naive, hybrid, resident4 = outcomes[3 if len(outcomes) > 3 else 1], *rows[:3]
    row = rows[outcomes.index(best)]
    kind = "random" if best is not outcomes[1] else "sequential"
    print(best.plan)
    print(f"memory {rates['memory']:.1f} GB/s read; {rates['by']}, direct: sequential 1 MiB ", end="")
    random = f", random {b.manifest.record.stride} B {rates['random']:.2f} GB/s" if "random" in rates else ""
    print(f"{rates['sequential']:.2f} GB/s{random}")
    print("                        ms  compute  wait  manage  predict       bytes   reads  GB/s   naive/  hybrid/")
    for r in rows:
        print(
            f"{r['mode']:<21}{r['ms']:6.0f}  {r['compute_ms']:7.0f}  {r['wait_ms']:4.0f}  {r['manage_ms']:6.1f}"
            f"  {r['predict_ms']:7.1f}  {format_bytes(r['bytes']):>10}  {r['reads']:6.0f}"
            f"  {r['bytes'] / r['ms'] / 1e6:4.2f}  {naive['ms'] / r['ms']:6.1f}x  {hybrid['ms'] / r['ms']:6.1f}x"
        )
    if any(r["transfer_bytes"] for r in rows):
        for r in rows:
            print(
                f"{r['mode']:<21}{format_bytes(r['transfer_bytes'])} per token to the device, asked for in"
                f" {r['transfer_ms']:.2f} ms of compute; {r['tier_hit_rate']:.1%} from the host tier,"
                f" {r['pool_copies']} whole-pool copies"
            )
    ms, io, memory = row["ms"], row["io_limit_ms"], row["memory_limit_ms"]
    print(f"limits of {best.mode}: {io:.0f} ms bytes / the {kind} rate, {memory:.0f} ms held bytes / memory rate;")
    print(f"the token takes {ms / max(io, memory):.2f} of the larger; management {row['manage_ms'] / ms:.1%} of it")
    if hybrid["alone_ms"]:
        times = hybrid["ms"] / hybrid["alone_ms"]
        print(f"hybrid takes {times:.2f} of its reads alone, {hybrid['alone_ms']:.0f} ms, in turns with it")
    if row["staged_bytes"]:
        print(
            f"staging: {format_bytes(row['bytes'])} read for {format_bytes(row['staged_bytes'])} wanted"
            f" ({row['bytes'] / row['staged_bytes']:.2f}x), copied out in {row['staged_ms']:.1f} ms of the token"
        )
    shares = [f"{r['mode']} {r['io_limit_ms'] / r['ms']:.2f}" for r in (naive, hybrid)]
    for o, r in ((o, r) for o, r in zip(outcomes, rows, strict=True) if o.forecast_s):
        off = 1e3 * o.forecast_s / r["ms"] - 1
        print(f"forecast of {r['mode']}: {1e3 * o.forecast_s:.0f} ms ({off:+.0%})")
    print(f"share of the sequential rate of {rates['by']}: " + ", ".join(shares))
    if best.ready_s:
        print(f"ready to decode after {best.ready_s:.1f} s ({format_bytes(b.resident_bytes())} resident weights)")
    known = {key: value for key, value in row.items() if key not in ("mode", "ms", "predict_ms")}
    print(
        json.dumps(
            {
                "shape": args.shape,
                "memory_bytes": best.memory_bytes,
                "peak_rss_bytes": int(best.peak_rss_gb * 1e9),
                "naive_ms": naive["ms"],
                "hybrid_ms": hybrid["ms"],
                "resident4_ms": resident4["ms"],
                **({"flash_ms": ms} if SHAPES[args.shape].sparse else {}),
                **known,
                "ready_s": best.ready_s,
                "rates": rates,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
