"""Naming the next layer's units a layer early: the fit, its files, and what it is worth on a model of its own."""

import mlx.core as mx
import numpy as np
import pytest

from build import BACKENDS, Shape, load
from mlxflash.bundle import Bundle, BundleError
from mlxflash.evaluate import decode_losses
from mlxflash.lookahead import RANK, WIDTH_PER_RANK, Fit, LookAhead, read_look_ahead, save_look_ahead
from mlxflash.model import load_bundle

D, UNITS = 64, 96


def pairs(n, rank, noise=0.0, seed=0):
    """Inputs and what an affine map of `rank` makes of them, float32 [n, D] each."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) * rng.uniform(0.1, 3, D) + rng.normal(size=D)
    a, b = rng.normal(size=(D, rank)), rng.normal(size=(rank, D))
    y = x * rng.uniform(0.5, 2, D) + x @ a @ b + rng.normal(size=D) + noise * rng.normal(size=(n, D))
    return x.astype(np.float32), y.astype(np.float32)


def share_left(fit, x, y):
    return float(np.square(fit(x) - y).sum() / np.square(y - y.mean(axis=0)).sum())


@pytest.mark.parametrize("n", [200, 3000])  # above, evenly chosen tokens stand for all
def test_a_map_of_small_rank_is_found_again(n):
    x, y = pairs(n + 500, D // WIDTH_PER_RANK)
    fit = Fit.of(x[:n], y[:n])
    assert fit.down.shape == fit.up.T.shape == (D // WIDTH_PER_RANK, D)
    alone = Fit(fit.scale, y[:n].mean(axis=0) - x[:n].mean(axis=0) * fit.scale, fit.down, 0 * fit.up)
    assert share_left(fit, x[n:], y[n:]) < 0.05 < 0.3 < share_left(alone, x[n:], y[n:])


def test_few_tokens_give_a_small_rank_and_no_worse_a_guess_than_none():
    x, y = pairs(520, 4, noise=0.5)
    fit = Fit.of(x[:20], y[:20])
    assert len(fit.down) == 1
    assert share_left(fit, x[20:], y[20:]) < 1
    assert len(Fit.of(x[:10], y[:10]).down) == 1
    still = np.ones((20, D), np.float32)
    assert np.allclose(Fit.of(still, 2 * still)(still), 2)  # inputs that never change


def test_the_rank_is_bounded():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 2048)).astype(np.float32)
    assert Fit.of(x[:, :1280], x[:, :1280] * 2).down.shape == (RANK, 1280)


class Same:
    nbytes = 0

    def start(self, x):
        return lambda: np.array(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_device_and_host_compute_one_guess(backend):
    x, y = pairs(300, 4)
    fit = Fit.of(x, y)
    got = LookAhead(BACKENDS[backend](), fit, Same()).start(mx.array(x[:3]))()
    wanted = fit(x[:3])
    assert np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max()  # the map is kept in half precision


def saved(path):
    x, y = pairs(300, 4)
    rng = np.random.default_rng(0)
    shift, error = rng.normal(size=(2, UNITS)).astype(np.float32)
    save_look_ahead(path, Fit.of(x, y), shift, error)
    return shift, error


def test_files_give_back_what_they_were_given(tmp_path):
    shift, error = saved(tmp_path / "a" / "000.safetensors")
    fit, *others = read_look_ahead(tmp_path / "a" / "000.safetensors", D, UNITS)
    assert (np.array(others) == [shift, error]).all()
    assert fit.down.shape == (D // WIDTH_PER_RANK, D)


@pytest.mark.parametrize("harm", ["cut", "empty", "words", "width", "units", "missing"])
def test_damaged_files_are_refused(tmp_path, harm):
    file, width, units = tmp_path / "000.safetensors", D, UNITS
    saved(file)
    if harm == "missing":
        arrays = mx.load(str(file))
        mx.save_safetensors(str(file), {k: v for k, v in arrays.items() if k != "up"})
    elif harm in ("cut", "empty", "words"):
        file.write_bytes({"cut": file.read_bytes()[:-9], "empty": b"", "words": b"nonsense" * 20}[harm])
    else:
        width, units = (D + 32, UNITS) if harm == "width" else (D, UNITS + 1)
    with pytest.raises(BundleError, match="calibrate again"):
        read_look_ahead(file, width, units)


def test_a_layer_without_its_file_is_refused(library):
    path = library.calibrated(Shape(layers=4))
    kept = Bundle.open(path).predictor_files("look-ahead")
    assert len(kept) == 3
    with pytest.raises(BundleError, match="0 look-ahead files for 2 layers"):
        load_bundle(library.bundle(), memory="8MB", predictor="oracle", look_ahead=True)


def test_calibration_tells_how_well_it_does(library):
    said = Bundle.open(library.calibrated()).manifest.calibration["look-ahead"]
    assert 0 < said["recall"] <= 1
    assert len(said["layers"]) == Shape().layers - 1


def test_units_named_early_are_read_early(library):
    """The same tokens come out, and the layer before has asked for some of what is missing: `add` only corrects."""
    path = library.calibrated()
    tokens = np.random.default_rng(1).integers(3, Shape().vocab, 40)
    losses, early, corrections = [], [0, 0], [0, 0]
    for look_ahead in (False, True):
        with load(path, "parts-alias", "part", look_ahead=look_ahead) as model:
            window = model.flash.layers[1].window
            add = window.add

            def counted(ticket, ids, add=add, window=window, at=int(look_ahead)):
                corrections[at] += 1
                early[at] += sum(len(slots) for slots in ticket.slots)
                add(ticket, ids)

            window.add = counted
            losses.append(list(decode_losses(model, tokens)))
    assert np.allclose(*losses, rtol=1e-4)
    assert corrections == [0, len(tokens) - 1]
    assert early[0] == 0 < early[1]
