"""What the tests of several processes share: the run that others are compared with, and runs of one process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fsdp import torchrun
from tests.fsdp.cases import CASES, folder_of, register, run
from tests.fsdp.torchrun import Ended
from twinrl.backends import NETWORKS
from twinrl.terms import TERMS
from twinrl.training.schema import RunConfig
from twinrl.training.sources import SOURCES
from twinrl.training.trainer import Outcome


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """The folder of a run of two processes to which nothing happened, and how they ended."""
    folder = tmp_path_factory.mktemp("undisturbed")
    first, second = torchrun.together(2, folder.with_name(f"{folder.name}-output"), *torchrun.command(folder))
    return folder, first, second


@pytest.fixture(scope="module")
def known() -> Iterator[None]:
    """What :func:`tests.fsdp.cases.register` does, for one file of tests."""
    before = SOURCES["digits"]
    register()
    yield
    SOURCES["digits"] = before
    del TERMS["planted"], NETWORKS["scaled"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a file's runs."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def single(base: Path, known: None) -> Callable[[str], tuple[RunConfig, Outcome]]:
    """A case in this process, run once."""
    done: dict[str, tuple[RunConfig, Outcome]] = {}

    def of(name: str) -> tuple[RunConfig, Outcome]:
        if name not in done:
            settings = CASES[name].settings(folder_of(base, 1, name))
            done[name] = settings, run(settings)
        return done[name]

    return of
