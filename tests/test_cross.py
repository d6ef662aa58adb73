"""Native code for machines that are not at hand: it compiles for Apple Silicon, and its NEON kernels compute.

zig (package `ziglang`) is the cross compiler. The self-test compares every kernel with a plain loop; where qemu is
installed it runs for aarch64 too.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("ziglang")
NATIVE = Path(__file__).parents[1] / "mlxflash" / "_native"
SELFTEST = Path(__file__).parent / "native_selftest.c"
KERNELS = ["compute", "threads", "kernels_avx512", "kernels_avx2", "kernels_neon", "kernels_portable"]


def zig(*args, **more):
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-Wall", "-Wextra", "-Werror", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", sorted(p.name for p in NATIVE.glob("*.c")))
def test_compiles_for_apple_silicon(source, tmp_path):
    include = sysconfig.get_path("include")
    zig("-target", "aarch64-macos", "-DPy_LIMITED_API=0x030b0000", "-isystem", include, "-I", NATIVE, "-O1", "-c",
        NATIVE / source, "-o", tmp_path / "out.o")  # fmt: skip
    assert (tmp_path / "out.o").stat().st_size > 0


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is not installed")
def test_neon_kernels_compute(tmp_path):
    sources = [NATIVE / f"{name}.c" for name in KERNELS]
    program = tmp_path / "selftest"
    zig("-target", "aarch64-linux-musl", "-static", "-O2", "-I", NATIVE, SELFTEST, *sources, "-lm", "-o", program)
    done = subprocess.run(["qemu-aarch64", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon" in done.stdout
