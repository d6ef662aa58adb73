"""Rotary positions that are scaled, as transformers defines them, in the place of mlx-lm's.

mlx-lm rotates otherwise in places: LongRoPE by its long factors at every length, where transformers takes the short
ones up to the original length; YaRN without `truncate` and `attention_factor`; some classes do not scale at all.
Definitions: transformers' modeling_rope_utils.py; YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}
OPTIONAL = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "alpha")


def spell_out(config: dict[str, Any], where: str) -> None:
    """Make of a config's rotary settings, under whichever names, `rope_theta` and `rope_scaling` with all its numbers
    (None: positions are not scaled), and end its positions where they would be computed otherwise.

    Raises ValueError for a kind that is not here and for numbers that are none.
    """
    nested = config.get("rope_parameters")
    if isinstance(nested, dict):  # transformers 5
        if isinstance(nested.get("full_attention"), dict):  # one for each kind of layer
            local, nested = nested.get("sliding_attention"), nested["full_attention"]
            local = local if isinstance(local, dict) else {}
            if local.get("rope_type", "default") != "default":
                raise ValueError(f"{where}: rope_parameters {local['rope_type']!r} of sliding layers is not supported")
            config["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
        config.update({key: nested[key] for key in ("rope_theta", "partial_rotary_factor") if key in nested})
        config["rope_scaling"] = config.get("rope_scaling") or nested
    if config.get("rope_theta") is None:
        config["rope_theta"] = 10000.0  # of the few that begin elsewhere, the family's row says it
    if not _is_positive(config["rope_theta"]):
        raise ValueError(f"{where}: rope_theta in config.json is {config['rope_theta']!r}, not a positive number")
    said = config.get("rope_scaling")
    kind = said.get("rope_type", said.get("type", "default")) if isinstance(said, dict) else said or "default"
    kind = "longrope" if kind == "su" else kind  # as Phi-3's first checkpoints have it
    if kind == "default":
        config["rope_scaling"] = None
        return
    if not isinstance(said, dict) or not isinstance(kind, str) or kind not in NEEDED:
        raise ValueError(f"{where}: rope_scaling {kind!r} in config.json is not supported; {', '.join(NEEDED)} are")
    full: dict[str, Any] = said | {"rope_type": kind, "type": kind}
    positions = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or said.get("original_max_position_embeddings")
    full["original_max_position_embeddings"] = original or positions
    if kind == "longrope" and not full.get("factor") and _is_positive(original):
        full["factor"] = positions / original
    for key in (*NEEDED[kind], "original_max_position_embeddings", *(key for key in OPTIONAL if full.get(key))):
        if not _is_positive(full.get(key)):
            raise ValueError(f"{where}: {key} {full.get(key)!r} of rope_scaling in config.json is no positive number")
    if kind == "longrope":  # beyond, every token before would be turned by other factors
        config["max_position_embeddings"] = min(positions, int(full["original_max_position_embeddings"]))
    plain = kind == "dynamic" and not full.get("alpha")  # what it scales lies beyond the model's positions
    config["rope_scaling"] = None if plain else full


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def frequencies(said: dict[str, Any], dims: int, base: float) -> tuple[np.ndarray, float]:
    """Radians per position, float64 [dims / 2], and what queries and keys are multiplied by; `said` is spelled out."""
    exponents = np.arange(0, dims, 2) / dims
    plain = base**-exponents
    kind, factor, original = said["type"], said.get("factor", 1.0), said["original_max_position_embeddings"]
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":  # HunYuan's, at any length
        return (base * said["alpha"] ** (dims / (dims - 2))) ** -exponents, 1.0
    if kind == "llama3":
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        turns = original * plain / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return plain * ((1 - smooth) / factor + smooth), 1.0
    scale = said.get("attention_factor")
    if kind == "longrope":
        short = np.array(said["short_factor"], np.float64)
        if short.shape != plain.shape:
            raise ValueError(f"short_factor of rope_scaling has {short.size} numbers, not {plain.size}")
        scale = said.get("short_mscale", scale)  # Phi-MoE's
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return plain / short, scale
    if scale is None:
        over, under = said.get("mscale"), said.get("mscale_all_dim")
        scale = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1.0)
    ends = [
        dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (said.get("beta_fast") or 32, said.get("beta_slow") or 1)
    ]
    if said.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dims - 1)
    ramp = np.clip((np.arange(dims // 2) - first) / ((last - first) or 0.001), 0, 1)
    return plain * (ramp / factor + 1 - ramp), scale


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class ScaledRoPE(nn.Module):
    """mlx-lm's call: x [..., tokens, dims or more], turned from position `offset` on."""

    def __init__(self, radians: np.ndarray, scale: float, traditional: bool):
        super().__init__()
        self._dims, self._scale, self._traditional = 2 * len(radians), scale, traditional
        self._freqs = mx.array((1 / radians).astype(np.float32))

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        if self._scale != 1:
            x = x.at[..., : self._dims].multiply(self._scale)
        how = {"traditional": self._traditional, "base": None, "scale": 1.0, "offset": offset, "freqs": self._freqs}
        return mx.fast.rope(x, self._dims, **how)


def install(model: Any, config: dict[str, Any], args: Any) -> None:
    """Put ours where the model scales positions. Raises ValueError where only config.json does."""
    local = config.get("rope_local_base_freq", config["rope_theta"])
    if local != config["rope_theta"] and not hasattr(args, "rope_local_base_freq"):
        raise ValueError("its class knows one rope_theta for all layers")
    if (config.get("partial_rotary_factor") or 1) != 1 and not hasattr(args, "partial_rotary_factor"):
        raise ValueError("its class ignores partial_rotary_factor")
    said = config.get("rope_scaling")
    if said is None:
        return
    owners = [m for layer in model.layers for m in layer.modules() if isinstance(m.get("rope"), nn.Module)]
    owners = [m for m in owners if "_freqs" in m.rope or getattr(m.rope, "scale", 1.0) != 1]
    if not owners:
        raise ValueError(f"its class ignores rope_scaling {said['type']!r}")
    for owner in owners:
        rope = owner.rope
        dims = 2 * len(rope._freqs) if "_freqs" in rope else rope.dims
        traditional = getattr(rope, "traditional", "qk_rope_head_dim" in config)  # DeepSeek V2's does not say
        owner.rope = ScaledRoPE(*frequencies(said, dims, config["rope_theta"]), traditional)
