"""Writes opt.npz: the logits of transformers' OPT for tiny models whose weights follow from a seed.

    python -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    venv/bin/python tests/golden/make_opt.py

Neither is a dependency of the tests: what they said is kept. The file holds no weights; sums of them tell whether
NumPy still draws the same numbers.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from build import POST_NORM, UNTIED, Shape, prompt_of, random_weights

SHAPES = {
    "pre-norm": Shape(),
    "post-norm": POST_NORM,
    "untied": UNTIED,
    "no-final-norm": Shape(final_norm=False, seed=5),
}
TOKENS = 24


def logits(shape, tokens):
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(**shape.config(), attn_implementation="eager")).double().eval()
    weights = {name: torch.from_numpy(array).double() for name, array in random_weights(shape).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert missing == (["lm_head.weight"] if shape.tied else []), missing
    if shape.tied:
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def main():
    arrays = {}
    for name, shape in SHAPES.items():
        tokens = prompt_of(TOKENS, shape, seed=1)
        arrays[f"{name}/shape"] = np.array(json.dumps(asdict(shape)))
        arrays[f"{name}/tokens"] = np.array(tokens)
        arrays[f"{name}/sums"] = np.array([array.sum(dtype=np.float64) for array in random_weights(shape).values()])
        arrays[f"{name}/logits"] = logits(shape, tokens).astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("opt.npz"), **arrays)


if __name__ == "__main__":
    main()
