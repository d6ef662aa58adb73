"""What the scripts for other people's machines share: steps that are processes of their own, claims and notes.

A step that dies, hangs or raises is named in a sentence and the others go on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np


@dataclass
class Step:
    """What a step is given, and what it finds."""

    dry: bool
    folder: Path
    shape: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def device(self) -> Any:
        return mx.cpu if self.dry or not (mx.metal.is_available() or mx.cuda.is_available()) else mx.gpu

    def must(self, key: str, holds: bool, claim: str) -> None:
        """Something that the product relies on."""
        self.values[key] = bool(holds)
        print(f"  {'yes' if holds else 'NO '}  {claim}", flush=True)
        if not holds:
            self.problems.append(f"does not hold: {claim}")

    def note(self, key: str, value: Any, text: str) -> None:
        """Something good to know."""
        self.values[key] = value
        print(f"       {text}", flush=True)


def one_step(work: Callable[[Step], None], step: Step, result: Path) -> int:
    """In the step's own process."""
    mx.set_default_device(step.device)
    try:
        work(step)
    except Exception as error:
        if os.environ.get("MLXFLASH_DEBUG"):
            raise
        step.problems.append(f"{type(error).__name__}: {error}")
    result.write_text(json.dumps({**step.values, "problems": step.problems}))
    return 1 if step.problems else 0


def attempt(script: str, name: str, arguments: list[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Run a step of `script` as a process and return what it found, `problems` included."""
    result = folder / f"{name}.json"
    command = [sys.executable, script, *arguments, "--dir", str(folder), "--step", name, "--out", str(result)]
    print(f"{name}:", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        said = ending(process.wait(max(1.0, seconds)))
    except subprocess.TimeoutExpired:
        said = f"did not end within {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what the step started
            process.wait()
    found = json.loads(result.read_text()) if result.exists() else {"problems": []}
    if process.returncode and not found["problems"]:
        found["problems"] = [said]
    found["seconds"] = time.perf_counter() - begin
    return cast(dict[str, Any], found)


def ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def extra_bytes(work: Callable[[], mx.array]) -> int:
    """Memory that evaluating needs beyond what is there; a copy of the weights shows."""
    mx.synchronize()
    old = mx.set_cache_limit(0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    mx.set_cache_limit(old)
    return max(0, mx.get_peak_memory() - before)


def median_s(work: Callable[[], object], seconds: float = 0.15) -> float:
    work()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))
