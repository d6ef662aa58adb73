"""Unit ids to rows held: which units of a layer are in memory, which leave for those that come.

Knows units, slots and tokens; the pool knows where a slot's bytes lie, the reader how they get there. Units are
brought in two phases, so that reads can run while the layer before still computes:

    ticket = window.request(ids)             start bringing units
    rows = window.ready(ticket, more_ids)    add what is known only now, wait, say how many rows are live

Source: LLM in a flash (arXiv 2312.11514), "The Sliding Window Technique" and "Optimized Data Management in DRAM".
"""

from typing import Any, Protocol

import numpy as np

from mlxflash.policy import Frequency, Policy, Recency
from mlxflash.pool import Landing, Source
from mlxflash.reader import Reader


class Rows(Protocol):
    """What a window needs of the memory it fills; backends make it."""

    capacity: int

    def settle(self, discard: bool = False) -> None:
        """Finish, or `discard`, computations that still read rows: they may be overwritten afterwards."""

    def land(self, reader: Reader, source: Source, units: np.ndarray, slots: np.ndarray) -> Landing:
        """Start bringing `units` (ascending) to `slots`, both int64 [n]."""

    def move(self, sources: np.ndarray, slots: np.ndarray) -> None:
        """Copy rows `sources` over `slots`."""

    def take(self, slots: np.ndarray, other: Any, sources: np.ndarray) -> None:
        """Copy rows `sources` of `other`, memory of the same backend, over `slots`."""


class Ticket:
    """Units under way for one token. `left` are those the pool could not hold beside the others."""

    def __init__(self, dead: np.ndarray):
        self.landings: list[Landing] = []
        self.slots: list[np.ndarray] = []
        self.lost: list[np.ndarray] = []  # slots of landings that failed
        self.dead = dead
        self.left = np.empty(0, np.int64)


class Window:
    """The units of one layer that are in memory, packed in slots [0, num_rows).

    With a `span`, units that the last `span` tokens did not use are given up (the paper's rule), and the longest unused
    first where room is short. Without one nothing leaves before its memory is wanted, which only saves reads; `policy`
    then says who leaves.
    Between calls `slot_of` [num_units] and `unit_at` [capacity] are inverse, -1 marks absence; `check()` says so. A
    pending ticket's slots are never victims. After an error nothing is left in flight and units whose bytes did not
    arrive are not held.
    """

    def __init__(
        self,
        num_units: int,
        rows: Rows,
        reader: Reader,
        source: Source,
        span: int | None = None,
        policy: Policy | None = None,
    ):
        self.num_rows = 0
        self.capacity = rows.capacity
        self.slot_of = np.full(num_units, -1, np.int64)
        self.unit_at = np.full(rows.capacity, -1, np.int64)
        self.num_hits = 0
        self.num_misses = 0
        self._rows, self._reader, self._source = rows, reader, source
        self._policy = policy or (Frequency(num_units) if span is None else Recency(num_units))
        self._span = span
        self._last = np.zeros(num_units, np.int32)  # the token that used a unit last
        self._token = 0
        self._pending: Ticket | None = None

    def request(self, ids: np.ndarray) -> Ticket:
        """A new token: start bringing units `ids`, int64 [k], ascending and unique."""
        self.drain()
        self._token += 1
        old = np.empty(0, np.int64)
        if self._span is not None:
            old = np.flatnonzero(self._last[self.unit_at[: self.num_rows]] <= self._token - self._span)
        ticket = Ticket(old)
        self._pending = ticket
        self._bring(ticket, ids)
        return ticket

    def ready(self, ticket: Ticket, more_ids: np.ndarray | None = None) -> int:
        """Bring `more_ids` as well, wait for all, and return how many rows are live, from slot 0 on.

        Where `ticket.left` is not empty the pool was too small for the token: compute, then call `next`.
        Raises OSError with path, offset and length when a read fails; the window then holds what it can vouch for.
        """
        if more_ids is not None:
            self.add(ticket, more_ids)
        self._finish(ticket)
        if len(ticket.dead):
            self._delete(ticket.dead)
        return self.num_rows

    def add(self, ticket: Ticket, more_ids: np.ndarray) -> None:
        """Start bringing `more_ids` for the ticket's token too, those not on their way already."""
        self._bring(ticket, more_ids)

    def arriving(self, ticket: Ticket) -> np.ndarray:
        """Which of rows [0, num_rows) are still on their way, bool; all of them where `ready` may yet move rows."""
        on = np.full(self.num_rows, len(ticket.dead) > 0)
        for slots in ticket.slots:
            on[slots] = True
        return on

    def next(self, ticket: Ticket) -> np.ndarray:
        """Bring the next of `ticket.left` over the rows worth least, all of which the caller has used.

        Returns which rows are new, bool [num_rows]; the others are to be left out of the computation.
        """
        assert self.num_rows == self.capacity  # else nothing had been left
        ids, ticket.left = ticket.left[: self.capacity], ticket.left[self.capacity :]
        worth = self._policy.worth(self.unit_at)
        slots = np.argpartition(worth, len(ids) - 1)[: len(ids)]
        self._pending = ticket
        self._land(ticket, ids, slots)
        self._finish(ticket)
        new = np.zeros(self.num_rows, bool)
        new[slots] = True
        return new

    def hold(self, ids: np.ndarray) -> None:
        """Bring `ids` to stay, outside any token: the resident share of a layer that is streamed whole."""
        self.drain()
        ticket = self._pending = Ticket(np.empty(0, np.int64))
        self._land(ticket, ids, self.num_rows + np.arange(len(ids)))
        self._finish(ticket)

    def advance(self, num_tokens: int) -> int:
        """A prompt of `num_tokens` passed without `request`: returns the number of its first token."""
        self.drain()
        self._token += num_tokens
        return self._token - num_tokens + 1

    def touch(self, ids: np.ndarray, used: np.ndarray, first: int) -> None:
        """Say which of units `ids`, int64 [n], tokens `first` and following used: bool [tokens, n]."""
        for token, row in enumerate(used, first):
            self._use(ids[row], token)

    def admit(self, ids: np.ndarray, source: Any, sources: np.ndarray) -> None:
        """Copy units that just streamed by into the window, where there is room or what is held is worth less.

        ids and sources (slots of `source`): int64 [n]. `touch` said before who used them.
        """
        worth = self._policy.worth(ids)
        order = np.argsort(-worth, kind="stable")
        ids, sources, worth = ids[order], sources[order], worth[order]
        self._rows.settle()
        free = np.arange(self.num_rows, min(self.capacity, self.num_rows + len(ids)))
        held = self._policy.worth(self.unit_at[: self.num_rows])
        victims = np.argsort(held, kind="stable")[: len(ids) - len(free)]
        rest = worth[len(free) :][: len(victims)]  # falls where the victims' worth rises: the better ones are the first
        victims = victims[: int(np.count_nonzero(rest > held[victims]))]
        slots = np.concatenate((free, victims))
        self._rows.take(slots, source, sources[: len(slots)])
        self._assign(ids[: len(slots)], slots)

    def clear(self) -> None:
        """Forget all rows, and what units were worth."""
        self.drain()
        self._rows.settle()
        self.slot_of[self.unit_at[: self.num_rows]] = -1
        self.unit_at[: self.num_rows] = -1
        self.num_rows = 0
        self._policy.reset()

    def reset(self) -> None:
        """Forget all, whatever state an interrupted call left; no read may be under way."""
        self._pending = None
        self.slot_of[:] = self.unit_at[:] = -1
        self.num_rows = 0
        self._policy.reset()

    def drain(self) -> None:
        """Let an abandoned ticket come to rest; what it could not bring is not held."""
        if self._pending is not None:
            try:
                self._finish(self._pending)
            except OSError:
                return  # the rows are dropped, and nobody waits for this ticket any more

    def check(self) -> None:
        """Assert every invariant of the maps; for tests."""
        live = self.unit_at[: self.num_rows]
        assert (live >= 0).all()
        assert (self.unit_at[self.num_rows :] == -1).all()
        assert (self.slot_of[live] == np.arange(self.num_rows)).all()
        assert np.count_nonzero(self.slot_of >= 0) == self.num_rows <= self.capacity

    def _bring(self, ticket: Ticket, ids: np.ndarray) -> None:
        ids = self._use(ids, self._token)  # what a correction names again is here, on its way or left for a turn
        slots = self.slot_of[ids]
        held = slots >= 0
        missing = ids[~held]
        self.num_hits += len(ids) - len(missing)
        self.num_misses += len(missing)
        ticket.dead = ticket.dead[~np.isin(ticket.dead, slots[held])] if len(ticket.dead) else ticket.dead
        if len(missing) == 0:
            return
        over, ticket.dead = ticket.dead[: len(missing)], ticket.dead[len(missing) :]
        tail = np.arange(self.num_rows, min(self.capacity, self.num_rows + len(missing) - len(over)))
        places = np.concatenate((over, tail))
        if len(places) < len(missing):
            # Nobody used what lies in `over` since, so it would be named again: ask for that many more.
            victims = self._victims(len(missing) - len(tail))
            if len(over):
                victims = np.setdiff1d(victims, over)
            places = np.concatenate((places, victims[: len(missing) - len(places)]))
        if len(places) < len(missing):
            ticket.left = np.union1d(ticket.left, missing[len(places) :])
        self._land(ticket, missing[: len(places)], places)

    def _use(self, ids: np.ndarray, token: int) -> np.ndarray:
        """Note that `token` uses `ids`; returns those it was not known to use."""
        fresh = ids[self._last[ids] != token]
        self._last[fresh] = token
        self._policy.use(fresh, token)
        return fresh

    def _victims(self, count: int) -> np.ndarray:
        """At most `count` > 0 slots to give up, first those worth least, none that the current token uses."""
        live = self.unit_at[: self.num_rows]
        slots = np.flatnonzero(self._last[live] < self._token)
        if len(slots) > count:
            slots = slots[np.argpartition(self._policy.worth(live[slots]), count - 1)[:count]]
        return slots

    def _land(self, ticket: Ticket, ids: np.ndarray, slots: np.ndarray) -> None:
        if len(ids) == 0:
            return
        self._rows.settle()
        self._assign(ids, slots)
        ticket.slots.append(slots)  # first, so that rows whose reads could not even start count as lost
        ticket.landings.append(self._rows.land(self._reader, self._source, ids, slots))

    def _assign(self, ids: np.ndarray, slots: np.ndarray) -> None:
        old = self.unit_at[slots]
        self.slot_of[old[old >= 0]] = -1
        self.unit_at[slots] = ids
        self.slot_of[ids] = slots
        self.num_rows += int(np.count_nonzero(old < 0))

    def _finish(self, ticket: Ticket) -> None:
        """Wait for every landing, then report the first error; rows of failed landings are deleted."""
        self._pending = None
        error: OSError | None = None
        while ticket.landings:
            try:
                ticket.landings[0].wait()
            except OSError as failure:
                error = error or failure
                ticket.lost.append(ticket.slots[0])
            except BaseException:
                self._pending = ticket  # interrupted while waiting: the reads go on, `drain` sees to them
                raise
            ticket.landings.pop(0)
            ticket.slots.pop(0)
        lost = ticket.lost + ticket.slots
        ticket.lost, ticket.slots = [], []
        if lost:
            self._delete(np.union1d(np.concatenate(lost), ticket.dead))
            ticket.dead = ticket.dead[:0]
        if error is not None:
            raise error

    def _delete(self, slots: np.ndarray) -> None:
        """Swap-with-last: give up rows `slots` and move the last live rows into the holes they leave."""
        self._rows.settle()
        kept = self.num_rows - len(slots)
        self.slot_of[self.unit_at[slots]] = -1
        holes = slots[slots < kept]
        sources = np.setdiff1d(np.arange(kept, self.num_rows), slots)
        self._rows.move(sources, holes)
        units = self.unit_at[sources]
        self.unit_at[holes] = units
        self.slot_of[units] = holes
        self.unit_at[kept : self.num_rows] = -1
        self.num_rows = kept
