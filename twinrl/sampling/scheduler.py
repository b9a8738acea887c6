"""``TwinFlowScheduler``: the sampler as a diffusers scheduler, for stock pipelines.

It walks the same ``plan`` with the same ``update`` (``twinrl/sampling/update.py``) as
``twinrl.sampling.sample``, one network evaluation per ``step``. Import it from here: diffusers takes seconds
to import, so ``twinrl.sampling`` does not.
"""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from pydantic import ValidationError
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.flow.transport import interpolate
from twinrl.sampling.sampler import keyed_noise
from twinrl.sampling.settings import (
    SamplerConfig,
    any_step,
    few_step,
    multi_step,
    simpletuner_gap_end,
    time_grid,
)
from twinrl.sampling.update import Evaluation, SamplerState, high_precision, initial_state, plan, update

logger = logging.getLogger(__name__)

MOST_TIMESTEPS = 1_000_000
"""A list of them is made; models have 1000."""
LARGEST_MU = 100
"""exp(mu) is the shift; pipelines pass 0.5 to 1.2."""
SAMPLER_STYLES = {"few": few_step, "any": any_step, "mul": multi_step}


@dataclass
class TwinFlowSchedulerOutput(SchedulerOutput):
    """``prev_sample`` (B, ...): the next network input; ``pred_original_sample``: this step's raw x̂."""

    pred_original_sample: Tensor | None = None


class TwinFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # the mixins disagree themselves
    """UCGM-S sampling (arXiv:2505.07447) in diffusers pipelines; equal to ``twinrl.sampling.sample``.

    Every network evaluation is a step of the pipeline, at order 2 too: hence diffusers' attribute ``order`` is 1.

    Settings left at None come from the style's public settings for the number of steps: ``few_step``,
    ``any_step`` or ``multi_step``. So ``TwinFlowScheduler()`` with 2 or 4 inference steps is what TwinFlow's
    README recommends.

    Pipelines tell the network the time t but not the target time r. A network that wants r reads it from
    :meth:`target_time`, :attr:`target_timesteps` or :meth:`target_for`.

    Arguments:
        num_train_timesteps: timesteps are t times this.
        prediction_type: ``"flow_prediction"``, the velocity z − x; nothing else.
        shift: s > 0 of ``t ← s·t/(1 + (s − 1)·t)`` on the grid; 1 leaves TwinFlow's own grid as it is.
        use_dynamic_shifting: take s = exp(mu) from the pipeline's ``mu``; otherwise ``mu`` is ignored.
        style: ``few``, ``any`` or ``mul``. This and ``order``, ``stochastic_ratio``, ``extrapolation``,
            ``kumaraswamy``, ``gap_start``, ``gap_end`` are the fields of ``SamplerConfig``.
        simpletuner_gap_end: read ``gap_end`` = 0 as SimpleTuner does: .6, .5 or .3 by the number of steps.
        seed: of the injected noise, keyed as in ``sample``: calls with equal seeds inject equal noise. None
            draws from torch's global generator; a ``generator`` given to ``step`` goes before both.

    *When to use*: images from a stock pipeline. In own code ``sample`` is shorter and passes r.
    """

    _compatibles: list[str] = []  # noqa: RUF012 (diffusers' own spelling)
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow_prediction",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        style: str = "few",
        order: int = 1,
        stochastic_ratio: float | str | None = None,
        extrapolation: float = 0.0,
        kumaraswamy: Sequence[float] | None = None,
        gap_start: float | None = None,
        gap_end: float | None = None,
        simpletuner_gap_end: bool = False,
        seed: int | None = 0,
    ):
        _check_basics(prediction_type, shift, style, num_train_timesteps)
        self.num_inference_steps: int | None = None
        self._plan: tuple[Evaluation, ...] = ()
        self.sampler_config(2)  # wrong settings fail here rather than in the pipeline
        ramp = torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps, dtype=torch.float64)
        self.sigmas = self._shifted(ramp, shift).float()
        self.timesteps = self.sigmas * num_train_timesteps
        self.target_timesteps = torch.zeros(0)
        self._forget()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of a configuration. Of another class's the shift is left out, with a warning.

        Arguments:
            config: nested mapping, as ``scheduler.config`` of any scheduler.
            return_unused_kwargs: also return what the class does not know.
            kwargs: settings that go before those of ``config``.

        Raises:
            InputError: the other scheduler predicts no flow, or counts its times from data to noise.
        """
        if isinstance(config, Mapping):
            config = _without_foreign_shift(config, cls, given=kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def sampler_config(self, num_inference_steps: int) -> SamplerConfig:
        """The sampler's settings for a number of steps, with those left at None filled in."""
        chosen = self.config
        names = ("stochastic_ratio", "kumaraswamy", "gap_start", "gap_end")
        given = {name: chosen[name] for name in names if chosen[name] is not None}
        if chosen["simpletuner_gap_end"] and chosen["gap_end"] == 0:
            given["gap_end"] = simpletuner_gap_end(num_inference_steps)
        settings = {"order": chosen["order"], "extrapolation": chosen["extrapolation"], **given}
        try:
            return SamplerConfig(**SAMPLER_STYLES[chosen["style"]](num_inference_steps).model_dump() | settings)
        except ValidationError as error:
            raise _one_line(error) from None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lays out the evaluations of one sample.

        Arguments:
            num_inference_steps: ``SamplerConfig.steps``: entries of ``timesteps``, network evaluations. Order 2
                visits (steps + 1) // 2 intervals with two evaluations each, one in the last: the times between are
                listed twice. Of an even number the first answer corrects nothing and is not used.
            device: of ``timesteps``.
            sigmas: own times t, falling, without the closing 0. Many pipelines pass the ramp
                ``linspace(1, 1/n, n)`` when their user gave none; it is taken for the number of steps alone.
                (For that ramp itself set the gaps to 0.)
            mu: logarithm of the shift, used with ``use_dynamic_shifting``.
            timesteps: own times in units of ``num_train_timesteps``.

        Raises:
            InputError: both ``sigmas`` and ``timesteps``, neither they nor a number, or unusable times.
        """
        own = self._own_times(sigmas, timesteps)
        steps = self._count(num_inference_steps, own)
        config = self.sampler_config(steps)
        if own is not None and _is_default_ramp(own):
            own = None
        grid = time_grid(config) if own is None else torch.cat([own, own.new_zeros(1)])
        self._plan = plan(config, self._shifted(grid, self._shift_factor(mu)))
        if own is None and len(self._plan) < steps:  # pipelines count on an entry for every step
            self._plan = (replace(self._plan[0], corrects=True), *self._plan)
        self.num_inference_steps = steps
        self._lay_out(device)

    def _own_times(
        self, sigmas: Sequence[float] | Tensor | None, timesteps: Sequence[float] | Tensor | None
    ) -> Tensor | None:
        if sigmas is not None and timesteps is not None:
            raise InputError("sigmas and timesteps are two ways to say one thing", fix="pass one of them")
        if sigmas is not None:
            return _times_of(sigmas, "sigmas")
        if timesteps is not None:
            return _times_of(timesteps, "timesteps") / self.config["num_train_timesteps"]
        return None

    def _count(self, given: int | None, own: Tensor | None) -> int:
        """The number of steps, given or counted."""
        if own is None:
            if not isinstance(given, Integral) or not 1 <= given <= MOST_TIMESTEPS:
                raise InputError(
                    "set_timesteps needs a number of steps", got=given, expected=f"1 to {MOST_TIMESTEPS:,}"
                )
            return given
        if given is not None and given != len(own):
            raise InputError("sigmas or timesteps of another length", got=len(own), expected=f"{given} of them")
        return len(own)

    def _shift_factor(self, mu: float | None) -> float:
        if not self.config["use_dynamic_shifting"]:
            return self.config["shift"]
        if not isinstance(mu, Real) or not abs(mu) <= LARGEST_MU:
            raise InputError(
                "use_dynamic_shifting needs mu", got=mu, expected=f"a number of at most ±{LARGEST_MU}",
                fix="pass mu or set use_dynamic_shifting=False",
            )  # fmt: skip
        return math.exp(mu)

    @staticmethod
    def _shifted(times: Tensor, shift: float) -> Tensor:
        """``t ← s·t/(1 + (s − 1)·t)``; s = 1 leaves the times exactly as they are."""
        return times if shift == 1 else shift * times / (1 + (shift - 1) * times)

    def _lay_out(self, device: str | torch.device | None) -> None:
        """The plan as the tensors that pipelines and networks read."""
        scale = self.config["num_train_timesteps"]
        times = torch.tensor([e.time for e in self._plan], dtype=torch.float64)
        targets = torch.tensor([e.target_time for e in self._plan], dtype=torch.float64)
        self.sigmas = torch.cat([times, times.new_zeros(1)]).float()
        self.timesteps = (times * scale).float().to(device)
        self.target_timesteps = (targets * scale).float().to(device)
        self._forget()

    def _forget(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._state: SamplerState | None = None

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What ``set_timesteps`` has laid out, one for each entry of ``timesteps``."""
        return self._plan

    @property
    def step_index(self) -> int | None:
        """The evaluation that the next ``step`` answers; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation to start at, where a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of ``timesteps`` (image-to-image pipelines start late)."""
        self._begin_index = begin_index

    def target_time(self, index: int | None = None) -> float:
        """r in [0, 1] of an entry of ``timesteps``, by default of the evaluation that comes next."""
        if index is None:
            index = self._step_index if self._step_index is not None else (self._begin_index or 0)
        return self._evaluation(index).target_time

    def target_for(self, timestep: float | Sequence[float] | Tensor) -> Tensor:
        """The target timesteps (B,) of timesteps (B,) or of one, both in units of ``num_train_timesteps``.

        The nearest entry of ``timesteps`` counts, so that timesteps rounded to bfloat16 find theirs.
        """
        self._evaluation(0)
        asked = torch.as_tensor(timestep)
        distance = (asked.reshape(-1, 1).float() - self.timesteps.to(asked.device)).abs()
        return self.target_timesteps.to(asked.device)[distance.argmin(dim=1)]

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The entry of ``timesteps`` equal to ``timestep``: the first, or of two later ones that which predicts."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (schedule == torch.as_tensor(timestep).to(schedule)).nonzero()
        if len(found) == 0:
            raise InputError("no such timestep", got=timestep, expected=f"one of {schedule.tolist()}")
        return 0 if found[0] == 0 else int(found[-1])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself; flow models need no scaling."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """``x_t = t·noise + (1−t)·sample``, to start from an image.

        Arguments:
            sample: data (B, ...), whose dtype and device the result has.
            timestep: (B,), (1,) or a number, in units of ``num_train_timesteps``; need be none of ``timesteps``.
            noise: z ~ N(0, I) (B, ...).

        Raises:
            InputError: neither one timestep nor one for each row.
        """
        time = torch.as_tensor(timestep).reshape(-1).to(sample.device)
        if len(time) not in (1, len(sample)):
            raise InputError("timesteps of another length", got=len(time), expected=f"1 or {len(sample)} of them")
        precise = torch.promote_types(sample.dtype, torch.float32)
        t = time.to(precise) / self.config["num_train_timesteps"]
        return interpolate(sample.to(precise), noise.to(sample.device, precise), t).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """:meth:`scale_noise` by the name and the order of arguments that other pipelines use."""
        return self.scale_noise(original_samples, timesteps, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> TwinFlowSchedulerOutput | tuple[Tensor]:
        """Folds one network answer into the sample.

        Arguments:
            model_output: the velocity F (B, ...) at ``sample`` and ``timestep``.
            timestep: the entry of ``timesteps`` it belongs to; only read to find the first one.
            sample: what the network saw. As long as it is what the last ``step`` returned, the state goes on
                in float64; a sample changed in between (inpainting, callbacks) is taken as it is.
            generator: of the injected noise, in place of the keyed draws.
            noise: the injected noise ε itself (B, ...).
            return_dict: False for a plain tuple.

        Returns:
            ``prev_sample`` in ``model_output``'s dtype (after the last evaluation the sample, the raw x̂) and,
            in the dict, ``pred_original_sample``.
        """
        index = self._current_index(timestep)
        evaluation, state = self._evaluation(index), self._resumed(sample)
        if evaluation.needs_noise and noise is None:
            noise = self._draw(evaluation.step, sample, generator)
        if not evaluation.corrects or state.origin is not None:  # else started here, with nothing to correct
            state = update(evaluation, state, model_output, noise)
        last = index + 1 == len(self._plan)
        self._step_index, self._state = index + 1, None if last else state
        previous = state.x.to(model_output.dtype)
        if not return_dict:
            return (previous,)
        predicted = None if state.predicted is None else state.predicted.x_hat.to(model_output.dtype)
        return TwinFlowSchedulerOutput(prev_sample=previous, pred_original_sample=predicted)

    def _evaluation(self, index: int) -> Evaluation:
        if not 0 <= index < len(self._plan):
            raise InputError("no such step in this schedule", got=index, fix="call set_timesteps before each sample")
        return self._plan[index]

    def _current_index(self, timestep: float | Tensor) -> int:
        if self._step_index is not None:
            return self._step_index
        self._evaluation(0)
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _resumed(self, sample: Tensor) -> SamplerState:
        """The state in full precision, unless the sample is not the one that was returned from it."""
        if self._state is None:
            return initial_state(sample)
        if torch.equal(self._state.x.to(sample.dtype), sample):
            return self._state
        return SamplerState(high_precision(sample), self._state.predicted, self._state.origin, self._state.used_z_hat)

    def _draw(self, step: int, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        if generator is None and self.config["seed"] is not None:
            return keyed_noise(sample.shape, self.config["seed"], step).to(sample.device)
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


FLOW = "flow_prediction"
SHIFTS = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False}
"""What moves a scheduler's grid, and the value that does not; UniPC and DPM-Solver call their shift ``flow_shift``."""


def _without_foreign_shift(config: Mapping[str, Any], own: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without another class's shift: it moves that class's grid, which TwinFlow's is not."""
    known = inspect.signature(own).parameters
    told = own.__name__ if all(name in known or name.startswith("_") for name in config) else "another scheduler"
    other = config.get("_class_name", told)  # a configuration that was never written down has no name
    if other == own.__name__:
        return dict(config)
    usual = "epsilon" if "beta_schedule" in config else FLOW  # what a file need not say
    if (predicted := {**config, **given}.get("prediction_type", usual)) != FLOW:
        raise InputError(
            f"prediction_type of {other}",
            got=predicted,
            expected=FLOW,
            fix=f"pass prediction_type={FLOW} where the network does",
        )
    if config.get("invert_sigmas"):
        raise InputError(f"invert_sigmas of {other} counts times from data to noise", expected="a scheduler without it")
    dropped = {name: config[name] for name, none in SHIFTS.items() if config.get(name, none) != none}
    asked_for = {*given, *({"flow_shift"} if "shift" in given else ())}
    if left_out := ", ".join(f"{name}={value}" for name, value in dropped.items() if name not in asked_for):
        said = "%s of %s is left out: TwinFlow has a grid of its own; fix: pass it (flow_shift as shift) to from_config"
        logger.warning(said, left_out, other)
    return {name: value for name, value in config.items() if name not in dropped}


def _check_basics(prediction_type: str, shift: float, style: str, num_train_timesteps: int) -> None:
    if not isinstance(num_train_timesteps, Integral) or not 1 <= num_train_timesteps <= MOST_TIMESTEPS:
        raise InputError(
            "num_train_timesteps must be a whole number", got=num_train_timesteps, expected=f"1 to {MOST_TIMESTEPS:,}"
        )
    if prediction_type != FLOW:
        raise InputError("unknown prediction_type", got=repr(prediction_type), expected=repr(FLOW))
    if not isinstance(shift, Real) or not 0 < shift < math.inf:
        raise InputError("shift must be a positive number", got=repr(shift))
    if style not in SAMPLER_STYLES:
        raise InputError("unknown style", got=repr(style), expected=" or ".join(SAMPLER_STYLES))


def _times_of(values: Any, what: str) -> Tensor:
    """(N,) times as they were given. Raises InputError where they are no list of numbers."""
    try:
        times = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} are no numbers", got=error) from error
    if times.ndim != 1 or len(times) == 0:
        raise InputError(f"{what} are no list of times", got=f"shape {tuple(times.shape)}", expected="(N,)")
    return times


def _is_default_ramp(times: Tensor) -> bool:
    """Whether these are ``linspace(1, 1/n, n)``, which pipelines pass when their user gave no sigmas."""
    ramp = torch.linspace(1, 1 / len(times), len(times), dtype=torch.float64)
    return torch.allclose(times, ramp, rtol=0, atol=1e-6)


def _one_line(error: ValidationError) -> InputError:
    first = error.errors()[0]
    name = first["loc"][0] if first["loc"] else "settings"
    return InputError(f"scheduler setting {name}", got=first["input"], expected=first["msg"])
