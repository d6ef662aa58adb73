"""OPT (arXiv 2205.01068), 125m to 66b and 350m's post-norm variant, which mlx-lm lacks; in mlx-lm's shapes.

Behaviour follows transformers' OPTForCausalLM: learned positions offset by two, scaled queries, biases everywhere,
`do_layer_norm_before` false for 350m, which also embeds in a narrower space and projects in and out.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from mlxflash.models.layers import linear

POSITION_OFFSET = 2


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int = 0
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    activation_function: str = "relu"
    _remove_final_layer_norm: bool = False

    def __post_init__(self) -> None:
        self.word_embed_proj_dim = self.word_embed_proj_dim or self.hidden_size


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        d = args.hidden_size
        self.num_heads = args.num_attention_heads
        self.scale = (d // self.num_heads) ** -0.5
        self.q_proj = linear(d, d, bias=args.enable_bias)
        self.k_proj = linear(d, d, bias=args.enable_bias)
        self.v_proj = linear(d, d, bias=args.enable_bias)
        self.out_proj = linear(d, d, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).reshape(batch, length, self.num_heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.relu(self.fc1(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        affine = args.layer_norm_elementwise_affine
        self.pre_norm = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)
        self.mlp = MLP(args)
        self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.pre_norm:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.mlp(x))


class Positions(nn.Module):
    """Learned positions; no nn.Embedding, so that quantising a model leaves them alone."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.weight = mx.zeros((args.max_position_embeddings + POSITION_OFFSET, args.hidden_size))

    def __call__(self, offset: int, length: int) -> mx.array:
        first = offset + POSITION_OFFSET
        if first + length > self.weight.shape[0]:
            raise ValueError(
                f"position {offset + length} is beyond the model's {self.weight.shape[0] - POSITION_OFFSET} positions"
            )
        return self.weight[first : first + length]


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.word_embed_proj_dim)
        self.embed_positions = Positions(args)
        if args.word_embed_proj_dim != args.hidden_size:
            self.project_in = linear(args.word_embed_proj_dim, args.hidden_size, bias=False)
            self.project_out = linear(args.hidden_size, args.word_embed_proj_dim, bias=False)
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=args.layer_norm_elementwise_affine)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.layers)
        offset = cache[0].offset if cache[0] is not None else 0
        x = self.embed_tokens(tokens)
        if "project_in" in self:
            x = self.project_in(x)
        x = x + self.embed_positions(offset, tokens.shape[1])
        mask = create_attention_mask(x, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            x = layer(x, mask, c)
        if "final_layer_norm" in self:
            x = self.final_layer_norm(x)
        return self.project_out(x) if "project_out" in self else x


class Body(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.decoder = Decoder(args)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = linear(args.word_embed_proj_dim, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        x = self.model.decoder(inputs, cache)
        return self.lm_head(x) if "lm_head" in self else self.model.decoder.embed_tokens.as_linear(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.decoder.layers

    @staticmethod
    def rename(name: str) -> str:
        """A checkpoint's tensor name as a parameter path of this model."""
        if name.startswith("decoder."):
            name = "model." + name
        return name if ".mlp." in name else name.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        renamed = {self.rename(k): v for k, v in weights.items()}
        if self.args.tie_word_embeddings:
            renamed.pop("lm_head.weight", None)
        return renamed
