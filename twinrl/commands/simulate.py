"""``twinrl doctor --plan`` and ``--simulate``: what a step of a run takes on GPUs, without one.

Both take two steps (:mod:`twinrl.training.simulated`). The first prints the memory alone.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from twinrl.config.errors import InputError
from twinrl.machine.files import cache_dir
from twinrl.machine.simulated import helper
from twinrl.machine.simulated.work import GPUS
from twinrl.training import schema
from twinrl.training.simulated import Report

MODULE = "twinrl.training.simulated"
FEW = 0.01
"""Owners of less of a peak are shown together."""


class Simulator:
    """A process that simulates runs, one after the other.

    Raises:
        InputError: it cannot be started, see :func:`twinrl.machine.simulated.helper.compiled`.
    """

    def __init__(self) -> None:
        self._process = helper.started(MODULE, cache_dir())

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._process as process:
            process.kill()

    def report(self, config: str, overrides: Sequence[str] = (), processes: int = 1) -> Report:
        """Of the run that a preset or a file with overrides describes, on the first of its processes.

        Raises:
            InputError: it cannot be simulated, or would fail on a device.
        """
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        place = None if sys.flags.safe_path else os.getcwd()
        question = {"config": config, "overrides": list(overrides), "processes": processes, "place": place}
        print(json.dumps(question), file=asked, flush=True)
        if not (line := answers.readline()):
            raise InputError("the process of the simulation has ended", got=f"exit code {self._process.wait()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise InputError(answer["refused"]) from RuntimeError(answer["traceback"])
        return Report.of(answer["report"])


def simulate(config: str, overrides: Sequence[str], processes: int, console: Console, gpu: str | None = None) -> int:
    """Print the memory that a step takes; 0. ``gpu``: by whose data sheet time is told, with all that is counted.

    Raises:
        InputError: see :meth:`Simulator.report`; an unknown GPU.
    """
    if gpu is not None and gpu not in GPUS:
        raise InputError("--gpu is unknown", got=gpu, expected=", ".join(GPUS))
    schema.load(config, list(overrides))  # what is wrong with it is said before a process is started
    with console.status("taking two steps without a device"), Simulator() as simulator:
        report = simulator.report(config, overrides, processes)
    show(report, gpu, console)
    return 0


def show(report: Report, gpu: str | None, console: Console) -> None:
    """Print a report; its memory alone where no GPU is given."""
    share, rows = report.rows
    console.print(
        f"{report.name} on {_number(report.processes, 'GPU')}: {_si(report.parameters, '')} parameters, "
        f"{_number(share, 'row')} a GPU, {rows} a pass"
    )
    console.print(f"\npeak of memory: {_si(report.peak.bytes, 'B')} a GPU, at {report.peak.line}")
    console.print(_memory(report))
    if gpu is not None:
        _show_work(report, gpu, console)
    if report.guesses:
        console.print(f"values that are not known were asked for at {', '.join(report.guesses)}; they were guessed")
    console.print(
        "Not in it: workspaces inside kernels, fragmentation, what a kernel takes beyond arithmetic and memory, "
        "validation with its pictures and FID's network, checkpoints, text encoders (on the host). "
        f"Simulated in {report.seconds:.0f} s and {_si(report.resident, 'B')}."
    )


def _show_work(report: Report, gpu: str, console: Console) -> None:
    """What is computed, sent and waited for."""
    seconds, used = report.estimates[gpu]
    console.print(
        f"\nwork: {report.operations:,} operations, {_si(report.flops, 'FLOP')}, {_si(report.moved, 'B')} through "
        f"memory; on an {gpu} {_si(seconds, 's')} at least, {used:.0%} of its peak in 16 bits"
    )
    if report.messages:
        said = [f"{n} {kind} ({_si(report.payload[kind], 'B')})" for kind, n in report.messages.items()]
        console.print(f"messages: {', '.join(said)}")
    console.print(f"waits of the host: {report.waited}, {report.queued} with work queued")
    console.print(_waits(report))


def _memory(report: Report) -> Table:
    """Owner × phase."""
    table = Table("whose", *report.peaks, box=None, pad_edge=False)
    owners: dict[str, int] = {}
    for peak in report.peaks.values():
        for owner, size in peak.owners.items():
            owners[owner] = max(size, owners.get(owner, 0))
    shown = sorted(
        (owner for owner, size in owners.items() if size > FEW * report.peak.bytes), key=lambda o: -owners[o]
    )
    for owner in shown:
        table.add_row(owner, *(_si(peak.owners.get(owner, 0), "B") for peak in report.peaks.values()))
    rest = (sum(peak.owners.values()) - sum(peak.owners.get(o, 0) for o in shown) for peak in report.peaks.values())
    table.add_row("all else", *(_si(size, "B") for size in rest))
    table.add_section()
    table.add_row("in all", *(_si(peak.bytes, "B") for peak in report.peaks.values()))
    return table


def _waits(report: Report) -> Table:
    table = Table("waits", "queued", "kind", "bytes", "line", box=None, pad_edge=False)
    for wait in report.waits:
        table.add_row(str(wait.times), str(wait.queued or ""), wait.kind, f"{wait.bytes:,}", wait.line)
    return table


def _si(value: float, unit: str) -> str:
    """In three digits: 43.7 GB, 2.7 PFLOP, 780 ns."""
    if value <= 0:
        return "–"
    power = max(-3, min(6, int(math.log10(value) // 3)))
    return f"{value / 1000**power:.3g} {'nµm kMGTPE'[power + 3].strip()}{unit}"


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
