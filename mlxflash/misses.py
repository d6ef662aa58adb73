"""How many units a layer's tokens miss, by how many it holds: simulated with the real window on recorded text.

`calibrate` stores a curve for each layer. The planner splits memory between layers by them, and forecasts with them how
much a token reads.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mlxflash.policy import Belady, Policy, Recency
from mlxflash.window import Window

SHARES = (0.0, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
MOST_TOKENS = 512  # simulated; more change little
WARM = 4  # the first quarter fills the memory and is not counted


@dataclass(frozen=True)
class MissCurve:
    """A layer that holds shares[i] of its units misses misses[i] of them per token, of none all it wants; misses never
    rise."""

    units: int
    shares: tuple[float, ...]
    misses: tuple[float, ...]

    def at(self, held: int) -> float:
        """Units missed per token by a layer that holds `held`, between what was simulated on a line."""
        return float(np.interp(held / self.units, self.shares, self.misses))


class _NoRows:
    """Memory for a window of which only the maps matter."""

    def __init__(self, capacity: int):
        self.capacity = capacity

    def settle(self, discard: bool = False) -> None: ...

    def land(self, *_: Any) -> "_NoRows":
        return self

    def wait(self) -> None: ...

    def move(self, *_: Any) -> None: ...

    def take(self, *_: Any) -> None: ...


def missed_units(wanted: np.ndarray, share: float) -> np.ndarray:
    """Which units each token of `wanted`, bool [tokens, units], misses where `share` of them are held: bool, alike."""
    window = simulated(wanted.shape[1], max(1, int(share * wanted.shape[1])))
    missed = np.zeros_like(wanted)
    for token, row in enumerate(wanted):
        ids = np.flatnonzero(row)
        missed[token, ids[window.slot_of[ids] < 0]] = True
        _bring(window, ids)
    return missed


def _bring(window: Window, ids: np.ndarray) -> None:
    ticket = window.request(ids)
    window.ready(ticket)
    while len(ticket.left):
        window.next(ticket)


def misses_per_token(wanted: np.ndarray, held: int, span: int | None = None, policy: Policy | None = None) -> float:
    """Units read per token by a layer that holds `held` of them; wanted: bool [tokens, units]."""
    warm = len(wanted) // WARM
    if held == 0:
        return float(wanted[warm:].sum(axis=1).mean())
    window = simulated(wanted.shape[1], held, span, policy)
    before = 0
    for token, row in enumerate(wanted):
        if token == warm:
            before = window.num_misses
        _bring(window, np.flatnonzero(row))
    return (window.num_misses - before) / (len(wanted) - warm)


def simulated(units: int, held: int, span: int | None = None, policy: Policy | None = None) -> Window:
    """A layer's window of which only the maps exist, for `held` units."""
    return Window(units, _NoRows(held), cast(Any, None), cast(Any, None), span, policy)


def computed(window: Window, wanted: np.ndarray) -> np.ndarray:
    """Which units a layer computes when its tokens, one after the other, want `wanted`, bool [tokens, units]: those,
    and what the window holds."""
    out = wanted.copy()
    for token, row in enumerate(wanted):
        ticket = window.request(np.flatnonzero(row))
        window.ready(ticket)
        out[token] |= window.slot_of >= 0
        while len(ticket.left):
            window.next(ticket)
    return out


ORDERS = {
    "the paper's window of 5": lambda wanted: (5, None),
    "longest unused leaves": lambda wanted: (None, Recency(wanted.shape[1])),
    "decayed frequency (ours)": lambda wanted: (None, None),
    "Belady, who knows the future": lambda wanted: (None, Belady(wanted)),
}
ORDER_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def by_order(wanted: np.ndarray) -> dict[str, dict[float, float]]:
    """Units missed per token in each of ORDERS by the share held; of `wanted`, bool [tokens, units], the last
    MOST_TOKENS are simulated."""
    wanted = wanted[-MOST_TOKENS:]
    held = {share: max(1, int(share * wanted.shape[1])) for share in ORDER_SHARES}
    return {
        name: {share: misses_per_token(wanted, n, *order(wanted)) for share, n in held.items()}
        for name, order in ORDERS.items()
    }


def miss_curve(wanted: np.ndarray) -> MissCurve:
    """The curve of a layer whose tokens want `wanted`, bool [tokens, units]; the last MOST_TOKENS are simulated."""
    wanted = wanted[-MOST_TOKENS:]
    units = wanted.shape[1]
    misses = [misses_per_token(wanted, int(share * units)) for share in SHARES]
    return MissCurve(units, SHARES, tuple(np.minimum.accumulate(misses).round(2).tolist()))
