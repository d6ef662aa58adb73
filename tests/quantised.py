"""Tiny dense checkpoints quantised by mlx-lm: golden/families' cases, or a config with other numbers."""

import json
import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model

from build import Shape, write_checkpoint, write_tokenizer

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "intermediate_size": 384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "head_dim": 32,
}
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32, "sliding_window": 512},
    "phi": {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 512},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": False},
    "gpt2": {
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "n_ctx": 512,
        "n_inner": 384,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    },
    "starcoder2": {"hidden_act": "gelu", "norm_epsilon": 1e-5},  # mlx-lm computes it so, whatever is said
}
SHAPE = Shape(d_model=64, ffn=256)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def make(kind, dtype="bfloat16", bits=4, group_size=64, mode="affine", predicate=None, **changes):
    """mlx-lm's model with random weights, quantised by mlx-lm, and its config."""
    config = COMMON | {"model_type": kind} | CONFIGS[kind] | changes
    model_class, args = _get_classes(config)
    model = model_class(args.from_dict(config))
    weights = []
    for name, array in tree_flatten(model.parameters()):
        rng = np.random.default_rng(zlib.crc32(f"{kind}/{name}".encode()))
        scale = 2.5 / np.sqrt(array.shape[-1]) if array.ndim > 1 else 0.1
        values = rng.standard_normal(array.shape).astype(np.float32) * scale
        if name.endswith("norm.weight") and kind != "gemma2":
            values = 1 + values
        weights.append((name, mx.array(values).astype(DTYPES[dtype])))
    model.update(tree_unflatten(weights))
    model, config = quantize_model(model, config, group_size, bits, mode=mode, quant_predicate=predicate)
    mx.eval(model.parameters())
    return model, config


def write(path, kind, *given, change=lambda weights: weights, **named):
    """A checkpoint directory as mlx-lm saves one."""
    model, config = make(kind, *given, **named)
    path.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), change(weights), metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, config["vocab_size"])


def write_opt(path):
    """An OPT quantised as mlx-lm would, if it had the class."""
    write_checkpoint(path, SHAPE)
    model = _opt_of(json.loads((path / "config.json").read_text()))
    weights = model.sanitize(mx.load(str(path / "model.safetensors")))
    model.load_weights(list(weights.items()))
    model, config = quantize_model(model, SHAPE.config(), 32, 4)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(config))


def opt(path):
    """That checkpoint in our class, whose FFNs are MLX's quantised layers."""
    model = _opt_of(json.loads((path / "config.json").read_text()))
    weights = model.sanitize(mx.load(str(path / "model.safetensors")))
    nn.quantize(model, 32, 4, class_predicate=lambda name, _: f"{name}.scales" in weights)
    model.load_weights(list(weights.items()))
    return model


def _opt_of(config):
    from mlxflash.models.opt import Model, ModelArgs

    return Model(ModelArgs.from_dict(config))
