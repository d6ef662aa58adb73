"""Tiny checkpoints of every family, and what transformers says of them: `golden/families`, by its own code.

A case is a config as the hub's checkpoints have it, tensor names and shapes as transformers saves them, and weights
that follow from the names. `golden/make_families.py` lists the cases and wrote the files.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np

from reference import dequantize, read_records, read_safetensors, write_safetensors

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


def dense_model(bundle):
    """The family's class with the weights that a bundle stores, float32, and FFNs of three lines each."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxflash.models import build_model, family_of, ffn_layers

    manifest, config = (json.loads((bundle / name).read_text()) for name in ("manifest.json", "config.json"))
    bits = (manifest["quantization"] or {}).get("bits")
    activation = manifest["activation"].removeprefix("routed ")
    stored = {}
    for file in sorted(bundle.glob("resident*.safetensors")):
        stored |= read_safetensors(file)
    weights = {}
    for name, array in stored.items():
        scales = name.removesuffix("weight") + "scales"
        if name.endswith("weight") and scales in stored:
            array = dequantize(array, stored[scales], stored[scales.removesuffix("scales") + "biases"], bits)
        if not name.startswith("ffn.") and not name.endswith((".scales", ".biases")):
            weights[name] = mx.array(array)

    class Dense(nn.Module):
        def __init__(self, index, layer):
            super().__init__()
            parts = read_records(bundle / layer["file"], layer["units"], manifest["record"])
            self._parts = {}
            for name in [name for name in ("gate", "up", "down") if name in parts]:
                part = parts[name]
                if bits:
                    part = dequantize(part, parts[f"{name}_scales"], parts[f"{name}_biases"], bits)
                self._parts[name] = mx.array(part), mx.array(stored.get(f"ffn.{index}.{name}_bias", np.float32(0)))

        def __call__(self, x, wanted=True):
            x = x.astype(mx.float32)
            product = {name: x @ part.T + bias for name, (part, bias) in self._parts.items() if name != "down"}
            h = ACTIVATIONS[activation](product.get("gate", product["up"]), manifest.get("threshold", 0))
            if "gate" in product:
                h = h * (mx.maximum(product["up"], 0) if activation == "drelu" else product["up"])
            down, bias = self._parts["down"]
            return (h * wanted) @ down + bias

    ACTIVATIONS = {  # noqa: N806
        "relu": lambda x, _: mx.maximum(x, 0),
        "drelu": lambda x, _: mx.maximum(x, 0),
        "relu2": lambda x, _: mx.maximum(x, 0) ** 2,
        "fatrelu": lambda x, threshold: mx.where(x > threshold, x, 0),
        "silu": lambda x, _: x / (1 + mx.exp(-x)),
        "gelu": lambda x, _: x * 0.5 * (1 + mx.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x, _: x * 0.5 * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }
    model = build_model(config, str(bundle))
    family, *_ = family_of(config, str(bundle))
    for index, (layer, said) in enumerate(zip(ffn_layers(model, family), manifest["layers"], strict=True)):
        setattr(layer, family.ffn, Dense(index, said))
    if hasattr(model, "sanitize"):
        model.sanitize(dict(weights))
    model.load_weights(list(weights.items()))
    return model
