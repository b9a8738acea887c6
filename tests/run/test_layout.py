"""The files of a run directory: named in one place, read alike by everybody, without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ablations
import analysis
import twinrl
from twinrl.config.errors import InputError
from twinrl.run import layout

NAMES = {name for key, name in vars(layout).items() if key.isupper() and isinstance(name, str) and Path(name).suffix}
PACKAGES = [Path(package.__file__).parent for package in (twinrl, ablations, analysis)]


def spelled(path: Path) -> set[str]:
    """Texts in a module's code; docstrings are none."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {Path(str(node.value)).name for node in texts if id(node) not in said and node.value}


def test_no_other_module_spells_a_file_of_a_run_directory() -> None:
    modules = (path for package in PACKAGES for path in package.rglob("*.py") if path != Path(layout.__file__))
    assert [(path, found) for path in modules if (found := spelled(path) & NAMES)] == []


def test_a_directory_without_files_is_no_run_and_has_nothing(tmp_path: Path) -> None:
    assert not layout.is_run(tmp_path)
    assert (layout.read_config(tmp_path), layout.read_environment(tmp_path)) == ({}, {})
    assert (layout.read_events(tmp_path), layout.read_result(tmp_path), layout.grids(tmp_path)) == ([], None, [])
    with pytest.raises(InputError, match=layout.LOG):
        layout.read_rows(tmp_path)


def test_what_a_kill_has_left_half_written_is_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / layout.ENVIRONMENT).write_text('{"launchers": ["a')
    (tmp_path / layout.EVENTS).write_text('{"kind": "spike"}\n{"kind"')
    assert layout.read_environment(tmp_path) == {}
    assert layout.read_events(tmp_path) == [{"kind": "spike"}]


def test_checkpoints_are_in_the_order_of_their_steps_and_unpublished_ones_are_none(tmp_path: Path) -> None:
    for name in (layout.of_step(100), layout.of_step(9), f".{layout.of_step(200)}.new", "step-last"):
        (tmp_path / name).mkdir()
    assert [layout.step_of(path) for path in layout.available(tmp_path)] == [9, 100]
    assert layout.newest(tmp_path) == tmp_path / layout.of_step(100)
    assert layout.newest(tmp_path / "none") is None


def test_it_needs_neither_torch_nor_pandas() -> None:
    asked = f"import sys, {layout.__name__}; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
