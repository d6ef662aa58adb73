"""Every family computes what transformers' own class computes, streamed; and what mlx-lm's computes, where it has it.

Goldens are transformers' in float64 (`golden/make_families.py`). Every row of the family table has one: adding a row
adds its tests.
"""

import json
import shutil

import numpy as np
import pytest

import families
from build import TEXT, load, write_tokenizer
from families import CASES, golden
from reference import write_safetensors
from test_exactness import STORED, TOLERANCE, assert_same_logits

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from mlxflash.converters import convert  # noqa: E402

from mlxflash.api import load_tokenizer  # noqa: E402
from mlxflash.bundle import Bundle  # noqa: E402
from mlxflash.calibrate import calibrate, record_inputs  # noqa: E402
from mlxflash.decode import stream_generate  # noqa: E402
from mlxflash.evaluate import Dense, evaluate  # noqa: E402
from mlxflash.models import FAMILIES, build_model, max_positions  # noqa: E402
from mlxflash.order import reorder  # noqa: E402
from mlxflash.thinning import Thin  # noqa: E402
from mlxflash.train import train  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case to its bundle."""
    bundles = {}

    def bundle(case, dtype="float32", bits=None):
        if (case, dtype, bits) not in bundles:
            folder = tmp_path_factory.mktemp(case)
            families.write_case(folder / "checkpoint", case, dtype)
            made = convert(folder / "checkpoint", folder / "made.flash", bits=bits, group_size=32)
            bundles[case, dtype, bits] = made.path
        return bundles[case, dtype, bits]

    return bundle


def decode(model, tokens, count=0):
    """Logits [n, vocabulary] of `tokens`, one per pass, and of the `count` likeliest that follow; those tokens."""
    cache, logits, said = make_prompt_cache(model), [], list(map(int, tokens))
    for i in range(len(tokens) + max(count - 1, 0)):
        logits.append(np.array(model(mx.array([[said[i]]]), cache=cache)[0, -1].astype(mx.float32)))
        if count and len(said) == i + 1:
            said.append(int(logits[-1].argmax()))
    return np.array(logits), said[len(tokens) :]


def test_every_row_of_the_table_has_a_golden():
    dense = {name for name, f in FAMILIES.items() if f.layout != "experts" or f.dense}  # experts: test_experts
    assert dense - {"opt"} == {golden(case)["config"]["model_type"] for case in CASES}  # OPT: test_exactness


@pytest.mark.parametrize("backend", ["native", "parts-alias", "records-copy"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_logits_and_tokens(made, case, backend):
    want = golden(case)
    manifest = Bundle.open(made(case)).manifest
    how = "oracle" if manifest.sparse else "router" if manifest.routed else "streaming"
    with load(made(case), backend, "least", "oracle" if manifest.sparse else None) as model:
        assert not model.flash.plan.whole
        assert model.flash.mode == f"exact ({how})"
        logits, said = decode(model, want["tokens"], len(want["greedy"]))
        assert model.flash.snapshot().num_bytes > 0
    assert said == want["greedy"].tolist()
    scale = np.abs(want["logits"]).max()
    np.testing.assert_allclose(logits[: len(want["logits"])], want["logits"], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(("backend", "budget"), [("native", "least"), ("parts-alias", "part")])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", CASES)
def test_streamed_equals_dense(made, case, stored, backend, budget):
    """The exactness law for every row of the table: one token per pass, on the weights as they are stored."""
    path = made(case, *STORED[stored])
    sparse = Bundle.open(path).manifest.sparse
    tokens = golden(case)["tokens"].tolist()
    want = np.array(families.dense_model(path)(mx.array([tokens]))[0].astype(mx.float32))
    with load(path, backend, budget, "oracle" if sparse else None) as model:
        assert not model.flash.plan.whole
        got, _ = decode(model, tokens)
        dtype = model.flash.backend.activation_dtype(model.flash.bundle.manifest)
    if dtype == mx.float32:
        assert_same_logits(got, want, TOLERANCE[dtype])
    else:  # deeper into rounding than OPT's: some multiply embeddings or scores
        assert (np.abs(got - want).max(axis=-1) <= 2 * TOLERANCE[dtype] * np.ptp(want, axis=-1)).all()


OTHERWISE = {  # what mlx-lm computes otherwise than transformers: why
    "llama-relu": "SiLU whatever hidden_act says",
    "llama-biased": "SiLU whatever hidden_act says",
    "llama-fatrelu": "SiLU whatever hidden_act says",
    "llama-rope": "reads no rope_parameters",
    "llama-yarn": "YaRN knows neither truncate nor attention_factor",
    "phi3-longrope": "LongRoPE by its long factors at every length",
    "minicpm-longrope": "LongRoPE by its long factors at every length",
    "minicpm": "SiLU whatever hidden_act says; logits of a tied head are not scaled",
    "gemma": "GELU without the tanh",
    "glm": "turns whole heads by position",
    "gpt_neox": "GELU with the tanh",
    "starcoder2": "GELU without the tanh",
    "gpt2": "knows no names that begin with transformer",
    "phi": "32 key-value heads where config.json names none",
}
LACKING = ("gemma3n_text", "falcon", "persimmon", "sparsellama", "bamboo", "arcee")


@pytest.mark.parametrize("case", [c for c in CASES if golden(c)["config"]["model_type"] not in LACKING])
def test_mlx_lm_says_the_same_or_we_say_why(made, case, tmp_path):
    families.write_case(tmp_path / "checkpoint", case)
    tokens = golden(case)["tokens"].tolist()
    try:
        model, _ = load_model(tmp_path / "checkpoint", strict=False)
        theirs = np.array(model(mx.array([tokens]), cache=make_prompt_cache(model))[0].astype(mx.float32))
    except ValueError:
        theirs = np.nan
    with load(made(case), "native", "least", None) as model:
        ours, _ = decode(model, tokens) if model.flash.exact else (golden(case)["logits"], None)
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(ours).max()) == (case not in OTHERWISE)


def edited(tmp_path, case, edit=lambda config: None, weights=lambda w: w):
    families.write_case(tmp_path / "c", case)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    edit(config)
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "c" / "model.safetensors", weights(families.weights_of(case)), "float32")
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("kind", "case", "prefix"),
    [
        ("gemma3", "gemma3_text", "language_model."),
        ("gemma3", "gemma3_text-linear", "model.language_"),
        ("gemma3n", "gemma3n", "model.language_"),
        ("mistral3", "mistral", "language_model."),
    ],
)
def test_the_text_of_what_sees_and_hears(tmp_path, kind, case, prefix):
    def nested(config):
        text = dict(config)
        config.clear()
        config.update(model_type=kind, text_config=text, vision_config={"hidden_size": 8}, eos_token_id=2)

    def beside(weights):
        eye = {"vision_tower.x.weight": np.ones((2, 2), np.float32)}
        old = {f"{prefix}{name}": array for name, array in weights.items() if not name.startswith("lm_head")}
        head = {f"language_model.{name}": array for name, array in weights.items() if name.startswith("lm_head")}
        return old | head | (eye if prefix == "language_model." else {f"model.{k}": v for k, v in eye.items()})

    bundle = convert(edited(tmp_path, case, nested, beside), tmp_path / "m.flash")
    assert bundle.config()["eos_token_id"] == 2
    want = golden(case)
    with load(bundle.path, "native", "least", None) as model:
        logits, _ = decode(model, want["tokens"])
    np.testing.assert_allclose(logits, want["logits"], rtol=1e-4, atol=1e-4 * np.abs(want["logits"]).max())


GATE = "model.layers.1.mlp.gate_proj.weight"
BAD = {
    "unknown family": (lambda c: c.update(model_type="rwkv7"), None, "model_type 'rwkv7' is not supported; supp"),
    "no family of ours": (lambda c: c.update(model_type="bitnet"), None, "model_type 'bitnet' .*: it rounds a token's"),
    "no activation": (lambda c: c.update(hidden_act=7), None, "hidden_act 7 is not supported for llama"),
    "unknown activation": (lambda c: c.update(hidden_act="mish"), None, "hidden_act 'mish' is not supported for llama"),
    "no threshold": (
        lambda c: c.update(hidden_act="fatrelu", hidden_act_param="x"), None, "hidden_act_param 'x' .* no threshold"
    ),
    "unknown positions": (
        lambda c: c.update(rope_scaling={"type": "ntk", "factor": 2.0}), None, "rope_scaling 'ntk' .* not supported"
    ),
    "no factor": (
        lambda c: c.update(rope_scaling={"type": "yarn", "factor": "x"}), None, "factor 'x' of rope_scaling .* no pos"
    ),
    "no attention factor": (
        lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": "x"}),
        None,
        "attention_factor 'x' of rope_scaling .* no positive number",
    ),
    "no heads": (lambda c: c.update(num_key_value_heads=-1), None, "num_key_value_heads in config.json is -1"),
    "missing": (None, lambda w: {k: v for k, v in w.items() if k != GATE}, f"tensor '{GATE}' is missing"),
    "extra": (None, lambda w: w | {GATE + "x": w[GATE]}, f"tensor '{GATE}x' has no place in a llama model"),
    "biases": (None, lambda w: w | {GATE[:-6] + "bias": w[GATE][:, 0]}, "gate_proj.bias' has no place in a llama"),
    "misshapen": (None, lambda w: w | {GATE: w[GATE].T.copy()}, r"shape \[64, 96\], its config wants \[96, 64\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_checkpoint_that_cannot_be_computed_is_refused(tmp_path, what):
    edit, weights, said = BAD[what]
    source = edited(tmp_path, "llama", edit or (lambda config: None), weights or (lambda w: w))
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "made.flash")
    assert not (tmp_path / "made.flash").exists()


def test_positions_that_would_be_computed_otherwise_are_refused():
    """Scaled where the class does not scale; LongRoPE beyond its original length, where all tokens would turn anew."""
    with pytest.raises(ValueError, match=r"its class ignores rope_scaling 'linear'"):
        build_model(golden("stablelm")["config"] | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "here")
    two = {"full_attention": {"rope_theta": 500000.0}, "sliding_attention": {"rope_theta": 10000.0}}
    with pytest.raises(ValueError, match="its class knows one rope_theta for all layers"):
        build_model(golden("olmo3")["config"] | {"rope_parameters": two, "rope_scaling": None}, "here")
    with pytest.raises(ValueError, match="its class ignores partial_rotary_factor"):
        build_model(golden("llama")["config"] | {"partial_rotary_factor": 0.5}, "here")
    config = golden("phi3-longrope")["config"]
    assert max_positions(config) == config["original_max_position_embeddings"] < config["max_position_embeddings"]
    sliding = {"layer_types": ["full_attention"] * 3}
    with pytest.raises(ValueError, match="layer_types are not those of sliding_window_pattern 'LG'"):
        build_model(golden("exaone4")["config"] | sliding, "here")
    short = {"rope_scaling": config["rope_scaling"] | {"short_factor": [1.0]}}
    with pytest.raises(ValueError, match="short_factor of rope_scaling has 1 numbers, not 6"):
        build_model(config | short, "here")


def test_a_bundle_whose_config_names_another_activation_is_refused(made, tmp_path):
    path = shutil.copytree(made("llama-fatrelu"), tmp_path / "made.flash")
    config = json.loads((path / "config.json").read_text())
    for change in ({"hidden_act_param": 0.2}, {"hidden_act": "relu"}, {"hidden_act": "silu"}):
        (path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"config\.json says otherwise"):
            load(path, "native", "least", None)


@pytest.mark.parametrize("predictor", ["oracle", "low-bit", "low-rank", "bound"])
def test_what_is_never_zero_is_never_left_out(made, predictor):
    with pytest.raises(ValueError, match="silu units are never zero, so none can be left out; it runs exactly"):
        load(made("llama"), "native", "least", predictor)
    for measure in (calibrate, train):
        with pytest.raises(ValueError, match="silu units are never zero"):
            measure(Bundle.open(made("llama")), [np.arange(40)] * 8)
    assert Bundle.open(made("llama")).predictors() == []
    assert Bundle.open(made("llama-relu")).predictors() == ["low-bit"]


@pytest.mark.parametrize("backend", ["native", "parts-alias", "records-copy", "discrete"])
@pytest.mark.parametrize("budget", ["least", "part", "room", "whole"])
def test_what_a_model_s_own_predictor_leaves_out_is_never_computed_nor_read(made, backend, budget):
    """Prompts in any pieces, through the window and in blocks: units held for other tokens do not count here."""
    path = made("turbosparse")
    tokens = np.random.default_rng(5).integers(3, 96, 120).tolist()
    want = np.array(families.dense_model(path)(mx.array([tokens]))[0])
    with load(path, backend, budget, None) as model:
        for pieces in ([120], [1, 2, 70, 1, 46], [64, 56]):
            model.flash.forget()
            cache, got, first = make_prompt_cache(model), [], 0
            for n in pieces:
                got.append(np.array(model(mx.array([tokens[first : first + n]]), cache=cache)[0]))
                first += n
            assert_same_logits(np.concatenate(got), want, TOLERANCE[mx.float32])
        if budget == "least":
            before = model.flash.snapshot().num_bytes
            decode(model, tokens[:16])
            read = (model.flash.snapshot().num_bytes - before) / 16
            assert 0 < read < 0.75 * Bundle.open(path).streamed_bytes()


@pytest.mark.parametrize("case", ["turbosparse", "gemma3n"])
def test_evaluation_of_what_streams_in_part(made, case):
    tokens = np.random.default_rng(5).integers(3, 96, 60)
    with load(made(case), "native", "least", None) as model:
        memory, units = model.flash.plan.memory, model.flash.plan.units
    with Dense(Bundle.open(made(case)), tokens, memory=memory, context=60) as dense:
        said = evaluate(dense)
    assert said.fidelity == "exact"
    assert abs(said.kl) < 1e-6
    assert said.recall == 1
    assert len(said.layers) == len(units)
    assert (said.flagged < 0.75) == (case == "turbosparse")


def test_a_predictor_that_is_the_model_s_own_stands_for_all_others(made):
    for predictor in ("oracle", "low-bit"):
        with pytest.raises(ValueError, match="the model's own predictor says which units a token needs; it is exact"):
            load(made("turbosparse"), "native", "least", predictor)
    for measure in (calibrate, train):
        with pytest.raises(ValueError, match="the model's own predictor says which units"):
            measure(Bundle.open(made("turbosparse")), [np.arange(40)] * 8)
    with pytest.raises(ValueError, match="the model's own predictor says which units"):  # whose rows it would permute
        reorder(Bundle.open(made("turbosparse")), made("turbosparse").with_name("other"), np.arange(40))
    assert Bundle.open(made("turbosparse")).predictors() == []


@pytest.mark.parametrize("case", ["llama-fatrelu", "bamboo"])
def test_thresholds_reach_the_predictor(made, case):
    """Calibrated, the low-bit predictor finds the active units of a threshold above zero."""
    bundle = Bundle.open(made(case))
    tokens = np.random.default_rng(3).integers(3, 96, 128)
    said = calibrate(bundle, tokens).manifest.calibration["low-bit"]
    with load(made(case), "native", "whole", None) as model:
        recorders = record_inputs(model)
        model(mx.array([tokens[64:].tolist()]))
        x = recorders[0].inputs()
    gate = families.weights_of(case)["model.layers.0.mlp.gate_proj.weight"]
    active = (x @ gate.T > bundle.manifest.threshold).mean()
    assert said["layers"][0]["active"] == pytest.approx(active, rel=0.2)
    assert said["recall"] > 0.85


def test_hybrids_are_measured_where_they_stream(made):
    """Nemotron-H: its MLPs are layers of their own between others."""
    bundle = Bundle.open(made("nemotron_h"))
    tokens = np.random.default_rng(3).integers(3, 96, 192)
    said = calibrate(bundle, tokens).manifest.calibration["low-bit"]
    assert len(said["layers"]) == 2
    with Dense(bundle, tokens[:64], context=32) as dense:
        report = evaluate(dense, margin=4.0)
    assert [layer.recall > 0.9 for layer in report.layers] == [True, True]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    families.write_case(tmp_path / "c", "llama")
    write_tokenizer(tmp_path / "c", 300)
    with pytest.raises(
        ValueError, match=r"vocabulary has 2\d\d tokens, the model's 96; one of them belongs to another"
    ):
        convert(tmp_path / "c", tmp_path / "made.flash")


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    families.write_case(tmp_path / "c", "llama-relu")
    (tmp_path / "text").write_text("\n".join(TEXT[0].split(", ") * 3))
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "c" / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    path = convert(tmp_path / "c", tmp_path / "made.flash").path
    tokenizer = load_tokenizer(path)
    want = SentencePieceProcessor(model_file=str(path / "tokenizer.model")).encode("it was the age of wisdom")
    assert tokenizer.encode("it was the age of wisdom")[-len(want) :] == want
    with load(path, "native", "least", "oracle") as model:
        said = [r.token for r in stream_generate(model, tokenizer, "it was the", 8)]
        assert len(said) == 8
        with pytest.raises(ValueError, match="token 96 of the prompt is outside the model's vocabulary of 96"):
            next(stream_generate(model, tokenizer, [1, 96], 8))


@pytest.mark.parametrize("backend", ["native", "parts-alias", "records-copy"])
def test_streams_that_run_on_into_the_next_layer(made, backend):
    """Every block is read once per token, whoever asked for it; what was asked for in vain harms nobody."""
    want = golden("mistral")
    with load(made("mistral"), backend, "part", None) as model:
        absent = sum(layer.units - layer.window.num_rows for layer in model.flash.layers)
        stride = model.flash.bundle.manifest.record.stride
        cache, read = make_prompt_cache(model), []
        for token in want["tokens"].tolist():
            before = model.flash.snapshot().num_bytes
            model(mx.array([[token]]), cache=cache)
            read.append(model.flash.snapshot().num_bytes - before)
        assert read[0] > read[1] == read[-1]  # the first token also asks for the second's first blocks
        assert absent * stride <= read[1] < 1.5 * absent * stride + 2 * 4096 * 8
        for _ in range(2):
            model.flash.forget()
            logits, _ = decode(model, want["tokens"])
            np.testing.assert_allclose(logits, want["logits"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["llama-relu", "llama-fatrelu", "bamboo", "nemotron_h"])
def test_thinned_by_nothing_the_units_are_all_there(made, case):
    """What levels of fidelity are measured with computes every kind of unit as decoding does."""
    bundle = Bundle.open(made(case))
    tokens = mx.array([np.random.default_rng(3).integers(3, 96, 24).tolist()])
    with load(made(case), "native", "whole", None) as model:
        want = np.array(model(tokens))
        ffn = "mixer" if case == "nemotron_h" else "mlp"
        for index, layer in enumerate(model.flash.owners):
            setattr(layer, ffn, Thin(bundle, index, model.flash.layers[index].down_bias, lambda r, x, a: a))
        np.testing.assert_allclose(np.array(model(tokens)), want, atol=1e-3 * np.ptp(want))
