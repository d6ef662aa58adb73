"""Gemma 3n's text model: mlx-lm's, but for which FFNs stream.

The first layers pass only gates beyond a token's own cutoff, its mean plus some standard deviations over all units
(`activation_sparsity_pattern`): no unit of theirs can be computed before the gates of all are known. They stay
resident; the other layers stream, exactly, and are `ffn` here.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3n

BODY = "model.language_model."
UNSHARED = ("k_proj", "v_proj", "k_norm")  # of attention; layers that read others' keys and values have none


@dataclass
class ModelArgs:
    text: dict[str, Any]
    rope_local_base_freq: float

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(config, config["rope_local_base_freq"])


class Coefficients(nn.Module):
    """A small product whose weights its owner widens as it goes, so it is no linear layer to replace."""

    def __init__(self, weight: mx.array):
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T


class Layer(gemma3n.Gemma3nDecoderLayer):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("ffn" if name == "mlp" and "mlp" not in self else name)


class Model(gemma3n.Model):
    def __init__(self, args: ModelArgs):
        text = args.text | {"altup_coef_clip": None}  # a limit for training
        super().__init__(gemma3n.ModelArgs(text["model_type"], text))
        for index, layer in enumerate(self.layers):
            layer.__class__ = Layer
            if not text["activation_sparsity_pattern"][index]:
                layer.ffn = layer.pop("mlp")
            if layer.self_attn.is_kv_shared_layer:
                for name in UNSHARED:
                    layer.self_attn.pop(name)
            for name in ("prediction_coefs", "correction_coefs"):
                setattr(layer.altup, name, Coefficients(getattr(layer.altup, name).weight))

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
        """Logits [batch, tokens, vocabulary] of token ids; layers that share keys and values find them in a cache."""
        return super().__call__(inputs, cache or self.make_cache(), input_embeddings)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        kept = {}
        for name, array in weights.items():
            name = name if name.startswith(BODY) else name.replace("model.", BODY, 1)
            *_, rest = name.partition(BODY)
            _, number, *parts = [*rest.split("."), "", ""]
            if rest.startswith("layers."):
                layer = self.layers[int(number)]
                if parts[0] == "self_attn" and parts[1] in UNSHARED and parts[1] not in layer.self_attn:
                    continue
                name = name if "mlp" in layer else name.replace(".mlp.", ".ffn.")
            kept[name] = array
        return kept
