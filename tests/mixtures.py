"""Tiny mixtures of experts with random weights, as the Hub has them: transformers' names or mlx-lm's, float or
quantised. The reference is mlx-lm's own model, loaded by mlx-lm from the same checkpoint.

Weights are scaled so that experts move the residual stream as much as attention does and tokens choose differently.
"""

import json
import zlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from build import write_tokenizer

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
OF_128 = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "intermediate_size": 96}
SECOND = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LATENT = {
    "moe_intermediate_size": 96,
    "intermediate_size": 160,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
}
CONFIGS = {
    "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": None},
    "qwen3_moe": OF_128 | {"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "qwen2_moe": OF_128 | {"shared_expert_intermediate_size": 96},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 96, "norm_topk_prob": False},
    "granitemoe": {
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_bias": False,
    },
    "gpt_oss": {
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "deepseek_v2": LATENT
    | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "beta_fast": 32,
            "beta_slow": 1,
        }
    },
    "deepseek_v3": LATENT | {"topk_method": "noaux_tc", "norm_topk_prob": True},
    "phimoe": {
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "router_jitter_noise": 0.01,
        "attention_bias": True,
        "lm_head_bias": True,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 1.8, 2.0, 2.2, 2.4],
            "long_factor": [1.5, 2.0, 3.0, 5.0, 9.0, 17.0, 33.0, 65.0],
            "short_mscale": 1.2,
            "long_mscale": 1.4,
            "original_max_position_embeddings": 256,
        },
    },
    "nemotron_h": {
        "hybrid_override_pattern": "ME*-ME",
        "num_hidden_layers": 6,
        "intermediate_size": 128,
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "mamba_hidden_act": "silu",
        "ssm_state_size": 32,
        "n_groups": 2,
        "conv_kernel": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 96,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "n_group": 1,
        "topk_group": 1,
    },
}
NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def config_of(kind, **changes):
    return COMMON | {"model_type": kind} | CONFIGS[kind] | changes


def make(kind, dtype="float32", quantized=None, **changes):
    """mlx-lm's model with random weights, and its config. `quantized`: settings as mlx-lm's config.json has them."""
    config = config_of(kind, **changes)
    model_class, args = _get_classes(config)
    model = model_class(args.from_dict(config))
    weights = []
    for name, array in tree_flatten(model.parameters()):
        rng = np.random.default_rng(zlib.crc32(f"{kind}/{name}".encode()))
        scale = 2.5 / np.sqrt(array.shape[-1]) if array.ndim > 1 else 0.1
        values = rng.standard_normal(array.shape).astype(np.float32) * scale
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            values = 1 + values
        weights.append((name, mx.array(values).astype(NAMES[dtype])))
    model.update(tree_unflatten(weights))
    if quantized:
        config["quantization"] = quantized
        whole = {k: v for k, v in quantized.items() if not isinstance(v, dict | bool)}

        def settings(path, module):
            return quantized.get(path, hasattr(module, "to_quantized"))

        nn.quantize(model, **whole, class_predicate=settings)
    mx.eval(model.parameters())
    return model, config


def write(path, kind, naming="hub", dtype="float32", quantized=None, **changes):
    """A checkpoint directory. `naming`: "hub", a tensor per expert as transformers has them, or "mlx", stacked."""
    model, config = make(kind, dtype, quantized, **changes)
    weights = dict(tree_flatten(model.parameters()))
    if naming == "hub":
        weights = unstacked(kind, weights)
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, config["vocab_size"])


def unstacked(kind, weights):
    """Stacked experts under the names that transformers' checkpoints of that family give each."""
    out = {}
    second = {ours: theirs for theirs, ours in SECOND.items()}
    for name, array in weights.items():
        if kind == "granitemoe" and ".switch_mlp." in name:
            block = name[: name.index("switch_mlp")]
            if "gate_proj" in name:
                up = weights[name.replace("gate_proj", "up_proj")]
                out[f"{block}input_linear.weight"] = mx.concatenate([array, up], axis=1)
            elif "down_proj" in name:
                out[f"{block}output_linear.weight"] = array
        elif "self_attn.embed_q" in name:  # mlx-lm absorbs these two into the queries and the output
            values = weights[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            out[name.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif "self_attn.unembed_out" in name:
            continue
        elif name.endswith("conv1d.weight"):
            out[name] = mx.contiguous(array.swapaxes(1, 2))
        elif ".switch_mlp." in name:
            block, _, rest = name.partition("switch_mlp.")
            part, kind_of = rest.split(".")
            part = second[part] if kind in ("mixtral", "phimoe") else part.replace("fc1", "up_proj")
            part = part.replace("fc2", "down_proj")
            for i in range(len(array)):
                out[f"{block}experts.{i}.{part}.{kind_of}"] = mx.contiguous(array[i])
        else:
            out[name] = array
    mx.eval(out)
    return out


def reference(path):
    """The checkpoint as mlx-lm loads it, every number float32; Phi-MoE with the short factors for the long ones, which
    mlx-lm takes at any length (transformers, and we, take the short ones)."""
    from mlx_lm.utils import load_model

    config = json.loads((path / "config.json").read_text())
    rope = config.get("rope_scaling") or {}
    short = {k.replace("short", "long"): v for k, v in rope.items() if k.startswith("short")}
    model, _ = load_model(path, model_config={"rope_scaling": rope | short} if short else {})
    model.update(
        tree_unflatten(
            [
                (name, a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
                for name, a in tree_flatten(model.parameters())
            ]
        )
    )
    return model


def logits_of(model, tokens):
    """Teacher-forced logits of one sequence, float32 [tokens, vocabulary]; no cache, one pass."""
    with mx.stream(mx.cpu):
        return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def write_all(folder):
    """Every family as transformers' checkpoints have it, for golden/make_mixtures.py."""
    for kind in CONFIGS:
        write(Path(folder) / kind, kind)
    model, _ = make("gpt_oss")  # whose floats transformers interleaves; mlx-lm knows the quantised form of that only
    weights = dict(tree_flatten(model.parameters()))
    for name in sorted(n for n in weights if ".experts." in n and ".up_proj." not in n):
        base, part, kind = name.rsplit(".", 2)
        array = weights.pop(name)
        if part == "gate_proj":
            up = weights.pop(f"{base}.up_proj.{kind}")
            both = mx.stack([array, up], axis=2).reshape(len(array), -1, *array.shape[2:])
            key = f"{base}.gate_up_proj" + ("_bias" if kind == "bias" else "")
            weights[key] = both if kind == "bias" else both.swapaxes(-1, -2)
        elif part == "down_proj":
            weights[f"{base}.down_proj" + ("_bias" if kind == "bias" else "")] = (
                array if kind == "bias" else array.swapaxes(-1, -2)
            )
    weights = {k: mx.contiguous(v) for k, v in weights.items()}
    mx.save_safetensors(str(Path(folder) / "gpt_oss" / "model.safetensors"), weights, metadata={"format": "pt"})
