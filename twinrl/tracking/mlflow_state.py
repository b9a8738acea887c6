"""``mlflow.json``: which MLflow run shows a run directory, and how far the log is published there."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from twinrl.config import stored
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run.layout import MLFLOW

FINGERPRINT_BYTES = 4096


@dataclass
class ViewState:
    """The bookkeeping of one run directory, written to disk by the methods that change what MLflow has of it.

    Attributes:
        folder: the run directory.
        experiment: name of the MLflow experiment.
        tags: the caller's tags, kept for later publications.
        total: planned iterations, which fix the widths of the thinning; 0 if not known yet.
        key: tag of the MLflow run by which it is found again if a crash lost its id.
        asked_for: URI of the store that a caller asked for; None for the default.
        store: URI of the store that the fields below speak of.
        run_id: the MLflow run; None before it is made.
        superseded: an MLflow run to be deleted, which this one replaces.
        published: bytes of the log that are certainly in MLflow.
        claimed: bytes of the log that may be in MLflow.
        claim: fingerprint of the log's last rows before ``claimed``.
        home: where the run directory was when this was written; None in those of older versions.
        later: keys of a later version, kept as they are.
    """

    folder: Path
    experiment: str = "twinrl"
    tags: dict[str, str] = field(default_factory=dict)
    total: NonNegativeInt = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked_for: str | None = None
    store: str | None = None
    run_id: str | None = None
    superseded: str | None = None
    published: NonNegativeInt = 0
    claimed: NonNegativeInt = 0
    claim: str = ""
    home: str | None = None
    later: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "ViewState":
        """The state of a run directory; a fresh one, not yet written, if there is none.

        Raises:
            InputError: ``mlflow.json`` is not one that this module wrote.
        """
        path, fix = folder / MLFLOW, "delete it and publish again"
        try:
            content = stored.read(path, dict[str, Any], fix)
        except FileNotFoundError:
            return cls(folder)
        content.pop("status", None)  # of older versions
        known = {name: content.pop(name) for name in KEYS if name in content}
        if lacking := [name for name in KEYS if name not in known and name != "home"]:
            raise InputError(f"{path} is damaged", got=f"no {lacking[0]}", fix=fix)
        plain = {**known, "folder": "", "later": content}
        state: ViewState = stored.parse(json.dumps(plain).encode(), cls, str(path), fix)
        state.folder = folder
        if state.published > state.claimed:
            raise InputError(f"{path} is damaged", got=f"published {state.published}, claimed {state.claimed}", fix=fix)
        return state

    @property
    def here(self) -> str:
        """Where the run directory is."""
        return str(self.folder.resolve())

    def save(self) -> None:
        """Write the state in one move, if it is another than what is there."""
        self.home = self.here
        content = {name: getattr(self, name) for name in KEYS} | self.later
        path, text = self.folder / MLFLOW, json.dumps(content, indent=1) + "\n"
        if not path.is_file() or path.read_bytes() != text.encode():
            files.write_text(path, text)

    def aim(self, store: str, experiment: str | None, tags: Mapping[str, str], total: int) -> None:
        """Set where to publish and what to call it; another store or experiment means another MLflow run.

        ``total`` counts only while nothing is published, because the widths of the thinning must not change.
        """
        experiment = experiment or self.experiment
        if (self.store, self.experiment) != (store, experiment):
            self.start_over(store == self.store)
        self.store, self.experiment = store, experiment
        self.tags |= tags
        self.total = self.total if self.published and self.total else total
        self.save()

    def start_over(self, replaces: bool = True) -> None:
        """Ask for a new MLflow run, not yet on disk; if it ``replaces`` the present one, that will be deleted."""
        self.superseded = (self.run_id or self.superseded) if replaces else None
        self.key, self.run_id = uuid.uuid4().hex, None
        self.published = self.claimed = 0

    def attach(self, run_id: str, fresh: bool) -> None:
        """Publish to ``run_id`` from now on; a ``fresh`` run holds nothing yet."""
        self.run_id, self.superseded = run_id, None
        if fresh:
            self.published = self.claimed = 0
        self.save()

    def fits(self, log: Path) -> bool:
        """Whether the log still begins with what may have been published."""
        return self.claimed == 0 or fingerprint(log, self.claimed) == self.claim

    def announce(self, log: Path, offset: int) -> None:
        """Note, before sending them, that the rows up to ``offset`` may be in MLflow."""
        if offset > self.claimed:
            self.claimed, self.claim = offset, fingerprint(log, offset)
            self.save()

    def advance(self, offset: int) -> None:
        """Note that the rows up to ``offset`` are in MLflow."""
        if offset > self.published:
            self.published = offset
            self.save()


KEYS = [each.name for each in fields(ViewState) if each.name not in ("folder", "later")]
"""What the file has; no version has written it without one of these, but for ``home``."""


def fingerprint(log: Path, offset: int) -> str:
    """Hash of the last few kilobytes before ``offset``; empty if the log is missing or shorter than that."""
    try:
        with log.open("rb") as file:
            start = file.seek(max(0, offset - FINGERPRINT_BYTES))
            content = file.read(offset - start)
    except FileNotFoundError:
        return ""
    complete = start + len(content) == offset
    return hashlib.blake2b(content, digest_size=16).hexdigest() if complete else ""
