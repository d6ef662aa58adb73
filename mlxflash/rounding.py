"""What quantising cost: a bundle beside the same checkpoint in floats, both computed exactly on one text.

The floats become a bundle of their own for that time, beside the other, and both stream: neither has to fit in memory.
On text that the float model itself samples, the KL divergence is what perplexity is expected to rise by.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxflash.bundle import Bundle, write_manifest
from mlxflash.calibrate import sequences_of
from mlxflash.converters import convert
from mlxflash.evaluate import Dense, prompt_logprobs, spread
from mlxflash.model import load_bundle
from mlxflash.plan import format_bytes

SECONDS = 60.0  # of sampling: of a model larger than memory every step reads all of it
ROOM = 1.1  # of the checkpoint's size, free on the disk
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
Progress = Callable[[str, int, int], None]


def measure_rounding(
    bundle: Bundle,
    source: Path,
    tokens: np.ndarray | None = None,
    *,
    dtype: str | None = None,
    num_tokens: int = 256,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Compare `bundle` with the float checkpoint at `source` it was quantised from, and record it in its manifest.

    tokens: int [n], `num_tokens` of them at most; None: what the float model samples in a minute, up to as many.
    dtype: as `convert` was given. memory: as for load_bundle, of one model at a time. Returns the bundle, reopened.
    Raises ValueError with one sentence where the disk has no room for the floats or a probability is no number.
    """
    size, free = weight_bytes(source), shutil.disk_usage(bundle.path.parent).free
    if free < ROOM * size:
        raise ValueError(f"the floats would take {format_bytes(size)} of disk meanwhile, {format_bytes(free)} are free")
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=f"{bundle.path.name}.floats-") as folder:
        floats = convert(source, Path(folder) / "floats.flash", dtype=dtype, predictor=False, progress=progress)
        settings: dict[str, Any] = {"memory": memory, "device": device}
        with load_bundle(floats.path, predictor="all", bundle=floats, **settings) as model:
            sequences = sequences_of(model, tokens, num_tokens, progress, SECONDS)
        length, text = max(map(len, sequences)), np.concatenate(sequences)
        with (
            Dense(floats, text, num_tokens=len(text), context=length, progress=progress, **settings) as dense,
            load_bundle(bundle.path, predictor="all", max_kv_size=length + 1, bundle=bundle, **settings) as model,
        ):
            said = dense.compare(
                row for stretch in dense.stretches for chunk in prompt_logprobs(model, stretch) for row in chunk
            )
            change, change_se = dense.change(said.losses)
    found = {
        "bits": bundle.manifest.quantization["bits"] if bundle.manifest.quantization else 0,
        "dtype": floats.manifest.dtype,
        "kl": float(np.mean(said.kl)),
        "kl_se": spread(np.array(said.kl)),
        "top1": float(np.mean(said.same)),
        "tokens": len(said.kl),
        "text": "text" if tokens is not None else "the float model's own text",
    }
    if tokens is not None:
        found |= {"ppl_change": change, "ppl_change_se": change_se}
    write_manifest(bundle.path, replace(bundle.manifest, calibration=bundle.manifest.calibration | {"rounding": found}))
    return Bundle.open(bundle.path)


def weight_bytes(checkpoint: Path) -> int:
    """Of a checkpoint's files."""
    return sum(file.stat().st_size for pattern in WEIGHTS for file in checkpoint.glob(pattern))
