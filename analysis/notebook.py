"""``twinrl notebook``: a notebook on one's own run or study, beside it, executed.

A copy is the user's: executed again it keeps what was changed in it. It carries Jupyter's signature of this user, for
a run of somebody else's may come with a notebook of theirs, whose code would run.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import all_suffixes
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.frames import is_run, run_folders
from analysis.index import located
from twinrl.config.errors import InputError
from twinrl.machine.files import publishing

if TYPE_CHECKING:
    from nbformat import NotebookNode

SOURCES = Path(__file__).parent / "notebooks"
FOLDER = "notebooks"
SUBJECTS = {"spikes": "RUN", "arms": "STUDY"}
"""Notebook → the name that stands for its run or study in the first code cell."""
INSTALL = "pip install 'twinrl[notebook]'"
SECONDS_A_CELL = 600
AGAIN = "--fresh replaces it"


class CellError(Exception):
    """A cell failed: which one, and why."""


def copy(kind: str, subject: Path, fresh: bool = False) -> Path:
    """The notebook's copy beside ``subject``, about it; an earlier copy stays unless ``fresh``.

    Raises:
        InputError: ``subject`` is not what this notebook is about, or the copy is not this user's.
    """
    import nbformat

    subject = subject.resolve()
    _check(kind, subject)
    target = (subject if subject.is_dir() else subject.parent) / FOLDER / f"{kind}.ipynb"
    if target.exists() and not fresh:
        _check_own(target)
    else:
        _check_alone(target)
        notebook = nbformat.read(SOURCES / f"{kind}.ipynb", as_version=4)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        about = f"{SUBJECTS[kind]} = Path({str(subject)!r})"
        first.source = re.sub(rf"^{SUBJECTS[kind]} = .*$", lambda _: about, first.source, flags=re.MULTILINE)
        _write(notebook, target)
    return target


def execute(path: Path) -> None:
    """Run all cells in their order, with a bar; what they show is kept in the file, also where one fails.

    Raises:
        CellError: a cell raised, or took longer than :data:`SECONDS_A_CELL`.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    from rich.progress import track

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS_A_CELL, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        with client.setup_kernel():
            for number, cell in enumerate(track(notebook.cells, description=path.name), 1):
                client.execute_cell(cell, number - 1)
    except CellExecutionError as error:
        raise CellError(f"cell {number} of {path} failed: {error.ename}: {error.evalue}") from error
    except CellTimeoutError as error:
        raise CellError(f"cell {number} of {path} took longer than {SECONDS_A_CELL} s") from error
    finally:
        _write(notebook, path)


def viewer() -> Sequence[str]:
    """The command that opens a notebook; empty where no Jupyter is installed."""
    import sys

    found = next((module for module in ("jupyterlab", "notebook") if find_spec(module)), None)
    return (sys.executable, "-m", found) if found else ()


def check_installed() -> None:
    """Raises InputError where notebooks cannot be executed."""
    missing = [module for module in ("nbclient", "ipykernel") if not find_spec(module)]
    if missing:
        raise InputError(f"a notebook needs {' and '.join(missing)}", fix=INSTALL)


def _check(kind: str, subject: Path) -> None:
    if kind == "spikes" and not is_run(subject):
        raise InputError(f"{subject} is not a run directory", fix="a study is for: twinrl notebook arms STUDY")
    if kind == "arms" and (is_run(subject) or not (run_folders(located(subject)[0]) or subject.suffix == ".jsonl")):
        raise InputError(
            f"{subject} is not a study", expected="a folder of run directories, or a ledger (*.jsonl)",
            fix="a run is for: twinrl notebook spikes RUN",
        )  # fmt: skip


def _check_alone(target: Path) -> None:
    """Raises InputError where a folder that this user has no notebook in holds code: the kernel works there, and would
    import it in the place of libraries."""
    with suppress(InputError):
        if target.exists() and _is_own(target):
            return
    for path in sorted(target.parent.glob("*")):
        package = path.is_dir() and path.name.isidentifier() and path.name != "__pycache__"
        if package or path.name.endswith(tuple(all_suffixes())):
            raise InputError(f"a notebook would import code of {target.parent}", got=path, fix="read it, and move it")


def _check_own(path: Path) -> None:
    """Raises InputError where a notebook is not signed by this user."""
    if not _is_own(path):
        fix = f"read its code, then `jupyter trust {path}` to run it; {AGAIN}"
        raise InputError(f"{path} is not signed by you", fix=fix)


def _is_own(path: Path) -> bool:
    """Whether a notebook has this user's signature, which Jupyter renews when it saves one. Raises InputError where it
    is none."""
    import nbformat
    from nbformat.reader import NotJSONError
    from nbformat.sign import NotebookNotary

    try:
        return bool(NotebookNotary().check_signature(nbformat.read(path, as_version=4)))
    except (NotJSONError, nbformat.ValidationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no notebook", got=f"{type(error).__name__}: {error!s:.80}", fix=AGAIN) from error


def _write(notebook: "NotebookNode", target: Path) -> None:
    import nbformat
    from nbformat.sign import NotebookNotary

    target.parent.mkdir(exist_ok=True)
    with publishing(target) as new:
        nbformat.write(notebook, new)
    NotebookNotary().sign(notebook)
