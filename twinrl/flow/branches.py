"""Branches: how the rows of a global batch get their times.

TwinFlow trains several kinds of row in one batch (docs/formulations.md). A *mix* gives each branch its share:

- ``e2e``: (t, r) = (1, 0), the one-step jump;
- ``mul``: ``r = t − U·t·min(0.05, λ)``, nearly instantaneous (multi-step sampling);
- ``any``: ``r = t − U·λ·t``, any jump; with the mix ``{any: 1}`` every term sees the whole batch;
- ``one``: ``r = 0``, a jump to data from any ``t`` (TwinFlow's LoRA code, whose order 1 needs it);
- ``adv``: rows for the fake ("twin") trajectory; ``t`` is the noise level, the term negates it.

λ is the consistency ratio, U uniform. The *global* batch is divided first, exactly, by largest remainder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.flow import conditions, draws, transport
from twinrl.flow.conditions import Condition
from twinrl.machine.moving import moved, rows_of

TimeMap = Callable[[Tensor], Tensor]
"""(B,) uniforms in [0, 1) → (B,) times in [0, 1], increasing."""


class Draws(Protocol):
    """Random numbers for the rows of one global batch; the same purpose always gives the same numbers.

    Attributes:
        seed, step: the key under which they are drawn.
    """

    @property
    def seed(self) -> int: ...

    @property
    def step(self) -> int: ...

    def normal(self, purpose: str, rows: Sequence[int]) -> Tensor:
        """(R, C, H, W) standard normal noise of R rows at ascending positions in the global batch, on the CPU."""
        ...

    def uniform(self, purpose: str) -> Tensor:
        """(B,) uniforms in [0, 1), on the CPU."""
        ...


@dataclass(frozen=True)
class BatchDraws:
    """Keyed draws of training step ``step`` for a global batch of samples of ``shape`` (B, C, H, W).

    ``by_row``: noise of every row has a key of its own; else there is one for the batch, which is then drawn whole.
    """

    seed: int
    step: int
    shape: tuple[int, ...]
    by_row: bool = False

    def normal(self, purpose: str, rows: Sequence[int]) -> Tensor:
        if self.by_row:
            return draws.normal_rows(self.shape[1:], self.seed, purpose, self.step, rows)
        return draws.normal(self.shape, self.seed, purpose, self.step)[selection(rows)]

    def uniform(self, purpose: str) -> Tensor:
        return draws.uniform(self.shape[:1], self.seed, purpose, self.step)


@dataclass(frozen=True)
class Rows:
    """Rows of one global batch, all of the same branch or of several joined.

    Attributes:
        index: (B,) positions in the global batch, ascending, on the CPU.
        x: (B, C, H, W) data (latents).
        z: (B, C, H, W) noise.
        t: (B,) source time = noise level, in [0, 1].
        r: (B,) target time, 0 ≤ r ≤ t.
        c: condition, B rows.
        null: the empty condition ∅ of these rows, B rows.
        draws: further keyed draws of the global batch, taken through :meth:`normal` and :meth:`uniform`.
        global_batch: rows in the global batch.
        captions: the prompts of the *global* batch; :attr:`prompts` are these rows'. Empty where there are none.
        renoise: placement → time law (uniforms to times) that takes the place of the usual one there.
        jump: all rows are the one-step jump (t, r) = (1, 0); known without a look at the device.
    """

    index: Tensor
    x: Tensor
    z: Tensor
    t: Tensor
    r: Tensor
    c: Condition
    null: Condition
    draws: Draws
    global_batch: int
    captions: Sequence[str] = ()
    renoise: Mapping[str, TimeMap] = field(default_factory=dict)
    jump: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The index as Python numbers, with which rows are counted and compared on the host."""
        return tuple(self.index.tolist())

    @property
    def x_t(self) -> Tensor:
        """(B, C, H, W): the point on the path at time ``t``."""
        return transport.interpolate(self.x, self.z, self.t)

    @property
    def v(self) -> Tensor:
        """(B, C, H, W): the path's velocity ``z − x``."""
        return transport.velocity(self.x, self.z)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row; empty where the data have none."""
        return [self.captions[i] for i in self.numbers] if self.captions else []

    def normal(self, purpose: str) -> Tensor:
        """(B, C, H, W) noise for ``purpose``, the same however the global batch is cut."""
        return moved(self.draws.normal(purpose, self.numbers), self.x.device, self.x.dtype)

    def uniform(self, purpose: str) -> Tensor:
        """(B,) uniforms for ``purpose``: these rows' part of the global draw."""
        return moved(self.draws.uniform(purpose)[selection(self.numbers)], self.t.device, self.t.dtype)

    def time(self, placement: str, purpose: str) -> Tensor:
        """(B,) times in [0, 1] for ``purpose``: uniform, or as renoise shapes the times of ``placement``."""
        return self.renoise.get(placement, lambda u: u)(self.uniform(purpose))

    def select(self, keep: Tensor | slice) -> "Rows":
        """The rows at the positions ``keep``: indices into these rows, a mask over them, or a run of them."""
        x, z, t, r = (rows_of(each, keep) for each in (self.x, self.z, self.t, self.r))
        return Rows(
            self.index[keep], x, z, t, r,
            conditions.rows(self.c, keep), conditions.rows(self.null, keep), self.draws, self.global_batch,
            self.captions, self.renoise, self.jump,
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """A global batch, divided into branches.

    Attributes:
        rows: all rows, in the order of the mix.
        branch: name of each branch → positions of its rows.
    """

    rows: Rows
    branch: Mapping[str, Tensor]

    def on(self, branches: tuple[str, ...]) -> Rows:
        """The rows of the named branches, joined in the order of the batch."""
        places = sorted(i for name in branches for i in self.branch[name].tolist())
        return replace(self.rows.select(selection(places)), jump=set(branches) == {"e2e"})

    def chunks(self, size: int) -> list["Batch"]:
        """Consecutive micro-batches of at most ``size`` rows; their branches are what falls into them."""
        n = len(self.rows)
        return [self] if size >= n else [self._slice(start, min(start + size, n)) for start in range(0, n, size)]

    def _slice(self, start: int, stop: int) -> "Batch":
        inside = {name: at[(at >= start) & (at < stop)] - start for name, at in self.branch.items()}
        return Batch(self.rows.select(slice(start, stop)), inside)


def selection(positions: Sequence[int]) -> Tensor | slice:
    """What takes the rows at ascending ``positions``: a slice where these are a run, so that nothing is copied and no
    index is sent to the device."""
    if positions and positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return torch.tensor(positions, dtype=torch.long)


class TimeLaw(Settings):
    """How rows get their times: ``t ~ Beta(alpha, beta)·scale``, and the consistency ratio of the branches."""

    alpha: float = Field(1.0, gt=0, description="θ₁")
    beta: float = Field(1.0, gt=0, description="θ₂")
    scale: float = Field(1.0, gt=0, le=1, description="θ₃: largest time")
    consistency_ratio: float = Field(1.0, ge=0, le=1, description="λ: how far below t the target times reach")

    def source_time(self, u: Tensor) -> Tensor:
        """(B,) times from (B,) uniforms, by inverse CDF."""
        return draws.beta(u, self.alpha, self.beta) * self.scale


def _one_step(t: Tensor, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(t), torch.zeros_like(t)


def _multi_step(t: Tensor, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return t, t - u * t * min(0.05, ratio)


def _any_step(t: Tensor, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return t, t - u * ratio * t


def _to_data(t: Tensor, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return t, torch.zeros_like(t)


def _fake(t: Tensor, u: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return t, t


TimeRule = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
BRANCHES: dict[str, TimeRule] = {
    "e2e": _one_step, "mul": _multi_step, "any": _any_step, "one": _to_data, "adv": _fake,
}  # fmt: skip
"""Branch → rule giving (t, r) from drawn times (B,), uniforms (B,) and the consistency ratio."""


def allocate(mix: Mapping[str, float], batch: int) -> dict[str, int]:
    """Rows per branch, exactly ``batch`` in all, by largest remainder (ties go to the earlier branch).

    Raises:
        InputError: a branch with a positive share would be left without rows.
    """
    shares = {name: Fraction(str(share)) for name, share in mix.items()}  # rounding would decide ties
    quotas = {name: batch * share / sum(shares.values()) for name, share in shares.items()}
    rows = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(mix, key=lambda name: rows[name] - quotas[name])
    for name in by_remainder[: batch - sum(rows.values())]:
        rows[name] += 1
    empty = [name for name, share in mix.items() if share > 0 and rows[name] == 0]
    if empty:
        raise InputError(
            f"train.batch is too small for the mix: branch {', '.join(empty)} gets no row",
            got=f"{batch} rows for {', '.join(f'{n}={s:g}' for n, s in mix.items())}",
            fix="raise train.batch (rows per forward are bounded by train.micro_batch) or change branches",
        )
    return rows


def shared(mix: Mapping[str, float], batch: int, parts: int, number: int) -> list[int]:
    """The rows of a global batch that one of ``parts`` processes has: an equal, consecutive part of every branch."""
    mine: list[int] = []
    start = 0
    for count in allocate(mix, batch).values():
        each = -(-count // parts)
        mine += range(start + min(number * each, count), start + min((number + 1) * each, count))
        start += count
    return mine


def divide(
    mix: Mapping[str, float],
    law: TimeLaw,
    x: Tensor,
    c: Condition,
    null: Condition,
    drawn: Draws,
    captions: Sequence[str] = (),
    renoise: Mapping[str, TimeMap] | None = None,
    mine: Sequence[int] | None = None,
) -> Batch:
    """A global batch of B rows divided into the branches of ``mix``, with its times and noise; or some rows of it.

    Arguments:
        mix: branch → share.
        law: how t is drawn where renoise does not shape it.
        x, c, null: data, condition and empty condition of these rows, (R, C, H, W) and R rows each.
        drawn: keyed draws.
        captions: B prompts, or none.
        renoise: placement → time law; ``training`` shapes t here, the others are for the terms.
        mine: ascending positions of R rows; None: all.
    """
    renoise = renoise or {}
    precision = torch.promote_types(x.dtype, torch.float32)  # times of half-precision data stay in float32
    shaped = renoise.get("training")
    u = drawn.uniform("t")
    counts = allocate(mix, len(u))
    t_drawn = (shaped(u) * law.scale if shaped else law.source_time(u)).to(precision)  # on the host: few numbers
    t, r, branch, start = torch.empty_like(t_drawn), torch.empty_like(t_drawn), {}, 0
    for name, count in counts.items():
        at, u = slice(start, start + count), drawn.uniform(f"r {name}").to(t)
        t[at], r[at] = BRANCHES[name](t_drawn[at], u[at], law.consistency_ratio)
        branch[name], start = torch.arange(start, at.stop), at.stop
    index = torch.arange(start) if mine is None else torch.tensor(mine, dtype=torch.long)
    keep = selection(index.tolist())
    noise = moved(drawn.normal("noise", index.tolist()), x.device, x.dtype)
    t, r = moved(t[keep], x.device), moved(r[keep], x.device)
    rows = Rows(index, x, noise, t, r, c, null, drawn, start, captions, renoise)
    return Batch(rows, branch if mine is None else {name: _among(index, at) for name, at in branch.items()})


def _among(index: Tensor, wanted: Tensor) -> Tensor:
    """Positions in ``index`` of those that are ``wanted``."""
    return torch.isin(index, wanted).nonzero().flatten()
