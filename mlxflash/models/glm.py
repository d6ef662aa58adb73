"""GLM-4 9B as first published (`glm`): mlx-lm's, but for positions, by which it turns whole heads, GLM a part."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models import glm


@dataclass
class ModelArgs(glm.ModelArgs):
    partial_rotary_factor: float = 0.5


class Model(glm.Model):
    def __init__(self, args: Any):
        super().__init__(args)
        for layer in self.layers:
            attention = layer.self_attn
            dims = int(attention.head_dim * args.partial_rotary_factor)
            attention.rope = nn.RoPE(dims, traditional=True, base=args.rope_theta)
