"""What the first line of a study's page says, against what is planted."""

from pathlib import Path

import pytest

from analysis import answer
from analysis.answer import sentence
from analysis.frames import StudyFrame, load_study
from analysis.index import STUDY_FILE
from tests.analysis import planted, simulated


def study(folder: Path, truth: planted.Truth, seeds: int = 6) -> StudyFrame:
    return load_study(planted.make(folder, truth, seeds))


@pytest.mark.slow
def test_which_arm_fell_when_and_which_term_led(tmp_path: Path) -> None:
    said = sentence(study(tmp_path, planted.another_term_leads))
    assert said.startswith(
        "Which runs fell is decided by teacher: live 12 of 12, ema 0 of 12, seen at step 100 (median)"
    )
    assert "the gradient of adversarial rose first in 12 of 12" in said
    assert said.endswith("not found to matter: reward.")


@pytest.mark.slow
def test_nothing(tmp_path: Path) -> None:
    said = sentence(study(tmp_path, planted.nothing))
    assert "No run fell (0 of 24" in said
    assert "no arm is found to differ in val/quality beyond chance" in said
    assert "matter" not in said


@pytest.mark.slow
def test_only_together(tmp_path: Path) -> None:
    found = answer.Answer.of(study(tmp_path, planted.only_together))
    assert found.sentence.startswith(
        "Runs fall only where teacher=live and reward=with meet: 6 of 6, seen at step 100, against 0 of 18 elsewhere; "
        "the gradient of rectify rose first in 6 of 6"
    )
    table = answer.factor_table(found).set_index("factor")["fell"]
    assert {name: cell.startswith("★") for name, cell in table.items()} == {
        "teacher": False, "reward": False, "teacher × reward": True,
    }  # fmt: skip


@pytest.mark.slow
def test_an_interaction_without_main_effects(tmp_path: Path) -> None:
    found = answer.Answer.of(study(tmp_path, planted.crossed))
    assert "val/quality depends on teacher and reward together: teacher (ema instead of live) changes" in found.sentence
    assert "(worse) at reward=without, by −0.1" in found.sentence
    table = answer.factor_table(found).set_index("factor")["val/quality"]
    assert [name for name, cell in table.items() if cell.startswith("★")] == ["teacher × reward"]


def test_prompts_that_are_lost_and_falls_that_nobody_could_see_are_told(tmp_path: Path) -> None:
    for k, lost in enumerate(("", "two")):
        for seed in range(2):
            simulated.make_run(tmp_path, config_hash=f"0000000{k}", seed=seed, steps=40, lost=lost,
                               settings={"teacher": {"decay": k}}, evaluation={"every": 0})  # fmt: skip
    said = sentence(load_study(tmp_path))
    assert "prompts are lost in runs that did not fall: teacher.decay=1 in 2 of 2 runs (two in 2)" in said
    assert "a fall could be seen in no arm: runs were judged at their end alone (evaluation.every)" in said


def test_times_that_are_not_known_are_not_told(tmp_path: Path) -> None:
    for k in range(2):
        for seed in range(3):
            simulated.make_run(tmp_path, config_hash=f"0000000{k}", seed=seed, steps=40, quality=0.1,
                               settings={"teacher": {"decay": k}}, seconds=0.01 * 30 ** (seed * k))  # fmt: skip
    found = answer.Answer.of(load_study(tmp_path))
    assert "How much dearer one arm is than another is not known." in dict(answer.facts(found))["What does it cost?"]
    assert "not known" in answer.factor_table(found)["time a step ×"].tolist()


def test_a_study_of_one_arm_has_a_sentence(tmp_path: Path) -> None:
    simulated.make_run(tmp_path, steps=40)
    assert sentence(load_study(tmp_path)).startswith("No run fell (0 of 1")


# --- names ------------------------------------------------------------------------------------------------


def test_a_study_folder_names_factors_of_runs_that_are_elsewhere(tmp_path: Path) -> None:
    made = planted.make(tmp_path, planted.nothing, seeds=1, steps=20)
    folder = made / "studies" / "planted"
    folder.mkdir(parents=True)
    (made / STUDY_FILE).rename(folder / STUDY_FILE)
    alone = load_study(made)  # the root of one study
    assert alone.factors == ("teacher", "reward")
    text = (folder / STUDY_FILE).read_text()
    (folder / STUDY_FILE).write_text(text.replace("{", '{"runs": "../..", ', 1))
    assert load_study(folder).arms == alone.arms == [
        f"teacher={teacher} reward={reward}" for teacher in ("live", "ema") for reward in ("without", "with")
    ]  # fmt: skip


@pytest.mark.parametrize("rules", [{"terms": {}}, {}])
def test_what_one_configuration_lacks_is_no_level_of_its_own_kind(tmp_path: Path, rules: dict[str, object]) -> None:
    clip = {"terms": {"rectify": {"clip": {"kind": "clip", "max_norm": 1.0}}}}
    for k, gradients in enumerate((rules, clip)):
        simulated.make_run(tmp_path, config_hash=f"0000000{k}", steps=3, settings={"gradients": gradients})
    assert load_study(tmp_path).arms == ["clip.kind=none", "clip.kind=clip"]
