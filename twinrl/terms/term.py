"""What a loss term is: it declares where the network is evaluated, gives a target, and turns both into losses.

A term is one small class in one file. It never calls the student for its prediction: it returns a
:class:`Query`, and terms with equal queries share one forward pass. Its target may call teachers through the
:class:`Context`, always without gradient. Terms hold no state, no optimizer and no hidden randomness. One that needs a
second network is a :class:`NetworkOwner`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings, component
from twinrl.config.components import checked
from twinrl.flow import conditions
from twinrl.flow.branches import BRANCHES, Rows
from twinrl.flow.conditions import Condition
from twinrl.machine.moving import rows_of
from twinrl.terms.losses import LOSSES, time_weight

if TYPE_CHECKING:
    LossConfig: TypeAlias = Any
else:
    LossConfig = component(LOSSES)


@dataclass(frozen=True)
class Query:
    """Where the student is to be evaluated.

    Attributes:
        point: name of the evaluation point. Within a batch, equal (point, row) promise equal inputs, so the
            forward pass is shared.
        x: (B, C, H, W) network input.
        t: (B,) signed source time in [−1, 1], negative = fake branch.
        r: (B,) signed target time, |r| ≤ |t|.
        c: condition, B rows.
        clean: (B, C, H, W) data end of the path on which ``x`` lies, where it is not the rows' ``x``.
    """

    point: str
    x: Tensor
    t: Tensor
    r: Tensor
    c: Condition
    clean: Tensor | None = None

    def select(self, keep: Tensor | slice) -> "Query":
        """The rows at the positions ``keep``."""
        clean = None if self.clean is None else rows_of(self.clean, keep)
        x, t, r = (rows_of(each, keep) for each in (self.x, self.t, self.r))
        return Query(self.point, x, t, r, conditions.rows(self.c, keep), clean)


def own(rows: Rows) -> Query:
    """The rows' own point: ``(x_t, t, r)``."""
    return Query("own", rows.x_t, rows.t, rows.r, rows.c)


def instant(rows: Rows) -> Query:
    """The instantaneous velocity on the path: ``(x_t, t, t)``."""
    return Query("instant", rows.x_t, rows.t, rows.t, rows.c)


def one_step(rows: Rows) -> Query:
    """One jump from pure noise: ``(z, 1, 0)``; on rows that are there already (e2e) it *is* their own point."""
    if rows.jump:
        return own(rows)
    return Query("one_step", rows.z, torch.ones_like(rows.t), torch.zeros_like(rows.r), rows.c)


class Context(Protocol):
    """What a term may ask for beside its own rows. Every method but ``prediction`` and ``own`` is without gradient."""

    def prediction(self, query: Query, rows: Rows) -> Tensor:
        """The student at ``query``, differentiable and shared with all terms that ask for the same point."""
        ...

    def student(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        """The student without gradient."""
        ...

    def both_branches(self, x: Tensor, tau: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """The student's instantaneous velocities without gradient: F(x, −τ, −τ) and F(x, τ, τ), in one forward pass
        if that has no more rows than the micro-batch."""
        ...

    def teacher(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        """The recursion's teacher F̄."""
        ...

    def derivative(self, query: Query, v: Tensor) -> Tensor:
        """The student's dF/dt (B, C, H, W) at ``query``, where ``x`` moves with velocity ``v`` and r stands still.

        Raises:
            InputError: a part of the network has no forward-mode derivative.
        """
        ...

    def own(self, term: "NetworkOwner", x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        """The network that ``term`` owns; differentiable in its weights while it is trained."""
        ...

    def target_velocity(self, rows: Rows) -> Tensor:
        """The guidance-enhanced target velocity v* of the rows, computed once for all terms."""
        ...

    def reward(self, samples: Tensor, rows: Rows, apart: Sequence[str] = ()) -> "Ascent":
        """The reward's ascent at samples (B, C, H, W) in the space of the flow, made for the rows' prompts; with the
        parts of it that the ensemble's members ``apart`` have."""
        ...


class Target(NamedTuple):
    """A term's target and what is worth logging about it.

    Attributes:
        value: (B, C, H, W), without gradient.
        aux: metric name → (B,) values per row, whose mean over the rows of the batch is logged.
        shift: (B, C, H, W) part of ``value`` that an ascent has added; None where there is none.
        constant: (B,) numbers whose mean over the term's rows is added to its logged loss, without gradient.
        shifts: name → (B, C, H, W) part of ``value`` that has a gradient of its own.
        rests: the target is the prediction itself, so that the loss has no gradient; nothing is back-propagated.
    """

    value: Tensor
    aux: Mapping[str, Tensor] = {}
    shift: Tensor | None = None
    constant: Tensor | None = None
    shifts: Mapping[str, Tensor] = {}
    rests: bool = False


class Ascent(NamedTuple):
    """A direction in which samples are to move, as a reward's latent gradient.

    Attributes:
        g: (B, C, H, W) direction of each sample, times the present weight.
        aux: metric name → (B,) values per row.
        rests: the force is off: ``g`` is zero.
        parts: name → (B, C, H, W) part of ``g`` that was asked for apart.
    """

    g: Tensor
    aux: Mapping[str, Tensor] = {}
    rests: bool = False
    parts: Mapping[str, Tensor] = {}


class TermConfig(Settings):
    """Settings that every term has."""

    branches: tuple[str, ...] = Field(("any",), min_length=1, description="branches whose rows the term sees")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of the term in the total loss")
    loss: LossConfig = Field(default="l2", validate_default=True, description="per-sample loss: l2 or barron")
    time_weight: bool | Literal["clamped"] = Field(
        False, description="weight rows by tan((1 − (|t| − |r|))·π/2.5) + 1; clamped = as in the published RL run"
    )
    mean_over: Literal["rows", "batch"] = Field(
        "rows", description="divide the sum by the term's own rows, or by the rows of the whole batch"
    )


@dataclass(frozen=True)
class Term(ABC):
    """A loss term. Subclasses give ``Config``, :meth:`query` and :meth:`target`; :meth:`loss` rarely changes."""

    config: Any
    Config: ClassVar[type[TermConfig]] = TermConfig
    negative_time: ClassVar[bool] = False  # whether the network is evaluated at t < 0
    row_loss: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_loss", LOSSES.build(self.config.loss))

    @abstractmethod
    def query(self, rows: Rows, ctx: Context) -> Query:
        """Where the student is evaluated for these rows."""

    @abstractmethod
    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        """The regression target, given the prediction ``F`` (B, C, H, W) already detached."""

    def loss(self, rows: Rows, query: Query, F: Tensor, target: Tensor) -> Tensor:
        """(B,) losses per row; differentiable in ``F``."""
        per_row = checked(self.row_loss(F, target), Tensor, self.row_loss, "__call__", (len(F),))
        return per_row * self.time_weight(query)

    def time_weight(self, query: Query) -> Tensor | float:
        """(B,) weights of the rows by their times, or 1."""
        chosen = self.config.time_weight
        return time_weight(query.t, query.r, clamped=chosen == "clamped") if chosen else 1.0

    def loss_parts(self, rows: Rows, query: Query, F: Tensor, target: Target) -> Mapping[str, Tensor]:
        """Parts of the sum of the row losses that belong to others, e.g. to a reward inside the target.

        Each is a scalar, differentiable in ``F``, under a name of :meth:`part_names`; what is left is the term's own.
        """
        return {}

    @classmethod
    def part_names(cls, config: Any) -> tuple[str, ...]:
        """Names that :meth:`loss_parts` uses under this configuration."""
        return ()

    @classmethod
    def wants_reward(cls, config: Any) -> bool:
        """Whether the term asks its context for the reward's ascent."""
        return False

    def normaliser(self, counts: Mapping[str, int], global_batch: int) -> int:
        """What the sum of the row losses is divided by, given the rows of each branch in the *global* batch."""
        if self.config.mean_over == "batch":
            return global_batch
        return sum(counts[name] for name in self.config.branches)


class OwnerConfig(TermConfig):
    """Settings of every term that owns a network."""

    updates: int = Field(5, ge=1, le=1000, description="steps of the own network before each of the student's")
    own_lr: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="learning rate of the own network, constant; null = optim.lr"
    )


@dataclass(frozen=True)
class NetworkOwner(Term):
    """A term with a network of its own, which starts as the student does and is trained beside it.

    *When to use*: what the student's samples are compared with is learned, too: a fake score, a critic. Subclasses give
    :meth:`own_losses`. Optimizer, checkpoints and sharding are the trainer's: the term stays without state.
    """

    Config: ClassVar[type[OwnerConfig]] = OwnerConfig

    @abstractmethod
    def own_losses(self, rows: Rows, ctx: Context, update: int) -> Tensor:
        """(B,) losses of the own network on these rows, differentiable through :meth:`Context.own` alone.

        Arguments:
            update: number of the own step before this step of the student's; noise is drawn anew for each.
        """


def check_branches(config: TermConfig, mix: Mapping[str, float]) -> None:
    """Raises ValueError where a term wants rows of a branch that the mix does not have."""
    missing = [name for name in config.branches if not mix.get(name)]
    if missing:
        known = [name for name in BRANCHES if mix.get(name)]
        raise ValueError(f"branch {missing[0]} has no rows in the mix; the mix has {', '.join(known)}")
