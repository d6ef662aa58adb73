"""What a model is asked to be: settings that contradict each other, what a bundle lacks for them, and what is left to
choose from."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxflash.bundle import Bundle, BundleError
from mlxflash.fidelity import DEFAULT, FIDELITIES, Level, levels_of, needs, sparsity_levels
from mlxflash.predictor import Predictor
from mlxflash.sketch import Sketch

STORED = {  # predictors that lie in a bundle: what to do where one is missing
    "low-bit": "convert again, or use --exact",
    "low-rank": "`mlxflash train` makes one",
    "sketch": "`mlxflash calibrate --predictor sketch` makes one",
    "bound": "`mlxflash calibrate --predictor bound` makes one",
}
RIVALS = {"low-bit": ("low-rank", "sketch"), "all": ("bound",)}  # predictors that may serve in the place of another
PREDICTORS = ("all", "oracle", *STORED)


@dataclass(frozen=True)
class Wishes:
    """Settings of load_bundle that say which units are read; None: what is best here."""

    predictor: str | Sequence[Predictor] | None = None
    window: int | None = None
    fidelity: str | None = None
    sparsity: int | None = None
    margin: float | None = None
    look_ahead: bool | None = None
    all_rows: bool | None = None

    def checked(self, bundle: Bundle) -> "Terms":
        """What the bundle can do of it. Raises ValueError (BundleError) with what is wrong or missing."""
        self._agree()
        own = None if self.predictor is None or isinstance(self.predictor, str) else list(self.predictor)
        self._are_there(bundle, own)
        predictor = self._leading(bundle)
        if self.sparsity:
            levels = sparsity_levels(bundle, self.sparsity)
        elif predictor in STORED and self.margin is None and self.fidelity != "exact":
            levels = needs(bundle, predictor, self.fidelity) if self.fidelity else levels_of(bundle, predictor, DEFAULT)
        elif self.fidelity not in (None, "exact"):
            raise ValueError(
                f"fidelity {self.fidelity!r} needs a stored predictor ({', '.join(STORED)}), not {predictor!r}"
            )
        else:
            levels = []
        gated = predictor == "sketch" and bundle.manifest.layout != "plain"  # whose products the fit does not foresee
        if self.look_ahead and (gated or predictor in ("low-rank", "bound")):
            raise ValueError("look-ahead is fitted to the low-bit predictor; use it, or no look-ahead")
        return Terms(self, own, {predictor: levels} | self._rivals(bundle, predictor))

    def _agree(self) -> None:
        """That no two of them contradict each other."""
        predictor, fidelity, margin = self.predictor, self.fidelity, self.margin
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window}: a window spans at least 1 token")
        if fidelity not in (None, *FIDELITIES):
            raise ValueError(f"fidelity {fidelity!r} is unknown: {', '.join(FIDELITIES)} are there")
        if fidelity is not None and margin is not None:
            raise ValueError("fidelity and margin contradict each other: give one")
        if self.sparsity and (predictor, fidelity, margin) != (None, None, None):
            raise ValueError("sparsity is a choice of units by itself: give no predictor, fidelity or margin beside it")
        if fidelity == "exact" and predictor not in (None, "all", "bound"):
            raise ValueError(f"fidelity 'exact' and predictor {predictor!r} contradict each other")
        if predictor == "bound" and (margin is not None or fidelity not in (None, "exact")):
            raise ValueError("predictor 'bound' is exact: it has neither levels of fidelity nor a margin")

    def _are_there(self, bundle: Bundle, own: list[Predictor] | None) -> None:
        """That the bundle has what its predictor needs, and units that one may be wrong about."""
        predictor, manifest = self.predictor, bundle.manifest
        if own is not None and len(own) != bundle.num_layers:
            raise ValueError(f"{len(own)} predictors for {bundle.num_layers} layers")
        if own is not None and len({isinstance(p, Sketch) for p in own}) > 1:
            raise ValueError("some of these predictors are sketches and some are not: all layers hold alike rows")
        if own is None and predictor not in (None, *PREDICTORS):
            raise ValueError(f"predictor {predictor!r} is unknown: {', '.join(PREDICTORS)} are there")
        if manifest.routed and (self.look_ahead or own is not None):
            bundle.require_sparse()
        if predictor == "sketch":
            bundle.require_neurons()
        elif predictor not in (None, "all") and (own is None or manifest.layout == "blocks"):
            bundle.require_sparse()
        if isinstance(predictor, str) and predictor in STORED and predictor not in bundle.predictors():
            raise BundleError(f"{bundle.path}: has no {predictor} predictor; {STORED[predictor]}")

    def _leading(self, bundle: Bundle) -> str:
        """The predictor that was asked for, or the one that every rival is compared with."""
        if self.sparsity:
            return "sketch"
        if bundle.manifest.routed:
            return "router"
        if isinstance(self.predictor, str):
            return self.predictor
        if self.predictor is not None:
            return "own"
        exact = self.fidelity == "exact" or not bundle.manifest.sparse
        return "all" if exact or "low-bit" not in bundle.predictors() else "low-bit"

    def _rivals(self, bundle: Bundle, predictor: str) -> dict[str, list[Level]]:
        """Predictors that may serve in the place of that one, where nobody asked for it, with their levels."""
        if self.predictor is not None or self.margin is not None or self.sparsity or self.look_ahead:
            return {}
        levels = {
            rival: levels_of(bundle, rival, self.fidelity or DEFAULT)
            for rival in RIVALS.get(predictor, ())
            if rival in bundle.predictors()
        }
        return {rival: measured for rival, measured in levels.items() if measured or rival == "bound"}


@dataclass(frozen=True)
class Terms:
    """What of the wishes a bundle can do."""

    wishes: Wishes
    own: list[Predictor] | None  # one per layer
    candidates: dict[str, list[Level]]  # predictors with their levels, of less and less held; the leading one first

    def sketched(self, predictor: str) -> bool:
        """Whether activations are a sketch's, so that rows hold only what is left of a unit."""
        own = self.own if predictor == "own" else None
        return predictor == "sketch" or (own is not None and isinstance(own[0], Sketch))
