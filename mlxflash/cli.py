"""The command `mlxflash`: verbs, options and what people read. Text to stdout, everything else to stderr.

A known failure is one sentence and exit code 1; MLXFLASH_DEBUG=1 shows the traceback.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from mlxflash import __version__
from mlxflash.bundle import Bundle, BundleError
from mlxflash.plan import format_bytes


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices about prompts are not for our users
    try:
        if getattr(args, "device", None) in ("cpu", "mlx-cpu"):
            import mlx.core as mx

            mx.set_default_device(mx.cpu)  # what no backend replaces would run on a Mac's GPU otherwise
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MLXFLASH_DEBUG"):
            raise
        fail(sentence(error))


def fail(message: str) -> NoReturn:
    print(f"mlxflash: {message}", file=sys.stderr)
    sys.exit(1)


def sentence(error: BaseException) -> str:
    """One line for one failure, with the file where there is one."""
    if isinstance(error, ImportError) and "mlx" in str(error):
        return "MLX is not installed for this machine: pip install 'mlxflash[cpu]' on Linux, 'mlxflash' on a Mac"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> Parser:
    top = Parser(prog="mlxflash", description="Run language models larger than memory.")
    top.add_argument("--version", action="version", version=f"mlxflash {__version__}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(verbs.add_parser("generate", help="generate text from a prompt"))
    _add_convert(verbs.add_parser("convert", help="convert a checkpoint into a bundle"))
    _add_calibrate(verbs.add_parser("calibrate", help="measure a bundle's predictor on text"))
    _add_train(verbs.add_parser("train", help="train a low-rank predictor for a bundle"))
    info = verbs.add_parser("info", help="say what a bundle is")
    info.add_argument("bundle", type=Path)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run_info)
    verify = verbs.add_parser("verify", help="check every record of a bundle against its checksum")
    verify.add_argument("bundle", type=Path)
    verify.set_defaults(run=run_verify)
    return top


def _add_generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="story", help="bundle or checkpoint directory, hub name or alias (story)")
    p.add_argument("--prompt", "-p", required=True, help="the prompt; - reads it from stdin")
    p.add_argument("--max-tokens", "-m", type=int, default=100, help="tokens to generate at most (100)")
    p.add_argument("--temp", type=float, default=0.0, help="sampling temperature (0: the likeliest token)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--seed", type=int, default=None, help="seed of the sampler")
    p.add_argument("--system-prompt", default=None)
    p.add_argument("--ignore-chat-template", action="store_true", help="take the prompt as it is")
    p.add_argument("--max-kv-size", type=int, default=None, help="tokens the key-value cache holds before it rotates")
    p.add_argument("--memory", default=None, help="budget for all but the interpreter: 2GB, or 60%% of the model")
    p.add_argument("--window", type=int, default=None, help="drop units that the last K tokens did not use")
    p.add_argument(
        "--predictor", default=None, choices=["low-bit", "low-rank", "oracle", "all"], help="which units a token needs"
    )
    p.add_argument(
        "--look-ahead",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read for the next layer while this one computes (default: where reads wait for a disk)",
    )
    p.add_argument("--exact", action="store_true", help="compute every unit: the same as --predictor all")
    p.add_argument("--device", default=None, help="metal, cpu or mlx-cpu (the best here)")
    p.add_argument("--check-reads", action="store_true", help="compare every record read with its checksum")
    p.add_argument("--dtype", default=None, help="when the model is converted first, as for convert")
    p.add_argument("-q", dest="bits", type=int, default=None, help="when the model is converted first, as for convert")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text and footer")
    p.add_argument("-v", "--verbose", action="store_true", help="print the memory plan")
    p.set_defaults(run=run_generate)


def _add_convert(p: argparse.ArgumentParser) -> None:
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


def _add_calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("--text", default=None, metavar="FILE", help="text to measure on (the model's own)")
    p.add_argument("--tokens", type=int, default=256, help="tokens to measure on (256)")
    p.add_argument("--predictor", default="low-bit", choices=["low-bit", "low-rank"], help="which one (low-bit)")
    p.add_argument("--memory", default=None, help="as for generate")
    p.add_argument("--device", default=None, help="as for generate")
    p.set_defaults(run=run_calibrate)


def _add_train(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", type=Path)
    p.add_argument("--text", required=True, metavar="FILE", help="text to train on")
    p.add_argument("--tokens", type=int, default=50_000, help="tokens to train on, from all over the text (50000)")
    p.add_argument("--memory", default=None, help="as for generate, while the model's own inputs are recorded")
    p.add_argument("--device", default=None, help="as for generate")
    p.set_defaults(run=run_train)


def run_generate(args: argparse.Namespace) -> None:
    from mlxflash.hub import find_bundle

    if args.exact and args.predictor not in (None, "all"):
        raise ValueError(f"--exact and --predictor {args.predictor} contradict each other")
    with Progress() as progress:
        bundle = find_bundle(args.model, dtype=args.dtype, bits=args.bits, progress=progress, say=say)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens}: at least 1")
    if args.max_kv_size is not None and args.max_kv_size < 8:
        raise ValueError(f"--max-kv-size {args.max_kv_size}: at least 8")
    if args.seed is not None and not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed {args.seed}: between 0 and 2^64 - 1")
    if not (args.temp >= 0 and 0 <= args.top_p <= 1 and 0 <= args.min_p <= 1 and args.top_k >= 0):
        raise ValueError("--temp and --top-k are at least 0, --top-p and --min-p between 0 and 1")
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from mlxflash.api import load_tokenizer
    from mlxflash.decode import stream_generate
    from mlxflash.model import load_bundle
    from mlxflash.models import family_of, max_positions

    opened = Bundle.open(bundle)
    family_of(opened.config(), str(bundle))
    tokenizer = load_tokenizer(bundle)
    tokens = _tokens(tokenizer, prompt, args)
    positions = max_positions(opened.config())
    if len(tokens) > positions:
        raise ValueError(f"the prompt has {len(tokens)} tokens, this model's positions end at {positions}")
    model = load_bundle(
        bundle,
        memory=args.memory,
        predictor="all" if args.exact else args.predictor,
        window=args.window,
        device=args.device,
        max_kv_size=args.max_kv_size or min(positions, len(tokens) + args.max_tokens),
        check_reads=args.check_reads,
        look_ahead=args.look_ahead,
        bundle=opened,
    )
    with model:
        if args.verbose:
            say(model.flash.describe())
        if args.seed is not None:
            mx.random.seed(args.seed)
        sampler = make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k)
        text, response = [], None
        with Progress() as progress:
            for response in stream_generate(
                model,
                tokenizer,
                tokens,
                args.max_tokens,
                sampler=sampler,
                max_kv_size=args.max_kv_size,
                prompt_progress_callback=lambda done, total: progress("prompt", done, total),
            ):
                progress.close()
                text.append(response.text)
                if not args.json:
                    print(response.text, end="", flush=True)
        assert response is not None
        if args.json:
            print(json.dumps(_as_json("".join(text), response)))
        else:
            print(flush=True)
            say(footer(response))


def _tokens(tokenizer: Any, prompt: str, args: argparse.Namespace) -> list[int]:
    if tokenizer.has_chat_template and not args.ignore_chat_template:
        messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        messages.append({"role": "user", "content": prompt})
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    if args.system_prompt:
        raise ValueError("--system-prompt needs a model with a chat template, which this one lacks")
    return list(tokenizer.encode(prompt))


def footer(response: Any) -> str:
    """What a run says of itself on stderr, after the text."""
    flash = response.flash
    return (
        f"Mode: {flash.mode}\n"
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens-per-sec, "
        f"first token after {response.ttft_s:.2f} s\n"
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB MLX, {flash.peak_rss_gb:.3f} GB process\n"
        f"Flash: {format_bytes(flash.bytes_per_token)} and {flash.reads_per_token:.0f} reads per token, "
        f"hit rate {flash.hit_rate:.1%}, {flash.held_share:.1%} of the feed-forward units held"
    )


def _as_json(text: str, response: Any) -> dict[str, Any]:
    flash = response.flash
    return {
        "text": text,
        "mode": flash.mode,
        "prompt_tokens": response.prompt_tokens,
        "generation_tokens": response.generation_tokens,
        "prompt_tps": response.prompt_tps,
        "generation_tps": response.generation_tps,
        "ttft_s": response.ttft_s,
        "peak_memory_gb": response.peak_memory,
        "peak_rss_gb": flash.peak_rss_gb,
        "bytes_per_token": flash.bytes_per_token,
        "reads_per_token": flash.reads_per_token,
        "hit_rate": flash.hit_rate,
        "held_share": flash.held_share,
    }


def run_convert(args: argparse.Namespace) -> None:
    from mlxflash.calibrate import calibrate
    from mlxflash.converters import convert
    from mlxflash.hub import ALIASES, download

    start = time.perf_counter()
    _check_tokens(args)
    source = Path(args.source)
    if not source.exists() and (args.source in ALIASES or (args.source.count("/") == 1 and args.source[0] not in "./")):
        source = download(ALIASES.get(args.source, args.source))
    text = args.calibrate if args.calibrate not in ("auto", "self", "none") else None
    tokens = None if text is None or not source.is_dir() else _read_text(text, source, args.tokens)
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

    _check_tokens(args)
    bundle = Bundle.open(args.bundle)
    tokens = None if args.text is None else _read_text(args.text, bundle.path, args.tokens)
    with Progress() as progress:
        bundle = calibrate(
            bundle,
            tokens,
            num_tokens=args.tokens,
            memory=args.memory,
            device=args.device,
            progress=progress,
            predictor=args.predictor,
        )
    print(describe(bundle))


def run_train(args: argparse.Namespace) -> None:
    from mlxflash.api import load_tokenizer
    from mlxflash.models import max_positions
    from mlxflash.train import stretches, train

    start = time.perf_counter()
    _check_tokens(args)
    bundle = Bundle.open(args.bundle)
    words = _read_words(args.text)
    tokenizer = load_tokenizer(bundle.path)
    length = min(512, max_positions(bundle.config()))
    sequences = stretches(words, tokenizer.encode, args.tokens, length)
    with Progress() as progress:
        bundle = train(bundle, sequences, memory=args.memory, device=args.device, progress=progress)
    say(f"{bundle.path}: trained in {time.perf_counter() - start:.1f} s")
    print(describe(bundle))


def _check_tokens(args: argparse.Namespace) -> None:
    from mlxflash.calibrate import LEAST_TOKENS

    if args.tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: at least {LEAST_TOKENS}")


def _read_text(file: str, model: Path, num_tokens: int) -> Any:
    """The first tokens of a text, int64 [n], by the tokenizer of a bundle or checkpoint."""
    import numpy as np

    from mlxflash.api import load_tokenizer
    from mlxflash.calibrate import check_length

    words = _read_words(file)
    tokens = np.array(load_tokenizer(model).encode(words[: 16 * num_tokens])[:num_tokens], np.int64)
    check_length(tokens)
    return tokens


def _read_words(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None


def run_info(args: argparse.Namespace) -> None:
    bundle = Bundle.open(_story(args.bundle))
    print(json.dumps(facts(bundle), indent=1) if args.json else describe(bundle))


def run_verify(args: argparse.Namespace) -> None:
    bundle = Bundle.open(_story(args.bundle))
    bad = []
    with Progress() as progress:
        for index in range(bundle.num_layers):
            progress("layers", index, bundle.num_layers)
            bad += [(bundle.layer_path(index), record) for record in bundle.verify(index)]
        progress("layers", bundle.num_layers, bundle.num_layers)
    for file, record in bad[:20]:
        say(f"{file}: record {record} does not match its checksum")
    if bad:
        raise BundleError(f"{bundle.path}: {len(bad)} records are damaged; convert again")
    print(f"{bundle.path}: all {sum(layer.units for layer in bundle.manifest.layers)} records match their checksums")


def _story(path: Path) -> Path:
    from mlxflash.hub import STORY

    return STORY if str(path) == "story" else path


def facts(bundle: Bundle) -> dict[str, Any]:
    """What `info` tells, for machines."""
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        "model_type": m.model_type,
        "layout": m.layout,
        "activation": m.activation,
        "dtype": m.dtype,
        "quantization": m.quantization,
        "d_model": m.d_model,
        "layers": len(m.layers),
        "units_per_layer": m.layers[0].units,
        "record_bytes": m.record.num_bytes,
        "record_stride": m.record.stride,
        "streamed_bytes": bundle.streamed_bytes(),
        "resident_bytes": bundle.resident_bytes(),
        "predictors": {n: sum(f.stat().st_size for f in bundle.predictor_files(n)) for n in bundle.predictors()},
        "calibration": m.calibration,
        "source": m.source,
    }


def describe(bundle: Bundle) -> str:
    """What `info` tells, for people."""
    f, m = facts(bundle), bundle.manifest
    bits = f"{m.quantization['bits']}-bit, groups of {m.quantization['group_size']}" if m.quantization else m.dtype
    names = " | ".join(p.name for p in m.record.parts if p.offset is not None)
    lines = [
        f"{bundle.path}: {m.model_type} from {m.source}, {bits}",
        f"  layers      {f['layers']} of {f['units_per_layer']} units, {m.layout}, {m.activation}, width {m.d_model}",
        f"  records     {f['record_bytes']} bytes every {f['record_stride']}: {names}",
        f"  streamed    {format_bytes(f['streamed_bytes'])}",
        f"  resident    {format_bytes(f['resident_bytes'])}",
    ]
    for name, size in f["predictors"].items():
        said = m.calibration.get(name)
        lines.append(f"  predictor   {name}, {format_bytes(size)}: {_said(said)}")
    return "\n".join(lines)


def _said(said: dict[str, Any] | None) -> str:
    if not said:
        return "not measured; `mlxflash calibrate` does"
    text = f"recall {said['recall']:.1%}, {said['flagged']:.1%} of units flagged ({said['active']:.1%} active)"
    if "perplexity_change" in said:
        text += f", perplexity {said['perplexity_change']:+.2%} ({said['tokens']} tokens of {said['text']})"
    return text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A tqdm bar on stderr that changes its name as the work goes on; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if what != self._what or self._bar is None:
            self.close()
            self._what, self._bar = what, tqdm(total=total, desc=what, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
