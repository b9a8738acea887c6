"""What a watched run is: its gradients' rules, its policies, and what its training loop tells of itself."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, NonNegativeInt
from torch import nn

from twinrl.config import Settings, validate
from twinrl.config.errors import InputError
from twinrl.flow.schedules import Constant, Schedule
from twinrl.gradients import GradientsConfig
from twinrl.stability.policy import StabilityConfig

SHARED_RULES = ("each", "total")
"""Keys of the rules that are no loss's: of every loss without rules of its own, and of the sum."""
NAME = re.compile(r"[\w .:+-]{1,100}")
POLICY = "record"
"""At non-finite numbers: a watch that is told nothing else changes no training."""


class WatchedTerm(Settings):
    """A loss of the loop: it has no settings, its name is what counts."""


class WatchConfig(Settings):
    """``config.yaml`` of a watched run. The loop's own settings make arms and factors of a report."""

    name: str = Field(description="of the run's folder")
    seed: NonNegativeInt = Field(description="tells repetitions of the same settings apart")
    watched: dict[str, JsonValue] = Field(description="the model's class and size, and the optimizer")
    settings: dict[str, JsonValue] = Field({}, description="what the loop tells of itself")
    train: dict[str, int] = Field({}, description="steps, where the loop knows how many it will make")
    terms: dict[str, WatchedTerm] = Field({}, description="the losses, by name")
    gradients: GradientsConfig = GradientsConfig()
    stability: StabilityConfig = StabilityConfig(policy=POLICY)

    def of_losses(self, names: Iterable[str], space: Literal["parameter", "output"]) -> "WatchConfig":
        """The configuration once the losses are known, by name.

        Raises:
            InputError: a rule is for no loss, or does not go with the space.
        """
        gradients = validate(GradientsConfig, self.gradients.model_dump() | {"space": space})
        try:
            gradients.check_terms(tuple(names))
        except ValueError as error:
            raise InputError(f"watch: {error}", fix="name a loss that watch.backward gets") from error
        return self.model_copy(update={"gradients": gradients, "terms": {name: WatchedTerm() for name in names}})


def gradients_of(rules: Mapping[str, Any], telemetry: Mapping[str, Any], steps: int | None) -> GradientsConfig:
    """Rules by loss, ``each`` and ``total`` as the engine's configuration.

    Raises:
        InputError: a rule or a key is not known, or a schedule has no length of the run to go by.
    """
    terms = {name: chain for name, chain in rules.items() if name not in SHARED_RULES}
    shared = {name: rules[name] for name in SHARED_RULES if name in rules}
    found: GradientsConfig = validate(GradientsConfig, {**shared, "terms": terms, "telemetry": dict(telemetry)})
    if steps is None and (moving := _moving(found)):
        raise InputError(
            f"rules: {moving} is scheduled, which needs the run's length", fix="give steps= to twinrl.watch"
        )
    found.check_schedules(steps or 1, None)
    return found


def _moving(config: GradientsConfig) -> str:
    """The first rule with a number that moves."""
    for chain in (*config.terms.values(), config.each, config.total):
        for name, rule in chain.items():
            if any(isinstance(value, Schedule) and not isinstance(value, Constant) for _, value in rule):
                return name
    return ""


def stability_of(given: Mapping[str, Any], rms_every: int) -> StabilityConfig:
    """Thresholds and policies; where nothing is said, whatever happens is recorded. Raises InputError."""
    found: StabilityConfig = validate(StabilityConfig, {"policy": POLICY, **given})
    found.check_measured(rms_every)
    return found


def described(model: nn.Module, optimizer: torch.optim.Optimizer, trained: int) -> dict[str, Any]:
    """The model and the optimizer, told in plain values."""
    plain = {key: value for key, value in optimizer.defaults.items() if isinstance(value, bool | int | float | str)}
    return {
        "model": type(model).__name__, "trained_parameters": trained,
        "optimizer": type(optimizer).__name__, "optimizer_settings": plain,
    }  # fmt: skip


def check_names(given: Iterable[object], known: Iterable[str] | None) -> None:
    """Raises InputError where a loss's name cannot name metrics, or the names are not those of the first step."""
    names = set()
    for name in given:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in SHARED_RULES:
            raise InputError(
                f"{name!r:.80} cannot be a loss's name",
                expected=f"letters, digits, spaces and _ . : + -, no slash; not {' or '.join(SHARED_RULES)}",
            )
        names.add(name)
    if known is not None and names != (before := set(known)):
        new, gone = sorted(names - before), sorted(before - names)
        told = [f"{word} {', '.join(which)}" for word, which in (("new", new), ("without", gone)) if which]
        raise InputError(
            "the losses' names have changed since the first step", got="; ".join(told),
            expected=", ".join(sorted(before)), fix="give every loss at every step",
        )  # fmt: skip
