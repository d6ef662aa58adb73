"""The reference is anchored in code that is not ours: transformers' OPT said the logits in golden/opt.npz.

Every law about models compares with `reference.py`; this file compares that with transformers, for pre-norm and
post-norm models, projections, tied and untied heads, with and without the last norm. `golden/make_opt.py` wrote it.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from build import POST_NORM, UNTIED, Shape, prompt_of, random_weights, write_checkpoint
from reference import Reference, decode, dequantize, encode, read_safetensors

GOLDEN = np.load(Path(__file__).with_name("golden") / "opt.npz")
NAMES = sorted({key.split("/")[0] for key in GOLDEN.files})


def golden(name):
    """Shape, weights, tokens and transformers' logits."""
    shape = Shape(**json.loads(str(GOLDEN[f"{name}/shape"])))
    weights = random_weights(shape)
    sums = [array.sum(dtype=np.float64) for array in weights.values()]
    np.testing.assert_allclose(sums, GOLDEN[f"{name}/sums"], rtol=1e-5, err_msg="NumPy draws other numbers than it did")
    return shape, weights, GOLDEN[f"{name}/tokens"].tolist(), GOLDEN[f"{name}/logits"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-6), (np.float32, 1e-4)])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_transformers(name, dtype, tolerance):
    shape, weights, tokens, want = golden(name)
    got = Reference(shape.config(), weights, dtype).logits(tokens)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_every_kind_is_there():
    shapes = [golden(name)[0] for name in NAMES]
    assert {Shape(), POST_NORM, UNTIED} <= set(shapes)
    assert {shape.final_norm for shape in shapes} == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_matters(name):
    """Without any one tensor the logits are others: what agrees with transformers, agrees about all of them."""
    shape, weights, tokens, want = golden(name)
    for left_out in weights:
        changed = weights | {left_out: np.roll(weights[left_out], 1)}
        if left_out.endswith("k_proj.bias"):  # adds the same to every score of a query; softmax does not see it
            continue
        got = Reference(shape.config(), changed).logits(tokens)
        assert np.abs(got - want).max() > 1e-3 * np.abs(want).max(), left_out


def test_greedy_follows_the_logits():
    shape, weights, tokens, _ = golden("untied")
    reference = Reference(shape.config(), weights)
    said, chosen = reference.greedy(tokens, 5)
    again = reference.logits(tokens + said)[len(tokens) - 1 : -1]
    np.testing.assert_allclose(chosen, again, rtol=1e-4, atol=1e-3)
    assert said == again.argmax(axis=-1).tolist()


@pytest.mark.parametrize("shape", [Shape(), POST_NORM, UNTIED], ids=["pre-norm", "post-norm", "untied"])
def test_tiny_models_are_worth_a_law(shape):
    """Units fire about as sparsely as in the models meant, and every layer's FFN moves the logits."""
    weights, tokens = random_weights(shape), prompt_of(30, shape)
    reference = Reference(shape.config(), weights)
    assert all(0.1 < share < 0.3 for share in reference.active_share(tokens))
    want = reference.logits(tokens)
    for i in range(shape.layers):
        silent = {f"model.decoder.layers.{i}.fc2.weight": weights[f"model.decoder.layers.{i}.fc2.weight"] * 0}
        got = Reference(shape.config(), weights | silent).logits(tokens)
        assert np.abs(got - want).max() > 0.1 * (want.max() - want.min())


def as_bytes(array, dtype):
    return encode(array, dtype).ravel().view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_numbers_are_the_nearest(dtype):
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    stored = decode(as_bytes(values, dtype), dtype)
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    assert np.abs(stored - values).max() <= 2.0 ** (1 - bits)
    np.testing.assert_array_equal(decode(as_bytes(stored, dtype), dtype), stored)
    step = 2.0 ** (np.floor(np.log2(np.abs(values))) + 1 - bits)
    normal = np.abs(values) > 1e-4
    assert (np.abs(stored - values) <= step / 2)[normal].all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoints_are_what_others_read(tmp_path, dtype):
    mx = pytest.importorskip("mlx.core")
    shape = Shape(dtype=dtype, shards=2, layers=1)
    write_checkpoint(tmp_path / "checkpoint", shape)
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) == 2
    seen = {}
    for file in files:
        ours, theirs = read_safetensors(file), mx.load(str(file))
        assert set(ours) == set(theirs)
        for name, array in theirs.items():
            assert array.dtype == getattr(mx, dtype)
            np.testing.assert_array_equal(np.array(array.astype(mx.float32)), ours[name])
        seen |= ours
    wanted = random_weights(shape)
    assert set(seen) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(seen[name], decode(as_bytes(array, dtype), dtype).reshape(array.shape))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_dequantize_is_mlx(bits, group):
    mx = pytest.importorskip("mlx.core")
    matrix = mx.random.normal((12, 192), key=mx.random.key(0))
    words, scales, biases = mx.quantize(matrix, group, bits)
    want = np.array(mx.dequantize(words, scales, biases, group, bits))
    np.testing.assert_array_equal(dequantize(np.array(words), np.array(scales), np.array(biases), bits), want)
