"""What streaming costs in fidelity, setting by setting: `mlxflash eval` over budgets, windows, predictors and levels.

A budget is a size as for generate, or `share S`: the one at which predictor and pools together take S of the
feed-forward bytes, as the paper counts. A rule is `level`, a fidelity level's name, or `margin`, the calibrated margin;
`paper` is the margin with a window of 5 tokens. Bytes per token stand beside the kernel's own count. `read` is the
share of all units that a token reads, `2nd on` the mean of the second and later layers; direct reads bring more bytes
than that, since they read through gaps that cost less than another read. Says nothing about speed. Prints a line and,
at the end, a JSON object per setting.

    python benchmarks/fidelity.py BUNDLE --text FILE --share 0.24 --predictors low-bit low-rank
    python benchmarks/fidelity.py BUNDLE --text FILE --memory 36MB 40MB --rules margin --windows 1 5 0
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlxflash.api import load_tokenizer
from mlxflash.bundle import Bundle
from mlxflash.evaluate import Dense, Report, evaluate
from mlxflash.fidelity import LEVELS, levels_of
from mlxflash.model import load_bundle
from mlxflash.plan import BudgetError
from mlxflash.predictor import MARGIN

PAPER_WINDOW = 5
RULES = ("paper", "margin", *LEVELS)
CLOSE = 0.0005  # of the feed-forward bytes, to a share that is asked for


def budget(bundle: Bundle, share: float, context: int, settings: dict[str, Any]) -> int:
    """Bytes at which predictor and pools take `share` of the feed-forward bytes."""

    def taken(memory: int) -> float:
        with load_bundle(bundle.path, memory=memory, max_kv_size=context, bundle=bundle, **settings) as model:
            plan = model.flash.plan
            return 1.0 if plan.whole else (plan.predictor + plan.pools) / bundle.streamed_bytes()

    with load_bundle(bundle.path, max_kv_size=context, bundle=bundle) as model:
        high = model.flash.plan.memory
    low = 0
    while True:
        middle = (low + high) // 2
        try:
            found = taken(middle)
        except BudgetError:
            found = -1.0
        if abs(found - share) < CLOSE or high - low < 1000:
            return middle
        low, high = (middle, high) if found < share else (low, middle)


def line(name: str, r: Report, bundle: Bundle) -> str:
    counted = f"{r.kernel_bytes_per_token:.0f}" if r.kernel_bytes_per_token is not None else "-"
    read = [layer.flagged * (1 - layer.hit_rate) for layer in r.layers]
    return (
        f"{name:<30}{(r.predictor_bytes + r.pool_bytes) / bundle.streamed_bytes():7.1%}{r.memory_bytes / 1e6:9.2f} MB"
        f"{r.ppl:10.4f}{r.ppl_change:+9.3%} +-{r.ppl_change_se:.3%}{r.kl:9.5f}{r.top1:8.2%}{r.recall:8.2%}"
        f"{r.flagged:8.2%}{r.bytes_per_token:10.0f}{counted:>10}{r.reads_per_token:7.1f}{np.mean(read):8.2%}{np.mean(read[1:]):8.2%}"
        f"{r.hit_rate:7.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text, never the one calibrated on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens of a stretch (512)")
    parser.add_argument("--memory", nargs="*", default=[], help="budgets, as for generate")
    parser.add_argument("--share", nargs="*", type=float, default=[], help="predictor and pools, of the FFN's bytes")
    parser.add_argument("--predictors", nargs="+", default=["low-bit"])
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[0], help="tokens that units stay, 0: as long as can be"
    )
    parser.add_argument("--direct", action="store_true", help="bypass the page cache")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    tokens = np.array(load_tokenizer(args.bundle).encode(args.text.read_text()), np.int64)[: args.tokens + 1]
    rows = []
    with Dense(bundle, tokens, num_tokens=args.tokens, context=args.context) as dense:
        print(
            f"{args.bundle.name}: dense perplexity {dense.perplexity:.4f} on {args.tokens} tokens of {args.text.name}"
        )
        print(
            f"{'setting':<30}{'share':>7}{'memory':>12}{'ppl':>10}{'change':>18}{'KL':>9}{'top-1':>8}{'recall':>8}{'flagged':>8}"
            f"{'bytes':>10}{'kernel':>10}{'reads':>7}{'read':>8}{'2nd on':>8}{'hits':>7}"
        )
        for predictor in args.predictors:
            for rule in args.rules:
                if rule in LEVELS and not levels_of(bundle, predictor, rule):
                    continue
                for window in [PAPER_WINDOW] if rule == "paper" else args.windows:
                    settings: dict[str, Any] = {"predictor": predictor, "window": window or None}
                    settings |= {"fidelity": rule} if rule in LEVELS else {"margin": MARGIN}
                    shares = [budget(bundle, share, args.context + 1, settings) for share in args.share]
                    for memory in [*args.memory, *shares]:
                        dense.memory = memory
                        report = evaluate(dense, direct=args.direct, **settings)
                        name = f"{predictor} {rule}" + (f" window {window}" if window else "")
                        print(line(name, report, bundle), flush=True)
                        rows.append({"rule": rule} | report.to_json())
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
