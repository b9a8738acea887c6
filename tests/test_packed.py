"""Packed runs are the separate runs: same numbers, same files, and nobody's trouble is another one's."""

import math
import random
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.fake_source import FakeSource, register, small
from tests.test_trainer import CPU, At, Killed, finish, make, rows, state, weight_size
from twinrl.backends import NETWORKS
from twinrl.commands import packed as command
from twinrl.errors import InputError
from twinrl.packed import Ended, Member, Networks, Rendezvous
from twinrl.packed.rendezvous import Request
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.trainer import Outcome, Trainer

DOUBLE = "train.precision=float64"
WITH_REWARD = (
    "terms.reward={branches: [e2e]}", "reward.model=brightness", "reward.gradient={estimator: vae_backprop, eta: 30}",
)  # fmt: skip
CLIPPED = ("gradients.terms.rectify.clip.max_norm=0.05", "gradients.total.clip.max_norm=0.5")
AT = 30
SPIKE = (
    f"terms.planted={{kind: planted, at: {AT}, row: 9, size: 1000, branches: [any]}}", "checkpoint.keep=6",
    "stability.spike=rollback", "stability.rollback_margin=5",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def seeds(runs: Path, *overrides: str, number: int = 3, steps: int = 22) -> list[RunConfig]:
    return [small(runs, f"seed={seed}", f"train.steps={steps}", *overrides) for seed in range(number)]


def packed(settings: Sequence[RunConfig]) -> tuple[list[Trainer], Networks]:
    """Trainers at their newest checkpoints, which share their network calls."""
    networks = Networks(len(settings))
    for one in settings:
        if not RunDirectory(one.directory).exists:
            RunDirectory(one.directory).start(one, fresh=False)
    made = [
        Trainer(one, RunDirectory(one.directory), FakeSource(), CPU, weight_size, ranks=Member(networks, i))
        for i, one in enumerate(settings)
    ]
    for trainer in made:
        trainer.resume()
    return made, networks


def train(trainers: Sequence[Trainer], networks: Networks) -> list[Ended[Outcome]]:
    return networks.rendezvous.run([trainer.train for trainer in trainers])


def finish_packed(settings: Sequence[RunConfig]) -> list[Trainer]:
    trainers, networks = packed(settings)
    ended = train(trainers, networks)
    assert [one.value for one in ended] == [Outcome("finished", one.train.steps) for one in settings]
    return trainers


def assert_close(a: Trainer, b: Trainer, tolerance: float) -> None:
    """Every number of every log row and every tensor of the state agree, relative to the larger or to a tenth."""
    left, right = rows(a), rows(b)
    assert [set(row) for row in left] == [set(row) for row in right]
    for x, y in zip(left, right, strict=True):
        assert {k: v for k, v in x.items() if not _number(v)} == {k: v for k, v in y.items() if not _number(v)}
        far = {k: (x[k], y[k]) for k in x if _number(x[k]) and not math.isclose(
            x[k], y[k], rel_tol=tolerance, abs_tol=0.1 * tolerance)}  # fmt: skip
        assert far == {}, f"step {x['step']}"
    mine, theirs = state(a), state(b)
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- the same numbers -----------------------------------------------------------------------------------------

VARIANTS = {
    "reward, EMA, clipped terms": (*WITH_REWARD, *CLIPPED, "teacher={kind: ema, decay: 0.9}"),
    "output space": (*CLIPPED, "gradients.space=output"),
    "live teacher, micro-batches": ("teacher={kind: live, allow_live: true}", "train.micro_batch=7"),
    "frozen guidance, no gradient rules": ("teacher={kind: ema, guidance: frozen}", "gradients.space=none"),
    "target time hidden": ("model.target_time=false",),
    "attention": ("model.network={kind: dit, width: 16, depth: 1, heads: 2, patch: 2}",),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_packed_equals_separate(tmp_path: Path, variant: tuple[str, ...]) -> None:
    """In double precision to 1e-10 over 22 steps, all of them packed: log rows, weights, EMA, optimizer."""
    alone = [finish(one) for one in seeds(tmp_path / "alone", DOUBLE, *variant, number=2)]
    trainers, networks = packed(seeds(tmp_path / "packed", DOUBLE, *variant, number=2))
    assert [one.error for one in train(trainers, networks)] == [None, None]
    assert set(networks.rendezvous.rounds) == {2}
    for a, b in zip(alone, trainers, strict=True):
        assert_close(a, b, 1e-10)


@pytest.mark.slow
def test_packed_equals_separate_in_single_precision(tmp_path: Path) -> None:
    """To 1e-3 over 22 steps: rounding differs, and Adam magnifies it where a gradient is nearly zero."""
    alone = [finish(one) for one in seeds(tmp_path / "alone")]
    for a, b in zip(alone, finish_packed(seeds(tmp_path / "packed")), strict=True):
        assert_close(a, b, 1e-3)


def test_autocast_is_kept(tmp_path: Path) -> None:
    """Packed predictions are as far from float32's as bf16 makes them, though another thread computes them; they
    are not those of a network alone, since products of stacked weights are rounded before the bias is added."""
    networks = Networks(2)
    trainers = [make(one) for one in seeds(tmp_path, number=2)]
    students = [networks.join(trainer.objective.teacher.student, i) for i, trainer in enumerate(trainers)]
    x = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t, condition = torch.full((64,), 0.5), FakeSource().null_condition(64)

    def predict(network: nn.Module, low: bool) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return network(x, t, t, condition)  # type: ignore[no-any-return]

    ended = networks.rendezvous.run([lambda n=n: predict(n, True) for n in students])
    for network, one in zip(students, ended, strict=True):
        assert one.value is not None
        alone, single = predict(network, True), predict(network, False)
        rounding = (alone - single).abs().mean()
        assert 0.1 * rounding < (one.value - single).abs().mean() < 2 * rounding


# --- nobody's trouble is another one's ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_member_that_raises_leaves_the_others_alone(tmp_path: Path) -> None:
    trainers, networks = packed(seeds(tmp_path / "packed", DOUBLE))

    def die() -> None:
        raise Killed

    trainers[1].observers.append(At(5, die))
    ended = train(trainers, networks)
    assert [type(one.error) for one in ended] == [type(None), Killed, type(None)]
    for number in (0, 2):
        assert_close(finish(seeds(tmp_path / "alone", DOUBLE)[number]), trainers[number], 1e-10)


@pytest.mark.slow
def test_a_member_that_rolls_back_leaves_the_others_alone_and_meets_them_again(tmp_path: Path) -> None:
    """It makes more steps than the others, and passes that they do not make; most rounds still serve all."""

    def settings(where: str) -> list[RunConfig]:
        plain = seeds(tmp_path / where, DOUBLE, steps=40)
        return [plain[0], small(tmp_path / where, "seed=1", "train.steps=40", DOUBLE, *SPIKE), plain[2]]

    trainers, networks = packed(settings("packed"))
    assert [one.error for one in train(trainers, networks)] == [None] * 3
    assert trainers[1].attempt == 1
    for one, other in zip(settings("alone"), trainers, strict=True):
        assert_close(finish(one), other, 1e-10)


@pytest.mark.slow
def test_members_that_stop_early_leave_the_others_alone(tmp_path: Path) -> None:
    def settings(where: str) -> list[RunConfig]:
        return [small(tmp_path / where, f"seed={s}", f"train.steps={n}", DOUBLE) for s, n in enumerate((22, 9, 15))]

    for one, other in zip(settings("alone"), finish_packed(settings("packed")), strict=True):
        assert_close(finish(one), other, 1e-10)


@pytest.mark.slow
def test_resuming_packed_equals_going_through(tmp_path: Path) -> None:
    """Bit for bit: killed after different steps, and resumed from checkpoints of one step."""
    through = finish_packed(seeds(tmp_path / "through"))
    trainers, networks = packed(seeds(tmp_path / "killed"))

    def die() -> None:
        raise Killed

    for trainer, step in zip(trainers, (11, 12, 14), strict=True):
        trainer.observers.append(At(step, die))
    assert [type(one.error) for one in train(trainers, networks)] == [Killed] * 3
    resumed = finish_packed(seeds(tmp_path / "killed"))
    for a, b in zip(through, resumed, strict=True):
        assert rows(a) == rows(b)
        assert [k for k, v in state(a).items() if not torch.equal(v, state(b)[k])] == []


@pytest.mark.slow
def test_resuming_alone_equals_going_on_packed(tmp_path: Path) -> None:
    """A packed run is an ordinary run directory."""
    through = finish_packed(seeds(tmp_path / "through", DOUBLE))
    trainers, networks = packed(seeds(tmp_path / "packed", DOUBLE))
    for trainer in trainers:
        trainer.observers.append(At(11, lambda t=trainer: setattr(t, "interrupted", True)))
    assert [one.value for one in train(trainers, networks)] == [Outcome("interrupted", 11)] * 3
    assert_close(through[1], finish(seeds(tmp_path / "packed", DOUBLE)[1]), 1e-10)


# --- what is refused ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_networks_that_draw_or_keep_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Dropout \(dropout\) can't be packed; got it draws random numbers"):
        packed(seeds(tmp_path, "model.network={kind: dropping}"))
    with pytest.raises(InputError, match=r"BatchNorm1d \(norm\) can't be packed; got it keeps running statistics"):
        Networks(2).join(Counting(), 0)


def test_a_network_that_draws_in_its_forward_is_refused_in_one_line(tmp_path: Path) -> None:
    class Noisy(NETWORKS["mlp"]):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            return super().forward(x, *others) + torch.rand_like(x)

    networks = Networks(2)
    trainers = [make(one) for one in seeds(tmp_path, number=2)]
    joined = []
    for number, trainer in enumerate(trainers):
        network = trainer.objective.teacher.student
        network.__class__ = Noisy
        joined.append(networks.join(network, number))
    x, t = torch.zeros(2, 2, 4, 4), torch.zeros(2)
    calls = [lambda n=n: n(x, t, t, FakeSource().null_condition(2)) for n in joined]
    ended = networks.rendezvous.run(calls)
    assert [type(one.error) for one in ended] == [InputError] * 2
    assert "the network Noisy can't be packed" in str(ended[0].error)


def test_unlike_networks_are_refused(tmp_path: Path) -> None:
    wider = small(tmp_path, "model.network={kind: mlp, width: 24, depth: 1, condition_width: 16}")
    with pytest.raises(InputError, match="packed runs need networks of equal shapes"):
        packed([small(tmp_path), wider])


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_runs_from_start_to_result(tmp_path: Path) -> None:
    """Pictures, tables and results of all; a bad one says why on its own console; a second call finds all done."""
    good = [small(tmp_path, f"seed={seed}", "train.steps=5") for seed in (0, 1)]
    bad = small(tmp_path, "seed=2", "train.steps=5", "train.init=nowhere")
    outputs = [StringIO() for _ in range(3)]
    consoles = [Console(file=out, width=200) for out in outputs]
    assert command.train([good[0], bad, good[1]], consoles) == [0, 2, 0]
    results = [RunDirectory(one.directory).result for one in good]
    assert all(result and result["status"] == "finished" and result["table"]["rows"] for result in results)
    assert "train.init is 'nowhere'" in outputs[1].getvalue()
    assert not RunDirectory(bad.directory).exists
    assert command.train(good, consoles[::2]) == [0, 0]
    assert "has finished after 5 steps" in outputs[0].getvalue()


@pytest.mark.slow
def test_the_command_line_trains_seeds_and_goes_on(tmp_path: Path) -> None:
    said = StringIO()
    settings = small(tmp_path, "seed=4", "train.steps=3")
    for _ in range(2):
        assert command.train_seeds(settings, 2, False, Console(file=said, width=200)) == 0
    ended = [line.partition(";")[0] for line in said.getvalue().splitlines() if line.startswith("seed ")]
    assert ended == ["seed 4: finished after 3 steps", "seed 5: finished after 3 steps"] * 2
    with pytest.raises(InputError, match="--fresh and --seeds don't go together"):
        command.train_seeds(settings, 2, True, Console(file=said))


def test_runs_on_other_data_are_refused(tmp_path: Path) -> None:
    other = small(tmp_path, "machine.threads=1")
    with pytest.raises(InputError, match="packed runs share their data and device"):
        command.train([small(tmp_path), other], [Console(file=StringIO())] * 2)


# --- the rendezvous -------------------------------------------------------------------------------------------


def echo(requests: Sequence[Request]) -> None:
    for request in requests:
        request.answer = [one.member for one in requests]


def test_members_meet_and_meet_again(tmp_path: Path) -> None:
    """Member 1 asks for something of its own in its second step, and is met again in the third."""
    meeting, met = Rendezvous(echo), {0: [], 1: [], 2: []}  # type: ignore[var-annotated]

    def body(number: int) -> None:
        for step in range(3):
            meeting.begin_step()
            if number == 1 and step == 1:
                meeting.ask("own", None)
            met[number].append(meeting.ask("common", None))

    meeting.run([lambda n=n: body(n) for n in range(3)])
    assert met[0] == met[1] == met[2] == [[0, 1, 2]] * 3
    assert meeting.rounds == {3: 3, 1: 1}


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_never_wait_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    meeting = Rendezvous(echo)

    def body(program: Sequence[int]) -> int:
        for key in program:
            if key == 0:
                meeting.begin_step()
            elif key == 1 and len(program) > 20:
                raise Killed
            else:
                meeting.ask(key, None)
        return len(program)

    programs = [[chance.randrange(5) for _ in range(chance.randrange(30))] for _ in range(6)]
    for program, ended in zip(programs, meeting.run([lambda p=p: body(p) for p in programs]), strict=True):
        assert isinstance(ended.error, Killed) if len(program) > 20 and 1 in program else ended.value == len(program)


def test_every_member_has_a_random_stream_of_its_own() -> None:
    def body(seed: int, pause: Callable[[], object]) -> list[float]:
        torch.manual_seed(seed)
        drawn = []
        for _ in range(4):
            drawn.append(torch.rand(()).item())
            pause()
        return drawn

    torch.manual_seed(7)
    before, meeting = torch.get_rng_state(), Rendezvous(echo)
    ended = meeting.run([lambda s=s: body(s, lambda: meeting.ask(0, None)) for s in range(3)])
    assert torch.equal(torch.get_rng_state(), before)
    assert [one.value for one in ended] == [body(seed, lambda: None) for seed in range(3)]


def test_what_stops_the_one_who_answers_ends_all_members() -> None:
    released = []

    def body() -> None:
        try:
            meeting.ask(0, None)
        finally:
            released.append(1)

    def interrupted(requests: Sequence[Request]) -> None:
        raise KeyboardInterrupt

    meeting = Rendezvous(interrupted)
    with pytest.raises(KeyboardInterrupt):
        meeting.run([body, body])
    assert len(released) == 2
