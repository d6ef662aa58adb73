"""Persimmon 8B (Adept, 2023), which mlx-lm lacks: squared ReLU, norms of queries and keys; in mlx-lm's shapes.

Behaviour follows transformers' PersimmonForCausalLM.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from mlxflash.models.layers import MLP, linear


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = True
    partial_rotary_factor: float = 0.5
    rope_theta: float = 25000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.rope_scaling:
            raise ValueError("rope_scaling is not supported for persimmon")


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        d, self.heads = args.hidden_size, args.num_attention_heads
        self.head_dim = d // self.heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = linear(d, 3 * d, bias=True)
        self.dense = linear(d, d, bias=True)
        if args.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=args.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=args.layer_norm_eps)
        self.rope = nn.RoPE(int(self.head_dim * args.partial_rotary_factor), base=args.rope_theta)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        mixed = self.query_key_value(x).reshape(batch, length, self.heads, 3, self.head_dim)
        q, k, v = mixed[..., 0, :], mixed[..., 1, :], mixed[..., 2, :]
        if "q_layernorm" in self:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        offset = cache.offset if cache is not None else 0
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.dense(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args.hidden_size, args.intermediate_size, bias=True)
        self.input_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.layers)
        x = self.embed_tokens(tokens)
        mask = create_attention_mask(x, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            x = layer(x, mask, c)
        return self.final_layernorm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        x = self.model(inputs, cache)
        return self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers
