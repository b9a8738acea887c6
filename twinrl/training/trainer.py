"""The training loop, and nothing else: batch → losses → gradient → optimizer → log row."""

import math
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from twinrl.config.components import checked, wrong_return
from twinrl.flow import draws
from twinrl.flow.source import Data
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.gradients import Engine, telemetry
from twinrl.gradients.gradient import over_ranks
from twinrl.machine.memory import keep_freed_memory
from twinrl.rewards import keepers
from twinrl.run import checkpoints, fit, layout, names
from twinrl.run.checkpoints import Checkpoint
from twinrl.run.runlog import RunLog
from twinrl.stability.divergence import NONFINITE_PARAMETERS
from twinrl.stability.events import Event
from twinrl.stability.monitor import Judgement, Monitor
from twinrl.stability.policy import Decision
from twinrl.stability.verdict import COMPLETE
from twinrl.terms.objective import Losses, Objective
from twinrl.training import assembly
from twinrl.training.capsules import Capsules
from twinrl.training.feed import Fed, Feed
from twinrl.training.optim import LR_POLICIES, OPTIMIZERS, EarlyStop, kept_by, update
from twinrl.training.owned import owned_of
from twinrl.training.passes import passes_of
from twinrl.training.provider import Provider
from twinrl.training.runs import EventLog, NoLog, RunDirectory, check_unchanged
from twinrl.training.saving import Informed, Saver
from twinrl.training.schema import RunConfig
from twinrl.training.suspects import SuspectFinder


class Observer(Informed, Protocol):
    """Is told what happens; the command line shows progress and publishes to MLflow through one."""

    def after_step(self, row: dict[str, Any]) -> None:
        """A step was logged."""

    def after_event(self, event: Event) -> None:
        """An event was recorded."""


class Validation(Protocol):
    """Judges the student in training."""

    def __call__(self, network: torch.nn.Module, step: int) -> Mapping[str, float]:
        """Metrics of the network after ``step`` steps; must not touch any random state."""
        ...


class StepOutcome(NamedTuple):
    """What an optimizer step gave.

    Attributes:
        row: of the log.
        event: the event that ends the run or takes it back, if there is one.
        decision: what to do.
        kinds: of everything that was found.
    """

    row: dict[str, Any]
    event: Event | None
    decision: Decision
    kinds: frozenset[str]


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
        start_weights: load the start weights, unless there is a checkpoint; False where a state is restored at once.
        asked_to_stop: asked before each step; True ends training with a checkpoint, as ``interrupted`` does.
        ranks: the processes that train this run together; each has a trainer, of which the first one writes.
        provided: what gives data and models; None: what suits the configuration.
    """

    settings: RunConfig
    run: RunDirectory
    source: Data
    device: torch.device
    validate: Validation
    observers: list[Observer] = field(default_factory=list)
    start_weights: bool = True  # False where a state is restored at once
    step: int = 0
    iteration: int = 0
    attempt: int = 0  # rollbacks so far; each goes on with another data order
    event_count: int = 0
    interrupted: bool = False
    asked_to_stop: Callable[[], bool] = lambda: False
    ranks: Ranks = ALONE
    provided: type[Provider[Any]] | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        if self.device.type == "cpu":
            keep_freed_memory()
        begun = layout.newest(self.run.checkpoints) is not None  # start weights may be gone by now
        start_weights = self.start_weights and not begun
        kind = self.provided or assembly.kind_of(settings)
        self.provider = kind(settings, self.source, self.device, self.ranks)
        student = self.provider.student(start_weights)
        self.guide = self.provider.guide()
        self.objective: Objective = assembly.objective_of(self.provider, student, self.guide)
        optimizer = OPTIMIZERS.find(settings.optim.kind)
        self.optimizer: torch.optim.Optimizer = self.ranks.prepare(
            optimizer.build(settings.optim, student.parameters())
        )
        self.owned = owned_of(settings, self.objective, self.ranks)
        self.owners = settings.gradient_owners
        self.engine = Engine(
            settings.gradients, student.parameters(), self.owners,
            total=self.ranks.total, reduce=partial(self.ranks.reduce_after, student),
            steps=settings.train.steps, renoise_end=settings.renoise_end(), by_pass=self.ranks.world > 1,
        )  # fmt: skip
        self.dropout = self.ranks.own("dropout")
        self.lr_policy = LR_POLICIES.build(settings.lr_policy, settings.train.steps)
        self.early_stop = EarlyStop(settings.early_stop)
        settings.stability.check_measured(settings.gradients.telemetry.rms_every)
        self.monitor = Monitor(settings.stability, list(self.owners), settings.evaluation.nfe[0])
        self.feed = self._feed("train")
        self.capsules = Capsules(self.run.path, settings.stability.capsules, self.ranks)
        self.log: RunLog | NoLog = RunLog(self.run.log) if self.ranks.first else NoLog()
        self.events: EventLog | NoLog = EventLog(self.run.events) if self.ranks.first else NoLog()
        self.saver = Saver(settings.checkpoint, self.run, self.ranks, self.log, self.events, self.observers)

    def _feed(self, split: str) -> Feed:
        return Feed(self.settings, self.provider.reader(split), self.objective, self.ranks)

    # --- the loop -----------------------------------------------------------------------------------------

    def begin(self, start: Mapping[str, Any]) -> None:
        """Take the metrics of the start weights as what a fall is measured against."""
        self.monitor.begin(start)

    def train(self) -> Outcome:
        """Train to the end, a stop policy, an early stop or an interruption; the state is on disk afterwards."""
        outcome = None
        while outcome is None:
            outcome = self._advance()
        self._attempt(self.saver.settle)
        if outcome.status in COMPLETE and (late := self.monitor.conclude(self.iteration - 1)) is not None:
            self._record(late, {})  # too late for any policy
        if outcome.status != "diverged" and self.saver.newest != self.iteration:
            self._save()
            self.saver.settle()
        self.log.close()
        self.events.close()
        return outcome

    def _advance(self) -> Outcome | None:
        """One step with what belongs to it; an outcome if it was the last."""
        if self.step >= self.settings.train.steps:
            return Outcome("finished", self.step)
        if self.early_stop.reached:
            return Outcome("stopped", self.step, "no improvement in validation quality")
        if self.ranks.anywhere(self.interrupted or self.asked_to_stop()):
            return Outcome("interrupted", self.step)
        if self.capsules.due(self.step):
            self._attempt(lambda: self.capsules.remember(self.step, self.state(*self.saver.synced())))
        self.ranks.begin(self.step)
        row, event, decision, _ = self.train_step()
        if (judged := self._validate_if_due(row)) is not None:
            event, decision = judged, self.settings.stability.decide([judged.kind])
        self.log.append(row)
        self._tell("after_step", row)
        if decision.stop and event is not None:
            return Outcome("diverged", self.step, event.message)
        if decision.rollback and event is not None:
            return self._roll_back(event)
        if self.step % self.settings.checkpoint.every == 0 and self.step < self.settings.train.steps:
            self._attempt(self.saver.settle)
            self._attempt(self._save)
        return None

    @property
    def seed(self) -> int:
        """Seed of the present stretch's data and noise: the run's own until a rollback."""
        return self.settings.seed + (self.attempt << 32)

    def train_step(self) -> StepOutcome:
        """One optimizer step."""
        started = time.perf_counter()
        draws.seed_stream(self.seed, self.dropout, self.step)
        fed = self.feed.batch(self.step, self.seed)
        losses, values = self._backward(fed)
        values |= fed.renoise.metrics() if fed.renoise else {}
        lr_factor = self._follow_reward(losses, fed, values)
        late = {name: values.pop(name) for name in (names.RMS_MAX,) if name in values}
        behind = SuspectFinder(losses, fed.data_rows, fed.batch, self.ranks.total)
        judged = self.monitor.step(self.step + 1, self.iteration, values, late, behind)
        values |= self._update(judged, late, lr_factor)
        self.step, self.iteration = self.step + 1, self.iteration + 1
        row = {"iteration": self.iteration - 1, "step": self.step, **values}
        stuck = self.monitor.precision.observe(self.step, self.iteration - 1, row)
        for event in judged.events if stuck is None else [*judged.events, stuck]:
            self._record(event, row)
        row[names.STEP_SECONDS] = time.perf_counter() - started
        return StepOutcome(row, judged.cause, judged.afterwards, judged.kinds)

    def _backward(self, fed: Fed) -> tuple[Losses, dict[str, float]]:
        """The terms' gradient into ``.grad``; their losses, and everything measured, read in one transfer."""
        micro_batch = self.settings.train.micro_batch
        own = [one.train(self.objective, fed, micro_batch) for one in self.owned]
        chunks = fed.batch.chunks(micro_batch or len(fed.batch.rows))
        passes = passes_of(self.objective, chunks, fed.counts, self.owners, self.settings.gradients.separate)
        measures = self.engine.backward(passes, self.step) | {k: v for each in own for k, v in each.items()}
        if self.settings.gradients.telemetry.due("rms", self.step) and (rms := telemetry.rms(self.optimizer)):
            measures[names.RMS_MAX] = telemetry.largest(list(rms.values()))
        losses = self.ranks.merge([one.losses for one in passes])
        scalars = summarise(losses, {n: term.weight for n, term in self.settings.terms.items()}) | measures
        return losses, self.ranks.numbers(scalars)

    def _follow_reward(self, losses: Losses, fed: Fed, values: dict[str, float]) -> float:
        """Note the reward's weight and let it learn from what it scored; the factor of the learning rate."""
        settings = self.settings
        if self.guide is None or settings.reward is None:
            return 1.0
        at = self.step, settings.train.steps, settings.renoise_end()
        scored = [(part.rows, part.aux) for found in losses for part in found.values()]
        keepers.observe(self.guide.reward, scored, fed.batch.rows.captions)
        values[names.REWARD_WEIGHT] = settings.reward.schedule.weight_at(*at)
        return settings.reward.schedule.lr_factor_at(*at)

    def _update(self, judged: Judgement, late: Mapping[str, float], lr_factor: float) -> dict[str, float]:
        """The optimizer's step, unless it is dropped, at the policy's learning rate; what is known of it."""
        if judged.now.zero:
            self.engine.zero()
        self._move_lr(judged.spikes[0], judged.now.cut)
        factor = checked(self.lr_policy.factor(self.step), float, self.lr_policy, "factor")
        if factor < 0:
            raise wrong_return(factor, self.lr_policy, "factor", "a number ≥ 0")
        values = {names.LR: self.settings.optim.lr * factor * lr_factor}
        if judged.now.skip:
            return {names.SKIPPED: 1.0} | values
        measured = self.settings.gradients.telemetry.due("update", self.step)
        measures = update(self.optimizer, values[names.LR], self.engine.parameters, measured)
        late = dict.fromkeys(late, 0.0) if judged.now.zero else late  # of a gradient of zeros
        values = {**late, **measures, **values}
        if not all(map(math.isfinite, values.values())) and not telemetry.all_finite(self.engine.parameters):
            values[NONFINITE_PARAMETERS] = 1.0
        self._move_lr(judged.spikes[1], judged.afterwards.cut)
        return values

    def _move_lr(self, spike: bool, cut: bool) -> None:
        """Tell the learning rate's policy of trouble."""
        if spike:
            self.lr_policy.spike()
        if cut:
            self.lr_policy.cut(self.settings.stability.lr_cut, self.settings.stability.lr_minimum)

    @torch.no_grad()
    def times(self, batches: int = 4) -> tuple[Tensor, Tensor]:
        """(N,) signed t and r at which the terms ask for the student in the next batches; for a picture.

        Leaves the state of training and every random stream as they were.
        """
        step, asked = self.step, []
        for self.step in range(step, step + batches):
            fed = self.feed.batch(self.step, self.seed)
            evaluation = self.objective.evaluate(fed.batch, fed.counts)
            with evaluation.random_state.replayed():
                asked += [query for _, query in evaluation.queries().values()]
        self.step = step
        return torch.cat([q.t for q in asked]).cpu(), torch.cat([q.r for q in asked]).cpu()

    # --- validation, events, checkpoints ----------------------------------------------------------------------

    def _validate_if_due(self, row: dict[str, Any]) -> Event | None:
        """Add validation metrics to the row when due; the divergence if this row makes it certain.

        Learning-rate policy and early stopping see the quality.
        """
        every, last = self.settings.evaluation.every, self.step == self.settings.train.steps
        if last or (every > 0 and self.step % every == 0):
            started = time.perf_counter()
            row.update(self.ranks.agree(dict(self.validate(self.objective.teacher.best, self.step))))
            if self.settings.evaluation.objective:
                objective = self.objective_on_validation()
                row[names.VAL_OBJECTIVE] = float(objective.mean())
                if (bad := float((~objective.isfinite()).double().mean())) > 0:
                    row[names.VAL_OBJECTIVE_NONFINITE] = bad
            quality = float(row[names.VAL_QUALITY])
            by_objective = getattr(self.settings.lr_policy, "monitor", "quality") == "objective"
            # the published run took a batch that is not finite for 0, and its rate followed that number
            watched = float(objective.nan_to_num(0.0, 0.0, 0.0).mean()) if by_objective else quality
            self.lr_policy.observe(watched)
            self.early_stop.observe(quality)
            row[names.VALIDATION_SECONDS] = time.perf_counter() - started
        if (hacked := self.monitor.hacking.observe(self.step, self.iteration - 1, row)) is not None:
            self._record(hacked, row)
        found = self.monitor.judge(self.step, self.iteration - 1, row)
        if found is None:
            return None
        self._record(found, row)
        return found

    @torch.no_grad()
    def objective_on_validation(self, batches: int = 4) -> Tensor:
        """(batches,) the training objective on validation rows, as the published run validated: at the present renoise
        and reward, with whatever the logged loss contains; what is not finite stays so. No fair measure of quality;
        ``val/quality`` is.
        """
        values, feed = [], self._feed("validation")
        for number in range(batches):
            fed = feed.batch(self.step, self.settings.evaluation.seed + number)
            evaluation = self.objective.evaluate(fed.batch, fed.counts)
            with evaluation.random_state.replayed():
                losses = evaluation.losses().values()
                values.append(self.ranks.total(torch.stack([part.loss for part in losses]).sum()))
        return torch.stack(values)

    def _record(self, event: Event, row: dict[str, Any]) -> None:
        """Write an event down, mark its row, keep its capsule."""
        self.event_count += 1
        row[names.event(event.kind)] = 1
        self.events.append(event.as_dict())
        self.capsules.keep(self.event_count, event)
        self._tell("after_event", event)

    def _roll_back(self, event: Event) -> Outcome | None:
        """Return to the last healthy checkpoint; an outcome if there is none or it happened too often."""
        config = self.settings.stability
        self._attempt(self.saver.settle)
        healthy = [
            path
            for path in layout.available(self.run.checkpoints)
            if checkpoints.load_state(path)["step"] <= event.step - config.rollback_margin
        ]
        if not healthy:
            return Outcome("diverged", self.step, f"{event.message}; no healthy checkpoint to roll back to")
        if self.attempt >= config.rollbacks:
            return Outcome("diverged", self.step, f"{event.message}; {self.attempt} rollbacks did not help")
        kept, seen = (self.iteration, self.attempt + 1, self.event_count), self.monitor.watch.state()
        self.restore(self.ranks.load(healthy[-1]), str(healthy[-1]))
        self.iteration, self.attempt, self.event_count = kept
        self.monitor.watch.load(seen)
        self.monitor.watch.end_episodes()
        self.ranks.on_first(lambda: checkpoints.drop_after(self.run.checkpoints, self.step))
        self.capsules.forget_after(self.step)
        self._attempt(self._save)
        return None

    def _attempt(self, action: Callable[[], None]) -> None:
        self.saver.attempt(action, self.step)

    def _tell(self, what: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, what)(*arguments)

    def _save(self) -> None:
        self.saver.save(self.step, self.iteration, self.state)

    def state(self, log_offset: int = 0, events_offset: int = 0) -> Checkpoint:
        """Everything that training needs to go on from here, given the length of the logs so far."""
        tensors = {name: module.state_dict() for name, module in assembly.parts_of(self.objective).items()}
        tensors |= {part: fit.optimizer_tensors(optimizer) for part, optimizer, _ in self._optimizers()}
        state = {
            "step": self.step,
            "iteration": self.iteration,
            "attempt": self.attempt,
            "event_count": self.event_count,
            "log_offset": log_offset,
            "events_offset": events_offset,
            "teacher_decay": self.objective.teacher.decay,
            "lr_policy": _plain(self.lr_policy.state()),
            "early_stop": _plain(self.early_stop.state()),
            "gradients": self.engine.state(),
            "monitor": self.monitor.state(),
            "reward": self.guide.state() if self.guide else {},
            "content_hash": self.source.content_hash,
            "config": self.settings.numeric() | {"seed": self.settings.seed},
            "parts": sorted(tensors),
            "tensors": {part: len(found) for part, found in tensors.items()},
        }
        return Checkpoint(tensors, state)

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer, int]]:
        """(part of a checkpoint, optimizer, its steps for each of the run's)."""
        own = [(f"optimizer_{one.name}", one.optimizer, one.term.config.updates) for one in self.owned]
        return [("optimizer", self.optimizer, 1), *own]

    def resume(self) -> None:
        """Continue from the newest checkpoint, or from the start if there is none; logs are cut back to it.

        Raises:
            InputError: the checkpoint is corrupted, foreign, gone, or made with another configuration or other data.
        """
        newest = layout.newest(self.run.checkpoints)
        if newest is None:
            self.saver.check_never_saved()
            self.log.trim(0)
            self.events.trim(0)
            return
        checkpoint = self.ranks.load(newest)
        checkpoints.check_place(newest, checkpoint.state, self.settings.train.steps)
        check_unchanged(self.settings, self.source.content_hash, checkpoint.state)
        self.restore(checkpoint, str(newest))
        self._check_logs(checkpoint.state["log_offset"], checkpoint.state["events_offset"])
        self.saver.newest = self.iteration  # from here on nothing is refused any more
        self.capsules.forget_after(self.step)
        self.log.trim(checkpoint.state["log_offset"])
        self.events.trim(checkpoint.state["events_offset"])

    def _check_logs(self, log: int, events: int) -> None:
        """Up to these bytes the logs are kept, and all that the run's end will read must be readable."""
        self.log.check(log)
        self.events.check(events)
        if self.ranks.first and log:
            layout.read_rows(self.run.path, log)
            layout.read_events(self.run.path, events)
            layout.read_start(self.run.path)

    def restore(self, checkpoint: Checkpoint, origin: str, strict: bool = True) -> None:
        """Be in the state of a checkpoint; the logs stay as they are.

        Arguments:
            checkpoint: the state.
            origin: where it is from, for messages.
            strict: refuse the state of a run with other terms or another teacher; else what the state lacks starts
                from it: a detector empty, every other network as the student, an average at its full decay.

        Raises:
            InputError: it is of another network or optimizer; ``origin`` names it.
        """
        state = checkpoint.state
        lacking = set() if strict else set(assembly.parts_of(self.objective)) - set(checkpoint.tensors)
        self._restore_tensors(checkpoint, origin, strict, lacking)
        decay = self.settings.teacher.decay if "ema" in lacking else state["teacher_decay"]
        self.objective.teacher.decay = decay
        loading: dict[str, Callable[[Any], None]] = {
            "lr_policy": self.lr_policy.load, "early_stop": self.early_stop.load, "gradients": self.engine.load,
            "monitor": partial(self.monitor.load, strict=strict),
        }  # fmt: skip
        if self.guide is not None:
            loading["reward"] = self.guide.load
        for name, load in loading.items():
            with checkpoints.entry(origin, name):
                load(state[name])
        self.step, self.iteration = state["step"], state["iteration"]
        self.attempt, self.event_count = state["attempt"], state["event_count"]

    def _restore_tensors(self, checkpoint: Checkpoint, origin: str, strict: bool, lacking: Set[str]) -> None:
        """Networks and optimizer as in a checkpoint; the averages and frozen copies that it lacks as the student."""
        state, parts = checkpoint.state, assembly.parts_of(self.objective)
        formats = {n: t.dtype for n, t in parts["student"].state_dict().items()}  # as averages were in older versions
        if assembly.REMAINDER in parts and assembly.REMAINDER not in checkpoint.tensors:
            for remainder in parts.pop(assembly.REMAINDER).parameters():
                remainder.detach().zero_()
        for name, module in parts.items():
            part = "student" if name in lacking else name
            found, file = checkpoint.part(part), f"{origin}/{part}.safetensors"
            self.ranks.load_module(module, found, file, formats if strict else None)
            checkpoints.check_finite(module.parameters(), state, file, over_ranks)
        kept = kept_by(self.settings.optim) if strict else None
        for name, optimizer, times in self._optimizers():
            if not strict and name not in checkpoint.tensors:
                continue
            file = f"{origin}/{name}.safetensors"
            self.ranks.load_optimizer(optimizer, checkpoint.part(name), file, kept)
            fit.check_steps(optimizer, times * state["step"], file)
            checkpoints.check_finite(fit.optimizer_tensors(optimizer).values(), state, file, over_ranks)


def summarise(parts: Losses, weights: Mapping[str, float]) -> dict[str, Tensor]:
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
    means = {metric: torch.cat(values).mean() for metric, values in aux.items()}
    if len(aux.get(names.REWARD_STD, ())) > 1:  # the spread over parts of the batch is not that over the whole
        means[names.REWARD_STD] = torch.cat(aux[names.REWARD_MEAN]).std(unbiased=False)
    return scalars | means


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: as a string, which ``float()`` reads back."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in state.items()}
