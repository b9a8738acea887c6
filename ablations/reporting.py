"""A study's report: what the analysis is told of the study, and what is said of the pages that it writes."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ablations import margin as margins
from ablations import versions
from ablations.plan import Plan
from twinrl.config.errors import InputError
from twinrl.machine import files

if TYPE_CHECKING:
    from analysis.frames import StudyFrame

PICTURE = "figures/norms.svg"
IMPORTED = ("analysis.report", "pandas", "matplotlib.figure", "matplotlib.backends.backend_svg", "scipy.stats",
            "statsmodels.regression.linear_model")  # fmt: skip
"""What a report imports, most of it where it is first used."""


@dataclass(frozen=True)
class Report:
    """A report that has been written.

    Attributes:
        page: as HTML. version: which trials it is about, and how many are missing.
        answer: what the study has found, in one sentence.
    """

    page: Path
    version: versions.Version
    answer: str

    @property
    def picture(self) -> Path | None:
        """Gradient norms by arm; None where no run has logged any."""
        path = self.page.parent / PICTURE
        return path if path.is_file() else None


def prepare() -> None:
    """Import what :func:`write` needs, which takes seconds; for a thread while trials run."""
    for name in IMPORTED:
        importlib.import_module(name)


def write(
    plan: Plan,
    again: str,
    base: str | None = None,
    out: Path | None = None,
    interactions: Sequence[tuple[str, str]] = (),
) -> Report:
    """Write the report of what is finished.

    Arguments:
        plan: of the study. again: command that runs it. base: arm that the others are compared with.
        out: folder of the report; default: in the study's. interactions: pairs of factors that are asked about.

    Raises:
        InputError: no trial is finished, the trials can't be compared, or the folder can't be written.
    """
    from analysis.report import report

    version = _finished(plan, again)
    index = index_of(plan, version, base)
    if out is None:
        write_index(plan, index)
    folder = out or plan.workspace.study_folder(plan.study) / "report"
    made = report(plan.workspace.root, folder, base=base, index=index, interactions=interactions)
    return Report(made.page, version, made.answer)


def frame(plan: Plan, again: str) -> "StudyFrame":
    """The finished trials as a table; arguments and errors as for :func:`write`."""
    from analysis.frames import load_study

    return load_study(plan.workspace.root, index=index_of(plan, _finished(plan, again), None))


def _finished(plan: Plan, again: str) -> versions.Version:
    """The version whose trials are shown. Raises InputError where none is finished."""
    version = versions.to_report(plan)
    if version.missing == len(plan.trials):
        raise InputError(f"study {plan.study.name} has no finished trial", fix=again)
    return version


def write_index(plan: Plan, index: Mapping[str, object] | None = None) -> None:
    """Write the study's index into its folder, so that ``twinrl analyze`` knows its factors there.

    Raises:
        InputError: the workspace can't be written.
    """
    from analysis.index import STUDY_FILE

    folder = plan.workspace.study_folder(plan.study)
    index = index or index_of(plan, versions.to_report(plan), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / STUDY_FILE, json.dumps({**index, "runs": "../.."}, indent=1))
    except OSError as error:
        raise InputError(
            f"the workspace {plan.workspace.root} can't be written", got=error.strerror,
            fix="mend its rights; `ablate report --out FOLDER` writes elsewhere",
        ) from error  # fmt: skip


def index_of(plan: Plan, version: versions.Version, base: str | None) -> dict[str, object]:
    """What the analysis is told of a study: its question, its arms, the critical learning rates that are known."""
    study, arms = plan.study, {trial.arm: trial for trial in plan.trials}
    search = margins.Search(margins.fifo(study), plan.workspace, lambda plan: (plan, []))
    return {
        "name": study.name,
        "question": study.config.question,
        "note": version.note,
        "metric": study.config.metric,
        "base": base,
        "seeds": list(study.config.seeds),
        "arms": [
            {
                "name": arm,
                "config_hash": trial.config_hash,
                "levels": dict(trial.levels),
                "steps": trial.settings.train.steps,
                "fingerprint": version.fingerprints[trial.config_hash],
            }
            for arm, trial in arms.items()
        ],
        "critical": [
            {"arm": found.arm, "seed": found.seed, "healthy": found.healthy, "diverged": found.diverged}
            for found in search.known()
        ],
    }
