"""Tokens per second three ways, from one bundle, at one memory budget, in one run.

    naive    nothing is kept: every token reads all weights again, resident ones too, in large sequential blocks,
             double-buffered, and computes the full FFN with the same kernels
    hybrid   memory holds what fits (resident weights and a fixed share of the FFN), the rest of the FFN streams past
             every token; exact
    flash    the same memory: predictor and window, only units that are missing are read

Every read bypasses the page cache (O_DIRECT, F_NOCACHE on macOS), so nothing is ever warm but what the budget holds;
no cache is dropped and no privilege is needed. Where the filesystem refuses direct I/O the head says `buffered` and
the figures mean little. Each way decodes the same tokens of one text (teacher-forced), after a few uncounted ones that
fill the window. Times are those of the median token, and the mean stands beside; on a machine with neighbours, let the
ways take turns (--rounds 3). GB/s is bytes read by time of a token; `of disk` sets it beside the rate at which the same
reader reads the same files sequentially in this run, the best quarter second of measurements between the ways
(or a way's own rate where that is higher: a shared disk changes by the second).

Does not show: quality (a random bundle has none; the story model's is in its manifest), prompts, long generations, or
another machine. With --trace the predictor's answer is replaced by a trace's (trace.py), and the predictor, where the
bundle has one, still runs, so its time and memory are counted: needed on random weights, where half of all units are
active. A synthetic trace replays published statistics and cannot tell what a pool larger than its window saves.

    python benchmarks/naive.py story.flash --memory 50%
    python benchmarks/naive.py opt-6.7b.flash --memory 50% --trace
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from trace import Trace, replay, stand_before_ffns, synthetic
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.api import load_tokenizer
from mlxflash.backends import Backend
from mlxflash.bundle import Bundle, BundleError
from mlxflash.decode import reserved_cache
from mlxflash.ffn import Times
from mlxflash.flash import FlashModel
from mlxflash.model import load_bundle
from mlxflash.plan import format_bytes
from mlxflash.pool import host_memory
from mlxflash.reader import File, make_reader

BLOCK_BYTES = 8 << 20
PAGE = 4096
TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and "
    "what is the use of a book, thought Alice, without pictures or conversations? So she was considering in her own "
    "mind, as well as she could, for the hot day made her feel very sleepy and stupid, whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with "
    "pink eyes ran close by her. There was nothing so very remarkable in that; nor did Alice think it so very much out "
    "of the way to hear the Rabbit say to itself, Oh dear! Oh dear! I shall be late! "
)


@dataclass
class Outcome:
    """What decoding `seconds` (one per token) with one way took."""

    mode: str
    said: str
    seconds: list[float]
    bytes_per_token: float
    reads_per_token: float
    flash_s: float
    manage_s: float
    predict_s: float
    held_share: float
    peak_rss_gb: float
    held_bytes: int = 0
    memory_bytes: int = 0
    ready_s: float = 0.0
    forecast_s: float = 0.0
    alone_s: float = 0.0  # a token's reads with nothing computed
    staged_s: float = 0.0  # copying what passed through staging
    staged_bytes: float = 0.0
    plan: str = ""
    transfer_s: float = 0.0
    transfer_bytes: float = 0.0
    tier_hit_rate: float = 0.0
    pool_copies: int = 0

    @property
    def per_token(self) -> float:
        return float(np.median(self.seconds))

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.bytes_per_token / self.per_token / 1e9

    @classmethod
    def pooled(cls, rounds: list["Outcome"]) -> "Outcome":
        """One outcome of several rounds of the same way: all their tokens, and the means of what is per token."""
        numbers = [f.name for f in fields(cls)[3:] if f.name != "plan"]
        values = {name: float(np.mean([getattr(o, name) for o in rounds])) for name in numbers}
        return cls(rounds[0].mode, rounds[0].said, [s for o in rounds for s in o.seconds], **values)


class Rereader:
    """Reads a model's resident files again with every token, a layer's share ahead of each layer, and drops them.

    What is computed are the weights loaded at the start: the same bytes. Two buffers take turns, so the disk works
    while the layer before computes.
    """

    def __init__(self, reader: Any, paths: list[Path], layers: int, times: Times):
        self._reader, self._times = reader, times
        self._files = [File(path, direct=True) for path in paths]
        pieces = [
            (file, offset, min(BLOCK_BYTES, size - offset))
            for file, size in ((f, Path(f.path).stat().st_size // PAGE * PAGE) for f in self._files)
            for offset in range(0, size, BLOCK_BYTES)
        ]
        bounds = [len(pieces) * i // layers for i in range(layers + 1)]
        self._shares = [pieces[a:b] for a, b in pairwise(bounds)]
        most = max(sum(length for *_, length in share) for share in self._shares)
        self._buffers = [host_memory(most) for _ in range(2)]
        self._tickets: list[Any] = []

    def before_layer(self, index: int) -> None:
        """Wait for this layer's share, which was started a layer ago, and start the next one's."""
        begin = time.perf_counter()
        self.drain()
        self._times.flash += time.perf_counter() - begin
        self._start(index + 1)

    def _start(self, index: int) -> None:
        buffer, at = self._buffers[index % 2], 0
        share = self._shares[index % len(self._shares)]
        for file in self._files:
            mine = [(offset, length) for f, offset, length in share if f is file]
            if mine:
                lengths = np.array([length for _, length in mine])
                places = at + np.cumsum(lengths) - lengths
                spans = np.stack([[offset for offset, _ in mine], places, lengths], axis=1).astype(np.uint64)
                self._tickets.append(self._reader.submit(file, spans, buffer))
                at += int(lengths.sum())

    def drain(self) -> None:
        for ticket in self._tickets:
            ticket.wait()
        self._tickets = []

    def close(self) -> None:
        self.drain()
        for file in self._files:
            file.close()


class BeforeFFN(nn.Module):
    """Tells the rereader that the model is at a layer."""

    def __init__(self, ffn: nn.Module, rereader: Rereader, index: int):
        super().__init__()
        self._ffn, self._rereader, self._index = ffn, rereader, index

    def __call__(self, x: mx.array) -> mx.array:
        self._rereader.before_layer(self._index)
        return self._ffn(x)


def reread_everything(model: FlashModel, bundle: Bundle) -> Rereader:
    """Make a model loaded for streaming keep nothing."""
    for layer in model.flash.layers:
        layer.window.clear()
    rereader = Rereader(model.flash.reader, bundle.resident_files(), bundle.num_layers, model.flash.times)
    for index, (layer, recorder) in enumerate(zip(model.layers, stand_before_ffns(model), strict=True)):
        name = next(name for name, module in layer.children().items() if module is recorder)
        setattr(layer, name, BeforeFFN(recorder._ffn, rereader, index))
    return rereader


def decode(model: FlashModel, tokens: np.ndarray, warm: int, mode: str) -> Outcome:
    """Feed `tokens` one by one; the first `warm` are not counted."""
    cache = reserved_cache(model, None, len(tokens))
    seconds = []
    before = model.flash.snapshot()
    for i, token in enumerate(tokens.tolist()):
        if i == warm:
            before = model.flash.snapshot()
        begin = time.perf_counter()
        mx.eval(model(mx.array([[token]]), cache=cache))
        if i >= warm:
            seconds.append(time.perf_counter() - begin)
    stats = model.flash.stats(before, len(seconds))
    return Outcome(
        mode,
        model.flash.mode,
        seconds,
        stats.bytes_per_token,
        stats.reads_per_token,
        stats.flash_s / len(seconds),
        stats.manage_s / len(seconds),
        stats.predict_s / len(seconds),
        stats.held_share,
        stats.peak_rss_gb,
        transfer_s=stats.transfer_s / len(seconds),
        transfer_bytes=stats.transfer_bytes,
        tier_hit_rate=stats.tier_hit_rate,
        pool_copies=stats.pool_copies,
    )


def run_naive(
    bundle: Bundle, memory: str, tokens: np.ndarray, warm: int, context: int, backend: Backend | None = None
) -> Outcome:
    with load_exact(bundle, memory, context, backend) as model:
        rereader = reread_everything(model, bundle)
        try:
            return decode(model, tokens, warm, "naive")
        finally:
            rereader.close()


def run_hybrid(
    bundle: Bundle, memory: str, tokens: np.ndarray, warm: int, context: int, backend: Backend | None = None
) -> Outcome:
    with load_exact(bundle, memory, context, backend) as model:
        return decode(model, tokens, warm, "hybrid")


def load_exact(bundle: Bundle, memory: str, context: int, backend: Backend | None) -> FlashModel:
    return load_bundle(
        bundle.path, memory=memory, predictor="all", direct=True, max_kv_size=context, backend=backend, bundle=bundle
    )


def run_flash(
    bundle: Bundle, memory: str, tokens: np.ndarray, warm: int, context: int, trace: Trace | None
) -> tuple[Outcome, str]:
    with load_bundle(bundle.path, memory=memory, direct=True, max_kv_size=context, bundle=bundle) as model:
        if trace is not None:
            for layer in model.flash.layers:
                layer.window.clear()  # what a load without predictor holds
            replay(model, trace)
            model.flash.mode = "replayed trace"
        return decode(model, tokens, warm, "flash"), model.flash.describe()


def sequential_rate(bundle: Bundle, seconds: float = 1.5, slice_s: float = 0.25) -> float:
    """GB/s at which our reader reads the bundle's own files in order, direct: the best slice of `seconds`.

    Four batches are in flight, and files follow each other without a pause.
    """
    reader = make_reader()
    files = [File(path, direct=True) for path in (bundle.layer_path(i) for i in range(bundle.num_layers))]
    blocks = [
        (file, offset, min(BLOCK_BYTES, size - offset))
        for file, size in ((f, Path(f.path).stat().st_size // PAGE * PAGE) for f in files)
        for offset in range(0, size, BLOCK_BYTES)
    ]
    buffers = [host_memory(BLOCK_BYTES) for _ in range(4)]
    pending: list[tuple[Any, int]] = []
    best = 0.0
    end = time.perf_counter() + seconds
    begin, done, i = time.perf_counter(), 0, 0
    while begin < end:
        if len(pending) == len(buffers):
            ticket, length = pending.pop(0)
            ticket.wait()
            done += length
        file, offset, length = blocks[i % len(blocks)]
        span = np.array([[offset, 0, length]], np.uint64)
        pending.append((reader.submit(file, span, buffers[i % len(buffers)]), length))
        i += 1
        now = time.perf_counter()
        if now - begin >= slice_s:
            best = max(best, done / (now - begin) / 1e9)
            begin, done = now, 0
    reader.close()
    for file in files:
        file.close()
    return best


def text_tokens(bundle: Bundle, count: int) -> np.ndarray:
    words = load_tokenizer(bundle.path).encode(TEXT[: 8 * count])
    return np.resize(np.array(words), count)


def table(outcomes: list[Outcome], disk: float) -> str:
    head = ("", "tokens/s", "ms/token", "mean", "MB/token", "reads/token", "GB/s", "of disk", "FFN held", "vs naive")
    lines = ["{:<8}{:>10}{:>10}{:>8}{:>10}{:>13}{:>7}{:>9}{:>10}{:>10}".format(*head)]
    slow = outcomes[0].per_token
    for o in outcomes:
        lines.append(
            f"{o.mode:<8}{1 / o.per_token:>10.2f}{1e3 * o.per_token:>10.1f}{1e3 * np.mean(o.seconds):>8.1f}"
            f"{o.bytes_per_token / 1e6:>10.1f}{o.reads_per_token:>13.0f}{o.rate:>7.2f}{o.rate / disk:>9.0%}"
            f"{o.held_share:>10.1%}{slow / o.per_token:>9.1f}x"
        )
    return "\n".join(lines)


def where_time_went(o: Outcome) -> str:
    rest = float(np.mean(o.seconds)) - o.flash_s - o.manage_s - o.predict_s
    parts = {"waiting for reads": o.flash_s, "window": o.manage_s, "predicting": o.predict_s, "computing": rest}
    return f"{o.mode}: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in parts.items()) + " per token, means"


def to_json(
    outcomes: list[Outcome], disk: float, rates: list[float], args: argparse.Namespace, model_bytes: int
) -> str:
    rows = [
        {
            "mode": o.mode,
            "said": o.said,
            "tokens": len(o.seconds),
            "tokens_per_s": 1 / o.per_token,
            "ms_per_token": 1e3 * o.per_token,
            "ms_mean": 1e3 * float(np.mean(o.seconds)),
            "ms_sd": 1e3 * float(np.std(o.seconds)),
            "bytes_per_token": o.bytes_per_token,
            "reads_per_token": o.reads_per_token,
            "gb_s": o.rate,
            "held_share": o.held_share,
            "flash_ms": 1e3 * o.flash_s,
            "manage_ms": 1e3 * o.manage_s,
            "predict_ms": 1e3 * o.predict_s,
            "peak_rss_gb": o.peak_rss_gb,
            "ratio_to_naive": outcomes[0].per_token / o.per_token,
        }
        for o in outcomes
    ]
    head = {
        "bundle": args.bundle.name,
        "memory": args.memory,
        "model_bytes": model_bytes,
        "disk_gb_s": disk,
        "sequential_gb_s": rates,
    }
    head |= {"load_average": os.getloadavg()[0]}
    return json.dumps({**head, "trace": args.trace, "rounds": args.rounds, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", default="50%", help="of hybrid and flash: 50%% (default) of the model, 2GB, ...")
    parser.add_argument("--tokens", type=int, default=32, help="counted with flash (default 32)")
    parser.add_argument("--warm", type=int, default=16, help="uncounted with flash before them (default 16)")
    parser.add_argument("--baseline-tokens", type=int, help="counted with naive and hybrid (default: a quarter)")
    parser.add_argument(
        "--trace", nargs="?", const="synthetic", help="replay a trace: a file, or the published figures"
    )
    parser.add_argument("--rounds", type=int, default=1, help="turns of the three ways, for noisy machines")
    parser.add_argument("--context", type=int, help="tokens of key-value cache in the budget (default: as many as run)")
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        raise SystemExit(f"naive: {error}") from None


def run(args: argparse.Namespace) -> None:
    bundle = Bundle.open(args.bundle)
    layers = bundle.manifest.layers
    total = args.warm + args.tokens
    args.context = args.context or total
    if total > args.context:
        raise BundleError(f"--warm and --tokens are {total} tokens, --context has room for {args.context}")
    trace = None
    if args.trace == "synthetic":
        trace = synthetic(len(layers), layers[0].units, total)
    elif args.trace:
        trace = Trace.load(args.trace)
    tokens = text_tokens(bundle, total)
    few = args.baseline_tokens or max(2, args.tokens // 4)
    model_bytes = bundle.streamed_bytes() + bundle.resident_bytes()
    probe = File(bundle.layer_path(0), direct=True)
    cold = "direct reads: cold, the page cache is bypassed" if probe.direct else "BUFFERED READS: NOT COLD"
    probe.close()
    print(f"{args.bundle.name}: {format_bytes(model_bytes)}, budget {args.memory}; {cold}")
    rates, rounds, plan = [sequential_rate(bundle)], [], ""
    for _ in range(args.rounds):
        row = [run_naive(bundle, args.memory, tokens[: few + 1], 1, args.context)]
        rates.append(sequential_rate(bundle))
        row.append(run_hybrid(bundle, args.memory, tokens[: few + 1], 1, args.context))
        rates.append(sequential_rate(bundle))
        flash, plan = run_flash(bundle, args.memory, tokens, args.warm, args.context, trace)
        rates.append(sequential_rate(bundle))
        rounds.append([*row, flash])
    outcomes = [Outcome.pooled(list(way)) for way in zip(*rounds, strict=True)]
    disk = max(rates + [o.rate for o in outcomes])
    print(plan)
    print(f"flash is {outcomes[-1].said}" + (f" ({trace.note})" if trace else ""))
    print(f"disk, sequential, same reader, between the ways: {', '.join(f'{r:.2f}' for r in rates)} GB/s")
    print(f"other load: {os.getloadavg()[0]:.1f} programs wanting {os.cpu_count()} cores, ours included\n")
    print(table(outcomes, disk))
    print()
    for o in outcomes:
        print(where_time_went(o))
    print(to_json(outcomes, disk, rates, args, model_bytes))


if __name__ == "__main__":
    main()
