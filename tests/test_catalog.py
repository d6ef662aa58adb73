"""Public models by name: the arithmetic of their sizes is the loader's."""

import json

import pytest

from mlxflash.catalog import ALIASES, KNOWN, STORY, Known
from mlxflash.hub import is_repo, weights_pattern
from mlxflash.plan import BudgetError

MILLIONS = {  # parameters, as model cards have them
    "opt-6.7b": 6658, "falcon-7b": 6922, "falcon-40b": 41303, "llama-2-7b": 6738, "llama-3.1-8b": 8030,
    "mistral-7b": 7242, "qwen2.5-7b": 7616, "qwen3-8b": 8191, "gemma-2b": 2506, "phi-2": 2780, "olmo-2-7b": 7299,
    "mixtral-8x7b": 46703, "qwen3-30b-a3b": 30532, "olmoe-1b-7b": 6919,
    "gpt2-xl": 1558, "nemotron-mini-4b": 4190, "relufalcon-40b": 41303, "prosparse-7b": 6738, "persimmon-8b": 9400,
    "turbosparse-7b": 7242, "afm-4.5b": 4620, "olmo-3-7b": 7300, "olmo-3-32b": 32230, "exaone-4-1.2b": 1280,
    "exaone-4-32b": 32000, "internlm3-8b": 8800, "hunyuan-7b": 7505, "command-r7b": 8028, "phi-3.5-mini": 3821,
    "phi-4-mini": 3836, "helium-1-2b": 2020,
    "gemma-3-4b": 3880, "gemma-3-12b": 11766, "gemma-3-27b": 27009, "mistral-small-24b": 23572,
    "ministral-3-8b": 8490,
 "mimo-7b": 7620,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters(name):
    assert sum(KNOWN[name].weights) / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)


def test_names_are_the_hubs():
    assert all(is_repo(repo) for repo in ALIASES.values())
    assert len(set(ALIASES.values())) == len(ALIASES)
    assert not any("/" in name for name in ALIASES)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_needed_grows_with_what_there_is(name):
    known = KNOWN[name]
    assert known.nbytes(4) < known.nbytes(8) < known.nbytes()
    assert known.smallest(4) < known.smallest()
    rest = "experts" if known.experts else "exact"
    assert known.kind == ("sparse" if known.activation in ("relu", "relu2", "fatrelu", "drelu") else rest)


def test_the_arithmetic_is_the_loaders():
    """On the embedded model: bytes, and the least budget that loads it."""
    pytest.importorskip("mlx.core")
    from mlxflash.backends import make_backend
    from mlxflash.bundle import Bundle
    from mlxflash.model import load_bundle

    if make_backend().name != "cpu":
        pytest.skip("the catalogue's numbers are a CPU's")
    bundle = Bundle.open(STORY)
    c = bundle.config()
    heads = c["num_attention_heads"]
    numbers = c["hidden_size"], c["ffn_dim"], heads, heads, c["vocab_size"], c["max_position_embeddings"]
    known = Known("story", "relu", False, bundle.num_layers, *numbers, tied=True)
    bits = bundle.manifest.quantization["bits"]
    assert known.nbytes(bits) == pytest.approx(bundle.streamed_bytes() + bundle.resident_bytes(), rel=0.05)
    with pytest.raises(BudgetError) as refused:
        load_bundle(STORY, memory=1, max_kv_size=known.positions)
    assert known.smallest(bits) == pytest.approx(refused.value.smallest, rel=0.05)


def test_the_arithmetic_of_mixtures(tmp_path):
    """Of a tiny one, converted here."""
    pytest.importorskip("mlx.core")
    from mlxflash.converters import convert

    import mixtures
    from mlxflash.backends import make_backend
    from mlxflash.model import load_bundle

    if make_backend().name != "cpu":
        pytest.skip("the catalogue's numbers are a CPU's")
    mixtures.write(tmp_path / "m", "qwen3_moe", "mlx", "float16")
    bundle, c = convert(tmp_path / "m", tmp_path / "m.flash"), mixtures.config_of("qwen3_moe")
    known = Known(
        "tiny", "silu", True, 3, 64, 96, 4, 2, 300, c["max_position_embeddings"], False, 16, experts=16, chosen=4
    )
    assert known.nbytes() == pytest.approx(bundle.streamed_bytes() + bundle.resident_bytes(), rel=0.05)
    with pytest.raises(BudgetError) as refused:
        load_bundle(bundle.path, memory=1)
    assert known.smallest() == pytest.approx(refused.value.smallest, rel=0.05)


@pytest.mark.parametrize(("name", "good"), [
    ("a/b", True), ("a-b/c.d", True), ("a/b@main", True), ("a/b@refs/pr/1", True), ("a", False), ("a/b/c", False),
    ("a/b@", False), ("../a/b", False),
])  # fmt: skip
def test_hub_names(name, good):
    assert is_repo(name) == good


def test_safetensors_come_before_pytorchs_files():
    assert weights_pattern(["a.json", "model.safetensors", "pytorch_model.bin"]) == "*.safetensors"
    assert weights_pattern(["a.json", "pytorch_model.bin", "onnx/model.safetensors"]) == "pytorch_model*.bin"


def test_models_lists_them(capsys):
    from mlxflash.cli import main

    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KNOWN) + 3
    assert any(line.startswith("falcon-7b ") and "exact" in line and "tiiuae/falcon-7b" in line for line in lines)
    main(["models", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["opt-6.7b"]["kind"] == "sparse"
    assert facts["opt-6.7b"]["smallest_memory"]["q4"] == KNOWN["opt-6.7b"].smallest(4)
