"""Fixtures shared by all tests."""

import pytest


@pytest.fixture(scope="session")
def lab():
    """The digits lab from the normal cache; built once, on first use."""
    from twinrl.lab import load_lab

    return load_lab(progress=False)
