"""Predictors compared offline: bytes, recall and flagged units on held-out text, bytes read at equal total memory.

Every predictor estimates the deciding product of a layer's recorded FFN inputs. Those that estimate the product itself
are calibrated as `calibrate` does (per unit: mean error taken out, margin in standard errors) on training text; trained
ones give log-odds. `x active` is flagged over truly active units, at one margin for all layers that finds the stated
share of the active units. `read` is the share of the feed-forward weights read per token when predictor and pool take
`--memory` of them together in each layer and victims are the least recently used; layer 0, as dense as five others, is
left out of the sums. Works in pieces: what is in `--work` is not done again.

    python benchmarks/predictors.py BUNDLE --train FILE --text FILE --work DIR
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxflash.api import load_tokenizer
from mlxflash.bundle import Bundle
from mlxflash.predictor import deciding, floats, low_bit_matrix
from mlxflash.train import BITS, Factors, fit, flagged_at, inputs_file, record, regression, stretches

STRETCH, STRETCHES = 512, 8
CALIBRATED, TESTED = 4096, 4096  # training tokens that set errors; that stop the training
RECALLS = (0.90, 0.94, 0.96, 0.98, 0.99)
MARGINS = (0.0, 0.5, 0.75, 1.0, 1.5)
BOUND_MEMORY = (0.3, 0.55, 0.7)  # bounds want more of it
Scores = Callable[[np.ndarray], np.ndarray]  # x to a number per unit, flagged where it exceeds minus the margin


class LayerData:
    """One layer: its deciding matrix and bias, training inputs, held-out inputs and which units they need."""

    def __init__(self, bundle: Bundle, index: int, work: Path):
        _, self.weight, self.bias = deciding(bundle, index)
        self.train = self._inputs(work / "train", index)
        self.x = self._inputs(work / "held-out", index).astype(np.float32)
        self.active = self.product(self.x) > 0
        self.sample = self.train[:: max(1, len(self.train) // CALIBRATED)].astype(np.float32)

    def _inputs(self, folder: Path, index: int) -> np.ndarray:
        return np.fromfile(inputs_file(folder, index), np.float16).reshape(-1, self.weight.shape[1])

    def product(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weight.T + self.bias

    def calibrated(self, estimate: Scores) -> Scores:
        """An estimate of the product in units of its own error, the mean error taken out."""
        error = estimate(self.sample) - self.product(self.sample)
        mean, deviation = error.mean(axis=0), error.std(axis=0) + 1e-9
        return lambda x: (estimate(x) - mean) / deviation


def predictors(layer: LayerData, index: int, work: Path) -> Iterator[tuple[str, int, Scores]]:
    """Name, bytes and scores of every predictor of one layer."""
    weight, bias, (units, width) = layer.weight, layer.bias, layer.weight.shape
    for bits in (1, 2, 3, 4):
        matrix = low_bit_matrix(mx.array(weight), bits)
        copy = floats(matrix)
        yield f"low-bit {bits}", matrix.nbytes, layer.calibrated(lambda x, w=copy: x @ w.T + bias)
    signs = np.sign(weight)
    count = np.sign(layer.sample) @ signs.T
    yield "sign bits, majority", units * width // 8, lambda x: np.sign(x) @ signs.T
    slope = (count * layer.product(layer.sample)).mean(axis=0) / np.square(count).mean(axis=0)
    yield "sign bits, calibrated", units * width // 8, layer.calibrated(lambda x: np.sign(x) @ signs.T * slope)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    for rank in (width // 16, width // 8, width // 4, width // 2):
        a, b = right[:rank], left[:, :rank] * values[:rank]
        yield f"svd {rank}, 16-bit", 2 * rank * (units + width), layer.calibrated(lambda x, a=a, b=b: x @ a.T @ b.T)
    starts = regression(layer.train, weight, bias)
    for rank in (width // 16, width // 8, 3 * width // 16, width // 4):
        yield f"regression {rank}, {BITS}-bit", *quantized(starts(rank), BITS)
    for rank in (width // 16, width // 8, 3 * width // 16, width // 4):
        factors = trained(layer, starts(rank), work / f"trained-{rank}-{index}.npz", index)
        for bits in (4, 6, 8) if rank == width // 8 else (BITS,):
            yield f"trained {rank}, {bits}-bit", *quantized(factors, bits)
    rank = width // 8
    rng = np.random.default_rng(index)
    start = Factors(*(rng.normal(0, n**-0.5, (m, n)).astype(np.float32) for m, n in ((rank, width), (units, rank))), 0)
    start.offset = np.full(units, -2, np.float32)
    factors = trained(layer, start, work / f"random-{rank}-{index}.npz", index)
    yield f"trained {rank} from random, 16-bit", 2 * rank * (units + width), factors


def quantized(factors: Factors, bits: int) -> tuple[int, Scores]:
    """Factors in a few bits (the inner ones in 8): bytes, scores."""
    inner, outer = low_bit_matrix(mx.array(factors.inner), 8), low_bit_matrix(mx.array(factors.outer), bits)
    return inner.nbytes + outer.nbytes, Factors(floats(inner), floats(outer), factors.offset)


def trained(layer: LayerData, start: Factors, file: Path, index: int) -> Factors:
    """What training makes of a start, kept in `file`."""
    if not file.exists():
        chunks = np.array_split(layer.train, 64)
        active = np.concatenate([layer.product(chunk.astype(np.float32)) > 0 for chunk in chunks])
        test = layer.train[-TESTED:].astype(np.float32), active[-TESTED:]
        made = fit(start, layer.train[:-TESTED], np.packbits(active[:-TESTED], axis=1), test, np, seed=index)
        np.savez(file, inner=made.inner, outer=made.outer, offset=made.offset)
    with np.load(file) as arrays:
        return Factors(arrays["inner"], arrays["outer"], arrays["offset"])


def bounds(layer: LayerData) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, bytes, and which units Cauchy-Schwarz cannot rule out, bool [tokens, units] (rounding apart, see bound.py):
    with the error known along the inputs' mean only, along principal directions too, or its length in column groups."""
    mean = layer.sample.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(layer.sample.T))
    centred, units = layer.x - mean, len(layer.bias)
    for bits in (3, 4, 5, 6, 8):
        matrix = low_bit_matrix(mx.array(layer.weight), bits)
        copy = floats(matrix)
        error, size = layer.weight - copy, matrix.nbytes
        estimate = layer.x @ copy.T + layer.bias + error @ mean
        for count, groups in ((0, 1), (0, 8), (32, 1), (64, 1)):
            basis = vectors[:, vectors.shape[1] - count :]
            known, inside = error @ basis, centred @ basis
            left, rest = ((a - b @ basis.T).reshape(len(a), groups, -1) for a, b in ((error, known), (centred, inside)))
            bound = np.linalg.norm(rest, axis=2) @ np.linalg.norm(left, axis=2).T
            name = f"bound, {bits}-bit" + f", {count} directions" * bool(count) + f", {groups} groups" * (groups > 1)
            yield name, size + units * (count + 4 * groups + 4), estimate + inside @ known.T + bound > 0


def units_read(flagged: np.ndarray, capacity: int) -> float:
    """Units read per token, flagged bool [tokens, units], by a pool of `capacity` units that drops the oldest."""
    used = np.full(flagged.shape[1], -1)  # the token that last used a held unit
    reads = 0
    for token, wanted in enumerate(flagged):
        reads += int((used[wanted] < 0).sum())
        used[wanted] = token
        held = np.flatnonzero(used >= 0)
        if len(held) > capacity:
            surplus = len(held) - capacity
            used[held[np.argpartition(used[held], surplus - 1)[:surplus]]] = -1
    return reads / len(flagged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="text to calibrate and train on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--work", type=Path, required=True, help="folder for recordings and trained predictors")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to train on (50000)")
    parser.add_argument("--memory", type=float, default=0.24, help="share of a layer for predictor and pool (0.24)")
    args = parser.parse_args()
    bundle, encode = Bundle.open(args.bundle), load_tokenizer(args.bundle).encode
    held_out = np.array(encode(args.text.read_text()), np.int64)[: STRETCHES * STRETCH].reshape(STRETCHES, STRETCH)
    for name, sequences in (
        ("train", stretches(args.train.read_text(), encode, args.tokens, STRETCH)),
        ("held-out", list(held_out)),
    ):
        (args.work / name).mkdir(parents=True, exist_ok=True)
        record(bundle, sequences, args.work / name, None, None, lambda what, done, total: None)

    found: dict[str, list[tuple[int, np.ndarray]]] = {}  # name to bytes and scores, by layer
    bound: dict[str, list[tuple[int, np.ndarray]]] = {}
    active = []
    for index in range(bundle.num_layers):
        layer = LayerData(bundle, index, args.work)
        active.append(layer.active)
        for name, size, scores in predictors(layer, index, args.work):
            found.setdefault(name, []).append((size, scores(layer.x).astype(np.float16)))
        for name, size, flagged in bounds(layer):
            bound.setdefault(name, []).append((size, flagged))
    record_bytes = bundle.manifest.record.num_bytes
    print(
        f"{args.bundle}: layers 1 to {len(active) - 1}, {active[0].shape[0]} tokens of {args.text.name}, active ",
        end="",
    )
    print(f"{np.mean(active[1:]):.2%}, {record_bytes}-byte records, predictor and pool {args.memory:.0%}")
    print(
        f"{'predictor':<34} {'bytes':>7} {'of FFN':>7}  x active at recall 90, 94, 96, 98, 99 %   read at 96 % by layer"
    )
    rows = [row(name, layers, active, record_bytes, args.memory) for name, layers in found.items()]
    rows += [{"name": "perfect, no bytes", "read": read([(0, a) for a in active], record_bytes, args.memory)}]
    print(f"{'perfect, no bytes':<34} {'':51} {rows[-1]['read']:.2%}")
    for name, layers in bound.items():
        size, shares = layers[1][0], [float(flagged.mean()) for _, flagged in layers]
        reads = {memory: read(layers, record_bytes, memory) for memory in (args.memory, *BOUND_MEMORY)}
        rows.append({"name": name, "bytes": size, "flagged_by_layer": shares, "read": reads})
        said = ", ".join(f"{share:.2%} of {memory:.0%}" for memory, share in reads.items())
        print(
            f"{name:<34} {size:7} {size / record_bytes / active[1].shape[1]:7.1%}  flags {np.mean(shares[1:]):.1%} "
            f"({np.mean(shares):.1%} with layer 0), reads {said}"
        )
    print(json.dumps({"bundle": args.bundle.name, "active": [float(a.mean()) for a in active], "rows": rows}))


def read(flagged: list[tuple[int, np.ndarray]], record_bytes: int, memory: float) -> float:
    """Share of layers 1 and later that a token reads; `flagged` are bytes of the predictor and bool [tokens, units]."""
    shares = []
    for size, wanted in flagged[1:]:
        units = wanted.shape[1]
        shares.append(units_read(wanted, max(8, int(memory * units - size / record_bytes))) / units)
    return float(np.mean(shares))


def row(
    name: str, layers: list[tuple[int, np.ndarray]], active: list[np.ndarray], record_bytes: int, memory: float
) -> dict[str, object]:
    """One predictor's figures, printed too."""
    total = sum(a.sum() for a in active[1:])
    positive = np.sort(np.concatenate([s[a] for (_, s), a in zip(layers[1:], active[1:], strict=True)]))
    cuts = {r: positive[int((1 - r) * len(positive))] for r in RECALLS}
    flagged = {r: float(sum((s >= cut).sum() for _, s in layers[1:]) / total) for r, cut in cuts.items()}
    margins = {
        m: (float((positive > -m).mean()), float(sum((s > -m).sum() for _, s in layers[1:]) / total)) for m in MARGINS
    }
    by_layer = [flagged_at(0.96, s.astype(np.float32), a)[0] for (_, s), a in zip(layers, active, strict=True)]
    size = layers[1][0]
    reads = read([(size, s >= cuts[0.96]) for size, s in layers], record_bytes, memory)
    said = "  ".join(f"{flagged[r]:5.3f}" for r in RECALLS)
    details = " ".join(f"{x:.2f}" for x in by_layer)
    print(
        f"{name:<34} {size:7} {size / record_bytes / active[1].shape[1]:7.1%}  {said}  {reads:6.2%}  {details}",
        flush=True,
    )
    return {
        "name": name, "bytes": size, "flagged_at_recall": flagged, "recall_and_flagged_at_margin": margins,
        "margin_at_recall": {r: -float(c) for r, c in cuts.items()}, "read": reads, "flagged_by_layer": by_layer,
    }  # fmt: skip


if __name__ == "__main__":
    main()
