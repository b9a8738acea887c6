"""Teachers: the networks that build targets, and the random state under which they are evaluated.

Two roles: the *recursion*'s F̄ and the *guidance*'s F̄ (classifier-free guidance). Each is an EMA of the
student (default), a frozen copy of its initial weights, or the live student itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twinrl.config import Settings
from twinrl.machine.sharding import local

TeacherKind = Literal["ema", "live", "frozen"]
LOW = (torch.bfloat16, torch.float16)
"""Formats that would swallow the small steps of an average: 0.1 % of a difference is below half a unit of a weight."""
REMAINDER = torch.bfloat16
"""Has float32's exponents, so that half a unit of any weight is in its range."""


class TeacherConfig(Settings):
    """Which network builds the targets."""

    kind: TeacherKind = Field(
        "ema", description="the recursion's teacher: ema, live (the student) or frozen (its start)"
    )
    decay: float = Field(0.99, ge=0, le=1, description="EMA decay; reached through a ramp, the first update copies")
    guidance: TeacherKind | None = Field(None, description="the guidance's teacher; null = the recursion's")
    allow_live: bool = Field(False, description="waiver: a live teacher has collapsed runs, say that you want one")

    @model_validator(mode="after")
    def _live_needs_waiver(self) -> "TeacherConfig":
        kinds = (self.kind, self.guidance)
        live = "live" in kinds or ("ema" in kinds and self.decay == 0)  # an average without memory is the student
        if live and not self.allow_live:
            raise ValueError(
                "a live-student teacher is known to collapse training; fix: teacher.kind=ema, "
                "or waive this with teacher.allow_live=true"
            )
        return self


def copy_of(student: nn.Module, average: bool = False, trained: bool = False) -> nn.Module:
    """A copy. What the student does not train is shared with it: under LoRA a copy costs its adapters and no more.

    Arguments:
        student: the network.
        average: whether the copy is to follow the student in small steps; it is :func:`widened` then.
        trained: whether it is trained as the student is; else it takes no gradients.
    """
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    copied = deepcopy(student, shared)
    if average and (low := widened(copied)) is not None:
        copied.forward = partial(in_low_precision, copied.forward, low)
    return copied if trained else copied.requires_grad_(False)


def widened(network: nn.Module) -> torch.dtype | None:
    """Give what is trained of a network in a format of :data:`LOW` float32 instead, in place; the former format, or
    None where nothing had one."""
    low = [p for p in network.parameters() if p.requires_grad and p.dtype in LOW]
    formats = {p.dtype for p in low}
    for parameter in low:
        parameter.data = parameter.data.float()
    return next(iter(formats), None)


def in_low_precision(forward: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *rest: Any) -> Tensor:
    """A forward pass of weights that are wider than ``dtype``, at its speed; the caller need not be under autocast."""
    with torch.autocast(x.device.type, dtype):
        return forward(x, *rest).to(x.dtype)


class Teacher:
    """Holds the copies that the configured roles need and keeps the EMA.

    Weights of a format of :data:`LOW` stand still for many steps, and so does the difference to their average: what
    float32 rounds away of a step of 10⁻⁴ of it has the same sign each time, and adds up. Such an average is therefore
    kept in two parts (Kahan's summation): ``ema``, and the ``remainder`` that the next step takes in.

    Arguments:
        student: the network being trained; copies start from its present weights.
        config: which roles need which copy.
        copy: as :func:`copy_of`; of a sharded student, it makes one that is sharded alike.
        pretrained: takes the place of the frozen copy: the model under a student's adapters.
    """

    def __init__(
        self,
        student: nn.Module,
        config: TeacherConfig,
        copy: Callable[[nn.Module, bool], nn.Module] = copy_of,
        pretrained: nn.Module | None = None,
    ):
        self.config = config
        self.student = student
        self.decay = 0.0  # ramped up by every update
        roles = {config.kind, config.guidance or config.kind}
        self.ema = copy(student, True) if "ema" in roles else None
        self.frozen = (pretrained or copy(student, False)) if "frozen" in roles else None
        # kept, since a sharded module shows other tensors while it is gathered
        averages = list(self.ema.parameters()) if self.ema is not None else []
        pairs = [(v, a) for v, a in zip(student.parameters(), averages, strict=False) if v is not a and v.requires_grad]
        self._values, self._averages = [v for v, _ in pairs], [a for _, a in pairs]
        wider = [a for v, a in pairs if v.dtype != a.dtype]
        kept = [nn.Parameter(torch.zeros_like(a.detach(), dtype=REMAINDER), requires_grad=False) for a in wider]
        self.remainder = nn.ParameterList(kept) if kept else None

    @property
    def recursion(self) -> nn.Module:
        """The network F̄ of the recursion."""
        return self._network(self.config.kind)

    @property
    def guidance(self) -> nn.Module:
        """The network F̄ of classifier-free guidance."""
        return self._network(self.config.guidance or self.config.kind)

    @property
    def best(self) -> nn.Module:
        """The network to judge and to export: the EMA where there is one, else the student."""
        return self.ema if self.ema is not None else self.student

    def _network(self, kind: TeacherKind) -> nn.Module:
        network = {"ema": self.ema, "live": self.student, "frozen": self.frozen}[kind]
        assert network is not None
        return network

    @torch.no_grad()
    def update(self) -> None:
        """One EMA update towards the student: parameters only; then the ramp ``d ← d + (1−d)(decay−d)/2`` from 0."""
        if self.ema is None:
            return
        pairs = [(local(a), local(v)) for a, v in zip(self._averages, self._values, strict=True)]
        if alike := [(a, v) for a, v in pairs if a.dtype == v.dtype]:
            averages, values = zip(*alike, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        wider = (pair for pair in pairs if pair[0].dtype != pair[1].dtype)
        for (average, value), rest in zip(wider, self.remainder or (), strict=True):  # one at a time, for memory
            _step(average, value.to(average.dtype), 1 - self.decay, local(rest))
        self.decay += (1 - self.decay) * (self.config.decay - self.decay) / 2


def _step(average: Tensor, value: Tensor, weight: float, rest: Tensor) -> None:
    """``average + rest`` moves by ``weight`` of its way to ``value``; in place, ``rest`` takes what rounding costs."""
    if weight > 0.5:  # the first steps, which follow the student
        average.lerp_(value, weight)
        rest.zero_()
        return
    step = value.sub_(average).mul_(weight).add_(rest)
    before = average.clone()
    average.add_(step)
    rest.copy_(step.sub_(before.sub_(average).neg_()))


# --- random state ---------------------------------------------------------------------------------------


class RandomState:
    """The state of the CPU's and every GPU's default generator (dropout draws from these)."""

    def __init__(self, cpu: Tensor, cuda: list[Tensor]):
        self.cpu, self.cuda = cpu, cuda

    @classmethod
    def capture(cls) -> "RandomState":
        """The present state of every device in use."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set every device's generator to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from this state and leave the generators as they were before it.

        Teacher and guidance passes run so: they see the dropout masks of the student's pass on the same rows.
        """
        before = RandomState.capture()
        self.restore()
        try:
            yield
        finally:
            before.restore()
