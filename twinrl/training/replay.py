"""Replay: the steps around an event again, from its capsule, unchanged and with a change. Cause by intervention.

Correlation says which term was large before a spike; running the same steps without it says whether it was the cause.
Draws are keyed, so the unchanged replay repeats the log exactly, and a changed one differs by the change alone.

Training near its edge is chaotic, though: there any change, however innocent, may remove a single spike. So a change is
compared with *placebos*, the same steps at a slightly different learning rate: what they remove, too, shows no cause.

A spike is not a fall. With a :class:`ReplayValidation` the samples are judged on the way, and a replay that goes on for
some hundred steps says whether the run would have lived.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twinrl import config
from twinrl.config.errors import InputError
from twinrl.flow.source import Data
from twinrl.run import names
from twinrl.run.checkpoints import Checkpoint
from twinrl.run.layout import read_rows, read_start
from twinrl.run.runlog import LogRow
from twinrl.stability.divergence import Diverged, Divergence, first_divergence
from twinrl.stability.events import Event
from twinrl.training.capsules import Capsules
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer, Validation

NEAR = 5
PLACEBOS = (0.99, 1.01)
"""Factors of the learning rate under which a spike that has a cause is expected to recur."""


@dataclass(frozen=True)
class ReplayValidation:
    """Judges samples every so many steps of a replay; the same for all of its traces.

    Attributes:
        every: steps between two validations.
        validate: as the trainer's.
    """

    every: int
    validate: Validation


@dataclass(frozen=True)
class Trace:
    """The steps that were run again.

    Attributes:
        label: the change, or "unchanged".
        rows: one log row a step, with validation metrics where samples were judged.
        found: kind of finding → first step at which the detectors had it.
    """

    label: str
    rows: list[LogRow]
    found: dict[str, int]


@dataclass(frozen=True)
class Replay:
    """An event, what the log says about the steps around it, and the traces.

    Attributes:
        event, logged: the event and its steps' rows of the log.
        traces: unchanged, then one for each change.
        placebos: changes that remove no suspect.
        before: rows of the log before these steps, by which a fall is told. start: metrics of the start weights.
        divergence, nfe: what a fall is, and at how many network evaluations.
    """

    event: Event
    logged: Sequence[LogRow]
    traces: list[Trace]
    placebos: list[Trace]
    before: Sequence[LogRow]
    start: LogRow | None
    divergence: Divergence.Config
    nfe: int

    @property
    def exact(self) -> bool:
        """Whether the unchanged replay gave the logged numbers to the last bit, up to where the run went back."""
        again = {(row["iteration"], row["step"]): row for row in self.traces[0].rows}
        keyed = [((row["iteration"], row["step"]), row) for row in self.logged]
        pairs = [(row, again[key]) for key, row in keyed if key in again]
        return bool(pairs) and all(_same(logged, row) for logged, row in pairs)

    def recurs(self, trace: Trace) -> bool:
        """Whether what the event was happens in a trace too."""
        return self.event.kind in trace.found

    @property
    def judged(self) -> bool:
        """Whether samples were judged on the way."""
        return any(names.VAL_QUALITY in row for row in self.traces[0].rows)

    def fell(self, trace: Trace) -> Diverged | None:
        """The fall of a run that went on as the trace; None where it was whole to the end, or was not judged."""
        return first_divergence([*self.before, *trace.rows], self.divergence, self.nfe, self.start)

    def peak(self, trace: Trace) -> float | None:
        """Largest value of the event's series within ``NEAR`` steps of it; None where the trace does not have it.

        A window may hold other events, so this says more about *this* one than :meth:`recurs`.
        """
        near = (row for row in trace.rows if abs(row["iteration"] - self.event.iteration) <= NEAR)
        values = [row[self.event.series] for row in near if self.event.series in row]
        return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=None)


def _same(logged: LogRow, again: LogRow) -> bool:
    return all(
        str(again[name]) == str(value)  # so that nan equals nan
        for name, value in logged.items()
        if name in again and name.startswith(("loss/", "grad/"))
    )


def replay(
    run: RunDirectory,
    number: int,
    overrides: list[str],
    source: Callable[[RunConfig], tuple[Data, torch.device]],
    after: int = 20,
    judge: ReplayValidation | None = None,
    tell: Callable[[str, int, int], None] = lambda label, step, steps: None,
) -> Replay:
    """Run the steps around event ``number`` again: unchanged, and with ``overrides`` and placebos if there are any.

    Arguments:
        run: the run.
        number: of the event: its line in events.jsonl, from 1.
        overrides: ``key.path=value`` changes, e.g. ``reward.schedule.weight=0`` or ``train.precision=float64``.
        source: loads the data of a configuration onto its device.
        after: steps after the event.
        judge: judges samples on the way.
        tell: hears which trace has made how many of its steps.

    Raises:
        InputError: the event has no capsule, or the change changes nothing or does not fit its state.
    """
    settings = run.settings()
    if overrides and changed(settings, overrides) == settings:
        raise InputError(
            "the change changes nothing", got=" ".join(overrides), expected="another configuration than the run's",
            fix="`twinrl doctor --schema` lists the keys; without the reward: reward.schedule.weight=0",
        )  # fmt: skip
    changes, placebos = ([overrides], PLACEBOS) if overrides else ([], ())
    return replay_each(run, number, changes, source, after, placebos, judge, tell)


def replay_each(
    run: RunDirectory,
    number: int,
    changes: Sequence[list[str]],
    source: Callable[[RunConfig], tuple[Data, torch.device]],
    after: int = 20,
    placebos: Sequence[float] = (),
    judge: ReplayValidation | None = None,
    tell: Callable[[str, int, int], None] = lambda label, step, steps: None,
) -> Replay:
    """:func:`replay` with several changes, one trace for each after the unchanged one.

    Arguments:
        run, number, source, after, judge, tell: as in :func:`replay`.
        changes: overrides of each trace.
        placebos: factors of the learning rate, one trace each.

    *When to use*: to try a list of suspects on one event; the unchanged steps run once.
    """
    settings = run.settings()
    capsules = Capsules(run.path, settings.stability.capsules)
    event, checkpoint = capsules.load(number)
    steps = event.iteration - checkpoint.state["iteration"] + 1 + after
    versions = {"unchanged": settings} | {" ".join(change): changed(settings, change) for change in changes}
    harmless = {f"learning rate × {factor:g}": faster(settings, factor) for factor in placebos}
    traces, beside = (
        [
            _trace(label, version, capsules.load(number)[1], steps, source, judge, tell)
            for label, version in group.items()
        ]
        for group in (versions, harmless)
    )
    first = checkpoint.state["iteration"]
    log = read_rows(run.path)
    logged = [row for row in log if first <= row["iteration"] < first + steps]
    before = [row for row in log if row["iteration"] < first]
    start, judged = read_start(run.path), (settings.stability.divergence, settings.evaluation.nfe[0])
    return Replay(event, logged, traces, beside, before, start, *judged)


def changed(settings: RunConfig, overrides: list[str]) -> RunConfig:
    """The run's configuration with changes."""
    return config.validate(RunConfig, config.override(settings.model_dump(mode="json"), overrides))


def faster(settings: RunConfig, factor: float) -> RunConfig:
    """The run's configuration at another learning rate."""
    return changed(settings, [f"optim.lr={settings.optim.lr * factor!r}"])


def _going_on(settings: RunConfig) -> RunConfig:
    """The configuration with its policies, but for those that would end the steps or go back: they only record."""
    plain = settings.model_dump(mode="json")
    ending = [on for on in ("policy", "spike", "drift") if plain["stability"][on] in ("stop", "rollback")]
    quiet = {"stability": dict.fromkeys(ending, "record") | {"capsules": {"every": 0}}}
    return config.validate(RunConfig, config.merge(plain, quiet))


def _trace(
    label: str,
    settings: RunConfig,
    checkpoint: Checkpoint,
    steps: int,
    source: Callable[[RunConfig], tuple[Data, torch.device]],
    judge: ReplayValidation | None,
    tell: Callable[[str, int, int], None],
) -> Trace:
    """Run ``steps`` steps from a state, which training writes into; nothing ends them or goes back."""
    settings = _going_on(settings)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "replay")
        run.start(settings, fresh=False)
        data, device = source(settings)
        validate = judge.validate if judge is not None else lambda network, step: {}
        trainer = Trainer(settings, run, data, device, validate, start_weights=False)
        try:
            trainer.restore(checkpoint, "the capsule", strict=False)
        except InputError as error:
            raise InputError(f"the change does not fit the capsule's state ({label})", got=error) from error
        rows: list[LogRow] = []
        found: dict[str, int] = {}
        for made in range(1, steps + 1):
            row, _, _, kinds = trainer.train_step()
            if judge is not None and trainer.step % judge.every == 0:
                row.update(trainer.validate(trainer.objective.teacher.best, trainer.step))
            rows.append(row)
            tell(label, made, steps)
            for kind in kinds:
                found.setdefault(kind, row["step"])
        trainer.log.close()
        trainer.events.close()
    return Trace(label, rows, found)
