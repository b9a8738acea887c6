"""A simulated study and its report, made once: drawing the figures takes seconds."""

from pathlib import Path

import pytest

from analysis.report import report
from tests.analysis import simulated


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated.make_study(tmp_path_factory.mktemp("studies"), seeds=6)


@pytest.fixture(scope="session")
def study_page(study_folder: Path) -> Path:
    return report(study_folder)
