"""What mlxflash assumes of an NVIDIA GPU, checked and timed in one go; gpu.sh runs this.

    laws        tiny models on the device beside the NumPy forward pass of the tests, and the tests' own laws of
                exactness with the device in the place of MLX's CPU (where pytest is installed)
    bus         page-locked memory: does it work; rows to the device and results back, this way and through MLX's arrays
    updates     rows written into a pool: is it copied, and how long that takes
    copies      which products of prefixes MLX computes without a copy of the weights, and how fast
    disk        random and sequential reads; is flash-to-GPU (cuFile, GDS) reachable, measured where it is
    resident    a model held whole, beside the same model as plain MLX modules: what mlx-lm would run
    profile     kernels of a decode step, by time (where PyTorch's profiler is installed)
    end_to_end  naive, hybrid and flash decoding (end_to_end.py) at 55 % of OPT-6.7B's shape, with a host tier as a row
    gemma       the same at a Gemma 2B's shape with 4 GB, where that family is here

Every step is a process of its own. What fails is named in a sentence, the others go on, and the exit code is 1. A claim
that the product relies on and that does not hold is a failure; what is only good to know is printed and kept.

    benchmarks/gpu.sh [--dry-run] [--out gpu] [--dir FOLDER] [--shape opt-6.7b] [--steps bus,updates]
"""

import argparse
import ctypes
import glob
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from disk import test_file
from mac import read_rate
from mlx_lm.models.cache import make_prompt_cache
from shapes import SHAPES, write_bundle
from steps import Step, attempt, ending, extra_bytes, median_s, one_step

from mlxflash._native import core
from mlxflash.backends import make_backend
from mlxflash.backends.cuda import DeviceBackend, upload
from mlxflash.install import builds
from mlxflash.model import load_bundle
from mlxflash.models import build_model
from mlxflash.pool import host_memory
from mlxflash.reader import File, make_reader

DEADLINE_S = 440  # for all steps
STEP_S = {"laws": 90.0, "resident": 90.0, "end_to_end": 220.0}  # the others 45
ROOT = Path(__file__).parent.parent
TESTS = "every_dtype or every_budget or look_ahead or batches or interrupted or every_window"


def device_name(s: Step) -> str:
    return "discrete" if s.device == mx.cpu else "cuda"


def backend_of(s: Step) -> DeviceBackend:
    backend = make_backend(device_name(s))
    assert isinstance(backend, DeviceBackend)
    return backend


# Right


def laws(s: Step) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ["MLXFLASH_DISCRETE"] = device_name(s)
    from build import Library, Shape, load, prompt_of
    from reference import stored_model

    library, tokens = Library(s.folder), prompt_of(12)
    for name, dtype, bits, tolerance in (
        ("float32", "float32", None, 2e-5), ("float16", "float16", None, 5e-3), ("bfloat16", "bfloat16", None, 4e-2),
        ("4 bits", "float16", 4, 5e-3), ("8 bits", "bfloat16", 8, 4e-2),
    ):  # fmt: skip
        path = library.bundle(Shape(dtype=dtype), bits)
        want = stored_model(path).logits(tokens)
        for predictor, budget in (("oracle", "part"), ("all", "part"), ("all", "whole"), ("oracle", "least")):
            with load(path, "discrete", budget, predictor, host_memory=100_000) as model:
                cache, got = make_prompt_cache(model), []
                for token in tokens:
                    logits = model(mx.array([[token]]), cache=cache)[0, -1]
                    got.append(np.array(logits.astype(mx.float32)))
                error = np.abs(np.array(got) - want).max() / np.ptp(want, axis=-1).min()
                traffic = model.flash.backend.traffic
            key = f"{name}_{predictor}_{budget}".replace(" ", "")
            s.values[f"{key}_error"] = float(error)
            s.must(key, error <= tolerance, f"{name}, {predictor}, {budget}: logits off by {error:.1e}")
            s.must(f"{key}_in_place", not traffic.pool_copies, f"and no pool copied in {traffic.updates} updates")
    if importlib.util.find_spec("pytest") is None or s.dry:
        s.note("pytest", None, "the tests' own laws are not run: " + ("a dry run" if s.dry else "no pytest here"))
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "tests/test_exactness.py"]
    command += ["-k", f"discrete and ({TESTS})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()[-3:]
    s.must("pytest", done.returncode == 0, f"the tests' laws on cuda: {' / '.join(tail)}")


# Fast


def bus(s: Step) -> None:
    backend = backend_of(s)
    s.values["carries"] = backend.carries
    if s.device == mx.gpu:
        s.must("page_locked", backend.bus is not None, f"page-locked memory and our kernels work: {backend.carries}")
    stride, count = 16384, 64 if s.dry else 16384
    memory = host_memory(stride * count)[: stride * count]
    np.frombuffer(memory, np.uint32)[:] = 1

    class Owner:
        pass

    owner = Owner()
    ways: dict[str, Callable[..., Any]] = {"plain": upload}
    if backend.bus is not None and backend.bus.lock(memory, owner):
        ways["locked"] = backend.bus.rows
    rng = np.random.default_rng(0)
    for rows in (1, 64, 512, 8192) if not s.dry else (1, 64):
        slots = np.sort(rng.choice(count, rows, replace=False))
        for way, work in ways.items():
            seconds = median_s(lambda work=work, slots=slots: mx.eval(work(memory, slots, stride, 4)), 0.4)  # type: ignore[misc]
            rate = rows * stride / seconds / 1e9
            s.note(f"{way}_{rows}_gb_s", rate, f"{rate:7.2f} GB/s, {1e6 * seconds:8.0f} us  {rows} rows, {way}")
    best = max(value for key, value in s.values.items() if key.endswith("gb_s"))
    s.note("bus_gb_s", best, f"{best:7.2f} GB/s is the most this way; the driver's own copy:")
    if s.device == mx.gpu:
        rate = driver_rate(memory)
        s.note("driver_gb_s", rate, f"{rate or 0:7.2f} GB/s  cuMemcpyHtoD of {len(memory) >> 20} MiB, page-locked")
    y = mx.ones((1, 16384))
    mx.eval(y)
    answers: dict[str, Callable[[], object]] = {"plain": lambda: np.asarray(y + 1)}
    if backend.bus is not None:
        b = backend.bus

        def locked() -> object:
            done, values = b.result(y + 1)
            mx.eval(done)
            return values()

        answers["locked"] = locked
    for way, work in answers.items():
        us = 1e6 * median_s(work, 0.4)
        s.note(f"answer_{way}_us", us, f"{us:8.1f} us  16384 numbers computed and on the host, {way}")
    for key, work in (
        ("eval", lambda: mx.eval(y + 1)),
        ("synchronize", mx.synchronize),
        ("eval_and_synchronize", lambda: (mx.eval(y + 1), mx.synchronize())),
    ):
        us = 1e6 * median_s(work)
        s.note(f"{key}_us", us, f"{us:8.1f} us  {key.replace('_', ' ')} of one operation")


def driver_rate(memory: memoryview) -> float | None:
    """GB/s of the driver's copy from locked memory; None where it refuses."""
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    if driver.cuMemAlloc_v2(ctypes.byref(device), ctypes.c_size_t(len(memory))):
        return None
    host = ctypes.c_void_p(np.frombuffer(memory, np.uint8).ctypes.data)

    def copy() -> None:
        if driver.cuMemcpyHtoD_v2(device, host, ctypes.c_size_t(len(memory))):
            raise RuntimeError("cuMemcpyHtoD failed")

    rate = len(memory) / median_s(copy, 0.4) / 1e9
    driver.cuMemFree_v2(device)
    return rate


def updates(s: Step) -> None:
    """What rows do, with the readers that a decode step has."""
    cap, d = (512, 1024) if s.dry else (8192, 4096)
    pool, rng = mx.zeros((cap, d), mx.float16), np.random.default_rng(0)
    x = mx.ones((1, d), mx.float16)
    mx.eval(pool, x)
    for k in (1, 64, 512):
        for key, settle in (("synchronized", True), ("evaluated", False)):
            rows, copied, taken = mx.ones((k, d), mx.float16), 0, []
            mx.eval(rows)
            for _ in range(50):
                y = x @ pool[: cap // 2].T
                mx.eval(y)
                if settle:
                    mx.synchronize()
                at = mx.array(rng.choice(cap, k, replace=False).astype(np.int32))
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                begin = time.perf_counter()
                pool[at] = rows
                mx.async_eval(pool)
                copied += mx.get_peak_memory() - before > pool.nbytes // 2
                mx.eval(pool)
                taken.append(time.perf_counter() - begin)
            us = 1e6 * float(np.median(taken))
            text = f"{us:8.1f} us  {k} rows into a pool, readers {key}: {copied} of 50 copied it"
            s.note(f"{key}_{k}_us", us, text)
            if settle:
                s.must(f"{key}_{k}", copied == 0, f"no copy of the pool when its readers are {key}")
            s.values[f"{key}_{k}_copies"] = copied
    held = pool[:4]
    mx.eval(held)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pool[mx.array([0])] = mx.ones((1, d), mx.float16)
    mx.eval(pool)
    s.must("seen", mx.get_peak_memory() - before > pool.nbytes // 2, "a pool that has to be copied shows in the peak")


def copies(s: Step) -> None:
    cap, d, half = (1024 if s.dry else 16384), 4096, mx.float16
    n = cap // 2
    part = mx.random.normal((cap, d)).astype(half)
    words, scales, biases = mx.quantize(part, 64, 4)
    x, h = mx.ones((1, d), half), mx.ones((1, n), half)
    if s.device == mx.cpu:
        scales, biases, qx, qh = (a.astype(mx.float32) for a in (scales, biases, x, h))
    else:
        qx, qh = x, h
    mx.eval(part, words, scales, biases, x, h, qx, qh)

    def quantised(v: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(v, words[:n], scales[:n], biases[:n], transpose, 64, 4)

    whole = n * d * 2
    rows: dict[str, tuple[Callable[[], mx.array], int, str]] = {
        "up_prefix": (lambda: x @ part[:n].T, whole, "x @ U[:n].T"),
        "down_prefix": (lambda: h @ part[:n], whole, "h @ D[:n]"),
        "up_quantised": (lambda: quantised(qx, True), n * d // 2, "4-bit x @ U[:n].T"),
        "down_quantised": (lambda: quantised(qh, False), n * d // 2, "4-bit h @ D[:n]"),
    }
    for key, (work, size, text) in rows.items():
        extra = extra_bytes(work)
        rate = size / median_s(lambda work=work: mx.eval(work())) / 1e9  # type: ignore[misc]
        s.note(f"{key}_gb_s", rate, f"{extra / 1e6:6.2f} MB beside {size / 1e6:6.2f} MB, {rate:7.1f} GB/s  {text}")
        s.must(f"{key}_free", extra < size / 2, f"{text} copies no weights")


# The disk


def disk(s: Step) -> None:
    with test_file(s.folder, 1 / 16 if s.dry else 4.0) as path:
        file = File(path, direct=True)
        s.note("direct", file.direct, f"reads around the page cache granted: {file.direct}")
        rng, total = np.random.default_rng(0), path.stat().st_size
        for order, size in (("random", 16384), ("random", 65536), ("sequential", 1 << 20)):
            offsets = np.arange(total // size) * size
            if order == "random":
                offsets = rng.permutation(offsets)[: (256 if s.dry else 40000)]
            rate = read_rate(file, offsets, size)
            s.note(f"{order}_{size >> 10}_gb_s", rate, f"{rate:6.2f} GB/s  {order} {size >> 10} KiB, our reader")
        file.close()
        rate, why = (None, "no GPU") if s.device == mx.cpu else gds_rate(path)
        s.note("gds_gb_s", rate, f"flash to GPU (cuFile): {f'{rate:.2f} GB/s' if rate else 'no'} ({why})")


class Descriptor(ctypes.Structure):
    """CUfileDescr_t with a Linux descriptor."""

    _fields_ = (("type", ctypes.c_int), ("fd", ctypes.c_int64), ("operations", ctypes.c_void_p))


class Status(ctypes.Structure):
    """CUfileError_t."""

    _fields_ = (("error", ctypes.c_int), ("cuda", ctypes.c_int))


def gds_rate(path: Path) -> tuple[float | None, str]:
    """GB/s of sequential 16 MiB reads straight to the device, and how or why not."""
    site = sysconfig.get_paths()["purelib"]
    names = ["libcufile.so.0", "libcufile.so", *glob.glob(f"{site}/nvidia/*/lib/libcufile.so.0")]
    library = None
    for name in names:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if library is None:
        return None, "libcufile is not here"
    for call in ("cuFileDriverOpen", "cuFileHandleRegister"):
        getattr(library, call).restype = Status
    library.cuFileRead.restype = ctypes.c_ssize_t
    library.cuFileRead.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int64]
    opened = library.cuFileDriverOpen()
    if opened.error:
        return None, f"cuFileDriverOpen: error {opened.error}, CUDA {opened.cuda}"
    compatible = not Path("/proc/driver/nvidia-fs").exists()
    driver, device, size = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64(), 16 << 20
    if driver.cuMemAlloc_v2(ctypes.byref(device), ctypes.c_size_t(size)):
        return None, "no device memory"
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    handle, descriptor = ctypes.c_void_p(), Descriptor(1, fd, None)
    registered = library.cuFileHandleRegister(ctypes.byref(handle), ctypes.byref(descriptor))
    if registered.error:
        return None, f"cuFileHandleRegister: error {registered.error}"
    begin, done = time.perf_counter(), 0
    while done < path.stat().st_size and time.perf_counter() - begin < 3:
        got = library.cuFileRead(handle, device.value, size, done, 0)
        if got <= 0:
            return None, f"cuFileRead: {got}"
        done += got
    seconds = time.perf_counter() - begin
    os.close(fd)
    return done / seconds / 1e9, "compatibility mode, through the host: no nvidia-fs" if compatible else "nvidia-fs"


# Whole models


def decode_ms(model: Any, tokens: int) -> float:
    """The median token's milliseconds, after some that are not counted."""
    cache, taken, warm = make_prompt_cache(model), [], 1 + tokens // 4
    for _ in range(tokens + warm):
        begin = time.perf_counter()
        mx.eval(model(mx.array([[5]]), cache=cache))
        taken.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(taken[warm:]))


def dense(s: Step) -> Any:
    """The shape as plain MLX modules with random weights in float16."""
    model: Any = build_model(SHAPES[s.shape].config("float16"), s.shape)
    model.set_dtype(mx.float16)
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = 0.02 * mx.random.normal(module.weight.shape, mx.float16)
    mx.eval(model.parameters())
    return model


def resident(s: Step) -> None:
    tokens = 2 if s.dry else 20
    plain = decode_ms(dense(s), tokens)
    s.note("dense_ms", plain, f"{plain:8.2f} ms per token  plain MLX modules, {s.shape}")
    mx.clear_cache()
    path = bundle_of(s)
    begin = time.perf_counter()
    with load_bundle(path, predictor="all", device=device_name(s), max_kv_size=64, direct=True) as model:
        seconds = time.perf_counter() - begin
        s.note("whole", model.flash.plan.whole, f"held whole: {model.flash.plan.whole}, loaded in {seconds:.1f} s")
        ours = decode_ms(model, tokens)
    s.values["load_s"] = seconds
    s.note("whole_ms", ours, f"{ours:8.2f} ms per token  mlxflash, all held ({ours / plain:.2f} of plain)")


def bundle_of(s: Step) -> Path:
    """The shape's bundle, kept between the steps, under the name that end_to_end.py looks for."""
    path = s.folder / f"{s.shape}.flash"
    if not (path / "manifest.json").exists():
        begin = time.perf_counter()
        write_bundle(s.shape, path, dtype="float16", bits=None)
        s.note("write_s", time.perf_counter() - begin, f"bundle written in {time.perf_counter() - begin:.1f} s")
    return path


def profile(s: Step) -> None:
    if importlib.util.find_spec("torch") is None or s.device == mx.cpu:
        s.note("kernels", None, "no PyTorch here, or no GPU: no profile")
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with load_bundle(bundle_of(s), memory="55%", predictor="all", device="cuda", max_kv_size=64, direct=True) as model:
        for layer in model.flash.layers:
            layer.units = layer.window.num_rows  # as if what is held were all: no reads, the decode step alone
        cache, times = make_prompt_cache(model), []
        for _ in range(5):
            mx.eval(model(mx.array([[5]]), cache=cache))
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(5):
                begin = time.perf_counter()
                mx.eval(model(mx.array([[5]]), cache=cache))
                times.append(time.perf_counter() - begin)
            mx.synchronize()
    s.note(
        "step_ms", 1e3 * float(np.median(times)), f"{1e3 * float(np.median(times)):8.2f} ms per token, rows held only"
    )
    kernels = sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)
    found = [(e.key[:90], e.count / 5, e.device_time_total / 5) for e in kernels if e.device_time_total][:15]
    s.values["kernels"] = found
    s.note("kernels_us", sum(us for *_, us in found), f"{sum(us for *_, us in found):8.0f} us of kernels per token:")
    for name, count, us in found:
        print(f"       {us:8.0f} us  {count:5.0f} x  {name}", flush=True)


def run_end_to_end(s: Step, shape: str, memory: str, host: str) -> None:
    command = [sys.executable, "-u", str(Path(__file__).with_name("end_to_end.py")), "--dir", str(s.folder)]
    command += ["--shape", shape, "--memory", memory, "--host-memory", host, "--device", device_name(s)]
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
    copied = sum(row["pool_copies"] for row in s.values["rows"])
    s.must("in_place", copied == 0, f"no update copied a pool ({copied} did)")


def end_to_end(s: Step) -> None:
    run_end_to_end(s, s.shape, "55%", "30%")


def gemma(s: Step) -> None:
    if "gemma-2b" not in SHAPES:
        s.note("gemma", None, "benchmarks/shapes.py knows no gemma-2b yet")
        return
    run_end_to_end(s, "gemma-2b", "4GB", "1GB")


STEPS = {
    f.__name__: f for f in (laws, bus, updates, copies, disk, resident, profile, end_to_end, gemma)
}  # the figures that matter most come before what is large


def machine() -> dict[str, Any]:
    reader = make_reader(direct=True)
    reader.close()
    gpu = mx.cuda.is_available() and mx.device_count(mx.gpu) > 0
    return {
        "system": platform.platform(),
        "device": mx.device_info(mx.gpu) if gpu else None,
        "builds": {name: build.version for name, build in builds().items()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "native": core is not None,
        "reader": reader.engine,
        "load_average": os.getloadavg()[0],
    }


def goals(found: dict[str, Any]) -> list[str]:
    """The figures beside what they are to be, one line each, as far as their steps came to an end."""
    steps = found["steps"]
    run, bus_, whole = (steps.get(name, {}) for name in ("end_to_end", "bus", "resident"))
    if "rows" not in run or "bus_gb_s" not in bus_:
        return []
    row = next(r for r in run["rows"] if r["mode"] == "flash")
    rate = bus_.get("driver_gb_s") or bus_["bus_gb_s"]
    sent = row["transfer_bytes"] / rate / 1e6
    limits = {"flash": row["io_limit_ms"], "bus": sent, "memory": row["memory_limit_ms"]}
    lines = [
        f"token {row['ms']:.1f} ms, {row['ms'] / max(limits.values()):.2f} of the largest limit (goal 1.25): "
        + ", ".join(f"{name} {ms:.1f} ms" for name, ms in limits.items()),
        f"manage {row['manage_ms']:.2f} ms (goal 2)",
        f"{run['naive_ms'] / row['ms']:.1f}x over naive (the paper, RTX 4090: 26x)",
        f"whole-pool copies: {sum(r['pool_copies'] for r in run['rows'])} (goal 0)",
    ]
    waited = [r for r in run["rows"] if r["mode"].endswith("transfers waited for")]
    if waited and sent:
        lines.append(f"transfer {waited[0]['transfer_ms']:.2f} ms, {waited[0]['transfer_ms'] / sent:.2f} (goal 1.3)")
    if "dense_ms" in whole:
        compute = row["compute_ms"]
        lines.append(f"compute {compute:.2f} ms, {compute / whole['dense_ms']:.2f} of dense decode (goal 1.2)")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small sizes on MLX's CPU device")
    parser.add_argument("--shape", choices=SHAPES, help="of the large steps (opt-6.7b; tiny with --dry-run)")
    parser.add_argument("--dir", type=Path, help="on the disk to measure; the system's temporary folder otherwise")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="a folder for gpu.json and gpu.txt")
    parser.add_argument("--steps", help="only these, with commas")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = args.shape or ("tiny" if args.dry_run else "opt-6.7b")
    if args.step:
        return one_step(STEPS[args.step], Step(args.dry_run, args.dir, shape), args.out)
    names = args.steps.split(",") if args.steps else list(STEPS)
    if unknown := set(names) - STEPS.keys():
        raise SystemExit(f"gpu: steps {', '.join(sorted(unknown))} are unknown; there are {', '.join(STEPS)}")
    begin = time.perf_counter()
    found: dict[str, Any] = {"machine": machine(), "dry_run": args.dry_run, "steps": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    if found["machine"]["device"] is None and not args.dry_run:
        raise SystemExit("gpu: MLX finds no NVIDIA GPU here; --dry-run tries the script without one")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["MLX_ENABLE_TF32"] = "0"  # float32 means float32 where laws compare
    arguments = ["--shape", shape, *(["--dry-run"] if args.dry_run else [])]
    with tempfile.TemporaryDirectory(prefix="mlxflash-gpu-", dir=args.dir) as folder:
        for name in names:
            left = DEADLINE_S - (time.perf_counter() - begin)
            seconds = min(STEP_S.get(name, 45.0), left)
            found["steps"][name] = attempt(__file__, name, arguments, Path(folder), seconds)
            save(found, args.out)  # what comes after may end badly
    found["failed"] = [name for name, step in found["steps"].items() if step["problems"]]
    found["seconds"] = time.perf_counter() - begin
    found["goals"] = goals(found)
    save(found, args.out)
    for line in (args.out / "gpu.txt").read_text().splitlines():
        print(line)
    print(f"{found['seconds']:.0f} s; everything is in {args.out}")
    return 1 if found["failed"] else 0


def save(found: dict[str, Any], out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = list(found.get("goals", []))
    for name, step in found["steps"].items():
        lines.append(f"{name}: {'; '.join(step['problems']) or 'well'} ({step['seconds']:.0f} s)")
        for row in step.get("rows", []):
            lines.append(
                f"  {row['mode']:<30}{row['ms']:9.1f} ms = flash {row['wait_ms']:.1f},"
                f" transfer {row['transfer_ms']:.2f}, manage {row['manage_ms']:.2f},"
                f" compute {row['compute_ms'] - row['transfer_ms']:.1f};"
                f" {row['bytes'] / 1e6:.1f} MB read, {row['transfer_bytes'] / 1e6:.1f} MB sent,"
                f" {row['tier_hit_rate']:.1%} from the tier, {row['pool_copies']} copies"
            )
        lines += [f"  {key}: {value:.4g}" for key, value in step.items() if isinstance(value, float)]
    (out / "gpu.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
