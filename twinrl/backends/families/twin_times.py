"""A second time and a sign for a pretrained diffusers transformer, without touching its forward pass.

    e(t, r) = e₁(|t|, …) + (|t| − |r|)·e₂(|r|, …) + [t < 0]·s

e₁ is the transformer's own time module. e₂ has the same structure, the sign s is one vector; e₂'s last layers and s
start at zero, so a new student equals its teacher everywhere, and it stays equal at r = t ≥ 0 whatever they learn.
The factor (|t| − |r|) is zero on both branches at r = t, so s alone tells (t, t) from (−t, −t).

e₂ keeps the names of the published TwinFlow checkpoints (``time_text_embed_2.*``, ``time_embed_2.*``,
``t_embedder_2.*``) and their meaning, so that their weights load. Those tell the branches apart by the sign of the time
given to e₁ instead, or not at all; they bring no s, which then starts at zero.

Everything enters through two hooks on the time module: one replaces the time it is given, which forward passes round to
the weights' precision, by the exact one; the other adds e₂ and s to its result. A forward pass outside :meth:`at`,
as stock pipelines make it, uses the time it was given and r = 0: few-step sampling.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twinrl.backends.embedding import at_least_single
from twinrl.backends.families.lora import without_adapters
from twinrl.config.errors import InputError
from twinrl.machine.sharding import own_memory

_log = logging.getLogger(__name__)

TRANSFORMERS: dict[str, str] = {}
"""Name of a transformer with twin times → its module; each is entered when it is defined. diffusers asks for it."""


class TwinTimes(nn.Module):
    """Mixin for diffusers transformers, before the transformer's class in the bases.

    Attributes:
        TIME: name of the transformer's time module; the second one is ``TIME + "_2"``.
        OUTPUTS: the linear layers inside it whose widths are those of the tensors it returns, in order.
        SILENT: further layers inside it that must be zero for its output to be zero.
        twin: False hides e₂ and s (see :meth:`as_pretrained`).
    """

    TIME: ClassVar[str] = "time_text_embed"
    OUTPUTS: ClassVar[tuple[str, ...]] = ("timestep_embedder.linear_2",)
    SILENT: ClassVar[tuple[str, ...]] = ()
    config: Any  # diffusers' own
    twin: bool = True
    _times: tuple[Tensor, Tensor] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TRANSFORMERS[cls.__name__] = cls.__module__

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        first = getattr(self, self.TIME)
        setattr(self, self.second_name, copy.deepcopy(first))  # before the hooks, which are not for the copy
        self.twin_widths = tuple(first.get_submodule(name).out_features for name in self.OUTPUTS)
        weight = first.get_submodule(self.OUTPUTS[0]).weight
        self.twin_sign = nn.Parameter(torch.zeros(sum(self.twin_widths), dtype=weight.dtype, device=weight.device))
        self._silence()
        first.register_forward_pre_hook(self._give_exact_time, with_kwargs=True)
        first.register_forward_hook(self._add_second, with_kwargs=True)
        self.register_forward_hook(own_memory)

    # --- the family's time scale ------------------------------------------------------------------------

    def module_time(self, level: Tensor) -> Tensor:
        """What the time module is given at noise level |t| in [0, 1]."""
        return 1000 * level

    def level(self, module_time: Tensor) -> Tensor:
        """The inverse of :meth:`module_time`."""
        return module_time / 1000

    def second_time(self, level: Tensor, target: Tensor) -> Tensor:
        """What the second time module is given: by default |r|, scaled as the first one's time."""
        return self.module_time(target)

    # --- one forward pass -------------------------------------------------------------------------------

    @contextmanager
    def at(self, t_b: Tensor, r_b: Tensor) -> Iterator[None]:
        """Forward passes inside see t in [−1, 1] (negative = fake branch) and |r| ≤ |t|, both (B,), exactly.

        Times come this way and not as arguments because wrappers for mixed precision (FSDP2) round floating-point
        arguments.
        """
        self._times = at_least_single(t_b), at_least_single(r_b)
        try:
            yield
        finally:
            self._times = None

    def _give_exact_time(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._times is None:
            return None
        return (self.module_time(self._times[0].abs()), *args[1:]), kwargs

    def _add_second(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.twin:
            return output
        level, target, fake = self._levels(args[0])
        module = getattr(self, self.second_name)
        told, named = _in(next(module.parameters()).dtype, args[1:], kwargs)
        second = module(self.second_time(level, target), *told, **named)
        if isinstance(output, Tensor):
            return self._sum(output, second, self.twin_sign, level - target, fake)
        signs = self.twin_sign.split(self.twin_widths)
        return tuple(self._sum(*each, level - target, fake) for each in zip(output, second, signs, strict=True))

    def _levels(self, module_time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|t|, |r| and whether the branch is the fake one, each (B,)."""
        if self._times is None:
            level = self.level(at_least_single(module_time))
            return level, torch.zeros_like(level), torch.zeros_like(level, dtype=torch.bool)
        t, r = self._times
        return t.abs(), r.abs(), t < 0

    @staticmethod
    def _sum(first: Tensor, second: Tensor, sign: Tensor, length: Tensor, fake: Tensor) -> Tensor:
        return (
            first
            + second.to(first.dtype) * length.to(first.dtype)[:, None]
            + sign.to(first.dtype) * fake.to(first.dtype)[:, None]
        )

    # --- parameters -------------------------------------------------------------------------------------

    @property
    def second_name(self) -> str:
        """Attribute name of the second time module."""
        return f"{self.TIME}_2"

    @property
    def base_dtype(self) -> torch.dtype:
        """The pretrained weights' dtype; what is trained beside them may have another."""
        return getattr(self, self.TIME).get_submodule(self.OUTPUTS[0]).weight.dtype

    def twin_parameters(self) -> dict[str, nn.Parameter]:
        """The second time module's parameters and the sign, by their names in the transformer."""
        second = {f"{self.second_name}.{n}": p for n, p in getattr(self, self.second_name).named_parameters()}
        return {**second, "twin_sign": self.twin_sign}

    def _silence(self) -> None:
        """Zero the second time module's output layers."""
        second = getattr(self, self.second_name)
        layers = [second.get_submodule(n) for n in (*self.OUTPUTS, *self.SILENT) if _has(second, n)]
        with torch.no_grad():
            for parameter in (p for layer in layers for p in layer.parameters()):
                parameter.zero_()

    def complete(self, source: str) -> None:
        """Give values to what a checkpoint did not bring (left on the meta device by loading), and log what.

        Raises:
            ValueError: the checkpoint brought a part of the second time module.
        """
        absent = {name for name, p in self.twin_parameters().items() if p.is_meta}
        brought = set(self.twin_parameters()) - absent - {"twin_sign"}
        if brought and absent - {"twin_sign"}:
            raise ValueError(f"{source} has a part of {self.second_name} only; missing {', '.join(sorted(absent))}")
        if not brought:
            self._new_second()
            _log.info("%s has no second time embedding: it starts without effect", source)
        if "twin_sign" in absent:
            self.twin_sign = nn.Parameter(self._like_first(self.twin_sign).zero_())
            _log.info("%s has no sign embedding: it starts at zero, so both branches start alike", source)

    def origins(self, stored: Collection[str], where: object) -> dict[str, str | None]:
        """Parameter or buffer → the name of the stored tensor that it starts from; None: it starts at zero.

        What :meth:`complete` does, without a value in memory. Adapters start by ``lora.first_values``.

        Raises:
            InputError: the files ``where`` lack weights, or have a part of the second time module.
        """
        second = set(self.twin_parameters()) - {"twin_sign"}
        if (brought := second & set(stored)) and brought != second:
            raise InputError(f"{where} has a part of {self.second_name} only", got=f"no {min(second - brought)}")
        found: dict[str, str | None] = {name: name for name in self.state_dict() if name in stored}  # buffers, too
        for name, _ in self.named_parameters():
            found[name] = None if "lora_" in name else self._origin(name.replace(".base_layer.", "."), stored)
            if found[name] is None and "lora_" not in name and name not in self.twin_parameters():
                raise InputError(f"{where} lacks weights", got=f"no {name}")
        return found

    def _origin(self, name: str, stored: Collection[str]) -> str | None:
        if name in stored:
            return name
        start = f"{self.second_name}."
        inner = name.removeprefix(start)
        silent = any(inner.startswith(f"{layer}.") for layer in (*self.OUTPUTS, *self.SILENT))
        first = f"{self.TIME}.{inner}"
        return first if name.startswith(start) and not silent and first in stored else None

    def _new_second(self) -> None:
        """The second time module as a silent copy of the first."""
        first, second = getattr(self, self.TIME), getattr(self, self.second_name)
        weight = first.get_submodule(self.OUTPUTS[0]).weight
        second.to_empty(device=weight.device).to(weight.dtype).load_state_dict(first.state_dict())
        self._silence()

    def _like_first(self, parameter: Tensor) -> Tensor:
        weight = getattr(self, self.TIME).get_submodule(self.OUTPUTS[0]).weight
        return torch.empty_like(parameter, dtype=weight.dtype, device=weight.device)

    @contextmanager
    def as_pretrained(self) -> Iterator[None]:
        """Inside, the transformer is the pretrained one: no second time, no sign, adapters off.

        *When to use*: a frozen teacher under LoRA, at no cost in memory.
        """
        self.twin = False
        try:
            with without_adapters(self):
                yield
        finally:
            self.twin = True


def told_more(stock: type, **more: Any) -> Callable[[Callable], Callable]:
    """For the constructor of a class derived from ``stock``: its arguments are those of ``stock`` and ``more``, with
    their defaults. diffusers reads from the signature which entries of a configuration are arguments."""
    known = inspect.signature(stock.__init__)  # type: ignore[misc]
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in more.items()]

    def decorate(constructor: Callable) -> Callable:
        decorated = wraps(stock.__init__)(constructor)  # type: ignore[misc]
        decorated.__signature__ = known.replace(parameters=[*known.parameters.values(), *added])  # type: ignore[attr-defined]
        return decorated

    return decorate


def _in(dtype: torch.dtype, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What a time module is told beside the time, in its own precision; a second one that is trained may have another
    than the frozen first one."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())
