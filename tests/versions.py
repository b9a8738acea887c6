"""Fixtures of this version, from which every later one must go on.

    make release            # that is: python -m tests.versions

writes ``tests/golden/versions/<version>/``: a small study's ledger and one of its run directories as a kill leaves it,
with the whole log of the run. It notes the digests of this version's sources in ``ablations/releases.yaml`` beside
those of the version before, as the two give the same numbers. ``--numbers-changed`` says that they do not: the trials
that older versions have finished are then no longer this one's. Exit code 1 where that is not said and the fixtures'
runs differ.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import twinrl
from ablations import fingerprint, runner
from ablations import plan as plans
from ablations import study as studies
from ablations.plan import Plan, Workspace
from ablations.trial import record
from tests import logs
from tests.ablations.tiny import without_figures
from tests.fake_source import register
from twinrl.commands.train import train
from twinrl.config import Settings

ROOT = Path(__file__).parents[1]
VERSIONS = ROOT / "tests" / "golden" / "versions"
STUDY, LEDGER, LATER_KEYS, WORK = "study.yaml", "ledger.jsonl", "later_keys.yaml", Path("work")
HEAD = "# Releases that give the same numbers, with digests of their sources. Written by `make release`.\n"
KEPT = 4
"""Steps of the checkpoint that a fixture's run goes on from."""
SMALL = {
    "base": "twinflow",
    "set": {
        "train": {"steps": 8, "batch": 16, "precision": "float64"},
        "model.network": {"kind": "mlp", "width": 8, "depth": 1, "condition_width": 8},
        "checkpoint": {"every": KEPT, "keep": 9},
        "evaluation": {
            "every": 4, "n": 20, "nfe": [1], "teacher_steps": 1, "velocity_rows": 5, "grid_samples": 1,
        },
    },
    "factors": {"rate": {"small": {"optim.lr": 1e-4}, "large": {"optim.lr": 3e-3}}},
}  # fmt: skip


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Data of a fixture's study are the fake source's, and its runs draw no figures."""
    register(patch)
    without_figures(patch)
    patch.setattr(plans, "_HASHES", {})


def plan_of(fixture: Path, root: Path = WORK) -> Plan:
    """The plan of a fixture's study with its ledger, run directories under ``root``."""
    return plans.make(studies.load(str(fixture / STUDY)), Workspace(root, (fixture / LEDGER,)))


def write(fixture: Path) -> None:
    """Train the study and keep what a later version needs. Run directories are relative to the working folder."""
    fixture.mkdir(parents=True)
    (fixture / STUDY).write_text(yaml.safe_dump(SMALL, sort_keys=False))
    plan = plan_of(fixture)
    for trial in plan.trials:
        train(trial.settings, True, Console(quiet=True))
        made = record(runner.task_of(trial, plan))
        where = {key: made.where[key] for key in ("revision", "at")}
        plan.workspace.ledger.append(replace(made, where=where))
    run = plan.trials[0].run
    for name in ("config.yaml", "env.json", "events.jsonl", "log.jsonl"):
        if (run.path / name).exists():
            target = fixture / run.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.path / name, target)
    checkpoint = f"checkpoints/step-{KEPT:08d}"
    shutil.copytree(run.path / checkpoint, fixture / run.path / checkpoint)


def run_of(fixture: Path) -> Path:
    """The run directory that a fixture holds."""
    (kept,) = (fixture / WORK).glob("*/*")
    return kept


def settings_classes(base: type[Settings] = Settings) -> Iterator[type[Settings]]:
    """Every class of settings that is imported."""
    for inner in base.__subclasses__():
        yield inner
        yield from settings_classes(inner)


def later_keys() -> dict[str, object]:
    """``Class.key`` → what its absence stands for, of all keys that came after the first ones."""
    keys = {
        f"{cls.__qualname__}.{key}": absent for cls in settings_classes() for key, absent in cls.later_keys().items()
    }
    return dict(sorted(keys.items()))


def differing(one: Path, other: Path) -> str:
    """The first number in which two logs of the same run differ by more than rounding; empty where none does.

    In float64 and over eight steps, a number that is not its own is off by far more than one part in a million.
    """
    rows, others = logs.rows(one), logs.rows(other)
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        return "steps"
    for row, like in zip(rows, others, strict=True):
        for name in sorted(row.keys() & like.keys()):
            same = row[name] == like[name]
            if not same and not math.isclose(float(row[name]), float(like[name]), rel_tol=1e-6, abs_tol=1e-6):
                return f"{name} at step {row['step']}: {row[name]} and {like[name]}"
    return ""


def make(fixture: Path) -> None:
    """A fixture of this version, in the place of an older one."""
    shutil.rmtree(fixture, ignore_errors=True)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chdir(folder)
        try:
            prepare(patch)
            write(fixture)
        finally:
            os.chdir(here)
    (fixture / LATER_KEYS).write_text(yaml.safe_dump(later_keys(), sort_keys=False))


def release(version: str, numbers_changed: bool, versions: Path = VERSIONS) -> str:
    """Notes the digests and makes the fixture; says why they are not noted after all, or nothing."""
    before = fingerprint.RELEASES.read_text()
    groups = [{name: known[name] for name in known if name != version} for known in fingerprint.releases_by_numbers()]
    groups = [group for group in groups if group]
    last = list(groups[-1])[-1]
    if numbers_changed:
        groups.append({})
    groups[-1][version] = fingerprint.digests()
    fingerprint.RELEASES.write_text(HEAD + yaml.safe_dump(groups, sort_keys=False))
    make(versions / version)
    found = "" if numbers_changed else differing(run_of(versions / last), run_of(versions / version))
    if found:
        fingerprint.RELEASES.write_text(before)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers-changed", action="store_true", help="trials of older versions are to be made again")
    if found := release(twinrl.__version__, parser.parse_args().numbers_changed):
        print(f"numbers have changed: {found}; fix: mend that, or say --numbers-changed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
