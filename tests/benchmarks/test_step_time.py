"""The floor's passes by hand, and the script from end to end at a tiny size. No assertion about time."""

import json

import pytest
import torch

from tests.benchmarks.scripts import script
from twinrl.training.trainer import Trainer

step_time = script("step_time")
Seconds = script("measuring").Seconds


def test_floors_are_the_counts_of_the_method():
    tutorial = step_time.tutorial_passes(step_time.settings_of("tutorial", 8, 16))
    assert tutorial == step_time.Passes((16,) * 4, (16,) * 8)
    twinflow = step_time.twinflow_passes(step_time.settings_of("twinflow", 8, 16))  # 4 rows for each branch
    assert twinflow == step_time.Passes((16,), (4, 12, 12, 12, 12, 4, 4))


@pytest.mark.parametrize("preset", step_time.PRESETS)
def test_a_real_step_makes_exactly_the_passes_of_its_floor(preset, tmp_path, without_digits):
    """Rows through the networks in one training step, counted by hooks, with and without gradient."""
    settings = step_time.settings_of(preset, 8, 16)
    trainer: Trainer = step_time.trainer_of(settings, tmp_path / "run", torch.device("cpu"))
    seen: dict[bool, list[int]] = {True: [], False: []}
    teacher = trainer.objective.teacher
    for network in (teacher.student, teacher.ema):
        network.register_forward_hook(lambda _, inputs, __: seen[torch.is_grad_enabled()].append(len(inputs[0])))
    trainer.train_step()
    floor = step_time.FLOORS[preset](settings)
    assert sorted(seen[True]) == sorted(floor.with_backward)
    assert sorted(seen[False]) == sorted(floor.forward)


@pytest.mark.slow
def test_the_script_writes_numbers_and_a_table(tmp_path, without_digits, capsys):
    out = tmp_path / "result"
    step_time.main(["--width", "8", "--batch", "8", "--pairs", "2", "--warmup", "0", "--out", str(out)])
    result = json.loads(out.with_suffix(".json").read_text())
    assert [line["preset"] for line in result["presets"]] == ["tutorial", "twinflow"]
    for line in result["presets"]:
        assert line["pairs"] == 2
        assert line["wall_ratio"]["low"] <= line["wall_ratio"]["value"] <= line["wall_ratio"]["high"]
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out[:-1]
    assert result["data"] == "random pixels"


def test_the_ratio_is_the_median_of_the_pairs():
    timings = [(Seconds(2, 1), Seconds(1, 1)), (Seconds(30, 3), Seconds(10, 1)), (Seconds(8, 2), Seconds(2, 1))]
    measured = step_time.summarised("tutorial", step_time.Passes((1,), ()), timings)
    assert measured.wall_ratio.value == 3
    assert measured.cpu_ratio.value == 2
    assert measured.step.wall == 8
