"""Benchmarks that others run run: what they print last is the JSON that is promised. Never a word about times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = {
    "shape",
    "memory_bytes",
    "peak_rss_bytes",
    "naive_ms",
    "hybrid_ms",
    "resident4_ms",
    "flash_ms",
    "compute_ms",
    "wait_ms",
    "manage_ms",
    "bytes",
    "reads",
    "io_limit_ms",
    "memory_limit_ms",
    "ready_s",
    "rates",
    "rows",
}
ROW = {"mode", "ms", "compute_ms", "wait_ms", "manage_ms", "predict_ms", "bytes", "reads"}
WAYS = ["naive", "hybrid", "resident4", "flash", "flash, no look-ahead", "perfect look-ahead"]
WAYS += ["sketch", "sketch, no look-ahead"]
# Enough of each step of mac.py to see that it went to its end.
STEPS = {
    "pools": {"bfloat16_alias", "late_async_eval", "other_rows", "moves_adding_held"},
    "landing": {"direct", "records_ffn", "records_late", "parts_ffn", "parts_late"},
    "evals": {"empty_us", "small_us", "chain_apart_us", "mask_us", "sync_us"},
    "copies": {"up_prefix_gb_s", "up_columns_extra_bytes", "up_quantised_free", "down_quantised_free"},
    "wired": {"unwired_gb_s", "wired_gb_s"},
    "adoption": {"asarray", "metal_kernel"},
    "iovecs": {
        f"{ways}_{size}_{threads}_us" for ways in ("one", "two") for size in (8192, 32768) for threads in (1, 16)
    },
    "cache": {f"{order}_{way}_gb_s" for order in ("random", "sequential") for way in ("uncached", "buffered_cold")},
    "end_to_end": RUN,
}

GPU_STEPS = {
    "laws": {"4bits_oracle_part", "float32_all_whole_error"},
    "bus": {"carries", "plain_64_gb_s", "bus_gb_s", "answer_plain_us", "synchronize_us"},
    "updates": {"synchronized_64", "evaluated_64_copies", "seen"},
    "copies": {"up_prefix_free", "down_quantised_gb_s"},
    "disk": {"direct", "random_16_gb_s", "sequential_1024_gb_s", "gds_gb_s"},
    "resident": {"dense_ms", "whole", "whole_ms"},
    "end_to_end": RUN,
}


def process(*command):
    return subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def benchmark(name, *arguments):
    """What it prints; its last line is JSON where it has any."""
    done = process(sys.executable, f"benchmarks/{name}.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where bundles of tiny shapes are kept."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def tiny(folder):
    """The output of a run of end_to_end at the tiny shape, with its default budget."""
    return benchmark("end_to_end", "--shape", "tiny", "--tokens", "8", "--dir", folder)


@pytest.fixture(scope="module")
def bundle(folder):
    if not (folder / "tiny.flash").exists():
        benchmark("shapes", "tiny", folder / "tiny.flash")
    return folder / "tiny.flash"


def test_end_to_end_says_where_every_way_spent_a_token(tiny):
    run = json.loads(tiny.splitlines()[-1])
    assert run.keys() >= RUN
    assert [row["mode"] for row in run["rows"]] == WAYS
    for row in run["rows"]:
        assert row.keys() >= ROW
        assert row["compute_ms"] + row["wait_ms"] + row["manage_ms"] == pytest.approx(row["ms"])
    read = {row["mode"]: row["bytes"] for row in run["rows"]}
    assert read["naive"] > read["hybrid"] > read["flash"] > read["resident4"] == 0


def test_end_to_end_shows_what_staging_costs(folder):
    said = benchmark("end_to_end", "--shape", "tiny-falcon-relu", "--layers", "2", "--tokens", "4", "--dir", folder)
    run = json.loads(said.splitlines()[-1])
    assert [row["mode"] for row in run["rows"]] == WAYS
    assert run["bytes"] > run["staged_bytes"] > 0  # whole blocks are read
    assert run["staged_ms"] > 0
    assert "wanted" in said


def test_end_to_end_of_a_dense_shape_is_exact_streaming(folder):
    said = benchmark("end_to_end", "--shape", "tiny-llama", "--layers", "2", "--dir", folder)
    run = json.loads(said.splitlines()[-1])
    assert run.keys() >= RUN - {"flash_ms"}
    assert [row["mode"] for row in run["rows"]] == WAYS[:3]
    hybrid = run["rows"][1]
    assert run["bytes"] == hybrid["bytes"] > 0
    assert hybrid["alone_ms"] > 0
    assert "of its reads alone" in said


def test_a_trace_is_as_published_of_its_shape():
    said = benchmark("trace", "synthetic", "--shape", "tiny-falcon-relu", "--tokens", "24")
    asked, flagged, union = (
        next(x for x in said.splitlines() if word in x) for word in ("asked", "  flagged", "union of 5")
    )
    assert asked == "asked for: 15.0% flagged, 33.0% in 5, 3.1% new"
    assert float(flagged.split()[1].rstrip("%")) == pytest.approx(15, abs=1)
    assert float(union.split()[3].rstrip("%")) == pytest.approx(33, abs=2)


def test_naive_takes_turns(bundle):
    said = benchmark("naive", bundle, "--memory", "60%", "--trace", "--tokens", "4", "--warm", "2", "--rounds", "2")
    run = json.loads(said.splitlines()[-1])
    assert [row["mode"] for row in run["rows"]] == ["naive", "hybrid", "flash"]
    assert [row["tokens"] for row in run["rows"]] == [4, 4, 8]


def test_streaming_stands_beside_its_reads(bundle):
    said = benchmark("streaming", bundle, "--memory", "50%", "--tokens", "2")
    assert [line.split()[0] for line in said.splitlines()[-4:-1]] == ["alone", "chained", "reads"]


def test_a_few_tokens_both_ways(folder, bundle):
    said = benchmark("few_tokens", "--shape", "tiny", "--memory", "60%", "--reps", "1", "--dir", folder)
    rows = {row["tokens"]: row for row in json.loads(said.splitlines()[-1])["rows"]}
    assert list(rows) == [1, 2, 4, 8, 32, 128]
    assert rows[2]["union"]["bytes"] < rows[2]["stream"]["bytes"]


def test_a_model_that_fits_on_both_devices(folder, bundle):
    said = benchmark("resident", "--shape", "tiny", "--tokens", "2", "--rounds", "1", "--dir", folder)
    assert json.loads(said.splitlines()[-1])["ms"].keys() == {"cpu", "mlx-cpu"}


def llama(folder, *arguments):
    shapes = "--shape", "tiny-llama-relu", "--small", "tiny-llama", "--layers", "2"
    return process(sys.executable, "benchmarks/against_llamacpp.py", *shapes, "--dir", folder, *arguments)


def test_llama_cpp_computes_the_same(folder):
    """Where it is installed; else this says what to do."""
    done = llama(folder, "--tokens", "2")
    if "needs" in done.stderr:
        assert done.stderr.endswith("pip install llama-cpp-python gguf\n")
        pytest.skip("llama.cpp is not installed")
    if "no memory cgroup" in done.stderr:
        pytest.skip("no memory cgroup can be made here")
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows.keys() == {"exact", "sparse", "fits"}
    assert rows["exact"]["logits"] < 0.02
    assert rows["fits"]["logits"] < 0.02
    assert rows["exact"]["bytes"] > rows["sparse"]["bytes"] > rows["fits"]["bytes"] == 0


def test_our_half_of_the_comparison_runs_without_llama_cpp(folder):
    path = folder / "worker.flash"
    benchmark("shapes", "tiny-llama-relu", path)
    job = {"program": "ours", "path": str(path), "tokens": 2, "memory": 90_000_000, "layers": None}
    sparse, sketch, exact = (
        json.loads(llama(folder, "--worker", json.dumps(job | {"shape": shape, "sketched": sketched})).stdout)
        for shape, sketched in (("tiny-llama-relu", False), ("tiny-llama-relu", True), (None, False))
    )
    assert len(sparse["seconds"]) == len(sketch["seconds"]) == len(exact["seconds"]) == 2
    assert exact["bytes"] > sparse["bytes"] > sketch["bytes"] > 0


def test_a_checkpoint_of_pytorchs_converts_and_generates_in_a_cgroup(tmp_path):
    shape = "--shape", "tiny-llama", "--layers", "1"
    done = process(sys.executable, "benchmarks/cgroup.py", *shape, "--bin", "--limit", "400MB", "--dir", tmp_path)
    if "no memory cgroup" in done.stderr:
        pytest.skip("no memory cgroup can be made here")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout.splitlines()[-1])
    assert [row["step"] for row in run["rows"]] == ["convert", "generate"]
    assert all(0 < row["charged"] <= 400_000_000 for row in run["rows"])
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_every_way(tiny, tmp_path):
    text, svg = tmp_path / "run.txt", tmp_path / "out.svg"
    text.write_text(tiny)
    done = process(sys.executable, "benchmarks/picture.py", text, "--out", svg)
    if "needs matplotlib" in done.stderr:
        pytest.skip("matplotlib is not installed")
    assert done.returncode == 0, done.stderr
    assert all(way in svg.read_text() for way in WAYS)


def test_the_picture_refuses_what_is_no_run(tmp_path):
    (tmp_path / "run.txt").write_text("nothing here\n")
    done = process(sys.executable, "benchmarks/picture.py", tmp_path / "run.txt")
    assert done.returncode == 1
    assert done.stderr == f"picture: {tmp_path / 'run.txt'}: holds no JSON line of end_to_end.py\n"


def test_the_mac_script_runs_dry(tmp_path):
    ours = Path(sys.prefix) == ROOT / ".venv"  # elsewhere the script would set up an environment of its own
    command = ["benchmarks/mac.sh"] if ours else [sys.executable, "benchmarks/mac.py"]
    out = tmp_path / "mac.json"
    done = process(*command, "--dry-run", "--dir", tmp_path, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["failed"] == []
    assert found["machine"].keys() >= {"system", "device", "memory_bytes", "mlx", "metal", "native", "reader"}
    assert list(found["steps"]) == list(STEPS)
    for name, keys in STEPS.items():
        assert found["steps"][name].keys() >= keys | {"problems", "seconds"}
    assert list(tmp_path.iterdir()) == [out]  # nothing is left behind


def test_the_gpu_script_runs_dry(tmp_path):
    ours = Path(sys.prefix) == ROOT / ".venv"  # elsewhere the script would look for a Python of its own
    command = ["benchmarks/gpu.sh"] if ours else [sys.executable, "benchmarks/gpu.py"]
    out, steps = tmp_path / "gpu", ["laws", "bus", "updates", "copies", "disk", "resident", "end_to_end"]
    done = process(*command, "--dry-run", "--dir", tmp_path, "--out", out, "--steps", ",".join(steps))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "gpu.json").read_text())
    assert found["failed"] == []
    assert found["machine"].keys() >= {"system", "device", "builds", "memory_bytes", "mlx", "native", "reader"}
    assert list(found["steps"]) == steps
    for name, keys in GPU_STEPS.items():
        assert found["steps"][name].keys() >= keys | {"problems", "seconds"}
    rows = {row["mode"]: row for row in found["steps"]["end_to_end"]["rows"]}
    assert list(rows) == [*WAYS, "flash, transfers waited for", "flash, host tier"]
    assert rows["flash"]["transfer_bytes"] >= rows["flash"]["bytes"] > rows["flash, host tier"]["bytes"]
    assert rows["flash, host tier"]["tier_hit_rate"] > 0.1 > rows["flash"]["tier_hit_rate"] == 0
    text = (out / "gpu.txt").read_text()
    assert all(way in text for way in rows)
    assert "over naive (the paper, RTX 4090: 26x)" in text
    assert list(tmp_path.iterdir()) == [out]


def test_a_mac_step_that_dies_is_named_and_the_others_go_on(tmp_path):
    """A stand-in for a GPU error: one step kills its process, one does not end, one raises."""
    script = tmp_path / "broken.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import mac
mac.__file__, mac.STEP_S = __file__, 5
def dies(step): os.kill(os.getpid(), 6)
def hangs(step): __import__("time").sleep(60)
def raises(step): raise ValueError("no such thing")
def finds(step): step.must("holds", False, "water is dry")
mac.STEPS = {{f.__name__: f for f in (dies, hangs, raises, finds, mac.adoption)}}
sys.exit(mac.main())
"""
    )
    done = process(sys.executable, script, "--dry-run", "--dir", tmp_path, "--out", tmp_path / "mac.json")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-5:-1] == [
        "dies failed: was ended by SIGABRT.",
        "hangs failed: did not end within 5 s.",
        "raises failed: ValueError: no such thing.",
        "finds failed: does not hold: water is dry.",
    ]
    found = json.loads((tmp_path / "mac.json").read_text())
    assert found["failed"] == ["dies", "hangs", "raises", "finds"]
    assert found["steps"]["adoption"]["problems"] == []
