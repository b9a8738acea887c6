"""Schedules: how one number moves during training. Pure numbers; torch is not needed.

A schedule goes from ``initial`` to ``final`` between the moments ``start`` and ``end``::

    u = clamp((step − start)/(end − start), 0, 1),   value = initial + (final − initial)·shape(u)

    linear   shape(u) = u
    cosine   shape(u) = (1 − cos πu)/2
    sigmoid  shape(u) = (1 + tanh(k(u − ½)/2)/tanh(k/4))/2     a logistic curve of steepness k, rescaled onto [0, 1]
    hard     initial before ``start``, final from there on

**Moments** have one notation each, in YAML and on the command line::

    start: 300                  optimizer steps
    start: 30%                  share of the run
    start: after_renoise        where the renoise schedule ends
    start: after_renoise+10%    ... and a tenth of the run later (or after_renoise+500)

A bare ``0.3`` or ``1.0`` is refused, because it does not say which of the two it means. A share follows when a run
is shortened or lengthened, steps do not. A number stands for a constant schedule: ``alpha: 4`` is
``alpha: {kind: constant, number: 4}``.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, field_validator, model_validator

from twinrl.config import Settings, component
from twinrl.config.components import Registry, Returned, checked, wrong_return
from twinrl.config.errors import InputError

ANCHOR = "after_renoise"
_MOMENT = re.compile(rf"(?P<anchor>{ANCHOR})?(?P<plus>\+)?((?P<share>\d+(\.\d*)?|\.\d+)%|(?P<steps>\d+))?")
_EXPECTED = f"steps (300), a share of the run (30%) or {ANCHOR}, with +500 or +10% if later"


# --- moments --------------------------------------------------------------------------------------------


def _read_moment(value: object) -> int | str:
    """The canonical notation of a moment. Raises ValueError for everything that is none."""
    if isinstance(value, float):
        meant = f"{100 * value:g}% for a share of the run" if value <= 1 else "a whole number of steps"
        raise ValueError(f"{value} is ambiguous as a moment; fix: write {meant}")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a moment; expected {_EXPECTED}")
    text = str(value).replace(" ", "")
    found = _MOMENT.fullmatch(text)
    if not text or not found or bool(found["plus"]) != bool(found["anchor"] and (found["share"] or found["steps"])):
        raise ValueError(f"{value!r} is not a moment; expected {_EXPECTED}")
    if found["share"]:
        if float(found["share"]) > 100:
            raise ValueError(f"{found['share']}% lies beyond the run; expected at most 100%")
        return f"{ANCHOR + '+' if found['anchor'] else ''}{float(found['share']):.10g}%"
    return text if found["anchor"] else int(text)


if TYPE_CHECKING:
    Moment: TypeAlias = int | str
else:
    Moment = Annotated[int | str, BeforeValidator(_read_moment)]


def position(moment: "Moment", steps: int, renoise_end: Fraction | None = None) -> Fraction:
    """The optimizer step, exactly, that ``moment`` means in a run of ``steps`` steps.

    Exact, because ``0.1 * 30`` is above 3 in floating point and a switch would come a step late.

    Arguments:
        moment: a validated moment.
        steps: length of the run.
        renoise_end: step at which the renoise schedule ends (``Renoise.end``); None where there is none.

    Raises:
        InputError: the moment is relative to a renoise schedule and there is none.
    """
    found = _MOMENT.fullmatch(str(moment))
    assert found
    own = Fraction(found["share"]) / 100 * steps if found["share"] else Fraction(found["steps"] or 0)
    if not found["anchor"]:
        return own
    if renoise_end is None:
        raise InputError(
            f"a schedule starts {moment}, but no renoise is configured", fix="configure renoise, or write steps or a %"
        )
    return renoise_end + own


# --- schedules ------------------------------------------------------------------------------------------


def _number(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, float, owner, method)


def _ordered_pair(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, Sequence, owner, method)  # type: ignore[type-abstract]
    numbers = [each for each in value if isinstance(each, int | float | Fraction) and math.isfinite(each)]
    if len(numbers) != 2 or len(value) != 2 or numbers[0] > numbers[1]:
        raise wrong_return(value, owner, method, "two numbers, the smaller one first")


class Schedule(Settings):
    """What every schedule can say about itself. All are plain settings: frozen, hashable, readable in YAML."""

    RETURNS: ClassVar[Mapping[str, Returned]] = {"value": _number, "span": _ordered_pair, "extremes": _ordered_pair}
    kind: str

    @abstractmethod
    def value(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        """The number at optimizer step ``step`` (0-based) of a run of ``steps``."""

    @abstractmethod
    def span(self, steps: int, renoise_end: Fraction | None = None) -> tuple[Fraction, Fraction]:
        """(start, end): the steps between which the value moves; it is final from ``end`` on.

        Raises:
            InputError: the end lies before the start (with mixed units only a run's length can tell).
        """

    def check(self, steps: int, renoise_end: Fraction | None = None) -> None:
        """Raises InputError where it cannot drive a run of ``steps``: it ends before it starts, or gives no numbers."""
        self.span(steps, renoise_end)
        for step in (0, steps - 1):
            checked(self.value(step, steps, renoise_end), float, self, "value")

    @property
    def tied(self) -> bool:
        """Whether a moment of it is relative to the end of renoise."""
        moments = (getattr(self, name, "") for name in ("start", "end"))
        return any(str(moment).startswith(ANCHOR) for moment in moments)

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value that it ever takes, for checks of what it drives."""


class Constant(Schedule):
    """The same number throughout."""

    kind: Literal["constant"] = "constant"
    number: float = Field(allow_inf_nan=False, description="the value at every step")

    def value(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        return self.number

    def span(self, steps: int, renoise_end: Fraction | None = None) -> tuple[Fraction, Fraction]:
        return Fraction(0), Fraction(0)

    @property
    def extremes(self) -> tuple[float, float]:
        return self.number, self.number


class _Moving(Schedule):
    """From ``initial`` to ``final``."""

    initial: float = Field(0.0, allow_inf_nan=False, description="value before the start")
    final: float = Field(allow_inf_nan=False, description="value from the end on")
    start: Moment = Field(default=0, validate_default=True, description="steps, 20%, or after_renoise[+10%]")

    @property
    def extremes(self) -> tuple[float, float]:
        return min(self.initial, self.final), max(self.initial, self.final)


class Hard(_Moving):
    """A switch: ``initial`` before ``start``, ``final`` from that step on.

    *When to use*: to reproduce runs that switch a reward on at once; a ramp shocks the optimizer less.
    """

    kind: Literal["hard"] = "hard"

    def value(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        return self.final if step >= self.span(steps, renoise_end)[0] else self.initial

    def span(self, steps: int, renoise_end: Fraction | None = None) -> tuple[Fraction, Fraction]:
        at = position(self.start, steps, renoise_end)
        return at, at


class _Ramp(_Moving):
    """A monotone curve from ``start`` to ``end``, exactly ``initial`` and ``final`` outside."""

    end: Moment = Field(default="100%", validate_default=True, description="moment like start; 100% = end of the run")

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> "_Ramp":
        """Moments of one unit compare without knowing the run; mixed ones are checked in :meth:`span`."""
        start, end = (_MOMENT.fullmatch(str(moment)) for moment in (self.start, self.end))
        assert start
        assert end
        comparable = start["anchor"] == end["anchor"] and not (
            (start["share"] and end["steps"]) or (start["steps"] and end["share"])
        )
        if comparable and position(self.end, 1, Fraction(0)) < position(self.start, 1, Fraction(0)):
            raise ValueError(f"the ramp ends at {self.end}, before it starts at {self.start}")
        return self

    def span(self, steps: int, renoise_end: Fraction | None = None) -> tuple[Fraction, Fraction]:
        start, end = (position(moment, steps, renoise_end) for moment in (self.start, self.end))
        if end < start:
            raise InputError(
                f"a {self.kind} ramp ends before it starts",
                got=f"start {self.start} = step {float(start):g}, end {self.end} = step {float(end):g} of {steps}",
                fix="move the end, or use kind: hard for a switch",
            )
        return start, end

    def value(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        start, end = self.span(steps, renoise_end)
        if step >= end:
            return self.final
        if step <= start:
            return self.initial
        return self.initial + (self.final - self.initial) * self.shape(float((step - start) / (end - start)))

    @abstractmethod
    def shape(self, u: float) -> float:
        """Share of the way at progress ``u`` in (0, 1); 0 at 0, ½ at ½ and 1 at 1."""


class Linear(_Ramp):
    """A straight ramp; with ``initial: 0`` the usual warm-up."""

    kind: Literal["linear"] = "linear"

    def shape(self, u: float) -> float:
        return u


class Cosine(_Ramp):
    """Half a cosine: flat at both ends. DMDR's renoise (arXiv:2511.13649) moves like this."""

    kind: Literal["cosine"] = "cosine"

    def shape(self, u: float) -> float:
        return (1 - math.cos(math.pi * u)) / 2


class Sigmoid(_Ramp):
    """A logistic curve, rescaled so that it starts and ends exactly at its values.

    *When to use*: where the first part of the ramp must be gentler than a cosine's: at steepness 10 the first
    tenth of the time covers 1 % of the way (cosine 2.4 %, linear 10 %).
    """

    kind: Literal["sigmoid"] = "sigmoid"
    steepness: float = Field(10.0, gt=0, le=200, description="k: logistic units between start and end")

    def shape(self, u: float) -> float:
        k = self.steepness
        return (1 + math.tanh(k * (u - 0.5) / 2) / math.tanh(k / 4)) / 2


class _Itself:
    """``Schedule.Config`` is the class that is asked: a schedule has no state beside its settings."""

    def __get__(self, instance: object, owner: type[Schedule]) -> type[Schedule]:
        return owner


setattr(Schedule, "Config", _Itself())  # noqa: B010  (in the class body, pydantic would take it for its own Config)

SCHEDULES: Registry[Any] = Registry(
    "schedule",
    Schedule,
    {"constant": Constant, "hard": Hard, "linear": Linear, "cosine": Cosine, "sigmoid": Sigmoid},
)


def _number_is_constant(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "constant", "number": value} if is_number else value


if TYPE_CHECKING:
    AnySchedule: TypeAlias = Any
else:
    AnySchedule = Annotated[component(SCHEDULES), BeforeValidator(_number_is_constant)]


# --- a reward's onset -----------------------------------------------------------------------------------


class RewardSchedule(Settings):
    """When a reward acts, how strongly, and what the learning rate does from then on.

    The published run switched hard at 20 % while its renoise ran until 30 %: ``weight: {kind: hard, final: 0.05,
    start: 20%}``. DMDR (arXiv:2511.13649) waits until after its renoise schedule and halves the learning rate:
    ``weight: {kind: hard, final: 0.05, start: after_renoise+10000}``, ``lr_factor: 0.5``.
    """

    weight: AnySchedule = Field(default=1.0, validate_default=True, description="factor of the reward, a schedule")
    lr_factor: float = Field(1.0, gt=0, le=1, description="factor of the learning rate from the weight's start on")

    @field_validator("weight")
    @classmethod
    def _rewards_are_not_punished(cls, weight: Schedule) -> Schedule:
        if weight.extremes[0] < 0:
            raise ValueError(f"the weight falls to {weight.extremes[0]:g}; expected ≥ 0")
        return weight

    def weight_at(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        """Factor of the reward at optimizer step ``step`` of ``steps``."""
        return self.weight.value(step, steps, renoise_end)

    def lr_factor_at(self, step: int, steps: int, renoise_end: Fraction | None = None) -> float:
        """Factor of the learning rate: 1 before the weight's start, ``lr_factor`` from there on."""
        return self.lr_factor if step >= self.weight.span(steps, renoise_end)[0] else 1.0
