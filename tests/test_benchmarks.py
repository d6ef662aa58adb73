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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The output of a run of end_to_end at the tiny shape, with its default budget."""
    folder = tmp_path_factory.mktemp("end-to-end")
    done = process(sys.executable, "benchmarks/end_to_end.py", "--shape", "tiny", "--tokens", "8", "--dir", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_end_to_end_says_where_every_way_spent_a_token(tiny):
    run = json.loads(tiny.splitlines()[-1])
    assert run.keys() >= RUN
    assert [row["mode"] for row in run["rows"]] == WAYS
    for row in run["rows"]:
        assert row.keys() >= ROW
        assert row["compute_ms"] + row["wait_ms"] + row["manage_ms"] == pytest.approx(row["ms"])
    read = {row["mode"]: row["bytes"] for row in run["rows"]}
    assert read["naive"] > read["hybrid"] > read["flash"] > read["resident4"] == 0


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
