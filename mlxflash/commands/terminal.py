"""What commands share: what people see on stderr, and the texts they name."""

import sys
from pathlib import Path
from typing import Any

from mlxflash.bundle import Bundle
from mlxflash.catalog import STORY

FIDELITIES = ("exact", "high", "balanced", "fast")  # as in fidelity.py, which needs MLX


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def open_bundle(name: Path, change: str = "") -> Bundle:
    """A bundle by its directory, or the embedded one by its name; `change`: what is to be done to it in place.

    Raises ValueError (BundleError) with one sentence.
    """
    if str(name) != "story":
        return Bundle.open(name)
    if change:
        raise ValueError(f"story: the embedded model stays as it is; copy {STORY} and {change} the copy")
    return Bundle.open(STORY)


class Progress:
    """A tqdm bar on stderr that changes its name as the work goes on; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if what != self._what or self._bar is None:
            self.close()
            self._what, self._bar = what, tqdm(total=total, desc=what, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def read_text(file: str, model: Path, num_tokens: int) -> Any:
    """The first tokens of a text, int64 [n], by the tokenizer of a bundle or checkpoint."""
    import numpy as np

    from mlxflash.api import load_tokenizer
    from mlxflash.evaluate import check_length

    words = read_words(file)
    tokens = np.array(load_tokenizer(model).encode(words[: 16 * num_tokens])[:num_tokens], np.int64)
    check_length(tokens, file)
    return tokens


def read_words(file: str) -> str:
    """A text file's content. Raises ValueError when it is no text."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None
