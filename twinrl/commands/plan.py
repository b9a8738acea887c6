"""``twinrl doctor --plan``: what a run will hold in memory, before any weight is loaded.

Networks are built on the meta device, which has shapes and no values, so bytes of tensors are exact. What a step needs
besides is found by taking one without values (:mod:`twinrl.commands.footprint`). Sizes of reward models are those of
their papers' architectures.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from twinrl import assembly
from twinrl.backends.families import family_class
from twinrl.backends.families.family import DTYPES
from twinrl.backends.families.loading import INDEX, check_class, components, quiet, read_index, transformer_config
from twinrl.backends.families.lora import add_lora
from twinrl.commands import footprint
from twinrl.conditions import Condition
from twinrl.config import resolve
from twinrl.data.folders.prepare import MANIFEST
from twinrl.errors import InputError
from twinrl.optim import OPTIMIZERS
from twinrl.rewards.guide import RewardConfig
from twinrl.rewards.latent import LatentReward
from twinrl.rewards.latent.contract import KeyedRows
from twinrl.schema import RunConfig

META = torch.device("meta")
PHASES = ("forward", "backward", "update")
REWARD_PARAMETERS = {
    "hpsv2": 986e6, "pickscore": 986e6, "clipscore": 151e6, "imagereward": 447e6, "aesthetic": 428e6,
}  # fmt: skip
INCEPTION_PARAMETERS = 24_000_000
DEFAULT_PIXELS = 1024


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
    if settings.model.family is None:
        source = assembly.load_source(settings, torch.device("cpu"))
        with META:
            network = assembly.new_network(settings, source)
        network.to(dtype=assembly.dtype_of(settings))
        return [*of_training(settings, network, processes), *of_a_step(settings, network, source, processes)]
    folder = described(str(settings.model.path))
    check_class(folder, family_class(settings.model.family).PIPELINE)
    network, data = meta_family(settings, folder), _Described(settings, folder)
    data.family.configure(network.transformer, settings.model.pretrained)
    items = [*of_training(settings, network, processes), *_frozen(settings, folder)]
    return [*items, *of_a_step(settings, network, data, processes), *_rewards(settings)]


def described(path: str) -> Path:
    """A folder with the pipeline's descriptions; of a hub name these alone are fetched.

    Raises:
        InputError: the hub cannot be reached and has no copy here.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return Path(snapshot_download(path, allow_patterns=[INDEX, "*/config.json", "scheduler/*.json"]))
    except (OSError, HfHubHTTPError, HTTPError, ValueError) as error:
        why = str(error).removeprefix("Got: ").partition("\n")[0]  # the hub's client says that already
        raise InputError(
            f"{path} is no folder here, and the description of {path} cannot be fetched from the hub", got=why or None,
            fix="give the folder of a downloaded pipeline as model.path",
        ) from error  # fmt: skip


def meta_family(settings: RunConfig, folder: Path) -> nn.Module:
    """The student as :meth:`Family.network` makes it, without values."""
    model = settings.model
    family = family_class(str(model.family))
    with META, quiet():
        transformer: Any = family.TRANSFORMER.from_config(transformer_config(folder, family.PART))  # type: ignore[attr-defined]
        transformer.to(DTYPES[model.dtype])
        if model.lora is not None:
            add_lora(transformer, model.lora, family.LORA_TARGETS)
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return family.NETWORK(transformer)


def of_training(settings: RunConfig, network: nn.Module, processes: int) -> Iterator[Item]:
    """Student, gradients, optimizer and teachers. Several processes cannot share a LoRA's frozen base between student
    and average, since each gathers its own."""
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
        yield Item("average (EMA)", own + base + buffers)
    if "frozen" in roles and settings.model.lora is None:
        yield Item("frozen teacher", own)
    if settings.gradients.space == "parameter" and len(settings.terms) > 1:
        yield Item("gradient of one term", size_of(trained), exact=False, phases=("backward",))


def _frozen(settings: RunConfig, folder: Path) -> Iterator[Item]:
    """VAE on the device, text encoders on the host."""
    dtype, family = DTYPES[settings.model.frozen_dtype], family_class(str(settings.model.family))
    shared = settings.fsdp.frozen == "sharded"
    for name in components(read_index(folder)):
        unused = name == family.PART or name in family.LEFT_OUT
        module = None if unused else _meta_component(folder, name)
        if module is not None:
            # a model in 16 bits keeps integers, and what its class keeps in float32, as they are: rare and small
            held = [t.to(dtype) if t.is_floating_point() else t for t in (*module.parameters(), *module.buffers())]
            offload = name == "vae" and settings.machine.offload
            host, visits = name != "vae" or offload, offload or (name == "vae" and shared)
            yield Item(name, size_of(held), shared, host=host, visits=visits)


def _meta_component(folder: Path, name: str) -> nn.Module | None:
    """A frozen component without values; None for tokenizers and schedulers."""
    import diffusers
    import transformers

    library, cls = read_index(folder)[name]
    file = folder / name / "config.json"
    if not file.is_file():
        return None
    with META:
        if library == "diffusers":
            return getattr(diffusers, cls).from_config(json.loads(file.read_text()))
        return getattr(transformers, cls)(transformers.AutoConfig.from_pretrained(folder / name))


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
        x = torch.empty(rows, *source.latent_shape)
        condition = {name: torch.empty_like(value) for name, value in source.null_condition(rows).items()}
        reward = None if settings.reward is None else _asked(settings.reward, source)
        passes = footprint.backward(network, x, condition, None if gathered else low, reward)
        together = processes == 1 and settings.machine.device != "cpu"  # as torch and FSDP2 do
        optimizer = resolve(OPTIMIZERS, settings.optim.kind, "optimizer")
        update = footprint.update(partial(optimizer.build, settings.optim), network, together)
    phases = ("forward",) if rows == share else ("forward", "backward")
    yield Item("activations", passes, shared=False, exact=False, phases=phases)
    yield Item("temporaries", update, exact=False, phases=("update",))


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


class _Described:
    """What a family's data look like, from its descriptions alone, and its VAE without values."""

    def __init__(self, settings: RunConfig, folder: Path):
        self.vae = _meta_component(folder, "vae") if "vae" in components(read_index(folder)) else None
        if self.vae is not None:
            with quiet():
                self.vae.to(DTYPES[settings.model.frozen_dtype])
        pipeline = SimpleNamespace(vae=self.vae, components={})
        self.family = family_class(str(settings.model.family))(folder, pipeline)
        self.transformer = transformer_config(folder, self.family.PART)
        self.latent_shape = self._latent_shape(settings)

    def _latent_shape(self, settings: RunConfig) -> tuple[int, int, int]:
        """Of the largest bucket; where no data are prepared, the size that the model was made for, or 1024² pixels."""
        root = settings.data.root
        if root is not None and (root / MANIFEST).is_file():
            shapes = [row["latent_shape"] for row in json.loads((root / MANIFEST).read_text())["buckets"]]
            return max(((c, h, w) for c, h, w in shapes), key=math.prod)
        side = self.transformer.get("sample_size") or DEFAULT_PIXELS // self.family.COMPRESSION
        return self.family.channels, side, side

    def null_condition(self, n: int) -> Condition:
        """A condition of ``n`` rows with prompts of full length."""
        shapes = self.family.condition_shapes(self.transformer)
        return {name: torch.empty(n, *shape) for name, shape in shapes.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """As the family's."""
        return self.family.decode(latents)

    def encode(self, pixels: Tensor) -> Tensor:
        """As the family's."""
        return self.family.encode(pixels)


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
        "Tensors are exact. What a step adds is from a step without values: kernels' workspaces, a reward model's own "
        "passes and the decoding of validation samples come on top; parts of it come one after the other."
    )
    return 0


def at_the_peak(items: Sequence[Item], processes: int = 1) -> int:
    """Bytes on the device of each process when most is there: of the parts of a step the larger counts."""
    there = [item for item in items if not item.host]
    return max(
        sum(item.each(processes) for item in there if not item.phases or phase in item.phases) for phase in PHASES
    )
