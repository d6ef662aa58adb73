"""The exactness law: with `all` or `oracle`, streamed equals dense.

Dense is the NumPy forward pass of `reference.py` in float32 on the weights as they are stored, rounded or quantised.
For every dtype, backend, budget, window and way of reading:

    teacher-forced logits, one token per pass, agree within a share of the logits' range: 2e-5 where activations are
    float32 (measured: 1.3e-6), 5e-3 in float16 (1.2e-3), 4e-2 in bfloat16 (1.0e-2), and the most likely token is the
    same wherever the reference's two best are further apart than that;
    greedy generation in float32 gives the reference's tokens;
    a model that is held whole reads nothing, and at the smallest budget every decoded token reads something.

`test_the_law_notices` breaks the computation on purpose and sees the law fail.
"""

import functools
import threading
from dataclasses import replace

import numpy as np
import pytest

from build import BACKENDS, BOS, POST_NORM, UNTIED, Shape, load, prompt_of
from reference import stored_model

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.tokenizer_utils import load as load_tokenizer  # noqa: E402

from mlxflash.decode import stream_generate  # noqa: E402

TOLERANCE = {mx.float32: 2e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}  # of the range of the reference's logits
STORED = {  # name: dtype, bits
    "f32": ("float32", None),
    "f16": ("float16", None),
    "bf16": ("bfloat16", None),
    "q8": ("float16", 8),
    "q4": ("bfloat16", 4),
}
SMALL = Shape()
ALIGNED = Shape(d_model=512, ffn=96, heads=8)  # records of 4096 bytes, where the others' are packed
ODD = Shape(d_model=96, ffn=203, heads=3)
SOME = ("native", "parts-alias", "records-copy", "discrete")  # of the backends: every kind of memory once


def assert_same_logits(got, want, tolerance):
    """The law for logits [tokens, vocabulary]."""
    assert np.isfinite(got).all()
    span = want.max(axis=-1) - want.min(axis=-1)
    error = np.abs(got - want).max(axis=-1) / span
    assert error.max() <= tolerance
    best = np.sort(want, axis=-1)
    clear = best[:, -1] - best[:, -2] > tolerance * span
    assert clear.mean() >= 0.5, "the reference must be decided, or equal choices say nothing"
    assert (got.argmax(axis=-1) == want.argmax(axis=-1))[clear].all()


def assert_exact(model, path, tokens):
    """The law for a model of the bundle at `path`: decode `tokens` [n] or [batch, n] one by one; and what it read."""
    tokens = np.atleast_2d(tokens)
    cache, got, read = make_prompt_cache(model), [], []
    for column in tokens.T:
        before = model.flash.snapshot().num_bytes
        logits = model(mx.array(column[:, None]), cache=cache)[:, -1]
        got.append(np.array(logits.astype(mx.float32)))
        read.append(model.flash.snapshot().num_bytes - before)
    tolerance = TOLERANCE[model.flash.backend.activation_dtype(model.flash.bundle.manifest)]
    for i, row in enumerate(tokens):
        assert_same_logits(np.array([g[i] for g in got]), dense_logits(path, tuple(row.tolist())), tolerance)
    for layer in model.flash.layers:
        layer.window.check()
    assert model.flash.exact
    return read


def assert_greedy(model, path, prompt, count=12):
    """Token identity with the reference, and the probabilities they were chosen with."""
    want, logits = dense_greedy(path, tuple(prompt), count)
    if BOS in want:
        want = want[: want.index(BOS) + 1]
    best = np.sort(logits, axis=-1)
    tolerance = TOLERANCE[mx.float32] * (best[:, -1] - best[:, 0])
    assert (best[:, -1] - best[:, -2] > tolerance).all(), "the reference must be decided at every token"
    said = list(stream_generate(model, tokenizer_of(path), prompt, count))
    assert [r.token for r in said] == want
    for response, row, most in zip(said, logits, tolerance, strict=False):
        row = row - row.max()
        assert np.abs(np.array(response.logprobs) - (row - np.log(np.exp(row).sum()))).max() <= 2 * most
    assert [r.finish_reason for r in said] == [None] * (len(want) - 1) + ["stop" if want[-1] == BOS else "length"]


dense = functools.cache(stored_model)
tokenizer_of = functools.cache(load_tokenizer)


@functools.cache
def dense_logits(path, tokens):
    return dense(path).logits(list(tokens))


@functools.cache
def dense_greedy(path, prompt, count):
    return dense(path).greedy(prompt, count)


def bundle_of(library, stored, shape=SMALL):
    dtype, bits = STORED[stored]
    return library.bundle(replace(shape, dtype=dtype), bits)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_on_every_backend(library, backend, stored):
    path = bundle_of(library, stored)
    with load(path, backend) as model:
        assert max(model.flash.plan.capacities) < SMALL.ffn // 3
        assert min(assert_exact(model, path, prompt_of(20))) > 0


@pytest.mark.parametrize("budget", ["whole", "room", "part", "least"])
@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_budget(library, backend, predictor, budget):
    path = bundle_of(library, "f32")
    with load(path, backend, budget, predictor) as model:
        held = sum(model.flash.plan.capacities) / sum(model.flash.plan.units)
        read = assert_exact(model, path, prompt_of(20, seed=1))
        if budget == "whole":
            assert held == 1
            assert max(read) == 0
        elif budget == "room":
            assert held == 1
            assert max(read) == 0 if predictor == "all" else sum(read[:5]) > 3 * sum(read[-5:])
        elif budget == "part":
            assert 0.4 < held < 0.8
            assert model.flash.held_share() > 0.35
            if predictor == "all":
                assert min(read) > 0
            else:
                assert np.mean(read[10:]) < np.mean(read[:5])  # what recent tokens used is there already
        else:
            assert held < 0.1
            assert min(read) > 0


class Changed:
    """A predictor whose ids are changed."""

    nbytes = 0

    def __init__(self, predictor, change):
        self._predictor, self._change = predictor, change

    def start(self, x):
        ids = self._predictor.start(x)
        return lambda: self._change(ids())


class Late:
    """A reader of which nothing arrives before somebody waits for it."""

    def __init__(self, reader):
        self._reader = reader

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def submit(self, *call):
        return LateTicket(lambda: self._reader.submit(*call).wait())


class LateTicket:
    def __init__(self, read):
        self.wait = read


@pytest.mark.parametrize("guess", ["all", "poor", "wrong"])
@pytest.mark.parametrize("budget", ["least", "part", "room"])
@pytest.mark.parametrize("backend", SOME)
def test_look_ahead(library, backend, budget, guess):
    """Whatever an earlier layer asks for, and however late it arrives."""
    path = library.calibrated(UNTIED)
    rng = np.random.default_rng(0)
    with load(path, backend, budget, look_ahead=True) as model:
        assert not model.flash.plan.whole
        for layer in model.flash.layers:
            layer.reader = layer.window._reader = Late(layer.reader)
            if guess == "wrong" and layer.ahead:
                layer.ahead = Changed(layer.ahead, lambda ids: np.flatnonzero(rng.random(UNTIED.ffn) < 0.3))
            elif guess == "all":  # every unit, so that one that comes early may be the last that was missing
                layer.ahead = layer.ahead and Changed(layer.ahead, lambda ids: np.arange(UNTIED.ffn))
        assert [layer.ahead is not None for layer in model.flash.layers] == [True, True, False]
        assert_exact(model, path, prompt_of(20, UNTIED, seed=13))
        for length in (1, 20):
            assert_greedy(model, path, prompt_of(length, UNTIED, seed=14))


@pytest.mark.parametrize("stored", ["f16", "q4"])
@pytest.mark.parametrize("budget", ["whole", "part"])
@pytest.mark.parametrize("backend", SOME)
def test_larger_budgets_of_small_dtypes(library, backend, budget, stored):
    path = bundle_of(library, stored)
    with load(path, backend, budget, "all") as model:
        assert_exact(model, path, prompt_of(10, seed=2))


@pytest.mark.parametrize("budget", ["part", "least"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8])
@pytest.mark.parametrize("backend", SOME)
def test_every_window(library, backend, window, budget):
    path = bundle_of(library, "f32")
    with load(path, backend, budget, window=window) as model:
        assert_exact(model, path, prompt_of(20, seed=3))
        if budget == "part" and window in (1, 2):
            assert max(layer.window.num_rows for layer in model.flash.layers) < SMALL.ffn // 2


@pytest.mark.parametrize("length", [1, 2, 17, 300])
@pytest.mark.parametrize(("backend", "predictor", "budget"), [
    ("native", "oracle", "least"), ("native", "all", "part"), ("parts-alias", "oracle", "part"),
    ("records-copy", "all", "least"), ("records-alias", "oracle", "least"), ("native", "all", "whole"),
])  # fmt: skip
def test_every_prompt(library, backend, predictor, budget, length):
    path = bundle_of(library, "f32")
    with load(path, backend, budget, predictor) as model:
        assert (model.flash.plan.prefill_tokens < 300) == (budget != "whole")
        for _ in range(2):  # the second finds the windows as a first one left them
            assert_greedy(model, path, prompt_of(length, seed=length), 8)


@pytest.mark.parametrize("predictor", ["all", "oracle"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [POST_NORM, UNTIED], ids=["post-norm", "untied"])
def test_every_kind_of_opt(library, shape, backend, predictor):
    path = library.bundle(shape)
    with load(path, backend, "least", predictor) as model:
        assert min(assert_exact(model, path, prompt_of(12, shape))) > 0
        assert_greedy(model, path, prompt_of(5, shape))


@pytest.mark.parametrize("budget", ["part", "least"])
@pytest.mark.parametrize("stored", ["f16", "q8", "q4"])
@pytest.mark.parametrize("backend", SOME)
def test_widths_that_fill_no_vector_and_records_with_padding(library, backend, stored, budget):
    path = bundle_of(library, stored, ODD)
    with load(path, backend, budget) as model:
        record = model.flash.bundle.manifest.record
        assert (record.stride > record.num_bytes) == (stored != "f16")
        assert_exact(model, path, prompt_of(12, seed=12))


@pytest.mark.parametrize("stored", ["bf16", "q8"])
def test_post_norm_in_small_dtypes(library, stored):
    path = bundle_of(library, stored, POST_NORM)
    with load(path, "native") as model:
        assert_exact(model, path, prompt_of(12, POST_NORM))


@pytest.mark.parametrize("check_reads", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["packed", "aligned", "quantised"])
@pytest.mark.parametrize("backend", SOME)
def test_every_way_of_reading(library, backend, kind, direct, check_reads):
    path = bundle_of(library, "q4" if kind == "quantised" else "f32", ALIGNED if kind == "aligned" else SMALL)
    with load(path, backend, direct=direct, check_reads=check_reads) as model:
        assert model.flash.bundle.manifest.record.aligned == (kind == "aligned")
        if direct and not model.flash.files[0].direct:
            pytest.skip("this filesystem refuses direct reads")
        read = assert_exact(model, path, prompt_of(10, seed=4))
        assert min(read) > 0
        if kind == "packed":
            assert_greedy(model, path, prompt_of(30, seed=5), 4)


@pytest.mark.parametrize("budget", ["part", "least"])
@pytest.mark.parametrize("backend", SOME)
def test_batches(library, backend, budget):
    path = bundle_of(library, "f32")
    with load(path, backend, budget) as model:
        assert_exact(model, path, [prompt_of(12, seed=6), prompt_of(12, seed=7), prompt_of(12, seed=8)])


@pytest.mark.parametrize("backend", SOME)
def test_cut_off_generations_leave_no_trace(library, backend):
    path = bundle_of(library, "f32")
    with load(path, backend) as model:
        for taken in range(4):
            generation = stream_generate(model, tokenizer_of(path), prompt_of(20, seed=taken), 8)
            for _ in range(taken):
                next(generation)
            generation.close()
            assert_greedy(model, path, prompt_of(3, seed=9), 6)


class Interrupted(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("budget", ["least", "part", "room"])
@pytest.mark.parametrize("backend", SOME)
def test_interrupted_passes_leave_no_trace(library, backend, budget, look_ahead):
    """Cut off between any two steps of a pass, the model computes the same afterwards."""
    path = library.calibrated() if look_ahead else library.bundle()
    rng = np.random.default_rng(15)
    with load(path, backend, budget, look_ahead=look_ahead) as model:

        def interrupting(step):
            def either(*call, **named):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Interrupted
                return step(*call, **named)

            return either

        for layer in model.flash.layers:
            for owner, name in (
                (layer.window, "_land"), (layer.window, "_assign"), (layer.window, "_finish"),
                (layer.window, "_delete"),
                (layer.window._policy, "use"), (layer.rows, "land"), (layer.rows, "ffn"), (layer.rows, "settle"),
                (layer.blocks, "start"), (layer.blocks, "_fill"),
            ):  # fmt: skip
                setattr(owner, name, interrupting(getattr(owner, name)))
        interrupted = 0
        for _ in range(12):
            left = int(rng.integers(1, 120))
            try:
                for _ in stream_generate(model, tokenizer_of(path), prompt_of(20, seed=16), 3):
                    pass
            except Interrupted:
                interrupted += 1
            left = 0
            cache = make_prompt_cache(model)  # and without stream_generate, which sweeps up by itself
            logits = model(mx.array([prompt_of(5, seed=17)]), cache=cache)[0]
            got = np.array(logits.astype(mx.float32))
            assert_same_logits(got, dense_logits(path, tuple(prompt_of(5, seed=17))), TOLERANCE[mx.float32])
            assert_greedy(model, path, prompt_of(3, seed=9), 3)
        assert interrupted > 4


@pytest.mark.parametrize("backend", SOME)
def test_equal_generations_read_equal_bytes(library, backend):
    path = bundle_of(library, "f32")
    with load(path, backend, "part") as model:
        read = []
        for _ in range(3):
            before = model.flash.snapshot().num_bytes
            assert_greedy(model, path, prompt_of(20, seed=18), 4)
            read.append(model.flash.snapshot().num_bytes - before)
        assert read[0] == read[1] == read[2] > 0


@pytest.mark.parametrize("backend", SOME)
def test_generating_in_another_thread(library, backend):
    path = bundle_of(library, "f32")
    problems = []

    def work():
        try:
            assert_greedy(model, path, prompt_of(20, seed=10), 6)
        except BaseException as problem:
            problems.append(problem)

    with load(path, backend) as model:
        assert_greedy(model, path, prompt_of(20, seed=10), 6)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert problems == []
        assert_greedy(model, path, prompt_of(20, seed=11), 6)


@pytest.mark.parametrize("stored", STORED)
def test_the_law_notices(library, stored):
    """One unit left out per token, or one stale row computed, is no longer the same model."""
    path = bundle_of(library, stored)
    with load(path) as model:
        for layer in model.flash.layers:
            layer.predictor = Changed(layer.predictor, lambda ids: np.delete(ids, 3))
        with pytest.raises(AssertionError):
            assert_exact(model, path, prompt_of(20))
    with load(path, "parts-alias", "part") as model:
        for layer in model.flash.layers:
            layer.rows.ffn = lambda x, n, *more, ffn=layer.rows.ffn, **named: ffn(x, min(n + 1, 100), *more, **named)
        with pytest.raises(AssertionError):
            assert_exact(model, path, prompt_of(20))
