#!/usr/bin/env bash
# What nobody has measured yet: mlxflash on an NVIDIA GPU. No arguments needed, under 8 minutes, 20 GB of disk. Python
# is $PYTHON, .venv's or python3, and needs MLX for CUDA, mlx-lm and NumPy (pip install -e '.[cuda13]' where there is an
# index); the native part is built here where a compiler is. Please attach the folder it writes to an issue.
# `--dry-run` does the same at small sizes on MLX's CPU device.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
libs=$(find "$site/nvidia" -maxdepth 2 -type d -name lib 2>/dev/null | paste -sd: - || true)
export LD_LIBRARY_PATH=${libs:+$libs:}${LD_LIBRARY_PATH:-} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c 'from mlxflash._native import core; raise SystemExit(core is None)' 2>/dev/null ||
  "$python" -c 'from setuptools import setup; setup()' -q build_ext --inplace >/dev/null 2>&1 ||
  echo "the native part could not be built: Python's readers and MLX's operations do its work" >&2
exec "$python" benchmarks/gpu.py "$@"
