"""From a configuration to the objects of a run: device, provider of data and models, objective."""

from typing import Any

import torch
from torch import nn

from twinrl.flow.source import Data
from twinrl.flow.teacher import Teacher
from twinrl.fsdp import mesh
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.machine import compiling, float8
from twinrl.rewards.guide import Guide
from twinrl.terms import TERMS, NetworkOwner
from twinrl.terms.objective import Objective
from twinrl.training.laboratory import Laboratory
from twinrl.training.optim import OPTIMIZERS
from twinrl.training.pretrained import PretrainedModels
from twinrl.training.provider import Provider
from twinrl.training.schema import RunConfig


def device_of(settings: RunConfig) -> torch.device:
    """The device that ``machine.device`` names. Raises InputError where there is none."""
    return mesh.device_named(settings.machine.device, "machine.device")


def machine_of(settings: RunConfig) -> torch.device:
    """The device; the number of threads is set on the way."""
    if settings.machine.threads:
        torch.set_num_threads(settings.machine.threads)
    return device_of(settings)


def check_options(settings: RunConfig, device: torch.device) -> None:
    """Raises InputError where a configured option cannot run on the device; before data are loaded."""
    if settings.machine.compile is not None:
        compiling.check(settings.machine.compile, device)
    if settings.model.float8:
        float8.check(device, "model.float8")
    OPTIMIZERS.find(settings.optim.kind).check(device, mesh.world_size())


def kind_of(settings: RunConfig) -> type[Provider[Any]]:
    """The class of the run's provider."""
    return PretrainedModels if settings.model.is_pretrained else Laboratory


def load_source(settings: RunConfig, device: torch.device) -> Any:
    """The data source on the device, built or read from the cache; with the family's pipeline if one is trained.

    Raises:
        InputError: no such pipeline or prepared folder, or one for another model.
    """
    return kind_of(settings).load(settings, device)


def load_provider(settings: RunConfig, device: torch.device | None = None) -> Provider[Any]:
    """Data and models of the run, loaded, on the configured device or another. Raises InputError as above."""
    device = device or device_of(settings)
    return provider_of(settings, load_source(settings, device), device)


def provider_of(settings: RunConfig, source: Data, device: torch.device, ranks: Ranks = ALONE) -> Provider[Any]:
    """Data and models of the run, from a source that is loaded."""
    return kind_of(settings)(settings, source, device, ranks)


def objective_of(provider: Provider[Any], student: nn.Module, guide: Guide | None = None) -> Objective:
    """Terms, teachers, guidance and reward around the student."""
    settings = provider.settings
    terms = {name: TERMS.build(term) for name, term in settings.terms.items()}
    autocast = torch.bfloat16 if settings.train.precision == "bf16" else None
    teacher = Teacher(student, settings.teacher, provider.copy, provider.under_adapters(student))
    owners = [name for name, term in terms.items() if isinstance(term, NetworkOwner)]
    own = {name: provider.copy(student, trained=True) for name in owners}
    return Objective(terms, teacher, settings.guidance, autocast, guide, own)


REMAINDER = "remainder"
"""The part that checkpoints of older versions lack: then the average goes on without."""


def parts_of(objective: Objective) -> dict[str, nn.Module]:
    """The modules that a checkpoint holds, by part."""
    teacher = objective.teacher
    networks = {"student": teacher.student, "ema": teacher.ema, "frozen": teacher.frozen}
    own = {f"own_{name}": network for name, network in objective.own.items()}
    parts: dict[str, nn.Module | None] = {**networks, REMAINDER: teacher.remainder, **own}
    return {name: module for name, module in parts.items() if module is not None and list(module.parameters())}
