"""What mlxflash assumes of Apple Silicon, checked and timed in one go; mac.sh runs this.

    pools       MLX arrays on page-aligned memory with a host view: do they alias, is what the host writes seen by
                the GPU, and which operations move an array away from its view
    landing     records read straight into such arrays, and their FFN beside a NumPy one; also with the read between
                building a graph and evaluating it
    evals       what an evaluation and a synchronisation per layer cost
    copies      which products of prefixes and column splits MLX computes without a copy, and how fast
    wired       a product after a pause, its matrix wired and not
    adoption    foreign memory as an MLX array; a Metal kernel of one's own
    iovecs      one contiguous read against two iovecs of the same bytes
    cache       uncached (F_NOCACHE, O_DIRECT) against buffered reads
    end_to_end  naive, hybrid and flash decoding (end_to_end.py) at the shape of OPT-1.3B

Every step is a process of its own, since a GPU error may end one without a word. What fails is named in a sentence,
the others go on, and the exit code is 1. A claim that the product relies on and that does not hold is a failure; what
is only good to know is printed and kept. Figures are medians of one machine in one minute.

    benchmarks/mac.sh [--dry-run] [--out mac.json] [--dir FOLDER] [--shape opt-1.3b]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from disk import test_file
from shapes import SHAPES, Shape, write_bundle
from steps import Step, attempt, ending, extra_bytes, median_s, one_step

from mlxflash._native import core
from mlxflash.backends import FFN
from mlxflash.backends.metal import PAGE, MLXBackend, shared_array, views_alias
from mlxflash.bundle import HEADER_BYTES, Bundle
from mlxflash.pool import Source, Staging, host_memory
from mlxflash.reader import File, make_reader
from mlxflash.resident import MLX

DEADLINE_S = 420  # for all steps; setting up the virtual environment comes on top
MEMORY = "65%"  # of OPT-1.3B's shape, two fifths of which are resident: with less a token's units do not fit
STEP_S = 60  # any step but the last, which takes what is left
ONES = {
    "float32": (np.float32, 1),
    "float16": (np.float16, 1),
    "bfloat16": (np.uint16, 0x3F80),
    "uint32": (np.uint32, 1),
}
BATCH_BYTES = 16 << 20


# Zero copy


def pools(s: Step) -> None:
    for name, (word, one) in ONES.items():
        array, view = shared_array((64, 256), MLX[name])
        host = np.frombuffer(view, word)
        s.must(f"{name}_page", host.ctypes.data % PAGE == 0, f"{name} pools begin on a page of {PAGE} bytes")
        s.must(f"{name}_alias", address(array) == host.ctypes.data, f"{name} pools alias their host view")
        sums = []
        for n in (64, 32, 0):
            host[:] = 0
            host[: n * 256] = one
            sums.append(mx.sum(array.astype(mx.float32)).item() == n * 256)
        s.must(f"{name}_seen", all(sums), f"what the host writes to {name} pools between evaluations is seen")
    s.must("self_test", views_alias(s.device), "the backend's own test at load finds views usable")
    late_writes(s)
    moves(s)


def late_writes(s: Step) -> None:
    array, view = shared_array((256, 1024), mx.float32)
    host = np.frombuffer(view, np.float32).reshape(256, 1024)
    for key, start in (("eval", mx.eval), ("async_eval", mx.async_eval)):
        host[:] = 1
        y = array.sum(axis=1)
        host[:] = 3
        start(y)
        s.must(f"late_{key}", np.array(y)[-1] == 3072, f"a write after building a graph and before its {key} is seen")
    good = 0
    for i in range(200):
        host[:128] = i
        y = array[:128].sum(axis=1)
        mx.async_eval(y)
        host[128:] = -1.0 - i  # rows that the graph does not read, while the device computes
        good += bool((np.array(y) == 1024.0 * i).all())
    s.must("other_rows", good == 200, "writes to rows beyond the computed prefix never disturb it (200 rounds)")


def moves(s: Step) -> None:
    """After which operations an array lies elsewhere, its view dangling or stale; the product does none but the
    first two."""

    def using(w: mx.array) -> mx.array:
        mx.eval(mx.compile(lambda a: (a + 1).sum())(w))
        return w

    def slicing(w: mx.array) -> mx.array:
        mx.eval(w[:4] * 2)
        return w

    def assigning(w: mx.array) -> mx.array:
        w[:4] = mx.ones((4, 1024))
        return w

    def adding(w: mx.array) -> mx.array:
        w += 1
        return w

    for act in (using, slicing, assigning, adding):
        for owner in ("sole owner", "an alias held"):
            w = mx.zeros((64, 1024))
            alias = w[:32] if owner == "an alias held" else None
            mx.eval(w, alias)
            pinned = memoryview(cast(Any, w))
            before = address(w)
            w = act(w)
            mx.eval(w)
            moved = address(w) != before
            key = f"moves_{act.__name__}_{owner.split()[-1]}"
            if act in (using, slicing):
                s.must(key, not moved, f"{act.__name__} a viewed array leaves it where it is ({owner})")
            else:
                s.note(key, moved, f"{act.__name__} in place {'MOVES' if moved else 'keeps'} a viewed array ({owner})")
            del pinned, alias


def address(array: mx.array) -> int:
    return int(np.frombuffer(memoryview(cast(Any, array)).cast("B"), np.uint8).ctypes.data)


def landing(s: Step) -> None:
    shape = Shape(layers=1, d_model=2048, ffn=1024, heads=32, vocabulary=512, positions=64)
    bundle = Bundle.open(write_bundle(shape, s.folder / "landing.flash"))
    ffn, path, rng = FFN.of(bundle.manifest), bundle.layer_path(0), np.random.default_rng(0)
    raw = np.fromfile(path, np.uint8, shape.ffn * ffn.record.stride, offset=HEADER_BYTES).reshape(shape.ffn, -1)
    up, down = np.split(raw.view(np.float16)[:, : 2 * shape.d_model].astype(np.float64), 2, axis=1)
    bias = rng.standard_normal(shape.ffn).astype(np.float32)
    x = rng.standard_normal((1, shape.d_model)).astype(np.float16)
    n = 250
    first, second = (np.sort(rng.choice(shape.ffn, n, replace=False)) for _ in range(2))
    reader, file = make_reader(direct=True), File(path, direct=True)
    source, slots = Source(file, {"up_bias": bias}), rng.permutation(n)

    def close_to(y: mx.array, units: np.ndarray) -> bool:
        want = np.maximum(x @ up[units].T + bias[units], 0) @ down[units]
        return bool(np.abs(np.array(y.astype(mx.float32)) - want).max() < 0.02 * np.abs(want).max())

    s.note("direct", file.direct, f"reads around the page cache granted: {file.direct}")
    for key, record_rows in (("records", True), ("parts", False)):
        rows = MLXBackend(s.device, record_rows=record_rows).rows(ffn, n, Staging(2 << 20, ffn.record))
        rows.land(reader, source, first, slots).wait()
        y = rows.ffn(mx.array(x), n)[0]
        s.must(f"{key}_ffn", close_to(y, first), f"{key}: the FFN of rows read in place is NumPy's")
        y = rows.ffn(mx.array(x), n)[0]
        rows.land(reader, source, second, slots).wait()
        mx.async_eval(y)
        s.must(f"{key}_late", close_to(y, second), f"{key}: rows read after building a graph are what it computes with")
    reader.close()
    file.close()


# Costs of MLX


def evals(s: Step) -> None:
    x = mx.zeros((64,))
    flags = mx.random.uniform(shape=(16384,)) > 0.9
    mx.eval(x, flags)

    def chain(apart: bool) -> None:
        y = x
        for _ in range(10):
            y = y + 1
            if apart:
                mx.eval(y)
        mx.eval(y)

    def on_host() -> None:
        y = x + 1
        mx.async_eval(y)
        np.asarray(y)

    works: dict[str, tuple[Callable[[], object], str]] = {
        "empty": (lambda: mx.eval(x), "eval of what is evaluated"),
        "small": (lambda: mx.eval(x + 1), "eval of one small operation"),
        "chain": (lambda: chain(False), "ten small operations in one eval"),
        "chain_apart": (lambda: chain(True), "the same in ten evals"),
        "on_host": (on_host, "async_eval of a small operation, its result to NumPy"),
        "mask": (lambda: np.flatnonzero(np.asarray(flags & True)), "flags of 16384 units to ids on the host"),
    }
    for key, (work, text) in works.items():
        value = 1e6 * median_s(work)
        s.note(f"{key}_us", value, f"{value:8.1f} us  {text}")
    layers, d = (4, 512) if s.dry else (24, 2048)
    matrices = [mx.random.normal((d, d)).astype(mx.float16) for _ in range(layers)]
    v = mx.ones((1, d), mx.float16)
    mx.eval(matrices, v)

    def token(sync: bool) -> None:
        y = v
        for m in matrices:
            y = mx.tanh(y @ m.T)
            if sync:
                mx.eval(y)
        mx.eval(y)

    once, apart = (1e6 * median_s(lambda sync=sync: token(sync)) for sync in (False, True))  # type: ignore[misc]
    s.note("layers_once_us", once, f"{once:8.1f} us  {layers} layers of a {d} x {d} product, one eval at the end")
    s.note("layers_apart_us", apart, f"{apart:8.1f} us  the same with an eval per layer")
    s.note("sync_us", (apart - once) / layers, f"{(apart - once) / layers:8.1f} us  is what a layer's eval adds")


def copies(s: Step) -> None:
    cap, d, half = (1024 if s.dry else 8192), 2048, mx.float16
    n = cap // 2
    record = mx.random.normal((cap, 2 * d)).astype(half)
    part = mx.random.normal((cap, d)).astype(half)
    words, scales, biases = mx.quantize(part, 64, 4)
    scales, biases = (a.astype(mx.float32) if s.device == mx.cpu else a for a in (scales, biases))
    x, h = mx.ones((1, d), half), mx.ones((1, n), half)
    qx, qh = x.astype(scales.dtype), h.astype(scales.dtype)
    mx.eval(record, part, words, scales, biases, x, h, qx, qh)

    def quantised(v: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(v, words[:n], scales[:n], biases[:n], transpose, 64, 4)

    whole, used = n * d * 2, s.device == mx.gpu  # Metal's rows are records, whose parts are column splits
    rows: dict[str, tuple[Callable[[], mx.array], int, bool, str]] = {
        "up_prefix": (lambda: x @ part[:n].T, whole, not used, "x @ U[:n].T"),
        "down_prefix": (lambda: h @ part[:n], whole, not used, "h @ D[:n]"),
        "up_columns": (lambda: x @ record[:n, :d].T, whole, used, "x @ W[:n, :d].T"),
        "down_columns": (lambda: h @ record[:n, d:], whole, used, "h @ W[:n, d:]"),
        "pair_rows": (lambda: x @ record[:n].reshape(2 * n, d).T, 2 * whole, False, "x @ W[:n].reshape(2n, d).T"),
        "up_quantised": (lambda: quantised(qx, True), n * d // 2, True, "4-bit x @ U[:n].T"),
        "down_quantised": (lambda: quantised(qh, False), n * d // 2, True, "4-bit h @ D[:n]"),
    }
    for key, (work, size, relied, text) in rows.items():
        extra = extra_bytes(work)
        rate = size / median_s(lambda work=work: mx.eval(work())) / 1e9  # type: ignore[misc]
        said = f"{extra / 1e6:6.2f} MB beside {size / 1e6:6.2f} MB of weights, {rate:6.1f} GB/s  {text}"
        s.note(f"{key}_extra_bytes", extra, said)
        s.values[f"{key}_gb_s"] = rate
        if relied:
            s.must(f"{key}_free", extra < size / 2, f"{text} copies no weights")


def wired(s: Step) -> None:
    matrix, x = mx.ones((1024 if s.dry else 65536, 2048), mx.float16), mx.ones((1, 2048), mx.float16)
    mx.eval(matrix, x)

    def after_a_pause() -> float:
        time.sleep(0.05)
        begin = time.perf_counter()
        mx.eval(x @ matrix.T)
        return time.perf_counter() - begin

    for key, limit in (("unwired", 0), ("wired", matrix.nbytes + (64 << 20)), ("unwired_again", 0)):
        mx.set_wired_limit(limit)
        rate = matrix.nbytes / float(np.median([after_a_pause() for _ in range(5)])) / 1e9
        s.note(f"{key}_gb_s", rate, f"{rate:6.1f} GB/s  product after a pause, {key.replace('_', ' ')}")


def adoption(s: Step) -> None:
    host = np.frombuffer(host_memory(1 << 20), np.float32)
    host[:] = 1
    try:
        array = mx.asarray(host, copy=False)
        host[:] = 2
        adopted: Any = mx.sum(array).item() == 2 * host.size
    except (ValueError, RuntimeError) as error:
        adopted = str(error)
    s.note("asarray", adopted, f"asarray(copy=False) of host memory aliases it: {adopted}")
    body = "uint i = thread_position_in_grid.x; b[i] = a[i] + 1;"
    try:
        add = mx.fast.metal_kernel("plus_one", ["a"], ["b"], body)
        size = {"output_shapes": [(64,)], "output_dtypes": [mx.float32], "grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
        kernel: Any = mx.sum(add(inputs=[mx.ones((64,))], **size)[0]).item() == 128
    except RuntimeError as error:
        kernel = str(error)
    s.note("metal_kernel", kernel, f"a Metal kernel of one's own computes: {kernel}")


# The disk


def iovecs(s: Step) -> None:
    count = 256 if s.dry else 4096
    with test_file(s.folder, 1 / 16 if s.dry else 1.0) as path:
        file, places = File(path, direct=True), path.stat().st_size
        rng = np.random.default_rng(0)
        for size in (8192, 16384, 32768):
            pair = [host_memory(count * size // 2) for _ in range(2)]
            whole = host_memory(count * size)
            for threads in (1, 16):
                seconds: dict[str, list[float]] = {"one": [], "two": []}
                for _ in range(1 if s.dry else 3):
                    for key in seconds:  # in turns, each at places of its own
                        offsets = (rng.integers(0, places // size, count) * size).tolist()
                        begin = time.perf_counter()
                        scatter(file, offsets, size, threads, [whole] if key == "one" else pair)
                        seconds[key].append(time.perf_counter() - begin)
                one, two = (float(np.median(taken)) for taken in seconds.values())
                for key, taken in (("one", one), ("two", two)):
                    s.values[f"{key}_{size}_{threads}_us"] = 1e6 * taken / count
                print(
                    f"       {size >> 10:2} KiB, {threads:2} threads: {1e6 * one / count:7.1f} us contiguous,"
                    f" {1e6 * two / count:7.1f} us in two iovecs ({two / one:.2f}x)",
                    flush=True,
                )
        file.close()


def scatter(file: File, offsets: list[int], size: int, threads: int, pools: list[memoryview]) -> None:
    """Read number i into slot i of every pool, `size` bytes in all."""
    share = size // len(pools)

    def read(worker: int) -> None:
        for i in range(worker, len(offsets), threads):
            slots = [pool[i * share : (i + 1) * share] for pool in pools]
            if os.preadv(file.fd, slots, offsets[i]) != size:
                raise OSError(f"{file.path}: a read of {size} bytes at {offsets[i]} came back short")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def cache(s: Step) -> None:
    with test_file(s.folder, 1 / 16 if s.dry else 2.0) as path:
        quarter = path.stat().st_size // 4
        uncached, buffered = File(path, direct=True), File(path)
        if hasattr(os, "posix_fadvise"):  # macOS wrote the file uncached and needs no such call
            os.posix_fadvise(buffered.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        orders = (("random", 16384, 0), ("sequential", 1 << 20, 2))
        for order, size, first in orders:
            ways = (
                ("uncached", uncached, first),
                ("buffered_cold", buffered, first + 1),
                ("buffered_warm", buffered, first + 1),
                ("uncached_warm", uncached, first + 1),  # macOS may serve what the cache holds
            )
            for way, file, part in ways:
                offsets = part * quarter + np.arange(quarter // size) * size
                if order == "random":
                    np.random.default_rng(part).shuffle(offsets)
                rate = read_rate(file, offsets, size)
                text = f"{rate:6.2f} GB/s  {order} {size >> 10} KiB, {way.replace('_', ', ')}"
                s.note(f"{order}_{way}_gb_s", rate, text)
        uncached.close()
        buffered.close()


def read_rate(file: File, offsets: np.ndarray, size: int) -> float:
    """GB/s of the product's reader with two batches in flight."""
    reader, count = make_reader(direct=file.direct), BATCH_BYTES // size
    buffers, pending = [host_memory(BATCH_BYTES) for _ in range(2)], []
    begin = time.perf_counter()
    for step, start in enumerate(range(0, len(offsets), count)):
        if len(pending) == 2:
            pending.pop(0).wait()
        mine = offsets[start : start + count]
        spans = np.stack([mine, np.arange(len(mine)) * size, np.full(len(mine), size)], axis=1).astype(np.uint64)
        pending.append(reader.submit(file, spans, buffers[step % 2]))
    for ticket in pending:
        ticket.wait()
    seconds = time.perf_counter() - begin
    reader.close()
    return len(offsets) * size / seconds / 1e9


def end_to_end(s: Step) -> None:
    command = [sys.executable, "-u", str(Path(__file__).with_name("end_to_end.py")), "--dir", str(s.folder)]
    command += ["--shape", s.shape, "--memory", MEMORY, "--device", "metal" if s.device == mx.gpu else "mlx-cpu"]
    command += ["--tokens", "4"] if s.dry else []
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                last = line
            else:
                print("  " + line, end="", flush=True)
    if process.returncode or not last:
        raise RuntimeError(f"end_to_end.py {ending(process.returncode)}")
    s.values |= json.loads(last)


STEPS = {f.__name__: f for f in (pools, landing, evals, copies, wired, adoption, iovecs, cache, end_to_end)}


# Running them


def machine() -> dict[str, Any]:
    reader = make_reader(direct=True)
    reader.close()
    return {
        "system": platform.platform(),
        "device": mx.device_info(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "metal": mx.metal.is_available(),
        "native": core is not None,
        "reader": reader.engine,
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small sizes on MLX's CPU device, Linux included")
    parser.add_argument("--shape", choices=SHAPES, help="of end_to_end (opt-1.3b; tiny with --dry-run)")
    parser.add_argument("--dir", type=Path, help="on the disk to measure; the system's temporary folder otherwise")
    parser.add_argument("--out", type=Path, default=Path("mac.json"))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = args.shape or ("tiny" if args.dry_run else "opt-1.3b")
    if args.step:
        return one_step(STEPS[args.step], Step(args.dry_run, args.dir, shape), args.out)
    begin = time.perf_counter()
    found: dict[str, Any] = {"machine": machine(), "dry_run": args.dry_run, "steps": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    if not found["machine"]["metal"] and not args.dry_run:
        print("This MLX has no Metal: what follows is its CPU device.")
    arguments = ["--shape", shape, *(["--dry-run"] if args.dry_run else [])]
    with tempfile.TemporaryDirectory(prefix="mlxflash-mac-", dir=args.dir) as folder:
        for name in STEPS:
            left = DEADLINE_S - (time.perf_counter() - begin)
            seconds = left if name == "end_to_end" else min(STEP_S, left)
            found["steps"][name] = attempt(__file__, name, arguments, Path(folder), seconds)
    found["failed"] = [name for name, step in found["steps"].items() if step["problems"]]
    found["seconds"] = time.perf_counter() - begin
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in found["failed"]:
        print(f"{name} failed: {'; '.join(found['steps'][name]['problems'])}.")
    print(f"{found['seconds']:.0f} s; everything is in {args.out}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
