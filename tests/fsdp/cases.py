"""Runs of the fake source, alone and on several processes.

QUICK are few and together use every mechanism of sharding once; FULL are every preset and switch, for the campaign.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import logs
from tests.fake_source import LATENT_SHAPE, TEXT, FakeSource, Planted, small
from twinrl.backends import NETWORKS
from twinrl.backends.embedding import Spec
from twinrl.config import Settings
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.machine.dtypes import MASTER_DTYPES
from twinrl.run import layout, names
from twinrl.terms import TERMS
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.sources import SOURCES
from twinrl.training.trainer import Outcome, Trainer

CPU = torch.device("cpu")
STEPS = 4
NETWORK = "model.network={kind: mlp, width: 16, depth: 2, condition_width: 16}"
COMMON = (f"train.steps={STEPS}", "evaluation.every=2", "checkpoint.every=50", "stability.capsules.every=0", NETWORK)
REWARDED = (
    "stability.policy=record", "reward.schedule.weight=1", "reward.model=brightness", "evaluation.guided=null",
    "train.batch=16",
)  # fmt: skip
ENSEMBLE = (
    "reward.model={kind: ensemble, rewards: {light: {reward: brightness}, sharp: {reward: sharpness}}}",
    "reward.schedule.weight=1", "terms.reward.apart=[light]", "evaluation.guided=null", "train.batch=16",
)  # fmt: skip
PER_PROMPT = "reward.model={kind: per_prompt, least: 4, reward: brightness}"
RULES = ("gradients.each.clip.max_norm=0.1", "gradients.telemetry={shares_every: 1, cosines_every: 1}")
CHAIN = (*RULES, "gradients.total={zclip: {warmup: 2, z: 0.01}, clip: {max_norm: 0.3}}")
SCALED = ("model.network={kind: scaled}", "train.init=random", "optim.lr=1e-4")
PLANT = "terms.planted={kind: planted, branches: [e2e, mul, any, adv], at: 2, row: 13, size: .nan}"
LIVE = ("teacher={kind: live, guidance: frozen, allow_live: true}", "optim.kind=adam")
ROLLBACK = (PLANT, "stability={policy: rollback, rollback_margin: 1}", "checkpoint.every=2")
SWITCHES = "fsdp={checkpoint_activations: true, cpu_offload: true, reshard_last: true, prefetch: 2}"


@dataclass(frozen=True)
class Case:
    """A run: preset and overrides; ``precise`` = float64."""

    preset: str
    overrides: tuple[str, ...] = ()
    precise: bool = True

    def settings(self, folder: Path) -> RunConfig:
        precision = ("train.precision=float64",) if self.precise else ()
        return small(folder, *COMMON, *precision, *self.overrides, preset=self.preset)


QUICK: dict[str, Case] = {
    "output space, statistics of scores": Case(
        "published",
        (*REWARDED, *RULES, PER_PROMPT, "gradients.space=output", "train.micro_batch=4", "train.steps=3"),
    ),
    "a parameter without dimensions, each micro-batch reduced": Case(
        "tutorial",
        (*SCALED, "train.batch=16", "train.micro_batch=4", "train.steps=3", "train.draws=rows"),
    ),
    "switches": Case("simpletuner", (*LIVE, SWITCHES, "train.steps=3")),
    "nan, rollback": Case("twinflow", ROLLBACK),
    "a term's own network": Case("dmd2", ("train.batch=16", "train.micro_batch=4", "train.steps=2")),
    "float32": Case("lab", ("train.steps=1",), precise=False),
    "bf16": Case("lab", ("train.steps=1", "train.precision=bf16"), precise=False),
}  # fmt: skip
ELASTIC = Case("twinflow", (*CHAIN, "train.micro_batch=4"))
HYBRID = Case("twinflow", (*RULES, "fsdp.replicate=2", "train.steps=2"))
"""Copies of shards."""

POLICIES = ("record", "zero", "skip", "cut_lr", "cut_lr+skip")
FULL: dict[str, Case] = {
    "twinflow": Case("twinflow"),
    "tutorial": Case("tutorial", ("train.batch=16",)),
    "simpletuner": Case("simpletuner"),
    "lab": Case("lab"),
    "flow_matching": Case("flow_matching"),
    "rcgm": Case("rcgm"),
    "published": Case("published", REWARDED),
    "corrected": Case("corrected", REWARDED),
    "meanflow": Case("meanflow", ("terms.mean_flow.derivative=difference",)),
    "dmd2": Case("dmd2"),
    "fast": Case("fast"),
    "members of an ensemble": Case("recommended", ENSEMBLE),
    "statistics of scores": Case("published", (*REWARDED, PER_PROMPT, "train.micro_batch=4")),
    "frozen guidance, live recursion": Case("twinflow", LIVE),
    "image-free": Case("twinflow", ("data.images=false", "train.draws=rows")),
    "micro-batches": Case("twinflow", ("train.micro_batch=2",)),
    "micro-batches, reduced at once": Case("twinflow", ("train.micro_batch=2", "fsdp.reduce_every_micro_batch=false")),
    "parameter space": Case("twinflow", CHAIN),
    "output space": Case("twinflow", (*CHAIN, "gradients.space=output")),
    "no space": Case("twinflow", ("gradients={space: none, each: {}, total: {clip: {max_norm: 0.1}}}",)),
    "output space, micro-batches": Case(
        "tutorial", (*RULES, "gradients.space=output", "train.micro_batch=4", "train.batch=16")
    ),
    "hybrid": HYBRID,
    "recomputed activations": Case("lab", ("fsdp.checkpoint_activations=true", "fsdp.prefetch=0")),
    "compiled": Case("lab", ("machine.compile=aot_eager",)),
    "dit": Case("twinflow", ("model.network={kind: dit, width: 16, depth: 3, condition_width: 16, heads: 2}",)),
    "a parameter without dimensions": Case("twinflow", SCALED),
    "offloaded": Case("twinflow", ("fsdp.cpu_offload=true", "fsdp.reshard_last=true", "fsdp.prefetch=2")),
    **{f"nan, {policy}": Case("twinflow", (PLANT, f"stability.policy={policy}")) for policy in POLICIES},
}  # fmt: skip
CASES = QUICK | FULL


class Layer(nn.Module):
    """A residual layer; the block of :class:`Scaled`."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Scaled(nn.Module):
    """What is awkward to shard: a parameter without dimensions, widths that no rank count divides, and a buffer that
    only the constructor knows."""

    class Config(Settings):
        kind: Literal["scaled"] = "scaled"
        width: int = 13
        depth: int = 3

    offset: Tensor

    def __init__(self, config: Config, spec: Spec):
        super().__init__()
        size = math.prod(spec.latent_shape)
        self.enter, self.leave = nn.Linear(size + TEXT + 2, config.width), nn.Linear(config.width, size)
        self.blocks = nn.ModuleList(Layer(config.width) for _ in range(config.depth))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.linspace(-1, 1, config.width), persistent=False)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        told = torch.cat([x.flatten(1), condition["text"].to(x), t.to(x)[:, None], r.to(x)[:, None]], 1)
        hidden = self.enter(told) + self.offset
        for block in self.blocks:
            hidden = block(hidden)
        return self.gain * self.leave(hidden).view_as(x)


def register() -> None:
    """Make the fake source, the planted term and the awkward network known to this process."""
    SOURCES["digits"] = lambda root: FakeSource()  # type: ignore[assignment]
    TERMS["planted"] = Planted
    NETWORKS["scaled"] = Scaled


def judged(network: nn.Module, step: int) -> dict[str, float]:
    """A validation that runs the network, as the real one does."""
    dtype = next(network.parameters()).dtype
    x = torch.linspace(-1, 1, 3 * 32, dtype=dtype).view(3, *LATENT_SHAPE)
    t = torch.full((3,), 0.5, dtype=dtype)
    with torch.no_grad():
        F = network(x, t, t, {"text": torch.ones(3, TEXT, dtype=dtype)})
    return {names.VAL_QUALITY: float(F.square().mean())}


def trainer_of(settings: RunConfig, ranks: Ranks = ALONE) -> Trainer:
    """A trainer at its newest checkpoint, or at the start."""
    run = RunDirectory(settings.directory)
    ranks.on_first(lambda: run.exists or run.start(settings, fresh=False))  # a look of one's own might come too late
    trainer = Trainer(settings, run, FakeSource(), CPU, judged, ranks=ranks)
    trainer.resume()
    return trainer


def ranks_of(settings: RunConfig) -> Sharded:
    dtype = MASTER_DTYPES[settings.train.precision]
    return Sharded(settings.fsdp, CPU, dtype, backend=settings.machine.compile)


class StopAt:
    """An observer that interrupts after one step."""

    def __init__(self, trainer: Trainer, step: int):
        self.trainer, self.step = trainer, step

    def after_step(self, row: dict[str, Any]) -> None:
        self.trainer.interrupted |= row["step"] == self.step

    def after_checkpoint(self, offset: int) -> None: ...

    def after_event(self, event: object) -> None: ...


def run(settings: RunConfig, ranks: Ranks = ALONE, stop: int | None = None) -> Outcome:
    """Train; the first process alone interrupts after the step ``stop``."""
    trainer = trainer_of(settings, ranks)
    if stop is not None and ranks.first:
        trainer.observers.append(StopAt(trainer, stop))
    return trainer.train()


def rows(settings: RunConfig) -> list[dict[str, Any]]:
    """The log's rows."""
    return logs.rows(settings.directory)


def copied(settings: RunConfig, to: Path) -> RunConfig:
    """The same run in another folder, as it is now."""
    moved = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": to})})
    shutil.copytree(settings.directory, moved.directory)
    return moved


def folder_of(base: Path, world: int, name: str) -> Path:
    return base / f"on-{world}" / name.replace(" ", "-").replace(",", "")


def run_all(base: Path, chosen: Mapping[str, Case]) -> dict[str, Outcome]:
    """What each of several processes does: every case in its folder."""
    register()
    outcomes = {}
    for name, case in chosen.items():
        settings = case.settings(folder_of(base, dist.get_world_size(), name))
        outcomes[name] = run(settings, ranks_of(settings))
    return outcomes


# --- the same run -------------------------------------------------------------------------------------------------


def assert_same_run(ours: RunConfig, theirs: RunConfig) -> None:
    """Numbers and tensors of two runs in float64 that add up in other orders."""
    assert_rows(rows(ours), rows(theirs), 1e-7)  # shares and cosines are small differences of large numbers
    assert_rows(rows(ours), rows(theirs), 1e-9, ("loss/", "grad/total", "opt/", "val/"))
    stored = [layout.newest(settings.directory / "checkpoints") for settings in (ours, theirs)]
    assert (stored[0] is None) == (stored[1] is None)
    if stored[1] is None:  # it diverged before its first
        return
    mine, others = logs.tensors(ours.directory), logs.tensors(theirs.directory)
    assert set(mine) == set(others)
    for key, value in others.items():
        size = float(value.nan_to_num(posinf=0, neginf=0).abs().max())
        torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-9 * size, equal_nan=True, msg=key)


def assert_rows(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float, which: tuple[str, ...] = ("",)
) -> None:
    """Equal metrics, where words and what is not finite are equal as they are."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) == set(other)
        for key, value in other.items():
            if key.startswith(which):
                near = value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2)
                assert mine[key] == near, (other["step"], key)


def events(settings: RunConfig) -> list[dict[str, Any]]:
    """The events without their measured shares, which agree as the log's do."""
    measured = ("shares", "value", "reference")
    return [{k: v for k, v in event.items() if k not in measured} for event in logs.events(settings.directory)]
