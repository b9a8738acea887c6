"""What takes long and repeats what ``make test`` proves in small: every row is a command, its result a table's line.

    make campaign                                   # everything; stopped and started again it goes on
    python -m tests.campaign --list                 # the rows
    python -m tests.campaign --only ranks kill      # rows whose name has one of these words
    python -m tests.campaign --again                # also what has passed already

Two kinds of rows: the test files marked ``campaign`` (many kills, all ranks × presets, coverage, browsers), and the
whole suite of ``make test`` under variations that must not matter: other instruction sets, numbers of threads, orders,
a busy machine. A row that has passed with the same sources is not run again. Results go to ``tests/campaign.json`` and,
as a table, to ``docs/campaign.md``; what rows printed to ``runs/campaign/``. Exit code 0 if every row has passed, 1 if
not, 2 for wrong input.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PRINTED = REPOSITORY / "runs" / "campaign"
"""Folder of what the rows printed."""
RESULTS = REPOSITORY / "tests" / "campaign.json"
"""How each row ended when it last ran; the table is made from it."""
TABLE = REPOSITORY / "docs" / "campaign.md"
LIMIT = 3 * 3600
"""Seconds after which a row has failed."""


@dataclass(frozen=True)
class Row:
    """One command of the campaign.

    Arguments:
        name: in the table; also that of its files.
        proves: in a few words.
        arguments: of pytest.
        environment: variables that it sets.
        busy: beside a busy loop on every core.
    """

    name: str
    proves: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    busy: bool = False

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Outcome:
    """How a row ended.

    Arguments:
        sources: digest of the tracked files that it ran on.
        counts: pytest's closing line, such as "310 passed, 2 skipped".
        digest: of the losses of a short training under the row's variables; other digits, other arithmetic.
        machine: its processor.
    """

    row: str
    passed: bool
    counts: str
    digest: str
    seconds: float
    date: str
    revision: str
    sources: str
    machine: str


BUSY = "suite, portable code, random order, beside a busy loop on every core"

# --- the rows ------------------------------------------------------------------------------------------------------

SUITE = {
    BUSY: ({"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}, ("-p", "randomly", "--randomly-seed=1")),
    "suite, SSE4.1, four threads, another random order": (
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "4"},
        ("-p", "randomly", "--randomly-seed=2"),
    ),
    "suite, AVX2, two threads": (
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}, (),
    ),
}  # fmt: skip
"""Name → variables and options of pytest under which everything must pass; each row varies several things at once."""


def rows(workers: int) -> list[Row]:
    """All rows: the long tests file by file, then the suite under variations; plain it is ``make test``'s."""
    long = [Row(name, _purpose(name), ("-m", "campaign", name)) for name in _long_files()]
    return long + [
        Row(name, _named(variables), ("-n", str(workers), *options), variables, busy=name == BUSY)
        for name, (variables, options) in SUITE.items()
    ]


def _named(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())


def _long_files() -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", "campaign", "--collect-only"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the long tests cannot be collected:\n{done.stdout}{done.stderr}")
    return sorted({line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line})


def _purpose(file: str) -> str:
    """The first line that the file says of itself."""
    said = ast.get_docstring(ast.parse((REPOSITORY / file).read_text()))
    return said.splitlines()[0] if said else "the long tests of this file"


# --- running -------------------------------------------------------------------------------------------------------


def run(row: Row, revision: str, sources: str) -> Outcome:
    """The row's command; what it prints goes to a file, and is kept."""
    environment = os.environ | row.environment
    began = time.monotonic()
    with (PRINTED / f"{row.key}.txt").open("w") as output, _busy(row.busy):
        command = [sys.executable, "-m", "pytest", "--durations=60", *row.arguments]
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, timeout=LIMIT, check=False
            )
            passed, counts = done.returncode == 0, _closing_line(Path(output.name).read_text())
        except subprocess.TimeoutExpired:
            passed, counts = False, f"not finished after {LIMIT / 3600:g} h"
    seconds = time.monotonic() - began
    digest = _digest_under(environment)
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    return Outcome(row.name, passed, counts, digest, round(seconds, 1), now, revision, sources, _processor())


def _closing_line(output: str) -> str:
    found = re.findall(r"^(?:=+ )?((?:\d+ (?:passed|failed|skipped|errors?|xfailed|warnings?)(?:, )?)+)", output, re.M)
    return found[-1].strip(", ") if found else "no closing line"


@contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """A busy loop on every core, while the block runs."""
    loops = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1) if wanted]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()


def _spin() -> None:
    while True:
        pass


def _digest_under(environment: Mapping[str, str]) -> str:
    command = [sys.executable, "-m", "tests.campaign", "--digest"]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(environment), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "failed"


def digest() -> str:
    """Of the last bits of a short float32 training with matrix products and convolutions."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    images, targets = (torch.randn(64, channels, 16, 16, generator=generator) for channels in (3, 3))
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32 * 256, 64), nn.Tanh(),
        nn.Linear(64, 3 * 256), nn.Unflatten(1, (3, 16, 16)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = (network(images) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return hashlib.blake2b(repr(losses).encode(), digest_size=4).hexdigest()


# --- state and table -----------------------------------------------------------------------------------------------


def revision_and_sources() -> tuple[str, str]:
    """The commit, and a digest of all tracked files as they are now but the results."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    others = ("--", ".", *(f":!{made.relative_to(REPOSITORY)}" for made in (TABLE, RESULTS)))
    changed = git("diff", "HEAD", *others)
    told = git("ls-files", "-s", *others) + changed
    revision = git("rev-parse", "--short", "HEAD").strip() + (" and changes" if changed else "")
    return revision, hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def known() -> dict[str, Outcome]:
    """Name → how the row ended when it last ran."""
    return {told["row"]: Outcome(**told) for told in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


def keep(outcome: Outcome, everything: Sequence[Row]) -> None:
    """Into the results and the table; rows that are no more leave both."""
    outcomes = known() | {outcome.row: outcome}
    told = [asdict(outcomes[row.name]) for row in everything if row.name in outcomes]
    RESULTS.with_suffix(".new").write_text(json.dumps(told, indent=1) + "\n")
    RESULTS.with_suffix(".new").replace(RESULTS)
    TABLE.write_text(table(everything))


def table(everything: Sequence[Row]) -> str:
    """The page of the last results, and what has none."""
    lines = [
        "# The long tests' last results", "",
        "After this page you know which long tests passed, when, and on which processor. `make campaign` makes it.", "",
        "A row is a command; `make test` proves the same in small. The losses are those of a short training under the",
        "row's variables: other digits, other arithmetic.", "",
        "| row | what it proves | result | tests | losses | minutes | date | revision | processor |",
        "|---|---|---|---|---|--:|---|---|---|",
    ]  # fmt: skip
    outcomes = known()
    for row in everything:
        if (o := outcomes.get(row.name)) is None:
            continue
        verdict = "passed" if o.passed else "**failed**"
        proves = f"`{row.proves}`" if row.environment else row.proves
        ran = (f"`{o.digest}`", f"{o.seconds / 60:.1f}", o.date, o.revision, o.machine)
        told = (row.name, proves, verdict, o.counts, *ran)
        lines.append(f"| {' | '.join(told)} |")
    missing = [row.name for row in everything if row.name not in outcomes]
    if missing:
        lines += ["", "Not run yet:", "", *(f"- {name}" for name in missing)]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name has one of these words")
    parser.add_argument("--again", action="store_true", help="run also what has passed with these sources")
    parser.add_argument("--list", action="store_true", help="print the rows and what is known of them")
    parser.add_argument("--workers", type=int, default=2, help="processes of the suite's rows (default 2)")
    parser.add_argument("--digest", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.digest:
        print(digest())
        return 0
    everything = rows(chosen.workers)
    wanted = [row for row in everything if not chosen.only or any(word in row.name for word in chosen.only)]
    if not wanted:
        parser.error(f"--only {' '.join(chosen.only)} names no row; see --list")
    revision, sources = revision_and_sources()
    PRINTED.mkdir(parents=True, exist_ok=True)

    def done(row: Row) -> bool:
        outcome = known().get(row.name)
        return outcome is not None and outcome.passed and outcome.sources == sources

    if chosen.list:
        for row in wanted:
            print(f"{'passed' if done(row) else 'to run':8}{row.name}: {row.proves}")
        return 0
    for number, row in enumerate(wanted, 1):
        if done(row) and not chosen.again:
            continue
        print(f"[{number}/{len(wanted)}] {row.name} … ", end="", flush=True)
        outcome = run(row, revision, sources)
        keep(outcome, everything)
        print(
            f"{'passed' if outcome.passed else 'FAILED'}: {outcome.counts}, {outcome.seconds / 60:.1f} min", flush=True
        )
        if not outcome.passed:
            print(f"    {PRINTED / row.key}.txt")
    outcomes = known()
    return 0 if all(outcomes[row.name].passed for row in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
