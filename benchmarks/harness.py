"""lm-evaluation-harness on a streamed model, through mlx-lm's own adapter, on a task made from a local text.

The adapter loads a model by path; here it is given ours. It scores prompts in long passes, which our model streams
exactly, so scores would say nothing of a level: tokens go one per pass instead, as when decoding. The task is
LAMBADA's: the last word of a passage from the passage before it, scored by likelihood and by greedy choice.
Needs `pip install lm-eval`. Says nothing about speed.

    python benchmarks/harness.py BUNDLE --text FILE --memory 24MB --fidelity exact high fast [--passages 100]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from mlx_lm.evaluate import MLXLM

from mlxflash import load

WORDS = 60  # of a passage


class Streamed(MLXLM):
    """mlx-lm's adapter around a model that is there already; one token per pass unless that would change nothing."""

    def __init__(self, model: Any, tokenizer: Any):
        LM.__init__(self)
        self._model, self.tokenizer = model, tokenizer
        self._max_tokens, self._batch_size, self._sampler = None, 1, None
        self.use_chat_template = False
        self._step = 2048 if model.flash.exact else 1

    def _process_prompt(self, prompt: Any, step_size: int = 0) -> Any:
        return super()._process_prompt(prompt, self._step)

    def _score_fn(self, inputs: Any, cache: Any = None, step_size: int = 0) -> Any:
        return super()._score_fn(inputs, cache, self._step)


def passages(text: str, count: int) -> list[dict[str, str]]:
    """Passages from all over a text: all but the last word, and that with its space."""
    words = re.sub(r"\s+", " ", text).split(" ")
    step = max(WORDS, len(words) // count)
    cuts = [words[i : i + WORDS] for i in range(0, len(words) - WORDS, step)][:count]
    return [{"context": " ".join(cut[:-1]), "word": " " + cut[-1].strip('.,;:!?"')} for cut in cuts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--memory", default=None)
    parser.add_argument("--fidelity", nargs="+", default=["exact", "high", "balanced", "fast"])
    parser.add_argument("--passages", type=int, default=100)
    args = parser.parse_args()
    docs = passages(args.text.read_text(encoding="utf-8"), args.passages)
    task = {
        "task": "last-word",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{word}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    for fidelity in args.fidelity:
        model, tokenizer = load(args.bundle, memory=args.memory, fidelity=fidelity, max_kv_size=256)
        with model:
            found = simple_evaluate(model=Streamed(model, tokenizer), tasks=[task], bootstrap_iters=0)
            assert found is not None
            said = {k: v for k, v in found["results"]["last-word"].items() if isinstance(v, float)}
            print(
                json.dumps({"fidelity": fidelity, "mode": model.flash.mode, "passages": len(docs)} | said), flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
