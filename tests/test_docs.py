"""Pages that list what the code has, list all of it, and as it is."""

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from ablations import study as studies
from ablations.design import DESIGNS
from ablations.study import SET_BY_STUDY, StudyConfig
from twinrl import cli, config
from twinrl.commands import doctor

DOCS = Path(__file__).parents[1] / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def test_formulations_lists_the_presets() -> None:
    listed = set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\|[^|]*\|", page("formulations"), re.MULTILINE))))
    assert set(config.presets()) - listed == set()


def test_architecture_lists_the_commands() -> None:
    (told,) = re.findall(r"- \*\*Command line\.\*\*(.*?)Exit code", page("architecture"), re.DOTALL)
    app = get_command(cli.app)
    groups = {"data": "data prepare", "lab": "lab build"}
    commands = {groups.get(name, name) for name in app.commands} | {"ablate", "analyze"}  # type: ignore[attr-defined]
    assert {words for words in commands if f"`{words}`" not in told and f"`twinrl {words} " not in told} == set()


STUDY_KEYS = sorted({key.name for key in doctor.keys(StudyConfig) if key.default})


@pytest.mark.parametrize("key", STUDY_KEYS)
def test_studies_explains_the_keys_of_a_study(key: str) -> None:
    section, _, inner = key.partition(".")
    (row,) = re.findall(rf"^\| [^|]*`{section}`.*$", page("studies"), re.MULTILINE)
    assert re.search(rf"`{inner or section}\b", row), row


def test_studies_names_designs_and_what_a_study_sets_by_itself() -> None:
    shown = page("studies")
    assert [word for word in (*DESIGNS, *SET_BY_STUDY) if f"`{word}`" not in shown and f": {word}}}" not in shown] == []


def test_the_study_of_the_page_loads_with_either_design(tmp_path: Path) -> None:
    whole, explicit = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page("studies"), re.DOTALL))
    for design, arms in ((whole["design"], 4), (explicit["design"], 2)):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole | {"design": design}, sort_keys=False))
        assert len(studies.load(str(tmp_path / "mine.yaml")).arms) == arms
