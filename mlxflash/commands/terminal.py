"""What people see on stderr."""

import sys
from typing import Any


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
