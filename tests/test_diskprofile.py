"""The disk profile: interpolation between what was measured, keeping, and what is decided by it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from build import BACKENDS, UNTIED, load, prompt_of
from mlxflash import diskprofile
from mlxflash.diskprofile import COUNTS, SIZES, DiskProfile, disk_of, disk_profile
from mlxflash.kept import Watch
from test_exactness import TOLERANCE, assert_same_logits, dense_logits


def made(overhead=2e-5, rate=2e9, latency=1e-4):
    """The profile of a disk with a simple law."""
    return DiskProfile(tuple(tuple(latency + c * (overhead + s / rate) for c in COUNTS) for s in SIZES))


def test_measured_points_are_given_back():
    profile = made()
    for i, size in enumerate(SIZES):
        for j, count in enumerate(COUNTS):
            assert profile.batch(size, count) == pytest.approx(profile.seconds[i][j])


@pytest.mark.parametrize(("size", "count"), [(18_000, 40), (6_000, 3), (900_000, 200), (16_384, 5_000), (64 << 20, 1)])
def test_between_and_beyond_the_points_it_follows_the_law(size, count):
    assert made().batch(size, count) == pytest.approx(1e-4 + count * (2e-5 + size / 2e9), rel=0.25)


def test_more_never_takes_less():
    profile = made()
    counts = np.geomspace(0.5, 1e4, 60)
    sizes = np.geomspace(512, 1e8, 60)
    assert (np.diff([profile.batch(16384, c) for c in counts]) >= 0).all()
    assert (np.diff([profile.batch(s, 33) for s in sizes]) >= 0).all()
    assert profile.batch(0, 5) == profile.batch(4096, 0) == 0


def test_a_gap_is_worth_a_reads_overhead():
    assert made(overhead=2e-5, rate=2e9).gap_bytes() == pytest.approx(40_000, rel=0.05)
    assert made(overhead=0).gap_bytes() < 1000
    assert made().sequential(1e9) == pytest.approx(0.5, rel=0.05)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Watch, "quiet", True)
    monkeypatch.setattr(diskprofile, "LEAST_SECONDS", 0)
    return tmp_path / "cache" / "disks"


def files_of(path, num_bytes=300_000):
    path.mkdir(exist_ok=True)
    file = path / "data"
    file.write_bytes(bytes(num_bytes))
    return [file]


def test_a_disk_is_measured_once(tmp_path, kept, monkeypatch):
    files = files_of(tmp_path)
    first = disk_profile(files)
    if first is None:
        pytest.skip("this file system has no direct reads")
    assert np.array(first.seconds).shape == (len(SIZES), len(COUNTS))
    monkeypatch.setattr(DiskProfile, "measure", None)
    assert disk_profile(files) == first


def test_a_disk_without_files_is_tried_and_left_as_it_was(tmp_path, kept, monkeypatch):
    """A folder that is not there yet is on its parent's disk; what was measured of that disk before is taken."""
    trial = disk_of(tmp_path / "not" / "yet")
    if trial is None:
        pytest.skip("this file system has no direct reads")
    assert min(map(min, trial.seconds)) > 0
    assert list(tmp_path.iterdir()) == []
    known = disk_profile(files_of(tmp_path))
    monkeypatch.setattr(DiskProfile, "measure", None)
    assert disk_of(tmp_path / "not" / "yet") == known


@pytest.mark.parametrize("harm", ["", "nonsense", '{"seconds": [[1]]}', '{"seconds": null}', "zero"])
def test_a_damaged_one_is_measured_again(tmp_path, kept, harm):
    files = files_of(tmp_path)
    if disk_profile(files) is None:
        pytest.skip("this file system has no direct reads")
    (file,) = kept.iterdir()
    file.write_text(json.dumps({"seconds": np.zeros((len(SIZES), len(COUNTS))).tolist()}) if harm == "zero" else harm)
    again = disk_profile(files)
    assert min(map(min, again.seconds)) > 0
    assert json.loads(file.read_text())["seconds"] == [list(row) for row in again.seconds]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, kept, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert disk_profile(files_of(tmp_path)) is not None


class Judge:
    """A disk on which random reads take so long."""

    def __init__(self, seconds):
        self.batch, self.sequential = (lambda size, count: seconds * count), (lambda num_bytes: num_bytes)


SLOW_READS, FAST_READS = Judge(1e9), Judge(0)


@pytest.mark.parametrize("disk", [SLOW_READS, FAST_READS, None])
@pytest.mark.parametrize("budget", ["least", "part", "room"])
@pytest.mark.parametrize("backend", [*BACKENDS][:2])
def test_few_tokens_are_exact_either_way(library, backend, budget, disk):
    """The union of what each needs, or everything: both compute what the dense model does."""
    path = library.bundle(UNTIED)
    with load(path, backend, budget) as model:
        streamed = []
        for layer in model.flash.layers:
            layer.disk = disk
            advance = layer.window.advance
            layer.window.advance = lambda n, advance=advance: streamed.append(n) or advance(n)
        for length in (2, 3, 17, 64, 65):
            model.flash.forget()
            tokens, cache = prompt_of(length + 6, UNTIED, seed=length), make_prompt_cache(model)
            want = dense_logits(path, tuple(tokens))
            for part in np.split(np.array(tokens), [length, length + 1, length + 4]):  # a prompt, a word, a turn
                got = np.array(model(mx.array(part[None]), cache=cache)[0])
                assert_same_logits(got, want[cache[0].offset - len(part) : cache[0].offset], TOLERANCE[mx.float32])
                for layer in model.flash.layers:
                    layer.window.check()
        if disk is SLOW_READS:
            assert set(streamed) >= {2, 3, 17, 64, 65}
        elif disk is FAST_READS:
            assert set(streamed) == {65}
