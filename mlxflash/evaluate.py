"""What a model says of text: log-probabilities through the decode path and through the prompt path."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlxflash.decode import reserved_cache
from mlxflash.flash import FlashModel


def decode_losses(model: FlashModel, tokens: np.ndarray) -> Iterator[float]:
    """Teacher-forced, one token per pass, window warm: the negative log-probability of tokens[1:], one by one."""
    cache = reserved_cache(model, None, len(tokens))
    for token, target in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        yield (mx.logsumexp(logits) - logits[target]).item()


def prompt_losses(model: FlashModel, tokens: np.ndarray) -> np.ndarray:
    """The same from one exact pass over all tokens: float32 [len(tokens) - 1]."""
    logits = model(mx.array(tokens[None, :-1]))[0].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(tokens[1:, None]), axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - chosen)


def perplexity(losses: np.ndarray) -> float:
    return float(np.exp(np.mean(losses)))
