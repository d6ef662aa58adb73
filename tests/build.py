"""Tiny OPT checkpoints with random weights, and bundles made of them: what the laws run on.

Weights are scaled so that about a fifth of the ReLU units fires, the feed-forward layers move the residual stream as
much as attention does, and the logits spread widely: a unit lost shows far above every tolerance.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reference import write_safetensors

BOS = 2  # OPT's </s>, begin and end of text


@dataclass(frozen=True)
class Shape:
    """A tiny OPT; `narrow` embeds in that width and projects in and out, as 350m does beside its post-norm."""

    layers: int = 2
    d_model: int = 64
    ffn: int = 256
    heads: int = 4
    vocab: int = 300
    positions: int = 512
    dtype: str = "float32"
    pre_norm: bool = True
    narrow: int | None = None
    tied: bool = True
    final_norm: bool = True
    shards: int = 1
    seed: int = 0

    def config(self):
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.layers,
            "ffn_dim": self.ffn,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions,
            "word_embed_proj_dim": self.narrow or self.d_model,
            "do_layer_norm_before": self.pre_norm,
            "_remove_final_layer_norm": not self.final_norm,
            "tie_word_embeddings": self.tied,
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "torch_dtype": self.dtype,
            "bos_token_id": BOS,
            "eos_token_id": BOS,
            "pad_token_id": 1,
            "dropout": 0.0,
        }


POST_NORM = Shape(pre_norm=False, narrow=32, seed=3)
UNTIED = Shape(layers=3, tied=False, shards=2, seed=4)


def random_weights(shape):
    """float32 weights under transformers' names; a function of `shape` alone."""
    rng = np.random.default_rng(shape.seed)
    d, embed = shape.d_model, shape.narrow or shape.d_model

    def normal(*size, scale=1.0):
        return (rng.standard_normal(size) * scale).astype(np.float32)

    def linear(name, rows, columns, scale, bias=0.0):
        weights[f"{name}.weight"] = normal(rows, columns, scale=scale / np.sqrt(columns))
        weights[f"{name}.bias"] = bias + normal(rows, scale=0.2)

    def norm(name):
        weights[f"{name}.weight"] = 1 + normal(d, scale=0.1)
        weights[f"{name}.bias"] = normal(d, scale=0.1)

    weights = {
        "model.decoder.embed_tokens.weight": normal(shape.vocab, embed, scale=4 / np.sqrt(embed)),
        "model.decoder.embed_positions.weight": normal(shape.positions + 2, d, scale=0.5),
    }
    if shape.narrow:
        weights["model.decoder.project_in.weight"] = normal(d, embed, scale=embed**-0.5)
        weights["model.decoder.project_out.weight"] = normal(embed, d, scale=d**-0.5)
    if shape.pre_norm and shape.final_norm:
        norm("model.decoder.final_layer_norm")
    for i in range(shape.layers):
        base = f"model.decoder.layers.{i}"
        for name, scale in (("q", 1.5), ("k", 1.5), ("v", 1.0), ("out", 1.0)):
            linear(f"{base}.self_attn.{name}_proj", d, d, scale)
        norm(f"{base}.self_attn_layer_norm")
        linear(f"{base}.fc1", shape.ffn, d, 1.0, bias=-0.9)
        linear(f"{base}.fc2", d, shape.ffn, 4.0)
        norm(f"{base}.final_layer_norm")
    if not shape.tied:
        weights["lm_head.weight"] = normal(shape.vocab, embed, scale=0.5)
    return weights


def write_checkpoint(path, shape):
    """A checkpoint directory as the Hub has them: config, tokenizer, safetensors, sharded where `shape` says so."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(shape.config()))
    weights = random_weights(shape)
    if shape.shards == 1:
        write_safetensors(path / "model.safetensors", weights, shape.dtype)
    else:
        where, names = {}, sorted(weights)
        for i in range(shape.shards):
            file = f"model-{i + 1:05d}-of-{shape.shards:05d}.safetensors"
            part = {name: weights[name] for name in names[i :: shape.shards]}
            write_safetensors(path / file, part, shape.dtype)
            where |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_tokenizer(path, shape.vocab)


TEXT = ["It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"]


def write_tokenizer(path, vocab):
    """A byte-level BPE of at most `vocab` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<s>", "<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


class Library:
    """Checkpoints and bundles of one test session, made once; tests that change one copy it first."""

    def __init__(self, root):
        self._root = root
        self._made = {}

    def checkpoint(self, shape=Shape()):
        return self._once(("checkpoint", *asdict(shape).values()), lambda path: write_checkpoint(path, shape))

    def bundle(self, shape=Shape(), bits=None, group_size=32):
        """`bits` quantises; the dtype is the shape's."""
        from mlxflash.converters import convert

        source = self.checkpoint(shape)
        key = ("bundle", *asdict(shape).values(), bits, group_size)
        return self._once(key, lambda path: convert(source, path, bits=bits, group_size=group_size))

    def calibrated(self, shape=Shape()):
        """The bundle, measured on random words."""
        from mlxflash.bundle import Bundle
        from mlxflash.calibrate import calibrate

        def make(path):
            shutil.copytree(self.bundle(shape), path)
            calibrate(Bundle.open(path), np.random.default_rng(0).integers(3, shape.vocab, 256))

        return self._once(("calibrated", *asdict(shape).values()), make)

    def _once(self, key, make):
        if key not in self._made:
            path = self._root / f"{key[0]}-{len(self._made)}"
            make(path)
            self._made[key] = path
        return self._made[key]


def prompt_of(length, shape=Shape(), seed=0):
    """A prompt that begins as OPT's do."""
    rng = np.random.default_rng(seed)
    return [BOS, *rng.integers(3, shape.vocab, length - 1).tolist()]


def _mlx(record_rows, alias):
    import mlx.core as mx
    import pytest

    from mlxflash.backends.metal import MLXBackend, views_alias

    if alias and not views_alias(mx.cpu):
        pytest.skip("MLX's memory cannot be written from the host here")
    return MLXBackend(mx.cpu, record_rows, alias)


def _native():
    import pytest

    from mlxflash._native import core

    if core is None:
        pytest.skip("the native module is not built")
    from mlxflash.backends.cpu import CPUBackend

    return CPUBackend()


def _discrete():
    from mlxflash.backends import make_backend

    return make_backend(os.environ.get("MLXFLASH_DISCRETE", "discrete"))  # gpu.sh says cuda


BACKENDS = {
    "native": _native,
    "parts-alias": lambda: _mlx(False, True),
    "parts-copy": lambda: _mlx(False, False),
    "records-alias": lambda: _mlx(True, True),
    "records-copy": lambda: _mlx(True, False),
    "discrete": _discrete,
}


def load(path, backend="parts-alias", budget="least", predictor="oracle", **settings):
    """A bundle's model at a budget: `least`, the smallest allowed; `part`, about 60 % of the units; `room`, slots for
    every unit, filled as tokens want them; `whole`, everything in memory before the first token.
    """
    from mlxflash.model import load_bundle
    from mlxflash.plan import BudgetError

    settings |= {"predictor": predictor, "backend": BACKENDS[backend]()}
    if budget == "whole":
        return load_bundle(path, **settings)
    try:
        load_bundle(path, memory=1, **settings).close()
    except BudgetError as error:
        memory = error.smallest
    model = load_bundle(path, memory=memory, **settings)
    share = {"least": 0, "part": 0.55, "room": 1}[budget]
    while sum(model.flash.plan.capacities) < share * sum(model.flash.plan.units):
        model.close()
        memory += 30_000
        model = load_bundle(path, memory=memory, **settings)
    return model
