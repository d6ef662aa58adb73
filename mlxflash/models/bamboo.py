"""Bamboo and TurboSparse-Mistral (arXiv 2406.05955), which mlx-lm lacks: Mistral with a ReLU of gate and of up.

TurboSparse's checkpoints hold a predictor per layer that is part of the model: the FFN is computed on those units alone
that it names from the residual stream, before its norm. So it is known exactly what a token needs.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from mlxflash.models.layers import linear


@dataclass
class ModelArgs(llama.ModelArgs):
    predictor_size: int = 0  # width of the predictors' hidden layer; 0: there are none


class Predictor(nn.Module):
    """The residual stream [..., d_model] to which units count: bool [..., units]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = linear(args.hidden_size, args.predictor_size, bias=False)
        self.fc2 = linear(args.predictor_size, args.intermediate_size, bias=False)

    def __call__(self, h: mx.array) -> mx.array:
        return self.fc2(nn.relu(self.fc1(h))) > 0


class Block(llama.TransformerBlock):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.predictor = Predictor(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        ffn: Any = self.mlp  # RoutedFFN stands there
        return h + ffn(self.post_attention_layernorm(h), self.predictor(h))


class Model(llama.Model):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        if args.predictor_size:
            self.model.layers = [Block(args) for _ in self.model.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = super().sanitize(weights)  # beside the FFN, all of whose own weights stream
        return {name.replace(".mlp.predictor.", ".predictor."): array for name, array in weights.items()}
