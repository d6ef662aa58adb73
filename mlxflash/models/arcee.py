"""Arcee (AFM-4.5B), which mlx-lm lacks: Llama with a plain FFN, up and down, and squared ReLU.

Behaviour follows transformers' ArceeForCausalLM.
"""

from typing import Any

import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

from mlxflash.models.layers import linear

__all__ = ["Model", "ModelArgs"]


class MLP(nn.Module):
    """The FFN's parameters; FlashFFN computes in its place."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.up_proj = linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)


class Model(llama.Model):
    def __init__(self, args: Any):
        super().__init__(args)
        for layer in self.layers:
            layer.mlp = MLP(args)
