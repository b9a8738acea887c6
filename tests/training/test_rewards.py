"""Rewards through both routes: what is measured, what rises, what a bad image does, what is refused."""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests import logs
from tests.fake_source import FakeSource, register, small
from tests.rounding import assert_rounded, bound
from tests.training.trainers import CPU, assert_same, finish, kill, make, rows, state
from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.rewards import REWARDS, Reward, keepers
from twinrl.run import names
from twinrl.sampling import few_step, sample
from twinrl.terms import Ascent
from twinrl.training import assembly, schema
from twinrl.training.capsules import Capsules
from twinrl.training.replay import replay
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

GENERATOR = ("terms.reward={branches: [e2e]}",)
FAKE_TARGET = ("terms.adversarial.reward=one_step", "terms.adversarial.loss=l2", "terms.rectify.loss=l2")
ROUTES = {"generator": GENERATOR, "fake_target": FAKE_TARGET}
FEW = "train.steps=4"
HINGE = "{kind: hinge, ceiling: 0, reward: compressibility}"
BRIGHT = ("reward.model=brightness", "reward.gradient={estimator: vae_backprop, eta: 30}")


class Picky(Reward):
    """The mean brightness; nan for every image of one data row's prompt position in each batch, after some calls."""

    class Config(Settings):
        kind: Literal["picky"] = "picky"
        at: int = 1
        since: int = 0

    needs_prompts = False
    calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores, self.calls = images.mean((1, 2, 3)), self.calls + 1
        if self.calls <= self.config.since:
            return scores
        return scores + torch.zeros(len(images)).index_fill(0, torch.tensor([self.config.at]), math.nan)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    monkeypatch.setitem(REWARDS, "picky", Picky)


def rewarded(runs: Path, route: str, *overrides: str) -> RunConfig:
    return small(runs, *ROUTES[route], *BRIGHT, *overrides)


def brightness(trainer: Trainer) -> float:
    """Mean brightness of one-step samples, the same noise for every run."""
    source = FakeSource()
    z = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = source.condition(source.prompts(torch.arange(64) % 2, 0, 0))
    with torch.no_grad():
        return float(source.decode(sample(trainer.objective.teacher.student, z, condition, few_step(1))).mean())


LENGTH = {
    "generator": ("train.steps=20", "optim.lr=3e-3", "reward.gradient.eta=100"),
    "fake_target": ("train.steps=40", "optim.lr=1e-2", "model.network=forked"),
}
"""The detour through the fake branch needs a network that tells the branches apart: while both still rise together,
F(z, 1, 0) rises with them and the samples go the wrong way first (of an mlp of width 64, for over 100 steps). Samples
move by 0.10 to 0.12 on the first route, over three seeds, and by 0.07 to 0.10 on the second one, over five.
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """By how much samples get brighter than those of the same run without reward."""
    folder = tmp_path_factory.mktemp("moved")

    def trained(route: str, *overrides: str) -> float:
        shared = ("evaluation.every=0", "checkpoint.every=1000", "guidance.strength=0", *LENGTH[route])
        runs = Path(tempfile.mkdtemp(dir=folder))
        return brightness(finish(rewarded(runs, route, *shared, *overrides)))

    without = cache(lambda route: trained(route, "reward.schedule.weight=0"))
    return lambda route, *overrides: trained(route, *overrides) - without(route)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sign", [1, -1])
def test_samples_move_to_where_the_reward_points(moved: Callable[..., float], route: str, sign: int) -> None:
    """With the reward's sign flipped they move the other way."""
    model = f"reward.model={{kind: ensemble, rewards: {{b: {{reward: brightness, weight: {sign}}}}}}}"
    assert sign * moved(route, model) > 0.02


ESTIMATORS = {
    "autograd": "autograd",
    "random_direction": "{kind: random_direction, directions: 24, epsilon: 0.05}",
    "antithetic": "{kind: antithetic, directions: 12, epsilon: 0.05}",
    "orthogonal": "{kind: orthogonal, directions: 24, epsilon: 0.05}",
    "spsa": "{kind: spsa, directions: 12, epsilon: 0.05}",
}  # vae_backprop is what the test above uses


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("route", ["generator", pytest.param("fake_target", marks=pytest.mark.campaign)])
def test_every_estimator_ascends(moved: Callable[..., float], route: str, estimator: str) -> None:
    assert moved(route, f"reward.gradient.estimator={ESTIMATORS[estimator]}") > 0.01


def first_scores(settings: RunConfig) -> float:
    """Mean brightness of the one-step samples that the first batch's pull acts on, recomputed."""
    trainer, source = make(settings), FakeSource()
    batch = trainer.feed.batch(0, 0).batch
    (term,) = [term for term in trainer.objective.terms.values() if term.wants_reward(term.config)]
    rows = batch.on(term.config.branches)
    z = rows.z if term.config.kind == "reward" else rows.normal("fake sample")
    with torch.no_grad():
        one, student = torch.ones(len(z)), trainer.objective.teacher.student
        images = source.decode(z - student(z, one, torch.zeros_like(one), rows.c))
    return float(images.mean())


@pytest.mark.parametrize("route", ROUTES)
def test_the_reward_is_measured_and_clipped_under_its_own_name(tmp_path: Path, route: str) -> None:
    trainer = finish(rewarded(tmp_path / "a", route, FEW))
    free, parameters = rows(trainer), sum(p.numel() for p in trainer.engine.parameters)
    clipped = rows(finish(rewarded(tmp_path / "b", route, FEW, "gradients.terms.reward.clip.max_norm=1e-3")))
    for row in free:
        terms = [n.split("/")[1] for n in row if n.endswith("/share")]
        assert set(terms) == {"base", "adversarial", "rectify", "reward"}
        whole = sum(row[names.grad(t, "norm_raw")] for t in terms) / row[names.GRAD_TOTAL_RAW]  # before it cancels
        assert sum(row[names.grad(t, "share")] for t in terms) == pytest.approx(1, abs=bound(parameters, whole))
        assert row[names.REWARD_GRAD_NORM] > 0
    norms = {row[names.grad("reward", "norm_raw")] for row in free}
    assert min(norms) > 1e-3
    assert len(norms) == len(free)
    assert all(r[names.grad("reward", "norm_clipped")] == pytest.approx(1e-3, rel=1e-3) for r in clipped)
    assert all(r[names.grad("reward", "clip_coef")] < 1 for r in clipped)
    assert free[0][names.REWARD_MEAN] == pytest.approx(
        first_scores(rewarded(tmp_path / "c", route, FEW)), abs=bound(64)
    )
    assert any(f"grad/cos/reward__{t}" in free[0] or f"grad/cos/{t}__reward" in free[0] for t in ("base", "rectify"))


def test_fake_target_parts_sum_to_the_adversarial_gradient(tmp_path: Path) -> None:
    """Both parts are linear of one loss, under the Barron loss too."""
    trainer = make(small(tmp_path, "terms.adversarial.reward=fake_row", *BRIGHT))
    batch = trainer.feed.batch(0, 0).batch
    counts = {name: len(r) for name, r in batch.branch.items()}
    evaluation = trainer.objective.evaluate(batch, counts, separate=True)
    loss = evaluation.loss("adversarial")
    (F,) = evaluation.outputs[-1:]
    whole, own, reward = (
        torch.autograd.grad(pull, F, retain_graph=True)[0]
        for pull in (loss.loss, loss.parts["adversarial"], loss.parts["reward"])
    )
    assert_rounded(own + reward, whole, roundings=64, scale=float(torch.max(own.abs().max(), reward.abs().max())))
    g = trainer.objective.reward
    assert g is not None
    direction = -reward.flatten(1)
    rows_, query = evaluation.queries()["adversarial"]
    wanted = g(query.x - query.t.abs().view(-1, 1, 1, 1) * F.detach(), rows_).g.flatten(1)
    assert torch.cosine_similarity(direction, wanted, dim=1).min() > 0.9999


def test_weight_schedule_and_learning_rate_follow_the_configuration(tmp_path: Path) -> None:
    schedule = "reward.schedule={weight: {kind: hard, final: 2, start: 50%}, lr_factor: 0.5}"
    logged = rows(finish(rewarded(tmp_path, "generator", schedule)))
    assert [row[names.REWARD_WEIGHT] for row in logged] == [0.0] * 6 + [2.0] * 6
    assert [row[names.LR] for row in logged] == [3e-3] * 6 + [1.5e-3] * 6
    assert [row[names.grad("reward", "norm_raw")] > 0 for row in logged] == [False] * 6 + [True] * 6
    assert [names.REWARD_MEAN in row for row in logged] == [False] * 6 + [True] * 6


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["training", "rectify", "fake"])
def test_renoise_changes_its_own_times_only(tmp_path: Path, placement: str) -> None:
    law = f"renoise={{kind: beta, alpha: {{kind: linear, initial: 8, final: 1, end: 50%}}, placement: [{placement}]}}"
    trainer = make(small(tmp_path, law))
    plain = make(small(tmp_path / "plain"))
    shaped, uniform = (made.feed.batch(0, 0).batch for made in (trainer, plain))
    changed = {
        "training": not torch.equal(shaped.rows.t, uniform.rows.t),
        "rectify": not torch.equal(shaped.rows.time("rectify", "x"), uniform.rows.time("rectify", "x")),
        "fake": not torch.equal(shaped.rows.time("fake", "x"), uniform.rows.time("fake", "x")),
    }
    assert changed == {name: name == placement for name in changed}
    drawn = trainer.feed.renoise_times(seed=0)  # for the picture
    means = [float(times.mean()) for times in drawn.values()]
    assert means == pytest.approx([8 / 9, 0.85, 0.77, 0.5, 0.5, 0.5], abs=0.03)
    assert plain.feed.renoise_times(seed=0) == {}
    late, late_uniform = (made.feed.batch(8, 0).batch for made in (trainer, plain))
    assert torch.equal(late.rows.t, late_uniform.rows.t)  # Beta(1, 1) gives the uniform itself
    logged = rows(finish(small(tmp_path / "run", law)))
    assert [row[names.RENOISE_ALPHA] for row in logged[:2]] == pytest.approx([8, 8 - 7 / 6])
    assert logged[-1][names.RENOISE_T_MEAN] == 0.5


@pytest.mark.slow
def test_an_image_without_a_score_is_an_event_and_poisons_nothing(tmp_path: Path) -> None:
    settings = small(tmp_path, *GENERATOR, "reward.model=picky", "stability.policy=stop", "train.steps=3")
    trainer = finish(settings)  # not even under a stop policy: the step is healthy
    assert all(v.isfinite().all() for v in state(trainer).values())
    (event,) = logs.events(trainer.run)  # one line for the episode, and one capsule
    assert (event["step"], event["kind"], event["terms"], event["value"]) == (1, "unscored", ["reward"], 0.25)
    fresh = make(settings)
    data_rows, batch, *_ = fresh.feed.batch(0, 0)
    assert event["rows"] == [int(data_rows[batch.branch["e2e"][1]])]
    assert fresh.guide is not None
    assert [bool(g.any()) for g in fresh.guide(batch.rows.z, batch.rows).g] == [i != 1 for i in range(len(batch.rows))]
    assert f"not finite for data row {event['rows'][0]} at step 1" in event["message"]
    assert [row[names.REWARD_NONFINITE] for row in rows(trainer)] == [0.25] * 3
    assert Capsules(trainer.run.path, settings.stability.capsules).numbers() == [1]
    again = replay(trainer.run, 1, ["reward.model=brightness"], lambda _: (FakeSource(), CPU), after=1)
    assert [again.recurs(trace) for trace in again.traces] == [True, False]


def test_an_unscored_image_does_not_speak_for_what_stopped_the_run(tmp_path: Path) -> None:
    spike = ("terms.planted={at: 9, row: 9, branches: [any]}", "stability={spike: stop, watch: {spike: {warmup: 4}}}")
    trainer = make(small(tmp_path, *GENERATOR, "reward.model={kind: picky, since: 9}", *spike))
    outcome = trainer.train()
    assert (outcome.status, outcome.step) == ("diverged", 10)
    assert [event["kind"] for event in logs.events(trainer.run)] == ["spike", "unscored"]
    assert outcome.message.startswith("spike of grad/planted/norm_raw at step 10")


def test_a_constant_reward_pulls_exactly_nowhere_unless_the_round_trip_does(tmp_path: Path) -> None:
    flat = "reward.model={kind: ensemble, rewards: {b: {reward: brightness, weight: 0}}}"
    ascents = {}
    for baseline in ("decoded", "latent"):
        gradient = f"reward.gradient={{estimator: autograd, baseline: {baseline}, eta: 1}}"
        trainer = make(small(tmp_path / baseline, *GENERATOR, flat, gradient))
        batch = trainer.feed.batch(0, 0).batch
        assert trainer.guide is not None
        ascent: Ascent = trainer.guide(3 * batch.rows.z, batch.rows)  # beyond ±1, where this codec clips
        ascents[baseline] = ascent.g
    assert (ascents["decoded"] == 0).all()
    assert ascents["latent"].abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_resume_is_exact(tmp_path: Path, route: str) -> None:
    more = ("train.steps=9", "reward.gradient={estimator: {kind: random_direction, quantise: true}, eta: 5}",
            "gradients.terms.reward.relative.ratio=0.3", "gradients.terms.base.zclip.warmup=3",
            "renoise.alpha={kind: cosine, initial: 4, final: 1, end: 70%}")  # fmt: skip
    undisturbed = finish(rewarded(tmp_path / "a", route, *more))
    disturbed = rewarded(tmp_path / "b", route, *more)
    kill(disturbed, 7)
    assert_same(finish(disturbed), undisturbed)


# --- statistics of scores ------------------------------------------------------------------------------------------

PER_PROMPT = "reward.model={kind: per_prompt, least: 4, decay: 1, reward: %s}"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("micro", ["train.micro_batch=null", "train.micro_batch=3"])
def test_per_prompt_counts_every_image_of_a_step_once(tmp_path: Path, route: str, micro: str) -> None:
    """However often the engine asks for an ascent; and none of validation's."""
    settings = rewarded(tmp_path, route, FEW, PER_PROMPT % "brightness", micro, "evaluation.objective=true")
    trainer = finish(settings)
    logged, reward = rows(trainer), trainer.guide.state()  # type: ignore[union-attr]
    raw, normalised = ([row[name] for row in logged] for name in ("reward/mean_of_reward", names.REWARD_MEAN))
    batch = trainer.feed.batch(0, 0).batch
    each = len(batch.branch["e2e"] if route == "generator" else batch.on(settings.terms["adversarial"].branches))
    assert reward["pooled"]["count"] == each * settings.train.steps
    assert reward["pooled"]["mean"] == pytest.approx(sum(raw) / len(raw), abs=bound(each, max(map(abs, raw))))
    assert sum(known["count"] for known in reward["known"].values()) == reward["pooled"]["count"]
    assert set(reward["known"]) == {"a dark picture", "a bright picture"}
    assert normalised[0] == raw[0]  # a step is normalised by those before it
    assert all(abs(n - r) > 1e-3 for n, r in zip(normalised[1:], raw[1:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_per_prompt_does_not_depend_on_micro_batches(tmp_path: Path, route: str) -> None:
    more = (FEW, PER_PROMPT % "brightness", "optim.eps=1", "train.precision=float64")
    whole, parts = (
        finish(rewarded(tmp_path / str(n), route, *more, f"train.micro_batch={n}")).guide.state()  # type: ignore[union-attr]
        for n in (16, 3)
    )
    assert set(whole["known"]) == set(parts["known"]) == {"a dark picture", "a bright picture"}
    for prompt, statistics in whole["known"].items():
        # scores are in float32: a sample that differs in its last bit of float64 may round the other way
        assert parts["known"][prompt] == pytest.approx(statistics, abs=bound(8))


def test_per_prompt_takes_what_processes_and_micro_batches_have_in_any_order(tmp_path: Path) -> None:
    model = "reward.model={kind: ensemble, rewards: {x: {reward: {kind: per_prompt, reward: brightness}}}}"
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0)) ** 9
    captions, order = [f"prompt {i % 3}" for i in range(16)], torch.randperm(16)
    states = []
    for at in (torch.arange(16).split(16), order.split(5)):
        guide = make(rewarded(tmp_path, "generator", model)).guide
        assert guide is not None
        keepers.observe(guide.reward, [(rows_, {"reward/mean_of_x.reward": scores[rows_]}) for rows_ in at], captions)
        states.append(guide.state())
    assert states[0] == states[1]
    assert states[0]["x"]["pooled"]["mean"] == pytest.approx(float(scores.mean()))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_resume_with_statistics_is_exact(tmp_path: Path, route: str) -> None:
    undisturbed = finish(rewarded(tmp_path / "a", route, "train.steps=9", PER_PROMPT % "brightness"))
    disturbed = rewarded(tmp_path / "b", route, "train.steps=9", PER_PROMPT % "brightness")
    kill(disturbed, 7)
    assert_same(finish(disturbed), undisturbed)


def test_an_image_without_a_score_stays_out_of_the_statistics(tmp_path: Path) -> None:
    ceiling = f"{{kind: hinge, ceiling: 9, reward: {PER_PROMPT.partition('=')[2] % 'picky'}}}"
    trainer = finish(small(tmp_path, *GENERATOR, f"reward.model={ceiling}", "train.steps=3"))
    statistics = trainer.guide.state()["reward"]["pooled"]  # type: ignore[union-attr]
    assert statistics["count"] == 3 * 3  # of four images in each step
    assert all(map(math.isfinite, statistics.values()))
    assert [row[names.REWARD_NONFINITE] for row in rows(trainer)] == [0.25] * 3


@pytest.mark.parametrize("accumulated", [False, True])
def test_the_relative_clip_bounds_the_reward_by_the_others(tmp_path: Path, accumulated: bool) -> None:
    more = ("gradients.terms.reward.relative.ratio=0.25", *(("train.micro_batch=4",) if accumulated else ()))
    strong = "reward.gradient={estimator: vae_backprop, eta: 1e4}"
    logged = rows(finish(rewarded(tmp_path, "generator", FEW, strong, *more)))
    for row in logged:
        total, clipped = row[names.GRAD_TOTAL_RAW], row[names.grad("reward", "norm_clipped")]
        assert row[names.grad("reward", "clip_coef")] < 1
        assert clipped < 0.25 / 0.75 * total * 1.01  # ‖others‖ ≤ ‖total‖ + ‖reward‖


@pytest.mark.parametrize("preset", ["published", "corrected", "recommended"])
def test_presets_run_with_everything_on(tmp_path: Path, preset: str) -> None:
    shared = (FEW, "stability.policy=record", "reward.schedule.weight=1", "reward.model=brightness")
    trainer = make(small(tmp_path, *shared, "evaluation.guided=null", preset=preset))
    assert trainer.train().status == "finished"
    logged = rows(trainer)
    assert all(row["grad/reward/norm_raw"] > 0 for row in logged)
    if preset == "published":
        assert math.isfinite(logged[-1][names.VAL_OBJECTIVE])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (GENERATOR, "terms.reward follows a reward and there is none; fix: reward.model"),
        (("reward.model=lab_hps",), "reward is configured and no term follows it"),
        ((*GENERATOR, "reward.model=lab_hsp"), r"reward.model.*unknown reward 'lab_hsp'.*lab_hps"),
        ((*GENERATOR, *BRIGHT, "reward.gradient.estimator=autodiff"), "unknown gradient estimator 'autodiff'"),
        ((*GENERATOR, *BRIGHT, "reward.gradient.estimator={kind: random_direction, directions: 0}"), "directions"),
        ((*GENERATOR, *BRIGHT, "reward.gradient.estimator={kind: random_direction, epsilon: 0}"), "epsilon"),
        ((*GENERATOR, *BRIGHT, "reward.schedule.weight={kind: linear, final: 1, start: 50%, end: 20%}"), "before"),
        ((*GENERATOR, *BRIGHT, "reward.schedule.weight={kind: linear, final: 1, start: 8, end: 20%}"), "before it"),
        ((*GENERATOR, *BRIGHT, "reward.schedule.weight={kind: hard, final: 1, start: after_renoise}"), "no renoise"),
        (("renoise={kind: beta, placement: [somewhere]}",), "renoise.placement"),
        ((*GENERATOR, *BRIGHT, "terms.reward.loss=barron"), "would erase the size"),
        (
            (
                *GENERATOR,
                f"reward.model={{kind: ensemble, rewards: {{a: {{reward: {HINGE}}}}}}}",
            ),
            "reward: estimator autograd needs a differentiable reward, and ensemble is none; fix: use random_direction",
        ),
        (
            (*GENERATOR, "reward={model: compressibility, gradient: {estimator: spsa}, compare_every: 5}"),
            "compare_every needs a differentiable reward, and compressibility is none",
        ),
        ((*GENERATOR, *BRIGHT, "gradients.terms.rewards.clip.max_norm=1"), "gradients.terms.rewards: there is no such"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        small(tmp_path, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("reward.model={kind: aesthetic, checkpoint: nowhere.pth}",), "nowhere.pth"),
        (("reward.model=lab_hps",), "no scorer lab_hps"),
    ],
)
def test_a_reward_that_does_not_fit_is_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(small(tmp_path, *GENERATOR, *overrides)).train()
    assert "\n" not in str(caught.value)


def test_held_out_rewards_are_built_for_judging_only(tmp_path: Path) -> None:
    settings = schema.load("twinflow", [*GENERATOR, *BRIGHT, "reward.held_out={sharp: sharpness}"])
    assert set(assembly.provider_of(settings, FakeSource(), CPU).judges()) == {"sharp"}
