"""What the rest of a study costs: the base configuration timed once on a machine, and kept in the cache.

A timing is kept for what it depends on: the machine, the configuration's hash, threads, device, processes, torch and
twinrl. Planning reads it; only :func:`measure` trains, as many runs side by side as the study will:
they share the machine's caches and memory.
"""

import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from ablations.plan import Plan
from ablations.trial import environment, last_line
from twinrl import __version__
from twinrl.config import validate
from twinrl.config.errors import InputError
from twinrl.flow.schedules import ANCHOR, SCHEDULES, position
from twinrl.machine import files
from twinrl.machine.files import cache_dir
from twinrl.run import layout, names
from twinrl.training.runs import RunDirectory, dump
from twinrl.training.schema import RunConfig

TIMED_STEPS = 16
PATIENCE_SECONDS = 900
FORMAT = "twinrl-timing/2"
FOLDER = "timings"
KEY_DIGITS = 16


@dataclass(frozen=True)
class Timing:
    """Measured cost of a configuration on this machine.

    Attributes:
        step: seconds of one optimizer step, the median of ``steps``. low, high: their quartiles.
        validation: seconds of one during training.
        fixed: seconds of a run besides: start, data, final table, pictures.
        steps: that were timed. at: the day, as ISO 8601 has it.
    """

    step: float
    low: float
    high: float
    validation: float
    fixed: float
    steps: int
    at: str

    def trial(self, settings: RunConfig) -> tuple[float, float, float]:
        """Seconds of a trial, and between which they may lie."""
        steps, every = settings.train.steps, settings.evaluation.every
        beside = self.fixed + self.validation * math.ceil(steps / (every or steps))
        expected, low, high = (beside + steps * step for step in (self.step, self.low, self.high))
        return expected, low, high

    def rest(self, plan: Plan, slots: int) -> tuple[float, float, float]:
        """Wall-clock seconds for what is missing, ``slots`` ≥ 1 trials at a time, and between which they may lie."""
        found = [self.trial(trial.settings) for trial in plan.missing]
        expected, low, high = (sum(times) / slots for times in zip(*found, strict=True))
        return expected, low, high


def known(plan: Plan, slots: int) -> Timing | None:
    """The timing that is kept of the plan's first arm; None where it was never measured, or the file is damaged."""
    try:
        content = json.loads(_file(plan, slots).read_text())
        return Timing(**content["timing"]) if content["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(plan: Plan, slots: int) -> Timing:
    """Train the plan's first arm for a few steps, ``slots`` times at once in throw-away folders; keep the timing.

    Raises:
        InputError: it can't be trained, or not in a quarter of an hour; gives the reason.
    """
    trial = plan.trials[0]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(slots) as pool:
        short = [shortened(trial.settings, TIMED_STEPS, Path(folder, str(slot))) for slot in range(slots)]
        elapsed = list(pool.map(lambda settings: _train(settings, trial.arm), short))
        rows = [row for settings in short for row in layout.read_rows(settings.directory)]
    steps = [row[names.STEP_SECONDS] for row in rows]
    validations = [row[names.VALIDATION_SECONDS] for row in rows if names.VALIDATION_SECONDS in row]
    low, middle, high = statistics.quantiles([row[names.STEP_SECONDS] for row in rows if row["step"] > 1], n=4)
    fixed = (sum(elapsed) - sum(steps) - sum(validations)) / slots
    found = Timing(middle, low, high, statistics.mean(validations), fixed, len(steps) - slots, date.today().isoformat())
    file = _file(plan, slots)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps({"format": FORMAT, "timing": asdict(found)}) + "\n")
    return found


def _train(short: RunConfig, arm: str) -> float:
    """Seconds that a process takes to make a run."""
    folder, started = short.run.dir, time.monotonic()
    path, output = folder / "timing.yaml", folder / "output.txt"
    folder.mkdir(parents=True)
    path.write_text(dump(short))
    try:
        with output.open("wb") as file:
            subprocess.run(
                [sys.executable, "-m", "twinrl", "train", str(path)], stdout=file, stderr=file, check=False,
                env=environment(short.machine.threads or 1), timeout=PATIENCE_SECONDS,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"arm {arm} took longer than {PATIENCE_SECONDS:g} s for {short.train.steps} steps",
            got=last_line(output), fix="leave out --measure to plan without the cost",
        ) from error  # fmt: skip
    if RunDirectory(short.directory).result is None:
        raise InputError(f"arm {arm} can't be trained", got=last_line(output))
    return time.monotonic() - started


def _file(plan: Plan, slots: int) -> Path:
    """Where the timing of the plan's first arm is kept, of so many runs side by side."""
    trial, machine = plan.trials[0], plan.trials[0].settings.machine
    parts = (
        platform.node(), platform.machine(), os.cpu_count(), trial.config_hash, machine.device, machine.threads, slots,
        plan.study.config.resources.workers, metadata.version("torch"), __version__,
    )  # fmt: skip
    return cache_dir() / FOLDER / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:KEY_DIGITS]}.json"


# --- a short run ------------------------------------------------------------------------------------------


def shortened(settings: RunConfig, steps: int, folder: Path) -> RunConfig:
    """The configuration as a run of ``steps`` in ``folder``, made to its end whatever happens on the way.

    Schedules shrink with the run, so that what an arm switches on late is in the steps that are timed.
    """
    plain = _with_shares(settings.model_dump(mode="json"), settings.train.steps)
    plain["train"]["steps"], plain["run"]["dir"] = steps, str(folder)
    plain["evaluation"]["every"] = 0  # the last step is followed by a validation in any case
    plain["stability"] |= dict.fromkeys(("policy", "spike", "drift"), "record")
    plain["early_stop"]["patience"] = None
    return validate(RunConfig, plain)


def _with_shares(value: Any, steps: int) -> Any:
    """Plain settings in which schedules have their moments as shares of a run of ``steps``."""
    if isinstance(value, list):
        return [_with_shares(item, steps) for item in value]
    if not isinstance(value, dict):
        return value
    moments = [key for key in ("start", "end") if key in value and value.get("kind") in SCHEDULES]
    shares = {key: _share(value[key], steps) for key in moments}
    return {key: _with_shares(item, steps) for key, item in value.items()} | shares


def _share(moment: int | str, steps: int) -> str:
    """A moment as the same share of a run of ``steps``; what lies beyond it stays at its end."""
    share = f"{min(100.0, float(100 * position(moment, steps, Fraction(0)) / steps)):.6f}%"
    return f"{ANCHOR}+{share}" if str(moment).startswith(ANCHOR) else share
