"""Profiles of a machine last a day, and those taken while others computed serve no other process."""

import os
import subprocess
import sys
import time

import pytest

from mlxflash import kept
from mlxflash.kept import SECONDS, Watch, keep, recall


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_ours", {})
    return tmp_path / "folder" / "profile.json"


def test_a_profile_lasts_a_day(file):
    assert recall(file) is None
    keep(file, {"rate": 1.0}, quiet=True)
    assert recall(file) == {"rate": 1.0}
    for age, there in ((SECONDS - 60, True), (SECONDS + 60, False), (-3600, False)):
        os.utime(file, (time.time() - age,) * 2)
        assert (recall(file) is not None) == there
    assert list(file.parent.iterdir()) == [file]


def test_one_of_a_busy_machine_serves_this_process_alone(file, monkeypatch):
    keep(file, {"rate": 1.0}, quiet=False)
    assert recall(file) == {"rate": 1.0}
    assert not file.exists()
    monkeypatch.setattr(kept, "_ours", {})
    assert recall(file) is None


def test_others_at_work_are_seen():
    if kept._others() is None:
        pytest.skip("this system does not say what others do")
    watch = Watch()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1.0)
        assert not watch.quiet
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("seconds", "quiet"), [(0.0, True), (0.1, True), (0.5, False)])
def test_a_share_of_the_cores_is_allowed(monkeypatch, seconds, quiet):
    monkeypatch.setattr(kept.os, "cpu_count", lambda: 2)
    clock, others = iter([0.0, 1.0]), iter([7.0, 7.0 + seconds])
    monkeypatch.setattr(kept.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(kept, "_others", lambda: next(others))
    assert Watch().quiet == quiet


def test_elsewhere_the_load_says(monkeypatch):
    monkeypatch.setattr(kept, "_others", lambda: None)
    monkeypatch.setattr(kept.os, "cpu_count", lambda: 2)
    for load, quiet in ((0.5, True), (3.0, False)):
        monkeypatch.setattr(kept.os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        assert Watch().quiet == quiet


def test_own_work_is_not_others(monkeypatch):
    """What this process computes is in the system's figure and is taken out again."""
    if kept._others() is None:
        pytest.skip("this system does not say what others do")
    monkeypatch.setattr(kept.time, "process_time", lambda: 0.0)
    all_of_it = kept._others()
    monkeypatch.setattr(kept.time, "process_time", lambda: 1e6)
    assert kept._others() - all_of_it == pytest.approx(-1e6, abs=100)
