"""What a trial takes beside its steps, part by part, of this checkout and of others in turn.

    python benchmarks/trial.py [--against FOLDER] [--preset lab] [--steps 20] [--rounds 3] [--study 20]

Each round trains the preset for a few steps in a new process of each checkout, one after the other. Functions at the
borders of the parts are clocked; a part's time is without the parts inside it. *rest*: checkpoint, figures' data, start
and end of the process. One untimed run of each fills the cache: a laboratory is used more than once. ``--study N`` also
times ``twinrl ablate run`` of the shipped example with N steps a trial, by the clock: on an idle machine alone.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PARTS = ("import", "load", "first picture", "steps", "validation", "final table", "pictures", "publish", "rest")
LAST = "twinrl.commands.processes"
"""When it is imported, everything that has a border is."""
OUTSIDE = "steps"
"""The part that the others are beside."""
BORDERS = {
    "load": ("twinrl.training.assembly:load_source",),
    "first picture": ("twinrl.commands.train:_trainer",),
    "steps": ("twinrl.training.trainer:Trainer.train_step",),
    "validation": ("twinrl.training.pictures:Validator.__call__",),
    "final table": ("twinrl.training.laboratory:Laboratory.final",),
    "pictures": ("twinrl.training.pictures:save_final",),
    "publish": (
        "twinrl.commands.train:_view",
        "twinrl.tracking.mlflow_view:MLflowView.publish_through",
        "twinrl.tracking.mlflow_view:MLflowView.close",
    ),
}
"""Part → functions, ``module:name``, that it begins and ends with; both checkouts have them."""


# --- the clocked process; nothing of twinrl is imported before its clock runs --------------------------------


class Clock:
    """CPU seconds of this process by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.parts, self.since = ["import"], 0.0

    def switch(self, part: str | None) -> None:
        """Enter ``part``, or leave the present one."""
        now = time.process_time()
        self.spent[self.parts[-1]] += now - self.since
        self.since = now
        if part is None:
            self.parts.pop()
        else:
            self.parts.append(part)

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, clocked as ``part``."""

        @functools.wraps(function)
        def clocked(*args: Any, **options: Any) -> Any:
            self.switch(part)
            try:
                return function(*args, **options)
            finally:
                self.switch(None)

        return clocked


class Border:
    """Finds the last module that ``twinrl train`` imports, as usual, and lets ``then`` follow its import."""

    def __init__(self, then: Callable[[], None]):
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != LAST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module
        loader.exec_module = lambda module: (run(module), self.then())
        return spec


def child(out: Path, arguments: list[str]) -> None:
    """``twinrl train`` with its parts clocked; writes them to ``out``."""
    clock = Clock()

    def divide() -> None:
        for part, borders in BORDERS.items():
            for border in borders:
                module, name = border.split(":")
                holder: Any = importlib.import_module(module)
                *inside, last = name.split(".")
                for each in inside:
                    holder = getattr(holder, each)
                setattr(holder, last, clock.around(part, getattr(holder, last)))
        clock.switch("rest")

    sys.meta_path.insert(0, Border(divide))
    from twinrl.cli import main as twinrl

    sys.argv = ["twinrl", "train", *arguments]
    try:
        twinrl()
    finally:
        clock.switch(None)
        out.write_text(json.dumps(clock.spent))


# --- measuring ----------------------------------------------------------------------------------------------


def spawned(checkout: Path, command: Sequence[str], folder: Path) -> float:
    """CPU seconds of a process of a checkout and of all that it starts."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "120"}
    before = os.times()
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def trial(checkout: Path, arguments: list[str]) -> tuple[dict[str, float], Any]:
    """CPU seconds by part of one run, and its final table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [__file__, "--child", "parts.json", *arguments, f"run.dir={folder / 'runs'}"]
        whole = spawned(checkout, command, folder)
        parts = json.loads((folder / "parts.json").read_text())
        (result,) = (folder / "runs").glob("*/result.json")
        parts["rest"] = whole - sum(seconds for part, seconds in parts.items() if part != "rest")
        return parts, json.loads(result.read_text()).get("table")


def study(checkout: Path, steps: int) -> float:
    """Seconds of the example study with ``steps`` steps a trial; by the clock, for Ray's workers are no children."""
    import yaml

    example = yaml.safe_load((HERE / "ablations" / "studies" / "example.yaml").read_text())
    example["set"] |= {"train.steps": steps, "evaluation.every": max(1, steps // 2)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "example.yaml").write_text(yaml.safe_dump(example))
        began = time.monotonic()
        spawned(checkout, ["-m", "twinrl", "ablate", "run", "example.yaml", "--root", "runs"], folder)
        return time.monotonic() - began


def measure(checkouts: Sequence[Path], arguments: list[str], rounds: int) -> tuple[list[dict[str, list[float]]], bool]:
    """Seconds by part and checkout over rounds, and whether all final tables are the same to the bit."""
    spent: list[dict[str, list[float]]] = [defaultdict(list) for _ in checkouts]
    tables = []
    for number in range(rounds + 1):
        for seconds, checkout in zip(spent, checkouts, strict=True):
            parts, table = trial(checkout, arguments)
            tables.append(table)
            for part in PARTS if number else ():
                seconds[part].append(parts.get(part, 0.0))
    return spent, all(table == tables[0] for table in tables)


# --- output -------------------------------------------------------------------------------------------------


def summary(spent: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The least of each part over rounds, which other processes disturb least, and what is beside the steps."""
    least = {part: min(spent[part]) for part in PARTS}
    return least | {"beside the steps": sum(least.values()) - least[OUTSIDE]}


def table(results: Mapping[str, Mapping[str, float]], result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    import measuring

    lines = [*(part for part in PARTS if part != OUTSIDE), "beside the steps"]
    rows = [[line, *(f"{seconds[line]:.2f}" for seconds in results.values())] for line in lines]
    if result["study"]:
        line = f"study of 8 trials, {result['study_steps']} steps each, by the clock"
        rows.append([line, *(f"{s:.1f}" for s in result["study"])])
    if len(results) == 2:
        for row in rows:
            row.append(f"{float(row[1]) / float(row[2]):.2f}" if float(row[2]) else "–")
    where, ratio = result["machine"], ["this / other"] if len(results) == 2 else []
    same, run = "the same to the bit" if result["tables_equal"] else "NOT the same", " ".join(result["arguments"])
    return (
        f"# A trial beside its steps\n\nCPU seconds of `twinrl train {run}` by part, the least "
        f"of {result['rounds']} rounds, {where['threads']} thread(s), {where['device']}, torch {where['torch']}. "
        f"Final tables of all runs: {same}.\n\n" + measuring.markdown(["part", *results, *ratio], rows)
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, e.g. a worktree of an older commit")
    parser.add_argument("--preset", default="lab", help="what is trained")
    parser.add_argument("--steps", type=int, default=20, help="of a trial")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each checkout")
    parser.add_argument("--study", type=int, default=0, metavar="STEPS", help="also time the example study; 0: no")
    parser.add_argument("--out", type=Path, default=HERE / "benchmarks" / "results" / "trial", help="no suffix")
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. tracking.mlflow=false")
    given = parser.parse_args(arguments)
    import measuring
    import torch

    checkouts = {"this": HERE} | ({"other": given.against.resolve()} if given.against else {})
    settings = [given.preset, f"train.steps={given.steps}", *given.overrides]
    spent, equal = measure(list(checkouts.values()), settings, given.rounds)
    results = dict(zip(checkouts, map(summary, spent), strict=True))
    result = {
        "arguments": settings, "rounds": given.rounds, "tables_equal": equal, "seconds": results,
        "revisions": [revision(checkout) for checkout in checkouts.values()], "study_steps": given.study,
        "study": [study(checkout, given.study) for checkout in checkouts.values()] if given.study else [],
        "machine": measuring.machine(torch.device("cpu")),
    }  # fmt: skip
    text = table(results, result)
    measuring.write(given.out, result, text)
    print(text)


def revision(checkout: Path) -> str:
    """The commit of a checkout, with a star where files differ from it; empty where there is none."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=*", "--exclude=*"], cwd=checkout, capture_output=True, text=True
    )
    return found.stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.path.pop(0)  # this folder, so that its modules stand for nobody else's
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
