"""How long reads take on a disk: T(bytes, depth), measured once per disk in a second or two, and kept for a day.

One batch of `count` reads of `size` bytes at random places, submitted at once and waited for, is what the engine asks
of a disk, so that is what is measured, with the engine in use. Reads are direct: what a page cache holds is another
matter. What follows from it: how many bytes between two records are cheaper read than stepped over, from how many
missing units on a layer is better streamed whole, and what the planner forecasts.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxflash.kept import Watch, cache_folder, keep, recall
from mlxflash.pool import host_memory
from mlxflash.reader import File, make_reader

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
COUNTS = (1, 4, 16, 64, 256)
BUFFER_BYTES = 16 << 20
MOST_BYTES = 64 << 20  # of one batch; larger ones are in proportion
LEAST_SECONDS, REPEATS = 0.02, 3  # per size and count
CPU_SIZE, CPU_ROUNDS = 1, 10  # which size tells what processor time a read costs, and batches for it
TRIAL_BYTES = 64 << 20  # of a file to measure with where there is none yet


@dataclass(frozen=True)
class DiskProfile:
    """`seconds[i][j]` is what a batch of COUNTS[j] reads of SIZES[i] bytes takes; `read_cpu` the seconds of processor
    time that one read costs the process and the kernel on its behalf."""

    seconds: tuple[tuple[float, ...], ...]
    read_cpu: float = 0.0

    def batch(self, size: float, count: float) -> float:
        """Seconds for `count` reads of `size` bytes at random places, between and beyond what was measured.

        Interpolated in logarithms; beyond the table time grows as the bytes do, and below it not at all shrinks.
        """
        if size <= 0 or count <= 0:
            return 0.0
        over = max(1.0, size / SIZES[-1]) * max(1.0, count / COUNTS[-1])
        x, i = _place(np.log(SIZES), np.log(size))
        y, j = _place(np.log(COUNTS), np.log(count))
        t = np.log(np.array(self.seconds))[i : i + 2, j : j + 2]
        return float(over * np.exp((1 - x) * ((1 - y) * t[0, 0] + y * t[0, 1]) + x * ((1 - y) * t[1, 0] + y * t[1, 1])))

    def sequential(self, num_bytes: float) -> float:
        """Seconds for many bytes in large blocks, several under way."""
        return num_bytes / SIZES[-1] * self.seconds[-1][2] / COUNTS[2]

    def gap_bytes(self) -> int:
        """How many unwanted bytes between two wanted pieces are cheaper read than stepped over, many under way.

        A read costs o + size / rate; the gap that costs as much as one more read is o * rate.
        """
        small, large = self.seconds[1][-1] / COUNTS[-1], self.seconds[3][-1] / COUNTS[-1]
        rate = (SIZES[3] - SIZES[1]) / max(large - small, 1e-9)
        return int(max(0.0, small - SIZES[1] / rate) * rate)

    @classmethod
    def measure(cls, reader: Any, paths: list[Path], repeats: int = REPEATS) -> "DiskProfile":
        """With reads at random places of `paths`, files of a bundle; about two seconds, one if nothing is repeated.
        Raises OSError."""
        rng = np.random.default_rng(0)
        files = [File(path, direct=True) for path in paths]
        try:
            ends = [os.fstat(file.fd).st_size for file in files]
            buffer = host_memory(BUFFER_BYTES)
            table = []
            for size in SIZES:
                row: list[float] = []
                for count in COUNTS:
                    done = min(count, max(1, MOST_BYTES // size))
                    times: list[float] = []
                    while len(times) < repeats or (repeats > 1 and sum(times) < LEAST_SECONDS):
                        times.append(_batch(reader, files, ends, buffer, size, done, rng))
                    row.append(float(np.median(times)) * count / done)
                table.append(tuple(row))
            begin = time.process_time()
            size, count = SIZES[CPU_SIZE], COUNTS[-1]
            rounds = [_batch(reader, files, ends, buffer, size, count, rng) for _ in range(CPU_ROUNDS)]
            read_cpu = (time.process_time() - begin) / (len(rounds) * count)
        finally:
            for file in files:
                file.close()
        return cls(tuple(table), read_cpu)


def _place(grid: np.ndarray, value: float) -> tuple[float, int]:
    """Where value lies on an ascending grid: the share of the way from grid[i] to the next, and i; clipped."""
    i = int(np.clip(np.searchsorted(grid, value, "right") - 1, 0, len(grid) - 2))
    return float(np.clip((value - grid[i]) / (grid[i + 1] - grid[i]), 0, 1)), i


def _batch(
    reader: Any, files: list[File], ends: list[int], buffer: memoryview, size: int, count: int, rng: np.random.Generator
) -> float:
    which = int(rng.integers(len(files)))
    length = min(size, ends[which] // 4096 * 4096)  # a small file is read whole
    spans = np.empty((count, 3), np.uint64)
    spans[:, 0] = rng.integers(0, (ends[which] - length) // 4096 + 1, count) * 4096
    spans[:, 1] = np.arange(count) * length % max(1, BUFFER_BYTES - length + 1) // 4096 * 4096
    spans[:, 2] = length
    begin = time.perf_counter()
    reader.submit(files[which], spans, buffer).wait()
    return (time.perf_counter() - begin) * size / max(length, 1)


def disk_profile(paths: list[Path]) -> DiskProfile | None:
    """The profile of direct reads on the disk that holds `paths`: as measured within a day, or measured now.

    None where the file system has no direct reads, or the files cannot be read: whoever needs them will say so.
    """
    with _direct_reader(paths[0]) as reader, contextlib.suppress(OSError):
        if reader is not None:
            file = _cache_file(paths[0], reader.engine)
            return _profile(recall(file)) or _measured(reader, paths, file)
    return None


def disk_of(folder: Path) -> DiskProfile | None:
    """The same of the disk on which `folder` lies or is to lie, with no file there to measure with yet: as it was kept,
    or measured roughly, in a second, on a file that is removed again."""
    while not folder.exists():
        folder = folder.parent
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix="mlxflash-trial-") as trial:
        path = Path(trial.name)
        with _direct_reader(path) as reader:
            if reader is None:
                return None
            if known := _profile(recall(_cache_file(path, reader.engine))):
                return known
            block = np.random.default_rng(0).bytes(1 << 20)
            for _ in range(TRIAL_BYTES >> 20):
                trial.write(block)
            trial.flush()
            os.fsync(trial.fileno())
            return DiskProfile.measure(reader, [path], repeats=1)
    return None


@contextlib.contextmanager
def _direct_reader(path: Path) -> Iterator[Any]:
    """A reader for direct reads; None where the file system of `path` has none."""
    probe = File(path, direct=True)
    probe.close()
    reader = make_reader(direct=True) if probe.direct else None
    try:
        yield reader
    finally:
        if reader is not None:
            reader.close()


def _profile(said: Any) -> DiskProfile | None:
    """What was kept, if it makes sense."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        kept, cpu = np.array(said["seconds"], np.float64), float(said["read_cpu"])
        if kept.shape == (len(SIZES), len(COUNTS)) and np.isfinite(kept).all() and (kept > 0).all() and 0 <= cpu < 1:
            return DiskProfile(tuple(map(tuple, kept.tolist())), cpu)
    return None


def _measured(reader: Any, paths: list[Path], file: Path) -> DiskProfile:
    watch = Watch()
    profile = DiskProfile.measure(reader, paths)
    keep(file, asdict(profile), watch.quiet)
    return profile


def _cache_file(path: Path, engine: str) -> Path:
    """Named by the disk, as far as a process can tell one: its device number and the file system's size."""
    system = os.statvfs(path)
    name = f"{os.stat(path).st_dev:x}-{system.f_blocks * system.f_frsize}-{engine}"
    return cache_folder() / "disks" / f"{name}.json"
