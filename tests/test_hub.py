"""Models of the hub: what is said before a download is true, what is taken, and how it fails."""

import errno
import os
import time
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from mlxflash import preview as previews
from mlxflash.catalog import KNOWN
from mlxflash.forecast import COPY, MachineProfile
from mlxflash.hub import download, find_bundle
from mlxflash.misses import MissCurve
from mlxflash.plan import format_bytes
from mlxflash.preview import preview
from test_diskprofile import made

RATES = {"float16": 10e9, "4": 5e9, "8": 5e9, "3": 5e9, "float32": 10e9, COPY: 10e9}


@pytest.fixture
def machine(monkeypatch):
    """A machine and a disk with simple laws."""
    monkeypatch.setattr(previews, "machine_profile", lambda backend, kinds: MachineProfile(RATES, 1e-5))
    monkeypatch.setattr(previews, "disk_of", lambda folder: made(overhead=1e-5, rate=2e9))
    monkeypatch.setattr(previews, "available_memory", lambda: 8 * 10**9)


def rate_in(line):
    return float(line.split("forecast ")[1].split()[0])


def test_floats_and_four_bits_side_by_side(machine):
    known = KNOWN["falcon-7b"]
    said = preview(known, "6GB").splitlines()
    assert "tiiuae/falcon-7b: 13.84 GB or more" in said[0]
    assert "13.84 GB on disk, 6.00 GB of memory" in said[1]
    assert "per token, exactly as the model is" in said[1]
    assert "-q 4" in said[2]
    assert "3.89 GB on disk" in said[2]
    assert "all of it held" in said[2]
    assert 3.89 < float(said[2].split("on disk, ")[1].split(" GB of memory")[0]) < 5.0
    read = float(said[1].split("held, ")[1].split(" GB read")[0])
    assert rate_in(said[1]) == pytest.approx(2 / read, rel=0.12)  # the disk is the limit
    assert rate_in(said[2]) == pytest.approx(5 / 3.89, rel=0.1)  # and here the processor
    assert said[3].startswith("  -q 4 would be faster")
    assert len(said) == 4  # no word of a page cache: 8 GB keep no 13.8
    assert f"{format_bytes(known.smallest())} of memory at least" in preview(known, "1GB")
    assert "-q 8" in preview(known, "6GB", 8)


def test_a_wide_context_takes_from_what_is_held(machine):
    held = [
        int(preview(KNOWN["opt-6.7b"], "9GB", context=n).split("% of the units")[0].split()[-1]) for n in (64, 2048)
    ]
    assert held[0] > held[1] + 10


def test_a_sparse_model_reads_what_is_guessed_and_says_so(machine, monkeypatch):
    """Misses are the story model's, in proportion to the activity; never more than is not held."""
    monkeypatch.setattr(previews, "_story", lambda: (MissCurve(100, (0.0, 1.0), (10.0, 0.0)), 0.066))
    known = KNOWN["opt-6.7b"]
    said = preview(known, "9GB").splitlines()
    held, read = (float(said[1].split(mark)[0].split()[-1]) for mark in ("% of the units", " MB read"))
    assert read == pytest.approx(0.05 * (1 - held / 100) * 32 * 16384 * 16384 / 1e6, rel=0.03)
    assert "3% of its units being active" in said[-1]
    full = preview(replace(known, active=1.0), "9GB").splitlines()
    assert float(full[1].split(" GB read")[0].split()[-1]) == pytest.approx(
        (1 - held / 100) * 32 * 16384 * 16384 / 1e9, rel=0.05
    )
    assert "not published" in preview(KNOWN["persimmon-8b"], "18GB")


def test_a_mixture_reads_no_more_than_chance_would(machine):
    said = preview(KNOWN["mixtral-8x7b"], "16GB").splitlines()
    assert "or less read per token" in said[2]
    assert "or more tokens/s" in said[2]


def test_without_direct_reads_nothing_is_forecast_that_streams(machine, monkeypatch):
    monkeypatch.setattr(previews, "disk_of", lambda folder: None)
    said = preview(KNOWN["falcon-7b"], "6GB").splitlines()
    assert "forecast" not in said[1]
    assert "forecast" in said[2]
    assert "faster" not in "".join(said)


def test_it_is_said_before_the_hub_is_asked(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("MLXFLASH_CACHE", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise ConnectionError("away")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name in ("falcon-7b", "tiiuae/falcon-7b", "tiiuae/falcon-7b@main"):
        said = []
        with pytest.raises(ValueError, match="cannot be reached"):
            find_bundle(name, say=said.append, memory="6GB", context=100)
        assert "forecast" in said[0]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_one_kind_of_weights_of_one_revision_is_taken(monkeypatch, tmp_path, weights):
    asked = []

    def listed(self, repo, revision=None):
        asked.append((repo, revision))
        return ["config.json", weights, "pytorch_model.bin", "training_args.bin"]

    def downloaded(repo, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((repo, revision, allow_patterns[-1], ignore_patterns, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    assert download("org/name@v2") == tmp_path
    pattern = "*.safetensors" if weights == "model.safetensors" else "pytorch_model*.bin"
    assert asked == [("org/name", "v2"), ("org/name", "v2", pattern, ["*/*", "consolidated*"], False)]


def test_where_the_hub_is_away_its_cache_is_asked(monkeypatch, tmp_path):
    def listed(self, repo, revision=None):
        raise next(iter(HfHubHTTPError.__bases__))("away")  # the HTTP library's own

    def downloaded(repo, local_files_only, **_):
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    assert download("org/name") == tmp_path


def test_an_unreachable_hub_is_one_sentence(monkeypatch, tmp_path):
    """The real library against a port where nobody listens; between its attempts it would wait."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"some-org/some-model.*cannot be reached \(Connect.*Error\)"):
        download("some-org/some-model")


ERRORS = {
    "nothing there": (LocalEntryNotFoundError("none"), ValueError, "cannot be reached"),
    "a reset": (ConnectionResetError(errno.ECONNRESET, "reset"), ValueError, "cannot be reached"),
    "no route": (OSError(errno.ENETUNREACH, "no route"), ValueError, "cannot be reached"),
    "Rust's": (RuntimeError("Data processing error: deadline"), ValueError, "cannot be reached"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left"),
    "Rust's full disk": (RuntimeError("I/O error: (os error 28)"), OSError, "No space left"),
    "no permission": (PermissionError(errno.EACCES, "denied"), OSError, os.strerror(errno.EACCES)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_disk_refuses_is_not_the_hubs_fault(monkeypatch, case):
    error, kind, words = ERRORS[case]

    def downloaded(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    with pytest.raises(kind, match=words) as caught:
        download("org/name")
    if kind is OSError:
        assert "downloading org/name" in str(caught.value)
        assert caught.value.filename
