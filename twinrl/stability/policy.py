"""What is done about trouble: each kind of finding has an action. Torch-free."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.stability.detectors import Watch
from twinrl.stability.divergence import Divergence
from twinrl.stability.events import DIVERGED, DRIFT, NONFINITE, SPIKE, UNSCORED, Event
from twinrl.stability.hacking import Hacking

Action = Literal["record", "zero", "skip", "cut_lr", "cut_lr+skip", "rollback", "stop"]


class CapsuleConfig(Settings):
    """Replay capsules: recent states kept on disk, of which an event keeps one."""

    every: int = Field(100, ge=0, description="steps between the states of the ring; 0 = no capsules")
    before: int = Field(20, ge=0, description="steps before the event that a replay must see")
    most: int = Field(10, ge=1, description="events of a run that get a capsule, the first ones")


class StabilityConfig(Settings):
    """What counts as trouble, and what is done about it. Everything is recorded, whatever the action.

    Actions: record = go on; zero = step with a gradient of zeros; skip = drop the step; cut_lr = lower the learning
    rate; rollback = return to the last healthy checkpoint and go on with another data order; stop = end the run with
    exit code 1.
    """

    policy: Action = Field(
        "stop", description="at non-finite numbers and at a confirmed divergence (which only rollback and stop act on)"
    )
    spike: Action = Field(
        "record",
        description="at a spike, at every step that it lasts; zero and skip come too late for one of opt/rms_max",
    )
    drift: Action = Field("record", description="at a lasting rise of gradient norms")
    lr_cut: float = Field(0.5, gt=0, lt=1, description="factor of the learning rate at a cut")
    lr_minimum: float = Field(0.01, ge=0, le=1, description="cuts end at this share of the learning rate")
    rollbacks: int = Field(3, ge=1, description="most rollbacks of a run; one more stops it")
    rollback_margin: int = Field(20, ge=0, description="a checkpoint this many steps before the event is healthy")
    unmoved_limit: float | None = Field(
        0.5, gt=0, le=1, description="share of weights in bf16 that a step leaves as they are: an event; null = never"
    )
    hacking: Hacking.Config | None = Field(
        Hacking.Config(), description="a reward that rises at the cost of pictures is an event; null = not watched"
    )
    watch: Watch.Config = Watch.Config()
    divergence: Divergence.Config = Divergence.Config()
    capsules: CapsuleConfig = CapsuleConfig()

    @property
    def rolls_back(self) -> bool:
        """Whether any action needs checkpoints to return to."""
        return "rollback" in (self.policy, self.spike, self.drift)

    def decide(self, kinds: Iterable[str]) -> "Decision":
        """What to do about the kinds of finding at one step; a step with unscored images is healthy."""
        action = {NONFINITE: self.policy, DIVERGED: self.policy, SPIKE: self.spike, DRIFT: self.drift}
        action[UNSCORED] = "record"
        actions = {part for kind in kinds for part in action[kind].split("+")}
        return Decision(
            stop="stop" in actions,
            rollback="rollback" in actions and "stop" not in actions,
            zero="zero" in actions,
            skip=bool(actions & {"skip", "rollback", "stop"}),
            cut="cut_lr" in actions,
        )

    def cause(self, events: Sequence[Event]) -> Event | None:
        """Of the events of one step, the one that ends the run, or else takes it back; None where none does."""
        decided = [(event, self.decide([event.kind])) for event in events]
        stops = [event for event, decision in decided if decision.stop]
        return next(iter(stops + [event for event, decision in decided if decision.rollback]), None)

    def check_measured(self, rms_every: int) -> None:
        """Raises InputError where a limit is set on what is never measured."""
        if self.watch.rms_limit is not None and rms_every == 0:
            raise InputError(
                "stability.watch.rms_limit limits opt/rms_max, which is never measured",
                got="gradients.telemetry.rms_every 0",
                fix="raise it to 1, or leave rms_limit out",
            )


@dataclass(frozen=True)
class Decision:
    """What to do about a step: end the run, return to a checkpoint, drop it, drop its gradient, lower the lr."""

    stop: bool = False
    rollback: bool = False
    zero: bool = False
    skip: bool = False
    cut: bool = False
