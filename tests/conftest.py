import sys
from pathlib import Path

import pytest

from build import Library

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # last: its trace.py is not Python's


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Tiny checkpoints and bundles; see build.Library."""
    return Library(tmp_path_factory.mktemp("library"))
