from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
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


def source(name: str) -> Path:
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    return path


def run_here(name: str) -> str:
    """Run a notebook's cells in this process, by what a kernel is made of; everything that they printed or showed."""
    shell = InteractiveShell.instance(history_load_length=0)
    shell.history_manager.enabled = False
    path = source(name)
    try:
        with pytest.MonkeyPatch.context() as patch, capture_output() as captured:
            patch.chdir(path.parent)
            for cell in read(path).cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source).raise_error()
    finally:
        InteractiveShell.clear_instance()
    return captured.stdout + "".join(str(text) for output in captured.outputs for text in output.data.values())


def run_in_kernel(name: str) -> str:
    """Execute a notebook as Jupyter does; everything that it printed or showed."""
    path = source(name)
    notebook = read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(o.get("text", "") + "".join(o.get("data", {}).values()) for o in outputs)


WAYS = pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_here, marks=pytest.mark.slow, id="here"),
        pytest.param(run_in_kernel, marks=pytest.mark.campaign, id="in a kernel"),
    ],
)
Run = Callable[[str], str]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process and of kernels."""
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@WAYS
def test_spikes_of_a_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = simulated.make_run(tmp_path, spikes_at=(120, 200, 330))
    simulated.make_run(tmp_path, seed=1)
    monkeypatch.setenv("TWINRL_RUN", str(folder))
    shown = run("spikes_of_a_run")
    assert "3 spikes" in shown
    assert "rectify" in shown
    assert "Recurrence(row=17" in shown
    assert "branch any 12 of 12 worst rows" in shown
    assert shown.count("<svg") >= 3


@WAYS
def test_comparing_arms(run: Run, study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINRL_STUDY", str(study_folder))
    shown = run("comparing_arms")
    assert "log-rank p: 0.0" in shown
    assert "log odds of diverging" in shown
    assert shown.count("<svg") >= 3


@WAYS
def test_published_recipe(run: Run) -> None:
    """It reads the committed tables of papers/results/autopsy."""
    shown = run("published_recipe")
    assert "log-rank p over all arms" in shown
    assert "live teacher: log₁₀ of the largest norm" in shown
    assert "steps whole, more than published" in shown
    assert "7.2e-04 and 1.1e-03" in shown
    assert "decoded baseline" in shown
    assert "baseline_decoded" in shown
    assert "rate_less" in shown
    assert shown.count("<svg") >= 2
