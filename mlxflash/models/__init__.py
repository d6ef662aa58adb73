"""Model families: config.json to a model, and what else is to be known of it before its weights are read.

Adding a family is one row in families.py (and a model file beside it where mlx-lm lacks it or would compute it
wrongly).
"""

import importlib
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflash.bundle import MODES
from mlxflash.models import rope
from mlxflash.models.families import FAMILIES, MULTIMODAL, REFUSED, SWITCHES, Family, blocks_of

__all__ = ["FAMILIES", "Family"]


def text_of(config: Any) -> Any:
    """config.json of the text model alone, where it lies beside what sees and hears."""
    text = config.get("text_config") if isinstance(config, dict) else None
    if not isinstance(text, dict) or str(config.get("model_type")) not in MULTIMODAL:
        return config
    beside = {k: v for k, v in config.items() if not isinstance(v, dict) or k.startswith("quantization")}
    return beside | {"model_type": MULTIMODAL[config["model_type"]]} | text


def settings(config: Any, where: str) -> dict[str, Any]:
    """config.json as model classes read it: numbers under llama's names, defaults and rotary settings spelled out.

    Raises ValueError when it is not that of a supported model.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: config.json is not a JSON object")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise ValueError(f"{where}: model_type {kind!r} is not supported: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = _family(config)
    full = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k not in family.defaults}}
    for ours, theirs in family.keys.items():
        if full.get(theirs) is not None:
            full[ours] = full[theirs]
    sizes = full.get("intermediate_size")
    if isinstance(sizes, list) and sizes and sizes == sizes[:1] * len(sizes):  # one for each layer
        full["intermediate_size"] = sizes[0]
    if full.get("intermediate_size") is None and isinstance(full.get("hidden_size"), int):
        full["intermediate_size"] = 4 * full["hidden_size"]  # as Falcon and GPT-2 have it where nothing is said
    full.setdefault("num_hidden_layers", len(blocks_of(full)))
    said = family.kv_heads(full) if family.kv_heads is not None else full.get("num_key_value_heads")
    full["num_key_value_heads"] = said or full.get("num_attention_heads")
    _check_numbers(full, family, where)
    rope.spell_out(full, where)
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
    return family.dense if family.dense is not None and "E" not in blocks_of(config) else family


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
    if full.get("predictor_size"):
        activation = f"routed {activation}"
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
    blocks = set(blocks_of(config))
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
        args = module.ModelArgs.from_dict(full)
        _check_pattern(full, args)
        model: nn.Module = cls(args)
        rope.install(model, full, args)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: config.json describes no {config['model_type']} model ({said})") from None
    mx.eval(mx.random.state)  # or each model leaves its uncomputed draws of initial weights behind
    if family.layout == "experts":
        _check_mixture(model, full, where)
    return model


def _check_pattern(config: dict[str, Any], args: Any) -> None:
    """That a class which finds its sliding layers by a pattern finds those that config.json lists."""
    listed = config.get("layer_types")
    if listed and hasattr(args, "sliding_window_pattern"):
        pattern = args.sliding_window_pattern
        if isinstance(pattern, str):
            whole = [pattern[i % len(pattern)] == "G" for i in range(len(listed))]
        else:
            whole = [not pattern or (i + 1) % pattern == 0 for i in range(len(listed))]
        if whole != [kind == "full_attention" for kind in listed]:
            raise ValueError(f"layer_types are not those of sliding_window_pattern {pattern!r}")


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
