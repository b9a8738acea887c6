"""A run directory's files: their names, which are spelled here and nowhere else, and how they are read.

    config.yaml      the resolved configuration; with it the run exists
    env.json         versions, revision, threads, launchers
    log.jsonl        one exact row a step           events.jsonl   what went wrong, and when
    checkpoints/     step-<step>/ with state.json and a safetensors file for each part, or shards/
    ring/, capsules/ states before an event: the newest, and those that an event has kept
    samples/         pictures over training         ranks/         what the processes of a launch printed
    metrics.parquet  the log as a table             result.json    how the run ended; written last
    evaluation/      of ``twinrl evaluate``         bench.json     of ``twinrl bench``
    mlflow.json      which MLflow run shows this one
    start.json       metrics of the start weights  .lock          held by the process that trains the run
    .mlflow.lock     held by the process that publishes the run, while it does

Imports neither torch nor pandas, so that studies and analysis read runs through it, too.
"""

import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from twinrl.config import one_line, parsed_yaml, read_text, stored
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import columns, names, runlog

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "env.json", "result.json"
LOG, EVENTS, METRICS = "log.jsonl", "events.jsonl", "metrics.parquet"
CHECKPOINTS, STATE, SHARDS = "checkpoints", "state.json", "shards"
RING, CAPSULES, EVENT = "ring", "capsules", "event.json"
SAMPLES, RANKS = "samples", "ranks"
EVALUATION, TABLE, SAMPLERS, BENCH = "evaluation", "table.json", "samplers.json", "bench.json"
MLFLOW, START = "mlflow.json", "start.json"
LOCK, MLFLOW_LOCK = ".lock", ".mlflow.lock"

SEED = re.compile(r"^seed: (\d+)\n", re.MULTILINE)
STEP = "step-"
"""What the name of a step's checkpoint and pictures begins with."""
GRID_ORIGIN = "images from"
"""Key of a sample grid's PNG text: "left top" of its first image, in pixels; titles and prompts are before it."""


def is_run(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return (run / CONFIG).is_file()


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration as plain nested values, which runs may share; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = run / CONFIG
    if not os.path.lexists(path):
        return {}
    try:
        text = read_text(path)
        seed = SEED.search(text)
        config = _plain(SEED.sub("", text, count=1))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML", got=error, fix="restore the resolved configuration") from error
    except ValidationError as error:
        raise InputError(f"{path} is damaged", got=one_line(error.errors()), fix="restore it") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a mapping", got=type(config).__name__, expected="key: value lines")
    return config | ({"seed": int(seed[1])} if seed else {})


@lru_cache(maxsize=64)
def _plain(text: str) -> Any:
    """The value of a configuration's YAML, which the runs of an arm share.

    Raises:
        YAMLError, RecursionError, ValidationError: it is none.
    """
    config = parsed_yaml(text)
    if isinstance(config, dict):
        _Config.model_validate(config, strict=True)
    return config


class _Part(BaseModel):
    """What others than training read of the configuration; training has the whole schema."""

    model_config = ConfigDict(extra="allow")


class _Train(_Part):
    steps: NonNegativeInt = 0


class _Evaluation(_Part):
    nfe: Annotated[list[PositiveInt], Field(min_length=1)] = [1]


class _Data(_Part):
    source: str | None = None


class _Stability(_Part):
    divergence: dict[str, Any] | None = None


class _Term(_Part):
    branches: list[str] | None = None


class _Config(_Part):
    name: str = ""
    seed: NonNegativeInt = 0
    train: _Train | None = None
    evaluation: _Evaluation | None = None
    data: _Data | None = None
    stability: _Stability | None = None
    terms: dict[str, _Term] | None = None


def read_environment(run: Path) -> dict[str, Any]:
    """What is noted of the machine, the code and the launchers; empty where there is nothing yet, or it is damaged:
    no number hangs on it."""
    try:
        return stored.read(run / ENVIRONMENT, _Environment, "").model_dump()
    except (*files.GONE, InputError):  # none, or its process was killed while writing
        return {}


class _Environment(BaseModel):
    """What others read of ``env.json``; the rest is for people."""

    model_config = ConfigDict(extra="allow")
    launchers: list[str] = []


def read_rows(run: Path, stop: int | None = None) -> list[dict[str, Any]]:
    """All rows of the log, or those up to byte ``stop``. Raises InputError: it is missing, or a row is damaged."""
    path = run / LOG
    rows = list(runlog.rows(path, stop=stop))
    for number, row in enumerate(rows, 1):
        counts = (row.get(name) for name in ("step", "iteration"))
        if not all(type(count) is int and count >= 0 for count in counts):
            said = f"step {row.get('step')!r:.40}, iteration {row.get('iteration')!r:.40}"
            raise _damaged_row(path, number, said, "whole numbers")
        odd = next((name for name, value in row.items() if not isinstance(value, int | float | None)), None)
        if odd is not None:
            raise _damaged_row(path, number, f"{odd} {row[odd]!r:.40}", "a number")
    return rows


def _damaged_row(path: Path, number: int, got: str, expected: str) -> InputError:
    fix = "resume from a checkpoint before that line, or restore the line"
    return InputError(f"{path}, line {number}, is damaged", got=got, expected=expected, fix=fix)


def read_events(run: Path, stop: int | None = None) -> list[dict[str, Any]]:
    """The lines of ``events.jsonl``, or those up to byte ``stop``; none if the file is missing.

    Raises:
        InputError: a line is no event.
    """
    path = run / EVENTS
    if not os.path.lexists(path):
        return []
    entries = list(runlog.rows(path, stop=stop))
    for number, entry in enumerate(entries, 1):
        try:
            _Event.model_validate(entry, strict=True)
        except ValidationError as error:
            raise InputError(
                f"{path}, line {number}, is no event", got=one_line(error.errors()), fix="restore or delete the line"
            ) from error
    return entries


def read_event(capsule: Path) -> dict[str, Any]:
    """The event that a capsule was kept for. Raises InputError: the file is missing or damaged."""
    fix = "delete the capsule, which cannot be replayed"
    try:
        return stored.read(capsule / EVENT, _Event, fix).model_dump(exclude_unset=True)
    except FileNotFoundError as error:
        raise InputError(f"{capsule / EVENT} is missing", fix=fix) from error


NotFinite = Literal["nan", "inf", "-inf"]
Number = int | float | NotFinite
"""As strict JSON has it; ``float`` takes all of them."""


class _Event(BaseModel):
    """A line of ``events.jsonl``; :class:`twinrl.stability.events.Event` says what each entry is."""

    model_config = ConfigDict(extra="forbid")
    step: NonNegativeInt
    iteration: NonNegativeInt
    kind: str
    terms: list[str]
    rows: list[int]
    message: str
    shares: dict[str, list[Number]] = {}
    series: str = ""
    value: Number | None = None
    reference: Number | None = None
    t: list[float] = []
    branches: list[str] = []


def read_result(run: Path) -> dict[str, Any] | None:
    """How the run ended: ``status``, ``step``, ``message``, ``table``; None while it is unfinished.

    Raises:
        InputError: the file is damaged.
    """
    try:
        result = stored.read(run / RESULT, _Result, _make_again(run))
    except FileNotFoundError:
        return None
    return result.model_dump(exclude_unset=True)


def damaged_result(run: Path, got: str) -> InputError:
    """The refusal of a result that holds something else than was written."""
    return InputError(f"{run / RESULT} is damaged", got=got, fix=_make_again(run))


def _make_again(run: Path) -> str:
    return f"delete it: `twinrl resume {run}` then makes it again"


class _Result(BaseModel):
    """What every ``result.json`` holds, whatever else is in it."""

    model_config = ConfigDict(extra="allow", strict=True)
    status: Literal["finished", "stopped", "diverged"]
    step: NonNegativeInt
    message: str = ""
    table: dict[str, Any] | None = None


def write_metrics(run: Path) -> Path:
    """Write the log as a table beside it, unless it is there; its path.

    Raises:
        InputError: the log is missing or damaged.
    """
    columns.write(run / LOG, run / METRICS)
    return run / METRICS


def read_columns(run: Path, wanted: Callable[[str], bool]) -> columns.Columns:
    """The columns of the log that are ``wanted``, and its steps. Raises InputError: it is missing, or damaged."""
    return columns.read(run / LOG, run / METRICS, wanted)


def read_start(run: Path) -> dict[str, Any] | None:
    """Metrics of the start weights, by name; None where they were not evaluated, as from random weights.

    Raises:
        InputError: the file is damaged.
    """
    fix = "restore it, or delete it and judge the run without it"
    try:
        start = stored.read(run / START, dict[str, FiniteFloat | NotFinite], fix)
    except FileNotFoundError:
        return None
    if names.VAL_QUALITY not in start:
        raise InputError(f"{run / START} is damaged", got=f"no {names.VAL_QUALITY}", fix=fix)
    return {name: runlog.decode(value) for name, value in start.items()}


def folder_name(name: str, config_hash: str, seed: int) -> str:
    """What the directory of a run is called."""
    return f"{name}-{config_hash}-s{seed}"


# --- steps ------------------------------------------------------------------------------------------------------


def of_step(step: int) -> str:
    """Name of a step's checkpoint, and what its pictures' names begin with."""
    return f"{STEP}{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint or picture by its name."""
    return int(path.stem.removeprefix(STEP))


def available(checkpoints: Path) -> list[Path]:
    """The published checkpoints in a folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = checkpoints.iterdir()  # where a pattern would find nothing in a folder that may not be read
    return sorted(path for path in found if re.fullmatch(rf"{STEP}\d+", path.name))


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    found = available(checkpoints)
    return found[-1] if found else None


def grids(run: Path) -> list[Path]:
    """The pictures of samples over training, oldest first."""
    found = (run / SAMPLES).glob(f"{STEP}*.png")
    return sorted(path for path in found if re.fullmatch(rf"{STEP}\d+", path.stem) and is_own(path, run))


def is_own(path: Path, run: Path) -> bool:
    """Whether a file lies in a run itself: links in a run of somebody else's may lead to what is not for others."""
    return path.is_file() and path.resolve() == run.resolve() / path.relative_to(run)
