"""The tiny models, saved once."""

import pytest

from tests.rewards.tiny import save_all


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Kind → settings of a tiny saved model of that kind."""
    return save_all(tmp_path_factory.mktemp("rewards"))
