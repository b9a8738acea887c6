from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import analysis
from tests.analysis import simulated

NOTEBOOKS = sorted((Path(analysis.__file__).parent / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_output(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    nbformat.validate(read(path))


def run(name: str, monkeypatch: pytest.MonkeyPatch, **environment: Path) -> str:
    """Execute a notebook; everything that it printed or showed."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    root = Path(analysis.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    notebook = read(path)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(o.get("text", "") + "".join(o.get("data", {}).values()) for o in outputs)


@pytest.mark.slow
def test_spikes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = simulated.make_run(tmp_path, spikes_at=(120, 200, 330))
    simulated.make_run(tmp_path, seed=1)
    shown = run("spikes_of_a_run", monkeypatch, TWINRL_RUN=folder)
    assert "3 spikes" in shown
    assert "rectify" in shown
    assert "Recurrence(row=17" in shown
    assert "branch any 12 of 12 worst rows" in shown
    assert shown.count("<svg") >= 3


@pytest.mark.slow
def test_comparing_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("comparing_arms", monkeypatch, TWINRL_STUDY=simulated.make_study(tmp_path, seeds=6))
    assert "log-rank p: 0.0" in shown
    assert "log odds of diverging" in shown
    assert shown.count("<svg") >= 3


@pytest.mark.slow
def test_published_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the committed tables of docs/results/autopsy."""
    shown = run("published_recipe", monkeypatch)
    assert "log-rank p over all arms" in shown
    assert "live teacher: log₁₀ of the largest norm" in shown
    assert "steps whole, more than published" in shown
    assert "7.2e-04 and 1.1e-03" in shown
    assert "decoded baseline" in shown
    assert "baseline_decoded" in shown
    assert "rate_less" in shown
    assert shown.count("<svg") >= 2
