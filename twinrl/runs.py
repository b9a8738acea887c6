"""Run directories: ``runs/<name>-<hash8>-s<seed>/`` and what is in them.

config.yaml      the resolved configuration        env.json     versions, revision, threads
log.jsonl        one exact row a step              events.jsonl what went wrong, and when
checkpoints/     states to resume from             samples/     grids over training
metrics.parquet  the log as a table                result.json  written last: how the run ended
"""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from twinrl import checkpoints, config, schema
from twinrl.errors import InputError
from twinrl.tracking import environment, mlflow_state, runlog

CONFIG, EVENTS, RESULT, ENVIRONMENT = "config.yaml", "events.jsonl", "result.json", "env.json"


class _Result(BaseModel):
    """What every ``result.json`` holds, whatever else is in it."""

    model_config = ConfigDict(extra="allow", strict=True)
    status: str
    step: NonNegativeInt


class EventLog(runlog.RunLog):
    """``events.jsonl``: as the run log, but of plain JSON values (``Event.as_dict``)."""

    def append(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")


class NoLog:
    """In the place of a log for processes that do not write: accepts everything, keeps nothing."""

    def append(self, row: Mapping[str, object]) -> None:
        """Written by the first process."""

    def sync(self) -> int:
        """Nothing is on disk."""
        return 0

    def check(self, offset: int) -> None:
        """There is nothing to check."""

    def trim(self, offset: int) -> None:
        """There is nothing to cut."""

    def close(self) -> None:
        """There is nothing to close."""


class RunDirectory:
    """The files of one run.

    Arguments:
        path: the directory; need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.log = path / runlog.LOG_NAME
        self.events = path / EVENTS

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    @property
    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None while it is unfinished. Raises InputError where the file is damaged."""
        path = self.path / RESULT
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _Result.model_validate_json(content).model_dump(exclude_unset=True)
        except ValidationError as error:
            raise InputError(
                f"{path} is damaged or not of a run", got=config.one_line(error.errors()),
                fix=f"delete it: `twinrl resume {self.path}` then makes it again",
            ) from error  # fmt: skip

    def begun_by(self, launchers: Iterable[str]) -> bool:
        """Whether one of these launchers has trained this run; "" is none."""
        try:
            known = json.loads((self.path / ENVIRONMENT).read_text()).get("launchers", [])
        except (OSError, ValueError):  # none, or its process was killed while writing
            return False
        return self.exists and not set(known).isdisjoint(filter(None, launchers))

    def start(self, settings: schema.RunConfig, fresh: bool, launchers: Iterable[str] = ()) -> None:
        """Make the directory of a new run; ``fresh`` deletes an older one first.

        Arguments:
            settings: the configuration.
            fresh: whether an older run may be deleted.
            launchers: names of those that begin it, for their restarts.

        Raises:
            InputError: a run exists here already (finished, to be resumed, or being trained with ``fresh``), or the
                folder can't be written.
        """
        if not fresh:
            self.refuse_existing()
        try:
            if self.exists:
                self._clear()
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._note(environment.describe(), launchers)
            unfinished = self.path / f".{CONFIG}"
            unfinished.write_text(dump(settings))
            unfinished.replace(self.path / CONFIG)  # last: with it the run exists
        except OSError as error:
            raise InputError(
                f"the run directory {self.path} cannot be written",
                got=error.strerror,
                fix="set run.dir to a writable folder",
            ) from error

    def _note(self, described: Mapping[str, Any], launchers: Iterable[str]) -> None:
        unfinished = self.path / f".{ENVIRONMENT}"
        unfinished.write_text(json.dumps({**described, "launchers": sorted(filter(None, launchers))}, indent=1))
        unfinished.replace(self.path / ENVIRONMENT)

    def joined_by(self, launchers: Iterable[str]) -> None:
        """Note who trains a run that is begun already: machines have come in the place of lost ones."""
        described = json.loads((self.path / ENVIRONMENT).read_text())
        if new := set(launchers) - {"", *described["launchers"]}:
            self._note(described, [*described["launchers"], *new])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For the process that trains the run: a second one would cut the log back under its feet.

        The lock dies with its process.

        Raises:
            InputError: another process holds it.
        """
        with (self.path / CONFIG).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is training this run: {self.path}", fix="wait for it to end, or stop it"
                ) from error
            yield

    def _clear(self) -> None:
        """Delete everything but the name of the MLflow run, which the new run's view is to replace."""
        view = self.path / mlflow_state.STATE_NAME
        published = view.read_bytes() if view.is_file() else None
        with self.locked():
            self.discard()
        if published is not None:
            self.path.mkdir()
            view.write_bytes(published)

    def discard(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path)

    def refuse_existing(self) -> None:
        """Raises InputError where a run exists: finished, or to be resumed."""
        if not self.exists:
            return
        if (result := self.result) is not None:
            raise InputError(
                f"this run exists and has {result['status']} after {result['step']} steps: {self.path}",
                fix="--fresh starts it over, another seed or name makes a new one",
            )
        raise InputError(
            f"this run was begun and not finished: {self.path}",
            fix=f"`twinrl resume {self.path}` goes on, --fresh starts over",
        )

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, the mark of a finished run."""
        unfinished = self.path / f".{RESULT}"
        unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        unfinished.replace(self.path / RESULT)

    def settings(self) -> schema.RunConfig:
        """The run's configuration; keys that are newer than the run have the defaults that they came with.

        Raises:
            InputError: the directory holds no run, or not one of this version or an older one.
        """
        if not self.exists:
            raise InputError(f"{self.path} is not a run directory", expected=f"a folder with {CONFIG}")
        return config.validate(schema.RunConfig, config.read_yaml(self.path / CONFIG), config.STORED)

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint. Raises InputError where there is none yet."""
        found = checkpoints.newest(self.checkpoints)
        if found is None:
            raise InputError(
                f"{self.path} has no checkpoint yet", fix="wait for checkpoint.every steps, or resume the run"
            )
        return found


def dump(settings: schema.RunConfig) -> str:
    """The configuration as YAML that loads to the same configuration."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_unchanged(settings: schema.RunConfig, content_hash: str, state: Mapping[str, Any]) -> None:
    """Raises InputError naming the keys in which ``settings`` differ from a checkpoint's, or that the data do."""
    now = settings.numeric() | {"seed": settings.seed}
    changed = config.differing_keys(state["config"], now)
    if changed:
        raise InputError(
            "the run's configuration has changed since its checkpoint",
            got=f"other values of {', '.join(changed)}",
            fix="restore them in config.yaml, or start a new run with train.init=<this run>",
        )
    check_content(content_hash, state, settings.data.source)


def _short(content_hash: str) -> str:
    """The beginnings of a hash's parts: of the data, and of the pretrained model where there is one."""
    return "-".join(part[:12] for part in content_hash.split("-"))


def check_content(content_hash: str, state: Mapping[str, Any], source: str) -> None:
    """Raises InputError where a checkpoint was made with other data (or other frozen models) of ``source``."""
    if state["content_hash"] != content_hash:
        raise InputError(
            f"the data of {source} have changed since the run's checkpoint",
            got=f"content {_short(content_hash)}",
            expected=f"content {_short(state['content_hash'])}",
            fix="restore data.root and the cache, or start a new run with train.init=<this run>",
        )
