"""Falcon (arXiv 2311.16867), which mlx-lm lacks: 7b, rw-1b, 40b, 180b, 11B and ReluFalcon; in mlx-lm's shapes.

Behaviour follows transformers' FalconForCausalLM. 7b: one key-value head, attention and FFN side by side behind one
norm. `new_decoder_architecture` (40b, 180b, 11B): groups of query heads, one norm or two. rw: one after the other,
ALiBi (arXiv 2108.12409) in place of rotary positions, biases.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, create_causal_mask, scaled_dot_product_attention

from mlxflash.models.layers import MLP, linear


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_epsilon: float = 1e-5
    num_ln_in_parallel_attn: int | None = None
    new_decoder_architecture: bool = False
    parallel_attn: bool = True
    alibi: bool = False
    bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.rope_scaling:
            raise ValueError("rope_scaling is not supported for falcon")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_key_value_heads} key-value heads for {self.num_attention_heads} heads")
        self.parallel_attn = self.parallel_attn or self.new_decoder_architecture
        both = 2 if self.new_decoder_architecture and self.num_ln_in_parallel_attn is None else 1
        self.num_ln_in_parallel_attn = self.num_ln_in_parallel_attn or both


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        d, self.heads, self.kv_heads = args.hidden_size, args.num_attention_heads, args.num_key_value_heads
        self.head_dim = d // self.heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = linear(d, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=args.bias)
        self.dense = linear(d, d, bias=args.bias)
        if not args.alibi:
            self.rope = nn.RoPE(self.head_dim, base=args.rope_theta)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        # Each key-value head lies behind the query heads that it serves.
        mixed = self.query_key_value(x).reshape(batch, length, self.kv_heads, -1, self.head_dim)
        q, k, v = mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]
        q = q.reshape(batch, length, self.heads, self.head_dim)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        if "rope" in self:
            offset = cache.offset if cache is not None else 0
            q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.dense(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

        self.parallel = args.parallel_attn
        self.self_attention = Attention(args)
        self.mlp = MLP(args.hidden_size, args.intermediate_size, args.bias)
        if self.parallel and args.num_ln_in_parallel_attn == 2:
            self.ln_attn, self.ln_mlp = norm(), norm()
        else:
            self.input_layernorm = norm()
        if not self.parallel:
            self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        before = self.ln_attn(x) if "ln_attn" in self else self.input_layernorm(x)
        attended = self.self_attention(before, mask, cache)
        if not self.parallel:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        return x + attended + self.mlp(self.ln_mlp(x) if "ln_mlp" in self else before)


class Body(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self._slopes = alibi_slopes(args.num_attention_heads) if args.alibi else None
        self._scale = (args.hidden_size // args.num_attention_heads) ** -0.5

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.h)
        x = self.word_embeddings(tokens)
        mask = create_attention_mask(x, cache[0]) if self._slopes is None else self._alibi(x, cache[0])
        for layer, c in zip(self.h, cache, strict=True):
            x = layer(x, mask, c)
        return self.ln_f(x)

    def _alibi(self, x: mx.array, cache: Any) -> mx.array:
        """Added to attention scores, [heads, tokens, positions]; as trained: rounded to bfloat16, then scaled."""
        length, offset = x.shape[1], cache.offset if cache is not None else 0
        if getattr(cache, "max_size", None) is not None:
            raise ValueError("a rotating key-value cache (max_kv_size) forgets positions, which ALiBi needs")
        assert self._slopes is not None
        bias = self._slopes[:, None, None] * mx.arange(offset + length).astype(mx.bfloat16)
        bias = bias.astype(mx.float32) * self._scale
        return mx.where(create_causal_mask(length, offset), bias, -mx.inf).astype(x.dtype)


def alibi_slopes(heads: int) -> mx.array:
    """As for a power of two of heads, the others from between them: bfloat16 [heads] (arXiv 2108.12409, section 3)."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / whole * i) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 / whole * i) for i in range(1, 2 * (heads - whole), 2)]
    return mx.array(slopes, mx.float32).astype(mx.bfloat16)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.transformer = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        x = self.transformer(inputs, cache)
        return self.lm_head(x) if "lm_head" in self else self.transformer.word_embeddings.as_linear(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.transformer.h
