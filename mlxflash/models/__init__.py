"""Model families: which class computes a `model_type`, and how its feed-forward weights are named and laid out.

Adding a family is one row here (and a model file beside this one where mlx-lm lacks it or would compute it wrongly).
"""

import importlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Family:
    """One `model_type`. Parts map to parameter paths relative to the FFN module, as in `{"up": "fc1"}`."""

    module: str  # where Model and ModelArgs are
    layout: str  # plain | gated
    ffn: str  # attribute of a layer that is the FFN
    parts: dict[str, str]
    activation_key: str  # of config.json
    activations: dict[str, str]  # config.json's word -> ours; any other is refused
    units_key: str = "intermediate_size"
    positions_key: str = "max_position_embeddings"
    ffn_norm: str = ""  # attribute of a layer that norms the residual stream for the FFN


FAMILIES = {
    "opt": Family(
        module="mlxflash.models.opt",
        layout="plain",
        ffn="mlp",
        parts={"up": "fc1", "down": "fc2"},
        activation_key="activation_function",
        activations={"relu": "relu"},
        units_key="ffn_dim",
        ffn_norm="final_layer_norm",
    ),
}


def family_of(config: Any, where: str) -> tuple[Family, str]:
    """The family of a checkpoint's config and its activation in our words.

    Raises ValueError when config.json is not that of a model, and names what is not supported.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: config.json is not a JSON object")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    word = config.get(family.activation_key)
    if not isinstance(word, str) or word not in family.activations:
        raise ValueError(
            f"{where}: {family.activation_key} {word!r} is not supported for {kind}; "
            f"supported: {', '.join(sorted(family.activations))}"
        )
    _check_numbers(config, family, where)
    return family, family.activations[word]


def _check_numbers(config: dict[str, Any], family: Family, where: str) -> None:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for key in (*keys, family.units_key, family.positions_key):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ValueError(f"{where}: {key} in config.json is {value!r}, not a positive number")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if not config.get("head_dim") and width % heads:
        raise ValueError(f"{where}: num_attention_heads {heads} does not divide hidden_size {width} in config.json")


def build_model(config: dict[str, Any], where: str, base: type | None = None) -> nn.Module:
    """The family's model with weights not yet loaded (lazy, they take no memory); `base` is mixed into its class."""
    family, _ = family_of(config, where)
    module = importlib.import_module(family.module)
    cls = module.Model if base is None else type(module.Model.__name__, (base, module.Model), {})
    try:
        model: nn.Module = cls(module.ModelArgs.from_dict(config))
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: config.json describes no {config['model_type']} model ({said})") from None
    mx.eval(mx.random.state)  # or each model leaves its uncomputed draws of initial weights behind
    return model


def max_positions(config: dict[str, Any]) -> int:
    return int(config[FAMILIES[config["model_type"]].positions_key])


def kv_values_per_token(config: dict[str, Any]) -> int:
    """Numbers that one token adds to the key-value cache, all layers together."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim)
