"""The run that others are compared with."""

from pathlib import Path

import pytest

from tests.fsdp import torchrun
from tests.fsdp.torchrun import Ended


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """The folder of a run of two processes to which nothing happened, and how they ended."""
    folder = tmp_path_factory.mktemp("undisturbed")
    first, second = torchrun.together(2, folder.with_name(f"{folder.name}-output"), *torchrun.command(folder))
    return folder, first, second
