"""Measure a bundle's predictor on text: what the estimate misses, what it costs, how many units tokens want.

One exact pass over the text records every FFN's input; each layer's deciding products are then computed exactly and
estimated, one layer in memory at a time. The first half of the text sets the errors, the second half is reported,
perplexity included, through the decode path without any row left over from earlier tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import FFN, Backend, Matrix, make_backend
from mlxflash.bound import make_bound
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError, write_manifest
from mlxflash.decode import reserved_cache
from mlxflash.evaluate import LEAST_TOKENS, check_length, decode_losses, perplexity, prompt_losses
from mlxflash.fidelity import SPARSITIES, save_cuts
from mlxflash.flash import FlashModel
from mlxflash.lookahead import AHEAD_MARGIN, Fit, save_look_ahead
from mlxflash.misses import SHARES, MissCurve, miss_curve
from mlxflash.model import load_bundle
from mlxflash.models import max_positions
from mlxflash.predictor import MARGIN, deciding_matrix, read_low_bit, read_low_rank, save_low_bit
from mlxflash.resident import one_part
from mlxflash.sketch import Answer, answer, save_sketch
from mlxflash.thinning import Guess, draw_sketches, find_levels
from mlxflash.wishes import STORED

OWN_SEQUENCES = 8
HELD = 0.5  # of a layer's bytes: what a bound and its units are taken to have where no memory is named
Progress = Callable[[str, int, int], None]


class Recorder(nn.Module):
    """Stands before an FFN and keeps what it is given, float32 [tokens, d_model]."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self._ffn = ffn
        self._seen: list[np.ndarray] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32)))
        return self._ffn(x)

    def inputs(self) -> np.ndarray:
        return np.concatenate(self._seen)

    def take(self) -> np.ndarray:
        """What was kept since the last call."""
        x, self._seen = self.inputs(), []
        return x


def calibrate(
    bundle: Bundle,
    tokens: np.ndarray | None = None,
    *,
    num_tokens: int = 256,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
    predictor: str = "low-bit",
    levels: bool = True,
    left_out: Sequence[int] = (),
) -> Bundle:
    """Measure a stored predictor on `tokens` (int [n]; None: text the model makes up itself) and record it; `bound` and
    `sketch` are made first, of the model and the first half of the text. `left_out`: where no unit is ever zero, make a
    sketch and measure what leaving out these percentages of the units costs.

    At most `num_tokens` are used, in sequences no longer than the model's positions. `levels` finds the levels of
    fidelity too, which takes some fifty passes over half of the text. Returns the bundle, reopened.
    Raises ValueError when the text is too short or an activation is not a number (names the layer).
    """
    if left_out:
        bundle.require_never_zero()
        if wrong := [p for p in left_out if p not in SPARSITIES]:
            raise ValueError(f"sparsity {wrong[0]}: a percentage of the units, 1 to 99")
        predictor = "sketch"
    if predictor == "sketch":
        bundle.require_neurons()
        if bundle.manifest.d_model % 32:
            raise BundleError(
                f"{bundle.path}: a width of {bundle.manifest.d_model} is not in groups of 32, which a sketch needs"
            )
    else:
        bundle.require_sparse()
    if predictor not in ("bound", "sketch", *bundle.predictors()):
        raise BundleError(f"{bundle.path}: has no {predictor} predictor to calibrate; {STORED[predictor]}")
    if tokens is not None:
        check_length(tokens)
    source = "text" if tokens is not None else "the model's own text"
    if predictor == "sketch":
        percents = sorted(set(left_out))
        return _draw(bundle, tokens, num_tokens, memory, device, progress, source, percents)
    with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
        sequences = sequences_of(model, tokens, num_tokens, progress)
        recorders = record_inputs(model)
        exact = []
        for i, sequence in enumerate(sequences):
            progress("exact pass", i, len(sequences))
            exact.append(prompt_losses(model, sequence))
        progress("exact pass", len(sequences), len(sequences))
        inputs = [recorder.inputs() for recorder in recorders]
        plan = model.flash.plan
        if plan.whole:  # what is held whole needs no predictor, so leave some of it out
            memory = plan.memory - plan.pools // 4
    share = HELD if memory is None or plan.whole else plan.pools / plan.streamed
    layers, ahead, curves = [], [], []
    for index, x in enumerate(inputs):
        progress("layers", index, len(inputs))
        before = inputs[index - 1] if index and predictor == "low-bit" else None
        measured, early, wanted = _measure_layer(bundle, index, x, before, device, predictor, share)
        layers.append(measured)
        curves.append(miss_curve(wanted))
        ahead += [early] if early else []
    progress("layers", len(inputs), len(inputs))
    half = max(1, len(sequences) // 2)
    reported = sequences[half:] or sequences
    losses, total = [], sum(len(s) - 1 for s in reported)
    margin = None if predictor == "bound" else MARGIN
    with load_bundle(
        bundle.path, memory=memory, window=1, predictor=predictor, device=device, margin=margin, bundle=bundle
    ) as model:
        if not model.flash.exact:
            for sequence in reported:
                model.flash.forget()
                for loss in decode_losses(model, sequence):
                    losses.append(loss)
                    progress("decode pass", len(losses), total)
    dense = perplexity(np.concatenate(exact[half:] or exact))
    change = perplexity(np.array(losses)) / dense - 1 if losses else 0.0
    active, hit = sum(r["active"] for r in layers), sum(r["active"] * r["recall"] for r in layers)
    result: dict[str, Any] = {
        predictor: {
            "recall": hit / active if active else 1.0,
            "flagged": float(np.mean([r["flagged"] for r in layers])),
            "active": float(np.mean([r["active"] for r in layers])),
            "perplexity": dense,
            "perplexity_change": change,
            "tokens": total,
            "text": source,
            "margin": MARGIN,
            "layers": layers,
            "misses": {"shares": SHARES, "layers": [c.misses for c in curves]},
        },
    }
    if ahead:
        result["look-ahead"] = {
            "recall": sum(r["recall"] * r["active"] for r in ahead) / max(1e-9, sum(r["active"] for r in ahead)),
            "flagged": float(np.mean([r["flagged"] for r in ahead])),
            "active": float(np.mean([r["active"] for r in ahead])),
            "margin": AHEAD_MARGIN,
            "layers": ahead,
        }
    fidelity = bundle.manifest.calibration.get("fidelity", {})
    result["fidelity"] = {name: said for name, said in fidelity.items() if name != predictor}  # errors were set anew
    if levels and predictor != "bound":
        with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
            guesses = _guesses(bundle, predictor, make_backend(device))
            cuts, found = find_levels(bundle, model, guesses, inputs, sequences, tuple(curves), progress=progress)
        save_cuts(bundle.path, predictor, cuts)
        result["fidelity"][predictor] = found | {"text": source}
    write_manifest(bundle.path, replace(bundle.manifest, calibration=bundle.manifest.calibration | result))
    return Bundle.open(bundle.path)


def _draw(
    bundle: Bundle,
    tokens: np.ndarray | None,
    num_tokens: int,
    memory: str | int | None,
    device: str | None,
    progress: Progress,
    source: str,
    left_out: Sequence[int],
) -> Bundle:
    """Make and measure sketches: as calibrate."""
    backend, ffn = make_backend(device), FFN.of(bundle.manifest)
    folder = bundle.path / "predictors" / "sketch"
    with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
        sequences = sequences_of(model, tokens, num_tokens, progress)
        recorders = record_inputs(model)
        for i, sequence in enumerate(sequences):
            progress("exact pass", i, len(sequences))
            mx.eval(model(mx.array(sequence[None, :-1])))
        progress("exact pass", len(sequences), len(sequences))
        inputs = [recorder.inputs() for recorder in recorders]
        for index, x in enumerate(inputs):
            if not np.isfinite(x).all():
                raise ValueError(f"{bundle.path}: layer {index} is given NaN or infinity on the calibration text")
        sketches, kl = draw_sketches(bundle, model, inputs, sequences, device, progress)
        guesses, curves = list[Guess](), list[MissCurve]()
        for products, x in zip(sketches, inputs, strict=True):
            answers = answer(backend, ffn, products)
            guesses.append(Guess.of_sketch(answers, len(products[0][1])))
            curves.append(miss_curve(answers(x) != 0))
        cuts, found = find_levels(
            bundle, model, guesses, inputs, sequences, tuple(curves), left_out=left_out, progress=progress
        )
    for index, products in enumerate(sketches):
        save_sketch(folder / f"{index:03d}.safetensors", ffn, products)
    save_cuts(bundle.path, "sketch", cuts)
    said = bundle.manifest.calibration
    result: dict[str, Any] = {
        "sketch": {
            "bits": [products[0][0].bits for products in sketches],
            "kl": kl,
            "text": source,
            "misses": {"shares": SHARES, "layers": [c.misses for c in curves]},
        },
        "fidelity": said.get("fidelity", {}) | {"sketch": found | {"text": source}},
    }
    write_manifest(bundle.path, replace(bundle.manifest, calibration=said | result))
    return Bundle.open(bundle.path)


def _guesses(bundle: Bundle, predictor: str, backend: Backend) -> list[Guess]:
    """Each layer's predictor as find_levels takes it."""

    def score(*matrices: Matrix) -> Answer:
        return lambda x: backend.project(mx.array(x), *matrices)()

    ffn, out = FFN.of(bundle.manifest), list[Guess]()
    for index, (file, layer) in enumerate(zip(bundle.predictor_files(predictor), bundle.manifest.layers, strict=True)):
        if predictor == "low-rank":
            inner, outer, _ = read_low_rank(file, ffn, layer)
            out.append(Guess(score(inner, outer)))
        else:
            matrix, shift, _ = read_low_bit(file, ffn, layer)
            bias = one_part(bundle, index, f"{ffn.first}_bias", layer.units)
            out.append(Guess(score(matrix), shift - ffn.offset(bias, layer.units)))
    return out


def exact_inputs(
    bundle: Bundle, tokens: np.ndarray, memory: str | int | None, device: str | None, progress: Progress
) -> list[np.ndarray]:
    """What each layer's FFN is given on a text, float32 [tokens, d_model], by one exact pass."""
    with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
        sequences = sequences_of(model, tokens, len(tokens), progress)
        recorders = record_inputs(model)
        for i, sequence in enumerate(sequences):
            progress("exact pass", i, len(sequences))
            mx.eval(model(mx.array(sequence[None])))
        progress("exact pass", len(sequences), len(sequences))
        return [recorder.inputs() for recorder in recorders]


def sequences_of(
    model: FlashModel, tokens: np.ndarray | None, num_tokens: int, progress: Progress, seconds: float = math.inf
) -> list[np.ndarray]:
    """Text, int [n] (None: what the exact model samples in so many seconds), in pieces to measure on."""
    longest = min(512, max_positions(model.flash.bundle.config()), model.flash.plan.context)
    if tokens is None:
        return _own_text(model, min(max(2, num_tokens // OWN_SEQUENCES), longest), progress, seconds)
    length = min(longest, max(2, min(num_tokens, len(tokens)) // 2))
    tokens = tokens[:num_tokens]
    return [tokens[i : i + length] for i in range(0, len(tokens) - 1, length) if len(tokens) - i > 1]


def _own_text(model: FlashModel, length: int, progress: Progress, seconds: float) -> list[np.ndarray]:
    """Sequences the exact model samples at temperature 1 from different first tokens: int [length] each, or as many
    tokens as it has time for, LEAST_TOKENS in all at least."""
    rng = np.random.default_rng(0)
    vocabulary = int(model.flash.bundle.config()["vocab_size"])
    steps = [rng.integers(0, vocabulary, OWN_SEQUENCES)]
    cache, end = reserved_cache(model, None, length), time.monotonic() + seconds
    for i in range(length - 1):
        if time.monotonic() > end and len(steps) * OWN_SEQUENCES >= LEAST_TOKENS:
            break
        progress("own text", i, length - 1)
        logits = model(mx.array(steps[-1][:, None]), cache=cache)[:, -1].astype(mx.float32)
        noise = rng.gumbel(size=logits.shape).astype(np.float32)
        steps.append(np.argmax(np.array(logits) + noise, axis=-1))
    progress("own text", length - 1, length - 1)
    return list(np.stack(steps, axis=1))


def record_inputs(model: FlashModel) -> list[Recorder]:
    """Put a Recorder before every FFN."""
    recorders = []
    for layer in model.flash.owners:
        name = next(name for name, module in layer.children().items() if type(module).__name__ == "FlashFFN")
        recorders.append(Recorder(getattr(layer, name)))
        setattr(layer, name, recorders[-1])
    return recorders


def _measure_layer(
    bundle: Bundle,
    index: int,
    x: np.ndarray,
    before: np.ndarray | None,
    device: str | None,
    predictor: str,
    share: float,
) -> tuple[dict[str, float], dict[str, float] | None, np.ndarray]:
    """Set a layer's errors (low-bit) from the first half of x [tokens, d_model]; measure the second half.

    The third value is what all tokens want, bool [tokens, units].
    From `before`, what the layer before was given for the same tokens, the look-ahead to this layer is fitted. A bound
    is made where predictor and units will take `share` of the layer's bytes.
    """
    if not np.isfinite(x).all():
        raise ValueError(f"{bundle.path}: layer {index} is given NaN or infinity on the calibration text")
    backend, ffn = make_backend(device), FFN.of(bundle.manifest)
    units, stride = bundle.manifest.layers[index].units, ffn.record.stride
    raw = np.fromfile(bundle.layer_path(index), np.uint8, units * stride, offset=HEADER_BYTES)
    exact = deciding_matrix(ffn, raw.reshape(units, stride))
    bias = ffn.offset(one_part(bundle, index, f"{ffn.first}_bias", units), units)

    def products(x: np.ndarray, *weights: Matrix) -> np.ndarray:
        return backend.project(mx.array(x), *weights)()

    true, half = products(x, exact) + bias, max(1, len(x) // 2)
    active = true > 0
    if predictor == "bound":
        wanted = make_bound(bundle, index, backend, exact, bias, x[:half], share).possible(mx.array(x))()
        return _measured(active[half:], wanted[half:]), None, wanted
    file = bundle.predictor_files(predictor)[index]
    if predictor == "low-rank":
        inner, outer, offset = read_low_rank(file, ffn, bundle.manifest.layers[index])
        wanted = products(x, inner, outer) + offset + MARGIN > 0
        return _measured(active[half:], wanted[half:]), None, wanted
    matrix, _, _ = read_low_bit(file, ffn, bundle.manifest.layers[index])
    estimate = products(x, matrix) + bias
    shift, error = _errors(estimate[:half], true[:half])
    save_low_bit(file, matrix, shift, error)
    wanted = estimate - shift + MARGIN * error > 0
    measured = _measured(active[half:], wanted[half:])
    if before is None or len(x) < LEAST_TOKENS:
        return measured, None, wanted
    fit = Fit.of(before[:half], x[:half])
    estimate = products(fit(before), matrix) + bias
    most = half + (len(x) - half) // 2  # the fitted half would say too little of the error
    shift, error = _errors(estimate[half:most], true[half:most])
    folder = bundle.path / "predictors" / "look-ahead"
    save_look_ahead(folder / f"{index - 1:03d}.safetensors", fit, shift, error)
    return measured, _measured(active[most:], estimate[most:] - shift + AHEAD_MARGIN * error > 0), wanted


def _errors(estimate: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of each unit's estimate: [units] of [tokens, units]."""
    return (estimate - true).mean(axis=0), (estimate - true).std(axis=0)


def _measured(active: np.ndarray, flagged: np.ndarray) -> dict[str, float]:
    return {
        "active": float(active.mean()),
        "flagged": float(flagged.mean()),
        "recall": float((active & flagged).sum() / max(1, active.sum())),
    }
