"""Whether two commits train alike: every number of the log over the first steps of every laboratory preset.

    python benchmarks/same_numbers.py COMMIT [--steps 50]

Trains a small network in float64 on the tests' small source, here and in a worktree of COMMIT: every preset with the
clips of each ``gradients.space``, rewards on from a fifth of the steps. Prints the largest difference of the losses
and of all other numbers, relative where a number is larger than 1. Exit code 1 where a loss differs by more than 1e-12.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring
import torch

PRESETS = (
    "lab", "recommended", "corrected", "published", "twinflow", "tutorial", "rcgm", "flow_matching", "simpletuner",
)  # fmt: skip
SPACES = ("parameter", "output", "none")
LIMIT = 1e-12
Rows = dict[str, list[dict[str, Any]]]


def settings_of(preset: str, space: str, steps: int, folder: Path) -> Any:
    """The preset on the small source, with a clip of every term where terms are apart and one of the sum."""
    from tests.fake_source import small
    from twinrl.training import schema

    given = schema.load(preset)
    clips = ["gradients.total.clip.max_norm=1", f"gradients.space={space}"]
    if space == "none":
        clips += [f"gradients.terms.{name}=null" for name in given.gradients.terms]
    else:
        clips += ["gradients.each.clip.max_norm=0.5"]
    every = "gradients.telemetry={shares_every: 1, cosines_every: 1, rms_every: 1, update_every: 1}"
    reward = ["reward.model=brightness"] if given.reward is not None else []
    fixed = [f"train.steps={steps}", "train.precision=float64", "evaluation.every=0", "evaluation.objective=false"]
    return small(folder, *fixed, every, *clips, *reward, preset=preset)


def rows_of(preset: str, space: str, steps: int) -> list[dict[str, Any]]:
    """The log's rows."""
    from tests.fake_source import FakeSource
    from twinrl.training.runs import RunDirectory
    from twinrl.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(preset, space, steps, Path(folder))
        run = RunDirectory(settings.directory)
        run.start(settings, fresh=True)
        trainer = Trainer(settings, run, FakeSource(), torch.device("cpu"), lambda network, step: {})
        rows = [dict(trainer.train_step()[0]) for _ in range(steps)]
        trainer.log.close()
        trainer.events.close()
    return rows


def write(path: Path, steps: int) -> None:
    """All rows of the sources on the path."""
    rows = {f"{preset} {space}": rows_of(preset, space, steps) for preset in PRESETS for space in SPACES}
    path.write_text(json.dumps(rows))


def of_tree(tree: Path, out: Path, steps: int) -> Rows:
    """The rows of a source tree, by this script in a process of its own."""
    measuring.run_in(tree, __file__, "--write", str(out), "--steps", str(steps))
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Metric and difference, number by number; infinite where only one of both rows has a metric."""
    for row, old in zip(one, other, strict=True):
        for name in (row.keys() | old.keys()) - {"perf/step_seconds"}:
            a, b = float(row.get(name, math.inf)), float(old.get(name, -math.inf))
            yield name, 0.0 if a == b or (a != a and b != b) else abs(a - b) / max(1.0, abs(b))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument("--steps", type=int, default=50, help="of each run")
    parser.add_argument("--write", type=Path, help="write the rows of this tree to a file and compare nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.write is not None:
        write(given.write, given.steps)
        return
    with tempfile.TemporaryDirectory() as folder, measuring.worktree(given.commit) as tree:
        here, there = (of_tree(root, Path(folder) / "rows.json", given.steps) for root in (measuring.REPOSITORY, tree))
    worst = 0.0
    for case, rows in here.items():
        found = list(differences(rows, there[case]))
        losses = max(size for name, size in found if name.startswith("loss/"))
        name, rest = max((pair for pair in found if not pair[0].startswith("loss/")), key=lambda pair: pair[1])
        worst = max(worst, losses)
        print(f"{case:28} losses {losses:.1e}   others {rest:.1e} ({name})")
    print(f"{given.steps} steps, largest difference of a loss {worst:.1e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
