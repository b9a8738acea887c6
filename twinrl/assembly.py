"""From a configuration to the objects of a run: device, source, student, teachers, objective."""

from pathlib import Path

import torch
from torch import nn

from twinrl import checkpoints, draws
from twinrl.backends import build_network, network_key, tells_branches_apart
from twinrl.backends.wrappers import WithoutTargetTime
from twinrl.config import build, resolve
from twinrl.data import SOURCES
from twinrl.data.source import Source
from twinrl.errors import InputError
from twinrl.objective import Objective
from twinrl.rewards import Reward, build_reward
from twinrl.rewards.guide import Guide
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.teacher import Teacher
from twinrl.terms import TERMS

DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


def device_of(settings: RunConfig) -> torch.device:
    """The device that ``machine.device`` names; auto is a GPU where there is one.

    Raises:
        InputError: no such device.
    """
    wanted = settings.machine.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"machine.device {wanted!r} is not available",
            got=str(error).splitlines()[0],
            fix="use auto or cpu",
        ) from error
    return device


def load_source(settings: RunConfig, device: torch.device) -> Source:
    """The data source on the device, built or read from the cache."""
    return SOURCES[settings.data.source](settings.data.root).to(str(device))


def new_network(settings: RunConfig, source: Source) -> nn.Module:
    """The configured network with keyed initial weights, and the target time hidden if so configured.

    Raises:
        InputError: the network's sizes do not fit the source's latents.
    """
    try:
        network = build_network(settings.model.network, source, settings.seed)
    except ValueError as error:
        raise InputError(
            "model.network does not fit the data",
            got=f"{error} ({source.name} has latents {'×'.join(map(str, source.latent_shape))})",
            fix="change the sizes under model.network",
        ) from error
    return network if settings.model.target_time else WithoutTargetTime(network)


def student_of(settings: RunConfig, source: Source, device: torch.device, start_weights: bool = True) -> nn.Module:
    """The student at the start of training: network, start weights (unless a checkpoint brings them), dtype, device.

    Raises:
        InputError: a term uses negative time and the network cannot tell it from positive time; start weights
            of another network.
    """
    network = new_network(settings, source)
    if any(resolve(TERMS, term.kind, "term").negative_time for term in settings.terms.values()):
        check_branches_apart(network, source, settings.model.network.kind)
    if start_weights:
        start(network, settings, source)
    return network.to(device=device, dtype=DTYPES[settings.train.precision]).train()


def check_branches_apart(network: nn.Module, source: Source, kind: str) -> None:
    """Raises InputError where (t, t) and (−t, −t) are the same to the network."""
    if not tells_branches_apart(network, source.latent_shape, source.null_condition(1)):
        raise InputError(
            f"network {kind} answers (t, t) and (−t, −t) alike, so Δv is zero and the negative-time terms do nothing",
            fix="embed the sign of t (twinrl.backends.embedding.TimeEmbedding), or remove those terms",
        )


def start(network: nn.Module, settings: RunConfig, source: Source) -> None:
    """Load the start weights that ``train.init`` names.

    Raises:
        InputError: it names nothing, a run without a checkpoint, or weights of another network.
    """
    origin = settings.train.init
    if origin == "random":
        return
    if origin == "teacher":
        inner = network.network if isinstance(network, WithoutTargetTime) else network
        weights = source.teacher_weights(inner, network_key(settings.model.network))
        checkpoints.load_module(inner, weights, "the pretrained teacher")
        return
    run = RunDirectory(Path(origin))
    if not run.exists:
        raise InputError(f"train.init is {origin!r}", expected="teacher, random, or the directory of a run")
    checkpoint = run.newest_checkpoint()
    checkpoints.load_module(network, checkpoints.load(checkpoint).judged, str(checkpoint))


def pretrained_teacher(settings: RunConfig, source: Source, device: torch.device) -> nn.Module:
    """The source's flow-matching teacher of the configured architecture, in eval mode."""
    network = build_network(settings.model.network, source, 0)
    checkpoints.load_module(
        network, source.teacher_weights(network, network_key(settings.model.network)), "the teacher"
    )
    return network.to(device).eval()


def objective_of(settings: RunConfig, student: nn.Module, guide: Guide | None = None) -> Objective:
    """Terms, teachers, guidance and reward around the student."""
    terms = {name: build(TERMS, term, "term") for name, term in settings.terms.items()}
    autocast = torch.bfloat16 if settings.train.precision == "bf16" else None
    return Objective(terms, Teacher(student, settings.teacher), settings.guidance, autocast, guide)


def guide_of(settings: RunConfig, source: Source, device: torch.device) -> Guide | None:
    """The reward that training follows, on the device; None where none is configured.

    Raises:
        InputError: its checkpoint is missing or foreign, or the estimator does not fit it.
    """
    if settings.reward is None:
        return None
    reward = build_reward(settings.reward.model, source, "reward.model").to(device)
    return Guide(settings.reward, reward, source, settings.train.steps, settings.renoise_end())


def held_out_rewards(settings: RunConfig, source: Source, device: torch.device) -> dict[str, Reward]:
    """The rewards that only judge."""
    configured = {} if settings.reward is None else settings.reward.held_out
    return {
        name: build_reward(reward, source, f"reward.held_out.{name}", training=False).to(device)
        for name, reward in configured.items()
    }


def seed_stream(seed: int, purpose: str, step: int) -> None:
    """Seed torch's global generators for one step (dropout draws from them), so that a resumed step repeats."""
    torch.manual_seed(draws.generator(seed, purpose, step).initial_seed())


def parts_of(objective: Objective) -> dict[str, nn.Module]:
    """The modules that a checkpoint holds, by part."""
    teacher = objective.teacher
    parts = {"student": teacher.student, "ema": teacher.ema, "frozen": teacher.frozen}
    return {name: module for name, module in parts.items() if module is not None}
