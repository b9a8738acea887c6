"""Time to quality: reading the trials by hand-made examples, and a tiny study that is stopped and continued."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.scripts import script
from twinrl.config.errors import InputError
from twinrl.flow.source import Split

ttq = script("time_to_quality")
COMMON = ["data.source=mnist", "model.network={kind: unet, width: 8}", "train.init=random"]
TINY = ["--rows", "twinflow", "--batch", "8", "--steps", "4", "--points", "2", "--lrs", "1e-3", "2e-3", "--n", "20"]
TINY += ["--common", *COMMON]
PLAN = ttq.Plan(batch=8, steps=4, points=2, n=20, lrs=(1e-3, 2e-3), common=tuple(COMMON))


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


def trial(row, seed, *distances, seconds=None):
    steps = [10 * (i + 1) for i in range(len(distances[0]))]
    return ttq.Trial(
        row, 1e-3, seed, "finished", steps, seconds or [float(s) for s in steps], [list(each) for each in distances]
    )


def compared(*trials):
    rows = {"tutorial": ttq.Row(("tutorial",), 1.0, 100, 40), "lab": ttq.Row(("lab",), 0.5, 20, 80)}
    return ttq.Comparison(rows, trials)


def test_a_distance_counts_when_two_evaluations_in_a_row_have_it():
    one = trial("lab", 0, [9.0, 2.0, 9.0, 3.0, 2.0], [9.0, math.nan, 9.0, 4.0, 1.0])
    assert one.reaches(3.0, 1) == 3
    assert one.reaches(3.0, 2) == 4  # the last one has no follower
    assert one.reaches(0.5, 2) is None


def test_ratios_are_of_the_same_seed_in_seconds_and_in_operations():
    """The reference has its last distance at its third evaluation already, and that is what it is asked for."""
    found = compared(
        trial("tutorial", 0, [9.0, 8.0, 4.0, 4.0], [9.0, 8.0, 7.0, 6.0]),
        trial("tutorial", 1, [9.0, 8.0, 4.0, 2.0], [9.0, 8.0, 7.0, 6.0]),
        trial("lab", 1, [9.0, 3.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0], seconds=[6.0, 12.0, 18.0, 24.0]),
        trial("lab", 0, [9.0, 3.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0], seconds=[6.0, 12.0, 18.0, 24.0]),
    )
    assert found.ratios("lab", 1, "seconds") == [12 / 30, math.inf]
    assert found.ratios("lab", 2, "seconds") == [6 / 40] * 2
    assert found.ratios("lab", 1, "operations") == [20 * 20 / (30 * 100), math.inf]
    assert found.ratios("tutorial", 1, "seconds") == [1.0, 1.0]


def test_a_target_at_the_first_evaluation_is_an_upper_bound():
    found = compared(
        trial("tutorial", 0, [9.0, 4.0], [9.0, 4.0]), trial("lab", 0, [3.0, 3.0], [5.0, 3.0], seconds=[1.0, 2.0])
    )
    assert [found.ratio("lab", evaluations, "seconds") for evaluations in ttq.NFE] == ["≤ 0.05", "0.10"]


def test_a_run_that_diverged_has_no_end():
    one = ttq.Trial("lab", 1e-3, 0, "diverged", [10], [1.0], [[4.0], [4.0]])
    assert one.score == math.inf
    assert ttq.cell([one.end(1), 2.0], "diverged") == "diverged in 1 of 2"


def test_a_miss_is_counted_and_never_averaged():
    assert ttq.cell([0.5, math.inf, math.inf], "not reached") == "not reached in 2 of 3"
    assert ttq.cell([0.5, 2.0], "not reached").startswith("1.00 [")
    assert ttq.cell([0.25], "not reached") == "0.25"


def test_the_best_rate_is_never_one_that_diverged(tmp_path):
    study = ttq.Study(PLAN, {"tutorial": ("tutorial",)}, tmp_path / "r", tmp_path)
    for lr, end in ((1e-3, math.nan), (2e-3, 5.0), (4e-3, 7.0)):
        study.trials.append(ttq.Trial("tutorial", lr, ttq.TUNING_SEED, "finished", [10], [1.0], [[end], [5.0]]))
    assert study.best("tutorial") == 2e-3


def test_all_rows_have_one_network_start_and_batch(tmp_path):
    recipes = {name: recipe for name, recipe in ttq.ROWS.items() if "dmd2" not in recipe}
    study = ttq.Study(PLAN, recipes, tmp_path / "r", tmp_path)
    made = [study.settings(name, 1e-3, 0, 4) for name in recipes]
    assert len({s.model.network.model_dump_json() for s in made}) == 1
    assert {(s.train.init, s.train.batch, s.evaluation.every, s.evaluation.nfe) for s in made} == {
        ("random", 8, 2, (1, 2))
    }


def test_a_row_with_another_recipe_is_refused_unless_it_is_made_again(tmp_path):
    study = ttq.Study(PLAN, {"tutorial": ("tutorial",), "mine": ("rcgm",)}, tmp_path / "r", tmp_path)
    study.rows["mine"] = ttq.Row(("rcgm", "teacher.decay=0.9"), 1.0, 1, 4)
    with pytest.raises(InputError, match="another recipe"):
        study.check()
    study.check(["mine"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--rows", "twinflo"], "row twinflo is unknown"),
        (["--also", "mine"], "--also needs a name and a preset"),
        (["--also", "mine", "lab", "terms.nothing=1"], "terms.nothing"),
        (["--also", "mine", "lab", "share=2"], "share is no part"),
        (["--table"], "is missing"),
    ],
)
def test_wrong_words_are_refused_in_one_line_before_anything_is_trained(tmp_path, capsys, given, told):
    with pytest.raises(SystemExit) as ended:
        ttq.main([*given, "--results", str(tmp_path / "r"), "--out", str(tmp_path / "runs")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_tiny_study_its_continuation_and_its_table(tmp_path, monkeypatch, without_digits, capsys):
    monkeypatch.setattr(
        ttq, "cost", lambda reference, settings, source: (0.2, {"tutorial": 1}.get(settings.name, 0.5), 10)
    )
    results = tmp_path / "results" / "lab"
    study = [*TINY, "--results", str(results), "--out", str(tmp_path / "runs")]
    ttq.main([*study, "--seeds", "1"], Digits())
    assert capsys.readouterr().out.count("from step 0") == 6  # 2 rates and 1 seed, for both rows
    found = json.loads(results.with_suffix(".json").read_text())
    assert [row["steps"] for row in found["rows"].values()] == [4, 8]  # equal time
    assert [one["steps"] for one in found["trials"][-2:]] == [[2, 4], [4, 8]]
    assert "| twinflow |" in (written := results.with_suffix(".md").read_text())

    ttq.main([*study, "--seeds", "2"], Digits())
    assert capsys.readouterr().out.count("from step 0") == 2  # the second seed alone
    again = json.loads(results.with_suffix(".json").read_text())
    assert again["trials"][:6] == found["trials"]
    assert results.with_suffix(".md").read_text() != written

    for path in (results.with_suffix(".md"), results.with_suffix(".png")):
        path.unlink()
    ttq.main(["--table", "--results", str(results)])
    assert "| twinflow |" in results.with_suffix(".md").read_text()
    assert results.with_suffix(".png").is_file()
    capsys.readouterr()

    ttq.main([*study, "--seeds", "2", "--again", "twinflow"], Digits())
    assert capsys.readouterr().out.count("from step 0") == 4
    assert refused([*study, "--batch", "16"]) == 2
    assert "another plan" in capsys.readouterr().err
    assert refused([*study, "--also", "twinflow", "twinflow", "optim.eps=1e-7"]) == 2
    assert "--again twinflow" in capsys.readouterr().err


def refused(words):
    with pytest.raises(SystemExit) as ended:
        ttq.main(words, Digits())
    return ended.value.code


@pytest.mark.slow
def test_a_step_costs_seconds_and_operations(tmp_path, monkeypatch, without_digits):
    monkeypatch.setattr(ttq, "PAIRS", 1)
    study = ttq.Study(PLAN, {"tutorial": ("tutorial",)}, tmp_path / "r", tmp_path, Digits())
    one, twice = (each.settings("tutorial", 1e-3, 0, 4) for each in (study, double(study)))
    made = [ttq.cost(one, other, study.source) for other in (one, twice)]
    assert min(made[0][:2]) > 0
    assert 1.9 < made[1][2] / made[0][2] < 2.1  # twice the rows


def double(study):
    recipes = {"tutorial": ("tutorial",)}
    plan = ttq.Plan(16, *list(vars(PLAN).values())[1:])
    return ttq.Study(plan, recipes, Path(study.results), study.folder, study.source)


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(tmp_path):
    study = ttq.Study(PLAN, {"tutorial": ("tutorial",), "twinflow": ("twinflow",)}, tmp_path / "r", tmp_path, Digits())
    settings = study.settings("twinflow", 1e-3, 0, 8)

    class Interrupted(ttq.TimedTrainer):
        def train_step(self):
            self.interrupted = self.step + 1 >= 3
            return super().train_step()

    run = ttq.RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    stopped = Interrupted(settings, run, study.source, torch.device("cpu"), lambda network, step: {})
    assert stopped.train().status == "interrupted"
    finished = ttq.trained(settings, study.source, study.protocol("test"), lambda: None)
    assert finished.result["step"] == 8
    assert [row["step"] for row in ttq.runlog.read(finished.log)] == list(range(1, 9))
