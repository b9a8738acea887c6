"""Time to quality: reading the curves by hand-made examples, and a tiny study that is stopped and continued."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.benchmarks.scripts import script
from twinrl.config.errors import InputError
from twinrl.flow.source import Split

ttq = script("time_to_quality")
PLAN = ttq.Plan(width=8, batch=8, lrs=(1e-3, 2e-3), horizons=(10, 20), points=4, n=20, init="random", cost_ratio=2.5)
TINY = ["--width", "8", "--batch", "8", "--horizons", "2", "4", "--points", "2", "--lrs", "1e-3", "2e-3", "--n", "20"]
TINY += ["--init", "random"]


class Quadrants(nn.Module):
    """A judge that sees the mean brightness of a picture's parts."""

    def features(self, pixels):
        return nn.functional.avg_pool2d(pixels, 14).flatten(1)

    def logits(self, pixels):
        return self.features(pixels).repeat(1, 3)[:, :10]


class Digits(script("measuring").Pixels):
    """Random pixels as a whole source: held-out splits and a judge."""

    def __init__(self):
        super().__init__(None, 60)
        self.validation = self.test = Split(self.train.pixels[:40], self.train.labels[:40])
        self.judge, self.scorers, self.held_out = Quadrants(), {}, frozenset()

    def latents(self, split):
        return getattr(self, split).pixels


def curve(distance, seconds=None):
    steps = [10 * (i + 1) for i in range(len(distance))]
    seconds = seconds or [float(s) for s in steps]
    return ttq.Curve(steps, seconds, [s / 2 for s in seconds], distance)


def test_a_distance_counts_when_two_evaluations_in_a_row_have_it():
    assert curve([9.0, 2.0, 9.0, 3.0, 2.0]).reaches(3.0, "wall") == 40
    assert curve([9.0, 2.0, 9.0, 3.0, 2.0]).reaches(3.0, "cpu") == 20
    assert curve([9.0, 9.0, 1.0]).reaches(3.0, "wall") == 30  # the last one has no follower
    assert curve([9.0, math.nan, 4.0]).reaches(3.0, "wall") == math.inf


def test_a_line_compares_at_equal_time():
    curves = {
        "tutorial": [curve([8.0, 4.0])],
        "twinflow": [curve([4.0, 3.0, 2.0, 2.0, 1.0], [2.0, 4.0, 6.0, 8.0, 10.0])],
    }
    line = ttq.line(PLAN, curves, 20, "wall")
    assert (line.reference_seconds, line.reference_distance) == (20, 4.0)
    assert line.contender_distance == 1.0  # 20 tutorial steps cost 50 steps of twinflow
    assert line.ratio == 2 / 20


def test_steps_of_equal_time_and_equal_budgets(tmp_path):
    assert [PLAN.steps(name, 20) for name in ttq.FORMULATIONS] == [20, 50]
    both = [PLAN.settings(name, 1e-3, 0, 20, tmp_path) for name in ttq.FORMULATIONS]
    assert [s.train.steps for s in both] == [20, 50]
    assert [s.evaluation.every for s in both] == [5, 12]
    assert both[0].model == both[1].model
    assert all(s.train.init == "random" and s.train.batch == 8 for s in both)


def test_the_best_rate_is_never_one_that_diverged():
    assert ttq.best_rates({"tutorial": {1e-3: math.nan, 2e-3: 5.0, 4e-3: 7.0}}) == {"tutorial": 2e-3}


@pytest.mark.campaign
def test_a_tiny_study_and_its_continuation(tmp_path, monkeypatch, without_digits, capsys):
    monkeypatch.setattr(ttq, "cost_ratio", lambda width, batch: 2.0)
    out = tmp_path / "study"
    ttq.main([*TINY, "--out", str(out), "--seeds", "1"], Digits())
    first = capsys.readouterr().out
    assert first.count("from step 0") == 6  # 2 rates and 1 seed, for both formulations
    result = json.loads((out / "time_to_quality_wall.json").read_text())
    assert [len(result["curves"][name][0]["steps"]) for name in ttq.FORMULATIONS] == [2, 2]
    assert result["curves"]["twinflow"][0]["steps"][-1] == 8
    assert [line["horizon"] for line in result["lines"]] == [2, 4]
    assert {path.name for path in out.glob("*.png")} == {"time_to_quality_wall.png", "time_to_quality_cpu.png"}
    assert "| tutorial steps |" in (out / "time_to_quality_cpu.md").read_text()

    monkeypatch.setattr(ttq, "cost_ratio", lambda width, batch: pytest.fail("calibrated again"))
    ttq.main([*TINY, "--out", str(out), "--seeds", "2"], Digits())
    assert capsys.readouterr().out.count("from step 0") == 2  # the second seed alone
    again = json.loads((out / "time_to_quality_wall.json").read_text())
    assert again["curves"]["tutorial"][0] == result["curves"]["tutorial"][0]
    with pytest.raises(InputError, match="another plan"):
        ttq.main([*TINY, "--out", str(out), "--batch", "16"], Digits())


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(tmp_path):
    source = Digits()
    plan = replace(PLAN, points=2)
    settings = plan.settings("twinflow", 1e-3, 0, 6, tmp_path)
    protocol = ttq.Study(plan, tmp_path, source).protocol("test")

    class Interrupted(ttq.TimedTrainer):
        def train_step(self):
            self.interrupted = self.step + 1 >= 3
            return super().train_step()

    run = ttq.RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    stopped = Interrupted(settings, run, source, torch.device("cpu"), lambda network, step: {})
    assert stopped.train().status == "interrupted"
    finished = ttq.trained(settings, source, protocol)
    assert finished.result["step"] == 15
    assert [row["step"] for row in ttq.runlog.read(finished.log)] == list(range(1, 16))
