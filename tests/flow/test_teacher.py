"""Teachers: the EMA's ramp by hand, which network plays which role, and replayed random states."""

import pytest
import torch
from torch import nn

from twinrl.flow.teacher import RandomState, Teacher, TeacherConfig


class Scalar(nn.Module):
    """One parameter and one buffer."""

    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("seen", torch.tensor([value]))


def test_first_update_copies_the_student() -> None:
    student = Scalar(1.0)
    teacher = Teacher(student, TeacherConfig(decay=0.99))
    student.weight.data.fill_(5.0)
    teacher.update()
    assert torch.equal(teacher.ema.weight, student.weight)


def test_average_against_numbers_worked_out_by_hand() -> None:
    """decay 0.9: d = 0, then 0 + 1·0.9/2 = 0.45, then 0.45 + 0.55·0.45/2 = 0.57375.

    Student 2, 4, 8 → EMA 2; 0.45·2 + 0.55·4 = 3.1; 0.57375·3.1 + 0.42625·8 = 5.188625.
    """
    student = Scalar(1.0)
    teacher = Teacher(student, TeacherConfig(decay=0.9))
    averages, decays = [], []
    for value in (2.0, 4.0, 8.0):
        student.weight.data.fill_(value)
        decays.append(teacher.decay)
        teacher.update()
        averages.append(teacher.ema.weight.item())
    assert decays == pytest.approx([0.0, 0.45, 0.57375], rel=1e-12)
    assert averages == pytest.approx([2.0, 3.1, 5.188625], rel=1e-12)


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_average_in_small_steps_is_right_in_every_format(dtype: torch.dtype, decay: float) -> None:
    """Against float64, late in a run: a step of the average is 1e-4 of the way, and the student moves by 1e-4 a step.

    1e-3 of the move is 3 times what float32 gives at the slowest decay; without a remainder bf16 gives more.
    """
    generator = torch.Generator().manual_seed(0)
    student = nn.Linear(32, 32).to(dtype)
    teacher = Teacher(student, TeacherConfig(decay=decay))
    teacher.decay = decay  # the ramp is over
    exact = student.weight.detach().double()
    start, reference = exact.clone(), exact.clone()
    for _ in range(300):
        exact = exact + 1e-4 * torch.sign(torch.randn(32, 32, generator=generator) + 0.5)
        student.weight.data.copy_(exact)
        reference.lerp_(student.weight.detach().double(), 1 - decay)
        teacher.update()
    moved = (reference - start).norm()
    assert moved > 1e-3
    assert (teacher.ema.weight.double() - reference).norm() <= 1e-3 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_weights_of_low_precision_have_a_remainder(dtype: torch.dtype) -> None:
    student = nn.Linear(4, 4).to(dtype)
    teacher = Teacher(student, TeacherConfig(decay=0.5))
    if dtype == torch.float32:
        assert teacher.remainder is None
        return
    teacher.decay = 0.99
    for _ in range(4):
        student.weight.data += 0.01
        teacher.update()
    assert [rest.shape for rest in teacher.remainder] == [p.shape for p in student.parameters()]
    rest, unit = teacher.remainder[0], torch.finfo(torch.float32).eps * teacher.ema.weight.abs()
    assert rest.any()
    assert (rest.abs() <= unit).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_low_precision_is_evaluated_in_it(dtype: torch.dtype) -> None:
    """In float32 it would take many times as long; other copies keep the format, and float32 costs nothing."""
    student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    student[0].bias.requires_grad_(False)
    teacher = Teacher(student, TeacherConfig(kind="ema", guidance="frozen"))
    assert (teacher.ema[0].weight.dtype, teacher.frozen[0].weight.dtype) == (torch.float32, dtype)
    assert teacher.ema[0].bias is student[0].bias  # what is not trained is shared
    seen = []
    teacher.ema[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert teacher.ema(torch.randn(2, 8)).dtype == torch.float32
    assert seen == [dtype]
    assert "forward" not in vars(Teacher(nn.Linear(8, 8), TeacherConfig()).ema)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999])
def test_ramp_climbs_to_the_decay_and_not_beyond(decay: float) -> None:
    teacher, decays = Teacher(Scalar(1.0), TeacherConfig(decay=decay, allow_live=True)), []
    for _ in range(20_000):
        teacher.update()
        decays.append(teacher.decay)
        if decay - teacher.decay < 1e-6:
            break
    assert decays == sorted(decays)
    assert decay - 1e-6 < decays[-1] <= decay


def test_decay_zero_follows_the_student() -> None:
    student = Scalar(1.0)
    with pytest.raises(ValueError, match=r"teacher\.allow_live=true"):
        TeacherConfig(decay=0.0)
    teacher = Teacher(student, TeacherConfig(decay=0.0, allow_live=True))
    for value in (3.0, -2.0, 7.0):
        student.weight.data.fill_(value)
        teacher.update()
        assert torch.equal(teacher.ema.weight, student.weight)


def test_only_parameters_are_averaged() -> None:
    student = Scalar(1.0)
    teacher = Teacher(student, TeacherConfig(decay=0.5))
    student.seen.fill_(9.0)
    for _ in range(3):
        teacher.update()
    assert teacher.ema.seen.item() == 1.0
    assert student.seen.item() == 9.0


def test_copies_are_independent_and_do_not_train() -> None:
    student = Scalar(1.0)
    teacher = Teacher(student, TeacherConfig(kind="ema", guidance="frozen"))
    student.weight.data.fill_(5.0)
    assert (teacher.ema.weight.item(), teacher.frozen.weight.item()) == (1.0, 1.0)
    assert student.weight.requires_grad
    assert not any(p.requires_grad for m in (teacher.ema, teacher.frozen) for p in m.parameters())


@pytest.mark.parametrize("kind", ["ema", "live", "frozen"])
@pytest.mark.parametrize("guidance", [None, "ema", "live", "frozen"])
def test_roles(kind: str, guidance: str | None) -> None:
    """After two updates: the EMA has moved, the frozen copy has not, the live teacher *is* the student."""
    student = Scalar(1.0)
    teacher = Teacher(student, TeacherConfig(kind=kind, guidance=guidance, allow_live=True, decay=0.9))
    for value in (2.0, 4.0):
        student.weight.data.fill_(value)
        teacher.update()
    values = {"ema": 3.1, "live": 4.0, "frozen": 1.0}
    assert teacher.recursion.weight.item() == pytest.approx(values[kind])
    assert teacher.guidance.weight.item() == pytest.approx(values[guidance or kind])
    assert (teacher.recursion is student) == (kind == "live")
    assert (teacher.ema is None) == ("ema" not in (kind, guidance))
    assert teacher.best is (student if teacher.ema is None else teacher.ema)


@pytest.mark.parametrize("settings", [{"kind": "live"}, {"kind": "ema", "guidance": "live"}])
def test_live_teacher_needs_the_waiver(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"collapse.*teacher\.kind=ema.*teacher\.allow_live=true"):
        TeacherConfig(**settings)
    TeacherConfig(**settings, allow_live=True)


# --- random state -------------------------------------------------------------------------------------------


def test_replay_repeats_the_stream_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    state = RandomState.capture()
    first, second = torch.rand(4), torch.rand(4)
    torch.manual_seed(0)
    torch.rand(4)
    with state.replayed():
        assert torch.equal(torch.rand(4), first)
        with state.replayed():
            assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), second)


def test_replay_restores_after_an_error() -> None:
    torch.manual_seed(0)
    state = RandomState.capture()
    before = torch.get_rng_state()

    def fail() -> None:
        with state.replayed():
            torch.rand(4)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_replay_covers_every_gpu() -> None:
    torch.cuda.init()
    state = RandomState.capture()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    first = [torch.rand(4, device=d) for d in devices]
    second = [torch.rand(4, device=d) for d in devices]
    state.restore()
    with state.replayed():
        again = [torch.rand(4, device=d) for d in devices]
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(first, again, second, strict=True))
