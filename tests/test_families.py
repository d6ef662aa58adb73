"""Every family computes what transformers' own class computes, streamed; and what mlx-lm's computes, where it has it.

Goldens are transformers' in float64 (`golden/make_families.py`). Every row of the family table has one: adding a row
adds its tests.
"""

import numpy as np
import pytest

import families
from build import load
from families import CASES, golden
from test_exactness import STORED, TOLERANCE, assert_same_logits

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from mlxflash.converters import convert  # noqa: E402

from mlxflash.bundle import Bundle  # noqa: E402
from mlxflash.models import FAMILIES  # noqa: E402


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
    assert set(FAMILIES) - {"opt"} == {golden(case)["config"]["model_type"] for case in CASES}  # OPT: test_exactness


@pytest.mark.parametrize("backend", ["native", "parts-alias", "records-copy"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_logits_and_tokens(made, case, backend):
    want = golden(case)
    sparse = Bundle.open(made(case)).manifest.sparse
    with load(made(case), backend, "least", "oracle" if sparse else None) as model:
        assert not model.flash.plan.whole
        assert model.flash.mode == ("exact (oracle)" if sparse else "exact (streaming)")
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
    "minicpm": "SiLU whatever hidden_act says; logits of a tied head are not scaled",
    "gemma": "GELU without the tanh",
    "gpt_neox": "GELU with the tanh",
    "starcoder2": "GELU without the tanh",
    "gpt2": "knows no names that begin with transformer",
    "phi": "32 key-value heads where config.json names none",
}
LACKING = ("falcon", "persimmon", "sparsellama", "bamboo")


@pytest.mark.parametrize("case", [c for c in CASES if golden(c)["config"]["model_type"] not in LACKING])
def test_mlx_lm_says_the_same_or_we_say_why(made, case, tmp_path):
    families.write_case(tmp_path / "checkpoint", case)
    tokens = golden(case)["tokens"].tolist()
    try:
        model, _ = load_model(tmp_path / "checkpoint", strict=False)
        theirs = np.array(model(mx.array([tokens]))[0].astype(mx.float32))
    except ValueError:
        theirs = np.nan
    with load(made(case), "native", "least", None) as model:
        ours, _ = decode(model, tokens) if model.flash.exact else (golden(case)["logits"], None)
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(ours).max()) == (case not in OTHERWISE)
