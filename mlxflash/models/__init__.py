"""Model families: which class computes a `model_type`, and how its feed-forward weights are named and laid out.

Adding a family is one row here (and a model file beside this one where mlx-lm lacks it or would compute it wrongly).
The feed-forward layers are ours, so the activation is the one that config.json names, whatever the class would compute.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflash.bundle import MODES

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


def _blocks(config: dict[str, Any]) -> list[str]:
    """The kinds of a Nemotron-H's layers, one letter each, however config.json says them; none where it does not."""
    keys = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    said = next((config[key] for key in keys if config.get(key)), "")
    return [BLOCKS.get(str(kind), str(kind)) for kind in said] if isinstance(said, list | str) else []


def _mamba_values(config: dict[str, Any]) -> int:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    conv = (config["conv_kernel"] - 1) * (inner + 2 * config["n_groups"] * config["ssm_state_size"])
    return int(_blocks(config).count("M") * (conv + inner * config["ssm_state_size"]))


def _attention_values(config: dict[str, Any]) -> int:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * _blocks(config).count("*") * config["num_key_value_heads"] * head_dim)


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
    "bamboo": Family(
        mlx_lm("llama"), "gated", GATED, activations={"relu": "drelu"}, defaults={"tie_word_embeddings": False}
    ),
    "qwen2": Family(mlx_lm("qwen2"), "gated", GATED, defaults=UNTIED),
    "qwen3": Family(mlx_lm("qwen3"), "gated", GATED, defaults=UNTIED),
    "olmo2": Family(mlx_lm("olmo2"), "gated", GATED, defaults=UNTIED),
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
        defaults={"hidden_activation": "gelu_pytorch_tanh"},
        windowed=True,
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
        defaults={"hidden_act": "relu2", "max_position_embeddings": 16384},
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
    "smollm3": Family(mlx_lm("smollm3"), "gated", GATED, defaults={"hidden_act": "silu"}),
    "seed_oss": Family(mlx_lm("seed_oss"), "gated", GATED, defaults=UNTIED),
    "cohere": Family(mlx_lm("cohere"), "gated", GATED, defaults={"hidden_act": "silu"}),
    "ernie4_5": Family(mlx_lm("ernie4_5"), "gated", GATED, defaults={"hidden_act": "silu"}),
    "phi3": Family(mlx_lm("phi3"), "gated", FUSED, defaults=UNTIED),
    "glm4": Family(mlx_lm("glm4"), "gated", FUSED, defaults=UNTIED),
    # A Mixtral with ReLU is refused: transformers' class means the gate's by it, TurboSparse-Mixtral's own code dReLU
    "mixtral": mixture("mixtral", "block_sparse_moe.switch_mlp"),
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
SWITCHES = {"silu": "SwiGLU", "clamped": "SwigluOAI", "relu2": "ReLU2"}  # mlx-lm's names of experts' activations


def settings(config: Any, where: str) -> dict[str, Any]:
    """config.json as model classes read it: numbers under llama's names, defaults and rotary settings spelled out.

    Raises ValueError when it is not that of a supported model.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: config.json is not a JSON object")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = _family(config)
    full = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k not in family.defaults}}
    for ours, theirs in family.keys.items():
        if full.get(theirs) is not None:
            full[ours] = full[theirs]
    if full.get("intermediate_size") is None and isinstance(full.get("hidden_size"), int):
        full["intermediate_size"] = 4 * full["hidden_size"]  # as Falcon and GPT-2 have it where nothing is said
    full.setdefault("num_hidden_layers", len(_blocks(full)))
    said = family.kv_heads(full) if family.kv_heads is not None else full.get("num_key_value_heads")
    full["num_key_value_heads"] = said or full.get("num_attention_heads")
    _spell_out_rope(full)
    _use_short_rope(full)
    _check_numbers(full, family, where)
    for key, value in family.fixed.items():
        if full.get(key, value) != value:
            raise ValueError(f"{where}: {key} {full[key]!r} in config.json is not supported for {kind}; {value!r} is")
    if not family.windowed and full.get("use_sliding_window", True):
        window = full.get("sliding_window")  # the class would attend further back: positions end where that starts
        if isinstance(window, int) and window > 0:
            full["max_position_embeddings"] = min(full["max_position_embeddings"], window)
    return full


def _family(config: dict[str, Any]) -> Family:
    family = FAMILIES[config["model_type"]]
    return family.dense if family.dense is not None and "E" not in _blocks(config) else family


def _spell_out_rope(config: dict[str, Any]) -> None:
    """transformers 5 writes `rope_parameters` where mlx-lm's classes read `rope_theta` and `rope_scaling`."""
    said = config.get("rope_parameters")
    if not isinstance(said, dict):
        return
    if "full_attention" in said:  # Gemma 3: one for each kind of layer
        config.setdefault("rope_local_base_freq", said.get("sliding_attention", {}).get("rope_theta", 10000.0))
        said = said["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in said:
            config.setdefault(key, said[key])
    if said.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", said)


def _use_short_rope(config: dict[str, Any]) -> None:
    """Phi-MoE's LongRoPE: transformers' class takes the short factors, mlx-lm's the long ones whatever the length. They
    are for more positions than the model was first trained with; as they are not used here, positions end there."""
    said = config.get("rope_scaling")
    if not isinstance(said, dict) or not {"short_factor", "short_mscale"} <= said.keys():
        return
    first = config.get("original_max_position_embeddings") or said.get("original_max_position_embeddings")
    config["rope_scaling"] = said | {"long_factor": said["short_factor"], "long_mscale": said["short_mscale"]}
    config["original_max_position_embeddings"] = config["max_position_embeddings"] = first


def family_of(config: Any, where: str) -> tuple[Family, str, float]:
    """The family of a checkpoint's config, its activation in our words, and the activation's threshold.

    Raises ValueError when config.json is not that of a model, and names what is not supported.
    """
    full = settings(config, where)
    kind = full["model_type"]
    family = _family(full)
    said = {key: full[key] for key in family.activation_keys if full.get(key) is not None}
    key, word = next(iter(said.items()), (family.activation_keys[0], None))
    if not isinstance(word, str) or word not in family.activations:
        raise ValueError(
            f"{where}: {key} {word!r} is not supported for {kind}; supported: {', '.join(sorted(family.activations))}"
        )
    activation, threshold = family.activations[word], 0.0
    if activation == "fatrelu":
        threshold = full.get("hidden_act_param", 0.0)
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < 1e6:
            raise ValueError(f"{where}: hidden_act_param {threshold!r} in config.json is no threshold for fatrelu")
    return family, activation, float(threshold)


def _check_numbers(config: dict[str, Any], family: Family, where: str) -> None:
    keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    keys += ["num_experts_per_tok"] if family.layout == "experts" else []
    keys += ["max_position_embeddings"] + [key for key in ("num_key_value_heads", "head_dim") if config.get(key)]
    for key in keys:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            name = family.keys.get(key, key)
            raise ValueError(f"{where}: {name} in config.json is {value!r}, not a positive number")
    blocks = set(_blocks(config))
    if family.state_values is not None and not ({"M", "*"} < blocks <= {"M", "*", "E", "-"}):
        raise ValueError(
            f"{where}: the layers in config.json are {''.join(sorted(blocks)) or None!r}, not Mamba (M), attention (*)"
            " and experts (E) or MLPs (-)"
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if not config.get("head_dim") and width % heads:
        raise ValueError(f"{where}: num_attention_heads {heads} does not divide hidden_size {width} in config.json")


def build_model(config: dict[str, Any], where: str, base: type | None = None) -> nn.Module:
    """The family's model with weights not yet loaded (lazy, they take no memory); `base` is mixed into its class."""
    full = settings(config, where)
    family = _family(full)
    module = importlib.import_module(family.module)
    cls = module.Model if base is None else type(module.Model.__name__, (base, module.Model), {})
    try:
        model: nn.Module = cls(module.ModelArgs.from_dict(full))
    except (TypeError, ValueError, RuntimeError, ArithmeticError, KeyError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: config.json describes no {config['model_type']} model ({said})") from None
    mx.eval(mx.random.state)  # or each model leaves its uncomputed draws of initial weights behind
    if family.layout == "experts":
        _check_mixture(model, full, where)
    return model


def _check_mixture(model: nn.Module, config: dict[str, Any], where: str) -> None:
    """That there are experts, more than a token chooses, and that they compute what we would."""
    family, activation, _ = family_of(config, where)
    switches = [find(layer, family.ffn) for layer in ffn_layers(model, family)]
    if not switches:
        raise ValueError(f"{where}: config.json describes no layer with experts")
    chosen = config["num_experts_per_tok"]
    for switch in switches:
        count = len(find(switch, family.parts["up"]).weight)
        if not chosen <= count:
            raise ValueError(f"{where}: num_experts_per_tok {chosen} in config.json, there are {count} experts")
        if type(switch.activation).__name__ != SWITCHES[activation]:
            raise ValueError(f"{where}: this mlx-lm computes experts with {type(switch.activation).__name__}")


def find(layer: Any, path: str) -> Any:
    """The module at `path` in a layer, or None."""
    try:
        return attrgetter(path)(layer)
    except AttributeError:
        return None


def graft(layer: Any, path: str, module: nn.Module) -> None:
    """Put `module` where the layer has another one."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(layer) if owner else layer, name, module)


def ffn_layers(model: Any, family: Family) -> list[Any]:
    """The model's layers whose FFN streams, in order: all, but of mixtures and hybrids those that have one."""
    up = f"{family.ffn}.{family.parts['up']}"
    return [layer for layer in model.layers if find(layer, up) is not None]


def may_cast(model: Any, name: str) -> bool:
    """Whether the parameter may be held in another dtype than its own, as the model's class says it."""
    return bool(getattr(model, "cast_predicate", lambda name: True)(name))


def quantization_of(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """How a checkpoint's weights are quantised: mlx-lm's settings, {"group_size", "bits", "mode"} and, by the path of a
    module, others; None for floats. Raises ValueError for what MLX does not know."""
    said = config.get("quantization") or config.get("quantization_config")
    if said is None:
        return None
    if isinstance(said, dict) and said.get("quant_method") == "mxfp4":  # gpt-oss as OpenAI published it
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    said = said if isinstance(said, dict) else {}
    whole = {"mode": "affine"} | {k: v for k, v in said.items() if k in ("group_size", "bits", "mode")}
    modules = {k: v for k, v in said.items() if isinstance(v, dict | bool)}
    for own in (whole, *(m for m in modules.values() if isinstance(m, dict))):
        for key in ("group_size", "bits"):
            if not isinstance(own.get(key), int) or isinstance(own.get(key), bool):
                raise ValueError(f"{where}: already quantised, config.json says, but not as MLX does it")
        if own.get("mode", "affine") not in MODES:
            raise ValueError(f"{where}: quantization mode {own['mode']!r} is not supported: {', '.join(MODES)} are")
    return whole | modules


def quantise(model: nn.Module, settings: dict[str, Any], stored: Any, where: str) -> None:
    """Make the modules quantised ones that `stored` (names of tensors) has scales of; as mlx-lm does it."""
    whole = {k: v for k, v in settings.items() if k in ("group_size", "bits", "mode")}

    def chosen(path: str, module: nn.Module) -> Any:
        own = settings.get(path)
        return hasattr(module, "to_quantized") and f"{path}.scales" in stored and (True if own is None else own)

    try:
        nn.quantize(model, **whole, class_predicate=chosen)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: its weights cannot be quantised so ({str(error).splitlines()[0]})") from None


def max_positions(config: dict[str, Any]) -> int:
    return int(settings(config, "")["max_position_embeddings"])


def kv_values_per_token(config: dict[str, Any]) -> int:
    """Numbers that one token adds to the key-value cache, all layers together."""
    full = settings(config, "")
    own = _family(full).kv_values
    if own is not None:
        return int(own(full))
    heads = full["num_attention_heads"]
    head_dim = full.get("head_dim") or full["hidden_size"] // heads
    return int(2 * full["num_hidden_layers"] * (full.get("num_key_value_heads") or heads) * head_dim)


def state_values(config: dict[str, Any]) -> int:
    """Numbers that recurrent layers hold of a sequence, however long it is."""
    full = settings(config, "")
    own = _family(full).state_values
    return int(own(full)) if own is not None else 0
