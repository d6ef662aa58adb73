"""Laws of training, on tiny models and inputs made here.

On inputs of the same model that it has not seen, training makes a truncated SVD of the weights flag fewer units for the
same recall, and never makes the regression it starts from worse; both beat the SVD, and that beats chance. A run that
was killed and goes on makes the very files of one that was not. NumPy and MLX train alike. A damaged or foreign file is
refused by name.
"""

import json
import os
import shutil

import numpy as np
import pytest

from build import BACKENDS, Shape, load, prompt_of
from reference import read_safetensors, write_safetensors

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlxflash import train  # noqa: E402
from mlxflash.backends import Matrix, make_backend  # noqa: E402
from mlxflash.bundle import Bundle, BundleError  # noqa: E402
from mlxflash.commands.inspect import describe  # noqa: E402
from mlxflash.predictor import Projection, deciding, low_bit_matrix  # noqa: E402

LONG = [np.array(prompt_of(512, seed=i)) for i in range(24)]
FEW = [tokens[:64] for tokens in LONG[:9]]


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    """Batches that suit so little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "BATCH", 64)
        yield


@pytest.fixture
def ours(library, tmp_path):
    """A bundle of one's own."""
    return Bundle.open(shutil.copytree(library.bundle(), tmp_path / "ours.flash"))


@pytest.fixture(scope="module")
def made(library, tmp_path_factory):
    """A bundle with a trained predictor; not to be changed."""
    path = shutil.copytree(library.bundle(), tmp_path_factory.mktemp("made") / "made.flash")
    train.train(Bundle.open(path), FEW)
    return path


def recorded(bundle, folder):
    """Layer 0: training inputs, packed activity, held-out inputs, their activity; weights and bias."""
    folder.mkdir()
    train.record(bundle, LONG, folder, None, None, lambda what, done, total: None)
    x = np.fromfile(train.inputs_file(folder, 0), np.float16).reshape(-1, 64).astype(np.float32)
    _, weight, bias = deciding(bundle, 0)
    active = x @ weight.T + bias > 0
    return x[:-512], np.packbits(active[:-512], axis=1), x[-512:], active[-512:], weight, bias


def test_trained_beats_its_start_and_chance(ours, tmp_path):
    x, bits, held_out, active, weight, bias = recorded(ours, tmp_path / "inputs")
    seen = x[-512:], np.unpackbits(bits[-512:], axis=1).astype(bool)
    left, values, right = np.linalg.svd(weight)
    svd = train.Factors(right[:32], left[:, :32] * values[:32], bias)
    start = train.regression(x, weight, bias)(32)

    def flagged(factors):
        return train.flagged_at(0.96, factors(held_out), active)[0]

    def trained(factors):
        return flagged(train.fit(factors, x[:-512], bits[:-512], seen, np))

    chance = 0.96 / active.mean()
    assert trained(svd) < 0.97 * flagged(svd) < 0.97 * 0.9 * chance
    assert trained(start) < 1.005 * flagged(start)
    assert flagged(start) < 0.97 * flagged(svd)


def test_numpy_and_mlx_train_alike(ours, tmp_path):
    x, bits, held_out, active, weight, bias = recorded(ours, tmp_path / "inputs")
    start = train.regression(x, weight, bias)(32)
    by_numpy, by_mlx = (train.fit(start, x[:512], bits[:512], (held_out, active), xp) for xp in (np, mx))
    for a, b in zip(vars(by_numpy).values(), vars(by_mlx).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())


@pytest.mark.parametrize("rank", [20, 50, 110, 200])
def test_the_rank_is_as_large_as_the_layer_wants(rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 512)).astype(np.float32)
    weight = (rng.normal(size=(300, rank)) @ rng.normal(size=(rank, 512))).astype(np.float32)
    starts = train.regression(x, weight, np.full(300, -800, np.float32))
    chosen = train.choose_rank(starts, x, x @ weight.T > 800)
    assert chosen == min(128, 32 * -(-rank // 32))


class StoppedError(Exception):
    pass


def stopping(*places):
    """A progress that stops the run at the first visit of each place, (what, done)."""
    left = list(places)

    def progress(what, done, total):
        if left and (what, done) == left[0]:
            left.pop(0)
            raise StoppedError

    return progress


def test_a_killed_run_goes_on_to_the_same_files(ours, made):
    places = [("recording", 3), ("layer 0", 0), ("layer 0", 2), ("layer 1", 3), ("exact pass", 0)]
    progress = stopping(*places)
    for what in places:
        with pytest.raises(StoppedError):
            train.train(ours, FEW, progress=progress)
        if what[0] == "recording":  # killed while the files of a sequence were written
            with open(train.inputs_file(ours.path / "training", 0), "ab") as f:
                f.write(b"\1" * 1000)
        assert "low-rank" not in ours.predictors() or what[0] == "exact pass"
    for file in (made / "predictors/low-rank").iterdir():
        assert (ours.path / "predictors/low-rank" / file.name).read_bytes() == file.read_bytes()
    assert not (ours.path / "training").exists()


def test_another_text_starts_afresh(ours, made):
    with pytest.raises(StoppedError):
        train.train(ours, FEW[::-1], progress=stopping(("layer 1", 0)))
    with pytest.raises(StoppedError):
        train.train(ours, FEW, progress=stopping(("recording", 0)))
    assert not list((ours.path / "training").glob("inputs-*")) or not os.path.getsize(
        train.inputs_file(ours.path / "training", 0)
    )


def decode(model, tokens):
    cache = make_prompt_cache(model)
    return np.concatenate([np.array(model(mx.array([[t]]), cache=cache)[0].astype(mx.float32)) for t in tokens])


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_decodes_near_the_exact_model(made, backend):
    tokens = prompt_of(40, seed=99)
    with load(made, backend, "part", "all") as model:
        exact = decode(model, tokens)
    with load(made, backend, "part", "low-rank") as model:
        assert model.flash.mode.startswith("approximate (high")
        near = decode(model, tokens)
    with load(made, backend, "part", "low-rank", margin=1e9) as model:  # flags every unit
        assert model.flash.mode == "approximate (not measured)"
        np.testing.assert_allclose(decode(model, tokens), exact, atol=2e-5 * np.ptp(exact))
    assert 0 < np.abs(near - exact).max() < np.ptp(exact) / 2
    with load(made, backend, "whole", "low-rank") as model:
        assert model.flash.exact


@pytest.mark.parametrize("backend", BACKENDS)
def test_projecting_through_two_matrices(backend):
    backend, rng = BACKENDS[backend](), np.random.default_rng(0)
    inner, outer = (low_bit_matrix(mx.array(rng.normal(size=s).astype(np.float32)), 8) for s in ((32, 64), (100, 32)))
    x = rng.normal(size=(3, 64)).astype(np.float32)
    want = x @ train.floats(inner).T @ train.floats(outer).T
    np.testing.assert_allclose(backend.project(mx.array(x), inner, outer)(), want, atol=1e-4)
    ids = Projection(backend, (inner, outer), np.full(100, -20, np.float32)).start(mx.array(x))()
    np.testing.assert_array_equal(ids, np.flatnonzero((want > 20).any(axis=0)))


def test_info_tells_what_was_measured(made):
    said = Bundle.open(made).manifest.calibration["low-rank"]
    assert 0.9 < said["recall"] <= 1
    assert said["active"] < said["flagged"] < 1
    assert any(
        line.startswith("  predictor   low-rank, ") and "recall" in line
        for line in describe(Bundle.open(made)).splitlines()
    )


def rewritten(change):
    """Damage to a safetensors file's tensors, its metadata lost or kept."""

    def damage(file):
        arrays, meta = mx.load(str(file), return_metadata=True)
        arrays, meta = change(dict(arrays), dict(meta))
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, meta)

    return damage


DAMAGE = {
    "empty": lambda file: os.truncate(file, 0),
    "cut": lambda file: os.truncate(file, 5000),
    "garbage": lambda file: file.write_bytes(b"\7" * 9000),
    "no metadata": rewritten(lambda a, m: (a, {})),
    "no offset": rewritten(lambda a, m: ({k: v for k, v in a.items() if k != "offset"}, m)),
    "odd bits": rewritten(lambda a, m: (a, m | {"inner.bits": "eight"})),
    "seven bits": rewritten(lambda a, m: (a, m | {"outer.bits": "7"})),
    "no group": rewritten(lambda a, m: (a, m | {"outer.group_size": "0"})),
    "half a matrix": rewritten(lambda a, m: (a | {"outer.weight": a["outer.weight"][:100]}, m)),
    "flat": rewritten(lambda a, m: (a | {"inner.weight": a["inner.weight"].reshape(-1)}, m)),
    "a scalar": rewritten(lambda a, m: (a | {"inner.weight": mx.array(1)}, m)),
    "floats for words": rewritten(lambda a, m: (a | {"inner.weight": a["inner.weight"].view(mx.float32)}, m)),
    "few offsets": rewritten(lambda a, m: (a | {"offset": a["offset"][:7]}, m)),
    "another model's": rewritten(
        lambda a, m: (a | {"inner.weight": a["inner.weight"][:, :8]}, m)
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(made, tmp_path, damage):
    path = shutil.copytree(made, tmp_path / "copy.flash")
    file = path / "predictors/low-rank/001.safetensors"
    DAMAGE[damage](file)
    with pytest.raises(BundleError, match=str(file)) as refusal:
        load(path, predictor="low-rank")
    assert "train again" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    load(path, predictor="low-bit").close()
    file.unlink()
    with pytest.raises(BundleError, match="1 predictor files for 2 layers"):
        load(path, predictor="low-rank")


def test_damaged_figures_are_refused(made, tmp_path):
    path = shutil.copytree(made, tmp_path / "copy.flash")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["calibration"]["low-rank"]["recall"] = None
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="calibrate again"):
        Bundle.open(path)


def test_without_a_trained_predictor_the_remedy_is_named(library):
    with pytest.raises(BundleError, match=r"no low-rank predictor; `mlxflash train` makes one"):
        load(library.bundle(), predictor="low-rank")


def test_an_input_that_is_not_a_number_names_its_layer(ours):
    file = next(ours.path.glob("resident*"))
    tensors = read_safetensors(file)
    name = next(n for n in tensors if "layers.1" in n and "final_layer_norm.weight" in n)
    tensors[name] = np.full_like(tensors[name], np.nan)
    write_safetensors(file, tensors, "float32")
    with pytest.raises(ValueError, match="layer 1 is given NaN"):
        train.train(ours, FEW)


def test_an_odd_width_is_refused(library):
    with pytest.raises(ValueError, match="width 48"):
        train.train(Bundle.open(library.bundle(Shape(d_model=48))), FEW)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_little_text_is_refused(ours, count):
    with pytest.raises(ValueError, match="too few"):
        train.train(ours, FEW[:count])
    assert not (ours.path / "training").exists()


def test_stretches_come_from_all_over_a_text():
    text = "".join(map(chr, range(1, 100_000)))
    found = train.stretches(text, lambda text: [ord(c) for c in text], 2000, 100)
    assert len(found) == 21
    assert {len(s) for s in found} == {100}
    assert [s[0] for s in found[:3]] == [2, 4941, 9881]
    short = train.stretches("abcdefghij" * 20, lambda text: [ord(c) for c in text], 2000, 100)
    assert "".join(map(chr, np.concatenate(short))) == "abcdefghij" * 20
    with pytest.raises(ValueError, match="9 tokens is too short"):
        train.stretches("a" * 9, lambda text: [ord(c) for c in text], 2000, 100)


def test_a_device_that_is_asked_for_trains(ours):
    assert make_backend("mlx-cpu").name == "mlx-cpu"
    bundle = train.train(ours, FEW, device="mlx-cpu")
    assert bundle.manifest.calibration["low-rank"]["recall"] > 0.85


def test_a_matrix_of_floats_has_its_values():
    weight = mx.array(np.arange(12, dtype=np.float16).reshape(3, 4))
    np.testing.assert_array_equal(train.floats(Matrix(weight)), np.arange(12).reshape(3, 4))
