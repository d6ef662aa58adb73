"""The table of model families: which class computes a `model_type`, and how its feed-forward weights lie.

One row a family. The feed-forward layers are ours, so the activation is the one that config.json names, whatever the
class would compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WORDS = {  # transformers' names of activations; any other is refused
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "fatrelu",  # ProSparse's, with `hidden_act_param` as its threshold
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Family:
    """One `model_type`. Parts map to parameter paths relative to the FFN module, as in `{"up": "fc1"}`; parts that
    share a path lie in it one after the other."""

    module: str  # where Model and ModelArgs are
    layout: str  # plain | gated | experts
    parts: Mapping[str, str]
    ffn: str = (
        "mlp"  # attribute of a layer that is the FFN; in a mixture the path of the experts, which layers may lack
    )
    activation_keys: tuple[str, ...] = ("hidden_act",)  # of config.json; the first that says something
    activations: Mapping[str, str] = field(default_factory=lambda: WORDS)  # config.json's word -> ours
    keys: Mapping[str, str] = field(default_factory=dict)  # llama's name of a number -> config.json's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where config.json is silent
    prefixes: Mapping[str, str] = field(default_factory=dict)  # of stored names -> those that `sanitize` expects
    kv_heads: Callable[[dict[str, Any]], Any] | None = None  # key-value heads, where config.json says it otherwise
    windowed: bool = False  # the class computes sliding-window attention, or the family has none
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what config.json may not say otherwise
    kv_values: Callable[[dict[str, Any]], int] | None = None  # that a token adds to all caches, where not llama's
    state_values: Callable[[dict[str, Any]], int] | None = None  # that recurrent layers hold of a sequence
    dense: "Family | None" = None  # of a mixture's `model_type`, checkpoints that have no experts


def mlx_lm(name: str) -> str:
    return f"mlx_lm.models.{name}"


def mixture(
    name: str,
    ffn: str = "mlp.switch_mlp",
    activations: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    parts: Mapping[str, str] = GATED,
    **other: Any,
) -> Family:
    """A family of mlx-lm's whose experts are a SwitchGLU, or a SwitchMLP where `parts` say so."""
    defaults = {"hidden_act": "silu", "tie_word_embeddings": False} if defaults is None else defaults
    activations = activations or {"silu": "silu", "swish": "silu"}
    return Family(mlx_lm(name), "experts", parts, ffn, activations=activations, defaults=defaults, **other)


# Nemotron-H: Mamba-2, attention, and as layers of their own MLPs or mixtures with squared ReLU
BLOCKS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}


def blocks_of(config: dict[str, Any]) -> list[str]:
    """The kinds of a Nemotron-H's layers, one letter each, however config.json says them; none where it does not."""
    keys = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    said = next((config[key] for key in keys if config.get(key)), "")
    return [BLOCKS.get(str(kind), str(kind)) for kind in said] if isinstance(said, list | str) else []


def _mamba_values(config: dict[str, Any]) -> int:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    conv = (config["conv_kernel"] - 1) * (inner + 2 * config["n_groups"] * config["ssm_state_size"])
    return int(blocks_of(config).count("M") * (conv + inner * config["ssm_state_size"]))


def _attention_values(config: dict[str, Any]) -> int:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * blocks_of(config).count("*") * config["num_key_value_heads"] * head_dim)


NEMOTRON_H: dict[str, Any] = {
    "activation_keys": ("mlp_hidden_act",),
    "activations": {"relu2": "relu2"},
    "defaults": {"mlp_hidden_act": "relu2", "tie_word_embeddings": False, "num_experts_per_tok": 2},
    "fixed": {
        "mamba_hidden_act": "silu",
        "moe_latent_size": None,
        "n_group": 1,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
    },
    "windowed": True,
    "kv_values": _attention_values,
    "state_values": _mamba_values,
}


WIDENED = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
UNTIED = {"hidden_act": "silu", "tie_word_embeddings": False}
FAMILIES = {
    "opt": Family(
        module="mlxflash.models.opt",
        layout="plain",
        parts={"up": "fc1", "down": "fc2"},
        activation_keys=("activation_function",),
        activations={"relu": "relu"},
        keys={"intermediate_size": "ffn_dim"},
    ),
    "llama": Family(mlx_lm("llama"), "gated", GATED, defaults=UNTIED, windowed=True),
    "sparsellama": Family(mlx_lm("llama"), "gated", GATED, defaults={"tie_word_embeddings": False}, windowed=True),
    "mistral": Family(mlx_lm("llama"), "gated", GATED, defaults=UNTIED),
    "ministral3": Family(mlx_lm("ministral3"), "gated", GATED, defaults=UNTIED, windowed=True),
    "bamboo": Family(
        "mlxflash.models.bamboo",
        "gated",
        GATED,
        activations={"relu": "drelu"},
        defaults={"tie_word_embeddings": False, "predictor_size": 0},
    ),
    "qwen2": Family(mlx_lm("qwen2"), "gated", GATED, defaults=UNTIED),
    "qwen3": Family(mlx_lm("qwen3"), "gated", GATED, defaults=UNTIED),
    "olmo2": Family(mlx_lm("olmo2"), "gated", GATED, defaults=UNTIED),
    "olmo3": Family(mlx_lm("olmo3"), "gated", GATED, defaults=UNTIED | {"rope_theta": 500000.0}, windowed=True),
    "exaone4": Family(
        mlx_lm("exaone4"),
        "gated",
        GATED,
        defaults=UNTIED | {"sliding_window": None, "sliding_window_pattern": None},
        windowed=True,
    ),
    "helium": Family(mlx_lm("helium"), "gated", GATED, defaults=UNTIED | {"rope_theta": 100000.0}),
    "internlm3": Family(mlx_lm("internlm3"), "gated", GATED, defaults=UNTIED),
    "mimo": Family(mlx_lm("mimo"), "gated", GATED, defaults=UNTIED),
    "hunyuan_v1_dense": Family(mlx_lm("hunyuan_v1_dense"), "gated", GATED, defaults=UNTIED),
    "arcee": Family(
        "mlxflash.models.arcee",
        "plain",
        {"up": "up_proj", "down": "down_proj"},
        defaults={"hidden_act": "relu2", "tie_word_embeddings": False},
    ),
    "gemma": Family(
        mlx_lm("gemma"),
        "gated",
        GATED,
        activation_keys=("hidden_activation", "hidden_act"),
        activations=WORDS | {"gelu": "gelu_tanh"},  # what its first configs meant, and transformers 4 computed
        defaults={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        mlx_lm("gemma2"),
        "gated",
        GATED,
        activation_keys=("hidden_activation",),
        defaults={"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    ),
    "gemma3_text": Family(
        mlx_lm("gemma3_text"),
        "gated",
        GATED,
        activation_keys=("hidden_activation",),
        keys={"sliding_window_pattern": "_sliding_window_pattern"},
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1000000.0,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windowed=True,
    ),
    "gemma3n_text": Family(
        "mlxflash.models.gemma3n",
        "gated",
        GATED,
        ffn="ffn",  # of the layers that stream
        activation_keys=("hidden_activation",),
        defaults={"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        windowed=True,
        fixed={"tie_word_embeddings": True},
    ),
    "granite": Family(mlx_lm("granite"), "gated", GATED, defaults={"hidden_act": "silu"}),
    "stablelm": Family(mlx_lm("stablelm"), "gated", GATED, defaults={"hidden_act": "silu"}),
    "minicpm": Family("mlxflash.models.minicpm", "gated", GATED, defaults={"tie_word_embeddings": True}),
    "falcon": Family(
        "mlxflash.models.falcon",
        "plain",
        WIDENED,
        activation_keys=("activation",),
        keys={"hidden_size": "n_embed", "intermediate_size": "ffn_hidden_size"},
        defaults={"activation": "gelu", "max_position_embeddings": 2048},
        kv_heads=lambda c: (
            c.get("num_kv_heads") if c.get("new_decoder_architecture") else 1 if c.get("multi_query", True) else None
        ),
    ),
    "persimmon": Family(
        "mlxflash.models.persimmon",
        "plain",
        WIDENED,
        defaults={"hidden_act": "relu2", "max_position_embeddings": 16384, "rope_theta": 25000.0},
    ),
    "nemotron": Family(mlx_lm("nemotron"), "plain", {"up": "up_proj", "down": "down_proj"}),
    "phi": Family(
        mlx_lm("phi"),
        "plain",
        {"up": "fc1", "down": "fc2"},
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "max_position_embeddings": 2048},
    ),
    "gpt2": Family(
        mlx_lm("gpt2"),
        "plain",
        {"up": "c_fc", "down": "c_proj"},
        activation_keys=("activation_function",),
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        defaults={"activation_function": "gelu_new", "n_ctx": 1024},
        prefixes={"transformer.": ""},
    ),
    "gpt_neox": Family(
        mlx_lm("gpt_neox"), "plain", WIDENED, defaults={"hidden_act": "gelu"}, prefixes={"lm_head.": "embed_out."}
    ),
    "starcoder2": Family(mlx_lm("starcoder2"), "plain", {"up": "c_fc", "down": "c_proj"}),
    "smollm3": Family(mlx_lm("smollm3"), "gated", GATED, defaults={"hidden_act": "silu", "rope_theta": 2000000.0}),
    "seed_oss": Family(mlx_lm("seed_oss"), "gated", GATED, defaults=UNTIED),
    "cohere": Family(
        mlx_lm("cohere"),
        "gated",
        GATED,
        defaults={"hidden_act": "silu", "rope_theta": 500000.0},
        fixed={"tie_word_embeddings": True},
    ),
    "cohere2": Family(
        mlx_lm("cohere2"),
        "gated",
        GATED,
        defaults={"hidden_act": "silu", "rope_theta": 10000.0},
        windowed=True,
        fixed={"tie_word_embeddings": True},
    ),
    "ernie4_5": Family(mlx_lm("ernie4_5"), "gated", GATED, defaults={"hidden_act": "silu", "rope_theta": 500000.0}),
    "phi3": Family(mlx_lm("phi3"), "gated", FUSED, defaults=UNTIED),
    "glm": Family("mlxflash.models.glm", "gated", FUSED, defaults=UNTIED),
    "glm4": Family(mlx_lm("glm4"), "gated", FUSED, defaults=UNTIED),
    # A Mixtral with ReLU is refused: transformers' class means the gate's by it, TurboSparse-Mixtral's own code dReLU
    "mixtral": mixture("mixtral", "block_sparse_moe.switch_mlp", defaults=UNTIED | {"rope_theta": 1000000.0}),
    "qwen2_moe": mixture("qwen2_moe", fixed={"norm_topk_prob": False}),
    "qwen3_moe": mixture("qwen3_moe"),
    "olmoe": mixture("olmoe", fixed={"clip_qkv": None}),
    "granitemoe": mixture("granitemoe", "block_sparse_moe.switch_mlp", defaults={"hidden_act": "silu"}),
    "gpt_oss": mixture("gpt_oss", "mlp.experts", {"silu": "clamped"}, windowed=True, fixed={"swiglu_limit": 7.0}),
    "deepseek_v2": mixture(
        "deepseek_v2",
        fixed={"norm_topk_prob": False, "scoring_func": "softmax"},
        kv_values=lambda c: (
            c["num_hidden_layers"]
            * c["num_attention_heads"]
            * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"])
        ),
    ),
    "deepseek_v3": mixture(
        "deepseek_v3",
        fixed={"scoring_func": "sigmoid"},
        kv_values=lambda c: c["num_hidden_layers"] * (c["kv_lora_rank"] + c["qk_rope_head_dim"]),
    ),
    "phimoe": mixture(
        "phimoe",
        "block_sparse_moe.switch_mlp",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        fixed={"attention_bias": True, "lm_head_bias": True, "tie_word_embeddings": False},
    ),
    "nemotron_h": mixture(
        "nemotron_h",
        "mixer.switch_mlp",
        parts={"up": "fc1", "down": "fc2"},
        dense=Family(mlx_lm("nemotron_h"), "plain", {"up": "up_proj", "down": "down_proj"}, "mixer", **NEMOTRON_H),
        **NEMOTRON_H,
    ),
}
MULTIMODAL = {"gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "mistral3": "mistral"}  # whose text runs -> as which
REFUSED = {  # families that could be thought to be here: why they are not
    "apertus": "its activation xIELU has learned numbers in every layer",
    "bitnet": "it rounds a token's activations by the largest of all units, so none can be computed before all are",
}
SWITCHES = {"silu": "SwiGLU", "clamped": "SwigluOAI", "relu2": "ReLU2"}  # mlx-lm's names of experts' activations
