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
    assert twinflow == step_time.Passes((16,), (4, 12, 12, 12, 12, 8))
    apart = step_time.passes_of(step_time.settings_of("twinflow", 8, 16, "gradients.space=parameter"))
    assert apart == step_time.Passes((8, 4, 4), (4, 12, 12, 12, 12, 8), ((0, 1), (1,), (2,)))
    lab = step_time.passes_of(step_time.settings_of("lab", 8, 16))  # 128 rows, no guidance
    assert lab == step_time.Passes((64, 32, 32), (32, 96, 96, 64), ((0, 1), (1,), (2,)))
    assert step_time.joined(step_time.settings_of("lab", 8, 16)) == step_time.Passes((128,), (32, 96, 96, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "space"), [("tutorial", "none"), ("twinflow", "none"), ("twinflow", "output"), ("twinflow", "parameter")]
)
def test_a_real_step_and_its_floor_make_the_same_passes(preset, space, tmp_path, without_digits):
    """Rows through the networks in one training step, counted by hooks, with and without gradient."""
    settings = step_time.settings_of(preset, 8, 16, f"gradients.space={space}")
    trainer: Trainer = step_time.trainer_of(settings, tmp_path / "run", torch.device("cpu"))
    seen: dict[bool, list[int]] = {True: [], False: []}
    teacher = trainer.objective.teacher
    for network in (teacher.student, teacher.ema):
        network.register_forward_hook(lambda _, inputs, __: seen[torch.is_grad_enabled()].append(len(inputs[0])))
    trainer.train_step()
    floor = step_time.passes_of(settings)
    assert sorted(seen[True]) == sorted(floor.with_backward)
    assert sorted(seen[False]) == sorted(floor.forward)
    made, seen[True], seen[False] = (sorted(seen[True]), sorted(seen[False])), [], []
    step_time.Floor(trainer, floor)()
    assert (sorted(seen[True]), sorted(seen[False])) == made


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
    one = Seconds(1, 0.5)
    timings = [
        (Seconds(2, 1), Seconds(1, 1), one), (Seconds(30, 3), Seconds(10, 1), one), (Seconds(8, 2), Seconds(2, 1), one),
    ]  # fmt: skip
    measured = step_time.summarised("tutorial", step_time.Passes((1,), ()), timings)
    assert measured.wall_ratio.value == 3
    assert measured.cpu_ratio.value == 2
    assert measured.joined_ratio.value == 4
    assert measured.step.wall == 8
