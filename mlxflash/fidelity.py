"""Which active units are worth a read: levels of fidelity, and each unit's threshold on disk.

What a unit adds to the FFN's output is |activation| |down row|. One that is predicted to add less than its layer's
threshold is not read; if it is held it is computed anyway. For a predictor that compares an estimate with a number per
unit this is only another number, `base + multiplier * threshold`: nothing changes on the way of a token. Thresholds
hold the down rows' norms and the layers' scales, so that one multiplier makes a level; `thinning` finds them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlxflash.bundle import Bundle, BundleError
from mlxflash.predictor import save_arrays

LEVELS = {"high": 0.001, "balanced": 0.003, "fast": 0.01}  # perplexity change, at most
FIDELITIES = ("exact", *LEVELS)
DEFAULT = "high"
SPARSITIES = range(1, 100)  # percent of the units that may be left out where none is ever zero
Cuts = list[tuple[np.ndarray, np.ndarray]]  # per layer: base and threshold, float32 [units]


@dataclass(frozen=True)
class Level:
    """A level as measured on text, with `held` of the units held from earlier tokens; more only makes it better."""

    name: str
    multiplier: float
    kl: float  # nats per token, of the exact model from the thinned one
    kl_se: float
    ppl_change: float  # on the text, paired; noise of ppl_change_se
    ppl_change_se: float
    top1: float
    flagged: float
    held: float
    met: bool

    def describe(self) -> str:
        """For the footer of a run."""
        name = f"{self.name}% of the units left out" if self.name.isdecimal() else self.name
        return f"{name}{'' if self.met else ' not reached'}: {self.price()}"

    def price(self) -> str:
        """What it costs, in words; perplexity as the KL divergence says it, see `thinning`."""
        return f"perplexity {np.expm1(self.kl):+.2%}, top-1 agreement {self.top1:.1%}"


def level_of(bundle: Bundle, predictor: str, name: str) -> Level | None:
    """A bundle's level of a stored predictor; None where nobody measured it."""
    said = bundle.manifest.calibration.get("fidelity", {}).get(predictor, {}).get("levels", {}).get(name)
    return None if said is None else Level(name, **{k: said[k] for k in Level.__dataclass_fields__ if k != "name"})


def needs(bundle: Bundle, predictor: str, name: str) -> Level:
    """The same. Raises BundleError naming the remedy where there is none."""
    level = level_of(bundle, predictor, name)
    if level is None:
        raise BundleError(
            f"{bundle.path}: fidelity {name!r} of its {predictor} predictor was not measured; `mlxflash calibrate` does"
        )
    return level


def sparsity_level(bundle: Bundle, percent: int) -> Level:
    """What leaving out `percent` of the units costs. Raises BundleError naming the remedy where nobody measured it."""
    bundle.require_never_zero()
    if percent not in SPARSITIES:
        raise ValueError(f"sparsity {percent}: a percentage of the units, 1 to 99")
    level = level_of(bundle, "sparsity", str(percent))
    if level is None:
        there = bundle.manifest.calibration.get("fidelity", {}).get("sparsity", {}).get("levels", {})
        all_of_them = " ".join(sorted({*there, str(percent)}, key=lambda p: p.zfill(2)))  # old ones are replaced
        raise BundleError(
            f"{bundle.path}: sparsity {percent} was not measured; "
            f"`mlxflash calibrate {bundle.path} --text FILE --sparsity {all_of_them}` does"
        )
    return level


def cuts_file(bundle: Path, predictor: str) -> Path:
    return bundle / "fidelity" / f"{predictor}.safetensors"


def save_cuts(bundle: Path, predictor: str, cuts: Cuts) -> None:
    """Every layer's base and threshold: a unit is flagged whose estimate exceeds base + multiplier * threshold."""
    file = cuts_file(bundle, predictor)
    file.parent.mkdir(exist_ok=True)
    save_arrays(
        file,
        {
            f"{i:03d}.{name}": mx.array(array.astype(np.float32))
            for i, pair in enumerate(cuts)
            for name, array in zip(("base", "threshold"), pair, strict=True)
        },
    )


def read_cuts(bundle: Bundle, predictor: str, multiplier: float = 1.0) -> Cuts:
    """What save_cuts wrote, the thresholds times `multiplier`.

    Raises BundleError when the file is missing, damaged or another model's.
    """
    file = cuts_file(bundle.path, predictor)
    try:
        loaded = cast(dict[str, mx.array], mx.load(str(file)))
        cuts = [
            (np.array(loaded[f"{i:03d}.base"]), np.array(loaded[f"{i:03d}.threshold"]))
            for i in range(bundle.num_layers)
        ]
    except (RuntimeError, KeyError, ValueError) as problem:
        raise BundleError(f"{file}: not a file of thresholds ({problem}); calibrate again") from None
    for (base, threshold), layer in zip(cuts, bundle.manifest.layers, strict=True):
        good = base.shape == threshold.shape == (layer.units,) and base.dtype == threshold.dtype == np.float32
        if not good or not np.isfinite(base).all() or not (np.isfinite(threshold) & (threshold > 0)).all():
            raise BundleError(f"{file}: made for another model; calibrate again")
    return [(base, np.float32(multiplier) * threshold) for base, threshold in cuts]
