"""The decode loop: one forward pass per token, none ahead, statistics per token; mlx-lm's shapes.

mlx-lm's own loop starts the next pass before it knows whether anybody wants it. Here that would be a token's worth of
reads, so the loop is ours; tokenizer, detokenizer, samplers and key-value caches are mlx-lm's.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxflash.flash import FlashModel, FlashStats
from mlxflash.models import max_positions

Sampler = Callable[[mx.array], mx.array]


@dataclass
class FlashResponse(GenerationResponse):
    """mlx-lm's response and what the flash did since the prompt was done."""

    flash: FlashStats | None = None
    ttft_s: float = 0.0


def stream_generate(
    model: FlashModel,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[FlashResponse, None, None]:
    """Yield a response per token, as mlx-lm's stream_generate does; the last one has a finish_reason.

    Without `prompt_cache` windows start afresh, so equal calls give equal text. `max_kv_size` makes the key-value
    cache rotate at that many tokens. Raises ValueError for an empty prompt or one longer than the model's positions,
    OSError with path, offset and length when a read fails; the model stays usable after both.
    """
    flash = model.flash
    if flash.closed:
        raise ValueError("this model is closed; load it again")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt)
    if max_tokens < 1 and max_tokens != -1:
        raise ValueError(f"max_tokens {max_tokens}: at least 1, or -1 for no limit")
    vocabulary = flash.bundle.config()["vocab_size"]
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(f"token {wrong[0]} of the prompt is outside the model's vocabulary of {vocabulary}")
    room = context_of(model, max_kv_size) - max((getattr(c, "offset", 0) for c in prompt_cache or ()), default=0)
    if len(tokens) > room:
        raise ValueError(f"the prompt has {len(tokens)} tokens, this model has room for {room}")
    limit = min(max_tokens if max_tokens > 0 else room, room - len(tokens) + 1)
    if prompt_cache is None:
        flash.forget()
        prompt_cache = reserved_cache(model, max_kv_size, len(tokens) + limit)
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    sampler = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    start = time.perf_counter()
    _prefill(model, tokens[:-1], prompt_cache, prompt_progress_callback)
    before, begin = flash.snapshot(), time.perf_counter()
    current, seen, first = tokens[-1], mx.array(tokens), 0.0
    for n in range(1, limit + 1):
        logits = model(mx.array([[current]]), cache=prompt_cache)[:, -1, :]
        for processor in logits_processors or ():
            logits = processor(seen, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        current = int(sampler(logprobs).item())  # type: ignore[arg-type]
        if logits_processors:
            seen = mx.concatenate([seen, mx.array([current])])
        now = time.perf_counter()
        if not first:
            first = now
            if prompt_progress_callback:
                prompt_progress_callback(len(tokens), len(tokens))
        stop = current in tokenizer.eos_token_ids
        if not stop:
            detokenizer.add_token(current)
        reason = "stop" if stop else "length" if n == limit else None
        if reason:
            detokenizer.finalize()
        yield FlashResponse(
            text=detokenizer.last_segment,
            token=current,
            logprobs=logprobs.squeeze(0),
            from_draft=False,
            prompt_tokens=len(tokens),
            prompt_tps=len(tokens) / (first - start),
            generation_tokens=n,
            generation_tps=n / (now - begin),
            peak_memory=max(mx.get_peak_memory(), flash.backend.peak_bytes) / 1e9,
            finish_reason=reason,
            flash=flash.stats(before, n),
            ttft_s=first - start,
        )
        if reason:
            break


def generate(model: FlashModel, tokenizer: Any, prompt: Any, verbose: bool = False, **kwargs: Any) -> str:
    """The whole text at once; `kwargs` as for stream_generate. With `verbose` it prints what mlx-lm prints."""
    parts, response = [], None
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        parts.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(f"\nPrompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return "".join(parts)


def context_of(model: FlashModel, max_kv_size: int | None) -> int:
    """How many tokens a generation may hold: the plan's key-value cache, or the positions where that one rotates."""
    positions = max_positions(model.flash.bundle.config())
    return positions if max_kv_size is not None else min(positions, model.flash.plan.context)


def reserved_cache(model: FlashModel, max_kv_size: int | None, tokens: int) -> list[Any]:
    """mlx-lm's key-value cache, allocated in one step for `tokens` tokens, so that growing never copies it."""
    cache = make_prompt_cache(model, max_kv_size)
    for layer in cache:
        layer.step = min(tokens, max_kv_size or tokens)
    return cache


def _prefill(
    model: FlashModel, tokens: list[int], cache: list[Any], progress: Callable[[int, int], None] | None
) -> None:
    step, total = model.flash.plan.prefill_tokens, len(tokens) + 1
    if progress:
        progress(0, total)
    for first in range(0, len(tokens), step):
        model(mx.array([tokens[first : first + step]]), cache=cache)
        mx.eval([c.state for c in cache])
        if progress:
            progress(min(first + step, len(tokens)), total)


def _encode(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> list[int]:
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        tokens = tokenizer.encode(prompt, add_special_tokens=special)
    else:
        tokens = np.array(prompt).tolist()
    if not tokens:
        raise ValueError("the prompt is empty: give at least one token")
    return [int(t) for t in tokens]
