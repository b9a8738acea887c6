"""Studies: what a file means, and the one line that a wrong one gets before anything starts."""

from pathlib import Path

import pytest
import yaml

from ablations import study as studies
from twinrl.config.errors import InputError

RATES = {"small": {"optim.lr": 1e-4}, "large": {"optim.lr": 1e-3}}


def write(folder: Path, **content: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "twinflow", "factors": {"rate": RATES}} | content, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", studies.shipped())
def test_shipped_studies_load(name: str) -> None:
    assert len(studies.load(name).arms) > 1


def test_levels_become_settings(tmp_path: Path) -> None:
    study = studies.load(write(tmp_path, set={"train.steps": 7}, seeds=3))
    assert study.name == "mine"
    assert study.config.seeds == [0, 1, 2]
    assert {arm.name: (arm.settings.optim.lr, arm.settings.train.steps) for arm in study.arms} == {
        "rate=small": (1e-4, 7), "rate=large": (1e-3, 7),
    }  # fmt: skip


def test_arms_mix_factors_and_overrides(tmp_path: Path) -> None:
    arms = {"mine": {"rate": "large", "train.batch": 32}, "plain": {"train.batch": 64}}
    mine, plain = studies.load(write(tmp_path, design={"kind": "arms", "arms": arms})).arms
    assert (mine.settings.optim.lr, mine.settings.train.batch, dict(mine.levels)) == (1e-3, 32, {"rate": "large"})
    assert (plain.settings.train.batch, dict(plain.levels)) == (64, {})


def test_base_may_lie_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: twinflow\ntrain: {batch: 48}\n")
    assert studies.load(write(tmp_path, base="base.yaml")).arms[0].settings.train.batch == 48


def test_names_may_have_spaces_and_levels_may_be_numbers(tmp_path: Path) -> None:
    factors = {"learning rate": {1e-3: {"optim.lr": 1e-3}, 2: {"optim.lr": 2.0}, "very large": {"optim.lr": 9.0}}}
    study = studies.load(write(tmp_path, name="my study", factors=factors))
    assert study.name == "my study"
    assert [arm.name for arm in study.arms] == [f"learning rate={level}" for level in ("0.001", "2", "very large")]


WRONG = {
    "'a/b' can't be the name of a study": {"name": "a/b"},
    "'β' can't be the name of a factor": {"factors": {"β": RATES}},
    "put it in quotes": {"factors": {"decay": {True: {"optim.lr": 1.0}, False: {}}}},
    "unknown key teacher.deccay": {"factors": {"teacher": {"a": {"teacher.deccay": 0.5}, "b": {}}}},
    "level same of factor rate changes nothing": {"factors": {"rate": RATES | {"same": {"optim.lr": 1e-4}}}},
    "level b of factor place changes nothing": {"factors": {"place": {"a": {}, "b": {"checkpoint.every": 7}}}},
    "a study can't set seed": {"factors": {"s": {"a": {"seed": 1}, "b": {"seed": 2}}}},
    "has 1 level, expected two": {"factors": {"rate": {"only": {"optim.lr": 1e-4}}}},
    "arms a and b are equal": {"design": {"kind": "arms", "arms": {"a": {"rate": "small"}, "b": {"optim.lr": 1e-4}}}},
    "got 0; expected 1 to 100,000": {"seeds": 0},
    "got 300,000,000; expected 1 to 100,000": {"seeds": 300_000_000},
    "16,777,216 arms of 1 seeds are 16,777,216 trials": {
        "factors": {f"f{i}": {"a": {}, "b": {"optim.lr": 1.0}} for i in range(24)}, "seeds": 1,
    },
    "can't be the name of a level of rate": {"factors": {"rate": RATES | {"../up": {"optim.lr": 1e-4}}}},
    r"'two\nlines' can't be the name": {"factors": {"rate": RATES | {"two\nlines": {"optim.lr": 1e-4}}}},
    r"'two\nlines' can't be the name of an arm": {"design": {"kind": "arms", "arms": {"two\nlines": {}}}},
    r"'\x1b[2J' can't be the name of an arm": {"design": {"kind": "arms", "arms": {"\x1b[2J": {}}}},
    "distinct seeds": {"seeds": [1, 1]},
    "unknown design 'latin'": {"design": {"kind": "latin"}},
    "no fraction of 1": {"design": {"kind": "fractional_factorial"}},
    "unknown key sedes; did you mean seeds": {"sedes": 3},
    "unknown key resources.packed; valid keys: cpus, gpus, workers": {"resources": {"packed": 8}},  # there was one
    "no preset or file 'twinflo'": {"base": "twinflo"},
    "asha compares validations": {"set": {"evaluation.every": 0}, "stop": {"kind": "asha"}},
    "low must be below high": {"margin": {"low": 1.0, "high": 0.1}},
    "finite numbers": {"set": {"optim.eps": float("nan")}},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_studies_are_refused_in_one_line(message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        studies.load(write(tmp_path, **WRONG[message]))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean example"):
        studies.load("exampel")
    (tmp_path / "torn.yaml").write_text("factors: {a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        studies.load(str(tmp_path / "torn.yaml"))
