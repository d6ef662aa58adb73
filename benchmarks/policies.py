"""Which unit should leave when another comes: units read per token for victim orders, beside the clairvoyant bound.

On recorded traces (trace.py record; synthetic ones cannot judge this), one token per step, one layer at a time, at
capacities given as a share of the layer's units. A unit the token wants and memory lacks is a read. Where a token
wants more than memory holds, each turn replaces the units worth least, as in the window. The first `--warm` tokens are
not counted. Also splits one memory between layers: equally, in proportion to the union of five tokens' units, and by
the layers' miss curves (the planner's way), drawn on `--calibration` and judged on the trace.

    ring 5              the paper's: what the last 5 tokens used, nothing else
    lru                 the longest unused leaves
    lru-2               the one whose last use but one is oldest leaves
    frequency d         fewest uses leaves, each use worth d per token of age (the default, mlxflash/policy.py)
    popularity          fixed order: share of the calibration's tokens that use a unit
    frequency + prior   frequency, with the calibration's popularity added as if it were n uses
    frequency + near    frequency, and units just below the predictor's threshold count as a part of a use: a forecast
    belady              the one that is used again last leaves: needs the future

Says nothing about time. Units of different layers are equally large here.

    python benchmarks/trace.py record mlxflash/story.flash --text valid.txt --tokens 4096 --out valid.npz
    python benchmarks/policies.py valid.npz --calibration train.npz
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from trace import Trace
from typing import Any

import numpy as np

from mlxflash.misses import miss_curve
from mlxflash.plan import split_slots
from mlxflash.policy import DECAY, Belady, Frequency, Policy, Recency

SPAN = 5
DECAYS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
PRIORS = (5.0, 20.0)
NEAR = 0.3  # what a near miss counts, in uses


class RecencyOfTwo:
    """The last use but one (LRU-2, O'Neil et al. 1993)."""

    def __init__(self, num_units: int):
        self._last = np.zeros((2, num_units), np.int64)

    def use(self, ids: np.ndarray, token: int) -> None:
        self._last[0, ids] = self._last[1, ids]
        self._last[1, ids] = token

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return self._last[0, ids]

    def reset(self) -> None:
        self._last[:] = 0


class Popularity:
    """Fixed numbers, and a decayed frequency on top where there is a decay."""

    def __init__(self, popularity: np.ndarray, decay: float | None = None):
        self._popularity, self._decay = popularity, decay
        self._scores = np.zeros(len(popularity))

    def use(self, ids: np.ndarray, token: int) -> None:
        if self._decay is not None:
            self._scores *= self._decay
            self._scores[ids] += 1

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return self._scores[ids] + self._popularity[ids]

    def reset(self) -> None:
        self._scores[:] = 0


class Forecast:
    """Decayed frequency in which a near miss counts `weight` uses; `near` is bool [tokens, units]."""

    def __init__(self, near: np.ndarray, weight: float, decay: float = DECAY):
        self._near, self._weight, self._decay = near, weight, decay
        self._scores = np.zeros(near.shape[1])

    def use(self, ids: np.ndarray, token: int) -> None:
        self._scores *= self._decay
        self._scores[self._near[token - 1]] += self._weight
        self._scores[ids] += 1 - self._weight  # what is flagged is near as well

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return self._scores[ids]

    def reset(self) -> None:
        self._scores[:] = 0


def reads(wanted: np.ndarray, capacities: list[int], policy: Policy, warm: int, span: int | None = None) -> np.ndarray:
    """Units read per token at each capacity: float [capacities]; `wanted` is bool [tokens, units]."""
    tokens, units = wanted.shape
    held = np.zeros((len(capacities), units), bool)
    total = np.zeros(len(capacities))
    for t, now in enumerate(wanted):
        policy.use(np.flatnonzero(now), t + 1)
        for i, capacity in enumerate(capacities):
            mine = held[i]
            new = now & ~mine
            count = int(np.count_nonzero(new))
            total[i] += count if t >= warm else 0
            if span is not None and t >= span:
                mine &= wanted[t - span + 1 : t + 1].any(axis=0)
            over = int(np.count_nonzero(mine)) + count - capacity
            if over > 0:
                others = np.flatnonzero(mine & ~now)
                if over > len(others):
                    left = np.flatnonzero(new)[count - (over - len(others)) :]
                    mine[:] = now
                    mine[left] = False
                    for i in range(0, len(left), capacity):  # turns
                        turn, rows = left[i : i + capacity], np.flatnonzero(mine)
                        mine[rows[np.argpartition(policy.worth(rows), len(turn) - 1)[: len(turn)]]] = False
                        mine[turn] = True
                    continue
                mine[others[np.argpartition(policy.worth(others), over - 1)[:over]]] = False
            mine |= now
    return total / (tokens - warm)


def contenders(
    wanted: np.ndarray, near: np.ndarray | None, popularity: np.ndarray | None
) -> dict[str, Callable[[], tuple[Policy, int | None]]]:
    """Fresh policies by name, with their spans."""
    units = wanted.shape[1]
    out: dict[str, Callable[[], tuple[Policy, int | None]]] = {
        f"ring {SPAN}": lambda: (Recency(units), SPAN),
        "lru": lambda: (Recency(units), None),
        "lru-2": lambda: (RecencyOfTwo(units), None),
    }
    for decay in DECAYS:
        policy = (lambda: Popularity(np.zeros(units), 1.0)) if decay == 1 else (lambda d=decay: Frequency(units, d))
        out[f"frequency {decay:g}"] = lambda policy=policy: (policy(), None)
    if popularity is not None:
        out["popularity"] = lambda: (Popularity(popularity), None)
        for uses in PRIORS:
            out[f"frequency {DECAY:g} + prior {uses:g}"] = lambda n=uses: (Popularity(n * popularity, DECAY), None)
    if near is not None:
        for decay in (0.95, DECAY):
            out[f"frequency {decay:g} + near"] = lambda d=decay: (Forecast(near, NEAR, d), None)
    out["belady"] = lambda: (Belady(wanted), None)
    return out


def compare(
    trace: Trace, name: str, shares: list[float], warm: int, calibration: Trace | None
) -> dict[str, np.ndarray]:
    """Units read per token for each policy: float [layers, shares]."""
    rows: dict[str, list[np.ndarray]] = {}
    for layer, units in enumerate(trace.units.tolist()):
        wanted = trace.sets[name].matrix(layer, units)
        near = trace.sets["near"].matrix(layer, units) if "near" in trace.sets and name == "late" else None
        popularity = calibration.sets[name].matrix(layer, units).mean(axis=0) if calibration else None
        capacities = [int(share * units) for share in shares]
        for policy, make in contenders(wanted, near, popularity).items():
            fresh, span = make()
            rows.setdefault(policy, []).append(reads(wanted, capacities, fresh, warm, span))
    return {policy: np.stack(figures) for policy, figures in rows.items()}


def table(figures: dict[str, np.ndarray], units: np.ndarray, shares: list[float]) -> list[str]:
    """All layers together: share of the units read per token and, in brackets, times Belady."""
    lines = [f"{'all layers':<28}" + "".join(f"{share:>16.0%}" for share in shares)]
    for policy, read in figures.items():
        total, bound = read.sum(axis=0), figures["belady"].sum(axis=0)
        cells = "".join(f"{n / units.sum():>9.2%} ({n / b:4.2f})" for n, b in zip(total, bound, strict=True))
        lines.append(f"{policy:<28}{cells}")
    return lines


def layer_table(figures: dict[str, np.ndarray], share: float, column: int) -> list[str]:
    layers = len(figures["belady"])
    lines = [f"units per token at {share:.0%}".ljust(28) + "".join(f"{f'layer {i}':>10}" for i in range(layers))]
    for policy, read in figures.items():
        lines.append(f"{policy:<28}" + "".join(f"{n:>10.1f}" for n in read[:, column]))
    return lines


# One memory for all layers


def by_demand(demand: np.ndarray, units: np.ndarray, slots: int) -> np.ndarray:
    """In proportion, none over its units; what that leaves goes to the others."""
    out = np.zeros(len(units))
    while slots - out.sum() > 1 and (out < units).any():
        room = out < units
        out = np.minimum(units, out + room * demand / demand[room].sum() * (slots - out.sum()))
    return out.astype(int)


def splits(
    trace: Trace, calibration: Trace, shares: list[float], warm: int, tokens: int | None
) -> dict[str, dict[str, Any]]:
    """For each total share: units read per token and capacities of each way to split it."""
    wanted = [calibration.sets["late"].matrix(i, n)[:tokens] for i, n in enumerate(trace.units.tolist())]
    curves = tuple(miss_curve(w) for w in wanted)
    demand = np.array([demanded(calibration.sets["late"].matrix(i, n)) for i, n in enumerate(trace.units.tolist())])
    out: dict[str, dict[str, Any]] = {}
    for share in shares:
        slots = int(share * trace.units.sum())
        ways = {
            "equal": (trace.units * share).astype(int),
            "demand": by_demand(demand, trace.units, slots),
            "curves": np.array(split_slots(tuple(trace.units.tolist()), curves, slots)),
        }
        row: dict[str, Any] = {}
        for way, capacities in ways.items():
            read = 0.0
            for layer, units in enumerate(trace.units.tolist()):
                wanted = trace.sets["late"].matrix(layer, units)
                read += float(reads(wanted, [int(capacities[layer])], Frequency(units), warm)[0])
            row[way] = {"reads": read, "capacities": capacities.tolist()}
        out[f"{share:g}"] = row
    return out


def demanded(wanted: np.ndarray) -> float:
    """Mean size of the union of SPAN tokens' units."""
    return float(np.mean([wanted[t : t + SPAN].any(axis=0).sum() for t in range(len(wanted) - SPAN + 1)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="of held-out text")
    parser.add_argument("--calibration", type=Path, help="trace of other text, for popularity and for miss curves")
    parser.add_argument("--sets", default="late", help="which sets: late (flagged) or active (perfect prediction)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--tokens", type=int, help="of the calibration, for miss curves (all)")
    parser.add_argument("--warm", type=int, default=256)
    parser.add_argument("--only", choices=("policies", "splits"))
    args = parser.parse_args()
    trace = Trace.load(args.trace)
    calibration = Trace.load(args.calibration) if args.calibration else None
    result: dict[str, Any] = {"trace": trace.note, "tokens": trace.tokens, "warm": args.warm, "sets": args.sets}
    result["units"] = trace.units.tolist()
    print(f"{trace.note}: {trace.tokens} tokens, the first {args.warm} not counted; {args.sets} sets")
    if args.only != "splits":
        figures = compare(trace, args.sets, args.shares, args.warm, calibration)
        print("\n".join(table(figures, trace.units, args.shares)))
        for column, share in enumerate(args.shares):
            print("\n".join(layer_table(figures, share, column)))
        result["policies"] = {policy: read.tolist() for policy, read in figures.items()}
        result["shares"] = args.shares
    if args.only != "policies" and calibration is not None:
        found = splits(trace, calibration, args.shares, min(args.warm, calibration.tokens // 4), args.tokens)
        print("one memory split between layers, units read per token, and the capacities")
        for share, row in found.items():
            for way, said in row.items():
                change = said["reads"] / row["demand"]["reads"] - 1
                print(f"{float(share):4.0%}  {way:<8}{said['reads']:8.1f}  {change:+7.1%}  {said['capacities']}")
        result["splits"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
