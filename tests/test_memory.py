"""The memory law: a run within `--memory` lives in a cgroup of that size plus the interpreter's own footprint.

The footprint is what a process is charged that imported what generating imports and loaded the tokenizer. Where no
cgroup can be made peak resident memory is compared instead, with that of a tiny model.
"""

import json
import shutil
import subprocess
import sys

import limited
import pytest

from build import Shape
from mlxflash.bundle import Bundle
from mlxflash.catalog import STORY

MB = 1_000_000
DEEP = Shape(layers=16, d_model=512, ffn=2048, heads=8, vocab=400, dtype="float16")  # 105 MB
PROMPT = "It was the best of times, it was the worst of times. " * 4
TOKENIZER = """
import sys
import mlxflash.cli, mlxflash.calibrate, mlxflash.decode
import mlx_lm.sample_utils
from pathlib import Path
from mlxflash.api import load_tokenizer
load_tokenizer(Path(sys.argv[1])).encode("It was")
"""


def run_in(args, limit=None):
    """Run a process in a cgroup; returns it and the most it was charged, bytes. Skips the test where there is none."""
    try:
        return limited.run_in(args, limit, timeout=120)
    except OSError as error:
        pytest.skip(str(error))


def command(bundle, memory, *more):
    args = ["generate", "--model", bundle, "-p", PROMPT, "-m", "30", "--json", "--memory", memory, *more]
    return [sys.executable, "-m", "mlxflash", *map(str, args)]


def assert_lives_within(bundle, memory, variants):
    """Every variant runs in `memory` bytes beyond the footprint, and would not in half of them."""
    import_only = [sys.executable, "-c", TOKENIZER, str(bundle)]
    assert subprocess.run(import_only, timeout=120).returncode == 0  # files it reads are cached before they are charged
    footprint = run_in(import_only)[1]
    for more in variants:
        run, _ = run_in(command(bundle, memory, *more), footprint + memory)
        assert (run.returncode, run.stderr) == (0, ""), more
        assert json.loads(run.stdout)["generation_tokens"] > 0
    assert run_in(command(bundle, memory), footprint + memory // 2)[0].returncode != 0  # so the limit is one


def test_the_story_lives_in_22_mb():
    assert_lives_within(STORY, 22 * MB, ([], ["--exact"], ["--device", "mlx-cpu"], ["--window", "3"]))


def test_a_deep_model_lives_in_little_more_than_half_its_size(library):
    path = library.bundle(DEEP)
    bundle = Bundle.open(path)
    whole = bundle.streamed_bytes() + bundle.resident_bytes()
    assert whole > 100 * MB
    assert_lives_within(path, int(0.55 * whole), ([], ["--device", "mlx-cpu"], ["--exact"]))


def peak(bundle, memory, *more):
    run = subprocess.run(command(bundle, memory, *more), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["peak_rss_gb"] * 1e9


@pytest.mark.parametrize("more", [[], ["--exact"]])
def test_peak_memory_grows_by_no_more_than_the_budget(library, tmp_path, more):
    tiny = shutil.copytree(library.bundle(Shape(vocab=4096)), tmp_path / "tiny")
    for file in STORY.glob("tokenizer*"):
        shutil.copy(file, tiny)
    least = peak(tiny, 8 * MB, *more)
    for memory in (22 * MB, 26 * MB):
        assert 5 * MB < peak(STORY, memory, *more) - least < memory


def test_what_is_available_is_no_more_than_the_cgroups_limit():
    code = "from mlxflash.plan import available_memory; print(available_memory())"
    limit = 300 << 20
    run, _ = run_in([sys.executable, "-c", code], limit)
    assert int(run.stdout) == limit
