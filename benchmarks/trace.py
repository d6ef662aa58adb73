"""Which units of each layer each token flags: recorded from a real model, or made to given statistics.

A trace carries sets of unit ids per layer and token:

    late     what the predictor inside the layer flags; what a window is asked for
    early    what a predictor one step ahead would flag: a random part of late (`recall`), and wrong ones, drawn in
             proportion to each unit's popularity, until the set is `over` times late's size
    active   the truly active units (recorded traces only)
    near     late, and units whose estimate misses the threshold by less than NEAR standard errors (recorded only)

Synthetic traces. Unit i is on with probability p_i and remembers: from token to token it goes on with probability
(1 - rho) p_i and off with (1 - rho)(1 - p_i), so p_i stays its share of tokens and rho is its autocorrelation. The
popularities p_i are Beta-distributed with the mean asked for: many cold units, some that are almost always on. Two
numbers are free, the Beta's concentration and rho, and two statistics are asked for beside the mean: the union of
`span` tokens, and the share new to a token (on now, in none of the `back` tokens before). Both have closed forms, so a
nested bisection finds the two numbers. The default is what is published of the shape (shapes.py): of OPT-6.7B with a
window of 4, 10 % flagged per token, 24 % in the union of 5, 2.4 % new.

What synthetic traces do not show: subjects that change over a text, units that fire together, differences between
layers, and how popular a unit is after a long absence. They replay a published rate of reads; they cannot judge victim
orders, pool sizes beyond the window, or unit orders. Ids are random positions on disk unless --sorted.

    python benchmarks/trace.py synthetic --shape opt-6.7b --tokens 64 --out opt.npz
    python benchmarks/trace.py record mlxflash/story.flash --text story.txt --tokens 256 --out story.npz
    python benchmarks/trace.py show opt.npz
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from shapes import OPT, SHAPES, Activity

from mlxflash.api import load_tokenizer
from mlxflash.backends import FFN, make_backend
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError
from mlxflash.calibrate import Recorder
from mlxflash.ffn import FlashFFN
from mlxflash.flash import FlashModel
from mlxflash.model import load_bundle
from mlxflash.models import max_positions
from mlxflash.predictor import MARGIN, Ids, deciding_matrix, read_low_bit
from mlxflash.resident import one_part

RECALL, OVER = 0.80, 1.1
NEAR = 4.0


@dataclass
class Sets:
    """Ascending ids of one kind: `ids[starts[layer, token] : starts[layer, token + 1]]`."""

    ids: np.ndarray  # int32
    starts: np.ndarray  # int64 [layers, tokens + 1]

    def at(self, layer: int, token: int) -> np.ndarray:
        return self.ids[self.starts[layer, token] : self.starts[layer, token + 1]].astype(np.int64)

    def matrix(self, layer: int, units: int) -> np.ndarray:
        """One layer as bool [tokens, units]."""
        starts = self.starts[layer]
        out = np.zeros((len(starts) - 1, units), bool)
        out[np.repeat(np.arange(len(out)), np.diff(starts)), self.ids[starts[0] : starts[-1]]] = True
        return out

    @classmethod
    def of(cls, matrices: list[np.ndarray]) -> "Sets":
        """From bool [tokens, units] per layer."""
        ids = [np.nonzero(m)[1].astype(np.int32) for m in matrices]
        ends = np.cumsum([0] + [len(i) for i in ids])
        starts = [e + np.concatenate(([0], np.cumsum(m.sum(axis=1)))) for e, m in zip(ends, matrices, strict=False)]
        return cls(np.concatenate(ids), np.stack(starts).astype(np.int64))


@dataclass
class Trace:
    units: np.ndarray  # per layer
    sets: dict[str, Sets]
    note: str = ""

    @property
    def layers(self) -> int:
        return len(self.units)

    @property
    def tokens(self) -> int:
        return self.sets["late"].starts.shape[1] - 1

    def save(self, path: str | Path) -> None:
        arrays: dict[str, Any] = {"units": self.units, "note": np.array(self.note)}
        for name, sets in self.sets.items():
            arrays |= {f"{name}_ids": sets.ids, f"{name}_starts": sets.starts}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        with np.load(path) as data:
            names = [name.removesuffix("_ids") for name in data.files if name.endswith("_ids")]
            sets = {name: Sets(data[f"{name}_ids"], data[f"{name}_starts"]) for name in names}
            return cls(data["units"], sets, str(data["note"]))


# Statistics


def first_uses(on: np.ndarray, back: int) -> np.ndarray:
    """For bool [tokens, units], the share of units that each token uses and the `back` tokens before did not;
    float [tokens - back]."""
    count = np.zeros((len(on) + 1, on.shape[1]), np.int16)
    np.cumsum(on, axis=0, out=count[1:])
    before = count[back:-1] - count[: len(on) - back] > 0
    return (on[back:] & ~before).mean(axis=1)


def union(on: np.ndarray, span: int) -> float:
    """Mean share of units in the union of `span` tokens."""
    count = np.zeros((len(on) + 1, on.shape[1]), np.int16)
    np.cumsum(on, axis=0, out=count[1:])
    return float((count[span:] - count[:-span] > 0).mean())


def statistics(trace: Trace, span: int = 5, backs: tuple[int, ...] = (4, 5, 16, 48)) -> dict[str, list[float]]:
    """Shares of the late sets per layer, each a mean over tokens, and how good the early ones are."""
    rows: dict[str, list[float]] = {}
    for layer in range(trace.layers):
        units = int(trace.units[layer])
        late = trace.sets["late"].matrix(layer, units)
        row = {"flagged": float(late.mean())}
        if len(late) >= span:
            row[f"union of {span}"] = union(late, span)
        row |= {f"new after {b}": float(first_uses(late, b).mean()) for b in backs if b < len(late)}
        if "early" in trace.sets:
            early = trace.sets["early"].matrix(layer, units)
            row["early recall"] = float((early & late).sum() / max(1, late.sum()))
            row["early / late"] = float(early.sum() / max(1, late.sum()))
        if "active" in trace.sets:
            active = trace.sets["active"].matrix(layer, units)
            row["active"] = float(active.mean())
            row["late recall"] = float((active & late).sum() / max(1, active.sum()))
        row["always on"] = float((late.mean(axis=0) > 0.9).mean())
        row["never on"] = float((~late.any(axis=0)).mean())
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return rows


def describe(trace: Trace) -> str:
    lines = [f"{trace.layers} layers of {int(trace.units.max())} units, {trace.tokens} tokens; {trace.note}"]
    lines.append(f"  {'share of units, unless a ratio':<32}{'mean':>9}{'least':>9}{'most':>9}   over layers")
    for name, values in statistics(trace).items():
        lines.append(f"  {name:<32}{np.mean(values):>9.2%}{min(values):>9.2%}{max(values):>9.2%}")
    return "\n".join(lines)


# Synthetic traces


def moment(mean: float, concentration: float, on: int, off: int) -> float:
    """E[p^on (1-p)^off] of a Beta distribution."""
    a, b = mean * concentration, (1 - mean) * concentration
    top = prod(a + i for i in range(on)) * prod(b + i for i in range(off))
    return top / prod(concentration + i for i in range(on + off))


def expected_new(mean: float, concentration: float, rho: float, back: int) -> float:
    """Expected share that is on now and was off in the `back` tokens before: the Markov chain's
    E[(1-p) (1 - (1-rho)p)^(back-1) (1-rho) p], written in moments."""
    if back == 0:
        return mean
    terms = (
        comb(back - 1, j) * rho**j * moment(mean, concentration, 1 + j, back - j) for j in range(back)
    )  # (1 - (1-rho)p) = (1-p) + rho p
    return (1 - rho) * sum(terms)


def expected_union(mean: float, concentration: float, rho: float, span: int) -> float:
    return sum(expected_new(mean, concentration, rho, back) for back in range(span))


def bisect(rises: Any, low: float, high: float) -> float:
    """Where an increasing function crosses zero; the nearer end where it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return (low + high) / 2


def tune(flagged: float, union_share: float, new: float, span: int = 5, back: int = 4) -> tuple[float, float]:
    """Concentration and autocorrelation whose expected statistics are those asked for, or as near as can be."""

    def concentration(rho: float) -> float:  # more equal units have the larger union
        log = bisect(lambda x: expected_union(flagged, 10**x, rho, span) - union_share, -2, 4)
        return float(10**log)

    rho = bisect(lambda r: expected_new(flagged, concentration(r), r, back) - new, 0, 0.98)
    return concentration(rho), rho


def simulate(rng: np.random.Generator, p: np.ndarray, rho: float, tokens: int) -> np.ndarray:
    """The chain of every unit, started in its stationary state: bool [tokens, units]."""
    on = np.empty((tokens, len(p)), bool)
    on[0] = rng.random(len(p), np.float32) < p
    goes_on, stays = ((1 - rho) * p).astype(np.float32), (1 - (1 - rho) * (1 - p)).astype(np.float32)
    for t in range(1, tokens):
        on[t] = rng.random(len(p), np.float32) < np.where(on[t - 1], stays, goes_on)
    return on


def look_ahead(rng: np.random.Generator, late: np.ndarray, p: np.ndarray, recall: float, over: float) -> np.ndarray:
    """What a predictor one step ahead would flag of `late`, bool [tokens, units]; `p` is each unit's popularity."""
    early = late & (rng.random(late.shape, np.float32) < recall)
    weight = np.log(np.maximum(p, 1e-6)).astype(np.float32)
    for t in range(len(late)):
        wrong = round(over * late[t].sum()) - int(early[t].sum())
        others = np.flatnonzero(~late[t])
        wrong = min(wrong, len(others))
        if wrong > 0:  # the largest keys log p + Gumbel are a draw without replacement in proportion to p
            keys = weight[others] - np.log(rng.standard_exponential(len(others), np.float32) + np.float32(1e-30))
            early[t, others[np.argpartition(keys, len(others) - wrong)[-wrong:]]] = True
    return early


def synthetic(
    layers: int,
    units: int,
    tokens: int = 64,
    activity: Activity = OPT,
    *,
    span: int = 5,
    back: int = 4,
    recall: float = RECALL,
    over: float = OVER,
    ordered: bool = False,
    seed: int = 0,
) -> Trace:
    """A trace with the given statistics. `ordered` puts popular units first; else ids are random positions."""
    flagged = activity.flagged
    concentration, rho = tune(flagged, activity.union, activity.new, span, back)
    rng = np.random.default_rng(seed)
    late, early = [], []
    for _ in range(layers):
        p = rng.beta(flagged * concentration, (1 - flagged) * concentration, units)
        p *= flagged / p.mean()
        p = np.minimum(np.sort(p)[::-1] if ordered else p, 1)
        late.append(simulate(rng, p, rho, tokens))
        early.append(look_ahead(rng, late[-1], p, recall, over))
    note = f"synthetic, popularity concentration {concentration:.3g}, autocorrelation {rho:.3f}"
    if ordered:
        note += ", popular units first"
    return Trace(np.full(layers, units), {"late": Sets.of(late), "early": Sets.of(early)}, note)


# Recorded traces


def record(
    path: Path,
    tokens: np.ndarray,
    *,
    memory: str | None = None,
    recall: float = RECALL,
    over: float = OVER,
    margin: float = MARGIN,
    seed: int = 0,
) -> Trace:
    """What the bundle's low-bit predictor flags, and what is truly active, for int [n] tokens of one text (exact
    activations, teacher-forced, afresh where the model's positions end). Without a predictor late and near are active.
    `early` is drawn, not measured."""
    bundle = Bundle.open(path)
    with load_bundle(path, memory=memory, predictor="all", bundle=bundle) as model:
        recorders = stand_before_ffns(model)
        longest = max_positions(bundle.config())
        for i in range(0, len(tokens), longest):
            mx.eval(model(mx.array(tokens[None, i : i + longest])))
    rng = np.random.default_rng(seed)
    sets: dict[str, list[np.ndarray]] = {"late": [], "early": [], "active": [], "near": []}
    for index, recorder in enumerate(recorders):
        active, late, near = layer_sets(bundle, index, recorder.inputs(), (margin, margin + NEAR))
        popularity = late.mean(axis=0) + 1 / len(late)
        sets["active"].append(active)
        sets["late"].append(late)
        sets["near"].append(near)
        sets["early"].append(look_ahead(rng, late, popularity, recall, over))
    units = np.array([layer.units for layer in bundle.manifest.layers])
    return Trace(units, {name: Sets.of(m) for name, m in sets.items()}, f"recorded from {path.name}")


def stand_before_ffns(model: FlashModel) -> list[Recorder]:
    recorders = []
    for layer in model.layers:
        name = next(name for name, module in layer.children().items() if isinstance(module, FlashFFN))
        recorders.append(Recorder(getattr(layer, name)))
        setattr(layer, name, recorders[-1])
    return recorders


def layer_sets(bundle: Bundle, index: int, x: np.ndarray, margins: Sequence[float]) -> list[np.ndarray]:
    """Truly active units for the inputs x [tokens, d_model], and those flagged at each margin: bool [tokens, units]."""
    backend, ffn, layer = make_backend(), FFN.of(bundle.manifest), bundle.manifest.layers[index]
    stride = ffn.record.stride
    raw = np.fromfile(bundle.layer_path(index), np.uint8, layer.units * stride, offset=HEADER_BYTES)
    bias = ffn.offset(one_part(bundle, index, f"{ffn.first}_bias", layer.units), layer.units)
    active = backend.project(mx.array(x), deciding_matrix(ffn, raw.reshape(layer.units, stride)))() + bias > 0
    files = bundle.predictor_files("low-bit")
    if not files:
        return [active] * (1 + len(margins))
    matrix, shift, error = read_low_bit(files[index], ffn, layer)
    estimate = backend.project(mx.array(x), matrix)() + bias - shift
    return [active, *(estimate + margin * error > 0 for margin in margins)]


# Replay


class Replayer:
    """Stands where a layer's predictor was and answers with a trace's sets, token after token, round and round.

    With `predictor` that one is asked too and its answer dropped, so that its time is spent.
    """

    def __init__(self, sets: Sets, layer: int, predictor: Any = None):
        self._sets, self._layer, self._predictor = sets, layer, predictor
        self.nbytes = getattr(predictor, "nbytes", 0)
        self.token = 0

    def start(self, x: mx.array) -> Ids:
        asked = None if self._predictor is None else self._predictor.start(x)
        return lambda: self._answer(asked)

    def _answer(self, asked: Ids | None) -> np.ndarray:
        if asked is not None:
            asked()
        ids = self._sets.at(self._layer, self.token % (self._sets.starts.shape[1] - 1))
        self.token += 1
        return ids


def replay(model: FlashModel, trace: Trace, name: str = "late") -> None:
    """Let every layer of a loaded model read what the trace says. Raises ValueError when their shapes differ."""
    units = [layer.units for layer in model.flash.layers]
    if units != trace.units.tolist():
        raise ValueError(f"the trace has layers of {trace.units.tolist()} units, the model of {units}")
    for index, layer in enumerate(model.flash.layers):
        layer.predictor = Replayer(trace.sets[name], index, layer.predictor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("synthetic", help="to given statistics")
    made.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    for name in ("flagged", "union", "new"):
        made.add_argument(f"--{name}", type=float, help="share of units (default: what is published of the shape)")
    made.add_argument("--span", type=int, default=5, help="tokens of the union")
    made.add_argument("--back", type=int, default=4, help="tokens before, that a new unit was not in")
    made.add_argument("--sorted", action="store_true", help="popular units first, instead of random positions")
    seen = commands.add_parser("record", help="from a bundle, over a text")
    seen.add_argument("bundle", type=Path)
    seen.add_argument("--text", type=Path, required=True)
    seen.add_argument("--memory")
    for sub in (made, seen):
        sub.add_argument("--tokens", type=int, default=64)
        sub.add_argument("--recall", type=float, default=RECALL, help="of the early sets")
        sub.add_argument("--over", type=float, default=OVER, help="size of the early sets, in late ones")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--out", type=Path)
    show = commands.add_parser("show", help="what a saved trace holds")
    show.add_argument("trace", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    if args.command == "show":
        print(describe(Trace.load(args.trace)))
        return
    draw = {"recall": args.recall, "over": args.over, "seed": args.seed}
    if args.command == "synthetic":
        shape = SHAPES[args.shape]
        said = {name: getattr(args, name) for name in ("flagged", "union", "new") if getattr(args, name) is not None}
        wanted = replace(shape.activity, **said)
        counts = {"span": args.span, "back": args.back, "ordered": args.sorted}
        trace = synthetic(shape.layers, shape.ffn, args.tokens, wanted, **counts, **draw)
        print(f"asked for: {wanted.flagged:.1%} flagged, {wanted.union:.1%} in {args.span}, {wanted.new:.1%} new")
    else:
        try:
            Bundle.open(args.bundle)
        except BundleError as error:
            raise SystemExit(f"trace: {error}") from None
        words = load_tokenizer(args.bundle).encode(args.text.read_text()[: 16 * args.tokens])
        trace = record(args.bundle, np.array(words[: args.tokens]), memory=args.memory, **draw)
    seconds = time.perf_counter() - begin
    print(describe(trace))
    print(f"made in {seconds:.1f} s")
    if args.out:
        trace.save(args.out)


if __name__ == "__main__":
    main()
