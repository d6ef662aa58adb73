"""Our readers beside fio on the same file: MB/s and CPU per gigabyte, per engine, read size and order.

Each engine of mlxflash.reader (python, threads, io_uring) and fio (io_uring, else libaio) read the same file with
direct I/O (O_DIRECT; nothing comes from the page cache) at the same depth: threads and python run as many threads as
the depth, io_uring keeps as many reads in flight. They take short turns, so that a neighbour's burst hits all alike,
and medians are shown. A size that direct I/O cannot read is widened to whole blocks: a record of 18 KiB costs 20 KiB.
CPU is user and system time of the whole process by gigabyte read; fio's is what it reports of its job.

Batch latency is what a layer waits for: 400 random reads of 16 KiB submitted and waited for at once, with the reader as
the product makes it (16 threads, or 64 reads in flight).

Does not show: the machine alone (other programs' load is printed), writes, reads through the page cache, or how long a
drive keeps its speed. A virtual disk's limits may be its provider's.

    python benchmarks/disk.py --plot disk.png
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shapes import DirectFile, Noise

from mlxflash.pool import host_memory
from mlxflash.reader import ENGINES, File, NativeReader, Reader, make_reader

BLOCK = 4096
SIZES = (4096, 16384, 18 << 10, 32768, 65536, 262144, 1 << 20)
SEQUENTIAL = 1 << 20
BATCH_BYTES = 16 << 20
LATENCY_READS, LATENCY_BYTES = 400, 16384


@dataclass(frozen=True)
class Op:
    order: str  # random | sequential
    size: int  # as wanted; `read` is what direct I/O makes of it

    @property
    def read(self) -> int:
        return -(-self.size // BLOCK) * BLOCK


@dataclass
class Sample:
    mb_s: float
    cpu_s_per_gb: float


def engine_reader(engine: str, depth: int) -> Any:
    """A reader of this engine at this depth; ValueError where the system has none."""
    reader = make_reader(engine)
    if engine == "python":
        reader.close()
        return Reader(depth)
    if engine == "threads":
        reader.close()
        return NativeReader("threads", depth)
    core = type(reader._core)
    reader._core.close()
    reader._core = core(engine="io_uring", depth=depth)  # the product's depth is no option, so go below it
    return reader


def spans_of(op: Op, rng: np.random.Generator, count: int, size: int, step: int) -> np.ndarray:
    """The reads of batch number `step`: uint64 [count, 3]."""
    if op.order == "random":
        offsets = rng.integers(0, (size - op.read) // BLOCK + 1, count) * BLOCK
    else:
        places = size // op.read
        offsets = (step * count + np.arange(count)) % places * op.read
    return np.stack([offsets, np.arange(count) * op.read, np.full(count, op.read)], axis=1).astype(np.uint64)


def measure_ours(reader: Any, path: Path, op: Op, seconds: float, buffers: list[memoryview]) -> Sample:
    """Read for `seconds`, two batches in flight, so that there is always work for the whole depth."""
    file, size = File(path, direct=True), path.stat().st_size
    rng = np.random.default_rng()
    count = BATCH_BYTES // op.read
    pending: list[Any] = []
    step = done = 0
    begin, used = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds:
        if len(pending) == 2:
            pending.pop(0).wait()
        pending.append(reader.submit(file, spans_of(op, rng, count, size, step), buffers[step % 2]))
        done, step = done + count * op.read, step + 1
    for ticket in pending:
        ticket.wait()
    wall, used = time.perf_counter() - begin, cpu_seconds() - used
    file.close()
    return Sample(done / wall / 1e6, used / (done / 1e9))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_fio(path: Path, op: Op, seconds: float, depth: int, engine: str) -> Sample:
    result = subprocess.run(
        [
            "fio", "--name=read", f"--filename={path}", "--readonly", "--direct=1", f"--ioengine={engine}",
            f"--rw={'randread' if op.order == 'random' else 'read'}", f"--bs={op.read}", f"--iodepth={depth}",
            "--norandommap", "--randrepeat=0", "--time_based", f"--runtime={int(seconds * 1000)}ms",
            "--output-format=json",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Sample(job["read"]["bw_bytes"] / 1e6, cpu / (job["read"]["io_bytes"] / 1e9))


def fio_engine(path: Path) -> str | None:
    """The best of fio's engines that works here, None without fio."""
    if shutil.which("fio") is None:
        return None
    for engine in ("io_uring", "libaio", "posixaio"):
        try:
            measure_fio(path, Op("random", BLOCK), 0.1, 1, engine)
            return engine
        except (subprocess.CalledProcessError, ValueError, KeyError, ZeroDivisionError):
            continue
    return None


def batch_latency(engine: str, path: Path, rounds: int, buffer: memoryview) -> list[float]:
    """Seconds from submit to the end of wait of one layer's reads, `rounds` times."""
    reader, file, size = make_reader(engine), File(path, direct=True), path.stat().st_size
    op, rng, seconds = Op("random", LATENCY_BYTES), np.random.default_rng(), []
    for _ in range(rounds):
        spans = spans_of(op, rng, LATENCY_READS, size, 0)
        begin = time.perf_counter()
        reader.submit(file, spans, buffer).wait()
        seconds.append(time.perf_counter() - begin)
    reader.close()
    file.close()
    return seconds


@contextmanager
def test_file(folder: Path | None, gib: float) -> Iterator[Path]:
    """A file of random bytes without holes, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mlxflash-disk-", dir=folder) as name:
        path = Path(name) / "random"
        noise = Noise(np.random.default_rng(), [("uint32", BLOCK // 4, None)], 1.0)
        out = DirectFile(path)
        for rows, _ in noise.blocks(int(gib * (1 << 30)) // BLOCK):
            out.write(rows)
        out.flush()
        os.fsync(out.fileno())
        out.close()
        yield path


def available_engines() -> list[str]:
    found = []
    for engine in reversed(ENGINES):
        try:
            make_reader(engine).close()
            found.append(engine)
        except ValueError as error:
            print(f"left out: {error}")
    return found


def compare(path: Path, ops: list[Op], rounds: int, seconds: float, depth: int) -> list[dict[str, Any]]:
    """One row per engine and operation."""
    fio = fio_engine(path)
    print(f"fio: {fio or 'not installed'}; depth {depth}, direct reads, medians of {rounds} turns of {seconds} s")
    print(f"load: {os.getloadavg()[0]:.1f} programs wanting {os.cpu_count()} cores")
    print(f"\n{'':<20}{'reader':<10}{'MB/s':>8}{'fio MB/s':>10}{'ratio':>7}{'CPU s/GB':>10}{'fio':>7}")
    buffers = [host_memory(BATCH_BYTES) for _ in range(2)]
    engines, rows = available_engines(), []
    for op in ops:
        samples: dict[str, list[Sample]] = {name: [] for name in [*engines, "fio"]}
        for _ in range(rounds):
            for engine in engines:
                reader = engine_reader(engine, depth)
                samples[engine].append(measure_ours(reader, path, op, seconds, buffers))
                reader.close()
            if fio:
                samples["fio"].append(measure_fio(path, op, seconds, depth, fio))
        theirs = middle(samples["fio"])
        for engine in engines:
            ours = middle(samples[engine])
            assert ours is not None
            row = {
                "engine": engine,
                "op": op.order,
                "size": op.read,
                "wanted": op.size,
                "depth": depth,
                "mb_s": round(ours.mb_s, 1),
                "fio_mb_s": theirs and round(theirs.mb_s, 1),
                "cpu_s_per_gb": round(ours.cpu_s_per_gb, 4),
                "fio_cpu_s_per_gb": theirs and round(theirs.cpu_s_per_gb, 4),
            }
            rows.append(row)
            print(human(row), flush=True)
    return rows


def middle(samples: list[Sample]) -> Sample | None:
    if not samples:
        return None
    return Sample(float(np.median([s.mb_s for s in samples])), float(np.median([s.cpu_s_per_gb for s in samples])))


def human(row: dict[str, Any]) -> str:
    name = f"{row['op']} {row['size'] >> 10} KiB"
    if row["wanted"] != row["size"]:
        name += f" ({row['wanted'] >> 10})"
    text = f"{name:<20}{row['engine']:<10}{row['mb_s']:>8.0f}"
    if row["fio_mb_s"]:
        text += f"{row['fio_mb_s']:>10.0f}{row['mb_s'] / row['fio_mb_s']:>7.2f}"
        return text + f"{row['cpu_s_per_gb']:>10.3f}{row['fio_cpu_s_per_gb']:>7.3f}"
    return text + f"{'-':>10}{'-':>7}{row['cpu_s_per_gb']:>10.3f}{'-':>7}"


def latencies(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Engines in turns; the median of each and the slowest tenth."""
    buffer = host_memory(LATENCY_READS * LATENCY_BYTES)
    seconds: dict[str, list[float]] = {engine: [] for engine in available_engines()}
    for _ in range(rounds):
        for engine, values in seconds.items():
            values.extend(batch_latency(engine, path, 8, buffer))
    rows = []
    print(f"\n{LATENCY_READS} reads of {LATENCY_BYTES >> 10} KiB, submit to end of wait")
    for engine, values in seconds.items():
        median, slow = 1e3 * float(np.median(values)), 1e3 * float(np.quantile(values, 0.9))
        rate = LATENCY_READS * LATENCY_BYTES / 1e3 / median
        rows.append({"engine": engine, "median_ms": round(median, 3), "p90_ms": round(slow, 3)})
        print(f"  {engine:<10}{median:>8.2f} ms, slowest tenth {slow:.2f} ms; {rate:.0f} MB/s")
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """MB/s by read size, random reads, one line per reader."""
    try:
        import matplotlib
    except ImportError:
        print(f"{file}: not drawn, matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["op"] == "random"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for engine in dict.fromkeys(row["engine"] for row in rows):
        mine = [row for row in rows if row["engine"] == engine]
        axes.plot([r["size"] / 1024 for r in mine], [r["mb_s"] for r in mine], "o-", label=f"mlxflash {engine}")
    theirs = {row["size"] / 1024: row["fio_mb_s"] for row in rows if row["fio_mb_s"]}
    axes.plot(list(theirs), list(theirs.values()), "k--", label="fio")
    axes.set(xscale="log", yscale="log", xlabel="read size, KiB", ylabel="MB/s", title="Random direct reads")
    sizes = sorted({row["size"] >> 10 for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--file", type=Path, help="an existing file of a GB or more, only read")
    where.add_argument("--dir", type=Path, help="where to make a temporary one (default: $TMPDIR or /tmp)")
    parser.add_argument("--gib", type=float, default=4.0, help="its size (default 4)")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="one short turn each on 1 GiB, under 30 s")
    parser.add_argument("--plot", type=Path, help="draw MB/s by size (needs matplotlib)")
    args = parser.parse_args()
    rounds, seconds = (1, 0.4) if args.quick else (3, 1.0)
    ops = [Op("random", size) for size in SIZES] + [Op("sequential", SEQUENTIAL)]
    if args.file:
        run(args, args.file, ops, rounds, seconds)
    else:
        with test_file(args.dir, min(args.gib, 1.0) if args.quick else args.gib) as path:
            run(args, path, ops, rounds, seconds)


def run(args: argparse.Namespace, path: Path, ops: list[Op], rounds: int, seconds: float) -> None:
    probe = File(path, direct=True)
    if not probe.direct:
        raise SystemExit(f"disk: {path.parent}: its filesystem has no direct I/O; name another with --dir")
    probe.close()
    rows = compare(path, ops, rounds, seconds, args.depth)
    waits = latencies(path, rounds)
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps({"rows": rows, "latency": waits, "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
