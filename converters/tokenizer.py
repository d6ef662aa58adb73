"""Whether a checkpoint's tokenizer speaks its model's vocabulary."""

import json
from pathlib import Path


def highest_token(path: Path) -> int | None:
    """The highest id of the vocabulary that a directory's tokenizer files hold; None where they are of another kind.

    Tokens that were added to it are left out: checkpoints pad them beyond what their models know.
    """
    try:
        if (path / "tokenizer.json").is_file():
            vocabulary = json.loads((path / "tokenizer.json").read_bytes())["model"]["vocab"]
            return max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        if (path / "tokenizer.model").is_file():
            from sentencepiece import SentencePieceProcessor

            return int(SentencePieceProcessor(model_file=str(path / "tokenizer.model")).vocab_size()) - 1
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError):
        return None  # loading the tokenizer will say what is wrong with it
    return None
