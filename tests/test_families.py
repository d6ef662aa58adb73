"""Every family computes what transformers' own class computes, streamed; and what mlx-lm's computes, where it has it.

Goldens are transformers' in float64 (`golden/make_families.py`). Every row of the family table has one: adding a row
adds its tests.
"""

import numpy as np
import pytest

import families
from build import load
from families import CASES, golden

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlxflash.converters import convert  # noqa: E402

from mlxflash.bundle import Bundle  # noqa: E402
from mlxflash.models import FAMILIES  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case to its float32 bundle."""
    bundles = {}

    def bundle(case):
        if case not in bundles:
            folder = tmp_path_factory.mktemp(case)
            families.write_case(folder / "checkpoint", case)
            bundles[case] = convert(folder / "checkpoint", folder / "made.flash").path
        return bundles[case]

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
    dense = {name for name, family in FAMILIES.items() if family.layout != "experts"}  # those: test_experts
    assert dense - {"opt"} == {golden(case)["config"]["model_type"] for case in CASES}  # OPT: test_exactness


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
