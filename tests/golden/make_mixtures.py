"""Writes mixtures/KIND.npz: what transformers' own classes compute for the tiny mixtures of tests/mixtures.py.

    python -c 'import sys; sys.path.insert(0, "tests"); import mixtures; mixtures.write_all("checkpoints")'
    venv/bin/pip install torch==2.13.0 transformers==5.24.0     (in an environment of its own)
    venv/bin/python tests/golden/make_mixtures.py checkpoints

Neither is a dependency of the tests: what they said is kept.
"""

import sys
from pathlib import Path

import numpy as np

TOKENS = 12


def main():
    import torch
    from transformers import AutoModelForCausalLM

    for path in sorted(Path(sys.argv[1]).iterdir()):
        tokens = np.random.default_rng(1).integers(3, 300, TOKENS)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
        print(path.name, np.ptp(logits, axis=-1).mean())
        target = Path(__file__).with_name("mixtures") / f"{path.name}.npz"
        np.savez_compressed(target, tokens=tokens, logits=logits.astype(np.float32))


if __name__ == "__main__":
    main()
