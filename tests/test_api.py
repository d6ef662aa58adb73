"""The Python interface: mlx-lm's shapes, and a model that stays right whatever becomes of a generation."""

import collections
import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.generate import GenerationResponse, generate_step
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from build import BACKENDS, Shape, prompt_of
from build import load as load_at
from mlxflash import generate, load, stream_generate
from mlxflash.model import load_bundle
from mlxflash.reader import ENGINES, make_reader

PROMPT = prompt_of(20)
SMALL = "4.9MB"  # of the tiny bundle: streams, and holds some of it
CONTEXT = 128
MODES = [("all", SMALL), ("low-bit", SMALL), ("all", None)]


@pytest.fixture(scope="module")
def tiny(library):
    return library.bundle(Shape(ffn=2048))


@pytest.fixture(scope="module")
def exact(tiny):
    model, tokenizer = load(tiny, memory=SMALL, predictor="all", max_kv_size=CONTEXT)
    with model:
        yield model, tokenizer


def tokens_of(model, tokenizer, prompt=PROMPT, **settings):
    return [r.token for r in stream_generate(model, tokenizer, prompt, **({"max_tokens": 12} | settings))]


def test_responses_are_mlx_lms_and_tell_what_the_flash_did():
    model, tokenizer = load("story", memory="22MB", max_kv_size=CONTEXT)
    with model:
        responses = list(stream_generate(model, tokenizer, "Once upon a time", max_tokens=10))
        text = generate(model, tokenizer, "Once upon a time", max_tokens=10)
    assert "".join(r.text for r in responses) == text
    last = responses[-1]
    assert set(GenerationResponse.__dataclass_fields__) < set(vars(last))
    assert [r.finish_reason for r in responses] == [None] * 9 + ["length"]
    assert [r.generation_tokens for r in responses] == list(range(1, 11))
    assert last.logprobs.shape == (4096,)
    assert abs(mx.exp(last.logprobs).sum().item() - 1) < 1e-3
    assert last.prompt_tokens == 5
    assert min(last.prompt_tps, last.generation_tps, last.peak_memory, last.ttft_s) > 0
    assert last.flash.bytes_per_token > last.flash.reads_per_token > 1
    assert 0 < last.flash.hit_rate < 1
    assert 0 < last.flash.held_share < 1
    assert last.flash.mode.startswith("approximate")


def test_mlx_lms_own_loops_run_the_model(exact):
    model, tokenizer = exact
    want = tokens_of(model, tokenizer)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prefill_step_size=7)
    assert [token for token, _ in steps] == want
    assert [r.token for r in mlx_lm_stream_generate(model, tokenizer, PROMPT, max_tokens=12)] == want
    text = generate(model, tokenizer, PROMPT, max_tokens=12)
    assert mlx_lm_generate(model, tokenizer, PROMPT, max_tokens=12) == text


def test_text_and_its_tokens_are_one_prompt(exact):
    model, tokenizer = exact
    ids = tokenizer.encode("It was the best")
    assert tokens_of(model, tokenizer, "It was the best") == tokens_of(model, tokenizer, mx.array(ids))


def test_samplers_and_logits_processors_of_mlx_lm_work(exact):
    model, tokenizer = exact
    greedy = tokens_of(model, tokenizer)
    banned = make_logits_processors({greedy[0]: -1000.0})
    assert greedy[0] not in tokens_of(model, tokenizer, logits_processors=banned)
    seen = []

    def watch(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    tokens_of(model, tokenizer, max_tokens=3, logits_processors=[watch])
    assert seen == [PROMPT, PROMPT + greedy[:1], PROMPT + greedy[:2]]
    sampled = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        sampled.append(tokens_of(model, tokenizer, sampler=make_sampler(temp=1.5, top_p=0.95)))
    assert sampled[0] == sampled[1] != sampled[2]


def test_generation_ends_at_the_end_of_text(exact):
    model, tokenizer = exact
    end = tokenizer.eos_token_id
    responses = list(
        stream_generate(model, tokenizer, PROMPT, max_tokens=9, logits_processors=make_logits_processors({end: 1000.0}))
    )
    assert [(r.token, r.finish_reason, r.text) for r in responses] == [(end, "stop", "")]


def test_without_a_limit_generation_ends_where_the_context_does(tiny):
    model, tokenizer = load(tiny, predictor="all", max_kv_size=40)
    never = make_logits_processors({tokenizer.eos_token_id: -1000.0})
    with model:
        responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=-1, logits_processors=never))
        assert len(responses) == 40 - len(PROMPT) + 1
        assert responses[-1].finish_reason == "length"
        with pytest.raises(ValueError, match="room for 40"):
            next(stream_generate(model, tokenizer, prompt_of(41)))


def test_progress_reaches_the_total(tiny):
    model, tokenizer = load(tiny, memory=SMALL, max_kv_size=CONTEXT)
    calls = []
    with model:
        prompt = prompt_of(100)
        tokens_of(model, tokenizer, prompt, max_tokens=1, prompt_progress_callback=lambda *call: calls.append(call))
    assert calls[0] == (0, 100)
    assert calls[-1] == (100, 100)
    assert calls == sorted(calls)
    assert len(calls) > 3


def test_a_prompt_in_two_parts_equals_one(exact):
    model, tokenizer = exact
    prompt = prompt_of(30)
    want = tokens_of(model, tokenizer, prompt)
    cache = make_prompt_cache(model)
    first = tokens_of(model, tokenizer, prompt[:17], max_tokens=1, prompt_cache=cache)
    assert cache[0].offset == 17
    assert len(first) == 1
    assert tokens_of(model, tokenizer, prompt[17:], prompt_cache=cache) == want
    assert cache[0].offset == 30 + 12 - 1


def test_a_rotating_cache_outlives_its_size(exact):
    model, tokenizer = exact
    never = make_logits_processors({tokenizer.eos_token_id: -1000.0})
    settings = {"max_kv_size": 16, "logits_processors": never}
    long = tokens_of(model, tokenizer, PROMPT, max_tokens=60, **settings)
    assert len(long) == 60
    assert tokens_of(model, tokenizer, PROMPT, max_tokens=60, **settings) == long
    theirs = generate_step(mx.array(PROMPT), model, max_tokens=60, prefill_step_size=16, **settings)
    assert [token for token, _ in theirs][:30] == long[:30]


@pytest.mark.parametrize(("predictor", "memory"), MODES)
def test_equal_calls_give_equal_tokens(tiny, predictor, memory):
    model, tokenizer = load(tiny, memory=memory, predictor=predictor, max_kv_size=CONTEXT)
    with model:
        one = tokens_of(model, tokenizer)
        tokens_of(model, tokenizer, prompt_of(33, seed=5))
        assert tokens_of(model, tokenizer) == one


def test_equal_calls_give_equal_logits_where_a_layer_fits_whole(library, tmp_path):
    """Rows that an earlier generation left behind would make the next one's estimates better."""
    path = shutil.copytree(library.bundle(Shape(layers=3, ffn=2048)), tmp_path / "copy")
    manifest = json.loads((path / "manifest.json").read_text())
    steep, flat = [2000.0, 1000.0, 0.0], [1.0, 0.5, 0.0]
    figures = {"recall": 1.0, "perplexity_change": 0.0, "margin": 0.75}
    figures["misses"] = {"shares": [0.0, 0.5, 1.0], "layers": [steep, flat, flat]}
    manifest["calibration"]["low-bit"] = figures
    (path / "manifest.json").write_text(json.dumps(manifest))
    model, tokenizer = load(path, memory="6.5MB", max_kv_size=CONTEXT)
    with model:
        assert [n == 2048 for n in model.flash.plan.capacities] == [True, False, False]
        prompt = prompt_of(100)  # streams the first layer in whole
        first, second = ([r.logprobs for r in stream_generate(model, tokenizer, prompt, max_tokens=8)] for _ in "12")
        assert all(mx.array_equal(a, b).item() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("predictor", "memory"), MODES)
def test_a_model_moves_between_threads(tiny, predictor, memory):
    results = []

    def in_thread(work):
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
        thread.join()

    in_thread(lambda: load(tiny, memory=memory, predictor=predictor, max_kv_size=CONTEXT))
    model, tokenizer = results.pop()
    for _ in range(3):
        in_thread(lambda: tokens_of(model, tokenizer))
    results.append(tokens_of(model, tokenizer))
    in_thread(model.close)
    assert len(results) == 5
    assert results[:4] == results[:1] * 4


def test_models_interleave(tiny, library):
    other = library.bundle(Shape(layers=3, ffn=2048, seed=9))
    settings = [(tiny, "all", SMALL), (tiny, "low-bit", SMALL), (other, "all", "5.5MB"), (other, "all", None)]
    loaded = [
        load(path, memory=memory, predictor=predictor, max_kv_size=CONTEXT) for path, predictor, memory in settings
    ]
    alone = [tokens_of(*pair) for pair in loaded]
    together = [[] for _ in loaded]
    for responses in zip(*(stream_generate(*pair, PROMPT, max_tokens=12) for pair in loaded), strict=True):
        for tokens, response in zip(together, responses, strict=True):
            tokens.append(response.token)
    assert together == alone
    for model, _ in loaded:
        model.close()


def test_one_model_serves_two_conversations_in_turns(exact):
    model, tokenizer = exact
    prompts = [PROMPT, prompt_of(33, seed=5)]
    alone = [tokens_of(model, tokenizer, prompt) for prompt in prompts]
    generators = [stream_generate(model, tokenizer, prompt, max_tokens=12) for prompt in prompts]
    turns = zip(*generators, strict=True)
    assert list(zip(*([r.token for r in turn] for turn in turns), strict=True)) == [tuple(t) for t in alone]


class Stop(Exception):  # noqa: N818  the consumer's own
    pass


def break_off(responses):
    for _ in itertools.islice(responses, 3):
        pass


def close(responses):
    next(responses)
    responses.close()


def throw(responses):
    next(responses)
    with pytest.raises(Stop):
        responses.throw(Stop())


def fail_in_the_consumer(responses):
    with contextlib.suppress(Stop):
        for _ in responses:
            raise Stop


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("predictor", "memory"), MODES)
def test_an_abandoned_generation_leaves_no_trace(tiny, predictor, memory, backend):
    model, tokenizer = load(tiny, memory=memory, predictor=predictor, backend=BACKENDS[backend](), max_kv_size=CONTEXT)
    with model:
        want = tokens_of(model, tokenizer)
        for leave in (break_off, close, throw, fail_in_the_consumer):
            leave(stream_generate(model, tokenizer, prompt_of(9, seed=3), max_tokens=12))
            assert tokens_of(model, tokenizer) == want


@pytest.mark.parametrize("where", ["sampler", "logits_processors", "prompt_progress_callback"])
def test_an_error_in_what_the_caller_brings_leaves_no_trace(tiny, where):
    model, tokenizer = load(tiny, memory=SMALL, predictor="low-bit", max_kv_size=CONTEXT)

    def fail(*_):
        raise Stop

    with model:
        want = tokens_of(model, tokenizer)
        with pytest.raises(Stop):
            tokens_of(model, tokenizer, **{where: [fail] if where == "logits_processors" else fail})
        assert tokens_of(model, tokenizer) == want


INTERRUPTS = """
import random, signal, sys, time
from mlxflash import model as models
from mlxflash.reader import make_reader
from mlxflash import load, stream_generate
from build import BACKENDS, prompt_of

path, predictor, engine, backend, direct, count = sys.argv[1:]
models.make_reader = lambda **_: make_reader(engine)
model, tokenizer = load(
    path, memory="4.9MB", predictor=predictor, max_kv_size=128, backend=BACKENDS[backend](), direct=direct == "direct"
)
assert model.flash.reader.engine == engine

def run(prompt, max_tokens):
    responses = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
    return [(r.token, float(r.logprobs.max())) for r in responses]

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

armed = False
want = run(prompt_of(20), 6)
times = []
for _ in range(4):
    start = time.perf_counter()
    run(prompt_of(40, seed=1), 6)
    times.append(time.perf_counter() - start)
signal.signal(signal.SIGALRM, interrupt)
rng, hit = random.Random(0), 0
for i in range(int(count)):
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, min(times)))
        run(prompt_of(40, seed=1), 6)
    except KeyboardInterrupt:
        hit += 1
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    got = run(prompt_of(20), 6)
    assert got == want, (i, got, want)
for layer in model.flash.layers:
    layer.window.check()
print(hit)
"""


@pytest.mark.parametrize(
    ("predictor", "engine", "backend", "direct"),
    [
        ("all", "threads", "native", "buffered"),
        ("low-bit", "threads", "native", "buffered"),
        ("low-bit", "io_uring", "parts-alias", "direct"),
        ("low-bit", "python", "parts-copy", "buffered"),
    ],
)
def test_interrupts_at_any_moment_leave_no_trace(tiny, predictor, engine, backend, direct):
    count = 30
    args = [sys.executable, "-c", INTERRUPTS, tiny, predictor, engine, backend, direct, str(count)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(args, capture_output=True, text=True, timeout=300, env=env)
    assert run.stderr == ""
    assert int(run.stdout) > 0  # interrupts that arrived inside a generation: how many is the machine's affair


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("predictor", ["all", "low-bit"])
def test_a_read_that_fails_names_its_place_and_the_model_goes_on(tiny, tmp_path, monkeypatch, predictor, engine):
    path = shutil.copytree(tiny, tmp_path / "copy")
    monkeypatch.setattr("mlxflash.model.make_reader", lambda **_: make_reader(engine))
    model, tokenizer = load(path, memory=SMALL, predictor=predictor, max_kv_size=CONTEXT)
    file = path / "layers/001.bundle"
    whole = file.read_bytes()
    with model:
        want = tokens_of(model, tokenizer)
        for length in (20_000, 100_000):
            responses = stream_generate(model, tokenizer, prompt_of(9, seed=3), max_tokens=100)
            next(responses)
            os.truncate(file, length)
            with pytest.raises(OSError, match="the file ends") as caught:
                collections.deque(responses)
            error = caught.value
            assert error.filename == str(file)
            assert error.offset + error.length > length
            assert f"{error.length} bytes at offset {error.offset}" in str(error)
            file.write_bytes(whole)
            assert tokens_of(model, tokenizer) == want


def test_a_closed_model_says_so(tiny):
    model, tokenizer = load(tiny, memory=SMALL, max_kv_size=CONTEXT)
    with model:
        running = stream_generate(model, tokenizer, PROMPT)
        next(running)
    model.close()
    for use in (
        lambda: next(stream_generate(model, tokenizer, PROMPT)),
        lambda: generate(model, tokenizer, PROMPT),
        lambda: model(mx.array([PROMPT])),
        lambda: next(generate_step(mx.array(PROMPT), model)),
        lambda: next(running),
    ):
        with pytest.raises(ValueError, match="this model is closed; load it again"):
            use()


def test_arguments_that_make_no_sense_are_refused(exact):
    model, tokenizer = exact
    for prompt, settings, words in (
        ([], {}, "prompt is empty"),
        ("", {}, "prompt is empty"),
        (PROMPT, {"max_tokens": 0}, "max_tokens 0"),
        (PROMPT, {"max_tokens": -2}, "max_tokens -2"),
        (prompt_of(CONTEXT + 1), {}, f"room for {CONTEXT}"),
        (prompt_of(513), {"max_kv_size": 16}, "room for 512"),
        ([5, 300], {}, "token 300 of the prompt is outside the model's vocabulary of 300"),
        ([5, -1], {}, "token -1 of the prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            tokens_of(model, tokenizer, prompt, **settings)
    for settings, words in (
        ({"memory": "2 apples"}, "2 apples"),
        ({"predictor": "crystal"}, "crystal"),
        ({"window": 0}, "window 0"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "float16"}, "is a bundle already"),
        ({"bits": 4}, "is a bundle already"),
    ):
        with pytest.raises(ValueError, match=words):
            load(model.flash.bundle.path, **settings)


@pytest.mark.parametrize("token", [300, -1, 1 << 30])
def test_a_token_outside_the_vocabulary_is_one_sentence_on_the_cpu(tiny, token):
    """MLX's own devices do not look; what comes through `stream_generate` is checked for all."""
    with load_at(tiny, "native") as model:
        want = np.array(model(mx.array([PROMPT])))
        with pytest.raises(ValueError, match=f"token or position {token}: this model has 300"):
            model(mx.array([[5, token]]))
        assert np.array_equal(np.array(model(mx.array([PROMPT]))), want)


def test_the_readmes_program_runs_as_written():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stderr == ""
    assert run.returncode == 0
    *text, stats = run.stdout.splitlines()
    assert len(" ".join(text)) > 100
    assert "mode='approximate (high" in stats


def test_importing_loads_nothing_heavy():
    code = "import sys, mlxflash; print(mlxflash.__version__, {'mlx', 'numpy', 'mlx_lm'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.stdout.endswith(" set()\n")
    assert run.stderr == ""


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")


def descriptors(under=""):
    links = (Path(os.readlink(f)) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())
    return sum(str(link).startswith(str(under)) for link in links)


@linux
@pytest.mark.parametrize("direct", [False, True])
def test_a_model_holds_one_descriptor_per_layer_file(tiny, tmp_path, direct):
    path = shutil.copytree(tiny, tmp_path / "copy")
    model, tokenizer = load(path, memory=SMALL, max_kv_size=CONTEXT, direct=direct)
    with model:
        tokens_of(model, tokenizer)
        assert descriptors(path) == model.flash.bundle.num_layers
    assert descriptors(path) == 0


@linux
@pytest.mark.parametrize("engine", ENGINES)
def test_loading_again_and_again_leaves_nothing(library, monkeypatch, engine):
    path = library.bundle()
    monkeypatch.setattr("mlxflash.model.make_reader", lambda **_: make_reader(engine))

    def cycle(close):
        model = load_bundle(path, memory="4.6MB", max_kv_size=32)
        model(mx.array([PROMPT]))
        if close:
            model.close()

    def counts():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return descriptors(), len(list(Path("/proc/self/task").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

    for _ in range(10):
        cycle(True)
    before = counts()
    for i in range(200 if engine == ENGINES[1] else 60):
        cycle(close=i % 2 == 0)  # as good as closing: to drop the last reference
    after = counts()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 4e6  # 20 kB per cycle


@linux
def test_a_model_that_cannot_be_loaded_leaves_nothing(tiny, tmp_path):
    path = shutil.copytree(tiny, tmp_path / "copy")
    os.truncate(path / "predictors/low-bit/001.safetensors", 1000)
    before = descriptors(), threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
    for _ in range(5):
        with pytest.raises(ValueError, match=r"001\.safetensors"):
            load(path, memory=SMALL, max_kv_size=CONTEXT)
    assert (descriptors(), threading.active_count(), len(list(Path("/proc/self/task").iterdir()))) == before


@pytest.mark.parametrize("settings", [{"predictor": "all"}, {"predictor": "oracle", "look_ahead": True}])
def test_a_closed_model_leaves_no_pools_to_the_garbage_collector(library, settings):
    """Gigabytes that wait for a collection are over the next model's budget."""
    gc.disable()
    try:
        model = load_at(library.calibrated(), "parts-alias", "part", **settings)
        rows = [weakref.ref(layer.rows) for layer in model.flash.layers]
        model(mx.array([[5, 6, 7]]))
        model.close()
        del model
        assert [ref() for ref in rows] == [None] * len(rows)
    finally:
        gc.enable()
