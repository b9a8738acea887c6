"""A simulated study and reports, made once: drawing a study's figures takes ten seconds."""

from pathlib import Path
from typing import Any

import pytest

from analysis import plots
from analysis.report import report
from tests.analysis import simulated


def _save_undrawn(figure: Any, path: Path) -> Path:
    assert figure.axes
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of a report's time: for tests of what a page says."""
    monkeypatch.setattr(plots, "save", _save_undrawn)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of six seeds, with what is planted in them."""
    return simulated.make_study(tmp_path_factory.mktemp("studies"), seeds=6)


@pytest.fixture(scope="session")
def study_page(study_folder: Path) -> Path:
    """The study's report; its figures are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", _save_undrawn)
        return report(study_folder).page


@pytest.fixture(scope="session")
def drawn_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small study with its figures, and with sample grids."""
    folder = tmp_path_factory.mktemp("small")
    arms = {name: {**arm, "rate": 0.0} for name, arm in simulated.ARMS.items() if name != "clip"}
    return report(simulated.make_study(folder, seeds=3, arms=arms, steps=40)).page
