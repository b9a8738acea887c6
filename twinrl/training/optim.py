"""Optimizers, learning-rate policies and early stopping, chosen in configuration."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings, stored
from twinrl.config.components import Registry, Returned, checked, plain_state, wrong_return
from twinrl.config.errors import InputError
from twinrl.gradients.telemetry import Moved
from twinrl.machine import compiling
from twinrl.machine.float8 import check_torchao
from twinrl.machine.moving import numbers

Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """Settings that every optimizer has."""

    lr: float = Field(3e-4, gt=0, allow_inf_nan=False, description="learning rate")


class AdamConfig(OptimizerConfig):
    """Settings of Adam and its kin."""

    betas: tuple[Decay, Decay] = Field((0.9, 0.99), description="decay of the first and second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled in adamw)")


class Optimizer(ABC):
    """An optimizer by name. Subclasses give ``Config`` and :meth:`make`."""

    Config: ClassVar[type[OptimizerConfig]] = OptimizerConfig

    @staticmethod
    @abstractmethod
    def make(parameters: list[torch.nn.Parameter], config: Any) -> torch.optim.Optimizer:
        """The torch optimizer over ``parameters``, all of which require gradients."""

    @classmethod  # noqa: B027 (most run everywhere)
    def check(cls, device: torch.device, processes: int) -> None:
        """Raises InputError where it cannot run on a device, or in so many processes; before data are loaded."""

    @staticmethod
    def uncompiled() -> AbstractContextManager[Any]:
        """Inside, a step of few numbers takes no time for a compiler."""
        return nullcontext()

    @staticmethod
    def stands_for(shape: torch.Size) -> tuple[int, ...]:
        """The shape of a small parameter of which it keeps the same things as of one of ``shape``."""
        return (2,) * len(shape)

    @classmethod
    def build(cls, config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over those of ``parameters`` that require gradients."""
        wanted = [p for p in parameters if p.requires_grad]
        made = checked(cls.make(wanted, config), torch.optim.Optimizer, cls, "make")
        held = sum(len(group["params"]) for group in made.param_groups)
        if held != len(wanted):
            raise wrong_return(made, cls, "make", f"one over all {len(wanted)} parameters, not {held}")
        return made


class _Adams(Optimizer):
    algorithm: ClassVar[Callable[..., torch.optim.Optimizer]]
    form: ClassVar[dict[str, bool]] = {"fused": True}  # one pass over the memory

    @classmethod
    def make(cls, parameters: list[torch.nn.Parameter], config: AdamConfig) -> torch.optim.Optimizer:
        return cls.algorithm(parameters, **config.model_dump(include=set(AdamConfig.model_fields)), **cls.form)


class Adam(_Adams):
    """Adam (arXiv:1412.6980)."""

    algorithm = torch.optim.Adam

    class Config(AdamConfig):
        kind: Literal["adam"] = "adam"


class AdamW(_Adams):
    """AdamW (arXiv:1711.05101), the default."""

    algorithm = torch.optim.AdamW

    class Config(AdamConfig):
        kind: Literal["adamw"] = "adamw"


class RAdam(_Adams):
    """RAdam (arXiv:1908.03265): rectified warm-up of the adaptive rate."""

    algorithm = torch.optim.RAdam
    form: ClassVar[dict[str, bool]] = {}  # torch has no fused one

    class Config(AdamConfig):
        kind: Literal["radam"] = "radam"


BLOCK, WHOLE = 256, 4096
"""torchao's: numbers of a block, and those of the smallest tensor whose moments are kept in blocks."""


class AdamW8bit(Optimizer):
    """AdamW with both moments in 8 bits (arXiv:2110.02861): 2 bytes a parameter instead of 8. It needs torchao.

    *When to use*: all parameters of a large model on one GPU. Tensors of few numbers keep their moments whole.
    """

    class Config(AdamConfig):
        kind: Literal["adamw8bit"] = "adamw8bit"

    @classmethod
    def check(cls, device: torch.device, processes: int) -> None:
        key = "optim.kind=adamw8bit"
        check_torchao(key)
        compiling.check(compiling.INDUCTOR, device, key)  # its step is compiled
        if processes > 1:
            raise InputError(f"{key} is for one process", got=f"{processes}", fix="use adamw, which is divided by them")

    @staticmethod
    def uncompiled() -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager")

    @staticmethod
    def stands_for(shape: torch.Size) -> tuple[int, ...]:
        blocks = shape.numel() >= WHOLE and shape.numel() % BLOCK == 0
        return (WHOLE,) + (1,) * (len(shape) - 1) if blocks else (2,) * len(shape)

    @staticmethod
    def make(parameters: list[torch.nn.Parameter], config: AdamConfig) -> torch.optim.Optimizer:
        check_torchao("optim.kind=adamw8bit")
        from twinrl.training.adam8bit import AdamWIn8Bits

        return AdamWIn8Bits(parameters, **config.model_dump(include=set(AdamConfig.model_fields)))


def kept_by(config: Any) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Parameter → what the configured optimizer keeps of such a one after a step, by name; seen at a small one."""

    kind = OPTIMIZERS.find(config.kind)

    @cache
    def kept(dtype: torch.dtype, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        small = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        small.grad = torch.zeros_like(small)
        optimizer = kind.build(config, [small])
        with kind.uncompiled():
            optimizer.step()
        return {name: torch.as_tensor(value) for name, value in optimizer.state_dict()["state"].get(0, {}).items()}

    return lambda parameter: kept(parameter.dtype, kind.stands_for(parameter.shape))


OPTIMIZERS = Registry("optimizer", Optimizer, {"adam": Adam, "adamw": AdamW, "adamw8bit": AdamW8bit, "radam": RAdam})


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer, lr: float, parameters: Sequence[Tensor], measure: bool
) -> dict[str, float]:
    """The optimizer's step at learning rate ``lr``; with ``measure``, metric → number, at the price of a copy of
    the parameters: what :class:`twinrl.gradients.telemetry.Moved` finds."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not measure:
        optimizer.step()
        return {}
    moved = Moved(optimizer, parameters)
    optimizer.step()
    return numbers(moved.measures())


# --- learning-rate policies -------------------------------------------------------------------------------


def _improves(quality: float, best: float, threshold: float) -> bool:
    """Whether ``quality`` is below ``best`` by more than a share of its size; kernel distances may be negative."""
    return quality < (best if math.isinf(best) else best - threshold * abs(best))


class PolicyConfig(Settings):
    """Settings that every learning-rate policy has."""

    warmup: int = Field(0, ge=0, description="steps of linear warm-up from 0")


class LearningRatePolicy:
    """Moves the learning rate over a run; by itself it warms up and stays. Subclasses give ``Config`` and what differs.

    Arguments:
        config: of the policy.
        steps: optimizer steps of the whole run.
    """

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig
    RETURNS: ClassVar[Mapping[str, Returned]] = {"state": plain_state}

    def __init__(self, config: Any, steps: int):
        self.config, self.steps, self.scale = config, steps, 1.0

    def factor(self, step: int) -> float:
        """Factor of the learning rate at ``step`` (0-based); called once a step."""
        return self.scale * min(1.0, (step + 1) / (self.config.warmup + 1))

    def observe(self, quality: float) -> None:
        """A validation found this quality; smaller is better."""

    def spike(self) -> None:
        """The gradient spiked at this step."""

    def cut(self, factor: float, minimum: float = 0.0) -> None:
        """Multiply all further rates by ``factor``, but not below ``minimum`` times the configured one."""
        self.scale = max(self.scale * factor, minimum)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"scale": self.scale}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.scale = stored.finite(state["scale"])


class ConstantLR(LearningRatePolicy):
    """The configured learning rate, after an optional linear warm-up."""

    class Config(PolicyConfig):
        kind: Literal["constant"] = "constant"


class DecayOnSpike(LearningRatePolicy):
    """Cuts the rate at every gradient spike and lets it grow back slowly.

    *When to use*: runs that have healthy stretches at a rate which now and then proves too high.
    """

    class Config(PolicyConfig):
        kind: Literal["decay_on_spike"] = "decay_on_spike"
        cut: float = Field(0.5, gt=0, lt=1, description="factor of each cut")
        minimum: float = Field(0.01, ge=0, le=1, description="smallest factor")
        recovery: int | None = Field(
            None, ge=1, description="steps over which half a cut is won back (in logarithms); null = never"
        )

    def factor(self, step: int) -> float:
        if self.config.recovery is not None:
            self.scale = min(1.0, self.scale * self.config.cut ** (-0.5 / self.config.recovery))
        return super().factor(step)

    def spike(self) -> None:
        self.cut(self.config.cut, self.config.minimum)


class CosineLR(LearningRatePolicy):
    """Falls from the configured rate to ``final`` times it over the run, along half a cosine.

    *When to use*: runs of known length whose last quality counts; the noise of a constant rate is averaged out.
    """

    class Config(PolicyConfig):
        kind: Literal["cosine"] = "cosine"
        final: float = Field(0.02, ge=0, le=1, description="factor of the rate at the end of the run")

    def factor(self, step: int) -> float:
        fall = (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2
        return super().factor(step) * (self.config.final + (1 - self.config.final) * fall)


class Plateau(LearningRatePolicy):
    """Cuts the rate by ``factor`` when validation quality has not improved for ``patience`` validations."""

    class Config(PolicyConfig):
        kind: Literal["plateau"] = "plateau"
        cut: float = Field(0.5, gt=0, lt=1, description="factor of each cut")
        patience: int = Field(3, ge=1, description="validations without improvement before a cut")
        threshold: float = Field(1e-4, ge=0, description="relative improvement that counts")
        minimum: float = Field(0.0, ge=0, le=1, description="smallest factor")
        monitor: Literal["quality", "objective"] = Field(
            "quality", description="what must improve: val/quality, or the training objective on validation rows"
        )

    def __init__(self, config: Any, steps: int):
        super().__init__(config, steps)
        self.best, self.bad = math.inf, 0

    def observe(self, quality: float) -> None:
        if _improves(quality, self.best, self.config.threshold):
            self.best, self.bad = quality, 0
            return
        self.bad += 1
        if self.bad >= self.config.patience:
            self.cut(self.config.cut, self.config.minimum)
            self.bad = 0

    def state(self) -> dict[str, Any]:
        return super().state() | {"best": self.best, "bad": self.bad}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.best, self.bad = stored.number(state["best"]), stored.count(state["bad"])


LR_POLICIES = Registry(
    "learning-rate policy",
    LearningRatePolicy,
    {"constant": ConstantLR, "cosine": CosineLR, "plateau": Plateau, "decay_on_spike": DecayOnSpike},
)


class EarlyStop:
    """Says when validation quality has not improved for a number of validations."""

    class Config(Settings):
        patience: int | None = Field(None, ge=1, description="validations without improvement; null = never stop")
        threshold: float = Field(1e-4, ge=0, description="relative improvement that counts")

    def __init__(self, config: Config):
        self.config, self.best, self.bad = config, math.inf, 0

    def observe(self, quality: float) -> bool:
        """True when training should stop."""
        if _improves(quality, self.best, self.config.threshold):
            self.best, self.bad = quality, 0
        else:
            self.bad += 1
        return self.reached

    @property
    def reached(self) -> bool:
        """The last answer of :meth:`observe`; part of the state, so that a resumed run stops where it should have."""
        return self.config.patience is not None and self.bad >= self.config.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"best": self.best, "bad": self.bad}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.best, self.bad = stored.number(state["best"]), stored.count(state["bad"])
