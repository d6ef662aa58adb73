"""Which builds of MLX are installed, and in one sentence what is wrong with them. Imports no MLX: it may not load.

Every build ships the same file, `mlx/lib/libmlx.so`. pip installs two of them without a word, the later one wins, and
removing either takes the file from both.
"""

import ctypes
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

BUILDS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}  # to our extras
DRIVERS = {"mlx-cuda-12": "550.54.14", "mlx-cuda-13": "580"}  # the oldest that will do


def builds() -> dict[str, Distribution]:
    """The builds that pip says are installed here."""
    found = {}
    for name in BUILDS:
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
    return found


def conflict() -> str | None:
    """What is wrong where several builds lie over each other, or one whose library is gone, and how to mend it."""
    found = builds()
    if len(found) > 1:
        return f"{' and '.join(found)} are installed over each other and share one library: {_mend(*found)}"
    for name, build in found.items():
        if not build.locate_file("mlx/lib/libmlx.so").is_file():  # type: ignore[attr-defined]
            return f"the library of {name} is missing, as it is when another build was removed: {_mend(name)}"
    return None


def _mend(*names: str) -> str:
    keep = next((name for name in reversed(names) if name != "mlx-cpu"), names[0])
    return f"pip uninstall -y {' '.join(names)}; pip install 'mlxflash[{BUILDS[keep]}]'"


def why_not_loaded(error: ImportError) -> str | None:
    """What an error of importing MLX means here; None where it is about something else."""
    text = str(error)
    found = [name for name in builds() if name != "mlx-cpu"]
    instead = f"pip uninstall -y {found[0]}; pip install 'mlxflash[cpu]'" if found else "pip install 'mlxflash[cpu]'"
    if "libmlx" in text or "mlx" in (error.name or ""):
        return conflict() or (
            "MLX is not installed for this machine: pip install 'mlxflash[cpu]' on Linux (cuda12 or cuda13 with an"
            " NVIDIA GPU), 'mlxflash' on a Mac"
        )
    if "libcuda.so" in text:
        return conflict() or f"this MLX is for NVIDIA GPUs, and no NVIDIA driver is here; without a GPU: {instead}"
    if "driver version is insufficient" in text:
        name = found[0] if found else "mlx-cuda-13"
        other = f" or pip uninstall -y {name}; pip install 'mlxflash[cuda12]'" if name == "mlx-cuda-13" else ""
        return (
            f"the NVIDIA driver{_driver()} is too old for {name}: it needs {DRIVERS[name]} or later; update it{other}"
        )
    if "cuda" in text.lower() and "failed:" in text:
        reason = text.rsplit("failed:", 1)[1].strip()
        return f"this MLX is for NVIDIA GPUs, and finds none that it can use ({reason}); without a GPU: {instead}"
    library = re.search(r"lib(cublas|cudnn|nvrtc|cudart|cufft|nccl|cusolver|cusparse)\w*\.so[.\d]*", text)
    if library:
        extra = BUILDS[found[0]] if found else "cuda13"
        return f"{library[0]} of NVIDIA's is missing beside MLX: pip install --force-reinstall 'mlxflash[{extra}]'"
    return None


def _driver() -> str:
    """Which CUDA the driver here is for, in words."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return ""
    except (OSError, AttributeError):
        return ""
    return f" (for CUDA {version.value // 1000}.{version.value % 1000 // 10})"
