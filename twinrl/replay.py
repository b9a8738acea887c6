"""Replay: the steps around an event again, from its capsule, unchanged and with a change. Cause by intervention.

Correlation says which term was large before a spike; running the same steps without it says whether it was the cause.
Draws are keyed, so the unchanged replay repeats the log exactly, and a changed one differs by the change alone.

Training near its edge is chaotic, though: there any change, however innocent, may remove a single spike. So a change is
compared with *placebos*, the same steps at a slightly different learning rate: what they remove, too, shows no cause.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twinrl import config, schema
from twinrl.capsules import Capsules
from twinrl.checkpoints import Checkpoint
from twinrl.data.source import Data
from twinrl.errors import InputError
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.stability.events import Event
from twinrl.tracking import runlog
from twinrl.trainer import Row, Trainer

NEAR = 5
PLACEBOS = (0.99, 1.01)
"""Factors of the learning rate under which a spike that has a cause is expected to recur."""


@dataclass(frozen=True)
class Trace:
    """The steps that were run again.

    Attributes:
        label: the change, or "unchanged".
        rows: one log row a step.
        found: kind of finding → first step at which the detectors had it.
    """

    label: str
    rows: list[Row]
    found: dict[str, int]


@dataclass(frozen=True)
class Replay:
    """An event, what the log says about the steps around it, and the traces.

    Attributes:
        event, logged: the event and its steps' rows of the log.
        traces: unchanged, then one for each change.
        placebos: changes that remove no suspect.
    """

    event: Event
    logged: list[Row]
    traces: list[Trace]
    placebos: list[Trace]

    @property
    def exact(self) -> bool:
        """Whether the unchanged replay gave the logged numbers to the last bit."""
        again = {row["iteration"]: row for row in self.traces[0].rows}
        pairs = [(row, again[row["iteration"]]) for row in self.logged if row["iteration"] in again]
        return bool(pairs) and all(_same(logged, row) for logged, row in pairs)

    def recurs(self, trace: Trace) -> bool:
        """Whether what the event was happens in a trace too."""
        return self.event.kind in trace.found

    def peak(self, trace: Trace) -> float | None:
        """Largest value of the event's series within ``NEAR`` steps of it; None where the trace does not have it.

        A window may hold other events, so this says more about *this* one than :meth:`recurs`.
        """
        near = (row for row in trace.rows if abs(row["iteration"] - self.event.iteration) <= NEAR)
        values = [row[self.event.series] for row in near if self.event.series in row]
        return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=None)


def _same(logged: Row, again: Row) -> bool:
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
) -> Replay:
    """Run the steps around event ``number`` again: unchanged, and with ``overrides`` and placebos if there are any.

    Arguments:
        run: the run.
        number: of the event: its line in events.jsonl, from 1.
        overrides: ``key.path=value`` changes, e.g. ``terms.reward=null`` or ``train.precision=float64``.
        source: loads the data of a configuration onto its device.
        after: steps after the event.

    Raises:
        InputError: the event has no capsule, or the change does not fit its state.
    """
    return replay_each(run, number, [overrides] if overrides else [], source, after, PLACEBOS if overrides else ())


def replay_each(
    run: RunDirectory,
    number: int,
    changes: Sequence[list[str]],
    source: Callable[[RunConfig], tuple[Data, torch.device]],
    after: int = 20,
    placebos: Sequence[float] = (),
) -> Replay:
    """:func:`replay` with several changes, one trace for each after the unchanged one.

    Arguments:
        run, number, source, after: as in :func:`replay`.
        changes: overrides of each trace.
        placebos: factors of the learning rate, one trace each.

    *When to use*: to try a list of suspects on one event; the unchanged steps run once.
    """
    settings = run.settings()
    event, checkpoint = Capsules(run.path, settings.stability.capsules).load(number)
    steps = event.iteration - checkpoint.state["iteration"] + 1 + after
    versions = {"unchanged": settings} | {" ".join(change): changed(settings, change) for change in changes}
    harmless = {f"learning rate × {factor:g}": faster(settings, factor) for factor in placebos}
    traces, beside = (
        [_trace(label, version, checkpoint, steps, source) for label, version in group.items()]
        for group in (versions, harmless)
    )
    first = checkpoint.state["iteration"]
    logged = [row for row in runlog.read(run.log) if first <= row["iteration"] < first + steps]
    return Replay(event, logged, traces, beside)


def changed(settings: RunConfig, overrides: list[str]) -> RunConfig:
    """The run's configuration with changes."""
    return config.validate(RunConfig, config.override(settings.model_dump(mode="json"), overrides))


def faster(settings: RunConfig, factor: float) -> RunConfig:
    """The run's configuration at another learning rate."""
    return changed(settings, [f"optim.lr={settings.optim.lr * factor!r}"])


def _trace(
    label: str,
    settings: RunConfig,
    checkpoint: Checkpoint,
    steps: int,
    source: Callable[[RunConfig], tuple[Data, torch.device]],
) -> Trace:
    """Run ``steps`` steps from a state; whatever is found is recorded and nothing acts."""
    quiet: dict[str, Any] = {
        "stability": {"policy": "record", "spike": "record", "drift": "record", "capsules": {"every": 0}}
    }
    plain = config.merge(settings.model_dump(mode="json"), quiet)
    settings = config.validate(schema.RunConfig, plain)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "replay")
        run.start(settings, fresh=False)
        data, device = source(settings)
        trainer = Trainer(settings, run, data, device, lambda network, step: {}, start_weights=False)
        try:
            trainer.restore(checkpoint, "the capsule", strict=False)
        except InputError as error:
            raise InputError(f"the change does not fit the capsule's state ({label})", got=error) from error
        rows: list[Row] = []
        found: dict[str, int] = {}
        for _ in range(steps):
            row, _, _ = trainer.train_step()
            rows.append(row)
            for kind in trainer.kinds:
                found.setdefault(kind, row["step"])
        trainer.log.close()
        trainer.events.close()
    return Trace(label, rows, found)
