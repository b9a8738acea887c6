"""The objective: shared forwards, micro-batches, precision, replayed random states, and a user's own term."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from tests.objectives import LAB_PRESETS, batch_of, counts_of, gradient, losses_of, objective_of
from tests.reference import network
from tests.rounding import bound
from twinrl import config as configuration
from twinrl.flow.branches import Batch, Rows
from twinrl.flow.conditions import Condition
from twinrl.flow.teacher import RandomState
from twinrl.terms import Context, Query, Target, Term, TermConfig
from twinrl.terms.objective import Objective
from twinrl.training import schema

PRESET = pytest.mark.parametrize("preset", [name for name in LAB_PRESETS if schema.load(name).reward is None])
BATCH = 16


def given(config: configuration.Settings, dtype: torch.dtype = torch.float64) -> Batch:
    """A global batch of 16 rows for the reference networks."""
    drawn = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, c = drawn[:, :18].view(BATCH, 2, 3, 3), drawn[:, 18:21]
    return batch_of(config, x, {"c": c}, {"c": drawn[:, 21:]})


def reference(preset: str, *overrides: str) -> tuple[Objective, Batch]:
    made, config = objective_of(preset, network("net_student"), overrides, teacher=network("net_teacher"))
    return made, given(config)


@dataclass
class Calls:
    """The forward passes of a network: rows, whether with gradient, times."""

    rows: list[int] = field(default_factory=list)
    with_gradient: list[bool] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    r: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module) -> "Calls":
        calls = cls()

        def note(module: nn.Module, inputs: tuple[Tensor, ...], F: Tensor) -> None:
            calls.rows.append(len(inputs[0]))
            calls.with_gradient.append(F.requires_grad)
            calls.t.append(inputs[1])
            calls.r.append(inputs[2])

        module.register_forward_hook(note)
        return calls

    def count(self, with_gradient: bool) -> int:
        return self.with_gradient.count(with_gradient)


# --- shared forwards ----------------------------------------------------------------------------------------


def test_forwards_of_a_tutorial_step() -> None:
    """4 forward+backward (own, instant, one-step, fake) and 8 forwards.

    The 8: guidance 2, recursion 2 for base and 2 for one-step consistency, both branches of rectify.
    """
    made, batch = reference("tutorial")
    student, teacher = Calls.of(made.teacher.student), Calls.of(made.teacher.ema)
    losses_of(made, batch)
    assert student.count(with_gradient=True) == 4
    assert (student.count(with_gradient=False), teacher.count(with_gradient=False)) == (2, 6)
    assert teacher.count(with_gradient=True) == 0
    assert set(student.rows + teacher.rows) == {BATCH}


def test_forwards_of_a_twinflow_step() -> None:
    """One forward+backward of the whole batch: the four branches share it, rectify reuses the e2e rows.

    Without gradient: the fake sample on 4 rows, guidance 2 and recursion 2 on 12, both branches of rectify's 4 rows.
    """
    made, batch = reference("twinflow")
    student, teacher = Calls.of(made.teacher.student), Calls.of(made.teacher.ema)
    losses_of(made, batch)
    passes = Counter(zip(student.with_gradient, student.rows, strict=True))
    assert passes == {(True, 16): 1, (False, 4): 1, (False, 8): 1}
    assert Counter(zip(teacher.with_gradient, teacher.rows, strict=True)) == {(False, 12): 4}


@pytest.mark.parametrize(
    ("preset", "student_passes", "teacher_passes"),
    [("rcgm", 1, 4), ("flow_matching", 1, 1), ("simpletuner", 2, 4)],
)
def test_forwards_of_the_other_presets(preset: str, student_passes: int, teacher_passes: int) -> None:
    """simpletuner: base, real velocity and flow matching share a pass with rectify, the fake branch has its own."""
    made, batch = reference(preset)
    student, teacher = Calls.of(made.teacher.student), Calls.of(made.teacher.ema)
    losses_of(made, batch)
    assert student.count(with_gradient=True) == student_passes
    assert teacher.count(with_gradient=False) == teacher_passes


def test_points_on_disjoint_rows_join_into_one_forward() -> None:
    """(x_t, t, t) of the mul rows and (z, 1, 0) of the any rows together fill a batch beside (x_t, t, r) of both."""
    made, batch = reference(
        "flow_matching", "branches={mul: 1, any: 1}", "terms.base.branches=[mul, any]",
        "terms.real_velocity={branches: [mul]}", "terms.one_step_consistency={branches: [any]}",
    )  # fmt: skip
    student = Calls.of(made.teacher.student)
    losses_of(made, batch)
    assert (student.rows, student.with_gradient) == ([BATCH, BATCH], [True, True])


def test_separate_teacher_of_the_guidance() -> None:
    made, batch = reference("rcgm", "teacher.guidance=frozen")
    recursion, guidance = Calls.of(made.teacher.ema), Calls.of(made.teacher.frozen)
    losses_of(made, batch)
    assert (len(recursion.rows), len(guidance.rows)) == (2, 2)


def test_shared_predictions_belong_to_their_rows() -> None:
    """A term's losses are the same whether its forward is shared with other terms or its own."""
    made, batch = reference(
        "twinflow", "terms.mine={kind: real_velocity, point: own, branches: [any, e2e]}",
        "terms.mul={kind: real_velocity, branches: [mul]}", "terms.any={kind: real_velocity, branches: [any]}",
    )  # fmt: skip
    together = losses_of(made, batch)
    for name, term in made.terms.items():
        alone = Objective({name: term}, made.teacher, made.guidance)
        part = losses_of(alone, batch)[name]
        torch.testing.assert_close(part.per_row, together[name].per_row, rtol=1e-10, atol=1e-12)
        assert torch.equal(part.rows, together[name].rows)


@pytest.mark.parametrize(
    "settings", ["sample: shared", "path_noise: sample", "time: uniform", "time: uniform, time_range: [0.4, 0.6]"]
)
def test_two_adversarial_terms_do_not_share_a_point_that_differs(settings: str) -> None:
    """Equal points promise equal inputs: other settings make other inputs, and must not reuse the prediction."""
    made, batch = reference("rcgm", "terms.first=adversarial", f"terms.second={{kind: adversarial, {settings}}}")
    together = losses_of(made, batch)
    for name in ("first", "second"):
        alone = losses_of(Objective({name: made.terms[name]}, made.teacher, made.guidance), batch)
        torch.testing.assert_close(alone[name].per_row, together[name].per_row, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(together["first"].per_row, together["second"].per_row)


# --- sums ---------------------------------------------------------------------------------------------------


def accumulated(made: Objective, batch: Batch, size: int) -> tuple[Tensor, dict[str, float], Tensor]:
    """Gradient, losses by term and total over micro-batches, as the trainer accumulates them."""
    counts, losses, total = counts_of(batch), Counter(), torch.zeros((), dtype=torch.float64)
    for chunk in batch.chunks(size):
        parts = made.evaluate(chunk, counts).losses()
        sum(part.loss for part in parts.values()).backward()
        for name, part in parts.items():
            losses[name] += part.unweighted.item()
            total += part.loss.detach()
    return gradient(made.teacher.student), dict(losses), total


@PRESET
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_give_the_gradient_of_the_whole(preset: str, size: int) -> None:
    """Also where a micro-batch holds part of a branch, several, or rows of no use to some term."""
    made, batch = reference(preset)
    whole, losses, total = accumulated(made, batch, BATCH)
    cut, cut_losses, cut_total = accumulated(made, batch, size)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)
    assert cut_losses == pytest.approx(losses, rel=1e-10)
    torch.testing.assert_close(cut_total, total, rtol=1e-10, atol=0)


@PRESET
def test_gradients_of_the_terms_sum_to_the_totals(preset: str) -> None:
    made, batch = reference(preset)
    sum(part.loss for part in losses_of(made, batch).values()).backward()
    total, parts = gradient(made.teacher.student), []
    for name in made.terms:
        losses_of(made, batch)[name].loss.backward()
        parts.append(gradient(made.teacher.student))
    torch.testing.assert_close(torch.stack(parts).sum(0), total, rtol=1e-10, atol=1e-11)
    assert all(part.abs().max() > 1e-6 for part in parts)


@PRESET
def test_loss_is_weight_times_sum_over_rows_by_the_normaliser(preset: str) -> None:
    made, batch = reference(preset, f"terms.{next(iter(schema.load(preset).terms))}.weight=3")
    for name, part in losses_of(made, batch).items():
        settings = made.terms[name].config
        rows = sum(len(batch.branch[b]) for b in settings.branches)
        assert len(part.per_row) == len(part.rows) == rows
        mean = part.per_row.sum() / (BATCH if settings.mean_over == "batch" else rows)
        torch.testing.assert_close(part.unweighted, mean)
        torch.testing.assert_close(part.loss.detach(), settings.weight * mean)
        assert all(len(values) == rows for values in part.aux.values())


@PRESET
def test_no_gradient_reaches_a_teacher(preset: str) -> None:
    made, batch = reference(preset)
    sum(part.loss for part in losses_of(made, batch).values()).backward()
    others = [each for each in (made.teacher.ema, made.teacher.frozen, *made.own.values()) if each is not None]
    assert all(p.grad is None for each in others for p in each.parameters())


# --- precision ------------------------------------------------------------------------------------------------


class Recording(nn.Module):
    """A small network with a matrix product (bf16 under autocast) that notes the dtypes it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.times = nn.Linear(18, 18), nn.Linear(3, 18)
        self.seen: list[tuple[torch.dtype, ...]] = []

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        F = self.mix(x.flatten(1)) + self.times(torch.stack([t, r, t.sign()], 1))
        self.seen.append((x.dtype, t.dtype, r.dtype, F.dtype))
        return F.view_as(x)


@PRESET
def test_autocast_leaves_times_and_residuals_in_float32(preset: str) -> None:
    """Inside, products are in bf16; what goes in (times!), what comes out and what is made of it are float32."""
    student = Recording()
    made, config = objective_of(preset, student, autocast=torch.bfloat16)
    batch, single = given(config, torch.float32), torch.float32
    evaluation = made.evaluate(batch, counts_of(batch))
    losses = evaluation.losses()
    teacher = made.teacher.recursion
    inner = teacher.network if hasattr(teacher, "network") else teacher
    assert set(student.seen + inner.seen) == {(single, single, single, torch.bfloat16)}
    assert all(f.F.dtype == single for forwards in evaluation._forwards.values() for f in forwards)
    assert all(v.dtype == single for v in evaluation._velocity.values())
    assert all(part.loss.dtype == part.per_row.dtype == single for part in losses.values())
    sum(part.loss for part in losses.values()).backward()
    assert all(p.grad.dtype == single and p.grad.isfinite().all() for p in student.parameters())


def test_residual_divided_by_delta_is_not_rounded_to_bf16() -> None:
    """R multiplies (t − r)·F − S by 100. A bf16 prediction makes that noisy; its own arithmetic may not add to it.

    The same bf16 predictions are taken to float64 and R recomputed there: some ten operations in float32 on numbers of
    the data's size (in bf16 they would be off by 65,536 times as much).
    """
    made, config = objective_of(
        "rcgm", Recording(), ["guidance.strength=0", "terms.base.clamp=1e6"], None, torch.bfloat16
    )
    batch = given(config, torch.float32)
    rows, term = batch.rows, made.terms["base"]
    evaluation = made.evaluate(batch, counts_of(batch))
    query = term.query(rows, evaluation)
    F = evaluation.prediction(query, rows).detach()
    outputs: list[Tensor] = []

    class Replay:
        def __init__(self) -> None:
            self.at = iter(outputs)

        def target_velocity(self, rows: Rows) -> Tensor:
            return rows.v

        def teacher(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
            return next(self.at).to(x.dtype)

    class Note(Replay):
        def teacher(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
            outputs.append(evaluation.teacher(x, t, r, c))
            return outputs[-1]

    R = F - term.target(rows, query, F, Note()).value
    double = Rows(rows.index, rows.x.double(), rows.z.double(), rows.t.double(), rows.r.double(), rows.c, rows.null,
                  rows.draws, rows.global_batch)  # fmt: skip
    exact = F.double() - term.target(double, term.query(double, evaluation), F.double(), Replay()).value
    size = max(float(value.abs().max()) for value in (F, rows.x_t, rows.v, *outputs))
    assert (R - exact).abs().max() < bound(10, size / term.config.delta)
    assert exact.abs().max() > 10 * bound(10, size / term.config.delta)


# --- random state ---------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """A network with dropout that notes the mask of every row: (rows with gradient?, masks)."""

    log: list[tuple[bool, Tensor, Tensor]]

    def __init__(self, log: list[tuple[bool, Tensor, Tensor]]):
        super().__init__()
        self.mix, self.drop = nn.Linear(18, 18), nn.Dropout(0.5)
        self.log = log

    def __deepcopy__(self, memo: dict) -> "Dropping":
        copied = Dropping(self.log)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        kept = self.drop(torch.ones_like(x.flatten(1)))
        self.log.append((torch.is_grad_enabled(), c["row"], kept.detach()))
        F = self.mix(x.flatten(1)) * kept
        return (F + (t + r + t.sign())[:, None]).view_as(x)


def dropout_masks(preset: str, size: int = BATCH) -> list[tuple[bool, Tensor, Tensor]]:
    """Gradient?, row numbers and masks of every forward pass of one batch, cut into micro-batches."""
    log: list[tuple[bool, Tensor, Tensor]] = []
    torch.manual_seed(0)
    made, config = objective_of(preset, Dropping(log).train())
    x = torch.randn(BATCH, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    rows = {"row": torch.arange(BATCH)}
    batch = batch_of(config, x, rows, rows)
    for chunk in batch.chunks(size):
        made.evaluate(chunk, counts_of(batch)).losses()
    return log


def disagreements(log: list[tuple[bool, Tensor, Tensor]], which: Callable[[Tensor], Tensor]) -> int:
    """Passes of the log whose masks differ from the first seen on the chosen rows; row by row."""
    masks: dict[int, Tensor] = {}
    different = 0
    for _, rows, kept in log:
        chosen = which(rows)
        for row, mask in zip(rows[chosen].tolist(), kept[chosen], strict=True):
            different += not torch.equal(masks.setdefault(row, mask), mask)
    return different


def everywhere(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


@pytest.mark.parametrize("preset", ["tutorial", "rcgm", "simpletuner", "flow_matching"])
def test_teacher_passes_see_the_dropout_of_the_students_pass(preset: str) -> None:
    """Every pass on a row, student's and teachers', drops the same: targets and predictions are comparable."""
    log = dropout_masks(preset)
    assert {gradient for gradient, _, _ in log} == {True, False}
    assert disagreements(log, everywhere) == 0


def test_under_dropout_branches_do_not_share_a_forward_so_teacher_passes_agree() -> None:
    """twinflow: the student passes base rows alone, as guidance and recursion do, and the fake rows alone."""
    log = dropout_masks("twinflow")
    base = BATCH * 3 // 4
    assert sorted(len(rows) for gradient, rows, _ in log if gradient) == [BATCH - base, base]
    assert disagreements(log, lambda rows: (rows < base) & torch.tensor(len(rows) >= base)) == 0
    pairs = [kept for gradient, rows, kept in log if not gradient and len(rows) == 4 and rows[0] == 0]
    assert len(pairs) == 2  # rectify's two branches, whose difference must not be one of masks
    assert torch.equal(*pairs)


@pytest.mark.parametrize("preset", ["tutorial", "rcgm", "twinflow", "simpletuner"])
def test_without_the_capture_the_passes_disagree(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above have power: with a capture that does nothing, masks differ."""
    monkeypatch.setattr(RandomState, "replayed", lambda self: nullcontext())
    base = BATCH * 3 // 4
    assert disagreements(dropout_masks(preset), lambda rows: (rows < base) & torch.tensor(len(rows) >= base)) > 0


def test_micro_batches_get_masks_of_their_own() -> None:
    """Replaying must not freeze the stream: the next micro-batch starts from another state."""
    log = dropout_masks("tutorial", size=4)
    assert disagreements(log, everywhere) == 0
    masks = [next(kept for _, rows, kept in log if rows[0] == start) for start in range(0, BATCH, 4)]
    assert not any(torch.equal(one, other) for one, other in combinations(masks, 2))


# --- a user's own term ----------------------------------------------------------------------------------------


class HalfwayPull(Term):
    """Pulls the prediction of the jump to t/2, a point of its own, towards zero."""

    class Config(TermConfig):
        kind: str
        strength: float = Field(1.0, gt=0, description="of the pull")

    def query(self, rows: Rows, ctx: Context) -> Query:
        return Query("halfway", rows.x_t, rows.t, rows.t / 2, rows.c)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        return Target((1 - self.config.strength) * F, {"mine/rms": F.square().flatten(1).mean(1).sqrt()})


@pytest.mark.parametrize("preset", ["tutorial", "twinflow", "simpletuner"])
def test_a_users_term_by_dotted_path_leaves_the_rest_untouched(preset: str) -> None:
    """Named in an override alone: its own query point, setting and aux; the other terms' numbers bit for bit."""
    plain, batch = reference(preset)
    branch = "mul" if preset == "twinflow" else "any"
    made, _ = reference(
        preset, f"terms.pull={{kind: {__name__}.HalfwayPull, strength: 0.5, weight: 2, branches: [{branch}]}}"
    )
    before, after = losses_of(plain, batch), losses_of(made, batch)
    assert set(after) == {*before, "pull"}
    for name, part in before.items():
        assert torch.equal(part.per_row, after[name].per_row), name
    rows = batch.on((branch,))
    F = made.call(made.teacher.student, rows.x_t, rows.t, rows.t / 2, rows.c)
    expected = (0.5 * F).square().flatten(1).mean(1)
    torch.testing.assert_close(after["pull"].per_row, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(after["pull"].loss, 2 * expected.mean(), rtol=1e-10, atol=0)
    assert set(after["pull"].aux) == {"mine/rms"}
