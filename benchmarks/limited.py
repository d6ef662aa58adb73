"""Run a process in a memory cgroup of its own, of either kind: for the memory law (tests/test_memory.py) and benchmarks
that compare programs in the same memory. Needs the right to make cgroups, as root has.
"""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

number = itertools.count()


class V1:
    """A memory cgroup of the first kind beneath this process's own."""

    limit, peak = "memory.limit_in_bytes", "memory.max_usage_in_bytes"

    @staticmethod
    def parent() -> Path:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        return Path("/sys/fs/cgroup/memory") / own.split(":")[2].lstrip("/")


class V2:
    """One of the second kind."""

    limit, peak = "memory.max", "memory.peak"

    @staticmethod
    def parent() -> Path:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        path = Path("/sys/fs/cgroup") / own[3:].lstrip("/")
        if "memory" not in (path / "cgroup.subtree_control").read_text().split():
            (path / "cgroup.subtree_control").write_text("+memory")
        return path


@contextlib.contextmanager
def cgroup(limit: int | None = None) -> Iterator[tuple[type[V1] | type[V2], Path]]:
    """A new cgroup, its kind and its folder. Raises OSError where none can be made."""
    for kind in (V1, V2):
        try:
            folder = kind.parent() / f"mlxflash-{os.getpid()}-{next(number)}"
            folder.mkdir()
        except (OSError, StopIteration):
            continue
        try:
            if limit is not None:
                (folder / kind.limit).write_text(str(limit))
            assert (folder / kind.peak).exists()
            yield kind, folder
        finally:
            for last in [*[False] * 200, True]:  # the kernel's own threads (io_uring) leave a moment after the process
                try:
                    folder.rmdir()
                    break
                except OSError:
                    if last:
                        raise
                    time.sleep(0.05)
        return
    raise OSError("no memory cgroup can be made here")


def run_in(
    args: Sequence[object], limit: int | None = None, timeout: float | None = None
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a process in a cgroup of `limit` bytes; it, and the most it was charged, page cache included. OSError where
    none can be made."""
    with cgroup(limit) as (kind, folder):
        enter = lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        command = [str(a) for a in args]
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, preexec_fn=enter)
        return run, int((folder / kind.peak).read_text())
