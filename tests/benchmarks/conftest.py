"""What tests of the scripts under ``benchmarks/`` share."""

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.scripts import script

measuring, _ = script("measuring"), script("step_time")  # also what scripts import only when they need it


@pytest.fixture
def without_digits(monkeypatch):
    """Random pixels instead of MNIST, so that the tests need no files."""
    monkeypatch.setattr(measuring, "mnist_root", lambda: None)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Scripts set the number of threads; other tests in this process keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
