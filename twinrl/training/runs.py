"""Run directories, ``runs/<name>-<hash8>-s<seed>/``: begun, locked, ended. Their files: :mod:`twinrl.run.layout`."""

import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from twinrl import config
from twinrl.config.components import not_from
from twinrl.config.errors import InputError
from twinrl.machine import files, known
from twinrl.run import environment, layout, runlog
from twinrl.run.runlog import LogRow
from twinrl.stability import verdict
from twinrl.tracking import store
from twinrl.training import schema

WATCHED = "watched"
"""The section of a configuration that only runs of other training loops have."""
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml where PyYAML has it


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
        self.checkpoints = path / layout.CHECKPOINTS
        self.samples = path / layout.SAMPLES
        self.log = path / layout.LOG
        self.events = path / layout.EVENTS

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return layout.is_run(self.path)

    @property
    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None while it is unfinished. Raises InputError where the file is damaged."""
        return layout.read_result(self.path)

    def begun_by(self, launchers: Iterable[str]) -> bool:
        """Whether one of these launchers has trained this run; "" is none."""
        known = layout.read_environment(self.path).get("launchers", [])
        return self.exists and not set(known).isdisjoint(filter(None, launchers))

    def start(self, settings: config.Settings, fresh: bool, launchers: Iterable[str] = ()) -> None:
        """Make the directory of a new run; ``fresh`` deletes an older one first. The caller holds the lock.

        Arguments:
            settings: the configuration.
            fresh: whether an older run may be deleted.
            launchers: names of those that begin it, for their restarts.

        Raises:
            InputError: a run exists here already (finished, or to be resumed), or the folder can't be written.
        """
        if not fresh:
            self.refuse_existing()
        with self._writing():
            if self.exists:
                self._clear((layout.LOCK, layout.MLFLOW))  # the new run's view is to replace that MLflow run
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._note(environment.describe(), launchers)
            files.write_text(self.path / layout.CONFIG, dump(settings))  # last: with it the run exists

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the run directory {self.path} cannot be written",
                got=error.strerror,
                fix="set run.dir to a writable folder, or mend its rights",
            ) from error

    def _note(self, described: Mapping[str, Any], launchers: Iterable[str]) -> None:
        described = {**described, "launchers": sorted(filter(None, launchers))}
        files.write_text(self.path / layout.ENVIRONMENT, json.dumps(described, indent=1))

    def joined_by(self, launchers: Iterable[str]) -> None:
        """Note who trains a run that is begun already: machines have come in the place of lost ones."""
        described = layout.read_environment(self.path)
        before = described.get("launchers", [])
        if new := set(launchers) - {"", *before}:
            self._note(described, [*before, *new])

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """For the process that trains the run, before it looks at anything: two would cut each other's log.

        The lock dies with its process. Where the input turns out wrong, what was made for it goes away.

        Raises:
            InputError: another process has held it for ``patience`` seconds, or the folder can't be written.
        """
        refusal = InputError(f"another process is training this run: {self.path}", fix="wait for it to end, or stop it")
        lock = self.path / layout.LOCK
        new = [path for path in (lock, *lock.parents) if not path.exists()]
        with ExitStack() as stack:
            with self._writing():
                stack.enter_context(files.locked(lock, refusal, patience))
            try:
                yield
            except (InputError, OSError):
                self._leave(lock, new)
                raise

    def _leave(self, lock: Path, new: Sequence[Path]) -> None:
        """Delete the ``lock`` file of no run, and it and the folders that are ``new`` where nothing is in them."""
        if lock in new or not self.exists:
            lock.unlink(missing_ok=True)
        with suppress(OSError):  # something is in it
            for folder in dict.fromkeys((self.path, *new[1:])):
                folder.rmdir()

    def _clear(self, kept: Container[str] = (layout.LOCK,)) -> None:
        """Delete what is in the directory; the configuration last, without which there is no run to be deleted."""
        found = sorted(self.path.iterdir(), key=lambda path: path.name == layout.CONFIG)
        for path in found:
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discard(self) -> None:
        """Delete the run."""
        self._clear()

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

    def refuse_remains(self) -> None:
        """Raises InputError where no run is, but files are: one whose configuration is lost, or somebody's own."""
        if self.exists or not self.path.is_dir():
            return
        begun = (layout.ENVIRONMENT, layout.MLFLOW)  # what a process leaves that is killed before its run exists
        for found in sorted(self.path.iterdir()):
            folder = found.is_dir() and not any(found.iterdir())
            if not (folder or found.name in begun or found.name.startswith(".")):
                raise InputError(
                    f"{self.path} is no run, and not empty", got=f"{found.name} without {layout.CONFIG}",
                    fix=f"restore {layout.CONFIG} and resume, or move the folder away",
                )  # fmt: skip

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, the mark of a finished run."""
        files.write_text(self.path / layout.RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")

    def keep_start(self, start: LogRow) -> None:
        """Write the metrics of the start weights, by which the run is judged wherever it is moved to."""
        content = json.dumps(verdict.encoded(start), indent=1, allow_nan=False)
        files.write_text(self.path / layout.START, content + "\n")

    def settings(self) -> schema.RunConfig:
        """The run's configuration; keys that are newer than the run have the defaults that they came with.

        Raises:
            InputError: the directory holds no run, not one of this version or an older one, or one whose own classes
                lie in it.
        """
        if not self.exists:
            raise InputError(f"{self.path} is not a run directory", expected=f"a folder with {layout.CONFIG}")
        if WATCHED in layout.read_config(self.path):
            raise InputError(
                f"{self.path} was written by twinrl.watch in a training loop of its own",
                fix="`twinrl analyze`, `ui`, `publish` and `notebook` read it; the loop itself has the model",
            )
        with not_from(self.path):
            return config.validate(schema.RunConfig, config.read_yaml(self.path / layout.CONFIG), config.STORED)

    def check_own(self, settings: schema.RunConfig) -> None:
        """Before it is continued: raises InputError where it names an MLflow server or a Ray cluster that this user has
        never named: it may be somebody else's."""
        for address, what, variable, key in _named(settings):
            if address != os.environ.get(variable) and not known.has(address):
                raise InputError(
                    f"{self.path} names the {what} {address}, which you have not named yet",
                    fix=f"export {variable}={address} if you trust it, or take {key} out of its {layout.CONFIG}",
                )

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint. Raises InputError where there is none yet."""
        found = layout.newest(self.checkpoints)
        if found is None:
            raise InputError(
                f"{self.path} has no checkpoint yet", fix="wait for checkpoint.every steps, or resume the run"
            )
        return found


def note_named(settings: schema.RunConfig) -> None:
    """Remember the servers that a configuration of this user's names, for :meth:`RunDirectory.check_own`."""
    for address, *_ in _named(settings):
        known.note(address)


def _named(settings: schema.RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """The servers of a configuration: address, what it is of, the variable and the key that name it."""
    uri, address = settings.tracking.uri, settings.launch.address
    if settings.tracking.mlflow and uri is not None and store.sqlite_path(uri) is None:
        yield uri, "MLflow server", "MLFLOW_TRACKING_URI", "tracking.uri"
    if address is not None and address != "auto":  # which is on this machine
        yield address, "Ray cluster", "RAY_ADDRESS", "launch.address"


def start_of(init: str) -> RunDirectory:
    """The run that ``train.init`` names. Raises InputError where there is none."""
    run = RunDirectory(Path(init))
    if not run.exists:
        raise InputError(f"train.init is {init!r}", expected="teacher, random, or the directory of a run")
    return run


def dump(settings: config.Settings, leave_out: Set[str] = frozenset()) -> str:
    """The configuration as YAML that loads to the same configuration, but for the first keys to ``leave_out``."""
    plain = settings.model_dump(mode="json", exclude=set(leave_out))
    return yaml.dump(plain, Dumper=DUMPER, sort_keys=False, allow_unicode=True)


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
