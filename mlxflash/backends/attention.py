"""Attention on the host through NumPy's BLAS: 5 to 25 times as fast as MLX's own on a CPU (RESULTS.md).

mlx-lm's models name `scaled_dot_product_attention`, a function of `mlx_lm.models.base`; `replace_attention` lets the
attention modules of one model, and of no other, find ours under that name.
"""

from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention as theirs

NAME = "scaled_dot_product_attention"
HIDDEN = np.float32(-1e30)  # no infinity: a token that sees nothing averages all, as in MLX, and is no NaN
SCORE_BYTES = 8 << 20  # of heads computed together: about what stays in a cache


def replace_attention(model: nn.Module) -> None:
    """Give every module of `model` whose code calls mlx-lm's attention the same code with ours."""
    twins: dict[type, type] = {}
    for module in model.modules():
        cls: Any = type(module)
        call = cls.__call__
        if NAME not in getattr(getattr(call, "__code__", None), "co_names", ()) or call.__globals__[NAME] is not theirs:
            continue
        if cls not in twins:
            code = call.__code__, call.__globals__ | {NAME: attention}, call.__name__, call.__defaults__
            twin = FunctionType(*code, call.__closure__)
            twin.__kwdefaults__ = call.__kwdefaults__
            twins[cls] = type(cls.__name__, (cls,), {"__call__": twin})
        module.__class__ = twins[cls]


def attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any = None,
    scale: float = 1.0,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function on the host: queries [batch, heads, tokens, d], keys and values [batch, kv_heads, held, d].

    `mask` is None, "causal", or an array, bool or to be added. What is not float32 goes to mlx-lm's.
    """
    plain = sinks is None and not hasattr(cache, "bits")
    if not plain or not all(a.dtype == mx.float32 for a in (queries, keys, values)):
        return theirs(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    mx.eval(queries, keys, values)
    q, k, v = (np.asarray(a) for a in (queries, keys, values))
    batch, heads, tokens, d = q.shape
    kv_heads, held = k.shape[1:3]
    group = heads // kv_heads
    q = q.reshape(batch, kv_heads, group * tokens, d) * np.float32(scale)
    out = np.empty((batch, kv_heads, group * tokens, v.shape[-1]), np.float32)
    hidden, added = _mask(mask, tokens, held)
    step = max(1, SCORE_BYTES // (4 * group * tokens * held))
    for b in range(batch):
        for first in range(0, kv_heads, step):
            some = slice(first, first + step)
            scores = q[b, some] @ k[b, some].swapaxes(-1, -2)
            apart = scores.reshape(-1, group, tokens, held)
            if hidden is not None:
                np.copyto(apart, HIDDEN, where=_of(hidden, b, some, group))
            if added is not None:
                apart += _of(added, b, some, group)
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, v[b, some], out=out[b, some])
    return mx.array(out.reshape(batch, heads, tokens, -1))


def _mask(mask: mx.array | str | None, tokens: int, held: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What is hidden, bool, and what is added to the scores: [tokens, held], or four axes as given."""
    if mask is None:
        return None, None
    if isinstance(mask, str):  # "causal": the last token sees all
        return ~np.tri(tokens, held, held - tokens, dtype=bool), None
    if mask.dtype == mx.bool_:
        return ~np.asarray(mask), None
    return None, np.asarray(mask.astype(mx.float32))


def _of(mask: np.ndarray, b: int, kv_heads: slice, group: int) -> np.ndarray:
    """The part of a mask for some heads of one sequence, broadcastable to [kv_heads, group, tokens, held]."""
    if mask.ndim < 3:
        return mask
    full = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    one = full[b if len(full) > 1 else 0]
    if len(one) == 1:
        return one[None]
    return one.reshape(-1, group, *one.shape[1:])[kv_heads]
