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

Imports neither torch nor pandas, so that studies and analysis read runs through it, too.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from twinrl.config import one_line
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import columns, runlog

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "env.json", "result.json"
LOG, EVENTS, METRICS = "log.jsonl", "events.jsonl", "metrics.parquet"
CHECKPOINTS, STATE, SHARDS = "checkpoints", "state.json", "shards"
RING, CAPSULES, EVENT = "ring", "capsules", "event.json"
SAMPLES, RANKS = "samples", "ranks"
EVALUATION, TABLE, BENCH = "evaluation", "table.json", "bench.json"
MLFLOW, START = "mlflow.json", "start.json"
LOCK = ".lock"

SEED = re.compile(r"^seed: (\d+)\n", re.MULTILINE)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML has it
STEP = "step-"
"""What the name of a step's checkpoint and pictures begins with."""


def is_run(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return (run / CONFIG).is_file()


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration as plain nested values, which runs may share; empty where there is none.

    Raises:
        InputError: the file is not YAML.
    """
    path = run / CONFIG
    try:
        text = path.read_text() if path.exists() else ""
        seed = SEED.search(text)
        config = _plain(SEED.sub("", text, count=1))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML", got=error, fix="restore the resolved configuration") from error
    if not isinstance(config, dict):
        return {}
    return config | ({"seed": int(seed[1])} if seed else {})


@lru_cache(maxsize=64)
def _plain(text: str) -> Any:
    """The value of a YAML text, which the runs of an arm share."""
    return yaml.load(text, LOADER)


def read_environment(run: Path) -> dict[str, Any]:
    """What is noted of the machine, the code and the launchers; empty where there is nothing yet."""
    try:
        return json.loads((run / ENVIRONMENT).read_bytes())
    except (*files.GONE, ValueError):  # none, or its process was killed while writing
        return {}


def read_rows(run: Path) -> list[dict[str, Any]]:
    """All rows of the log. Raises InputError: it is missing, or damaged."""
    return runlog.read(run / LOG)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of ``events.jsonl``, whose values may be lists; none if the file is missing."""
    path = run / EVENTS
    return runlog.read(path) if path.is_file() else []


def read_result(run: Path) -> dict[str, Any] | None:
    """How the run ended: ``status``, ``step``, ``message``, ``table``; None while it is unfinished.

    Raises:
        InputError: the file is damaged.
    """
    path = run / RESULT
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return _Result.model_validate_json(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(
            f"{path} is damaged or not of a run", got=one_line(error.errors()),
            fix=f"delete it: `twinrl resume {run}` then makes it again",
        ) from error  # fmt: skip


class _Result(BaseModel):
    """What every ``result.json`` holds, whatever else is in it."""

    model_config = ConfigDict(extra="allow", strict=True)
    status: str
    step: NonNegativeInt


def write_metrics(run: Path) -> Path:
    """Write the log as a table beside it, unless it is there; its path.

    Raises:
        InputError: the log is missing or corrupted.
    """
    columns.write(run / LOG, run / METRICS)
    return run / METRICS


def read_columns(run: Path, wanted: Callable[[str], bool]) -> columns.Columns:
    """The columns of the log that are ``wanted``, and its steps. Raises InputError: it is missing, or damaged."""
    return columns.read(run / LOG, run / METRICS, wanted)


def read_start(run: Path) -> dict[str, Any] | None:
    """Metrics of the start weights, by name; None where they were not evaluated, as from random weights."""
    path = run / START
    if not path.is_file():
        return None
    return {name: runlog.decode(value) for name, value in json.loads(path.read_text()).items()}


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
    return sorted((run / SAMPLES).glob(f"{STEP}*.png"))
