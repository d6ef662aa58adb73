"""The streaming side of a model: what it holds, what it did, how it closes and starts afresh."""

import contextlib
import resource
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxflash.backends import Backend, Traffic
from mlxflash.bundle import Bundle
from mlxflash.ffn import FlashLayer, Times
from mlxflash.fidelity import Level
from mlxflash.forecast import Forecast
from mlxflash.plan import DEVICE_SHARE, BudgetError, Plan, as_typed, format_bytes
from mlxflash.reader import File, Reader


@dataclass(frozen=True)
class FlashStats:
    """What one generation, or the time since a snapshot, did; bytes and reads as asked of the operating system."""

    mode: str
    decoded: int  # tokens that went through the window
    bytes_per_token: float
    reads_per_token: float
    hit_rate: float
    held_share: float  # of all FFN units, in memory at the end
    peak_rss_gb: float
    flash_s: float  # asking for reads and waiting for them
    manage_s: float  # window upkeep
    predict_s: float
    transfer_s: float  # host to device, where they have memory of their own
    transfer_bytes: float  # the same per token
    tier_hit_rate: float  # of the units that went to the device, from the host's memory
    pool_copies: int  # updates of rows that copied a whole pool: a bug, or a computation that was not finished
    forecast_tps: float | None  # tokens per second as foreseen; None: not where reads may come from the page cache
    forecast: str  # the same for people; of mixtures that nobody measured it is the least


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment; statistics are differences of two."""

    num_bytes: int
    num_reads: int
    hits: int
    misses: int
    decoded: int
    times: Times
    traffic: Traffic


class FlashModel(nn.Module):
    """Mixed into the family's model class: closes like a file. `flash` is the streaming side."""

    flash: "Flash"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's model; first sweeps up after a pass that did not reach its end."""
        flash = self.flash
        if flash.torn:
            flash.forget()
        flash.torn = True
        try:
            logits = super().__call__(*args, **kwargs)
        except RuntimeError as error:
            raise flash.explain(error) from None
        flash.torn = False
        return logits

    def close(self) -> None:
        """Release descriptors, threads and pools; the model cannot compute afterwards. Safe to call twice."""
        self.flash.close()

    def __enter__(self) -> "FlashModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Flash:
    """The streaming side of a model: its layers, reader and plan."""

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        reader: Reader,
        backend: Backend,
        mode: str,
        predictor: str,
        level: Level | None = None,
        forecast: Forecast | None = None,
        choice: str = "",
    ):
        self.bundle, self.plan, self.reader, self.backend, self.mode = bundle, plan, reader, backend, mode
        self.predictor, self.level, self.forecast, self.choice = predictor, level, forecast, choice
        self.layers: list[FlashLayer] = []
        self.owners: list[Any] = []  # the model's layers that these belong to: of hybrids not all
        self.files: list[File] = []
        self.stagings: tuple[Any, ...] = ()  # where units land on their way; each has `reset`
        self.times = Times()
        self.torn = False  # a pass was begun and did not end: an interrupt or a failed read cut it off
        self.closed = False
        self._finalizer = weakref.finalize(self, _release, reader, self.files)

    def describe(self) -> str:
        """The plan and what carries it out, for people."""
        direct = "direct" if self.files and self.files[0].direct else "buffered"
        carries = f" by {self.backend.carries}" if self.backend.discrete else ""
        said = f"{self.plan.describe()}\n  on {self.backend.name}{carries}, {direct} reads by {self.reader.engine}"
        said += f"\n  {self.mode}"
        return "\n".join([said, *([self.forecast.describe()] if self.forecast else []), *filter(None, [self.choice])])

    def explain(self, error: RuntimeError) -> Exception:
        """MLX's error, or where a device has no memory left the budget that would fit."""
        free = self.backend.available_memory()
        text = str(error)
        if free is None or ("out of memory" not in text and "Unable to allocate" not in text):
            return error
        fits = int(DEVICE_SHARE * self.plan.memory)
        return BudgetError(
            f"the device ran out of memory with a budget of {format_bytes(self.plan.memory)},"
            f" {format_bytes(free)} free: others use it too; --memory {as_typed(fits)} leaves room",
            fits,
        )

    @property
    def exact(self) -> bool:
        return self.mode.startswith("exact")

    def snapshot(self) -> Snapshot:
        return Snapshot(
            num_bytes=self.reader.num_bytes,
            num_reads=self.reader.num_reads,
            hits=sum(layer.window.num_hits for layer in self.layers),
            misses=sum(layer.window.num_misses for layer in self.layers),
            decoded=self.layers[0].num_decoded,
            times=replace(self.times),
            traffic=replace(self.backend.traffic),
        )

    def stats(self, since: Snapshot, tokens: int) -> FlashStats:
        """What happened since `since`, per token for `tokens` decoded tokens."""
        now = self.snapshot()
        flagged = now.hits - since.hits + now.misses - since.misses
        per = max(tokens, 1)
        sent, before = now.traffic, since.traffic
        hits = sent.tier_hits - before.tier_hits
        transfer_s = sent.seconds - before.seconds
        return FlashStats(
            mode=self.mode,
            decoded=tokens,
            bytes_per_token=(now.num_bytes - since.num_bytes) / per,
            reads_per_token=(now.num_reads - since.num_reads) / per,
            hit_rate=(now.hits - since.hits) / flagged if flagged else self.held_share(),
            held_share=self.held_share(),
            peak_rss_gb=peak_rss_bytes() / 1e9,
            flash_s=now.times.flash - since.times.flash,
            manage_s=now.times.manage - since.times.manage,
            predict_s=now.times.predict - since.times.predict,
            transfer_s=transfer_s,
            transfer_bytes=(sent.bytes - before.bytes) / per,
            tier_hit_rate=hits / max(1, hits + sent.tier_misses - before.tier_misses),
            pool_copies=sent.pool_copies - before.pool_copies,
            forecast_tps=1 / self.forecast.seconds if self.forecast else None,
            forecast=self.forecast.rate if self.forecast else "",
        )

    def held_share(self) -> float:
        return sum(layer.window.num_rows for layer in self.layers) / sum(layer.units for layer in self.layers)

    def forget(self) -> None:
        """Start windows afresh, as after loading, so that what follows does not depend on what came before.

        After a torn pass nothing is trusted: an interrupt may have come between any two steps of it.
        """
        torn, self.torn = self.torn, True
        if torn:
            self.reader.restart()
            for staging in self.stagings:
                staging.reset()
        else:
            self.reader.drain()
        for layer in self.layers:
            layer.ticket = None
            if torn:
                layer.blocks.reset()
                layer.rows.settle(discard=True)
                if not layer.fixed:
                    layer.window.reset()
            else:
                layer.blocks.drain()
                if not layer.fixed:
                    layer.window.clear()
        self.torn = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._finalizer()
            for layer in self.layers:  # they name each other in a ring, which only the garbage collector would undo
                layer.next = layer.after = layer.ahead = None
                layer.blocks.reset()
            self.layers.clear()


def _release(reader: Reader, files: list[File]) -> None:
    reader.close()
    for file in files:
        file.close()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    with contextlib.suppress(OSError):  # Linux, whose getrusage counts what the parent had before it started us
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
