"""Does a one-step student learn the lab? Several seeds of a preset, judged on the test split.

    python benchmarks/learning.py --seeds 3

Trains ``twinrl train PRESET`` (default: lab) once for each seed (finished runs are kept), reads each run's
``result.json`` and writes ``benchmarks/results/learning.md`` and ``.json``: judge accuracy against round-tripped real
digits, and the Fréchet distance above the real-against-real floor over the 50-step teacher's. Intervals are Student's
95 % over seeds; within a seed every number is a mean over five draws of start noise.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from twinrl.evaluation.table import IntervalEstimate, mean_interval
from twinrl.training import schema
from twinrl.training.runs import RunDirectory

RESULTS = Path(__file__).parent / "results"
ACCURACY_MARGIN, FRECHET_RATIO = 0.01, 1.5


def run_of(preset: str, overrides: list[str], seed: int) -> RunDirectory:
    """The finished run of a seed, trained now if need be."""
    arguments = [*overrides, f"seed={seed}"]
    run = RunDirectory(schema.load(preset, arguments).directory)
    if run.result is None:
        command = ["resume", str(run.path)] if run.exists else ["train", preset, *arguments]
        subprocess.run([sys.executable, "-m", "twinrl", *command], check=True)
    return run


def rows_of(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The run's final table: row name and NFE → metrics."""
    result = run.result
    if result is None or "table" not in result:
        raise SystemExit(f"{run.path} has no final table: {result['message'] if result else 'it was interrupted'}")
    return {f"{row['name']} {row['nfe']}": row["metrics"] for row in result["table"]["rows"]}


def value(metrics: dict[str, Any], quantity: str) -> float:
    """One number of a table row."""
    return float(metrics[quantity]["value"])


def summarise(tables: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, IntervalEstimate]]:
    """For each student row: accuracy, its gap to round-tripped digits, and the Fréchet ratio, over seeds."""
    rows = {}
    for name in (n for n in tables[0] if n.startswith("student")):
        codec = [value(list(t.values())[-2], "accuracy") for t in tables]  # rows end with the codec and the floor
        floor = [value(list(t.values())[-1], "fd") for t in tables]
        teacher = [value(metrics, "fd") for t in tables for n, metrics in t.items() if n.startswith("teacher")]
        accuracy, fd = ([value(t[name], q) for t in tables] for q in ("accuracy", "fd"))
        rows[name] = {
            "accuracy": mean_interval(accuracy),
            "accuracy − codec": mean_interval([a - c for a, c in zip(accuracy, codec, strict=True)]),
            "fd": mean_interval(fd),
            "recall": mean_interval([value(t[name], "recall") for t in tables]),
            "(fd − floor) / (teacher − floor)": mean_interval(
                [(f - o) / (t - o) for f, o, t in zip(fd, floor, teacher, strict=True)]
            ),
        }
    return rows


def report(rows: dict[str, dict[str, IntervalEstimate]], tables: list[dict[str, Any]], command: str) -> str:
    """The Markdown page."""
    quantities = list(next(iter(rows.values())))
    lines = [
        "# One-step learning on the lab", "",
        f"{len(tables)} seeds, mean [95 % t interval over seeds]. Wanted at 1 NFE: accuracy − codec ≥ "
        f"−{ACCURACY_MARGIN}, Fréchet ratio ≤ {FRECHET_RATIO}.", "",
        "| row | " + " | ".join(quantities) + " |", "|---|" + "--:|" * len(quantities),
    ]  # fmt: skip
    for name, row in rows.items():
        cells = (f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in row.values())
        lines.append(f"| {name} NFE | {' | '.join(cells)} |")
    first = tables[0]
    for name, metrics in first.items():
        if not name.startswith("student"):
            numbers = ", ".join(f"{q} {value(metrics, q):.3f}" for q in ("accuracy", "fd", "recall"))
            lines.append(f"\n{name.removesuffix(' 0')} (seed 0): {numbers}")
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="lab")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    given = parser.parse_args()
    runs = [run_of(given.preset, given.overrides, seed) for seed in range(given.seeds)]
    tables = [rows_of(run) for run in runs]
    rows = summarise(tables)
    command = " ".join(
        ["python benchmarks/learning.py", f"--seeds {given.seeds}", f"--preset {given.preset}", *given.overrides]
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "learning.md").write_text(report(rows, tables, command))
    plain = {name: {q: [e.value, e.low, e.high] for q, e in row.items()} for name, row in rows.items()}
    (given.out / "learning.json").write_text(json.dumps({"rows": plain, "runs": [r.path.name for r in runs]}, indent=1))
    print(report(rows, tables, command))


if __name__ == "__main__":
    main()
