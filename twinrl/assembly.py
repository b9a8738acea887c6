"""From a configuration to the objects of a run: device, source, student, teachers, objective."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from twinrl import data, draws
from twinrl.backends import build_network, network_key
from twinrl.backends.families.lora import first_values
from twinrl.backends.wrappers import WithoutTargetTime
from twinrl.data.reading import InMemory, Reader
from twinrl.data.source import Data, Source
from twinrl.errors import InputError
from twinrl.evaluation import PromptProtocol, Protocol
from twinrl.evaluation.protocol import HeldOut
from twinrl.fsdp import mesh
from twinrl.fsdp.initial import Outline, Pretrained, SafetensorsPart
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.objective import Objective
from twinrl.rewards import Reward, build_reward
from twinrl.rewards.guide import Guide
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.teacher import Teacher
from twinrl.terms import TERMS

if TYPE_CHECKING:
    from twinrl.data.folders.training import FolderSource

DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


def device_of(settings: RunConfig) -> torch.device:
    """The device that ``machine.device`` names. Raises InputError where there is none."""
    return mesh.device_named(settings.machine.device, "machine.device")


def load_source(settings: RunConfig, device: torch.device) -> Data:
    """The data source on the device, built or read from the cache; with the family's pipeline if one is trained.

    Raises:
        InputError: no such pipeline or prepared folder, or one for another model.
    """
    if settings.model.family is None:
        return data.load(settings.data.source, settings.data.root).to(str(device))
    from twinrl.backends.families import load_family

    family = load_family(settings.model.family, settings.model.pretrained)
    source = data.load(settings.data.source, settings.data.root, family)
    return source.to(str(device), settings.machine.offload)


def reader_of(settings: RunConfig, source: Data, split: str, device: torch.device) -> Reader:
    """What reads the rows of a split.

    Raises:
        InputError: ``data.rows`` asks for more than there are.
    """
    dtype = DTYPES[settings.train.precision]
    if settings.model.family is None:
        rows = settings.data.rows if split == "train" else None
        return InMemory.of(_labelled(source), split, device, dtype, rows)
    return _folder(source).reader(split, device, dtype, settings.branches, settings.data.row_multiple)


def _labelled(source: Data) -> Source:
    return cast(Source, source)


def _folder(source: Data) -> "FolderSource":
    return cast("FolderSource", source)


def new_network(settings: RunConfig, source: Data) -> nn.Module:
    """The configured network with keyed initial weights, and the target time hidden if so configured.

    A family's network has its pretrained weights, in ``model.dtype``.

    Raises:
        InputError: the network's sizes do not fit the source's latents, or the pretrained weights cannot be read.
    """
    if settings.model.family is not None:
        student: nn.Module = _folder(source).family.network(settings.model.pretrained, settings.seed)
        return student if settings.model.target_time else WithoutTargetTime(student)
    try:
        network = build_network(settings.model.network, _labelled(source), settings.seed)
    except ValueError as error:
        raise InputError(
            "model.network does not fit the data",
            got=f"{error} ({source.name} has latents {'×'.join(map(str, source.latent_shape))})",
            fix="change the sizes under model.network",
        ) from error
    return network if settings.model.target_time else WithoutTargetTime(network)


def pretrained_outline(settings: RunConfig, source: Data) -> Outline:
    """A family's student as :func:`new_network` makes it, without weights, and the files that hold them.

    Raises:
        InputError: the pretrained weights cannot be read, or do not fit.
    """
    family, seed = _folder(source).family, settings.seed
    inner = family.outline(settings.model.pretrained)
    network: nn.Module = inner if settings.model.target_time else WithoutTargetTime(inner)
    before = "transformer." if settings.model.target_time else "network.transformer."
    stored = SafetensorsPart(family.files())
    origins = inner.transformer.origins(stored.shapes(), family.folder / family.PART)
    weights = Pretrained(
        stored,
        {before + name: origin for name, origin in origins.items()},
        lambda name, shape: first_values(name.removeprefix(before), shape, seed),
        family.dtype_of(settings.model.pretrained),
    )
    blocks = tuple(sorted(cls.__name__ for cls in family.block_classes(inner)))
    return Outline(network, blocks, weights)


def student_of(
    settings: RunConfig, source: Data, device: torch.device, start_weights: bool = True, ranks: Ranks = ALONE
) -> nn.Module:
    """The student at the start of training: network, start weights (unless a checkpoint brings them), dtype, device.

    Raises:
        InputError: a term uses negative time and the network cannot tell it from positive time; start weights
            of another network.
    """
    random = start_weights and settings.train.init == "random"
    outline = None if settings.model.family is None else lambda: pretrained_outline(settings, source)
    network = ranks.network(lambda: new_network(settings, source), random, outline=outline)
    uses_sign = any(TERMS.find(term.kind).negative_time for term in settings.terms.values())
    if uses_sign and settings.model.family is None:  # a family's sign is tested once for its class, not for each run
        check_branches_apart(network, source, settings.model.network.kind, ranks)
    if start_weights:
        start(network, settings, source, ranks)
    return ranks.place(network, device, dtype_of(settings)).train()


def dtype_of(settings: RunConfig) -> torch.dtype | None:
    """The dtype of the student's parameters; None: as they are, since a family brings its own."""
    as_loaded = settings.model.family is not None and settings.train.precision != "float64"
    return None if as_loaded else DTYPES[settings.train.precision]


def check_branches_apart(network: nn.Module, source: Data, kind: str, ranks: Ranks = ALONE) -> None:
    """Raises InputError where (t, t) and (−t, −t) are the same to the network."""
    if not ranks.tells_branches_apart(network, source.latent_shape, source.null_condition(1)):
        raise InputError(
            f"network {kind} answers (t, t) and (−t, −t) alike, so Δv is zero and the negative-time terms do nothing",
            fix="embed the sign of t (twinrl.backends.embedding.TimeEmbedding), or remove those terms",
        )


def start(network: nn.Module, settings: RunConfig, source: Data, ranks: Ranks = ALONE) -> None:
    """Load the start weights that ``train.init`` names.

    Raises:
        InputError: it names nothing, a run without a checkpoint, or weights of another network.
    """
    origin = settings.train.init
    if origin == "random" or (origin == "teacher" and settings.model.family is not None):
        return  # a family's network has its pretrained weights
    if origin == "teacher":
        inner = network.network if isinstance(network, WithoutTargetTime) else network
        weights = _labelled(source).teacher_weights(inner, network_key(settings.model.network))
        ranks.load_module(inner, weights, "the pretrained teacher")
        return
    run = RunDirectory(Path(origin))
    if not run.exists:
        raise InputError(f"train.init is {origin!r}", expected="teacher, random, or the directory of a run")
    checkpoint = run.newest_checkpoint()
    ranks.load_module(network, ranks.load(checkpoint).judged, str(checkpoint))


def pretrained_teacher(settings: RunConfig, source: Data, device: torch.device, ranks: Ranks = ALONE) -> nn.Module:
    """The source's flow-matching teacher of the configured architecture, in eval mode."""
    labelled, config = _labelled(source), settings.model.network
    network = ranks.network(lambda: build_network(config, labelled, 0), random=False, trained=False)
    ranks.load_module(network, labelled.teacher_weights(network, network_key(config)), "the teacher")
    return ranks.place(network, device, torch.float32).eval()


def objective_of(
    settings: RunConfig, student: nn.Module, guide: Guide | None = None, ranks: Ranks = ALONE
) -> Objective:
    """Terms, teachers, guidance and reward around the student."""
    terms = {name: TERMS.build(term) for name, term in settings.terms.items()}
    autocast = torch.bfloat16 if settings.train.precision == "bf16" else None
    teacher = Teacher(student, settings.teacher, ranks.copy, _under_adapters(settings, student))
    return Objective(terms, teacher, settings.guidance, autocast, guide)


def _under_adapters(settings: RunConfig, student: nn.Module) -> nn.Module | None:
    """The pretrained model under a LoRA student's adapters, at no cost in memory; None for others."""
    if settings.model.lora is None:
        return None
    from twinrl.backends.families.family import FrozenTeacher

    return FrozenTeacher(inner_of(student))


def inner_of(network: nn.Module) -> Any:
    """The network without the wrapper that hides the target time."""
    return network.network if isinstance(network, WithoutTargetTime) else network


def guide_of(settings: RunConfig, source: Data, device: torch.device, ranks: Ranks = ALONE) -> Guide | None:
    """The reward that training follows, on the device; None where none is configured.

    Raises:
        InputError: its checkpoint is missing or foreign, or the estimator does not fit it.
    """
    if settings.reward is None:
        return None
    reward = build_reward(settings.reward.model, source, "reward.model").to(_waits(settings, device))
    end = settings.renoise_end()
    visitors = _visitors(settings, source, [reward])
    ranks.keep_frozen(visitors)
    return Guide(settings.reward, reward, source, settings.train.steps, end, visitors)


def _waits(settings: RunConfig, device: torch.device) -> torch.device:
    """Where reward models are between uses."""
    return torch.device("cpu") if settings.machine.offload else device


def _visitors(settings: RunConfig, source: Data, rewards: Iterable[Reward]) -> list[nn.Module]:
    """What has to be on the device while rewards are computed: their networks, and a family's VAE."""
    modules = [module for reward in rewards for module in reward.modules().values()]
    return [*modules, *(() if settings.model.family is None else _folder(source).codec)]


def held_out_rewards(settings: RunConfig, source: Data, device: torch.device) -> dict[str, Reward]:
    """The rewards that only judge."""
    configured = {} if settings.reward is None else settings.reward.held_out
    found = {f"reward.held_out.{name}": (name, reward) for name, reward in configured.items()}
    found |= {f"judges.{name}": (name, reward) for name, reward in settings.judges.items()}
    place = _waits(settings, device)
    return {name: build_reward(reward, source, key, training=False).to(place) for key, (name, reward) in found.items()}


def example_prompts(settings: RunConfig, source: Data, seed: int) -> list[str]:
    """Prompts to show a student with: one of each class, or some captions of the validation split."""
    if settings.model.family is None:
        labelled = _labelled(source)
        return labelled.prompts(torch.arange(len(labelled.classes)), seed, 0)
    split = _folder(source).splits["validation"]
    return split.captions(range(min(4, len(split))))


def protocol_of(
    settings: RunConfig, source: Data, split: HeldOut, device: torch.device, ranks: Ranks = ALONE
) -> Protocol | PromptProtocol:
    """The fixed protocol that suits the data, with the rewards that only judge.

    A family is judged on the validation split alone, and also by the reward that it follows: it has no scorers of
    the data's own.
    """
    judges = held_out_rewards(settings, source, device)
    if settings.model.family is None:
        return Protocol(_labelled(source), settings.evaluation, split, device, judges)
    followed = {}
    if settings.reward is not None:
        model = settings.reward.model
        reward = build_reward(model, source, "reward.model", training=False)
        followed[model.kind] = reward.to(_waits(settings, device))
    images = None
    if (folder := settings.evaluation.reference) is not None:
        from twinrl.rewards import inception

        images = inception.reference(folder, settings.evaluation.inception, device)
        images.network.to(_waits(settings, device))
    visitors = _visitors(settings, source, [*judges.values(), *followed.values()])
    visitors += [] if images is None else [images.network]
    ranks.keep_frozen([*visitors, *_folder(source).encoders])
    return PromptProtocol(_folder(source), settings.evaluation, device, judges, followed, images, visitors)


def seed_stream(seed: int, purpose: str, step: int) -> None:
    """Seed torch's global generators for one step (dropout draws from them), so that a resumed step repeats."""
    draws.seed_global(draws.generator(seed, purpose, step).initial_seed())


def parts_of(objective: Objective) -> dict[str, nn.Module]:
    """The modules that a checkpoint holds, by part."""
    teacher = objective.teacher
    parts = {"student": teacher.student, "ema": teacher.ema, "frozen": teacher.frozen}
    return {name: module for name, module in parts.items() if module is not None and list(module.parameters())}
