"""Studies from Python: what ``twinrl ablate`` does, as one object. ``twinrl.study`` is :func:`study`."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ablations import commands, reporting
from ablations import study as studies
from ablations.cli import ROOT
from ablations.plan import Plan
from ablations.reporting import Report

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StudyRuns:
    """A study, its trials and its report.

    Attributes:
        name: a study's YAML file, or a shipped study's name.
        root: folder of run directories, ledger and MLflow store.
        seeds: seeds 0 to N−1 instead of the file's.
    """

    name: str
    root: Path = ROOT
    seeds: int | None = None

    @property
    def plan(self) -> Plan:
        """Arms and trials, and what is done. Raises InputError."""
        return commands.planned(self.name, self.seeds, self.root, None)

    def run(self, cpus: int | None = None, address: str | None = None, mlflow: bool = False) -> None:
        """Run what is missing, with a table of the trials.

        Arguments:
            cpus: cores to use on this machine; None: all. address: of a Ray cluster to join.
            mlflow: show trials in MLflow.

        Raises:
            RuntimeError: trials have failed; which, is printed.
        """
        code = commands.run(self.name, self.seeds, self.root, None, address, cpus, mlflow, None, report=False)
        if code == commands.FAILED:
            raise RuntimeError(f"trials of {self.name} have failed; the reasons are printed above")

    def report(self, base: str | None = None) -> Report:
        """Write the report: its page, its picture and the answer in one sentence.

        Arguments:
            base: arm that the others are compared with.

        Raises:
            InputError: no trial is finished.
        """
        return reporting.write(self.plan, commands.again(self.name), base)

    @property
    def frame(self) -> "pd.DataFrame":
        """One row a finished trial: arm, levels, seed, how it ended, last values. Raises InputError without one."""
        return reporting.frame(self.plan, commands.again(self.name)).trials


def study(name: "str | PathLike[str]", root: "str | PathLike[str]" = ROOT, seeds: int | None = None) -> StudyRuns:
    """A study by its YAML file or a shipped study's name; arguments as in :class:`StudyRuns`. Raises InputError."""
    studies.load(str(name), seeds)
    return StudyRuns(str(name), Path(root), seeds)
