"""The mutations, one after the other: a seed and a number decide each; what was tried is kept, so that it goes on.

$ python -m tests.fuzz --count 2000             # as `make campaign` does it; stopped and started again it goes on
$ python -m tests.fuzz --seed 3 --only run study
$ python -m tests.fuzz --again                  # what was found wrong, once more
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import targets, trying
from tests.fuzz.targets import TARGETS, Command, Target
from tests.fuzz.trying import Done
from twinrl.run.layout import METRICS

BUILDING_SECONDS = 1800
"""What a target may take to make: where no laboratory is in the cache, it is built."""


@dataclass(frozen=True)
class Tried:
    """One mutation and what came of it; ``wrong`` is empty where all was right."""

    number: int
    target: str
    file: str
    damage: str
    command: str
    rc: int | None
    seconds: float
    wrong: str


class Fuzzer:
    """Damages copies of targets and judges what commands make of them.

    Arguments:
        seed: with a mutation's number it decides all that is drawn.
        work: a folder for the targets and for the copy at hand.
        only: names of targets; all if empty.
    """

    def __init__(self, seed: int, work: Path, only: Sequence[str] = ()):
        self.seed, self.work = seed, work
        self.names = list(only or TARGETS)
        self._answers: dict[tuple[str, int], dict[str, object]] = {}
        work.mkdir(parents=True, exist_ok=True)

    def attempt(self, number: int) -> Tried:
        """The mutation of this number."""
        rng = Random(f"{self.seed}/{number}")
        (name,) = rng.choices(self.names, [TARGETS[name].share for name in self.names])
        target = TARGETS[name]
        which = rng.randrange(len(target.commands))
        command, expected = target.commands[which], self._expected(name, which)
        here = self._fresh(name)
        file, damage = targets.damage(target, here, rng)
        before = trying.photograph(here)
        done = self._run(command.words, target)
        after = trying.photograph(here)
        different = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        changed = [path for path in different if path in before or path not in done.err]  # a new report, named, is told
        tables = {path for path in changed if path.endswith(METRICS)}  # copies of logs
        changed = [path for path in changed if path not in tables | {table.rpartition("/")[0] for table in tables}]
        answers = {} if done.rc != 0 or _shows(command, file) else expected
        wrong = trying.wrong(done, changed, self._different(command, done, answers), command.may_end_badly)
        if done.rc is None and command.may_be_long and any(path.endswith("log.jsonl") for path in changed):
            wrong = ""
        return Tried(number, name, file, damage, " ".join(command.words), done.rc, round(done.seconds, 2), wrong)

    def _different(self, command: Command, done: Done, expected: dict[str, object]) -> dict[str, object]:
        """Facts that are not those of the undamaged folder."""
        if not expected:
            return {}
        try:
            told = command.answer(self._here, done.out)
        except (OSError, ValueError, KeyError) as error:
            return {f"no answer ({type(error).__name__}: {error})": None}
        return {name: told.get(name) for name, value in expected.items() if told.get(name) != value}

    def _expected(self, name: str, which: int) -> dict[str, object]:
        """What a command tells of the undamaged folder; what two tries tell differently, such as times, is no fact."""
        if (name, which) not in self._answers:
            target = TARGETS[name]
            command = target.commands[which]
            first, second = (self._told(name, target, command) for _ in range(2))
            facts = {fact: value for fact, value in first.items() if second.get(fact) == value}
            if command.answer is not targets.silence and not facts:
                raise AssertionError(f"`{' '.join(command.words)}` on {name} tells nothing")
            self._answers[name, which] = facts
        return self._answers[name, which]

    def _told(self, name: str, target: Target, command: Command) -> dict[str, object]:
        self._fresh(name)
        done = self._run(command.words, target)
        if done.rc != 0:
            said = f"`{' '.join(command.words)}` on the undamaged {name}"
            raise AssertionError(f"{said} ended with {done.rc}:\n{done.err}")
        return dict(command.answer(self._here, done.out))

    @property
    def _here(self) -> Path:
        return self.work / "here"

    def _fresh(self, name: str) -> Path:
        """A copy of the target, always in the same place: paths are facts, too."""
        base = self.work / "bases" / name.replace(" ", "-")
        if not base.exists():
            self._build(TARGETS[name], base)
        targets.remove(self._here)
        shutil.copytree(base, self._here, symlinks=True)
        return self._here

    def _build(self, target: Target, base: Path) -> None:
        targets.remove(self._here)
        self._here.mkdir()

        def command(*words: str) -> None:
            done = self._run(words, target, limits={}, seconds=BUILDING_SECONDS)
            if done.rc != 0:
                raise AssertionError(f"`{' '.join(words)}` ended with {done.rc}:\n{done.out}\n{done.err}")

        target.build(self._here, command)
        base.parent.mkdir(exist_ok=True)
        self._here.rename(base)

    def _run(self, words: Sequence[str], target: Target, **limits: Any) -> Done:
        environment = dict(target.environment or {})
        variables = {name: value.format(here=self._here) for name, value in environment.items()}
        prepare = partial(_prepared, words, target.fake, variables)
        return trying.run(words, self._here, self.work / "streams", prepare, **limits)


SPECIAL: dict[tuple[str, ...], Callable[[], None]] = {
    ("ablate", "fuzz-study"): targets.train_study,
    ("build-pipeline",): targets.save_pipeline,
    ("copy-lab",): targets.copy_lab,
    ("write-config",): targets.write_config,
}
"""Words that are no command of twinrl: what builds a target."""


def _save_nothing(figure: Any, file: Any, **options: Any) -> None:
    """Stands for a figure's ``savefig``, which takes most of a report's time."""
    file.write(b"<svg/>") if hasattr(file, "write") else Path(file).write_text("<svg/>")


def _prepared(words: Sequence[str], fake: bool, variables: dict[str, str]) -> None:
    """In the fork, before the command: data that load at once, no figures, no network."""
    import pytest
    from matplotlib.figure import Figure

    from tests.ablations.tiny import without_figures
    from tests.fake_source import register

    os.environ.update(variables, HF_HUB_OFFLINE="1")
    patch = pytest.MonkeyPatch()
    if fake:
        register(patch)
    without_figures(patch)
    patch.setattr(Figure, "savefig", _save_nothing)
    if special := SPECIAL.get(tuple(words)):
        special()
        raise SystemExit(0)


def _shows(command: Command, file: str) -> bool:
    return any(targets.fnmatch(file, pattern) for pattern in command.shown)


IMPORTED = (
    "pytest", "yaml", "scipy.stats", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "PIL.Image", "safetensors.torch",
    "torch._dynamo", "diffusers", "transformers", "sklearn.metrics", "lifelines", "statsmodels.api",
    "analysis.report", "analysis.cli", "ablations.cli", "ablations.commands", "ablations.publish", "ablations.trial",
    "twinrl.commands.processes", "twinrl.commands.train", "twinrl.commands.inspect", "twinrl.commands.replay",
    "twinrl.commands.data", "twinrl.commands.doctor", "twinrl.commands.simulate", "twinrl.evaluation.grids",
    "twinrl.evaluation.figures", "twinrl.training.schema", "twinrl.training.opened", "twinrl.data.prepared",
    "tests.ablations.tiny", "tests.fake_source", "tests.backends.families.made", "twinrl.lab",
    "twinrl.tracking.mlflow_view", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "alembic.util", "peft",
    "twinrl.commands.export",
)  # fmt: skip


def load_everything() -> None:
    """Imports that every fork would make again otherwise."""
    import importlib

    from twinrl.machine.compat import ensure_torchvision

    ensure_torchvision()
    for name in IMPORTED:
        importlib.import_module(name)
    from twinrl.backends.families import family_class

    family_class("sd3").TOKENS = 32  # texts are short here


# --- many -------------------------------------------------------------------------------------------------


def known(path: Path) -> list[Tried]:
    """What was tried before."""
    return [Tried(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def tries(fuzzer: Fuzzer, numbers: Sequence[int], keep: Path, found: dict[int, Tried]) -> Iterator[Tried]:
    """Try these mutations; each is noted in ``keep`` as soon as it is done, what is wrong in ``found``."""
    began = time.monotonic()
    keep.parent.mkdir(parents=True, exist_ok=True)
    for done, number in enumerate(numbers, 1):
        tried = fuzzer.attempt(number)
        with keep.open("a") as file:
            file.write(json.dumps(asdict(tried)) + "\n")
        if tried.wrong:
            found[number] = tried
            print(told(tried), flush=True)
        if done % 50 == 0:
            print(f"[{done}/{len(numbers)}] {len(found)} found, {time.monotonic() - began:.0f} s", flush=True)
        yield tried


def told(tried: Tried) -> str:
    """A line of the list of findings."""
    return f"{tried.number:5} {tried.target}: {tried.file}: {tried.damage}; `{tried.command}`: {tried.wrong}"


def main(seed: int, count: int, work: Path, only: Sequence[str], again: bool, seconds: float | None) -> int:
    """Try what has not been tried yet, print what is wrong; 1 if anything is."""
    load_everything()
    keep = work / f"seed-{seed}.jsonl"
    before = {tried.number: tried for tried in known(keep)}
    numbers = [number for number in range(count) if number not in before]
    if again:
        numbers = [number for number, tried in before.items() if tried.wrong]
    fuzzer, began = Fuzzer(seed, work, only), time.monotonic()
    findings = {} if again else {number: tried for number, tried in before.items() if tried.wrong}

    for _ in tries(fuzzer, numbers, keep, findings):
        if seconds and time.monotonic() - began > seconds:
            print(f"stopped after {seconds:g} s; the same command goes on", file=sys.stderr)
            break
    print(f"{len(known(keep))} mutations tried with seed {seed}, {len(findings)} wrong")
    return 1 if findings else 0
