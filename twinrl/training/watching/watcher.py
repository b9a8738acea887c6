"""Three lines in a loop of one's own: which loss made the gradient spike, and what to do about it.

    watch = twinrl.watch(model, optimizer, run="runs/mine")
    for batch in data:
        watch.backward({"flow": l_flow, "adversarial": l_adv})   # in place of (l_flow + l_adv).backward()
        optimizer.step()
        watch.step()

The steps of a :class:`Watch` follow the trainer's: gradient, numbers, detectors and policies, optimizer, log row.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import Ranks
from twinrl.gradients import Engine, telemetry
from twinrl.gradients.engine import Measures
from twinrl.machine.moving import numbers
from twinrl.run import names
from twinrl.stability.divergence import NONFINITE_PARAMETERS
from twinrl.stability.events import NONFINITE, Event, Suspects, nonfinite
from twinrl.stability.monitor import Judgement, Monitor
from twinrl.stability.policy import Decision
from twinrl.training.watching import config as configs
from twinrl.training.watching import processes
from twinrl.training.watching.backwards import Backwards
from twinrl.training.watching.book import Book
from twinrl.training.watching.config import WatchConfig
from twinrl.training.watching.given import Given, check_outputs, given, worst_rows
from twinrl.training.watching.steps import Steps


class Stopped(RuntimeError):  # noqa: N818 - it is no error of the loop's
    """A policy has ended the run; :attr:`event` says at what."""

    def __init__(self, event: Event):
        super().__init__(event.message)
        self.event = event


class Watch:
    """Takes the gradient of a training loop apart, loss by loss; made by :func:`twinrl.training.watching.start.watch`.

    Attributes:
        config: of the run; complete after the first backward.
        path: the run directory.
        done: steps made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: WatchConfig,
        book: Book,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        scaler: torch.amp.GradScaler | None = None,
        on_rollback: Callable[[Event], None] | None = None,
    ):
        self.config, self.path, self.done = config, book.run.path, 0
        self._model, self._optimizer, self._book, self._ranks = model, optimizer, book, ranks
        self._scaler, self._on_rollback = scaler, on_rollback
        self._steps = Steps(optimizer, list(parameters))
        self._backwards = Backwards(parameters, ranks)
        self._engine: Engine | None = None
        self._monitor: Monitor | None = None
        self._state: Mapping[str, Any] | None = None  # from a checkpoint, until the losses are known
        self._rolling, self._rollbacks = False, 0
        self._iteration, self._started = 0, time.perf_counter()
        self._micros: list[Given] = []  # of the step so far; with graphs in output space alone
        self._judged: Judgement | None = None
        self._row: dict[str, Any] = {}

    # --- the loop's two calls -----------------------------------------------------------------------------------

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        outputs: Sequence[Tensor] | None = None,
        rows: Any = None,
        last: bool = True,
    ) -> Decision:
        """The gradient of the losses' sum into ``.grad``, in place of ``sum(losses).backward()``.

        Arguments:
            losses: name → scalar; the same names at every step. With ``rows`` also (B,) losses of the samples, whose
                mean is taken.
            outputs: what the model has returned: the rules then see each loss's gradient there, and one backward pass
                carries the sum. None: the exact gradient of each loss, with a backward pass for each.
            rows: (B,) the samples' numbers, which events then name.
            last: False where more micro-batches of the same step follow; losses are summed over these.

        Returns:
            What the policy does about this step. A step that is skipped has no gradients, so that the optimizer
            leaves everything as it is.

        Raises:
            InputError: a loss or the order of calls is wrong.
            Stopped: a policy ends the run.
        """
        with self._on_disk():
            self._check_order()
            micro = given(losses, outputs, rows, self._scale())
            configs.check_names(losses, self.config.terms if self._engine else None)
            engine = self._engine or self._begin(micro)
            self._check_space(engine, micro)
            return self._take_in(engine, micro, last)

    def step(self, lr: float | None = None, values: Mapping[str, float] | None = None) -> Decision:
        """Log the step; after ``optimizer.step()``.

        Arguments:
            lr: the learning rate to log; None: the one of the optimizer's first group.
            values: further numbers for the log, by name; ``val/quality`` is judged (smaller is better).

        Raises:
            InputError: no backward came before.
            Stopped: a policy ends the run.
        """
        with self._on_disk():
            if self._judged is None:
                raise InputError("watch.step() without watch.backward() before it", fix="call them in turn")
            judged, self._judged, self._book.begun = self._judged, None, 0
            row = self._after_step(judged, lr, values or {})
            return self._conclude(judged, row)

    # --- a backward -----------------------------------------------------------------------------------------------

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Whatever goes wrong inside: the steps before it are on disk."""
        try:
            yield
        except BaseException:
            self._book.sync()
            raise

    def _check_order(self) -> None:
        if self._book.ended:
            raise InputError(f"this watch is closed: {self.path}", fix="make a new one by twinrl.watch")
        if self._judged is not None and self._steps.made:
            raise InputError(
                f"watch.step() is missing after step {self.done + 1}", fix="call it after every optimizer.step()"
            )
        if self._judged is not None:
            raise InputError(
                f"watch.backward() was called twice for step {self.done + 1}",
                fix="put all losses into one call; last=False for micro-batches before the step's last one",
            )
        if not self._micros and any(p.grad is not None and bool(p.grad.any()) for p in self._backwards.parameters):
            raise InputError(
                "there is a gradient already, which watch.backward would replace",
                fix="call optimizer.zero_grad() first; a loss of a backward() of its own belongs into watch.backward",
            )

    def _scale(self) -> Tensor | None:
        """The factor of a GradScaler that is in use."""
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        device = self._backwards.parameters[0].device
        return self._scaler.scale(torch.ones((), device=device))

    def _begin(self, micro: Given) -> Engine:
        """The losses are known: the run begins."""
        space: Literal["parameter", "output"] = "output" if micro.outputs else "parameter"
        if micro.factor is not None and micro.outputs:
            raise InputError("a GradScaler goes with the parameter space alone", fix="leave outputs= out, or use bf16")
        self.config = self.config.of_losses(micro.losses, space)
        if micro.outputs:
            check_outputs(micro, self._backwards.parameters)
        steps, parameters = self.config.train.get("steps", 1), self._backwards.parameters
        engine = Engine(
            self.config.gradients, parameters, micro.losses,
            total=processes.of_squares(self._ranks), steps=steps, back=self._backwards,
        )  # fmt: skip
        self._monitor = Monitor(self.config.stability, list(micro.losses))
        if self._book.resume and self._state is None:
            raise InputError(
                f"{self.path} is to go on, but from where?", fix="watch.load_state_dict(…) of your checkpoint"
            )
        if self._state is not None:
            self._restore(engine, self._state)
        self._ranks.on_first(lambda: self._book.start(self.config))
        self._engine = engine
        return engine

    def _check_space(self, engine: Engine, micro: Given) -> None:
        if bool(micro.outputs) != (engine.config.space == "output"):
            raise InputError(
                "outputs= is given at some steps and not at others",
                got=f"{len(micro.outputs)} outputs in {engine.config.space} space",
            )

    def _take_in(self, engine: Engine, micro: Given, last: bool) -> Decision:
        in_outputs = engine.config.space == "output"
        self._micros.append(micro if in_outputs else micro.numbers())
        self._book.begun = self.done + 1
        if not last:
            if not in_outputs:
                self._backwards.keep(micro)
            return Decision()
        self._backwards.factor = micro.factor
        measures = engine.backward(self._micros if in_outputs else [micro], self.done)
        return self._judge(engine, self._numbers(engine, measures))

    def _numbers(self, engine: Engine, measures: Measures) -> dict[str, float]:
        """Everything measured, read in one transfer: of all processes the same."""
        losses = {
            name: torch.stack([m.losses[name].detach() for m in self._micros]).sum() for name in self.config.terms
        }
        whole = processes.mean(self._ranks, torch.stack([loss.double() for loss in losses.values()])).unbind()
        scalars: Measures = {names.loss(name): loss for name, loss in zip(losses, whole, strict=True)}
        scalars |= {names.LOSS_TOTAL: torch.stack(whole).sum(), **measures}
        if engine.config.telemetry.due("rms", self.done) and (rms := telemetry.rms(self._optimizer)):
            scalars[names.RMS_MAX] = telemetry.largest(list(rms.values()))
        return self._ranks.agree(numbers(scalars))

    def _judge(self, engine: Engine, values: dict[str, float]) -> Decision:
        """Detectors and policies, before the optimizer sees the gradient."""
        assert self._monitor is not None
        late = {name: values.pop(name) for name in (names.RMS_MAX,) if name in values}
        judged = self._monitor.step(self.done + 1, self._iteration, values, late, self._suspects)
        if self._overflown(values):
            judged = self._left_to_the_scaler(judged)
        self._row = values | (dict.fromkeys(late, 0.0) if judged.now.zero else late)
        self._micros = []
        if judged.now.zero:
            engine.zero()
        if judged.now.skip:
            self._let_go()
        elif self._backwards.factor is not None:
            self._backwards.multiply(self._backwards.factor)  # the scaler takes it out again
        if judged.now.cut:
            self._cut()
        self._judged = judged
        self._steps.begin(engine.config.telemetry.due("update", self.done) and not judged.now.skip)
        if judged.now.stop and judged.cause is not None:
            self.step()  # which raises
        return judged.now

    def _overflown(self, values: Mapping[str, float]) -> bool:
        """Whether losses are finite and gradients are not under a GradScaler, which then drops the step by itself and
        lowers its factor."""
        bad = nonfinite(values) if self._backwards.factor is not None else []
        return bool(bad) and not any(name.startswith(names.loss("")) for name in bad)

    def _left_to_the_scaler(self, judged: Judgement) -> Judgement:
        """What is not finite is recorded; no policy acts on it."""
        decision = self.config.stability.decide(judged.kinds - {NONFINITE})
        events = [event for event in judged.events if event.kind != NONFINITE]
        return replace(judged, now=decision, afterwards=decision, cause=self.config.stability.cause(events))

    def _suspects(self, kind: str, term: str | None) -> Suspects:
        """The samples behind an event; asked of all processes for the same."""
        return Suspects(worst_rows(self._micros, term, lambda value: processes.gathered(self._ranks, value)))

    def _let_go(self) -> None:
        for parameter in self._backwards.parameters:
            parameter.grad = None

    def _cut(self) -> None:
        self._steps.cut(self.config.stability.lr_cut, self.config.stability.lr_minimum)

    # --- a step -----------------------------------------------------------------------------------------------------

    def _after_step(self, judged: Judgement, lr: float | None, values: Mapping[str, float]) -> dict[str, Any]:
        """The row of the log, with its events recorded."""
        assert self._monitor is not None
        row: dict[str, Any] = {"iteration": self._iteration, "step": self.done + 1, **self._row}
        made, moved = self._steps.made, self._steps.measures()
        row |= self._ranks.agree(numbers(moved))
        row[names.LR] = float(self._steps.lr if lr is None else lr * self._steps.scale)
        if judged.now.skip or not made:
            row[names.SKIPPED] = 1.0
        elif judged.afterwards.cut:
            self._cut()
        row |= {name: float(value) for name, value in values.items()}
        if nonfinite(row) and not telemetry.all_finite(self._backwards.parameters):
            row[NONFINITE_PARAMETERS] = 1.0
        self.done, self._iteration = self.done + 1, self._iteration + 1
        stuck = self._monitor.precision.observe(self.done, self._iteration - 1, row)
        for event in judged.events if stuck is None else [*judged.events, stuck]:
            self._record(event, row)
        self._let_go()
        return row

    def _conclude(self, judged: Judgement, row: dict[str, Any]) -> Decision:
        """Log the row; stop or roll back where a policy says so."""
        assert self._monitor is not None
        event, decision = judged.cause, judged.afterwards
        if (fallen := self._monitor.judge(self.done, self._iteration - 1, row)) is not None:
            self._record(fallen, row)
            if event is None:  # else that one says more: it names the loss
                event, decision = fallen, self.config.stability.decide([fallen.kind])
        now = time.perf_counter()
        row[names.STEP_SECONDS], self._started = now - self._started, now
        self._book.append(row)
        spent = decision.rollback and self._rollbacks >= self.config.stability.rollbacks
        if (decision.stop or spent) and event is not None:
            self._book.close("diverged", event.message)
            raise Stopped(event)
        if decision.rollback and event is not None:
            self._roll_back(event)
        return decision

    def _record(self, event: Event, row: dict[str, Any]) -> None:
        row[names.event(event.kind)] = 1
        self._book.record(event)

    def _roll_back(self, event: Event) -> None:
        """Let the loop return to its checkpoint; the detectors go on with what they have seen."""
        assert self._monitor is not None
        assert self._on_rollback is not None
        seen, before = self._monitor.watch.state(), self.done
        self._rolling, self._rollbacks = True, self._rollbacks + 1
        self._on_rollback(event)
        self._rolling = False
        if self.done == before:
            raise InputError(
                "on_rollback has not taken the watch back", fix="call watch.load_state_dict(…) of your checkpoint in it"
            )
        self._monitor.watch.load(seen)
        self._monitor.watch.end_episodes()

    # --- state, and the end -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the loop must hold, as plain values; between two steps."""
        if self._engine is None or self._monitor is None:
            raise InputError("the watch has no state before its first step", fix="save after a step")
        log, events = self._book.sync()
        return {
            "step": self.done, "iteration": self._iteration, "log_offset": log, "events_offset": events,
            "gradients": self._engine.state(), "monitor": self._monitor.state(), "lr_scale": self._steps.scale,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the log is cut back to it, but in a rollback.

        Raises:
            InputError: it is of a run with other losses, or of another log.
        """
        if self._engine is None:
            self._state = dict(state)
            return
        self._restore(self._engine, state)

    def _restore(self, engine: Engine, state: Mapping[str, Any]) -> None:
        assert self._monitor is not None
        self._monitor.load(state["monitor"])
        engine.load(state["gradients"])
        self.done, self._steps.scale = int(state["step"]), float(state["lr_scale"])
        if not self._rolling:
            self._iteration = int(state["iteration"])
            self._ranks.on_first(lambda: self._book.trim(state["log_offset"], state["events_offset"]))

    def close(self) -> None:
        """The run is finished; the end of the process does it, too."""
        self._steps.close()
        self._book.close()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.close()
        self._book.close("finished" if kind is None else None)
