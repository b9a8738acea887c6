import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import typer
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.sign import NotebookNotary
from typer.testing import CliRunner

import analysis
from analysis import notebook
from analysis.cli import register
from tests.analysis import simulated
from twinrl.config.errors import InputError

REPOSITORY = Path(analysis.__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "analysis" / "notebooks").glob("*.ipynb"))


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


def run_here(path: Path) -> str:
    """Run a notebook's cells in this process, by what a kernel is made of; everything that they printed or showed."""
    shell = InteractiveShell.instance(history_load_length=0)
    shell.history_manager.enabled = False
    try:
        with pytest.MonkeyPatch.context() as patch, capture_output() as captured:
            patch.chdir(path.parent)
            for cell in read(path).cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source).raise_error()
    finally:
        InteractiveShell.clear_instance()
    return captured.stdout + "".join(str(text) for output in captured.outputs for text in output.data.values())


def run_in_kernel(path: Path) -> str:
    """Execute a notebook as the command does; everything that it printed or showed."""
    notebook.execute(path)
    outputs = [output for cell in read(path).cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(o.get("text", "") + "".join(o.get("data", {}).values()) for o in outputs)


WAYS = pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_here, marks=pytest.mark.slow, id="here"),
        pytest.param(run_in_kernel, marks=pytest.mark.campaign, id="in a kernel"),
    ],
)
Run = Callable[[Path], str]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process and of kernels."""
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


@WAYS
def test_spikes(run: Run, tmp_path: Path) -> None:
    folder = simulated.make_run(tmp_path, spikes_at=(120, 200, 330))
    simulated.make_run(tmp_path, seed=1)
    shown = run(notebook.copy("spikes", folder))
    assert "3 spikes" in shown
    assert "First to stand out: rectify, " in shown
    assert "Recurrence(row=17" in shown
    assert "branch any 12 of 12 worst rows" in shown
    assert shown.count("<svg") >= 3


@WAYS
def test_arms(run: Run, study_folder: Path) -> None:
    shown = run(notebook.copy("arms", study_folder))
    assert "Which factor?" in shown
    assert "log-rank p: 0.0" in shown
    assert "log odds of falling" in shown
    assert shown.count("<svg") >= 3


@WAYS
def test_published_recipe(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the committed tables of papers/results/autopsy."""
    monkeypatch.setenv("TWINRL_AUTOPSY", str(REPOSITORY / "papers" / "results" / "autopsy"))
    shown = run(Path(shutil.copy(source("published_recipe"), tmp_path)))
    assert "log-rank p over all arms" in shown
    assert "live teacher: log₁₀ of the largest norm" in shown
    assert "steps whole, more than published" in shown
    assert "7.2e-04 and 1.1e-03" in shown
    assert "decoded baseline" in shown
    assert "baseline_decoded" in shown
    assert "rate_less" in shown
    assert shown.count("<svg") >= 2


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


@pytest.mark.slow
def test_the_command_executes_a_copy_and_keeps_changes(app: typer.Typer, tmp_path: Path) -> None:
    folder = simulated.make_run(tmp_path / "it's", spikes_at=(120,))
    command = ["notebook", "spikes", str(folder)]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    copied = folder / notebook.FOLDER / "spikes.ipynb"
    assert shown.exit_code == 0
    assert f"notebook: {copied}" in shown.stdout
    first = next(cell for cell in read(copied).cells if cell.cell_type == "code")
    assert "1 spike" in first.outputs[0].text

    changed = read(copied)
    changed.cells = [nbformat.v4.new_code_cell("print(6 * 7)"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(changed, copied)
    NotebookNotary().sign(changed)  # as Jupyter does when it saves
    failed = CliRunner().invoke(app, command, catch_exceptions=False)
    assert failed.exit_code == 1
    assert "cell 2 of" in failed.stderr
    assert "ZeroDivisionError" in failed.stderr
    assert read(copied).cells[0].outputs[0].text == "42\n"
    assert notebook.copy("spikes", folder, fresh=True) == copied
    assert len(read(copied).cells) > 2


def test_a_notebook_that_came_with_a_run_is_not_executed(app: typer.Typer, tmp_path: Path) -> None:
    folder, proof = simulated.make_run(tmp_path), tmp_path / "proof"
    theirs = folder / notebook.FOLDER / "spikes.ipynb"
    theirs.parent.mkdir()
    attack = nbformat.v4.new_code_cell(f"open({str(proof)!r}, 'w')")
    nbformat.write(nbformat.v4.new_notebook(cells=[attack]), theirs)
    before = theirs.read_bytes()
    with pytest.raises(InputError, match=r"spikes\.ipynb is not signed by you; fix: .*jupyter trust .*--fresh"):
        CliRunner().invoke(app, ["notebook", "spikes", str(folder)], catch_exceptions=False)
    assert not proof.exists()
    assert theirs.read_bytes() == before


@pytest.mark.parametrize("brought", ["analysis.py", "pandas/__init__.py", "matplotlib.so"])
def test_code_that_came_with_a_run_is_not_imported(brought: str, tmp_path: Path) -> None:
    """The kernel works in the copy's folder, which is before the libraries on its path."""
    folder = simulated.make_run(tmp_path)
    theirs = folder / notebook.FOLDER / brought
    theirs.parent.mkdir(parents=True)
    theirs.write_text("1 / 0")
    for fresh in (False, True):
        with pytest.raises(
            InputError, match=rf"would import code .*{brought.partition('/')[0]}; fix: read it, and move it"
        ):
            notebook.copy("spikes", folder, fresh)
    theirs.unlink()
    if theirs.parent.name != notebook.FOLDER:
        theirs.parent.rmdir()
    (folder / notebook.FOLDER / "notes.txt").touch()
    notebook.copy("spikes", folder)
    (folder / notebook.FOLDER / "mine.py").touch()  # beside a copy of one's own it is one's own
    notebook.copy("spikes", folder)
    notebook.copy("spikes", folder, fresh=True)


def test_a_damaged_notebook_is_named(tmp_path: Path) -> None:
    folder = simulated.make_run(tmp_path)
    copied = notebook.copy("spikes", folder)
    assert notebook.copy("spikes", folder) == copied
    for content in ("what", "[]", "{}", '{"nbformat": 4, "cells": 1}'):
        copied.write_text(content)
        with pytest.raises(InputError, match=r"spikes\.ipynb is (no notebook|not signed by you)"):
            notebook.copy("spikes", folder)


@pytest.mark.parametrize("kind", ["spikes", "arms"])
def test_what_it_is_not_about_is_refused(kind: str, tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path)
    wrong = run if kind == "arms" else tmp_path
    with pytest.raises(InputError, match=f"{wrong} is not a"):
        notebook.copy(kind, wrong)
    assert not (wrong / notebook.FOLDER).exists()
