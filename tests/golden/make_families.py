"""Writes families/*.npz: what transformers' own classes compute for a tiny model of each family, logits and tokens.

    python -m venv venv && venv/bin/pip install torch==2.15.0 transformers==5.23.0 numpy
    venv/bin/python tests/golden/make_families.py [CASE ...]

Neither is a dependency of the tests: what they said is kept. Configs are written as the hub's checkpoints have them.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

PROMPT, GENERATED = 12, 64

NUMBERS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA = NUMBERS | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "bias": False,
}
CASES = {
    "llama": LLAMA | {"model_type": "llama", "hidden_act": "silu"},
    "llama-relu": LLAMA | {"model_type": "llama", "hidden_act": "relu", "tie_word_embeddings": True},
    "llama-biased": LLAMA | {"model_type": "llama", "hidden_act": "relu", "mlp_bias": True, "attention_bias": True},
    "llama-rope": {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    | {
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 700.0,
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-linear": LLAMA
    | {"model_type": "llama", "hidden_act": "silu", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-dynamic": LLAMA
    | {"model_type": "llama", "hidden_act": "silu", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "qwen2-yarn": LLAMA
    | {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, "rope_theta": 300.0}
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "llama-yarn": LLAMA
    | {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 300.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.3,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
    "phi3-longrope": LLAMA
    | {
        "model_type": "phi3",
        "hidden_act": "silu",
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 96,
        "max_position_embeddings": 384,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 2.0, 5.0, 9.0, 14.0, 20.0],
        },
    },
    "minicpm-longrope": LLAMA
    | {
        "model_type": "minicpm",
        "hidden_act": "silu",
        "scale_emb": 3,
        "scale_depth": 1.2,
        "dim_model_base": 48,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.6, 2.0, 2.5, 3.0],
            "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 14.0, 20.0, 30.0],
            "original_max_position_embeddings": 128,
        },
    },
    "llama-fatrelu": LLAMA | {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "sparsellama": LLAMA | {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.1},
    "mistral": LLAMA | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 96},
    "ministral3": {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    | {"model_type": "ministral3", "hidden_act": "silu", "head_dim": 16, "sliding_window": None, "pad_token_id": 0}
    | {
        "rope_parameters": {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "bamboo": LLAMA | {"model_type": "bamboo", "hidden_act": "relu", "sliding_window": None},
    "turbosparse": LLAMA | {"model_type": "bamboo", "hidden_act": "relu", "sliding_window": 96},
    "qwen2": LLAMA | {"model_type": "qwen2", "hidden_act": "silu", "sliding_window": 32, "use_sliding_window": False},
    "qwen3": LLAMA | {"model_type": "qwen3", "hidden_act": "silu", "head_dim": 24, "tie_word_embeddings": True},
    "olmo2": LLAMA | {"model_type": "olmo2", "hidden_act": "silu"},
    "phi3": LLAMA | {"model_type": "phi3", "hidden_act": "silu", "sliding_window": 100, "pad_token_id": 0},
    "glm": LLAMA
    | {"model_type": "glm", "hidden_act": "silu", "head_dim": 16, "attention_bias": True, "pad_token_id": 0},
    "glm4": LLAMA
    | {
        "model_type": "glm4",
        "hidden_act": "silu",
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 0,
    },
    "gemma": LLAMA
    | {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": LLAMA
    | {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "sliding_window": 100,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "gemma3_text": LLAMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 500.0,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "gemma3_text-linear": LLAMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "tie_word_embeddings": True,
    },
    "olmo3": LLAMA
    | {
        "model_type": "olmo3",
        "hidden_act": "silu",
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_theta": 500000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "gemma3n": LLAMA
    | {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 6,
        "intermediate_size": [96] * 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.9, 0.8, 0.0, 0.0, 0.0, 0.0],
        "rope_local_base_freq": 500.0,
        "vocab_size_per_layer_input": 90,
        "hidden_size_per_layer_input": 16,
        "altup_active_idx": 0,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_num_inputs": 3,
        "laurel_rank": 8,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "granite": LLAMA
    | {
        "model_type": "granite",
        "hidden_act": "silu",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "stablelm": LLAMA
    | {
        "model_type": "stablelm",
        "hidden_act": "silu",
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
    },
    "minicpm": LLAMA
    | {
        "model_type": "minicpm",
        "hidden_act": "relu",
        "scale_emb": 3,
        "scale_depth": 1.2,
        "dim_model_base": 48,
        "tie_word_embeddings": True,
    },
    "falcon-7b": FALCON | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    "falcon-40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True},
    "falcon-11b": FALCON
    | {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 96,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
    },
    "falcon-rw": FALCON
    | {"num_attention_heads": 6, "hidden_size": 96, "multi_query": False, "parallel_attn": False}
    | {"new_decoder_architecture": False, "alibi": True, "bias": True},
    "falcon-relu": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "activation": "relu"},
    "persimmon": NUMBERS
    | {"model_type": "persimmon", "hidden_act": "relu2", "rope_theta": 2500.0, "partial_rotary_factor": 0.5}
    | {"layer_norm_eps": 1e-5, "qk_layernorm": True},
    "nemotron": LLAMA
    | {"model_type": "nemotron", "hidden_act": "relu2", "partial_rotary_factor": 0.5, "norm_eps": 1e-5, "head_dim": 16},
    "phi": NUMBERS
    | {"model_type": "phi", "hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5}
    | {"rope_theta": 5000.0, "qk_layernorm": False},
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 96, "n_embd": 64, "n_head": 4}
    | {"n_layer": 2, "n_positions": 128, "n_ctx": 128, "layer_norm_epsilon": 1e-5, "n_inner": None},
    "gpt_neox": NUMBERS
    | {"model_type": "gpt_neox", "hidden_act": "gelu", "intermediate_size": 256, "layer_norm_eps": 1e-5}
    | {"rotary_emb_base": 5000, "rotary_pct": 0.25, "use_parallel_residual": True, "tie_word_embeddings": False},
    "smollm3": LLAMA
    | {"model_type": "smollm3", "hidden_act": "silu", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2}
    | {"pad_token_id": 0, "tie_word_embeddings": True},
    "seed_oss": LLAMA | {"model_type": "seed_oss", "hidden_act": "silu", "head_dim": 16, "attention_bias": True},
    "cohere": LLAMA
    | {"model_type": "cohere", "hidden_act": "silu", "logit_scale": 0.5, "layer_norm_eps": 1e-5, "use_qk_norm": True}
    | {"pad_token_id": 0, "tie_word_embeddings": True},
    "ernie4_5": LLAMA | {"model_type": "ernie4_5", "hidden_act": "silu", "use_bias": True, "head_dim": 16},
    "exaone4": LLAMA
    | {"model_type": "exaone4", "hidden_act": "silu", "head_dim": 16, "num_hidden_layers": 3}
    | {"sliding_window": 16, "sliding_window_pattern": "LG", "tie_word_embeddings": True}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        }
    },
    "exaone4-full": LLAMA
    | {"model_type": "exaone4", "hidden_act": "silu", "head_dim": 16, "sliding_window": None}
    | {"sliding_window_pattern": None, "layer_types": ["full_attention", "full_attention"]}
    | {"rope_scaling": None},
    "helium": LLAMA
    | {"model_type": "helium", "hidden_act": "silu", "head_dim": 16, "attention_bias": False, "mlp_bias": False},
    "internlm3": LLAMA
    | {"model_type": "internlm3", "hidden_act": "silu", "head_dim": 16, "bias": False, "qkv_bias": False}
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "mimo": LLAMA | {"model_type": "mimo", "hidden_act": "silu", "use_sliding_window": False},
    "hunyuan_v1_dense": LLAMA
    | {"model_type": "hunyuan_v1_dense", "hidden_act": "silu", "head_dim": 16, "use_qk_norm": True}
    | {"rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "type": "dynamic"}}
    | {"tie_word_embeddings": True},
    "cohere2": LLAMA
    | {"model_type": "cohere2", "hidden_act": "silu", "head_dim": 16, "logit_scale": 0.5, "layer_norm_eps": 1e-5}
    | {"num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 2, "tie_word_embeddings": True}
    | {"pad_token_id": 0},
    "arcee": LLAMA | {"model_type": "arcee", "hidden_act": "relu2", "head_dim": 16},
    "nemotron_h": LLAMA  # without experts; with: make_mixtures.py
    | {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "head_dim": 16}
    | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"ssm_state_size": 32, "n_groups": 2, "conv_kernel": 4, "use_conv_bias": True, "layer_norm_epsilon": 1e-5}
    | {"attention_bias": False, "mlp_bias": True, "use_bias": False, "mamba_proj_bias": False},
    "starcoder2": LLAMA
    | {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": 100}
    | {"tie_word_embeddings": True},
}
STAND_INS = {
    "sparsellama": "llama",
    "bamboo": "mistral",
    "minicpm": "granite",
    "mimo": "qwen2",
}  # whose own code lies beside their weights on the hub


def build(case, config):
    """transformers' model; where it lacks an activation, its class with that activation put in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = dict(config)
    kind = known.pop("model_type")
    act = known.get("hidden_act")
    if act == "fatrelu":
        known["hidden_act"] = "relu"
    if kind == "minicpm":  # Granite has the same multipliers, and scales attention freely
        known |= {
            "embedding_multiplier": config["scale_emb"],
            "residual_multiplier": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
            "attention_multiplier": (config["hidden_size"] // config["num_attention_heads"]) ** -0.5,
            "logits_scaling": config["hidden_size"] / config["dim_model_base"],
        }
    made = AutoConfig.for_model(STAND_INS.get(kind, kind), **known)
    made._attn_implementation = "sdpa" if kind == "falcon" else "eager"  # its eager one adds ALiBi twice
    model = AutoModelForCausalLM.from_config(made).double().eval()
    if act == "fatrelu":  # arXiv 2402.13516, section 3.3
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(config["hidden_act_param"], 0.0)
    if kind == "bamboo":  # dReLU: arXiv 2406.05955, section 3.2

        def drelu(mlp, x):
            return mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))

        for layer in model.model.layers:
            layer.mlp.forward = drelu.__get__(layer.mlp)
    if case == "turbosparse":  # its own predictor's units alone, from the residual before its norm; the hub's code

        def routed(mlp, x):
            wanted = mlp.predictor.fc2(torch.relu(mlp.predictor.fc1(mlp.before))).sigmoid().round()
            return mlp.down_proj(wanted * torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))

        for layer in model.model.layers:
            layer.mlp.predictor = torch.nn.Module()
            layer.mlp.predictor.fc1 = torch.nn.Linear(config["hidden_size"], 24, bias=False).double()
            layer.mlp.predictor.fc2 = torch.nn.Linear(24, config["intermediate_size"], bias=False).double()
            layer.mlp.forward = routed.__get__(layer.mlp)
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, given, mlp=layer.mlp: setattr(mlp, "before", given[0])
            )
    return model


def main():
    import torch

    from families import tensor

    for case in sys.argv[1:] or CASES:
        config = CASES[case]
        model = build(case, config)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop(next(name for name in ("lm_head.weight", "embed_out.weight") if name in state))
        if config["model_type"] == "nemotron_h":  # transformers renames what it reads
            state = {name.replace("model.", "backbone."): value for name, value in state.items()}
        shapes = {name: list(value.shape) for name, value in state.items()}
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(torch.from_numpy(tensor(case, name, shapes[name])).double())
            tokens = np.random.default_rng(1).integers(3, config["vocab_size"], PROMPT).tolist()
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
            said = list(tokens)
            for _ in range(GENERATED):
                said.append(int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
        np.savez_compressed(
            Path(__file__).with_name("families") / f"{case}.npz",
            config=np.array(json.dumps(config)),
            shapes=np.array(json.dumps(shapes)),
            tokens=np.array(tokens, np.uint16),
            logits=logits.astype(np.float32),
            greedy=np.array(said[PROMPT:], np.uint16),
        )
        print(case, len(set(said)), "different tokens")


if __name__ == "__main__":
    main()
