"""One encoder for all tests of prepared folders."""

from collections.abc import Iterator

import pytest
import torch

from tests.data.tiny import TinyEncoder


@pytest.fixture(scope="session")
def tiny_models() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def encoder(tiny_models: TinyEncoder) -> Iterator[TinyEncoder]:
    """The tiny encoder on one thread, with its counts at zero."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny_models.images = tiny_models.prompts = 0
    tiny_models.key = "tiny-0"
    yield tiny_models
    torch.set_num_threads(threads)
