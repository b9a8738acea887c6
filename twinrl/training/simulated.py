"""A run at its real size without a device, without weights and without data: two steps of the real trainer.

Networks have their shapes (:mod:`twinrl.machine.simulated`), latents and prompts are zeros of the prepared data's
shapes with prompts of full length, other ranks are as this one. Everything else is the run's own: terms, passes,
sharding, rules, optimizer. The second step is counted: one that measures everything that is measured now and then.
"""

import gc
import json
import math
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twinrl.config.components import look_in
from twinrl.config.errors import InputError
from twinrl.data.order import BucketSampler
from twinrl.data.prepared import FolderSource
from twinrl.flow.conditions import Condition
from twinrl.fsdp.initial import Outline
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.machine.simulated import Simulation
from twinrl.machine.simulated.memory import GATHERED, GRADIENTS, Peak
from twinrl.machine.simulated.places import Places, Rule
from twinrl.machine.simulated.waits import Wait
from twinrl.machine.simulated.work import GPUS, Estimate
from twinrl.rewards.hollow import HollowNetworks
from twinrl.training import schema
from twinrl.training.described import Described
from twinrl.training.laboratory import Laboratory
from twinrl.training.pretrained import PretrainedModels
from twinrl.training.provider import Provider
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

PROGRAM = Path(__file__).parents[1]
"""This package."""
ROWS = 100_000
"""Of the made-up data."""
HELPERS = ("twinrl/machine/moving.py",)
"""Named in no message: their callers are."""
PHASES = (
    Rule("twinrl/training/feed.py", None, "batch"),
    Rule("twinrl/rewards/guide.py", None, "reward"),
    Rule("torch/autograd/__init__.py", "backward", "backward"),
    Rule("twinrl/gradients/gradient.py", None, "gradient rules"),
    Rule("twinrl/gradients/telemetry.py", None, "gradient rules"),
    Rule("twinrl/training/optim.py", None, "update"),
    Rule("twinrl/flow/teacher.py", "update", "average"),
)
OWNERS = (
    Rule("torch/distributed/fsdp/", "foreach_reduce", GRADIENTS),
    Rule("torch/distributed/fsdp/", "to_accumulated_grad_if_needed", GRADIENTS),
    Rule("torch/distributed/fsdp/", "foreach_all_gather", GATHERED),
    Rule("torch/distributed/fsdp/_fully_shard/_fsdp_param.py", None, GATHERED),
    Rule("torch/optim/", None, "optimizer's temporaries"),
    Rule("twinrl/rewards/", None, "reward's passes"),
    Rule("twinrl/data/", None, "batch"),
    Rule("twinrl/flow/branches.py", None, "batch"),
    Rule("twinrl/flow/conditions.py", None, "batch"),
    Rule("twinrl/gradients/gradient.py", None, "gradients, copies"),
    Rule("twinrl/gradients/telemetry.py", None, "measures' temporaries"),
    Rule("twinrl/flow/teacher.py", "update", "average's temporaries"),
)


@dataclass(frozen=True)
class Report:
    """What a step takes on one rank.

    Attributes:
        name: of the run. processes: ranks. rows: of a rank's batch, and of a forward pass with gradient.
        parameters: of the network. held: bytes between steps, by owner.
        peaks: by phase, the largest first.
        operations, flops, moved: of the device; ``moved`` in bytes.
        estimates: by GPU.
        messages, payload: count and bytes by kind.
        waits: of the host.
        guesses: lines that asked for a value that is not known, and how often.
        seconds, resident: what the simulation took, in s and bytes.
    """

    name: str
    processes: int
    rows: tuple[int, int]
    parameters: int
    held: dict[str, int]
    peaks: dict[str, Peak]
    operations: int
    flops: int
    moved: int
    estimates: dict[str, Estimate]
    messages: dict[str, int] = field(default_factory=dict)
    payload: dict[str, int] = field(default_factory=dict)
    waits: Sequence[Wait] = ()
    guesses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    resident: int = 0

    @property
    def peak(self) -> Peak:
        """The highest."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)

    @property
    def queued(self) -> int:
        """Waits with work queued."""
        return sum(wait.queued for wait in self.waits)

    @property
    def waited(self) -> int:
        """Waits."""
        return sum(wait.times for wait in self.waits)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Report":
        """From JSON."""
        made = {
            "peaks": {name: Peak(**peak) for name, peak in plain["peaks"].items()},
            "estimates": {name: Estimate(*told) for name, told in plain["estimates"].items()},
            "waits": [Wait(*told) for told in plain["waits"]],
            "rows": tuple(plain["rows"]),
        }
        return cls(**{**plain, **made})


# --- a run without data and weights ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Zeros:
    """A prepared split of zeros, as :class:`twinrl.data.dataset.CachedDataset` has them."""

    shape: tuple[int, int, int]
    told: Mapping[str, tuple[int, ...]]

    @property
    def latent_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of the one bucket."""
        return {"": self.shape}

    def bucket_of(self, row: int) -> str:
        """It."""
        return ""

    def latents(self, at: Tensor) -> Tensor:
        """(B, C, h, w), as ``twinrl data prepare --dtype bf16`` leaves them."""
        return torch.zeros(len(at), *self.shape, dtype=torch.bfloat16)

    def captions(self, at: Tensor) -> list[str]:
        """No two are alike."""
        return [f"a photo of {int(row)} cats" for row in at]

    def conditions(self, at: Tensor) -> Condition:
        """Of prompts of full length."""
        return self.null_condition(len(at))

    def null_condition(self, n: int) -> Condition:
        """n rows."""
        made = {name: torch.zeros(n, *shape, dtype=torch.bfloat16) for name, shape in self.told.items()}
        return made | ({"mask": torch.ones(n, *self.told["mask"], dtype=torch.bool)} if "mask" in self.told else {})

    def sampler(self, batch: int, seed: int, multiple: int = 1) -> BucketSampler:
        """Of one bucket."""
        return BucketSampler({"": torch.arange(ROWS)}, {"": batch}, seed)


class DescribedSource(FolderSource):
    """A family's data and codec by their descriptions; see :class:`Zeros`."""

    def __init__(self, settings: RunConfig, found: Described):
        self.family, self.device, self.images = found.family, torch.device("cpu"), settings.data.images
        self.latent_shape, self.content_hash, self.bucket = found.latent_shape, "described", ""
        self.networks: Any = HollowNetworks()
        told = self.family.condition_shapes(found.transformer)
        told = told | ({"mask": told["text"][:1]} if self.family.MASKED else {})
        self.splits: Any = dict.fromkeys(("train", "validation"), Zeros(found.latent_shape, told))


def with_memory(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with memory for what is on the meta device, in place; what has values keeps them."""
    for part in network.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    new: Any = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                    held[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return network


class DescribedModels(PretrainedModels):
    """A family without weights."""

    @classmethod
    def load(cls, settings: RunConfig, device: torch.device) -> DescribedSource:
        source = DescribedSource(settings, Described(settings))
        if (vae := source.family.pipeline.vae) is not None:
            with_memory(vae, torch.device("cpu") if settings.machine.offload else device).requires_grad_(False).eval()
        source.device = device
        return source

    def network(self) -> nn.Module:
        return with_memory(self.told(self.source.family.outline(self.settings.model.pretrained)), self.device)

    def outline(self) -> Outline:
        inner = self.source.family.outline(self.settings.model.pretrained)
        return Outline(self.told(inner), self.block_classes(inner), {})


class DescribedLaboratory(Laboratory):
    """The laboratory with its data, and networks without values."""

    def check_branches_apart(self, network: nn.Module) -> None:
        """Needs values."""


# --- two steps --------------------------------------------------------------------------------------------


def simulate(settings: RunConfig, processes: int = 1) -> Report:
    """Two steps of a run on the first of ``processes`` GPUs.

    *When to use*: in a process that :mod:`twinrl.machine.simulated.helper` has started; it leaves torch's process
    group as it found it.

    Raises:
        InputError: something cannot be simulated, or fails as it would on a device; with the line.
    """
    started = time.perf_counter()
    _check(settings)
    judged = settings.model.is_pretrained and settings.evaluation.every > 0
    with tempfile.TemporaryDirectory() as folder, _ranks(settings, processes) as make, ExitStack() as stack:
        settings = _alone(settings, Path(folder))
        simulation = Simulation(Places([PROGRAM, Path.cwd()], HELPERS, PHASES, OWNERS))
        stack.enter_context(_in_one_line(simulation.places))
        stack.enter_context(simulation.running())
        trainer = _trainer(settings, make())
        judges = _judges(trainer) if judged else []
        step = _measuring(settings)
        trainer.step = trainer.iteration = max(0, step - 1)
        trainer._advance()
        with _owned(trainer, judges, simulation):
            gc.collect()
            simulation.forget()
            trainer.step = step
            trainer._advance()
        trainer.log.close()
        trainer.events.close()
        return _report(settings, trainer, simulation, processes, time.perf_counter() - started)


def _check(settings: RunConfig) -> None:
    """Raises InputError where it is known beforehand that it cannot be simulated."""
    refused = {
        "fsdp.cpu_offload": settings.fsdp.cpu_offload, "machine.compile": settings.machine.compile is not None,
        "model.float8": settings.model.float8, "optim.kind=adamw8bit": settings.optim.kind == "adamw8bit",
    }  # fmt: skip
    for name, term in settings.terms.items():  # torch's fake tensors end the process in forward-mode differentiation
        refused[f"terms.{name}.derivative=forward"] = getattr(term, "derivative", None) == "forward"
    for key, asked in refused.items():
        if asked:
            raise InputError(f"{key} is not simulated", fix="leave it out, or try it on a device")


def _alone(settings: RunConfig, folder: Path) -> RunConfig:
    """The run without what comes between steps: validation, checkpoints, pictures, capsules."""
    every = settings.train.steps
    return settings.model_copy(update={
        "run": settings.run.model_copy(update={"dir": folder}),
        "train": settings.train.model_copy(update={"init": "random", "steps": max(every, 4)}),
        "machine": settings.machine.model_copy(update={"device": "cuda"}),
        "evaluation": settings.evaluation.model_copy(update={"every": 0}),
        "checkpoint": settings.checkpoint.model_copy(update={"every": 10 * every}),
        "stability": settings.stability.model_copy(
            update={"capsules": settings.stability.capsules.model_copy(update={"every": 0})}
        ),
    })  # fmt: skip


def _measuring(settings: RunConfig) -> int:
    """The last step but one, at which everything that is measured now and then is measured; at least 1."""
    told = settings.gradients.telemetry.model_dump().values()
    period = math.lcm(*(every for every in told if every), (settings.reward and settings.reward.compare_every) or 1)
    return max(1, (settings.train.steps - 2) // period * period)


@contextmanager
def _ranks(settings: RunConfig, processes: int) -> Iterator[Callable[[], Ranks]]:
    """Makes this process the first of several."""
    if processes == 1:
        yield lambda: ALONE
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from twinrl.flow.branches import allocate
    from twinrl.fsdp.sharded import Sharded, check_equal_shares

    check_equal_shares(allocate(settings.branches, settings.train.batch), processes)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    low = torch.bfloat16 if settings.train.precision == "bf16" else None
    try:
        yield lambda: Sharded(settings.fsdp, torch.device("cuda", 0), low_precision=low)
    finally:
        dist.destroy_process_group()


def _trainer(settings: RunConfig, ranks: Ranks) -> Trainer:
    kind: type[Provider[Any]] = DescribedModels if settings.model.is_pretrained else DescribedLaboratory
    device = torch.device("cuda", 0)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=True)
    source = kind.load(settings, device)
    return Trainer(settings, run, source, device, lambda network, step: {}, ranks=ranks, provided=kind)


def _judges(trainer: Trainer) -> list[nn.Module]:
    """Networks of the rewards that validation judges by: a family's are there in every step, too."""
    judges = trainer.provider.judges().values()
    networks = [module for judge in judges for module in judge.modules().values()]
    trainer.ranks.keep_frozen(networks)
    return networks


@contextmanager
def _owned(trainer: Trainer, judges: Sequence[nn.Module], simulation: Simulation) -> Iterator[None]:
    """Say whose memory it is; inside, blocks of the networks are known by name."""
    teacher, memory = trainer.objective.teacher, simulation.memory
    modules: dict[str, list[nn.Module | None]] = {
        "student": [teacher.student], "average": [teacher.ema, teacher.remainder], "frozen teacher": [teacher.frozen],
        "judges": list(judges), "VAE": list(trainer.provider.codec),
        "reward": [] if trainer.guide is None else list(trainer.guide.reward.modules().values()),
        "terms' networks": list(trainer.objective.own.values()),
    }  # fmt: skip
    memory.belongs(GRADIENTS, [p.grad for p in trainer.engine.parameters if p.grad is not None])
    optimizers = [trainer.optimizer, *(one.optimizer for one in trainer.owned)]
    memory.belongs("optimizer", [v for each in optimizers for held in each.state.values() for v in held.values()])
    with ExitStack() as stack:
        for owner, parts in modules.items():
            for part in filter(None, parts):
                memory.belongs(owner, [*part.parameters(), *part.buffers()])
                if owner in ("student", "average", "terms' networks"):
                    stack.enter_context(simulation.places.watched("activations", part))
        memory.weights = {p.shape for p in teacher.student.parameters() if p.numel() > 1 << 14}
        yield


@contextmanager
def _in_one_line(places: Places) -> Iterator[None]:
    """Inside, what fails as it would on a device is said in one line. Raises InputError."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the simulation ends at {places.here(frame).line}", got=said) from error


def _report(settings: RunConfig, trainer: Trainer, simulation: Simulation, processes: int, seconds: float) -> Report:
    share = settings.train.batch // processes
    memory, work = simulation.memory, simulation.work
    return Report(
        settings.name, processes, (share, min(settings.train.micro_batch or share, share)),
        sum(p.numel() for p in trainer.objective.teacher.student.parameters()), memory.held(),
        dict(sorted(memory.peaks.items(), key=lambda item: -item[1].bytes)), work.operations, work.flops, work.moved,
        {name: work.on(gpu) for name, gpu in GPUS.items()}, dict(simulation.messages.count),
        dict(simulation.messages.payload), simulation.waits.found(), simulation.guesses, seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )  # fmt: skip


# --- the process ------------------------------------------------------------------------------------------


def answer(line: str) -> str:
    """The report, or what is refused, of a simulation that a line of JSON asks for."""
    told = json.loads(line)
    if told["place"] is not None:
        look_in(told["place"])
    try:
        settings = schema.load(told["config"], told["overrides"])
        return json.dumps({"report": asdict(simulate(settings, told["processes"]))})
    except InputError as error:
        return json.dumps({"refused": str(error), "traceback": traceback.format_exc()})


def main() -> None:
    """Answers, line by line, what is asked on standard input; nothing else is written to standard output."""
    out, sys.stdout = sys.stdout, sys.stderr
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    for line in sys.stdin:
        print(answer(line), file=out, flush=True)


if __name__ == "__main__":
    main()
