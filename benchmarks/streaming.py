"""Exact streaming beside its limit: seconds per token where every unit is computed and what is not held streams.

Three ways in turn, token by token, on one loaded model: each layer asks for its own blocks ("alone"), streams run on
from layer to layer and from token to token ("chained", what mlxflash does), and the same blocks read through the same
buffers with nothing computed ("reads", the limit where reading takes longer than computing). Direct reads.

    python benchmarks/streaming.py BUNDLE --memory 1.5GB [--tokens 20]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxflash.model import load_bundle


def token_seconds(model: Any, cache: Any) -> float:
    begin = time.perf_counter()
    mx.eval(model(mx.array([[5]]), cache=cache))
    return time.perf_counter() - begin


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
    parser.add_argument("--tokens", type=int, default=20, help="per way (20)")
    args = parser.parse_args()
    with load_bundle(args.bundle, memory=args.memory, predictor="all", direct=True, max_kv_size=256) as model:
        flash = model.flash
        if flash.plan.whole:
            raise SystemExit("streaming: all of it is held; give less --memory")
        print(flash.describe())
        cache = make_prompt_cache(model)
        after = [layer.after for layer in flash.layers]
        token_seconds(model, cache)
        seconds: dict[str, list[float]] = {"alone": [], "chained": [], "reads": []}
        for _ in range(args.tokens):
            for layer in flash.layers:
                layer.after = None
            seconds["alone"].append(token_seconds(model, cache))
            for layer, following in zip(flash.layers, after, strict=True):
                layer.after = following
            seconds["chained"].append(token_seconds(model, cache))
            flash.layers[0].blocks.drain()
            seconds["reads"].append(read_seconds(model))
        for way, taken in seconds.items():
            low, middle, high = np.percentile(taken, [25, 50, 75])
            print(f"{way:<8} {middle:.3f} s per token, quartiles {low:.3f} and {high:.3f}, least {min(taken):.3f}")
        pairs = np.array(seconds["alone"]) / np.array(seconds["chained"])
        won, gain = (pairs > 1).mean(), np.median(pairs)
        print(f"chained was faster in {won:.0%} of {len(pairs)} pairs, {gain:.2f} times (median)")


if __name__ == "__main__":
    main()
