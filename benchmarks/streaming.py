"""Exact streaming beside its limit: seconds per token where every unit is computed and what is not held streams.

Three ways in turn, on one loaded model: each layer asks for its own blocks ("alone"), streams run on from layer to
layer and from token to token ("chained", what mlxflash does), and the same blocks read through the same buffers with
nothing computed ("reads", the limit where reading takes longer than computing). Direct reads.

    python benchmarks/streaming.py BUNDLE --memory 1.5GB [--tokens 4] [--rounds 3]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxflash.model import load_bundle


def token_seconds(model: Any, cache: Any, count: int) -> float:
    """The median of `count` decoded tokens."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        mx.eval(model(mx.array([[5]]), cache=cache))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def read_seconds(model: Any) -> float:
    """All blocks of one token, two under way, nothing computed."""
    layers = model.flash.layers
    pair = layers[0].blocks.pair
    pending: list[Any] = []
    n, begin = 0, time.perf_counter()
    for layer in layers:
        absent = np.flatnonzero(layer.window.slot_of < 0)
        for first in range(0, len(absent), pair[0].capacity):
            units = absent[first : first + pair[0].capacity]
            if len(pending) == 2:
                pending.pop(0).wait()
            pending.append(pair[n % 2].land(layer.reader, layer.source, units, np.arange(len(units))))
            n += 1
    for landing in pending:
        landing.wait()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--tokens", type=int, default=4, help="per way and round (4)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with load_bundle(args.bundle, memory=args.memory, predictor="all", direct=True, max_kv_size=256) as model:
        flash = model.flash
        if flash.plan.whole:
            raise SystemExit("streaming: all of it is held; give less --memory")
        print(flash.describe())
        cache = make_prompt_cache(model)
        after = [layer.after for layer in flash.layers]
        token_seconds(model, cache, 1)
        print("seconds per token: alone, chained, reads; chained / reads")
        for _ in range(args.rounds):
            for layer in flash.layers:
                layer.after = None
            alone = token_seconds(model, cache, args.tokens)
            for layer, following in zip(flash.layers, after, strict=True):
                layer.after = following
            token_seconds(model, cache, 1)
            before = flash.snapshot().num_bytes
            chained = token_seconds(model, cache, args.tokens)
            per_token = (flash.snapshot().num_bytes - before) / args.tokens
            flash.layers[0].blocks.drain()
            reads = min(read_seconds(model) for _ in range(2))
            print(
                f"{alone:.3f}, {chained:.3f}, {reads:.3f}; {chained / reads:.2f}   ({per_token / 1e6:.0f} MB per token)"
            )


if __name__ == "__main__":
    main()
