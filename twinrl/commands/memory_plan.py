"""``twinrl doctor --plan``: what a run will hold in memory, before any weight is loaded.

Networks are built on the meta device, which has shapes and no values, so bytes of tensors are exact. What a step needs
besides is found by taking one without values (:mod:`twinrl.commands.footprint`). Sizes of reward models are those of
their papers' architectures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from twinrl.backends.families.pipelines import quiet
from twinrl.commands import footprint
from twinrl.config.components import failures_named
from twinrl.config.errors import InputError
from twinrl.flow.teacher import LOW, REMAINDER
from twinrl.machine.dtypes import DTYPES
from twinrl.rewards.guide import RewardConfig
from twinrl.rewards.latent import LatentReward
from twinrl.rewards.latent.contract import KeyedRows
from twinrl.training import assembly
from twinrl.training.optim import OPTIMIZERS
from twinrl.training.schema import RunConfig

PHASES = ("forward", "backward", "update")
REWARD_PARAMETERS = {
    "hpsv2": 986e6, "pickscore": 986e6, "clipscore": 151e6, "imagereward": 447e6, "aesthetic": 428e6,
}  # fmt: skip
INCEPTION_PARAMETERS = 24_000_000


@dataclass(frozen=True)
class Item:
    """Something that is held in memory.

    Attributes:
        name: what.
        bytes: in all processes together.
        shared: divided over the processes (sharded), else each has its own.
        exact: whether the bytes are those of tensors, or a rule of thumb.
        host: in the host's memory instead of the device's.
        visits: whole on the device while it is used; waits on the host, or in parts.
        phases: the parts of a step (``forward``, ``backward``, ``update``) in which it is there; none = always.
    """

    name: str
    bytes: int
    shared: bool = True
    exact: bool = True
    host: bool = False
    visits: bool = False
    phases: tuple[str, ...] = ()

    def each(self, processes: int) -> int:
        """Bytes in one of ``processes``."""
        return math.ceil(self.bytes / processes) if self.shared else self.bytes

    def visit(self, processes: int) -> int:
        """Bytes by which a visit adds to what is on the device of one of ``processes``."""
        waiting = 0 if self.host else self.each(processes)
        return self.bytes - waiting if self.visits else 0

    @property
    def where(self) -> str:
        """Where it is, for people."""
        place = "host" if self.host else ", ".join(["device", *self.phases])
        return place + (", visits the device" if self.host else ", gathered while used") * self.visits


def plan(settings: RunConfig, processes: int = 1) -> list[Item]:
    """What the configured run holds in memory, in all of ``processes`` together.

    Raises:
        InputError: the model's description cannot be read.
    """
    found = assembly.kind_of(settings).unloaded(settings)
    items = [*of_training(settings, found.network, processes), *_frozen(settings, found.frozen)]
    return [*items, *of_a_step(settings, found.network, found.data, processes), *_rewards(settings)]


def of_training(settings: RunConfig, network: nn.Module, processes: int) -> Iterator[Item]:
    """Student, gradients, optimizer and teachers. An average is in float32, with a remainder, where the student is
    not. Several processes cannot share a LoRA's frozen base between student and average, since each gathers its own."""
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    own = size_of(trained) if len(trained) < len(parameters) else size_of([*parameters, *network.buffers()])
    yield Item("student", size_of([*parameters, *network.buffers()]))
    yield Item("gradients", size_of(trained), phases=("backward", "update"))
    yield Item("optimizer", 2 * size_of(trained) + 4 * len(trained))  # two moments, and a step of 4 bytes each
    teacher = settings.teacher
    roles = {teacher.kind, teacher.guidance or teacher.kind}
    buffers = size_of(network.buffers()) if len(trained) < len(parameters) else 0
    if "ema" in roles:
        base = size_of(p for p in parameters if not p.requires_grad) if processes > 1 else 0
        each = 4 + REMAINDER.itemsize
        wider = sum((each - p.element_size()) * p.numel() for p in trained if p.dtype in LOW)
        yield Item("average (EMA)", own + base + buffers + wider)
    if "frozen" in roles and settings.model.lora is None:
        yield Item("frozen teacher", own)
    if settings.gradients.space == "parameter" and len(settings.terms) > 1:
        yield Item("gradient of one term", size_of(trained), exact=False, phases=("backward",))


def _frozen(settings: RunConfig, modules: Mapping[str, nn.Module]) -> Iterator[Item]:
    """VAE on the device, text encoders on the host."""
    dtype, shared = DTYPES[settings.model.frozen_dtype], settings.fsdp.frozen == "sharded"
    for name, module in modules.items():
        # a model in 16 bits keeps integers, and what its class keeps in float32, as they are: rare and small
        held = [t.to(dtype) if t.is_floating_point() else t for t in (*module.parameters(), *module.buffers())]
        offload = name == "vae" and settings.machine.offload
        host, visits = name != "vae" or offload, offload or (name == "vae" and shared)
        yield Item(name, size_of(held), shared, host=host, visits=visits)


# --- a step without values --------------------------------------------------------------------------------


def of_a_step(settings: RunConfig, network: Any, source: Any, processes: int) -> Iterator[Item]:
    """What a step needs beyond what is held: passes of one micro-batch with the reward's, and the optimizer's.

    A single micro-batch's activations are freed as its gradients appear; later ones' are there beside them.

    Arguments:
        network: on the meta device. source: shapes of latents and conditions, and a codec, as a data source has them.
    """
    share = max(1, settings.train.batch // processes)
    rows = min(settings.train.micro_batch or share, share)
    low = torch.bfloat16 if settings.train.precision == "bf16" else None
    gathered = low if processes > 1 else None  # sharded weights are gathered in low precision, block by block
    with footprint.without_values(), quiet():
        footprint.strip(network, gathered)
        if (vae := getattr(source, "vae", None)) is not None:
            footprint.strip(vae)
        with _described(source.latent_shape):
            x = torch.empty(rows, *source.latent_shape)
            condition = {name: torch.empty_like(value) for name, value in source.null_condition(rows).items()}
            reward = None if settings.reward is None else _asked(settings.reward, source)
            passes = footprint.backward(network, x, condition, None if gathered else low, reward)
        together = processes == 1 and settings.machine.device != "cpu"  # as torch and FSDP2 do
        optimizer = OPTIMIZERS.find(settings.optim.kind)
        update = footprint.update(partial(optimizer.build, settings.optim), network, together)
    phases = ("forward",) if rows == share else ("forward", "backward")
    yield Item("activations", passes, shared=False, exact=False, phases=phases)
    yield Item("temporaries", update, exact=False, phases=("update",))


@contextmanager
def _described(shape: Sequence[int]) -> Iterator[None]:
    """Raises InputError where a model, as it is described, does not take latents of a shape: sizes do not fit one
    another, or diffusers' own checks fail, as of SD3's positions."""
    try:
        with failures_named():
            yield
    except InputError:
        raise
    except Exception as error:
        size = "×".join(map(str, shape))
        raise InputError(f"the model does not take latents of {size}", got=f"{error}"[:200] or type(error)) from error


def _asked(config: RewardConfig, codec: Any) -> Callable[[Tensor], object]:
    """Asks the configured estimator for the gradient of a reward without a model."""
    estimator = LatentReward(config.gradient)

    def ask(z: Tensor) -> object:
        rows = KeyedRows(0, 0, tuple(range(len(z))))
        return estimator.gradient(z, [""] * len(z), codec, _Brightness(), rows)

    return ask


class _Brightness:
    """The cheapest reward with a gradient; the real one's passes are those of an image encoder at 224 pixels."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)


def _rewards(settings: RunConfig) -> Iterator[Item]:
    """Reward models; equal ones are there once, whether training follows them or validation judges by them."""
    followed = {} if settings.reward is None else {"reward": settings.reward.model, **settings.reward.held_out}
    offload, shared = settings.machine.offload, settings.fsdp.frozen == "sharded"
    visits, known = offload or shared, set()
    for name, model in (followed | settings.judges).items():
        size = int(_reward_bytes(model))
        if size and (same := model.model_dump_json()) not in known:
            known.add(same)
            yield Item(f"{name} ({model.kind}), about", size, shared, exact=False, host=offload, visits=visits)
    if settings.evaluation.reference is not None:
        yield Item("inception, about", 4 * INCEPTION_PARAMETERS, shared, exact=False, host=offload, visits=visits)


def _reward_bytes(model: Any) -> float:
    inner = [member.reward for member in getattr(model, "rewards", {}).values()]
    inner += [model.reward] if hasattr(model, "reward") else []
    width = 2 if getattr(model, "dtype", "float32") == "bf16" else 4
    return REWARD_PARAMETERS.get(model.kind, 0) * width + sum(map(_reward_bytes, inner))


def size_of(tensors: Any) -> int:
    """Bytes of tensors."""

    def one(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    return sum(map(one, tensors))


def print_plan(settings: RunConfig, processes: int, console: Console) -> int:
    """Print what each process holds; 0."""
    with console.status("taking a step without values"):
        items = plan(settings, processes)
    table = Table("held by each process", "MiB", "where", box=None, pad_edge=False)
    for item in items:
        table.add_row(item.name, f"{item.each(processes) / 2**20:,.1f}", item.where)
    total = at_the_peak(items, processes)
    table.add_section()
    table.add_row("most on the device in a step", f"{total / 2**20:,.1f}", "")
    if visitors := sum(item.visit(processes) for item in items):
        table.add_row("… with what visits", f"{(total + visitors) / 2**20:,.1f}", "")
    console.print(table)
    console.print(
        "Tensors are exact. What a step adds is an estimate from one pass without values: several passes, gathered "
        "parameters, a reward model's own passes and the decoding of validation samples come on top. "
        "`twinrl doctor --simulate` takes the whole step, in minutes."
    )
    return 0


def at_the_peak(items: Sequence[Item], processes: int = 1) -> int:
    """Bytes on the device of each process when most is there: of the parts of a step the larger counts."""
    there = [item for item in items if not item.host]
    return max(
        sum(item.each(processes) for item in there if not item.phases or phase in item.phases) for phase in PHASES
    )
