"""Law: the host's attention computes what MLX's does, for every mask, head layout and batch of mlx-lm's models."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.base import create_causal_mask

from mlxflash.backends import attention as ours

SHAPES = [(1, 4, 4, 1, 1), (1, 4, 4, 1, 9), (2, 8, 2, 5, 5), (1, 8, 1, 7, 20), (2, 6, 3, 3, 11)]


def inputs(batch, heads, kv_heads, tokens, held, d=16):
    rng = np.random.default_rng(heads * tokens)
    shapes = (batch, heads, tokens, d), (batch, kv_heads, held, d), (batch, kv_heads, held, d)
    return [mx.array(rng.standard_normal(s).astype(np.float32)) for s in shapes]


def masks(batch, heads, tokens, held):
    visible = create_causal_mask(tokens, held - tokens)
    rng = np.random.default_rng(1)
    bias = mx.array(rng.standard_normal((1, heads, tokens, held)).astype(np.float32))
    padded = np.broadcast_to(np.array(visible), (batch, 1, tokens, held)).copy()
    padded[-1, :, :, : max(0, held - tokens)] = False
    padded[0, :, 0] = False  # a token of padding sees nothing
    return {
        "none": None,
        "causal": "causal",
        "bool": visible,
        "added": mx.where(visible, 0.0, -1e9),
        "of heads": bias,  # alibi
        "of sequences": mx.array(padded),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added", "of heads", "of sequences"])
@pytest.mark.parametrize("score_bytes", [1, 8 << 20])
def test_as_mlx_computes(shape, mask, score_bytes, monkeypatch):
    monkeypatch.setattr(ours, "SCORE_BYTES", score_bytes)
    q, k, v = inputs(*shape)
    given = masks(shape[0], shape[1], *shape[3:])[mask]
    with mx.stream(mx.cpu):
        expected = np.array(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given))
    np.testing.assert_allclose(np.array(ours.attention(q, k, v, None, 0.3, given)), expected, rtol=2e-5, atol=2e-6)


def test_views_of_a_cache_are_read_in_place():
    q, k, v = inputs(1, 4, 2, 1, 40)
    whole = np.array(ours.attention(q, k[..., :17, :], v[..., :17, :], None, 0.3, None))
    copied = (mx.array(np.array(a)[..., :17, :]) for a in (k, v))
    np.testing.assert_array_equal(whole, np.array(ours.attention(q, *copied, None, 0.3, None)))


def test_half_precision_goes_to_mlx():
    q, k, v = (a.astype(mx.float16) for a in inputs(1, 4, 4, 3, 3))
    out = ours.attention(q, k, v, None, 0.3, "causal")
    assert out.dtype == mx.float16
    assert mx.array_equal(out, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal"))


def test_only_the_given_model_is_changed(monkeypatch):
    args = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        rms_norm_eps=1e-5, vocab_size=50, num_key_value_heads=2,
    )  # fmt: skip
    model, other = llama.Model(args), llama.Model(args)
    tokens = mx.array([[1, 2, 3, 4]])
    expected = model(tokens)
    calls = []
    monkeypatch.setattr(ours, "_mask", lambda *a, f=ours._mask: calls.append(a) or f(*a))
    ours.replace_attention(model)
    np.testing.assert_allclose(np.array(model(tokens)), np.array(expected), rtol=2e-4, atol=2e-5)
    assert len(calls) == 2
    other(tokens)
    assert len(calls) == 2
    assert isinstance(model.layers[0].self_attn, llama.Attention)
    assert isinstance(model.layers[0].mlp, nn.Module)
