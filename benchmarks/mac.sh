#!/usr/bin/env bash
# What nobody has measured yet: mlxflash on Apple Silicon. No arguments needed, under 10 minutes, 5 GB of disk;
# PYTHON=python3.12 names a Python. Please attach mac.json to an issue. `--dry-run` does the same at small sizes on
# MLX's CPU device, on Linux too.
set -euo pipefail
cd "$(dirname "$0")/.."
make -s .venv/installed
exec .venv/bin/python benchmarks/mac.py "$@"
