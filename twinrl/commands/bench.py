"""``twinrl bench``: what a sample of a run costs."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from twinrl.machine import files
from twinrl.run import layout
from twinrl.sampling.timing import TimingLine, as_dict
from twinrl.training.opened import open_run

COLUMNS = ("", "NFE", "latency, batch 1 (ms)", "p95 (ms)", "throughput, batch 10 (images/s)", "against the teacher")


def cells(lines: Sequence[TimingLine]) -> list[tuple[str, ...]]:
    """The lines as text, one cell for each of ``COLUMNS``; the last is the throughput over the teacher's."""
    teacher = next(line for line in lines if line.name.startswith("teacher")).throughput
    return [
        (
            line.name,
            str(line.nfe or "–"),
            f"{1e3 * line.latency.median:.2f}",
            f"{1e3 * line.latency.p95:.2f}",
            f"{line.throughput:,.0f}" if line.throughput >= 10 else f"{line.throughput:.2f}",
            f"{line.throughput / teacher:.1f}×" if line.nfe else "–",
        )
        for line in lines
    ]


def bench(path: Path, rounds: int, step: int | None, console: Console) -> int:
    """Time a run's judged network, print the table and write ``bench.json`` beside it."""
    opened = open_run(path, step)
    files.check_writable(path, str(path), "mend its rights, or time a copy of the run")
    if opened.settings.machine.threads:
        torch.set_num_threads(opened.settings.machine.threads)
    lines = opened.timings(rounds)
    title = f"{path.name} on {opened.provider.device}, {torch.get_num_threads()} CPU threads"
    console.print(rich_table(lines, title))
    files.write_text(path / layout.BENCH, json.dumps(as_dict(lines), indent=1) + "\n")
    return 0


def rich_table(lines: Sequence[TimingLine], title: str) -> Table:
    """The table for the terminal."""
    table = Table(title=title, caption="Sampling without decoding; decoding is listed by itself. Medians over rounds.")
    for i, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if i else "left")
    for row in cells(lines):
        table.add_row(*row)
    return table
