"""Predictors of others: the ReLU between their two products is computed, and what does not fit is refused by name."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from build import BACKENDS, Shape, load
from mlxflash.backends import FFN
from mlxflash.bundle import Bundle, BundleError
from mlxflash.calibrate import calibrate
from mlxflash.fidelity import cuts_file
from mlxflash.imported import import_predictor
from mlxflash.order import reorder
from mlxflash.predictor import load_low_rank
from reference import write_safetensors
from torch_file import write_bin

TOKENS = np.random.default_rng(5).integers(3, 300, 96)
D, UNITS = 64, 256
WRITERS = {"pt": write_bin, "safetensors": write_safetensors}


def network(seed, rank=48, width=D, units=UNITS, biases=True):
    rng = np.random.default_rng(seed)
    made = {
        "fc1.weight": rng.normal(size=(rank, width)) / 8,
        "fc2.weight": rng.normal(size=(units, rank)) / 4,
    }
    if biases:
        made |= {"fc1.bias": rng.normal(size=rank), "fc2.bias": rng.normal(size=units)}
    return {name: array.astype(np.float32) for name, array in made.items()}


def write_folder(path, networks, kind="pt", dtype="float32", prefix=""):
    path.mkdir()
    for i, made in enumerate(networks):
        WRITERS[kind](path / f"model_{i}.{kind}", {prefix + k: v for k, v in made.items()}, dtype)
    return path


def log_odds(x, made):
    """As its author computes it."""
    hidden = np.maximum(x @ made["fc1.weight"].T + made.get("fc1.bias", 0), 0)
    return hidden @ made["fc2.weight"].T + made.get("fc2.bias", 0)


@pytest.fixture
def ours(library, tmp_path):
    return Bundle.open(shutil.copytree(library.bundle(), tmp_path / "ours.flash"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biases", [True, False])
def test_its_answer_is_its_author_s(ours, tmp_path, biases, backend):
    networks = [network(i, rank=32 if biases else 50, biases=biases) for i in range(2)]
    bundle = import_predictor(ours, write_folder(tmp_path / "ready", networks))
    x = np.random.default_rng(9).normal(size=(40, D)).astype(np.float32)
    for made, file, layer in zip(networks, bundle.predictor_files("low-rank"), bundle.manifest.layers, strict=True):
        predictor = load_low_rank(file, BACKENDS[backend](), FFN.of(bundle.manifest), layer, 0.75)
        want = log_odds(x, made)
        near = np.abs(want) < 0.06 * want.std()  # factors are kept in 8 bits
        assert near.mean() < 0.1
        for token, row in enumerate(want):
            flagged = np.zeros(UNITS, bool)
            flagged[predictor.start(mx.array(x[token : token + 1]))()] = True
            assert (flagged == (row > 0))[~near[token]].all()
        cut = np.abs(x @ made["fc1.weight"].T).mean()  # without the ReLU it would answer otherwise
        assert cut > 0
        linear = (x @ made["fc1.weight"].T + made.get("fc1.bias", 0)) @ made["fc2.weight"].T + made.get("fc2.bias", 0)
        assert ((linear > 0) != (want > 0)).mean() > 0.1


@pytest.mark.parametrize(("kind", "dtype", "prefix"), [("pt", "float16", ""), ("safetensors", "bfloat16", "module.")])
def test_it_is_calibrated_and_runs(ours, tmp_path, kind, dtype, prefix):
    folder = write_folder(tmp_path / "ready", [network(i) for i in range(2)], kind, dtype, prefix)
    bundle = calibrate(import_predictor(ours, folder), TOKENS, predictor="low-rank", levels=False)
    said = bundle.manifest.calibration["low-rank"]
    assert 0.2 < said["flagged"] < 0.8  # it is a random one
    with load(bundle.path, "native", "part", "low-rank") as model:
        assert model.flash.mode.startswith("approximate (recall ")
        assert np.isfinite(np.array(model(mx.array([[2, 5, 7]])))).all()


def test_what_was_measured_of_another_predictor_is_forgotten(ours, tmp_path):
    folder = write_folder(tmp_path / "ready", [network(i) for i in range(2)])
    other = write_folder(tmp_path / "other", [network(i, rank=64) for i in range(2, 4)])
    bundle = calibrate(import_predictor(ours, folder), TOKENS, predictor="low-rank")
    assert bundle.manifest.calibration["fidelity"].keys() == {"low-rank"}
    before = [f.read_bytes() for f in bundle.predictor_files("low-rank")]
    bundle = import_predictor(bundle, other)
    assert [f.read_bytes() for f in bundle.predictor_files("low-rank")] != before
    assert bundle.manifest.calibration.get("fidelity") == {}
    assert "low-rank" not in bundle.manifest.calibration
    assert not cuts_file(bundle.path, "low-rank").exists()
    with load(bundle.path, predictor="low-rank") as model:
        assert model.flash.mode == "approximate (not measured)"


def wrong(name, array):
    return lambda networks: networks[1].update({name: array})


HARM = {
    "a layer less": (lambda n: n.pop(), "predictors of 1 layers, .* has 2"),
    "a layer more": (lambda n: n.append(network(7)), "predictors of 3 layers, .* has 2"),
    "another width": (
        lambda n: n.__setitem__(1, network(1, width=96)),
        r"fc1.weight is \[48, 96\], \[48, 64\] would fit",
    ),
    "other units": (lambda n: n.__setitem__(1, network(1, units=128)), r"fc2.weight is \[128, 48\], \[256, 48\] would"),
    "ranks that differ": (
        wrong("fc2.weight", np.zeros((UNITS, 32), np.float32)),
        r"\[256, 32\], \[256, 48\] would fit",
    ),
    "a short bias": (wrong("fc1.bias", np.zeros(3, np.float32)), r"fc1.bias is \[3\], \[48\] would fit"),
    "a vector": (wrong("fc1.weight", np.zeros(48, np.float32)), r"fc1.weight is \[48\], \[48, 64\] would fit"),
    "no number": (wrong("fc2.bias", np.full(UNITS, np.nan, np.float32)), "fc2.bias has values that are no numbers"),
    "nothing of it": (lambda n: n.__setitem__(1, {"w": np.zeros(3, np.float32)}), "has w; fc1.weight and fc2.weight"),
    "half of it": (lambda n: n[1].pop("fc2.weight"), "fc1.weight and fc2.weight are wanted"),
    "a third layer": (wrong("fc3.weight", np.zeros((2, 2), np.float32)), "fc1.weight and fc2.weight are wanted"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_does_not_fit_is_refused_and_changes_nothing(ours, tmp_path, harm):
    networks = [network(i) for i in range(2)]
    change, said = HARM[harm]
    change(networks)
    folder = write_folder(tmp_path / "ready", networks)
    before = sorted(p for p in ours.path.rglob("*"))
    with pytest.raises(BundleError, match=said) as refusal:
        import_predictor(ours, folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert sorted(p for p in ours.path.rglob("*")) == before


def test_folders_that_are_no_predictors_are_refused(ours, tmp_path):
    with pytest.raises(BundleError, match="no such directory"):
        import_predictor(ours, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    folder = write_folder(tmp_path / "ready", [network(i) for i in range(2)])
    for path in (tmp_path / "empty", folder):
        (folder / "model_0.pt").unlink(missing_ok=True)
        with pytest.raises(BundleError, match=r"a file for each layer is wanted, model_0\.pt"):
            import_predictor(ours, path)
    (folder / "model_0.pt").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(BundleError, match=r"model_0\.pt: cannot be read"):
        import_predictor(ours, folder)
    shutil.copy(folder / "model_1.pt", folder / "other-1.pt")
    with pytest.raises(BundleError, match="are both of layer 1"):
        import_predictor(ours, folder)


def test_units_in_another_order_or_width_are_refused(library, ours, tmp_path):
    folder = write_folder(tmp_path / "ready", [network(i) for i in range(2)])
    made, _ = reorder(ours, tmp_path / "made.flash", TOKENS)
    with pytest.raises(BundleError, match="import before `mlxflash reorder`"):
        import_predictor(made, folder)
    with pytest.raises(BundleError, match="width 48"):
        import_predictor(Bundle.open(library.bundle(Shape(d_model=48))), folder)


def test_imported_first_it_moves_with_its_units(ours, tmp_path):
    networks = [network(i) for i in range(2)]
    bundle = import_predictor(ours, write_folder(tmp_path / "ready", networks))
    made, _ = reorder(bundle, tmp_path / "made.flash", TOKENS)
    x, counts = mx.array(np.random.default_rng(9).normal(size=(1, D)).astype(np.float32)), []
    for b in (bundle, made):
        layer, file = b.manifest.layers[0], b.predictor_files("low-rank")[0]
        predictor = load_low_rank(file, BACKENDS["native"](), FFN.of(b.manifest), layer, 0)
        counts.append(len(predictor.start(x)()))
    assert counts[0] == counts[1] > 0


def test_a_damaged_hidden_bias_is_refused(ours, tmp_path):
    bundle = import_predictor(ours, write_folder(tmp_path / "ready", [network(i) for i in range(2)]))
    file = bundle.predictor_files("low-rank")[1]
    arrays, meta = mx.load(str(file), return_metadata=True)
    arrays["hidden"] = arrays["hidden"][:5]
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, meta)
    with pytest.raises(BundleError, match="made for another model"):
        load(bundle.path, predictor="low-rank")
    assert json.loads((bundle.path / "manifest.json").read_text())["order"] == "identity"
