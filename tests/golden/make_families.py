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
    "llama-fatrelu": LLAMA | {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "sparsellama": LLAMA | {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.1},
    "mistral": LLAMA | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 96},
    "bamboo": LLAMA | {"model_type": "bamboo", "hidden_act": "relu", "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2", "hidden_act": "silu", "sliding_window": 32, "use_sliding_window": False},
    "qwen3": LLAMA | {"model_type": "qwen3", "hidden_act": "silu", "head_dim": 24, "tie_word_embeddings": True},
    "olmo2": LLAMA | {"model_type": "olmo2", "hidden_act": "silu"},
    "phi3": LLAMA | {"model_type": "phi3", "hidden_act": "silu", "sliding_window": 100, "pad_token_id": 0},
    "glm4": LLAMA
    | {
        "model_type": "glm4",
        "hidden_act": "silu",
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 0,
    },
}
STAND_INS = {"sparsellama": "llama", "bamboo": "mistral"}  # whose own code lies beside their weights on the hub


def build(case, config):
    """transformers' model; where it lacks an activation, its class with that activation put in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = dict(config)
    kind = known.pop("model_type")
    act = known.get("hidden_act")
    if act == "fatrelu":
        known["hidden_act"] = "relu"
    made = AutoConfig.for_model(STAND_INS.get(kind, kind), **known)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made).double().eval()
    if act == "fatrelu":  # arXiv 2402.13516, section 3.3
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(config["hidden_act_param"], 0.0)
    if kind == "bamboo":  # dReLU: arXiv 2406.05955, section 3.2

        def drelu(mlp, x):
            return mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))

        for layer in model.model.layers:
            layer.mlp.forward = drelu.__get__(layer.mlp)
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
