"""Tiny checkpoints of every family, and what transformers says of them: `golden/families`, by its own code.

A case is a config as the hub's checkpoints have it, tensor names and shapes as transformers saves them, and weights
that follow from the names. `golden/make_families.py` lists the cases and wrote the files.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np

from reference import write_safetensors

FOLDER = Path(__file__).with_name("golden") / "families"
CASES = sorted(file.stem for file in FOLDER.glob("*.npz"))


@functools.cache
def golden(case):
    """What `make_families.py` kept: config, shapes, tokens, logits [tokens, vocabulary], greedy."""
    with np.load(FOLDER / f"{case}.npz") as kept:
        return {name: json.loads(str(kept[name])) if kept[name].ndim == 0 else kept[name] for name in kept.files}


def tensor(case, name, shape):
    """A float32 tensor that follows from its name: norms near one, biases small, matrices that keep variances."""
    rng = np.random.default_rng(zlib.crc32(f"{case}/{name}".encode()))
    noise = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name or ".ln_" in name or name.startswith("ln_"):
        return noise * np.float32(0.1) + np.float32(name.endswith("weight"))
    if len(shape) == 1:
        return noise * np.float32(0.2)
    wide = 2.0 if any(word in name for word in ("embed", "wte", "wpe", "lm_head")) else 1.5
    return noise * np.float32(wide / np.sqrt(shape[-1]))


def weights_of(case):
    return {name: tensor(case, name, shape) for name, shape in golden(case)["shapes"].items()}


def write_case(path, case, dtype="float32"):
    """A checkpoint directory without a tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(golden(case)["config"]))
    write_safetensors(path / "model.safetensors", weights_of(case), dtype)
