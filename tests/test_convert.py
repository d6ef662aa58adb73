"""Conversion: a record is a neuron of the checkpoint, and an interruption at any moment loses nothing.

What was interrupted never opens as a bundle, and what goes on from it ends in the very bytes of an undisturbed run.
"""

import filecmp
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from mlxflash.converters import convert

from build import Shape
from mlxflash.bundle import HEADER_BYTES, Bundle, BundleError
from reference import read_safetensors

DEEP = Shape(layers=12, ffn=2048)
CONVERT = "import sys; from mlxflash.converters import convert; convert(sys.argv[1], sys.argv[2])"


def assert_same_files(one, other):
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in names:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def test_a_record_is_a_neuron(library, tmp_path):
    source = library.checkpoint(Shape())
    bundle = convert(source, tmp_path / "b.flash")
    (file,) = source.glob("*.safetensors")
    weights = read_safetensors(file)
    record = bundle.manifest.record
    for index, layer in enumerate(bundle.manifest.layers):
        raw = np.fromfile(bundle.layer_path(index), np.uint8, layer.units * record.stride, offset=HEADER_BYTES)
        rows = raw.reshape(layer.units, -1)[:, : record.num_bytes].copy().view(np.float32)
        up = weights[f"model.decoder.layers.{index}.fc1.weight"]
        down = weights[f"model.decoder.layers.{index}.fc2.weight"]
        np.testing.assert_array_equal(rows, np.concatenate([up, down.T], axis=1))


def test_a_killed_conversion_goes_on_and_ends_in_the_same_bytes(library, tmp_path):
    source, target, partial = library.checkpoint(DEEP), tmp_path / "b.flash", tmp_path / "b.flash.partial"
    begin = time.monotonic()
    convert(source, tmp_path / "whole.flash")
    length = time.monotonic() - begin
    kills = 0
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        running = subprocess.Popen([sys.executable, "-c", CONVERT, source, target])
        while running.poll() is None and not (partial / "layers").exists():
            time.sleep(0.001)
        time.sleep(share * length)
        running.send_signal(signal.SIGKILL)
        if running.wait() == -signal.SIGKILL and not target.exists():
            kills += 1
            with pytest.raises(BundleError, match="not a bundle"):
                Bundle.open(partial)
        if target.exists():
            break
    assert kills > 0
    if not target.exists():
        convert(source, target)
    assert not partial.exists()
    assert_same_files(target, tmp_path / "whole.flash")


def test_other_options_start_over(library, tmp_path):
    source, target = library.checkpoint(DEEP), tmp_path / "b.flash"
    running = subprocess.Popen([sys.executable, "-c", CONVERT, source, target])
    while running.poll() is None and not (tmp_path / "b.flash.partial" / "layers" / "000.bundle").exists():
        time.sleep(0.001)
    running.kill()
    running.wait()
    assert not target.exists()
    convert(source, target, bits=8)
    convert(source, tmp_path / "whole.flash", bits=8)
    assert_same_files(target, tmp_path / "whole.flash")
