"""`mlxflash generate`: text to stdout, what the run says of itself to stderr."""

import argparse
import json
import sys
from typing import Any

from mlxflash.bundle import Bundle
from mlxflash.commands.terminal import FIDELITIES, Progress, say
from mlxflash.plan import format_bytes


def add(p: argparse.ArgumentParser) -> None:
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
    p.add_argument(
        "--host-memory", default=None, help="on cuda: memory of the host that keeps units on their way (none)"
    )
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
    p.add_argument(
        "--fidelity", default=None, choices=FIDELITIES, help="how many active units are not worth a read (high)"
    )
    p.add_argument(
        "--sparsity", type=int, default=None, metavar="P", help="SiLU, GELU: leave out P %% of the units (lossy; none)"
    )
    p.add_argument("--exact", action="store_true", help="compute every unit: the same as --fidelity exact")
    p.add_argument("--device", default=None, help="cuda, metal, cpu or mlx-cpu (the best here)")
    p.add_argument("--check-reads", action="store_true", help="compare every record read with its checksum")
    p.add_argument("--dtype", default=None, help="when the model is converted first, as for convert")
    p.add_argument("-q", dest="bits", type=int, default=None, help="when the model is converted first, as for convert")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text and footer")
    p.add_argument("-v", "--verbose", action="store_true", help="print the memory plan")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from mlxflash.hub import find_bundle

    if args.exact and args.predictor not in (None, "all"):
        raise ValueError(f"--exact and --predictor {args.predictor} contradict each other")
    if args.exact and args.fidelity not in (None, "exact"):
        raise ValueError(f"--exact and --fidelity {args.fidelity} contradict each other")
    if args.exact and args.sparsity:
        raise ValueError(f"--exact and --sparsity {args.sparsity} contradict each other")
    with Progress() as progress:
        bundle = find_bundle(
            args.model, dtype=args.dtype, bits=args.bits, progress=progress, say=say, memory=args.memory
        )
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
        host_memory=args.host_memory,
        predictor=args.predictor,
        fidelity="exact" if args.exact else args.fidelity,
        sparsity=args.sparsity,
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
    sent = ""
    if flash.transfer_bytes:
        sent = (
            f"\nDevice: {format_bytes(flash.transfer_bytes)} sent per token, {flash.tier_hit_rate:.1%} of its units"
            f" from the host tier, {flash.pool_copies} whole-pool copies"
        )
    foreseen = f" (forecast {flash.forecast_tps:.1f})" if flash.forecast_tps else ""
    return (
        f"Mode: {flash.mode}\n"
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens-per-sec, "
        f"first token after {response.ttft_s:.2f} s\n"
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens-per-sec{foreseen}\n"
        f"Peak memory: {response.peak_memory:.3f} GB MLX, {flash.peak_rss_gb:.3f} GB process\n"
        f"Flash: {format_bytes(flash.bytes_per_token)} and {flash.reads_per_token:.0f} reads per token, "
        f"hit rate {flash.hit_rate:.1%}, {flash.held_share:.1%} of the feed-forward units held" + sent
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
        "forecast_tps": flash.forecast_tps,
        "ttft_s": response.ttft_s,
        "peak_memory_gb": response.peak_memory,
        "peak_rss_gb": flash.peak_rss_gb,
        "bytes_per_token": flash.bytes_per_token,
        "reads_per_token": flash.reads_per_token,
        "hit_rate": flash.hit_rate,
        "held_share": flash.held_share,
        "transfer_bytes_per_token": flash.transfer_bytes,
        "tier_hit_rate": flash.tier_hit_rate,
        "pool_copies": flash.pool_copies,
    }
