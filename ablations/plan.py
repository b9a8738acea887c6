"""From a study to its trials: what is done, what is begun, what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ablations.fingerprint import fingerprint, planned, unused
from ablations.ledger import Ledger, TrialRecord, key_of
from ablations.study import Arm, Resources, Study
from twinrl.run import layout
from twinrl.training.assembly import load_source
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

DEFAULT_ROOT = Path("runs/ablations")
LEDGER_NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Workspace:
    """Where studies keep what they make.

    Run directories are shared by all studies of a workspace, one folder for each fingerprint, so that a common arm
    is one run, and changed code never continues or overwrites a run of older code.

    Attributes:
        root: folder of run directories, logs and, unless named otherwise, the ledger and the MLflow store.
        ledgers: files or folders to read; the first is written. Empty: ``ledger.jsonl`` in ``root``.
    """

    root: Path = DEFAULT_ROOT
    ledgers: tuple[Path, ...] = ()

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger."""
        return Ledger(*(self.ledgers or (self.root / LEDGER_NAME,)))

    def study_folder(self, study: Study) -> Path:
        """Configurations and outputs of a study's trials."""
        return self.root / "studies" / study.name


@dataclass(frozen=True)
class Trial:
    """One arm with one seed, ready to be run.

    Attributes:
        arm: name of the arm. levels: its factor levels.
        settings: the whole configuration, with seed, threads, device and folder. config_hash: its hash.
        fingerprint: what else decides its numbers.
        unused: parts of twinrl that do not. sources: hash of the others, as the fingerprint found them.
    """

    arm: str
    levels: Mapping[str, str]
    settings: RunConfig
    config_hash: str
    fingerprint: str
    unused: tuple[str, ...]
    sources: str

    @property
    def title(self) -> str:
        """Arm and seed, for people and file names."""
        return f"{self.arm} s{self.settings.seed}"

    @property
    def key(self) -> str:
        """As in the ledger."""
        return key_of(self.config_hash, self.settings.seed, self.fingerprint)

    @property
    def run(self) -> RunDirectory:
        """Its run directory."""
        own = self.settings
        return RunDirectory(own.run.dir / layout.folder_name(own.name, self.config_hash, own.seed))

    def seeded(self, seed: int) -> "Trial":
        """The arm's trial with another seed, which neither hash nor fingerprint depend on."""
        return replace(self, settings=self.settings.model_copy(update={"seed": seed}))


@dataclass(frozen=True)
class Plan:
    """A study's trials with what the ledger knows about them.

    Attributes:
        study: the study. workspace: where it lives.
        trials: every arm with every seed, seed by seed, so that an interrupted study has complete seeds first.
        records: key → record, of all ledgers.
    """

    study: Study
    workspace: Workspace
    trials: list[Trial]
    records: Mapping[str, TrialRecord] = field(default_factory=dict)

    def record(self, trial: Trial) -> TrialRecord | None:
        """The outcome of a trial, if it needs no further running."""
        found = self.records.get(trial.key)
        return found if found is not None and self.counts(found) else None

    def counts(self, record: TrialRecord) -> bool:
        """Whether a record is an outcome for this study; a pruned one is where the study prunes."""
        return record.final or (record.status == "pruned" and self.study.config.stop.kind == "asha")

    @property
    def missing(self) -> list[Trial]:
        """Trials that still have to run, in order."""
        return [trial for trial in self.trials if self.record(trial) is None]

    def state(self, trial: Trial) -> str:
        """finished, stopped, diverged, pruned; else begun, failed or missing."""
        if (record := self.record(trial)) is not None:
            return record.status
        failed = trial.key in self.records
        return "failed" if failed else "begun" if trial.run.exists else "missing"

    def reread(self) -> "Plan":
        """The same trials after the ledger has grown."""
        return replace(self, records=self.workspace.ledger.read())


def make(study: Study, workspace: Workspace) -> Plan:
    """The plan of a study. Loads its data (for the content's hash), which the first time may build them."""
    first, *others = study.config.seeds
    trials = [trial_of(arm, first, study.config.resources, workspace) for arm in study.arms]
    trials += [trial.seeded(seed) for seed in others for trial in trials[: len(study.arms)]]
    return Plan(study, workspace, trials, workspace.ledger.read())


def trial_of(arm: Arm, seed: int, resources: Resources, workspace: Workspace) -> Trial:
    """The trial of an arm and a seed on this study's resources."""
    settings = arm.settings
    device = settings.machine.device
    if device == "auto":
        device = "cuda" if resources.gpus else "cpu"
    machine = settings.machine.model_copy(update={"device": device, "threads": resources.cpus})
    tracking = settings.tracking.model_copy(update={"mlflow": False})  # the study publishes, with its own tags
    settings = settings.model_copy(update={"seed": seed, "machine": machine, "tracking": tracking})
    found = fingerprint(settings, content_hash(settings), resources.workers)
    parts = unused(settings, resources.workers)
    place = settings.run.model_copy(update={"dir": workspace.root / found[:8]})
    settings = settings.model_copy(update={"run": place})
    return Trial(arm.name, arm.levels, settings, arm.hash, found, parts, planned(parts))


_HASHES: dict[tuple[str, ...], str] = {}


def content_hash(settings: RunConfig) -> str:
    """Hash of the content of a configuration's data; loading it takes seconds, so once for each data set."""
    key = (settings.data.source, str(settings.data.place), str(settings.model.path))
    if key not in _HASHES:
        _HASHES[key] = load_source(settings, torch.device("cpu")).content_hash
    return _HASHES[key]
