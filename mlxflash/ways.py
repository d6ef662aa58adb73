"""Ways to run a bundle within a budget: what the planner needs to know of it, what each is forecast to take."""

from dataclasses import dataclass
from typing import Any

from mlxflash.backends import FFN, Backend
from mlxflash.bundle import ITEM_BYTES, Bundle, Manifest
from mlxflash.diskprofile import DiskProfile
from mlxflash.fidelity import Level
from mlxflash.forecast import Forecast, Work, forecast, machine_profile
from mlxflash.misses import MissCurve
from mlxflash.models import (
    kv_values_per_token,
)
from mlxflash.plan import (
    LAYER_OBJECTS,
    MIN_SLOTS,
    Plan,
    Sizes,
)
from mlxflash.predictor import LOW_BITS
from mlxflash.resident import Tensor

STORED = {  # what to do where it is missing
    "low-bit": "convert again, or use --exact",
    "low-rank": "`mlxflash train` makes one",
    "sparsity": "`mlxflash calibrate --sparsity` makes one",
}


@dataclass(frozen=True)
class Way:
    """One way to run a bundle within its budget."""

    predictor: str
    level: Level | None
    look_ahead: bool
    plan: Plan
    disk: DiskProfile | None
    expected: Forecast | None


def faster(one: Way, other: Way) -> tuple[Way, str]:
    """Of two ways the one with the shorter forecast, and why, for people; the first where nothing tells them apart."""
    if one.expected is None or other.expected is None or one.plan.whole:
        return one, ""
    ways = sorted((one, other), key=lambda w: w.expected.seconds if w.expected else 0.0)
    words = [f"{w.predictor} {1e3 * w.expected.seconds:.1f} ms" for w in ways if w.expected]
    return ways[0], f"  predictor: {words[0]} per token, {words[1]}"


def forecast_of(
    bundle: Bundle,
    plan: Plan,
    sizes: Sizes,
    found: list[Tensor],
    predictor: str,
    backend: Backend,
    disk: DiskProfile | None,
    look_ahead: bool,
) -> Forecast | None:
    """Of a decoded token; None for experts, where misses were not measured, and where reads may be cached."""
    manifest = bundle.manifest
    if manifest.layout == "experts" or (not plan.whole and (disk is None or sizes.curves is None)):
        return None
    misses = (0.0,) * len(plan.units)
    if not plan.whole and sizes.curves is not None:
        misses = tuple(curve.at(held) for curve, held in zip(sizes.curves, plan.capacities, strict=True))
    kind = str(manifest.quantization["bits"]) if manifest.quantization else manifest.dtype
    guessed = {"low-bit": str(LOW_BITS), "low-rank": "8", "sparsity": str(LOW_BITS)}.get(predictor, kind)
    head = any(t.name.startswith("lm_head.") for t in found)
    idle = ("embed_tokens.", "embed_positions.") if head else ("embed_positions.",)
    ahead = manifest.calibration.get("look-ahead") if look_ahead else None
    recall = ahead["recall"] if ahead else 0.0
    work = Work(
        resident=sum(t.num_bytes for t in found if not any(name in t.name for name in idle)),
        kind=kind,
        predictor_kind=guessed,
        slot=sizes.slot,
        stride=sizes.stride,
        kv=plan.kv // 2,  # of a context that fills
        misses=misses,
        recall=recall,
        over=ahead["flagged"] / max(1e-9, ahead["active"]) - recall if ahead else 0.0,
    )
    return forecast(plan, work, machine_profile(backend, {kind, guessed, "float32"}), disk)


def curves_of(manifest: Manifest, predictor: str, level: Level | None) -> tuple[MissCurve, ...] | None:
    """What layers miss with this predictor, or with the low-bit one where nobody measured it; None for none."""
    said = manifest.calibration.get(predictor if predictor in STORED else "low-bit", {}).get("misses")
    if level is not None:
        said = manifest.calibration["fidelity"][predictor]["levels"][level.name]["misses"]
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
    return Sizes(
        model=stored + bundle.streamed_bytes(),
        resident=resident,
        objects=bundle.num_layers * (LAYER_OBJECTS + backend.layer_bytes(ffn)),
        predictor=predictor_bytes,
        units=units,
        curves=curves_of(manifest, predictor, level),
        slot=backend.slot_bytes(ffn),
        stride=manifest.record.stride,
        kv_token=kv_values_per_token(config) * item,
        activation_token=16 * manifest.d_model * item,
        score_token=2 * int(config["num_attention_heads"]) * 4,
        activation_item=item,
        vocabulary=int(config["vocab_size"]),
        staged=backend.slot_bytes(ffn) != manifest.record.stride or not manifest.record.aligned,
        discrete=backend.discrete,
        least_slots=least,
        expert_token=token,
    )
