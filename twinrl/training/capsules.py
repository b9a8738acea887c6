"""Replay capsules: what an event keeps so that the steps around it can be run again.

Every random number is a function of (seed, purpose, step), so a capsule needs no draws and no data: it is the
state of training some steps before the event. A ring of recent states lies in ``ring/``; an event moves a link
to the right one into ``capsules/event-<n>/``.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.machine import files
from twinrl.run import checkpoints, layout
from twinrl.run.checkpoints import Checkpoint
from twinrl.stability.events import Event
from twinrl.stability.policy import CapsuleConfig

STATES_KEPT = 2
"""States in the ring: the newest may be too close to the event."""


@dataclass(frozen=True)
class Capsules:
    """The ring and the capsules of one run.

    Attributes:
        run: the run directory.
        config: how often, how many.
        ranks: who holds the states.
    """

    run: Path
    config: CapsuleConfig
    ranks: Ranks = ALONE

    def due(self, step: int) -> bool:
        """Whether the state before ``step`` belongs into the ring."""
        return self.config.every > 0 and step % self.config.every == 0

    def remember(self, step: int, checkpoint: Checkpoint) -> None:
        """Put a state into the ring."""
        self.ranks.save(self.run / layout.RING, step, checkpoint, STATES_KEPT)

    def forget_after(self, step: int) -> None:
        """Drop states of steps that will be made again."""
        self.ranks.on_first(lambda: checkpoints.drop_after(self.run / layout.RING, step))

    def keep(self, number: int, event: Event) -> Path | None:
        """The capsule of event ``number``; None if there is no state before it, enough capsules, or another process
        keeps it."""
        if not self.ranks.first:
            return None
        folder = self.run / layout.CAPSULES / f"event-{number}"
        if folder.exists():  # of a stretch that was cut off by a resume
            shutil.rmtree(folder)
        states = {checkpoints.load_state(path)["step"]: path for path in layout.available(self.run / layout.RING)}
        usable = {step: path for step, path in states.items() if step < event.step}
        if not usable or self.config.every == 0 or number > self.config.most:
            return None
        early = [step for step in usable if step <= event.step - self.config.before]
        source = usable[max(early) if early else min(usable)]
        with files.publishing(folder) as new:
            shutil.copytree(source, new / source.name, copy_function=_link)
            (new / layout.EVENT).write_text(json.dumps(event.as_dict(), indent=1) + "\n")
        return folder

    def load(self, number: int) -> tuple[Event, Checkpoint]:
        """An event and the state from which its steps can be run again.

        Raises:
            InputError: the event has no capsule, or a damaged one.
        """
        folder = self.run / layout.CAPSULES / f"event-{number}"
        if not folder.is_dir():
            raise InputError(
                f"event {number} of {self.run} has no capsule",
                got=f"capsules of events {', '.join(map(str, self.numbers())) or '(none)'}",
                fix="see stability.capsules: every, most",
            )
        state = layout.newest(folder)
        if state is None:
            raise InputError(f"{folder} has no state", fix="delete the capsule, which cannot be replayed")
        return Event.from_dict(layout.read_event(folder)), checkpoints.load(state)

    def numbers(self) -> list[int]:
        """Numbers of the events that have a capsule."""
        found = (self.run / layout.CAPSULES).glob("event-*")
        return sorted(int(path.name.removeprefix("event-")) for path in found if re.fullmatch(r"event-\d+", path.name))


def _link(source: str, target: str) -> None:
    """A hard link, since states are never written to; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
