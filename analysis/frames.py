"""Runs and studies as tidy tables.

A *run* is its log, one row a step (:func:`load_run`). A *study* is one row a trial (:func:`load_study`), with

    arm, seed, config_hash      which trial
    status, step, planned       how it ended: steps made, steps asked for
    diverged, time, kind        whether it failed; at which step, else the steps it was watched
    after, recovered            its failure began in (after, time]; whether its last evaluation was not bad any more
    seconds, directory          cost, and where its files are (empty if they are gone)
    rollbacks                   how often it returned to a checkpoint; nan where its log is gone
    <metric with a slash>       last logged value, e.g. val/quality; nan where the run failed since
    <setting with a dot, or a factor's name>   level of each factor

A study is a folder of run directories, a ledger (``*.jsonl``), or both; a trial found in both is read from its run
directory. ``study.json`` in the folder names arms and levels, and may say where the runs are (``runs``, relative to
it): ``twinrl ablate run`` writes one into ``<root>/studies/<study>/``. Of the root of a single study that one counts.
Without it arms are told apart by their configurations, and factors are the settings that differ.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import ledger
from analysis.index import located
from analysis.margins import Critical, from_brackets
from twinrl.config.errors import InputError
from twinrl.run import layout, names, runlog
from twinrl.stability import verdict
from twinrl.stability.divergence import Diverged

if TYPE_CHECKING:
    import pandas as pd

BOOKKEEPING = ("name", "seed", "run", "tracking", "checkpoint", "machine", "launch", "fsdp")
RUN_NAME = re.compile(r"-(?P<hash>[0-9a-f]{8})-s(?P<seed>\d+)$")
HIGHER_IS_BETTER = ("accuracy", "precision", "recall", "density", "coverage", "score", "held_out_score", "reward")


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    Attributes:
        path: the directory. config: the resolved configuration, as nested plain values.
        result: how it ended; empty while it is unfinished.
        start: metrics of its start weights; None where they were not evaluated.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, path: Path, rows: list[dict[str, Any]], events: Sequence[dict[str, Any]] = ()) -> "Run":
        """What is known of a run without a directory: its log and events."""
        run = cls(path, {})
        vars(run).update(rows=rows, events=list(events))
        return run

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The log, one mapping a step; non-finite numbers as floats. Read when first asked for."""
        return layout.read_rows(self.path)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Lines of events.jsonl."""
        return layout.read_events(self.path)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """finished, stopped, diverged, or unfinished."""
        return str(self.result.get("status", "unfinished"))

    @property
    def config_hash(self) -> str:
        """From the directory's name; of a renamed directory, a digest of its configuration."""
        if named := hash_of(self.path):
            return named
        return hashlib.sha256(json.dumps(numeric(self.config), sort_keys=True, default=str).encode()).hexdigest()[:8]

    @property
    def lasting(self) -> list[dict[str, Any]]:
        """The rows that no rollback has taken back; verdicts are on these."""
        return runlog.surviving(self.rows, self.rows)

    def frame(self) -> "pd.DataFrame":
        """The log as a table."""
        import pandas as pd

        return pd.DataFrame.from_records(self.rows)


@dataclass(frozen=True)
class StudyFrame:
    """The trials of a study.

    Attributes:
        name: for headings. trials: the table described above, in the order of arms and seeds.
        factors: columns that hold factor levels. base: the arm that others are compared with.
        runs: index in ``trials`` → its run directory, for those that are still there.
        question: what the study is to answer; metric: what it ranks by; note: whose trials these are, where a
            reader must know; all may be empty.
        critical: critical learning rates by arm and seed, where they were searched for.
    """

    name: str
    trials: "pd.DataFrame"
    factors: tuple[str, ...]
    base: str
    runs: Mapping[int, Run] = field(default_factory=dict)
    question: str = ""
    metric: str = ""
    note: str = ""
    critical: tuple[Critical, ...] = ()

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in order."""
        return list(dict.fromkeys(self.trials["arm"]))

    def arm(self, name: str) -> "pd.DataFrame":
        """The trials of one arm."""
        return self.trials[self.trials["arm"] == name]

    @property
    def metrics(self) -> list[str]:
        """Metric columns."""
        return [name for name in self.trials.columns if "/" in str(name) and name not in self.factors]


# --- runs -------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    return layout.is_run(path) and (path / layout.LOG).is_file()


def load_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is none, or its log has no rows.
    """
    if not is_run(path):
        raise InputError(f"{path} is not a run directory", expected=f"a folder with {layout.CONFIG} and {layout.LOG}")
    with (path / layout.LOG).open("rb") as file:
        if not file.readline().endswith(b"\n"):
            raise InputError(f"the run {path} has no steps yet", fix="wait for its first checkpoint, or resume it")
    return Run(path, layout.read_config(path), layout.read_result(path) or {}, layout.read_start(path))


def hash_of(folder: Path) -> str:
    """The configuration's hash in a run directory's name; empty if it was renamed."""
    found = RUN_NAME.search(folder.resolve().name)
    return found["hash"] if found else ""


def numeric(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change a run's numbers, the seed left out."""
    return {key: value for key, value in config.items() if key not in BOOKKEEPING}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"optim.lr": …}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):  # an empty one says nothing that what it lacks does not
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def trial_of(run: Run) -> dict[str, Any]:
    """The run's line in a study's table, without arm and factors."""
    log = layout.read_columns(run.path, _tells)
    made = int(run.result.get("step", log.values["step"][-1]))
    events = layout.read_events(run.path) if run.status == "diverged" else []
    failure = verdict.of_columns(run.config, log, run.start, run.result, events)
    seconds = log.values.get(names.STEP_SECONDS, np.zeros(0))
    return {
        "seed": int(run.config.get("seed", 0)),
        "config_hash": run.config_hash,
        "status": run.status,
        "step": made,
        "planned": int((run.config.get("train") or {}).get("steps", made)),
        **ledger.failed(None if failure is None else vars(failure), made),
        "seconds": math.fsum(seconds[np.isfinite(seconds)].tolist()),
        "directory": str(run.path),
        "rollbacks": log.rollbacks,
    } | verdict.since(failure, log.last(names.is_outcome))


def _tells(name: str) -> bool:
    """Whether a study's table needs a series."""
    return names.is_outcome(name) or verdict.telling(name) or name == names.STEP_SECONDS


def run_divergence(run: Run) -> Diverged | None:
    """The run's failure, judged anew from its log (:mod:`twinrl.stability.verdict`); None if it is whole."""
    return verdict.verdict(run.config, run.rows, run.start, run.result, run.events)


# --- studies ----------------------------------------------------------------------------------------------


def load_study(path: Path, base: str | None = None, index: Mapping[str, Any] | None = None) -> StudyFrame:
    """Read a study from a folder or a ledger file.

    Arguments:
        path: as above. index: what ``study.json`` would say: ``name``, ``question``, ``note``, ``metric``, ``base`` and
            ``arms``, each with ``name``, ``config_hash`` and, where known, ``levels``, ``steps``, ``fingerprint``.
            Only trials of these arms (and fingerprints), and of ``seeds`` where it has them, are read.
            ``runs``: folder of the run directories, where that is another one.
            ``critical``: brackets of critical learning rates, as for :func:`analysis.margins.from_brackets`.
        base: the arm that others are compared with; default: the one that the index names, else an arm called
            ``base`` or ``start``, else the first.

    Raises:
        InputError: nothing is there, the runs follow different protocols, or ``base`` is no arm.
    """
    path, index = located(path) if index is None else (path, index)
    arms = {arm["config_hash"]: arm for arm in index.get("arms", [])}
    runs = [load_run(folder) for folder in run_folders(path) if _belongs(arms, hash_of(folder), folder.parent.name)]
    records = ledger.read(path, lambda config_hash, fingerprint: _belongs(arms, config_hash, fingerprint))
    if not runs and not records:
        raise InputError(f"{path} holds no trials of a study", expected="run directories or a ledger (*.jsonl)")
    check_comparable(runs)
    _check_unique(runs)
    seen = {(run.config_hash, int(run.config.get("seed", 0))) for run in runs}
    lines = [trial_of(run) for run in runs]
    lines += [record for record in records if (record["config_hash"], record["seed"]) not in seen]
    lines = [line for line in lines if line["seed"] in index.get("seeds", (line["seed"],))]
    if not lines:
        raise InputError(f"{path} has no trial of the study's seeds", expected=f"seeds {index['seeds']}")
    factors = _name_arms(lines, runs, index)
    return assemble(index.get("name") or path.resolve().stem, lines, factors, runs, base or index.get("base"), index)


def assemble(
    name: str,
    lines: list[dict[str, Any]],
    factors: Iterable[str],
    runs: Iterable[Run] = (),
    base: str | None = None,
    index: Mapping[str, Any] | None = None,
) -> StudyFrame:
    """A study from its trials' lines (with ``arm``); fills what is missing and orders by arm and seed."""
    import pandas as pd

    order = {arm: k for k, arm in enumerate(_arm_order(lines, index or {}))}
    lines = sorted(lines, key=lambda line: (order[line["arm"]], line["seed"]))
    trials = pd.DataFrame.from_records(lines)
    trials["planned"] = trials["planned"].fillna(trials["step"].max()).astype(int)
    directories = {str(run.path): run for run in runs}
    found = {k: directories[d] for k, d in enumerate(trials["directory"]) if d in directories}
    question, metric, note = (str((index or {}).get(key, "")) for key in ("question", "metric", "note"))
    critical = tuple(rate for rate in from_brackets((index or {}).get("critical", [])) if rate.arm in order)
    return StudyFrame(name, trials, tuple(factors), _base(list(order), base), found, question, metric, note, critical)


def _arm_order(lines: list[dict[str, Any]], index: Mapping[str, Any]) -> list[str]:
    present = dict.fromkeys(line["arm"] for line in lines)
    named = [arm["name"] for arm in index.get("arms", []) if arm["name"] in present]
    return named + [arm for arm in present if arm not in named]


def _base(arms: list[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in arms:
        raise InputError(f"the study has no arm {wanted}", expected=f"one of {', '.join(arms)}")
    return wanted or next((arm for arm in ("base", "start") if arm in arms), arms[0])


def run_folders(path: Path) -> list[Path]:
    """The run directories in ``path``, or one folder deeper; runs without a step yet are left out."""
    if not path.is_dir():
        return []
    folders = sorted({file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{layout.CONFIG}")})
    return [folder for folder in folders if is_run(folder) and (folder / layout.LOG).stat().st_size]


def siblings(run: Run) -> list[Run]:
    """The other seeds of a run's arm, in the same folder."""
    beside = (folder for folder in run_folders(run.path.resolve().parent) if hash_of(folder) == run.config_hash)
    return [load_run(folder) for folder in beside if folder.name != run.name]


def _belongs(arms: Mapping[str, Mapping[str, Any]], config_hash: str, fingerprint: str) -> bool:
    """Whether a trial is of one of the arms, made by the code that the arm's fingerprint (or its start) stands for."""
    if not arms:
        return True
    arm = arms.get(config_hash)
    wanted = None if arm is None else arm.get("fingerprint")
    return arm is not None and (wanted is None or str(wanted).startswith(fingerprint))


def _check_unique(runs: Iterable[Run]) -> None:
    """Raises InputError where one trial is there twice, e.g. made by two versions of the code."""
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        key = (run.config_hash, int(run.config.get("seed", 0)))
        if key in seen:
            raise InputError(
                f"the trial {run.name} is there twice", got=f"{seen[key]} and {run.path}",
                fix="analyze the folder of one of them, or give study.json fingerprints",
            )  # fmt: skip
        seen[key] = run.path


def _name_arms(lines: list[dict[str, Any]], runs: list[Run], index: Mapping[str, Any]) -> list[str]:
    """Give every line its arm and factor levels; returns the factors. Changes ``lines`` in place."""
    if index.get("arms"):
        return _arms_from_index(lines, index)
    settings = {run.config_hash: flatten(numeric(run.config)) for run in runs}
    varying = _varying(settings)
    titles = _titles(runs, settings, varying)
    for line in lines:
        flat = settings.get(line["config_hash"], {})
        line["arm"] = titles.get(line["config_hash"], line["config_hash"])
        line |= {key: _level(flat.get(key)) for key in varying if flat}
    return varying


def _level(value: Any) -> str:
    """A setting's value as a level; ``none`` where it is not there."""
    return "none" if value is None else str(value)


def _varying(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that differ between configurations; of several that always change together, the shortest key."""
    patterns: dict[tuple[int, ...], str] = {}
    for key in sorted({key for flat in settings.values() for key in flat}, key=lambda key: (len(key), key)):
        levels = [json.dumps(flat.get(key), sort_keys=True, default=str) for flat in settings.values()]
        first = {level: k for k, level in reversed(list(enumerate(levels)))}
        patterns.setdefault(tuple(first[level] for level in levels), key)
    return sorted(key for pattern, key in patterns.items() if any(pattern))


def _arms_from_index(lines: list[dict[str, Any]], index: Mapping[str, Any]) -> list[str]:
    arms = {arm["config_hash"]: arm for arm in index["arms"]}
    taken = {"arm", *(name for line in lines for name in line)}
    levels = {key: {_column(name, taken): level for name, level in arm.get("levels", {}).items()}
              for key, arm in arms.items()}  # fmt: skip
    for line in lines:
        arm = arms[line["config_hash"]]
        line |= {"arm": arm["name"], "planned": line.get("planned") or arm.get("steps")} | levels[line["config_hash"]]
    return list(dict.fromkeys(name for own in levels.values() for name in own))


def _column(factor: str, taken: Collection[str]) -> str:
    """The column of a factor's levels; one that is called ``arm``, say, must not take the arms' names away."""
    return f"{factor} (factor)" if factor in taken else factor


def _titles(runs: list[Run], settings: Mapping[str, Mapping[str, Any]], varying: list[str]) -> dict[str, str]:
    """Config hash → arm name: the runs' name if that tells arms apart, else the settings that do."""
    named = {run.config_hash: str(run.config.get("name", run.config_hash)) for run in runs}
    if len(set(named.values())) == len(named):
        return named
    if len(varying) <= 3:
        short = _shortened(varying)
        return {key: " ".join(f"{short[k]}={_level(flat.get(k))}" for k in varying) for key, flat in settings.items()}
    return {key: f"{name}-{key}" for key, name in named.items()}


def _shortened(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key → its last two parts, where that still tells the keys apart."""
    short = {key: ".".join(key.split(".")[-2:]) for key in keys}
    return short if len(set(short.values())) == len(short) else {key: key for key in keys}


def check_comparable(runs: Iterable[Run]) -> None:
    """Raises InputError where runs were judged by different protocols or on different data."""
    seen: dict[str, tuple[str, Run]] = {}
    for run in runs:
        evaluation = {k: v for k, v in (run.config.get("evaluation") or {}).items() if k != "every"}
        data = run.config.get("data") or {}
        protocol = {"evaluation": evaluation, "data.source": data.get("source"), "data.lab": data.get("lab")}
        for key, value in flatten(protocol).items():
            text = json.dumps(value, sort_keys=True, default=str)
            first, other = seen.setdefault(key, (text, run))
            if first != text:
                raise InputError(
                    f"the runs of this study were not judged alike: {key} is {first} in {other.name}",
                    got=f"{text} in {run.name}",
                    fix="analyze runs of one protocol, or evaluate them again under one",
                )


def higher_is_better(metric: str) -> bool:
    """Whether larger values of a metric are better, by the quantity in its name."""
    quantity = metric.split("/")[1] if "/" in metric else metric
    return re.sub(r"_\d+nfe$", "", quantity) in HIGHER_IS_BETTER
