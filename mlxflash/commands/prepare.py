"""`mlxflash convert`, `calibrate`, `train` and `reorder`: a checkpoint to a bundle that knows its predictors."""

import argparse
import time
from pathlib import Path

from mlxflash.bundle import Bundle
from mlxflash.commands.inspect import describe
from mlxflash.commands.terminal import Progress, read_text, read_words, say


def add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", help="checkpoint directory, hub name or alias")
    p.add_argument("target", type=Path, help="bundle directory to make; must not exist")
    p.add_argument("--dtype", default=None, choices=["float32", "float16", "bfloat16"], help="(the checkpoint's)")
    p.add_argument("-q", dest="bits", type=int, default=None, help="quantise to 8 or 4 bits")
    p.add_argument("--group-size", type=int, default=64, help="weights that share a scale (64)")
    p.add_argument(
        "--calibrate",
        default="auto",
        metavar="FILE",
        help="measure the predictor on this text; `self`: on the model's own; `none`: later; "
        "auto: `self` where the resident weights take less than 1 GB",
    )
    p.add_argument("--tokens", type=int, default=256, help="tokens to measure on (256)")
    p.set_defaults(run=run_convert)


def add_calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("--text", default=None, metavar="FILE", help="text to measure on (the model's own)")
    p.add_argument("--tokens", type=int, default=256, help="tokens to measure on (256)")
    p.add_argument("--predictor", default="low-bit", choices=["low-bit", "low-rank"], help="which one (low-bit)")
    p.add_argument(
        "--levels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find the levels of --fidelity too: some thirty passes over the tokens, hours for the largest models",
    )
    p.add_argument(
        "--sparsity",
        nargs="+",
        type=int,
        default=None,
        metavar="P",
        help="SiLU, GELU: make and measure what `generate --sparsity P` needs, for each percentage",
    )
    p.add_argument("--memory", default=None, help="as for generate; levels then count on what it holds")
    p.add_argument("--device", default=None, help="as for generate")
    p.set_defaults(run=run_calibrate)


def add_train(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("--text", required=True, metavar="FILE", help="text to train on")
    p.add_argument("--tokens", type=int, default=50_000, help="tokens to train on, from all over the text (50000)")
    p.add_argument("--memory", default=None, help="as for generate, while the model's own inputs are recorded")
    p.add_argument("--device", default=None, help="as for generate")
    p.set_defaults(run=run_train)


def add_reorder(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("target", type=Path, help="bundle directory to make; must not exist")
    p.add_argument("--text", required=True, metavar="FILE", help="text that says which units are missed together")
    p.add_argument("--tokens", type=int, default=2048, help="tokens of it; half make the order, half judge it (2048)")
    p.add_argument("--memory", default=None, help="as for generate, while the model's own inputs are recorded")
    p.add_argument("--device", default=None, help="as for generate")
    p.set_defaults(run=run_reorder)


def run_convert(args: argparse.Namespace) -> None:
    from mlxflash.calibrate import calibrate
    from mlxflash.catalog import ALIASES
    from mlxflash.converters import convert
    from mlxflash.hub import download, is_repo

    start = time.perf_counter()
    _check_tokens(args)
    source = Path(args.source)
    if not source.exists() and (args.source in ALIASES or (is_repo(args.source) and args.source[0] != ".")):
        source = download(ALIASES.get(args.source, args.source))
    text = args.calibrate if args.calibrate not in ("auto", "self", "none") else None
    tokens = None if text is None or not source.is_dir() else read_text(text, source, args.tokens)
    with Progress() as progress:
        bundle = convert(
            source, args.target, dtype=args.dtype, bits=args.bits, group_size=args.group_size, progress=progress
        )
        if args.calibrate == "auto":
            args.calibrate = "self" if bundle.resident_bytes() < 1e9 else "none"
        if args.calibrate != "none" and "low-bit" in bundle.predictors():
            calibrate(bundle, tokens, num_tokens=args.tokens, progress=progress)
    say(f"{args.target}: made in {time.perf_counter() - start:.1f} s")
    print(describe(Bundle.open(args.target)))


def run_calibrate(args: argparse.Namespace) -> None:
    from mlxflash.calibrate import calibrate
    from mlxflash.sparsity import calibrate_sparsity

    _check_tokens(args)
    bundle = Bundle.open(args.bundle)
    tokens = None if args.text is None else read_text(args.text, bundle.path, args.tokens)
    with Progress() as progress:
        settings = {"num_tokens": args.tokens, "memory": args.memory, "device": args.device, "progress": progress}
        if args.sparsity and (args.predictor != "low-bit" or not args.levels):
            raise ValueError(
                "--sparsity has an estimate of its own and no levels: leave out --predictor and --no-levels"
            )
        if args.sparsity:
            bundle = calibrate_sparsity(bundle, tokens, args.sparsity, **settings)
        else:
            bundle = calibrate(bundle, tokens, predictor=args.predictor, levels=args.levels, **settings)
    print(describe(bundle))


def run_train(args: argparse.Namespace) -> None:
    from mlxflash.api import load_tokenizer
    from mlxflash.models import max_positions
    from mlxflash.train import stretches, train

    start = time.perf_counter()
    _check_tokens(args)
    bundle = Bundle.open(args.bundle)
    words = read_words(args.text)
    tokenizer = load_tokenizer(bundle.path)
    length = min(512, max_positions(bundle.config()))
    sequences = stretches(words, tokenizer.encode, args.tokens, length)
    with Progress() as progress:
        bundle = train(bundle, sequences, memory=args.memory, device=args.device, progress=progress)
    say(f"{bundle.path}: trained in {time.perf_counter() - start:.1f} s")
    print(describe(bundle))


def run_reorder(args: argparse.Namespace) -> None:
    from mlxflash.order import HELD, reorder

    start = time.perf_counter()
    _check_tokens(args)
    bundle = Bundle.open(args.bundle)
    tokens = read_text(args.text, bundle.path, args.tokens)
    with Progress() as progress:
        bundle, reads = reorder(bundle, args.target, tokens, memory=args.memory, device=args.device, progress=progress)
    say(f"{bundle.path}: made in {time.perf_counter() - start:.1f} s")
    print(
        f"reads per token, {HELD:.0%} of the units held, neighbours at once: {reads.before:.1f} before, "
        f"{reads.after:.1f} now ({reads.before / max(reads.after, 1e-9):.2f}x fewer)"
    )


def _check_tokens(args: argparse.Namespace) -> None:
    from mlxflash.evaluate import LEAST_TOKENS

    if args.tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: at least {LEAST_TOKENS}")
