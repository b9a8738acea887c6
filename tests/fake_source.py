"""A source for trainer and command-line tests: two classes of 4×4 pictures in closed form, ready at once."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from twinrl.backends import NETWORKS
from twinrl.backends.embedding import Spec
from twinrl.config import Settings
from twinrl.flow import draws
from twinrl.flow.branches import Rows
from twinrl.flow.source import Split
from twinrl.flow.transport import like
from twinrl.terms import TERMS
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, instant
from twinrl.training import schema
from twinrl.training.schema import RunConfig
from twinrl.training.sources import SOURCES

CLASSES = ("dark", "bright")
LATENT_SHAPE = (2, 4, 4)
TEXT = 6

SMALL = (
    "train.steps=12",
    "train.batch=16",
    "model.network={kind: mlp, width: 16, depth: 1, condition_width: 16}",
    "optim.lr=3e-3",
    "checkpoint.every=5",
    "evaluation={every: 4, n: 20, nfe: [1], teacher_steps: 2, velocity_rows: 10, grid_samples: 2}",
    "tracking.mlflow=false",
)


def small(runs: Path, *overrides: str, preset: str = "twinflow") -> RunConfig:
    """A run of 12 steps with a tiny network under the folder ``runs``."""
    return schema.load(preset, [*SMALL, f"run.dir={runs}", *overrides])


def _split(name: str, n: int) -> Split:
    labels = torch.arange(n) % len(CLASSES)
    noise = draws.normal((n, 3, 4, 4), 11, name)
    return Split(labels[:, None, None, None] - 0.5 + 0.2 * noise, labels)


class MeanJudge:
    """Sees the brightness; features are the means of the pictures' quarters."""

    def features(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 2).mean(1).flatten(1)

    def logits(self, pixels: Tensor) -> Tensor:
        mean = pixels.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def brightness(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scorer."""
    return pixels.mean((1, 2, 3))


@dataclass
class FakeSource:
    """Satisfies ``twinrl.flow.source.Source``: latents are twice the first two colour channels.

    Arguments:
        content_hash: to play data that changed.
    """

    content_hash: str = "fake-content-0"
    name: str = "fake"
    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    classes: tuple[str, ...] = CLASSES
    train: Split = field(default_factory=lambda: _split("train", 40))
    validation: Split = field(default_factory=lambda: _split("validation", 24))
    test: Split = field(default_factory=lambda: _split("test", 24))
    judge: MeanJudge = field(default_factory=MeanJudge)
    scorers: Mapping = field(default_factory=lambda: {"brightness": brightness})
    held_out: frozenset[str] = frozenset({"brightness"})

    def latents(self, split: str) -> Tensor:
        return self.encode(getattr(self, split).pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        return 2 * pixels[:, :2]

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([latents, latents.mean(1, keepdim=True)], 1) / 2

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        return [f"a {CLASSES[label]} picture" for label in labels.tolist()]

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": torch.stack([_embedding(prompt) for prompt in prompts])}

    def null_condition(self, n: int) -> dict[str, Tensor]:
        return {"text": torch.zeros(n, TEXT)}

    def teacher_weights(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        """Keyed random weights: other ones than any initialisation gives."""
        own = network.state_dict()
        return {name: 0.1 * draws.normal(tuple(value.shape), 3, f"teacher {name}") for name, value in own.items()}

    def to(self, device: str) -> "FakeSource":
        return self


def _embedding(prompt: str) -> Tensor:
    key = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "big")
    return draws.normal((TEXT,), key, "fake text")


# --- networks and a term for odd cases, registered by the tests that need them -----------------------------


class Dropping(nn.Module):
    """A perceptron with dropout that knows the signed time; works in every precision."""

    class Config(Settings):
        kind: Literal["dropping"] = "dropping"
        p: float = 0.3

    def __init__(self, config: Config, spec: Spec):
        super().__init__()
        size = math.prod(spec.latent_shape)
        self.enter = nn.Linear(size + TEXT + 2, 24)
        self.dropout = nn.Dropout(config.p)
        self.leave = nn.Linear(24, size)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        told = torch.cat([x.flatten(1), condition["text"].to(x), t.to(x)[:, None], r.to(x)[:, None]], 1)
        return self.leave(self.dropout(torch.tanh(self.enter(told)))).view_as(x)


class Forked(nn.Module):
    """A network for each branch, so that nothing the fake one learns moves a sample by itself."""

    class Config(Dropping.Config):
        kind: Literal["forked"] = "forked"  # type: ignore[assignment]
        p: float = 0.0

    def __init__(self, config: Config, spec: Spec):
        super().__init__()
        self.real, self.fake = Dropping(config, spec), Dropping(config, spec)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return torch.where(like(t < 0, x), self.fake(x, t, r, condition), self.real(x, t, r, condition))


class Unsigned(Dropping):
    """Sees |t| and |r| alone, so it cannot tell the fake trajectory from the real one."""

    class Config(Dropping.Config):
        kind: Literal["unsigned"] = "unsigned"  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return super().forward(x, t.abs(), r.abs(), condition)


class Poison(Term):
    """A plain velocity regression whose target is nan in one training step."""

    class Config(TermConfig):
        kind: Literal["poison"] = "poison"
        at: int

    def query(self, rows: Rows, ctx: Context) -> Query:
        return instant(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        return Target(torch.full_like(rows.v, math.nan) if rows.draws.step == self.config.at else rows.v)


class Planted(Term):
    """A plain velocity regression whose target is ``size`` times too large, or nan, for one row of one step.

    It is planted into the run's own data order alone: after a rollback, with another order, it is not there.
    """

    class Config(TermConfig):
        kind: Literal["planted"] = "planted"
        at: int
        size: float = 1000.0
        row: int = 0

    def query(self, rows: Rows, ctx: Context) -> Query:
        return instant(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        target = rows.v.clone()
        if rows.draws.step == self.config.at and rows.draws.seed < 2**32:
            target[rows.index == self.config.row] *= self.config.size
        return Target(target)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the above known by name for one test; ``digits`` becomes the fake source."""
    monkeypatch.setitem(NETWORKS, "dropping", Dropping)
    monkeypatch.setitem(NETWORKS, "forked", Forked)
    monkeypatch.setitem(NETWORKS, "unsigned", Unsigned)
    monkeypatch.setitem(TERMS, "poison", Poison)
    monkeypatch.setitem(TERMS, "planted", Planted)
    monkeypatch.setitem(SOURCES, "digits", lambda root: FakeSource())


class ByPath(FakeSource):
    """For processes in which nothing registers it: named by its dotted path."""

    def __init__(self, root: Path | None) -> None:
        super().__init__()
