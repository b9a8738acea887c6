"""The training loop, and nothing else: batch → losses → gradient → optimizer → log row."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from twinrl import assembly, checkpoints, conditions, draws
from twinrl.branches import Batch, BatchDraws, divide
from twinrl.conditions import Condition
from twinrl.config import build, resolve
from twinrl.data.source import Source
from twinrl.memory import keep_freed_memory
from twinrl.objective import Objective, TermLoss
from twinrl.optim import LR_POLICIES, OPTIMIZERS, EarlyStop
from twinrl.runs import EventLog, RunDirectory, check_unchanged
from twinrl.schema import RunConfig
from twinrl.stability.events import NONFINITE, Event, nonfinite
from twinrl.tracking import names
from twinrl.tracking.runlog import RunLog

Row = dict[str, Any]


class Observer(Protocol):
    """Is told what happens; the command line shows progress and publishes to MLflow through one."""

    def after_step(self, row: Row) -> None:
        """A step was logged."""

    def after_checkpoint(self, offset: int) -> None:
        """A checkpoint is on disk; the log is durable up to byte ``offset``."""

    def after_event(self, event: Event) -> None:
        """An event was recorded."""


class Validation(Protocol):
    """Judges the student in training."""

    def __call__(self, network: torch.nn.Module, step: int) -> Mapping[str, float]:
        """Metrics of the network after ``step`` steps; must not touch any random state."""
        ...


@dataclass
class Outcome:
    """How training ended.

    Attributes:
        status: finished, stopped (early stop), diverged (a stop policy) or interrupted (to be resumed).
        step: optimizer steps made.
        message: why, where the status alone does not say it.
    """

    status: str
    step: int
    message: str = ""


@dataclass
class Trainer:
    """One run.

    Arguments:
        settings: the configuration.
        run: its directory, already made.
        source: the data, on ``device``.
        device: where the networks are.
        validate: called every ``evaluation.every`` steps and at the end.
        observers: told about steps, checkpoints and events.
    """

    settings: RunConfig
    run: RunDirectory
    source: Source
    device: torch.device
    validate: Validation
    observers: list[Observer] = field(default_factory=list)
    step: int = 0
    iteration: int = 0
    interrupted: bool = False
    saved: int | None = None  # iteration of the newest checkpoint

    def __post_init__(self) -> None:
        settings = self.settings
        if self.device.type == "cpu":
            keep_freed_memory()
        begun = checkpoints.newest(self.run.checkpoints) is not None  # start weights may be gone by now
        student = assembly.student_of(settings, self.source, self.device, start_weights=not begun)
        self.objective: Objective = assembly.objective_of(settings, student)
        optimizer = resolve(OPTIMIZERS, settings.optim.kind, "optimizer")
        self.optimizer: torch.optim.Optimizer = optimizer.build(settings.optim, student.parameters())
        self.lr_policy = build(LR_POLICIES, settings.lr_policy, "learning-rate policy", settings.train.steps)
        self.early_stop = EarlyStop(settings.early_stop)
        self.latents = self.source.latents("train").to(self.device, assembly.DTYPES[settings.train.precision])
        self.log, self.events = RunLog(self.run.log), EventLog(self.run.events)

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Train to the end, a stop policy, an early stop or an interruption; the state is on disk afterwards."""
        outcome = None
        while outcome is None:
            outcome = self._advance()
        if outcome.status != "diverged" and self.saved != self.iteration:
            self.save()
        self.log.close()
        self.events.close()
        return outcome

    def _advance(self) -> Outcome | None:
        """One step with what belongs to it; an outcome if it was the last."""
        if self.step >= self.settings.train.steps:
            return Outcome("finished", self.step)
        if self.early_stop.reached:
            return Outcome("stopped", self.step, "no improvement in validation quality")
        if self.interrupted:
            return Outcome("interrupted", self.step)
        row, event = self.train_step()
        self._validate_if_due(row)
        self.log.append(row)
        self._tell("after_step", row)
        if event is not None and self.settings.stability.policy == "stop":
            return Outcome("diverged", self.step, event.message)
        if self.step % self.settings.checkpoint.every == 0 and self.step < self.settings.train.steps:
            self.save()
        return None

    def train_step(self) -> tuple[Row, Event | None]:
        """One optimizer step; the log row and the event, if there was one."""
        started = time.perf_counter()
        assembly.seed_stream(self.settings.seed, "dropout", self.step)
        data_rows, batch = self.batch()
        self.objective.teacher.update()
        scalars = self._backward(batch)
        norms = self._clip()
        lr = self._set_lr()
        values = _to_floats(scalars | norms)
        event = self._record_nonfinite(values, data_rows)
        self.optimizer.step()
        self.step, self.iteration = self.step + 1, self.iteration + 1
        row = {"iteration": self.iteration - 1, "step": self.step, **values, names.LR: lr}
        if event is not None:
            row[names.event(event.kind)] = 1
        return row | {names.STEP_SECONDS: time.perf_counter() - started}, event

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the total loss into ``.grad``; losses and aux metrics as 0-dim tensors."""
        self.optimizer.zero_grad()
        counts = {name: len(rows) for name, rows in batch.branch.items()}
        parts: list[dict[str, TermLoss]] = []
        for chunk in batch.chunks(self.settings.train.micro_batch or len(batch.rows)):
            losses = self.objective.evaluate(chunk, counts).losses()
            if not losses:  # rows of branches that no term sees
                continue
            torch.stack([part.loss for part in losses.values()]).sum().backward()
            parts.append(losses)
        return summarise(parts, {name: term.weight for name, term in self.settings.terms.items()})

    def _clip(self) -> dict[str, Tensor]:
        """Clip the global gradient norm; norms before and after."""
        parameters = [p for p in self.objective.teacher.student.parameters() if p.grad is not None]
        limit = self.settings.optim.clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit is None:  # gradients stay as they are: scaling by inf/inf would spread one inf to all of them
            return {names.GRAD_TOTAL_RAW: norm, names.GRAD_TOTAL_CLIPPED: norm}
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        # an infinite gradient is not clipped to the limit: scaling it by 0 leaves nan
        clipped = torch.where(norm.isfinite(), norm.clamp(max=limit), torch.nan)
        return {names.GRAD_TOTAL_RAW: norm, names.GRAD_TOTAL_CLIPPED: clipped}

    def _set_lr(self) -> float:
        lr = self.settings.optim.lr * self.lr_policy.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def times(self, batches: int = 4) -> tuple[Tensor, Tensor]:
        """(N,) signed t and r at which the terms ask for the student in the next batches; for a picture.

        Leaves the state of training and every random stream as they were.
        """
        step, asked = self.step, []
        for self.step in range(step, step + batches):
            _, batch = self.batch()
            counts = {name: len(rows) for name, rows in batch.branch.items()}
            evaluation = self.objective.evaluate(batch, counts)
            with evaluation.random_state.replayed():
                asked += [query for _, query in evaluation.queries().values()]
        self.step = step
        return torch.cat([q.t for q in asked]).cpu(), torch.cat([q.r for q in asked]).cpu()

    # --- data -----------------------------------------------------------------------------------------------

    def batch(self) -> tuple[Tensor, Batch]:
        """The rows of the training split and the global batch of the present step."""
        settings, source = self.settings, self.source
        at = draws.shuffled_rows(len(self.latents), settings.train.batch, settings.seed, self.step)
        prompts = source.prompts(source.train.labels[at], settings.seed, self.step)
        drawn = BatchDraws(settings.seed, self.step, (len(at), *self.latents.shape[1:]))
        c = self._cast(source.condition(prompts))
        x = self.latents[at.to(self.latents.device)] if settings.data.images else self._generated(drawn, c)
        null = self._null(c, drawn)
        return at, divide(settings.branches, settings.time, x, c, null, drawn)

    def _generated(self, drawn: BatchDraws, c: Condition) -> Tensor:
        """Image-free data: the student's own one-step samples of the prompts, without gradient."""
        z = drawn.normal("image-free sample").to(self.latents)
        one = z.new_ones(len(z))
        with torch.no_grad():
            return z - self.objective.call(self.objective.teacher.student, z, one, torch.zeros_like(one), c)

    def _null(self, c: Condition, drawn: BatchDraws) -> Condition:
        n = self.settings.train.batch
        if self.settings.guidance.empty == "source":
            return self._cast(self.source.null_condition(n))
        order = drawn.uniform("null permutation").argsort()
        return conditions.rows(c, order)

    def _cast(self, c: Condition) -> Condition:
        return conditions.to(c, self.device, self.latents.dtype)

    # --- validation, events, checkpoints ----------------------------------------------------------------------

    def _validate_if_due(self, row: Row) -> None:
        """Add validation metrics to the row when due; learning-rate policy and early stopping see the quality."""
        every, last = self.settings.evaluation.every, self.step == self.settings.train.steps
        if not last and (every == 0 or self.step % every):
            return
        row.update(self.validate(self.objective.teacher.best, self.step))
        quality = float(row[names.VAL_QUALITY])
        self.lr_policy.observe(quality)
        self.early_stop.observe(quality)

    def _record_nonfinite(self, values: Mapping[str, float], data_rows: Tensor) -> Event | None:
        """An event naming the terms whose loss is not finite, if anything in the row is not."""
        bad = nonfinite(values)
        if not bad:
            return None
        terms = tuple(name for name in self.settings.terms if names.loss(name) in bad)
        message = f"non-finite {', '.join(bad[:3])} at step {self.step + 1}"
        event = Event(self.step + 1, self.iteration, NONFINITE, terms, tuple(data_rows.tolist()), message)
        self.events.append(event.as_dict())
        self._tell("after_event", event)
        return event

    def _tell(self, what: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, what)(*arguments)

    def save(self) -> None:
        """Write a checkpoint of the present state and tell the observers."""
        offset = self.log.sync()
        state = {
            "step": self.step,
            "iteration": self.iteration,
            "log_offset": offset,
            "events_offset": self.events.sync(),
            "teacher_decay": self.objective.teacher.decay,
            "lr_policy": _plain(self.lr_policy.state()),
            "early_stop": _plain(self.early_stop.state()),
            "content_hash": self.source.content_hash,
            "config": self.settings.numeric() | {"seed": self.settings.seed},
        }
        tensors = {name: module.state_dict() for name, module in assembly.parts_of(self.objective).items()}
        tensors["optimizer"] = checkpoints.optimizer_tensors(self.optimizer)
        state["parts"] = sorted(tensors)
        checkpoints.save(
            self.run.checkpoints,
            self.step,
            checkpoints.Checkpoint(tensors, state),
            self.settings.checkpoint.keep,
        )
        self.saved = self.iteration
        self._tell("after_checkpoint", offset)

    def resume(self) -> None:
        """Continue from the newest checkpoint, or from the start if there is none; logs are cut back to it.

        Raises:
            InputError: the checkpoint is corrupted, foreign, or made with another configuration or other data.
        """
        newest = checkpoints.newest(self.run.checkpoints)
        if newest is None:
            self.log.trim(0)
            self.events.trim(0)
            return
        checkpoint = checkpoints.load(newest)
        state = checkpoint.state
        check_unchanged(self.settings, self.source.content_hash, state)
        for name, module in assembly.parts_of(self.objective).items():
            checkpoints.load_module(module, checkpoint.part(name), f"{newest}/{name}.safetensors")
        checkpoints.load_optimizer(self.optimizer, checkpoint.part("optimizer"), f"{newest}/optimizer.safetensors")
        self.objective.teacher.decay = state["teacher_decay"]
        self.lr_policy.load(state["lr_policy"])
        self.early_stop.load(state["early_stop"])
        self.step = state["step"]
        self.saved = self.iteration = state["iteration"]
        self.log.trim(state["log_offset"])
        self.events.trim(state["events_offset"])


def summarise(parts: list[dict[str, TermLoss]], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Losses by term, their weighted total, and aux metrics averaged over all rows of the global batch."""
    scalars: dict[str, Tensor] = {}
    for name in weights:
        scalars[names.loss(name)] = torch.stack([p[name].unweighted for p in parts if name in p]).sum()
    scalars[names.LOSS_TOTAL] = sum(weights[name] * scalars[names.loss(name)] for name in weights)  # type: ignore[assignment]
    aux: dict[str, list[Tensor]] = {}
    for losses in parts:
        for part in losses.values():
            for metric, values in part.aux.items():
                aux.setdefault(metric, []).append(values)
    return scalars | {metric: torch.cat(values).mean() for metric, values in aux.items()}


def _to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """All scalars in one transfer from the device."""
    return dict(zip(scalars, torch.stack([s.double() for s in scalars.values()]).tolist(), strict=True))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: as a string, which ``float()`` reads back."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in state.items()}
