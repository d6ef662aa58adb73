"""What a unit is worth keeping: the order in which units leave a layer's memory for those that come.

A policy knows unit ids and tokens, not slots: the window asks only about units it holds, and never gives up what the
current token uses, whatever the policy says. What a unit was worth outlasts its time in memory, so one that comes back
need not earn it again. Other orders, and these, are compared on recorded traces in benchmarks/policies.py.
"""

from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Ids are int64 [n], unique within a call."""

    def use(self, ids: np.ndarray, token: int) -> None:
        """Token number `token` uses units `ids`; numbers may repeat or step back by a few, as a prompt's do."""

    def worth(self, ids: np.ndarray) -> np.ndarray:
        """Of each unit, numbers [n] that compare with each other: the smallest leaves first."""

    def reset(self) -> None:
        """Forget every use."""


class Recency:
    """The unit that was used longest ago leaves first.

    Source: LLM in a flash (arXiv 2312.11514), "The Sliding Window Technique"; the window adds the span.
    """

    def __init__(self, num_units: int):
        self._last = np.zeros(num_units, np.int32)

    def use(self, ids: np.ndarray, token: int) -> None:
        self._last[ids] = token

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return self._last[ids]

    def reset(self) -> None:
        self._last[:] = 0


DECAY = 0.98  # recorded traces: 0.97 to 0.99 read within 1 % of each other, 4 to 16 % less than Recency (RESULTS.md)


class Frequency:
    """The unit with the fewest uses leaves first, where a use counts `decay` times less with every token since.

    Instead of making all old uses smaller with each token, new ones count more: a score is the sum of
    decay^(origin - token) over a unit's uses, and `origin` follows rarely enough to cost nothing.
    """

    def __init__(self, num_units: int, decay: float = DECAY):
        self._scores = np.zeros(num_units, np.float32)
        self._decay = decay
        self._reach = int(np.log(1e-8) / np.log(decay))  # tokens until a use counts 1e8, far from float32's end
        self._origin: int | None = None

    def use(self, ids: np.ndarray, token: int) -> None:
        if self._origin is None:
            self._origin = token  # counted from the first use, so that equal generations compute equal scores
        if token - self._origin > self._reach:
            self._scores *= self._decay ** (token - self._origin)
            self._origin = token
        self._scores[ids] += np.float32(self._decay ** (self._origin - token))

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return self._scores[ids]

    def reset(self) -> None:
        self._scores[:] = 0
        self._origin = None


class Belady:
    """The unit that is used again last leaves first: no order reads less. Knows what tokens will want, bool [tokens,
    units], so it is a bound to compare with.

    Source: Belady, A study of replacement algorithms (1966).
    """

    def __init__(self, wanted: np.ndarray):
        self._next = np.full((len(wanted) + 1, wanted.shape[1]), len(wanted), np.int32)
        for t in range(len(wanted) - 1, -1, -1):
            self._next[t] = np.where(wanted[t], t, self._next[t + 1])
        self._token = 0

    def use(self, ids: np.ndarray, token: int) -> None:
        self._token = token  # tokens count from 1, so this is the row after the present one

    def worth(self, ids: np.ndarray) -> np.ndarray:
        return -self._next[self._token, ids]

    def reset(self) -> None:
        self._token = 0
