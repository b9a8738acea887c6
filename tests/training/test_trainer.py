"""The loop: repeatable, resumable bit for bit, undisturbed by validation, honest about what is not finite."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import logs
from tests.fake_source import FakeSource, register, small
from tests.rounding import bound
from tests.training.trainers import CPU, At, assert_same, finish, kill, make, rows, state, weight_size
from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.run import checkpoints, layout, names, runlog
from twinrl.training import assembly
from twinrl.training.pictures import Validator
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Outcome, Trainer

DROPPING = "model.network={kind: dropping}"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def differ(a: Trainer, b: Trainer) -> bool:
    return any(not torch.equal(v, state(b)[k]) for k, v in state(a).items() if k.startswith("student"))


# --- repeatable and resumable --------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = finish(small(tmp_path / "a", DROPPING))
    torch.manual_seed(2)
    b, other = (finish(small(tmp_path / "b", DROPPING, f"seed={seed}")) for seed in (0, 1))
    assert_same(a, b)
    assert differ(a, other)


TEACHERS = {
    "ema": "teacher.kind=ema",
    "frozen": "teacher.kind=frozen",
    "live": "teacher={kind: live, allow_live: true}",
    "ema, frozen guidance": "teacher={kind: ema, guidance: frozen}",
}
VARIANTS = {
    **{f"{o}, {k}": (f"optim.kind={o}", t) for o in ("adam", "adamw", "radam") for k, t in TEACHERS.items()},
    "plateau": ("lr_policy={kind: plateau, patience: 1, threshold: 0.5}", "evaluation.every=2"),
    "dropout": (DROPPING,),
    "dropout in micro-batches": (DROPPING, "train.micro_batch=7"),
    "image-free": (DROPPING, "data.images=false"),
    "bf16": ("train.precision=bf16",),
    "target time hidden": ("model.target_time=false",),
    "clipped, warm-up": ("gradients.total.clip.max_norm=0.1", "lr_policy.warmup=6", "optim.weight_decay=0.1"),
}


CAMPAIGN = [f"{o}, {k}" for o in ("adam", "radam") for k in TEACHERS if k != "ema"]
"""An optimizer does not know which teacher there is: each of both is resumed once without these."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.campaign if v in CAMPAIGN else ()) for v in VARIANTS]
)
def test_resume_equals_an_undisturbed_run(tmp_path: Path, variant: str) -> None:
    undisturbed = finish(small(tmp_path / "a", *VARIANTS[variant]))
    settings = small(tmp_path / "b", *VARIANTS[variant])
    for step in (3, 8, 11):  # before the first checkpoint, between two, after the last; each goes back
        kill(settings, step)
        torch.manual_seed(step)
    assert_same(finish(settings), undisturbed)


@pytest.mark.slow
def test_resume_with_permuted_null_and_second_order_terms(tmp_path: Path) -> None:
    undisturbed = finish(small(tmp_path / "a", preset="tutorial"))
    settings = small(tmp_path / "b", preset="tutorial")
    kill(settings, 7)
    assert_same(finish(settings), undisturbed)


def test_plateau_has_cut_the_rate(tmp_path: Path) -> None:
    logged = [row[names.LR] for row in rows(finish(small(tmp_path, *VARIANTS["plateau"])))]
    assert logged[0] == pytest.approx(3e-3)
    assert logged[-1] < logged[0] / 4


@pytest.mark.slow
def test_interruption_saves_and_goes_on(tmp_path: Path) -> None:
    undisturbed = finish(small(tmp_path / "a"))
    settings = small(tmp_path / "b")
    trainer = make(settings)
    trainer.observers.append(At(7, lambda: setattr(trainer, "interrupted", True)))
    assert trainer.train() == Outcome("interrupted", 7)
    assert checkpoints.load_state(trainer.run.newest_checkpoint())["step"] == 7
    assert_same(finish(settings), undisturbed)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = finish(small(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in first.run.checkpoints.rglob("*")}
    assert_same(finish(small(tmp_path)), first)
    assert {path: path.stat().st_mtime_ns for path in first.run.checkpoints.rglob("*")} == before


@pytest.mark.slow
def test_iteration_and_step_count_without_gap(tmp_path: Path) -> None:
    settings = small(tmp_path)
    kill(settings, 9)
    logged = rows(finish(settings))
    assert [row["iteration"] for row in logged] == list(range(12))
    assert [row["step"] for row in logged] == list(range(1, 13))


def test_observers_hear_of_durable_bytes_only(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []

    class Listener(At):
        def after_checkpoint(self, offset: int) -> None:
            saved = checkpoints.load_state(trainer.run.newest_checkpoint())
            heard.append((saved["step"], len(list(runlog.rows(trainer.run.log, stop=offset)))))

    trainer = make(small(tmp_path))
    trainer.observers.append(Listener(0, lambda: None))
    trainer.train()
    assert heard == [(5, 5), (10, 10), (12, 12)]


# --- the same numbers by other ways ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_average_is_judged(tmp_path: Path) -> None:
    trainer = finish(small(tmp_path))
    teacher, judged = trainer.objective.teacher, rows(trainer)[-1][names.VAL_QUALITY]
    assert teacher.ema is not None
    assert judged == weight_size(teacher.ema, 12)[names.VAL_QUALITY]
    assert judged != weight_size(teacher.student, 12)[names.VAL_QUALITY]


@pytest.mark.slow
def test_validation_leaves_training_unchanged(tmp_path: Path) -> None:
    """The real protocol, with a network whose dropout and a scorer that draws from the global stream."""
    trained = []
    for every in (0, 1, 5):
        settings = small(tmp_path, DROPPING, f"evaluation.every={every}")
        source = FakeSource(scorers={"noisy": lambda pixels, prompts: torch.randn(len(pixels))})
        validate = Validator(assembly.provider_of(settings, source, CPU), RunDirectory(settings.directory))
        trained.append(finish(settings, validate=validate, source=source))
    never, always, sometimes = trained
    for other in (always, sometimes):
        assert not differ(never, other)
        for a, b in zip(rows(never)[:-1], rows(other)[:-1], strict=True):
            assert {k: v for k, v in b.items() if not k.startswith("val/")} == a


@pytest.mark.parametrize("preset", ["twinflow", "tutorial", "simpletuner"])
@pytest.mark.parametrize("micro_batch", [5, 8])
def test_micro_batches_equal_the_full_batch(tmp_path: Path, preset: str, micro_batch: int) -> None:
    options = "train.steps=1", "optim.eps=1", "model.network={kind: dropping, p: 0}", "train.precision=float64"
    full = finish(small(tmp_path, *options, preset=preset))
    parts = finish(small(tmp_path, *options, f"train.micro_batch={micro_batch}", preset=preset))
    expected, got = state(full), state(parts)
    assert any(v.abs().max() > 1e-3 for k, v in expected.items() if k.endswith("exp_avg"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert rows(parts)[0] == pytest.approx(rows(full)[0], rel=1e-9, abs=1e-12)


def test_micro_batches_without_rows_of_any_term_are_passed_over(tmp_path: Path) -> None:
    options = "train.steps=1", "branches={mul: 1, any: 1}", "train.precision=float64"
    full = finish(small(tmp_path, *options, preset="rcgm"))
    parts = finish(small(tmp_path, *options, "train.micro_batch=1", preset="rcgm"))
    assert rows(parts)[0] == pytest.approx(rows(full)[0], rel=1e-9, abs=1e-12)


def test_image_free_training_never_looks_at_the_images(tmp_path: Path) -> None:
    class Blank(FakeSource):
        def latents(self, split: str) -> Tensor:
            return torch.full_like(super().latents(split), math.nan)

    free = finish(small(tmp_path, "data.images=false"), source=Blank())
    assert all(math.isfinite(row[names.LOSS_TOTAL]) for row in rows(free))
    assert make(small(tmp_path), source=Blank()).train().status == "diverged"


def test_fewer_rows_train_on_the_first_alone(tmp_path: Path) -> None:
    class HalfBlank(FakeSource):
        def latents(self, split: str) -> Tensor:
            known = super().latents(split)
            known[20:] = math.nan
            return known

    finish(small(tmp_path, "data.rows=20"), source=HalfBlank())
    assert make(small(tmp_path), source=HalfBlank()).train().status == "diverged"
    assert small(tmp_path, "data.rows=null").hash == small(tmp_path).hash != small(tmp_path, "data.rows=20").hash
    with pytest.raises(InputError) as error:
        make(small(tmp_path, "data.rows=41"))
    assert "data.rows" in one_line(error)
    assert "at most 40" in one_line(error)


@pytest.mark.slow
def test_bf16_keeps_weights_and_losses_in_float32(tmp_path: Path) -> None:
    full, mixed = (finish(small(tmp_path, f"train.precision={p}")) for p in ("float32", "bf16"))
    assert {v.dtype for v in state(mixed).values()} == {torch.float32}
    assert differ(full, mixed)
    a, b = (rows(t)[0][names.LOSS_TOTAL] for t in (full, mixed))
    assert b == pytest.approx(a, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        "{kind: dropping, p: 0}",
        "mlp",
    ],
)
def test_float64_is_float64_throughout(tmp_path: Path, network: str) -> None:
    network = "model.network=" + (network if network.startswith("{") else f"{{kind: {network}, width: 16, depth: 1}}")
    settings = small(tmp_path, "train.precision=float64", network)
    validate = Validator(assembly.provider_of(settings, FakeSource(), CPU), RunDirectory(settings.directory))
    precise = finish(settings, validate=validate)
    assert {v.dtype for k, v in state(precise).items() if not k.endswith(".step")} == {torch.float64}
    single = finish(small(tmp_path, network))
    a, b = (rows(trainer)[0][names.LOSS_TOTAL] for trainer in (precise, single))  # before any update: rounding alone
    assert 0 < abs(a - b) < 1e-3 * abs(a)


def test_clipped_norm_equals_the_threshold(tmp_path: Path) -> None:
    adam = "optim={kind: adam, betas: [0.5, 0.99]}"
    trainer = finish(small(tmp_path, adam, "gradients.total.clip.max_norm=0.01", "train.steps=1"))
    row = rows(trainer)[0]
    assert row[names.GRAD_TOTAL_RAW] > 0.02
    moments = torch.cat([v.flatten() for k, v in state(trainer).items() if k.endswith("exp_avg")])
    off = bound(len(moments))
    assert row[names.GRAD_TOTAL_CLIPPED] == pytest.approx(0.01, rel=off)
    assert moments.norm().item() == pytest.approx(0.5 * 0.01, rel=off)


def test_a_clip_leaves_an_infinite_gradient_alone(tmp_path: Path) -> None:
    """One infinite entry must stay the only one: scaling by inf/inf would hide where it came from."""
    trainer = make(small(tmp_path, "gradients.total.clip.max_norm=1"))
    parameters = list(trainer.objective.teacher.student.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad.view(-1)[0] = math.inf
    assert trainer.engine._finish(0)[names.GRAD_TOTAL_RAW].isinf()
    assert sum(int((~p.grad.isfinite()).sum()) for p in parameters) == 1


def test_an_infinite_gradient_is_not_logged_as_clipped(tmp_path: Path) -> None:
    trainer = make(small(tmp_path, "gradients.total.clip.max_norm=1"))
    for parameter in trainer.objective.teacher.student.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    norms = trainer.engine._finish(0)
    assert norms[names.GRAD_TOTAL_RAW].isinf()
    assert norms[names.GRAD_TOTAL_CLIPPED].isinf()


# --- what is not finite, and stopping -------------------------------------------------------------------------------


def poisoned(tmp_path: Path, policy: str) -> RunConfig:
    return small(
        tmp_path, "terms.poison={at: 6, branches: [mul]}", f"stability.policy={policy}", preset="flow_matching"
    )


def test_record_policy_goes_on(tmp_path: Path) -> None:
    trainer = finish(poisoned(tmp_path, "record"))
    logged = rows(trainer)
    assert [row["loss/poison"] == "nan" for row in logged] == [False] * 6 + [True] * 6
    assert [names.event("nonfinite") in row for row in logged] == [False] * 6 + [True] + [False] * 5
    events = logs.events(trainer.run)
    assert [event["kind"] for event in events] == ["nonfinite", "diverged"]  # one for the episode, and the outcome
    first = events[0]
    assert (first["step"], first["iteration"], first["kind"], first["terms"]) == (7, 6, "nonfinite", ["poison"])
    assert sorted(first["rows"]) == sorted(draws.shuffled_rows(40, 16, seed=0, step=6).tolist())
    assert "loss/poison" in first["message"]
    assert all(math.isnan(row["loss/poison"]) for row in runlog.read(trainer.run.log)[6:])


def test_a_resume_neither_loses_nor_repeats_events(tmp_path: Path) -> None:
    settings = poisoned(tmp_path, "record")
    kill(settings, 9)
    logged = logs.events(finish(settings).run)
    assert [(event["step"], event["kind"]) for event in logged] == [(7, "nonfinite"), (7, "diverged")]


@pytest.mark.parametrize("name", [layout.LOG, layout.EVENTS, layout.START])
def test_what_the_end_of_a_run_will_read_is_read_before_it_goes_on(tmp_path: Path, name: str) -> None:
    settings = poisoned(tmp_path, "record")
    kill(settings, 11)
    path = settings.directory / name
    if name == layout.START:
        path.write_text("[]")
    else:
        first, *others = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"x" * (len(first) - 1) + b"\n" + b"".join(others))
    before = {file: file.read_bytes() for file in settings.directory.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=name):
        make(settings)
    assert {file: file.read_bytes() for file in settings.directory.rglob("*") if file.is_file()} == before


def test_event_names_only_the_term_at_fault(tmp_path: Path) -> None:
    settings = small(tmp_path, "terms.poison={at: 2, branches: [any]}", "train.steps=3", "stability.policy=record")
    event = logs.events(finish(settings).run)[0]
    assert event["terms"] == ["poison"]


def test_stop_policy_keeps_the_last_healthy_checkpoint(tmp_path: Path) -> None:
    trainer = make(poisoned(tmp_path, "stop"))
    outcome = trainer.train()
    assert (outcome.status, outcome.step) == ("diverged", 7)
    assert "loss/poison" in outcome.message
    healthy = checkpoints.load(trainer.run.newest_checkpoint())
    assert healthy.state["step"] == 5
    assert all(v.isfinite().all() for part in healthy.tensors.values() for v in part.values())
    assert [row["step"] for row in rows(trainer)] == list(range(1, 8))
    again = make(poisoned(tmp_path, "stop"))
    assert again.step == 5
    assert again.train() == outcome
    assert rows(again) == rows(trainer)
    assert len(logs.events(again.run)) == 2


STOPPING = "early_stop.patience=2", "evaluation.every=2"


def never_better(network: torch.nn.Module, step: int) -> dict[str, float]:
    return {names.VAL_QUALITY: 1.0}


def test_early_stop(tmp_path: Path) -> None:
    settings = small(tmp_path, *STOPPING)
    trainer = make(settings, validate=never_better)
    outcome = trainer.train()
    assert (outcome.status, outcome.step) == ("stopped", 6)
    assert checkpoints.load_state(trainer.run.newest_checkpoint())["step"] == 6
    again = make(settings, validate=never_better)  # killed after the checkpoint, before the result was written
    assert again.train() == outcome
    assert rows(again) == rows(trainer)


def test_early_stop_is_not_asked_at_the_end(tmp_path: Path) -> None:
    settings = small(tmp_path, *STOPPING, "train.steps=6")
    assert make(settings, validate=never_better).train().status == "finished"


# --- starts ---------------------------------------------------------------------------------------------------------


def test_start_weights(tmp_path: Path) -> None:
    teacher, fresh = (make(small(tmp_path, f"train.init={init}")) for init in ("teacher", "random"))
    assert differ(teacher, fresh)
    student = teacher.objective.teacher.student
    for name, value in FakeSource().teacher_weights(student, "").items():
        assert torch.equal(student.state_dict()[name], value)


@pytest.mark.slow
def test_start_from_another_run_and_resume_without_it(tmp_path: Path) -> None:
    first = finish(small(tmp_path / "first"))
    settings = small(tmp_path / "second", f"train.init={first.run.path}", "seed=5")
    started = make(settings)
    ema = first.objective.teacher.ema.state_dict()
    assert all(torch.equal(v, ema[k]) for k, v in started.objective.teacher.student.state_dict().items())
    kill(settings, 8)
    shutil.rmtree(first.run.path)
    assert make(settings).step == 5


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_start_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        make(small(tmp_path, "train.init=techer"))
    assert "train.init" in one_line(error)
    assert "expected teacher, random, or the directory of a run" in one_line(error)


def test_start_from_another_architecture(tmp_path: Path) -> None:
    first = finish(small(tmp_path / "first"))
    with pytest.raises(InputError) as error:
        make(small(tmp_path / "second", f"train.init={first.run.path}", "model.network.width=24"))
    assert "of another shape" in one_line(error)
    assert "step-00000012" in one_line(error)


def test_network_that_cannot_tell_the_branches_apart_is_refused(tmp_path: Path) -> None:
    blind = "model.network={kind: unsigned}"
    with pytest.raises(InputError) as error:
        make(small(tmp_path, blind))
    assert "unsigned" in one_line(error)
    assert "fix: embed the sign of t" in one_line(error)
    finish(small(tmp_path, blind, preset="flow_matching"))  # no term at negative time


def test_sizes_that_do_not_fit_the_latents(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        make(small(tmp_path, "model.network={kind: dit, patch: 3}"))
    assert "patch 3" in one_line(error)
    assert "2×4×4" in one_line(error)


def test_other_data_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    settings = small(tmp_path)
    kill(settings, 8)
    with pytest.raises(InputError) as error:
        make(settings, source=FakeSource(content_hash="other"))
    assert "data of digits have changed" in one_line(error)


def test_a_validation_batch_that_is_not_finite_is_told_and_the_rate_follows_the_published_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published run took such a batch for 0: 2 is the mean of 1, 0, 3 and 4."""
    policy = "lr_policy={kind: plateau, monitor: objective}"
    trainer = make(small(tmp_path, "train.steps=4", "evaluation.objective=true", policy))
    seen: list[float] = []
    monkeypatch.setattr(trainer, "objective_on_validation", lambda: torch.tensor([1.0, math.nan, 3.0, 4.0]))
    monkeypatch.setattr(trainer.lr_policy, "observe", seen.append)
    trainer.train()
    last = rows(trainer)[-1]
    assert (str(last[names.VAL_OBJECTIVE]), last[names.VAL_OBJECTIVE_NONFINITE], seen) == ("nan", 0.25, [2.0])
