"""A model that fits, decoded by our CPU kernels and by MLX's own: tokens per second of one bundle on both, in one run.

Everything is held, nothing is read while decoding; the ways take turns. What it does not show: machines with Metal,
where MLX's kernels are the ones that are used.

    python benchmarks/resident.py --shape opt-1.3b [--bits 4] [--dir FOLDER]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from shapes import SHAPES, write_bundle

from mlxflash.decode import reserved_cache
from mlxflash.model import load_bundle

DEVICES = ("cpu", "mlx-cpu")
CONTEXT = 64


def decode_ms(path: Path, device: str, tokens: int) -> list[float]:
    """Milliseconds of each of `tokens` tokens, after one uncounted."""
    times = []
    with load_bundle(path, predictor="all", device=device, max_kv_size=CONTEXT) as model:
        if not model.flash.plan.whole:
            raise SystemExit("resident: this model does not fit the memory that is available")
        cache = reserved_cache(model, None, CONTEXT)
        for _ in range(tokens + 1):
            begin = time.perf_counter()
            mx.eval(model(mx.array([[5]]), cache=cache))
            times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=None, help="float16 otherwise")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=None, help="where bundles are kept; a temporary folder otherwise")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        name = f"{args.shape}-q{args.bits}.flash" if args.bits else f"{args.shape}.flash"
        path = (args.dir or Path(scratch)) / name
        if not (path / "manifest.json").exists():
            write_bundle(args.shape, path, dtype="float16", bits=args.bits)
        taken: dict[str, list[float]] = {device: [] for device in DEVICES}
        for _ in range(args.rounds):
            for device in DEVICES:
                taken[device] += decode_ms(path, device, args.tokens)
    ms = {device: float(np.median(times)) for device, times in taken.items()}
    for device in DEVICES:
        print(
            f"{device:<8}{ms[device]:8.1f} ms  {1e3 / ms[device]:6.2f} tokens/s  {ms['mlx-cpu'] / ms[device]:5.1f}x MLX"
        )
    print(json.dumps({"shape": args.shape, "bits": args.bits, "ms": ms, "ratio": ms["mlx-cpu"] / ms["cpu"]}))


if __name__ == "__main__":
    main()
