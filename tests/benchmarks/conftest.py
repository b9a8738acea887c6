"""The scripts under ``benchmarks/`` import each other as siblings, as they do when they are run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import measuring


@pytest.fixture
def without_digits(monkeypatch):
    """Random pixels instead of MNIST, so that the tests need no files."""
    monkeypatch.setattr(measuring, "mnist_root", lambda: None)
