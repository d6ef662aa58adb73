import pytest

from build import Library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Tiny checkpoints and bundles; see build.Library."""
    return Library(tmp_path_factory.mktemp("library"))
