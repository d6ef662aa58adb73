"""`mlxflash eval`: what streaming costs in fidelity on a text, in figures, as JSON and as pictures."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflash.bundle import Bundle
from mlxflash.commands.terminal import FIDELITIES, Progress, read_text, say
from mlxflash.hub import STORY
from mlxflash.plan import format_bytes

if TYPE_CHECKING:
    from mlxflash.evaluate import Report

PAPER_WINDOW = 5  # tokens, of LLM in a flash


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path, help="bundle directory (story)")
    p.add_argument("--text", required=True, metavar="FILE", help="held-out text: not what it was calibrated on")
    p.add_argument("--tokens", type=int, default=1024, help="of the text, at most (1024)")
    p.add_argument("--context", type=int, default=512, help="tokens of a stretch, at most (512)")
    p.add_argument("--memory", default=None, help="as for generate")
    p.add_argument("--predictor", nargs="+", default=[None], choices=["low-bit", "low-rank", "oracle", "all"])
    p.add_argument("--fidelity", nargs="+", default=[None], choices=FIDELITIES, help="levels, each with each predictor")
    p.add_argument("--sparsity", nargs="+", type=int, default=[], metavar="P", help="as for generate, one by one")
    p.add_argument("--margin", type=float, default=None, help="instead of a level: in standard errors of the estimate")
    p.add_argument("--window", type=int, default=None, help="as for generate")
    p.add_argument("--device", default=None, help="as for generate")
    p.add_argument("--json", action="store_true", help="print one JSON object per setting")
    p.add_argument("--plot", default=None, metavar="FILE", help="draw it too: .svg, .png, .pdf (needs mlxflash[plot])")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from mlxflash.evaluate import LEAST_TOKENS, Dense, evaluate

    if args.tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: at least {LEAST_TOKENS}")
    if args.context < LEAST_TOKENS:
        raise ValueError(f"--context {args.context}: at least {LEAST_TOKENS}")
    if args.plot:
        from mlxflash.plot import check_plot
        from mlxflash.predictor import MARGIN

        check_plot(args.plot)
    bundle = Bundle.open(STORY if str(args.bundle) == "story" else args.bundle)
    tokens = read_text(args.text, bundle.path, args.tokens + 1)
    reports: list[Report] = []
    with (
        Progress() as progress,
        Dense(
            bundle,
            tokens,
            num_tokens=args.tokens,
            context=args.context,
            memory=args.memory,
            device=args.device,
            progress=progress,
        ) as dense,
    ):
        settings: list[dict[str, Any]] = [
            {"predictor": p, "fidelity": f, "window": args.window, "margin": args.margin}
            for p in args.predictor
            for f in args.fidelity
            if not args.sparsity or (p, f) != (None, None)
        ]
        settings += [{"sparsity": percent, "window": args.window} for percent in args.sparsity]
        if args.plot and bundle.manifest.sparse:  # the paper's rule is marked beside whatever was asked for
            paper = "low-rank" if "low-rank" in bundle.predictors() else "low-bit"
            settings.append({"predictor": paper, "window": PAPER_WINDOW, "margin": MARGIN})
        for setting in settings:
            reports.append(evaluate(dense, **setting))
            progress.close()
            if args.json:
                print(json.dumps(reports[-1].to_json()), flush=True)
    if not args.json:
        print(table(reports))
    if args.plot:
        from mlxflash.plot import draw

        draw([(name_of(r), r) for r in reports], args.plot)
        say(f"{args.plot}: drawn")


def table(reports: list["Report"]) -> str:
    """For people: a line per setting, then a line per layer of each."""
    first = reports[0]
    lines = [
        f"{first.bundle}: {first.tokens} tokens through the decode path, dense perplexity {first.ppl_dense:.4f}",
        f"{'setting':<24}{'perplexity':>11}{'change':>19}{'KL':>9}{'top-1':>8}{'recall':>8}{'flagged':>9}"
        f"{'per token':>11}{'of FFN':>8}{'hits':>7}{'memory':>10}",
    ]
    for r in reports:
        lines.append(
            f"{name_of(r):<24}{r.ppl:>11.4f}{r.ppl_change:>+9.3%} +-{min(r.ppl_change_se, 9):.3%}{r.kl:>9.5f}"
            f"{r.top1:>8.2%}{r.recall:>8.2%}{r.flagged:>9.2%}{format_bytes(r.bytes_per_token):>11}"
            f"{r.ffn_share_read:>8.2%}{r.hit_rate:>7.1%}{format_bytes(r.memory_bytes):>10}"
        )
        counted = r.kernel_bytes_per_token
        if counted is not None and abs(counted - r.bytes_per_token) > 0.02 * r.bytes_per_token + 4096:
            lines.append(f"{'':<24}the operating system counted {format_bytes(counted)} per token")
    for r in reports:
        lines.append(f"{name_of(r)}, by layer: {r.mode}")
        lines.append("  layer   units   held   active  flagged   recall  precision   per token  of FFN   hits")
        for i, layer in enumerate(r.layers):
            lines.append(
                f"  {i:>5}{layer.units:>8}{layer.capacity:>7}{layer.active:>9.2%}{layer.flagged:>9.2%}"
                f"{layer.recall:>9.2%}{layer.precision:>11.2%}{format_bytes(layer.bytes_per_token):>12}"
                f"{layer.ffn_share_read:>8.2%}{layer.hit_rate:>7.1%}"
            )
    return "\n".join(lines)


def name_of(r: "Report") -> str:
    return " ".join(part for part in (r.predictor, r.fidelity, f"window {r.window}" if r.window else "") if part)
