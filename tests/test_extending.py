"""docs/extending.md: every file of the page runs with the page's own command, and every registry is on it."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from ablations import study as studies
from ablations.design import DESIGNS
from tests import pages
from tests.fake_source import SMALL, register
from tests.logs import rows
from twinrl import cli
from twinrl.commands import doctor
from twinrl.config.components import Registry
from twinrl.training import schema

SECTIONS = pages.sections("extending")
TRAINED = [name for name, text in SECTIONS.items() if any("train lab" in line for line in pages.commands(text))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where own files are found."""
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def written(folder: Path, section: str) -> list[str]:
    """The section's files, written; their modules."""
    for name, text in pages.files(section).items():
        (folder / name).write_text(text)
    return [Path(name).stem for name in pages.files(section) if name.endswith(".py")]


def run(monkeypatch: pytest.MonkeyPatch, command: str, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *more])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_the_file_trains_with_the_command(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = written(folder, SECTIONS[kind])
    (command,) = pages.commands(SECTIONS[kind])
    tiny = [setting for setting in SMALL if setting.partition("=")[0] not in command]
    run(monkeypatch, command, *tiny, "train.steps=2", "evaluation.every=0", "run.dir=runs")
    (made,) = (folder / "runs").iterdir()
    assert f"{module}." in (made / "config.yaml").read_text()
    assert all(abs(row["loss/total"]) < 1e6 for row in rows(made))
    assert len(rows(made)) == 2


def test_the_design_plans_its_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = SECTIONS["Study design"]
    written(folder, section)
    (command,) = pages.commands(section)
    run(monkeypatch, command)
    assert "study mine" in capsys.readouterr().out
    arms = [arm.name for arm in studies.load(command.split()[-1]).arms]
    assert arms == ["rate=full teacher=slow", "rate=tenth teacher=fast"]


@pytest.mark.slow
def test_the_family_is_a_configuration_s(folder: Path) -> None:
    section = SECTIONS["Family of pretrained models"]
    written(folder, section)
    prepare, train, _ = pages.commands(section)
    _, _, preset, *settings = shlex.split(train)
    family = schema.load(preset, settings).model.family
    assert family in shlex.split(prepare)


def test_the_table_has_every_registry() -> None:
    (table,) = re.findall(r"^\| kind \| key.*?\n\n", pages.page("extending"), re.MULTILINE | re.DOTALL)
    registries: list[Registry] = [*doctor.COMPONENTS.values(), DESIGNS]
    assert [base.__name__ for known in registries for base in known.bases if f"{base.__name__}`" not in table] == []
    links = re.findall(r"\]\(#([\w-]+)\)", table)
    assert links == [re.sub(r"[^a-z]+", "-", name.lower()) for name in SECTIONS]
