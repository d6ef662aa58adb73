"""What was measured of this machine and its disks: kept in a folder of the cache for a day, if the machine was quiet.

A profile taken while others computed makes every later forecast too long, so it serves this process alone.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

SECONDS = 86_400.0
QUIET = 0.15  # of all cores: what others may take meanwhile

_ours: dict[Path, dict[str, Any]] = {}  # what this process measured


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MLXFLASH_CACHE") or Path(home) / "mlxflash")


def recall(file: Path) -> Any:
    """What `keep` was given for `file`, here or in another process since yesterday; None where there is nothing."""
    if file in _ours:
        return _ours[file]
    with contextlib.suppress(OSError, ValueError):
        if 0 <= time.time() - file.stat().st_mtime < SECONDS:
            return json.loads(file.read_text())
    return None


def keep(file: Path, measured: dict[str, Any], quiet: bool) -> None:
    """Write it, whole or not at all; if the machine was not quiet only this process knows it."""
    if not quiet:
        _ours[file] = measured
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(measured))
        part.replace(file)


class Watch:
    """How busy others are while something is measured."""

    def __init__(self) -> None:
        self._begin, self._others = time.perf_counter(), _others()

    @property
    def quiet(self) -> bool:
        now, cores = _others(), os.cpu_count() or 1
        if now is None or self._others is None:  # not Linux: the last minute's load, this process's own included
            return os.getloadavg()[0] < cores
        return now - self._others < max(0.02, QUIET * cores * (time.perf_counter() - self._begin))


def _others() -> float | None:
    """Seconds of processor time that all but this process have taken so far; None where the system does not say."""
    try:
        user, nice, system, _, _, _, _, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK") - time.process_time()
