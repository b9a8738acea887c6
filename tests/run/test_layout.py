"""The files of a run directory: named in one place, read alike by everybody, without torch."""

import ast
import json
import math
import os
import re
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
EVENT = {"step": 4, "iteration": 4, "kind": "spike", "terms": ["base"], "rows": [1], "message": "a spike"}


def spelled(path: Path) -> set[str]:
    """Texts in a module's code; docstrings are none."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {Path(str(node.value)).name for node in texts if id(node) not in said and node.value}


@pytest.mark.slow
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
    (tmp_path / layout.EVENTS).write_text(json.dumps(EVENT) + '\n{"kind"')
    assert layout.read_environment(tmp_path) == {}
    assert layout.read_events(tmp_path) == [EVENT]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("what", "line 2, is corrupted"),
        (json.dumps({key: EVENT[key] for key in EVENT if key != "step"}), "line 2, is no event; got step"),
        (json.dumps(EVENT | {"rows": "all"}), "line 2, is no event; got rows"),
        (json.dumps(EVENT | {"more": 1}), "line 2, is no event; got more"),
    ],
)
def test_a_line_that_is_no_event_is_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / layout.EVENTS).write_text(f"{json.dumps(EVENT)}\n{line}\n")
    with pytest.raises(InputError, match=said):
        layout.read_events(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"val/quality": "text"}', '{"val/quality": [1]}', "{", "", '{"a": 1}', f'{{"val/quality": {10**400}}}'],
)
def test_damaged_metrics_of_the_start_are_no_metrics(content: str, tmp_path: Path) -> None:
    (tmp_path / layout.START).write_text(content)
    with pytest.raises(InputError, match=layout.START):
        layout.read_start(tmp_path)


def test_metrics_of_the_start_may_be_no_numbers(tmp_path: Path) -> None:
    (tmp_path / layout.START).write_text('{"val/quality": 1, "b": 0.5, "c": "-inf"}')
    assert layout.read_start(tmp_path) == {"val/quality": 1, "b": 0.5, "c": -math.inf}


@pytest.mark.parametrize("name", [layout.RESULT, layout.START, layout.EVENTS, layout.LOG, layout.CONFIG])
@pytest.mark.timeout(20)
def test_a_pipe_in_a_file_s_place_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    readers = {layout.RESULT: layout.read_result, layout.START: layout.read_start, layout.EVENTS: layout.read_events}
    read = (readers | {layout.LOG: layout.read_rows, layout.CONFIG: layout.read_config})[name]
    with pytest.raises(InputError, match=name):
        read(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "null", '{"launchers": 3}', "\x00"])
def test_a_damaged_note_of_the_machine_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / layout.ENVIRONMENT).write_text(content)
    assert layout.read_environment(tmp_path) == {}


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


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"step": 2, "iteration": 1, "loss/total": "text"}, "line 2, is damaged; got loss/total 'text'"),
        ({"step": 2, "iteration": 1, "loss/total": [1.0]}, "line 2, is damaged; got loss/total"),
        ({"step": "2", "iteration": 1}, "line 2, is damaged; got step '2'"),
        ({"step": True, "iteration": 1}, "line 2, is damaged; got step True"),
        ({"step": -2, "iteration": 1}, "line 2, is damaged; got step -2"),
        ({"iteration": 1}, "line 2, is damaged; got step None"),
    ],
)
def test_a_row_of_the_log_has_whole_counts_and_numbers(row: dict[str, object], said: str, tmp_path: Path) -> None:
    first = {"step": 1, "iteration": 0, "loss/total": "nan", "val/quality": None}
    (tmp_path / layout.LOG).write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=re.escape(said)):
        layout.read_rows(tmp_path)


def test_pictures_that_are_no_files_are_none(tmp_path: Path) -> None:
    (tmp_path / layout.SAMPLES).mkdir()
    kept, lost = (tmp_path / layout.SAMPLES / f"{layout.of_step(step)}.png" for step in (1, 2))
    kept.write_bytes(b"a picture")
    lost.symlink_to("nowhere")
    (tmp_path / "private.png").write_bytes(b"a picture")
    (tmp_path / layout.SAMPLES / f"{layout.of_step(3)}.png").symlink_to(tmp_path / "private.png")
    (tmp_path / layout.SAMPLES / "step-last.png").touch()
    assert layout.grids(tmp_path) == [kept]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / layout.SAMPLES).symlink_to(tmp_path / layout.SAMPLES)
    assert layout.grids(tmp_path / "theirs") == []  # a link to a whole folder
    (tmp_path / "link").symlink_to(tmp_path)
    assert len(layout.grids(tmp_path / "link")) == 1  # of the user's own to the run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: text", "seed"),
        ("train: {steps: many}", "train.steps"),
        ("evaluation: {nfe: []}", "evaluation.nfe"),
        ("stability: nothing", "stability"),
        ("terms: {base: {branches: 3}}", "terms.base.branches"),
        ("[]", "mapping"),
        ("a: &a [*a]", "YAML"),
    ],
)
def test_a_damaged_configuration_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / layout.CONFIG).write_text(text)
    with pytest.raises(InputError, match=rf"{layout.CONFIG}.*{said}"):
        layout.read_config(tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"status": "done"}, "status"),
        ({"status": None}, "status"),
        ({"step": -1}, "step"),
        ({"message": 5}, "message"),
        ({"table": [1]}, "table"),
    ],
)
def test_a_damaged_result_is_named_with_its_key(entry: dict[str, object], said: str, tmp_path: Path) -> None:
    """What it says goes into ledgers, which would take it and refuse to be read from then on."""
    (tmp_path / layout.RESULT).write_text(json.dumps({"status": "finished", "step": 3} | entry))
    with pytest.raises(InputError, match=rf"result\.json is damaged; got {said}.*; fix: delete it: `twinrl resume"):
        layout.read_result(tmp_path)
