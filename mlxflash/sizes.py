"""What the planner needs to know of a bundle with a predictor on a device: bytes of everything, units missed."""

from typing import Any

from mlxflash.backends import FFN, PARTIAL_SUMS, Backend
from mlxflash.bundle import ITEM_BYTES, Bundle, Manifest
from mlxflash.fidelity import Level
from mlxflash.misses import MissCurve
from mlxflash.models import kv_values_per_token, state_values
from mlxflash.plan import LAYER_OBJECTS, MIN_SLOTS, PREFILL_TOKENS, Sizes
from mlxflash.resident import Tensor
from mlxflash.wishes import STORED


def curves_of(manifest: Manifest, predictor: str, level: Level | None) -> tuple[MissCurve, ...] | None:
    """What layers miss with this predictor, or with the low-bit one where nobody measured it; None for none."""
    measured = predictor if predictor in (*STORED, "router") else "low-bit"
    said = manifest.calibration.get(measured, {}).get("misses")
    if level is not None:
        said = level.misses
    if said is None or predictor == "all":
        return None
    shares = tuple(said["shares"])
    return tuple(MissCurve(e.units, shares, tuple(c)) for e, c in zip(manifest.layers, said["layers"], strict=True))


def sizes_of(
    bundle: Bundle,
    config: dict[str, Any],
    found: list[Tensor],
    backend: Backend,
    ffn: FFN,
    predictor: str,
    own: int,
    level: Level | None,
) -> Sizes:
    """own: bytes of what predicts beside the files of `predictor`. level: whose misses count."""
    manifest = bundle.manifest
    item = backend.activation_dtype(manifest).size
    resident = sum(
        t.num_bytes // ITEM_BYTES[t.dtype] * max(item, 4 if t.name.startswith("ffn.") else 0)
        if t.is_small
        else t.num_bytes
        for t in found
    )
    stored = sum(t.num_bytes for t in found)
    predictor_bytes = own
    if predictor in STORED:
        predictor_bytes += sum(f.stat().st_size for f in bundle.predictor_files(predictor))
    elif predictor == "oracle":
        first = sum(p.num_bytes for p in ffn.record.parts if p.name.startswith(ffn.first) and p.offset is not None)
        predictor_bytes += sum(layer.units for layer in manifest.layers) * first
    units = tuple(layer.units for layer in manifest.layers)
    least, token = MIN_SLOTS, 0
    if manifest.layout == "experts":  # of each pair of token and expert: its input, products, output in three places
        chosen, hidden = int(config["num_experts_per_tok"]), ffn.record["up"].shape[0]
        least, token = chosen, chosen * (4 * manifest.d_model + 3 * hidden) * item
    elif manifest.routed:
        token = max(units) * (item + 2)  # what the predictor says of each unit
    elif manifest.layout == "blocks":  # the products of a layer's neurons, and down's of some blocks
        sums = PARTIAL_SUMS // PREFILL_TOKENS[-1]
        least, token = 1, (3 * max(units) * ffn.neurons + sums * manifest.d_model) * item
    activations = 16 * manifest.d_model * item
    if ffn.layout == "down":  # a sketch's, of all units at once
        activations += 3 * 4 * max(units)
    return Sizes(
        model=stored + bundle.streamed_bytes(),
        resident=resident + 4 * state_values(config),
        objects=bundle.num_layers * (LAYER_OBJECTS + backend.layer_bytes(ffn)),
        predictor=predictor_bytes,
        units=units,
        curves=curves_of(manifest, predictor, level),
        slot=backend.slot_bytes(ffn),
        stride=manifest.record.stride,
        extent=ffn.record.stride,
        kv_token=kv_values_per_token(config) * item,
        activation_token=activations,
        score_token=2 * int(config["num_attention_heads"]) * 4,
        activation_item=item,
        vocabulary=int(config["vocab_size"]),
        staged=backend.is_staged(ffn) or (ffn.layout == "down" and not backend.discrete),  # its streams read through
        partial=ffn.layout == "down",
        discrete=backend.discrete,
        least_slots=least,
        expert_token=token,
    )
