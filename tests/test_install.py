"""What people read when MLX does not load, or two builds of it lie over each other.

The errors of importing MLX are real ones, of mlx-cuda-13 0.32.4 on a machine without a driver, and with stand-ins for
a driver that is too old and for one without a GPU.
"""

import os
import subprocess
import sys

import pytest

NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"
OLD_DRIVER = "cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient for CUDA runtime version"
NO_GPU = "cudaMallocManaged(&data, size) failed: no CUDA-capable device is detected"
NO_LIBRARY = "libmlx.so: cannot open shared object file: No such file or directory"


def install(folder, error, *builds, library=True):
    """Stand-ins: an MLX that does not load, and what pip knows of its builds."""
    (folder / "mlx" / "lib").mkdir(parents=True)
    (folder / "mlx" / "__init__.py").touch()
    (folder / "mlx" / "core.py").write_text(f"raise ImportError({error!r})\n")
    if library:
        (folder / "mlx" / "lib" / "libmlx.so").touch()
    for build in builds:
        info = folder / f"{build.replace('-', '_')}-0.32.4.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 0.32.4\n")


def run(folder, *command):
    """A process that sees these stand-ins and not the MLX installed here."""
    hide = (
        "import sys, importlib.metadata as m, runpy; find = m.distribution\n"
        "def ours(name):\n"
        "    found = find(name)\n"
        f"    if name.startswith('mlx-') and not str(found.locate_file('')).startswith({str(folder)!r}):\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found\n"
        "m.distribution = ours\n"
    )
    env = os.environ | {"PYTHONPATH": str(folder)}
    run = [sys.executable, "-c", hide + "\n".join(command)]
    return subprocess.run(run, capture_output=True, text=True, timeout=60, env=env)


GENERATE = "sys.argv = ['mlxflash', 'generate', '-p', 'x']", "runpy.run_module('mlxflash', run_name='__main__')"


@pytest.mark.parametrize(
    ("error", "builds", "says", "mends"),
    [
        (NO_DRIVER, ["mlx-cuda-13"], "no NVIDIA driver is here",
         "pip uninstall -y mlx-cuda-13; pip install 'mlxflash[cpu]'"),
        (OLD_DRIVER, ["mlx-cuda-13"], "too old for mlx-cuda-13: it needs 580 or later", "mlxflash[cuda12]"),
        (OLD_DRIVER, ["mlx-cuda-12"], "too old for mlx-cuda-12: it needs 550.54.14 or later", "update it"),
        (NO_GPU, ["mlx-cuda-12"], "finds none that it can use (no CUDA-capable device is detected)", "mlxflash[cpu]"),
        (NO_LIBRARY, [], "MLX is not installed for this machine", "mlxflash[cpu]"),
        (NO_DRIVER, ["mlx-cpu", "mlx-cuda-13"], "mlx-cpu and mlx-cuda-13 are installed over each other",
         "pip uninstall -y mlx-cpu mlx-cuda-13; pip install 'mlxflash[cuda13]'"),
        ("libcublas.so.13: cannot open shared object file", ["mlx-cuda-13"], "libcublas.so.13 of NVIDIA's is missing",
         "--force-reinstall 'mlxflash[cuda13]'"),
    ],
)  # fmt: skip
def test_an_mlx_that_does_not_load(tmp_path, error, builds, says, mends):
    install(tmp_path, error, *builds)
    done = run(tmp_path, *GENERATE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mlxflash: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert mends in done.stderr


def test_a_library_that_went_with_another_build(tmp_path):
    install(tmp_path, NO_LIBRARY, "mlx-cpu", library=False)
    done = run(tmp_path, *GENERATE)
    assert done.stderr == (
        "mlxflash: the library of mlx-cpu is missing, as it is when another build was removed:"
        " pip uninstall -y mlx-cpu; pip install 'mlxflash[cpu]'\n"
    )


def test_python_says_it_too(tmp_path):
    install(tmp_path, NO_DRIVER, "mlx-cuda-13")
    done = run(tmp_path, "from mlxflash import load")
    assert "ImportError: this MLX is for NVIDIA GPUs, and no NVIDIA driver is here" in done.stderr.splitlines()[-1]


def test_cuda_where_there_is_none():
    mx = pytest.importorskip("mlx.core")
    from mlxflash.backends import make_backend

    if mx.cuda.is_available():
        pytest.skip("this MLX has CUDA")
    with pytest.raises(ValueError, match=r"device cuda: this MLX was built without it: .*cuda13"):
        make_backend("cuda")


def test_an_import_error_of_something_else(tmp_path):
    install(tmp_path, "cannot import name 'flurb' from 'blarb'")
    assert run(tmp_path, *GENERATE).stderr == "mlxflash: cannot import name 'flurb' from 'blarb'\n"
