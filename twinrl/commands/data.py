"""``twinrl data prepare``: verify a folder of images and captions, and encode it for a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from twinrl.config import override, validate
from twinrl.data.folders.encode import Encoder
from twinrl.data.folders.prepare import (
    REPORT,
    check_usable,
    count_buckets,
    count_reasons,
    prepare,
    write_report,
)
from twinrl.data.folders.problems import Problem
from twinrl.data.folders.settings import PrepareConfig
from twinrl.data.folders.verify import Pair, verify

STAGES = {"verify": "verifying", "images": "encoding images", "prompts": "encoding prompts"}


class Loader(Protocol):
    """Loads the encoder of a model, when it is needed."""

    def __call__(self) -> Encoder:
        """The encoder, on the device where it is to work."""
        ...


def prepare_data(path: Path, load: Loader | None, overrides: list[str], to: Path | None, console: Console) -> int:
    """Prepare ``path`` into ``to`` and print what was left out and what there is; 0.

    Arguments:
        path: folder, file, or a data set's name on the hub.
        load: gives the model's encoder; None verifies alone and encodes nothing.
        overrides: ``key.path=value`` settings of ``PrepareConfig``.
        to: the prepared folder; None = ``prepared/<name of path>``.

    Raises:
        InputError: see ``twinrl.data.folders.prepare.prepare``; an unknown or malformed setting.
    """
    config = validate(PrepareConfig, override({}, overrides))
    to = to or Path("prepared") / path.resolve().stem
    if load is None:
        _verify(path, config, to, console)
        return 0
    encoder = load()
    with Bars(console) as bars:
        result = prepare(path, encoder, config, to, bars)
    console.print(f"{path} read as format {result.format}")
    print_tables(result.pairs, result.problems, to, console)
    console.print(
        f"encoded {result.encoded_images} images and {result.encoded_prompts} prompts "
        f"that the cache lacked; prepared data in {to}"
    )
    return 0


def _verify(path: Path, config: PrepareConfig, to: Path, console: Console) -> None:
    with Bars(console) as bars:
        found = verify(path, config, None, bars)
    to.mkdir(parents=True, exist_ok=True)
    write_report(to, found.problems)
    check_usable(path, found.pairs, found.problems, to)
    console.print(f"{path} read as format {found.format}; verified only, --model PATH encodes")
    print_tables(found.pairs, found.problems, to, console)


def print_tables(pairs: Sequence[Pair], problems: Sequence[Problem], to: Path, console: Console) -> None:
    """Pairs by bucket and split, and what was left out by reason."""
    table = Table("bucket", "train", "validation", box=None, pad_edge=False)
    for bucket, splits in sorted(count_buckets(pairs).items()):
        table.add_row(bucket, str(splits["train"]), str(splits["validation"]))
    total = {split: sum(pair.split == split for pair in pairs) for split in ("train", "validation")}
    table.add_row("all", str(total["train"]), str(total["validation"]))
    console.print(table)
    if problems:
        console.print(_left_out(problems, count_reasons(problems)))
        console.print(f"each with its detail in {to / REPORT}")


def _left_out(problems: Sequence[Problem], reasons: Mapping[str, int]) -> Table:
    table = Table("left out because", "pairs", "for example", box=None, pad_edge=False)
    for reason, count in reasons.items():
        example = next(problem for problem in problems if problem.reason == reason)
        table.add_row(reason, str(count), example.name)
    return table


class Bars:
    """A progress bar for each stage."""

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(STAGES[stage], total=total)
        self.progress.update(self.tasks[stage], completed=done, total=total)
