"""Find levels of fidelity: how far the reading of active units can be thinned out for a stated cost.

The model runs over text with several thresholds at once: every sequence goes through as a batch whose first row is
exact and whose others leave out what their threshold says, in every layer: all of it, or what a simulated window does
not hold from earlier tokens. So each layer's weights are fetched once per chunk of text for all thresholds, and the
divergence of a row from the first is the price of its threshold.

What decides is the KL divergence, not the change of perplexity: on text as the model would write it itself they have
the same expectation, and the first is known after some hundred tokens where the second is noise of several times the
price. A level is met when KL, by its 95 % bound, is at most log(1 + change). The paired change of perplexity is
recorded beside it; on text that the model was trained on it is larger, since what was learnt by heart suffers most
(RESULTS.md).

Thresholds: leaving out a unit costs, to second order, sensitivity(layer) * (activation * |down row|)^2. The
sensitivities are measured by thinning one layer at a time; then the fewest reads for a given cost have one threshold
for activation * |down row| * sensitivity^(1/2) in all layers, the multiplier. Where a predictor misses too much of what
is active, the multiplier is below zero: units are read that are probably not active, as with a margin.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxflash.backends import FFN
from mlxflash.backends.metal import ACTIVATIONS
from mlxflash.bundle import HEADER_BYTES, Bundle
from mlxflash.evaluate import Progress, spread
from mlxflash.fidelity import LEVELS, Cuts, Level
from mlxflash.flash import FlashModel
from mlxflash.misses import SHARES, computed, miss_curve, simulated
from mlxflash.models import family_of
from mlxflash.predictor import Projection, floats, part_matrix
from mlxflash.resident import one_part

DROPPED = 0.3  # of the active units, the least important, left out to measure a layer's sensitivity
PRICES = (0.00002, 0.0001, 0.0004, 0.001, 0.003, 0.008, 0.02)  # nats expected where the curve is measured first
AIMED = 2  # times that levels are looked for between the points there are
AIM = 0.9  # of a level's price, where the curve says that it is
BOUND = 1.65  # standard errors: one-sided 95 %
GRID = np.concatenate((-np.geomspace(1, 1e-4, 200), np.geomspace(1e-4, 1, 200)))  # below 0 are units likely not active
LEAST_CHUNK = 16
Keep = Callable[[int, np.ndarray, np.ndarray], Any]  # row, x [tokens, d_model], activations: which units are computed


@dataclass(frozen=True)
class Point:
    """One multiplier, as `Level` has it."""

    multiplier: float
    kl: float
    kl_se: float
    ppl_change: float
    ppl_change_se: float
    top1: float

    def meets(self, change: float) -> bool:
        """Whether this is within a change of perplexity, as far as the text can tell."""
        return bool(self.kl + BOUND * self.kl_se <= np.log1p(change))


class Weights:
    """One layer's FFN as float32 on the host: `first` and `down`, [units, d_model], and `up` where it is gated."""

    def __init__(self, bundle: Bundle, index: int):
        ffn, units = FFN.of(bundle.manifest), bundle.manifest.layers[index].units
        stride = ffn.record.stride
        raw = np.fromfile(bundle.layer_path(index), np.uint8, units * stride, offset=HEADER_BYTES).reshape(-1, stride)
        self._parts = {name: floats(part_matrix(ffn, raw, name)) for name in {ffn.first, "up", "down"}}
        self.first, self.up, self.down = self._parts[ffn.first], self._parts["up"], self._parts["down"]
        self._bias, self._up_bias = (one_part(bundle, index, f"{name}_bias", units) for name in (ffn.first, "up"))
        self._ffn = ffn

    def activations(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [tokens, d_model] to the deciding products, active above 0, and to what multiplies the down rows: [tokens,
        units] both."""
        ffn, products = self._ffn, x @ self.first.T + self._bias
        if ffn.activation == "fatrelu":
            out = products * (products > ffn.threshold)
        else:
            out = np.array(ACTIVATIONS[ffn.activation](mx.array(products)))
        if ffn.layout == "gated":
            up = x @ self.up.T + self._up_bias
            out = out * (np.maximum(up, 0) if ffn.activation == "drelu" else up)
        return products - np.float32(ffn.threshold), out


class Thin(nn.Module):
    """Stands for an FFN: row r of a batch computes the units that `keep(r, x, activations)` says, row 0 all."""

    def __init__(self, bundle: Bundle, index: int, bias: mx.array | None, keep: Keep):
        super().__init__()
        self._bundle, self._index, self._bias, self._keep = bundle, index, bias, keep

    def __call__(self, x: mx.array) -> mx.array:
        weights = Weights(self._bundle, self._index)
        rows = []
        for r, row in enumerate(np.array(x.astype(mx.float32))):
            _, a = weights.activations(row)
            if r:
                a = a * self._keep(r, row, a)
            rows.append(a @ weights.down)
        y = mx.array(np.stack(rows)).astype(x.dtype)
        return y if self._bias is None else y + self._bias


class _Layer:
    """What one layer's units are worth: `down`, output per unit of activation; the predictor's estimate of what they
    add, `slope * (score - base) * norm`; and how much energy lies in the active units below any estimate."""

    def __init__(
        self,
        bundle: Bundle,
        index: int,
        x: np.ndarray,
        fitted: int,
        predictor: Projection,
        base: Any,
    ):
        """x [tokens, d_model], of which the first `fitted` are for thresholds. base: [units], or None to fit it and the
        slope to the products, for scores that are no estimates of them."""
        weights = Weights(bundle, index)
        products, a = weights.activations(x)
        self._x, self._predictor = x, predictor
        score = self.scores()
        if base is None:
            self.base, self.slope = _line(score[:fitted], products[:fitted])
        else:
            self.base, self.slope = base, np.ones(len(base), np.float32)
        self.down = np.linalg.norm(weights.down, axis=1).astype(np.float32) + np.float32(1e-6)
        self.norm = self.down
        importance = np.abs(a) * self.down
        never_zero = not bundle.manifest.sparse  # every unit counts then, and the estimate is of |a|
        active = np.full(a.shape, True) if never_zero else products > 0
        if never_zero or weights.up is not weights.first:  # what multiplies a gate is not known before the read: a mean
            known = score if never_zero else np.maximum(products, 1e-6)
            share = (np.abs(a) * active).sum(axis=0) / np.maximum((known * active).sum(axis=0), 1e-6)
            share = np.where(active.any(axis=0), share, share[active.any(axis=0)].mean())
            self.norm = np.maximum(self.norm * share, np.float32(1e-6))  # a unit may be dead
        there = importance[active]
        self.least = float(np.quantile(there, DROPPED)) if len(there) else 0.0
        self.dropped = float(np.square(importance * (importance < self.least))[:fitted].sum() / fitted)
        estimated = self.slope * (score - self.base) * self.norm
        self.edges = GRID * max(float(np.abs(estimated).max()), 1e-6)
        found = np.histogram(estimated, self.edges, weights=np.square(importance))[0] / len(x)
        self.left_out = np.concatenate(([0.0], np.cumsum(found)))

    def scores(self) -> np.ndarray:
        return self.project(self._x)

    def project(self, x: np.ndarray) -> np.ndarray:
        """The predictor's scores, float32 [tokens, units]."""
        return self._predictor.estimates(mx.array(x))()

    def flags(self, scale: float, multiplier: float) -> np.ndarray:
        """What the predictor flags on the text: bool [tokens, units]."""
        return self.scores() > self.base + multiplier * self.threshold(scale)

    def threshold(self, scale: float) -> np.ndarray:
        return (scale / (self.norm * self.slope)).astype(np.float32)


def _line(score: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit, where the line through (score, product) is zero and its slope, float32 [units]."""
    middle, centre = score.mean(axis=0), products.mean(axis=0)
    spread_of = np.square(score - middle).mean(axis=0)
    slope = ((score - middle) * (products - centre)).mean(axis=0) / np.maximum(spread_of, 1e-9)
    usual = float(np.median(slope[slope > 0])) if (slope > 0).any() else 1.0
    slope = np.clip(slope, usual / 30, usual * 30)  # units that never move have none
    return (middle - centre / slope).astype(np.float32), slope.astype(np.float32)


def find_levels(
    bundle: Bundle,
    model: FlashModel,
    predictors: Sequence[tuple[Projection, np.ndarray | None]],
    inputs: list[np.ndarray],
    sequences: list[np.ndarray],
    *,
    held: tuple[int, ...] | None = None,
    left_out: Sequence[int] = (),
    progress: Progress = lambda what, done, total: None,
) -> tuple[Cuts, dict[str, Any]]:
    """Thresholds of every layer, and what the manifest says of them: the curve's points, and levels.

    model: the bundle's, exact; its FFNs are replaced. predictors: each layer's, and what its estimate is compared with
    where that estimates the deciding product, [units] (None: any score). inputs: what the FFNs are given
    for all but the last token of each of `sequences`, float32 [tokens, d_model]; the first half of the sequences makes
    thresholds, the others are reported on. held: units that each layer's window holds (None: nothing from earlier
    tokens). left_out: instead of a level for each price, one for each of these percentages of all units.
    """
    count = bundle.num_layers
    half = max(1, len(sequences) // 2)
    made, reported = sequences[:half], sequences[half:] or sequences
    fitted = sum(len(s) - 1 for s in made)
    layers = []
    for index, x in enumerate(inputs):
        progress("importance", index, count)
        layers.append(_Layer(bundle, index, x, fitted, *predictors[index]))
    progress("importance", count, count)

    def least(index: int) -> Keep:
        layer = layers[index]
        return lambda r, x, a: np.abs(a) * layer.down >= layer.least if r == index + 1 else True

    found = _measure(bundle, model, least, count, made, "sensitivity", progress)
    cost = np.maximum([p.kl for p in found], 1e-9) / np.maximum([layer.dropped for layer in layers], 1e-12)
    scale = 1 / np.sqrt(cost)
    scale /= np.exp(np.log(scale).mean())
    cuts = [(layer.base, layer.threshold(s)) for layer, s in zip(layers, scale.tolist(), strict=True)]

    def measured(multipliers: list[float]) -> list[Point]:
        def predicted(index: int) -> Keep:
            base, threshold = cuts[index]
            windows = [simulated(len(base), held[index]) for _ in multipliers] if held else None

            def keep(r: int, x: np.ndarray, _: np.ndarray) -> np.ndarray:
                flags = layers[index].project(x) > base + np.float32(multipliers[r - 1]) * threshold
                return computed(windows[r - 1], flags) if windows else flags

            return keep

        points = _measure(bundle, model, predicted, len(multipliers), reported, "thresholds", progress)
        return [replace(p, multiplier=m) for p, m in zip(points, multipliers, strict=True)]

    if left_out:
        points = measured(_leaving_out(layers, scale, fitted, left_out))
        chosen = {str(percent): (p, True) for percent, p in zip(left_out, points, strict=True)}
    else:
        points = measured(_multipliers(layers, scale, cost))
        for _ in range(AIMED):
            points = sorted(points + measured(_aimed(points)), key=lambda p: p.multiplier)
        chosen = {name: _cheapest(points, change) for name, change in LEVELS.items()}
    levels = {}
    for name, (best, met) in chosen.items():
        flags = [layer.flags(s, best.multiplier) for layer, s in zip(layers, scale.tolist(), strict=True)]
        flagged, share = (
            float(np.mean([f.mean() for f in flags])),
            sum(held) / sum(len(c[0]) for c in cuts) if held else 0.0,
        )
        level = Level(name, met=met, flagged=flagged, held=share, **asdict(best))
        curves = {"shares": SHARES, "layers": [miss_curve(f).misses for f in flags]}
        levels[name] = {k: v for k, v in asdict(level).items() if k != "name"} | {"misses": curves}
    tokens = sum(len(s) - 1 for s in reported)
    return cuts, {"tokens": tokens, "levels": levels, "points": [asdict(p) for p in points]}


def _cheapest(points: list[Point], change: float) -> tuple[Point, bool]:
    """Of points by multiplier the last that is within a change of perplexity, or the nearest; whether there is one."""
    good = [p for p in points if p.meets(change)]
    return good[-1] if good else min(points, key=lambda p: p.kl), bool(good)


def _leaving_out(layers: list[_Layer], scale: np.ndarray, fitted: int, percents: Sequence[int]) -> list[float]:
    """Multipliers at which so many of all units are left out of the first `fitted` tokens."""
    grid = np.linspace(0, 1, 1001)
    at = [
        np.quantile(layer.scores()[:fitted] / layer.threshold(s), grid) for layer, s in zip(layers, scale, strict=True)
    ]
    return [float(m) for m in np.quantile(at, np.array(percents) / 100)]


def _multipliers(layers: list[_Layer], scale: np.ndarray, cost: np.ndarray) -> list[float]:
    """Where PRICES are to be expected, by the energy of what is left out."""
    tried = GRID * max(layer.edges[-1] / s for layer, s in zip(layers, scale, strict=True))
    expected = sum(
        c * np.interp(tried * s, layer.edges, layer.left_out) for layer, s, c in zip(layers, scale, cost, strict=True)
    )
    return sorted({float(tried[min(int(np.searchsorted(expected, p)), len(tried) - 1)]) for p in PRICES})


def _aimed(points: list[Point]) -> list[float]:
    """Multipliers that should just meet each level, between measured ones on a line."""
    rising = sorted(points, key=lambda p: p.multiplier)
    kl = np.maximum.accumulate([np.log(max(p.kl + BOUND * p.kl_se, 1e-9)) for p in rising])
    at = [p.multiplier for p in rising]
    return sorted({float(np.interp(np.log(AIM * np.log1p(change)), kl, at)) for change in LEVELS.values()})


def _measure(
    bundle: Bundle,
    model: FlashModel,
    keep_of: Callable[[int], Keep],
    rows: int,
    sequences: list[np.ndarray],
    what: str,
    progress: Progress,
) -> list[Point]:
    """What each of `rows` ways to thin, `keep_of(layer)(row + 1, ...)`, costs on the sequences."""
    family, *_ = family_of(bundle.config(), str(bundle.path))
    for index, layer in enumerate(model.layers):
        bias = model.flash.layers[index].down_bias
        setattr(layer, family.ffn, Thin(bundle, index, bias, keep_of(index)))
    kl: list[np.ndarray] = []
    worse: list[np.ndarray] = []
    same: list[np.ndarray] = []
    step = max(LEAST_CHUNK, model.flash.plan.prefill_tokens // (rows + 1))
    done, total = 0, sum(len(s) - 1 for s in sequences)
    for sequence in sequences:
        cache = make_prompt_cache(model)
        for i in range(0, len(sequence) - 1, step):
            progress(what, done, total)
            tokens, targets = sequence[i : i + step][: len(sequence) - 1 - i], sequence[i + 1 : i + 1 + step]
            logits = model(mx.array(np.repeat(tokens[None], rows + 1, axis=0)), cache=cache).astype(mx.float32)
            logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            exact, thin = logprobs[0], logprobs[1:]
            at = np.arange(len(targets))
            kl.append((np.exp(exact) * (exact - thin)).sum(axis=-1))
            worse.append(exact[at, targets] - thin[:, at, targets])
            same.append(thin.argmax(axis=-1) == exact.argmax(axis=-1))
            done += len(targets)
    progress(what, total, total)
    points = []
    for k, w, s in zip(*(np.concatenate(part, axis=1) for part in (kl, worse, same)), strict=True):
        if not np.isfinite(k).all():
            raise ValueError(f"{bundle.path}: the model gives NaN or infinity on the calibration text")
        points.append(Point(0.0, float(k.mean()), spread(k), float(np.expm1(w.mean())), spread(w), float(s.mean())))
    return points
