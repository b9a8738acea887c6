"""Runs of the fake source, alone and on several gloo processes; one spawn for each number of processes."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.fake_source import LATENT_SHAPE, TEXT, FakeSource, Planted, small
from twinrl import checkpoints
from twinrl.assembly import DTYPES
from twinrl.backends import NETWORKS
from twinrl.backends.embedding import Spec
from twinrl.config import Settings
from twinrl.data import SOURCES
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.terms import TERMS
from twinrl.tracking import names, runlog
from twinrl.trainer import Outcome, Trainer

CPU = torch.device("cpu")
STEPS = 20
NETWORK = "model.network={kind: mlp, width: 16, depth: 2, condition_width: 16}"
COMMON = (f"train.steps={STEPS}", "evaluation.every=5", "checkpoint.every=50", "stability.capsules.every=0", NETWORK)
REWARDED = (
    "stability.policy=record", "reward.schedule.weight=1", "reward.model=brightness", "evaluation.guided=null",
    "train.batch=16",
)  # fmt: skip
RULES = ("gradients.each.clip.max_norm=0.1", "gradients.telemetry={shares_every: 1, cosines_every: 1}")
CHAIN = (*RULES, "gradients.total={zclip: {warmup: 3, z: 0.01}, clip: {max_norm: 0.3}}")
PLANT = "terms.planted={kind: planted, branches: [e2e, mul, any, adv], at: 7, row: 13, size: .nan}"


@dataclass(frozen=True)
class Case:
    """A run: preset and overrides; ``precise`` = float64."""

    preset: str
    overrides: tuple[str, ...] = ()
    precise: bool = True

    def settings(self, folder: Path) -> RunConfig:
        precision = ("train.precision=float64",) if self.precise else ()
        return small(folder, *COMMON, *precision, *self.overrides, preset=self.preset)


CASES: dict[str, Case] = {
    "twinflow": Case("twinflow"),
    "tutorial": Case("tutorial", ("train.batch=16",)),
    "simpletuner": Case("simpletuner"),
    "lab": Case("lab", ("train.steps=20",)),
    "flow_matching": Case("flow_matching"),
    "rcgm": Case("rcgm"),
    "published": Case("published", REWARDED),
    "corrected": Case("corrected", REWARDED),
    "statistics of scores": Case(
        "published", (*REWARDED, "reward.model={kind: per_prompt, least: 4, reward: brightness}", "train.micro_batch=4")
    ),
    "frozen guidance, live recursion": Case(
        "twinflow", ("teacher={kind: live, guidance: frozen, allow_live: true}", "optim.kind=adam")
    ),
    "image-free": Case("twinflow", ("data.images=false",)),
    "micro-batches": Case("twinflow", ("train.micro_batch=2",)),
    "micro-batches, each reduced": Case(
        "twinflow", ("train.micro_batch=2", "fsdp.reduce_every_micro_batch=true", "evaluation.every=20")
    ),
    "parameter space": Case("twinflow", CHAIN),
    "output space": Case("twinflow", (*CHAIN, "gradients.space=output")),
    "no space": Case("twinflow", ("gradients={space: none, each: {}, total: {clip: {max_norm: 0.1}}}",)),
    "output space, micro-batches": Case(
        "tutorial", (*RULES, "gradients.space=output", "train.micro_batch=4", "train.batch=16")
    ),
    "hybrid": Case("twinflow", (*CHAIN, "fsdp.replicate=2", "train.micro_batch=2")),
    "recomputed activations": Case("lab", ("train.steps=20", "fsdp.checkpoint_activations=true", "fsdp.prefetch=0")),
    "compiled": Case("lab", ("train.steps=20", "fsdp.compile=aot_eager")),
    "dit": Case(
        "twinflow",
        ("model.network={kind: dit, width: 16, depth: 3, condition_width: 16, heads: 2}", "evaluation.every=20"),
    ),
    "a parameter without dimensions": Case(
        "twinflow", ("model.network={kind: scaled}", "train.init=random", "optim.lr=1e-4", "evaluation.every=20")
    ),
    "offloaded": Case("twinflow", ("fsdp.cpu_offload=true", "fsdp.reshard_last=true", "fsdp.prefetch=2")),
    "float32": Case("twinflow", ("optim.lr=1e-4",), precise=False),
    "bf16": Case("lab", ("train.steps=20", "train.precision=bf16", "optim.lr=1e-4"), precise=False),
    "nan on one rank": Case("twinflow", (PLANT,)),
    "rollback": Case("twinflow", (PLANT, "stability={policy: rollback, rollback_margin: 1}", "checkpoint.every=5")),
}  # fmt: skip
POLICIES = ("record", "zero", "skip", "cut_lr", "cut_lr+skip")
EARLY = PLANT.replace("at: 7", "at: 3")
CASES |= {
    f"nan, {policy}": Case("twinflow", (EARLY, f"stability.policy={policy}", "train.steps=6", "evaluation.every=20"))
    for policy in POLICIES
}
NOT_ON_4 = (
    "frozen guidance, live recursion", "image-free", "output space, micro-batches",
    "recomputed activations", "compiled", "dit", "offloaded", "bf16", "rollback", "micro-batches, each reduced",
    "micro-batches", "parameter space",  # "hybrid" has both
    *(f"nan, {policy}" for policy in POLICIES),
)  # fmt: skip
NOT_ON_2 = ("hybrid",)


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
    return Sharded(settings.fsdp, CPU, DTYPES[settings.train.precision])


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
    """The log without what a clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in runlog.read(settings.directory / runlog.LOG_NAME)
    ]


def tensors(settings: RunConfig) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, whole."""
    found = checkpoints.load(RunDirectory(settings.directory).newest_checkpoint())
    return {f"{part}/{name}": value for part, values in found.tensors.items() for name, value in values.items()}


def cases_on(world: int) -> dict[str, Case]:
    left_out = NOT_ON_4 if world == 4 else NOT_ON_2
    return {name: case for name, case in CASES.items() if name not in left_out}


def folder_of(base: Path, world: int, name: str) -> Path:
    return base / f"on-{world}" / name.replace(" ", "-").replace(",", "")


# --- the processes ---------------------------------------------------------------------------------------------


def work(rank: int, world: int, base: Path, more: Callable[[Path], dict[str, Any]]) -> None:
    """One process: every case, then ``more``; what it found goes to a file."""
    torch.set_num_threads(1)
    register()
    meeting = f"file://{base}/meeting-{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {}
    for name, case in cases_on(world).items():
        settings = case.settings(folder_of(base, world, name))
        found[name] = run(settings, ranks_of(settings))
    found |= more(base)
    torch.save(found, base / f"found-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(world: int, base: Path, more: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of ``world`` processes found."""
    torch.multiprocessing.spawn(work, (world, base, more), nprocs=world)
    return [torch.load(base / f"found-{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def copied(settings: RunConfig, to: Path) -> RunConfig:
    """The same run in another folder, as it is now."""
    moved = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": to})})
    shutil.copytree(settings.directory, moved.directory)
    return moved
