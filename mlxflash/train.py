"""Train the paper's low-rank predictor of a bundle on text: two small matrices per layer that say which units fire.

The model's own FFN inputs are recorded by an exact pass, on disk; then one layer after the other is trained on them,
in the memory of that layer. All that is done lies in `BUNDLE/training`, so an interrupted run goes on where it was;
only a predictor that is whole is moved to `predictors/low-rank`.

Source: LLM in a flash (arXiv 2312.11514), "Predicting ReLU Sparsity". Ours in addition: training starts at the
reduced-rank regression of the products, which is most of the way, and the factors are kept in 8 bits.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxflash.backends import Backend, Matrix, make_backend
from mlxflash.bundle import Bundle
from mlxflash.calibrate import Progress, calibrate, record_inputs
from mlxflash.model import load_bundle
from mlxflash.predictor import MARGIN, deciding, floats, low_bit_matrix, save_arrays, save_low_rank

LEAST_SEQUENCES = 4
RECALL = 0.96  # what the stored offsets reach at MARGIN, on inputs held out from training
GOOD_ENOUGH = 1.2  # flagged over active units at RECALL that the start of a rank must reach to be chosen
BATCH, EPOCHS, RATE = 1024, 12, 2e-3
LEAST_GAIN = 0.001  # an epoch that lowers flagged over active by less is the last
MOST_BALANCE = 30.0  # times that a missed unit may count against a needless one
BITS = 8  # of the factors: half the memory of float16 for 0.2 % more flagged units (RESULTS.md)
HELD_OUT_TOKENS = 4096
CHUNK = 1024

Steps = Callable[[int, int], None]  # progress: done, total


@dataclass
class Factors:
    """Log-odds of a unit's firing: (x inner^T) outer^T + offset; [rank, d_model], [units, rank], [units]."""

    inner: np.ndarray
    outer: np.ndarray
    offset: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [tokens, d_model] to log-odds [tokens, units], float32."""
        return (x.astype(np.float32) @ self.inner.T) @ self.outer.T + self.offset


def train(
    bundle: Bundle,
    sequences: list[np.ndarray],
    *,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Train `low-rank` on `sequences` (int [n] tokens each; the last is kept to report on) and measure it.

    Goes on where an interrupted call with the same text was. Returns the bundle, reopened. Raises ValueError where
    units are never zero, for a width that factors do not fit, too little text, too little disk, NaN activations
    (names the layer).
    """
    bundle.require_sparse()
    if bundle.manifest.d_model % 32:
        raise ValueError(f"{bundle.path}: width {bundle.manifest.d_model} is not in groups of 32, as 8-bit factors are")
    if len(sequences) <= LEAST_SEQUENCES or min(map(len, sequences)) < 2:
        raise ValueError(f"{len(sequences)} sequences of text are too few to train on: at least {LEAST_SEQUENCES + 1}")
    *used, reported = sequences
    folder = bundle.path / "training"
    _open_folder(folder, bundle, used)
    record(bundle, used, folder, memory, device, progress)
    backend = make_backend(device)
    xp = mx if device == "mlx-cpu" or backend.name == "metal" else np  # NumPy's BLAS outruns MLX's CPU ninefold
    (folder / "low-rank").mkdir(exist_ok=True)
    for index in range(bundle.num_layers):
        file = folder / "low-rank" / f"{index:03d}.safetensors"
        if not file.exists():
            progress_of = _Named(progress, f"layer {index}")
            _train_layer(bundle, index, folder, file, backend, xp, progress_of)
    target = bundle.path / "predictors" / "low-rank"
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    (folder / "low-rank").rename(target)
    shutil.rmtree(folder)
    return calibrate(
        bundle,
        reported,
        num_tokens=len(reported),
        memory=memory,
        device=device,
        progress=progress,
        predictor="low-rank",
    )


def stretches(text: str, encode: Callable[[str], list[int]], num_tokens: int, length: int) -> list[np.ndarray]:
    """Sequences of `length` tokens from all over a text, `num_tokens` or more in all; what there is of a short one."""
    span = 12 * length  # characters; more than tokens have
    count = max(LEAST_SEQUENCES, -(-num_tokens // length)) + 1
    if len(text) < count * span:  # no room to choose from
        tokens = np.array(encode(text[: count * span]), np.int64)[: count * length]
        length = min(length, len(tokens) // (LEAST_SEQUENCES + 1))
        if length < 2:
            raise ValueError(f"a training text of {len(tokens)} tokens is too short: give some thousands")
        return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    begins = np.linspace(0, len(text) - span, count).astype(int)
    found = [
        np.array(encode(text[i : i + span])[1 : length + 1], np.int64) for i in begins
    ]  # a first may be half a word
    return [tokens for tokens in found if len(tokens) > 1]


class _Named:
    """Progress of one layer."""

    def __init__(self, progress: Progress, what: str):
        self._progress, self._what = progress, what

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._what, done, total)


def _open_folder(folder: Path, bundle: Bundle, sequences: list[np.ndarray]) -> None:
    """Keep what an earlier run on the same text left, else start afresh; see that the recordings will fit."""
    text = zlib.crc32(np.concatenate(sequences).astype("<i8").tobytes())
    state = {"text": text, "lengths": [len(s) for s in sequences], "source": bundle.manifest.source}
    file = folder / "state.json"
    try:
        same = json.loads(file.read_text()) == state
    except (OSError, ValueError):
        same = False
    if same:
        return
    if folder.exists():
        shutil.rmtree(folder)
    tokens = sum(map(len, sequences))
    needed, free = 2 * tokens * bundle.manifest.d_model * bundle.num_layers, shutil.disk_usage(bundle.path).free
    if needed > free:
        raise ValueError(
            f"{bundle.path}: recording {tokens} tokens takes {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f}: "
            f"use fewer --tokens"
        )
    folder.mkdir()
    part = file.with_suffix(".part")
    part.write_text(json.dumps(state))
    part.replace(file)


def inputs_file(folder: Path, index: int) -> Path:
    return folder / f"inputs-{index:03d}.f16"


def record(
    bundle: Bundle,
    sequences: list[np.ndarray],
    folder: Path,
    memory: str | int | None,
    device: str | None,
    progress: Progress,
) -> None:
    """Append every FFN's input to its file in `folder`, float16 [tokens, d_model], from where an earlier run was."""
    row = 2 * bundle.manifest.d_model
    files = [inputs_file(folder, i) for i in range(bundle.num_layers)]
    ends = np.cumsum([len(s) for s in sequences])
    tokens = min(f.stat().st_size // row if f.exists() else 0 for f in files)
    done = int(np.searchsorted(ends, tokens, "right"))
    if done == len(sequences):
        return
    for file in files:  # a run that was killed may have written some layers' part of a sequence
        with open(file, "ab") as f:
            f.truncate(row * int(ends[done - 1]) if done else 0)
    with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
        recorders = record_inputs(model)
        for i in range(done, len(sequences)):
            progress("recording", i, len(sequences))
            mx.eval(model(mx.array(sequences[i][None])))
            for index, (file, recorder) in enumerate(zip(files, recorders, strict=True)):
                x = recorder.take()
                if not np.isfinite(x).all():
                    raise ValueError(f"{bundle.path}: layer {index} is given NaN or infinity on this text")
                with open(file, "ab") as f:
                    np.clip(x, -65504, 65504).astype(np.float16).tofile(f)
    progress("recording", len(sequences), len(sequences))


def _train_layer(
    bundle: Bundle,
    index: int,
    folder: Path,
    file: Path,
    backend: Backend,
    xp: Any,
    progress: Callable[[int, int], None],
) -> None:
    x = np.memmap(inputs_file(folder, index), np.float16, "r").reshape(-1, bundle.manifest.d_model)
    exact, weight, bias = deciding(bundle, index)
    active = _pack(x, exact, bias, backend)
    held_out = min(HELD_OUT_TOKENS, len(x) // 4)
    test = x[-held_out:], np.unpackbits(active[-held_out:], axis=1, count=len(bias)).astype(bool)
    x, active = x[:-held_out], active[:-held_out]
    starts = regression(x, weight, bias)
    rank = choose_rank(starts, *test)
    state = folder / f"state-{index:03d}.safetensors"
    factors = fit(starts(rank), x, active, test, xp, seed=index, state=state, progress=progress)
    save_low_rank(file, *quantized(factors, *test))
    state.unlink(missing_ok=True)


def _pack(x: np.ndarray, exact: Matrix, bias: np.ndarray, backend: Backend) -> np.ndarray:
    """Which units each token truly needs, in bits: uint8 [tokens, units / 8]."""
    chunks = [mx.array(x[i : i + CHUNK]).astype(mx.float32) for i in range(0, len(x), CHUNK)]
    return np.concatenate([np.packbits(backend.project(chunk, exact)() + bias > 0, axis=1) for chunk in chunks])


def regression(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Callable[[int], Factors]:
    """Rank to the factors that estimate x weight^T + bias with the least squared error on x, as log-odds.

    Reduced-rank regression: the truncated SVD of weight C^(1/2), C the covariance of x, where a plain SVD of the
    weights counts directions that no input has. The error left gives each unit's scale: a normal error with standard
    deviation s makes log-odds of about 1.7 / s times the estimate.
    """
    sample = x[:: max(1, len(x) // 16384)].astype(np.float32)
    mean = sample.mean(axis=0)
    centred = sample - mean
    covariance = centred.T @ centred / len(sample)
    covariance += 1e-4 * np.trace(covariance) / len(covariance) * np.eye(len(covariance), dtype=np.float32)
    root = np.linalg.cholesky(covariance)
    full = weight @ root
    _, vectors = np.linalg.eigh(full.T @ full)

    def factors(rank: int) -> Factors:
        basis = vectors[:, : -rank - 1 : -1]
        inner, outer = np.linalg.solve(root.T, basis).T, full @ basis
        error = np.sqrt(np.maximum(np.square(full).sum(axis=1) - np.square(outer).sum(axis=1), 1e-12))
        offset = weight @ mean + bias - outer @ (inner @ mean)
        scale = 1.7 / error
        parts = inner, outer * scale[:, None], offset * scale
        return Factors(*(np.ascontiguousarray(part, np.float32) for part in parts))

    return factors


def flagged_at(recall: float, scores: np.ndarray, active: np.ndarray) -> tuple[float, float]:
    """Flagged over active units where `recall` of the active ones [tokens, units] is found; the threshold there."""
    positive = scores[active]
    if not len(positive):
        return 1.0, 0.0
    at = min(len(positive) - 1, int((1 - recall) * len(positive)))
    threshold = np.partition(positive, at)[at]
    return float((scores >= threshold).sum() / len(positive)), float(threshold)


def choose_rank(starts: Callable[[int], Factors], x: np.ndarray, active: np.ndarray) -> int:
    """The smallest rank whose start is good enough, at most a quarter of d_model: late layers need more."""
    step = max(32, x.shape[1] // 32)
    ranks = range(step, max(step, x.shape[1] // 4) + 1, step)
    return next((r for r in ranks if flagged_at(RECALL, starts(r)(x), active)[0] <= GOOD_ENOUGH), ranks[-1])


def fit(
    start: Factors,
    x: np.ndarray,
    active: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    xp: Any,
    *,
    seed: int = 0,
    state: Path | None = None,
    progress: Steps = lambda done, total: None,
) -> Factors:
    """Adam on the balanced logistic loss: x [tokens, d_model], `active` bits [tokens, units / 8].

    `xp` computes: mlx.core on a GPU, or numpy. Stops when an epoch no longer helps on `test` (inputs, bool [tokens,
    units]) and returns what was best there. `state` keeps every epoch's end, so that a killed run repeats one at most.
    """
    best, cut = flagged_at(RECALL, start(test[0]), test[1])
    balance = float(np.exp(np.clip(-cut, 0, np.log(MOST_BALANCE))))  # the loss decides at 0 what RECALL decides at cut
    best_values, first = [start.inner, start.outer, start.offset + np.float32(np.log(balance))], 0
    values = best_values + [np.zeros_like(v) for v in best_values * 2]
    if state is not None and state.exists():
        saved, meta = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(state), return_metadata=True))
        values, best_values = (
            [np.array(saved[str(i)]) for i in range(9)],
            [np.array(saved[f"best{i}"]) for i in range(3)],
        )
        best, first = float(meta["best"]), int(meta["epochs"])
    batches = max(1, len(x) // BATCH)
    for epoch in range(first, EPOCHS):
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        arrays = [xp.array(v) for v in values]
        for i in range(batches):
            progress(epoch * batches + i, EPOCHS * batches)
            rows = np.sort(order[i * BATCH : (i + 1) * BATCH])
            bits = np.unpackbits(active[rows], axis=1, count=len(start.offset))
            step = epoch * batches + i + 1
            rate = RATE * min(1, step / 20) * (1 - step / (EPOCHS * batches + 1))
            arrays = _step(xp, arrays, xp.array(x[rows].astype(np.float32)), xp.array(bits), balance, step, rate)
        values = [np.array(a) for a in arrays]
        now = flagged_at(RECALL, Factors(*values[:3])(test[0]), test[1])[0]
        stop = now > best * (1 - LEAST_GAIN)
        if now < best:
            best, best_values = now, values[:3]
        meta = {"best": str(best), "epochs": str(EPOCHS if stop else epoch + 1)}
        if state is not None:
            named = {str(i): v for i, v in enumerate(values)} | {f"best{i}": v for i, v in enumerate(best_values)}
            save_arrays(state, {name: mx.array(v) for name, v in named.items()}, meta)
        if stop:
            break
    progress(EPOCHS * batches, EPOCHS * batches)
    return Factors(*best_values)


def _step(xp: Any, arrays: list[Any], x: Any, active: Any, balance: float, step: int, rate: float) -> list[Any]:
    """One Adam step; `arrays` are the three factors, their first and their second moments."""
    inner, outer, offset = arrays[:3]
    latent = x @ inner.T
    odds = xp.clip(latent @ outer.T + offset, -30, 30)
    error = (1 / (1 + xp.exp(-odds)) - active) * (1 + (balance - 1) * active) / len(x)
    slopes = (error @ outer).T @ x, error.T @ latent, error.sum(axis=0)
    firsts = [0.9 * m + 0.1 * g for m, g in zip(arrays[3:6], slopes, strict=True)]
    seconds = [0.99 * v + 0.01 * g * g for v, g in zip(arrays[6:], slopes, strict=True)]
    scale = rate * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
    moves = [scale * m / (xp.sqrt(v) + 1e-8) for m, v in zip(firsts, seconds, strict=True)]
    arrays = [a - move for a, move in zip(arrays[:3], moves, strict=True)] + firsts + seconds
    if xp is mx:
        mx.eval(arrays)
    return arrays


def quantized(factors: Factors, x: np.ndarray, active: np.ndarray) -> tuple[Matrix, Matrix, np.ndarray]:
    """The factors in BITS, and the offset that makes RECALL of the active units found at MARGIN."""
    inner, outer = (low_bit_matrix(mx.array(part), BITS) for part in (factors.inner, factors.outer))
    plain = Factors(floats(inner), floats(outer), factors.offset)
    threshold = flagged_at(RECALL, plain(x), active)[1]
    return inner, outer, factors.offset - np.float32(threshold + MARGIN)
