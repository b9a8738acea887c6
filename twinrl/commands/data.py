"""``twinrl data prepare``: verify a folder of images and captions, and encode it for a model."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
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
from twinrl.config.errors import InputError
from twinrl.data import readers
from twinrl.data.cache import writing
from twinrl.data.encode import Encoder
from twinrl.data.encoder import FamilyEncoder
from twinrl.data.prepare import (
    REPORT,
    check_apart,
    check_origin,
    check_usable,
    count_buckets,
    count_reasons,
    prepare,
    write_report,
)
from twinrl.data.problems import Problem
from twinrl.data.settings import PrepareConfig
from twinrl.data.verify import Pair, verify
from twinrl.fsdp.mesh import device_named
from twinrl.machine import files


@dataclass(frozen=True)
class EncodingOptions:
    """Where and how precisely a model encodes."""

    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"

    def torch_device(self) -> torch.device:
        """The device. Raises InputError where it is not available."""
        return device_named(self.device, "--device")


STAGES = {"verify": "verifying", "images": "encoding images", "prompts": "encoding prompts"}


def prepare_data(
    path: Path,
    model: str | None,
    to: Path | None,
    overrides: list[str],
    machine: EncodingOptions,
    console: Console,
    family: str | None = None,
) -> int:
    """Prepare ``path`` for ``model`` and print what was left out and what there is; 0.

    Arguments:
        path: folder, file, or a data set's name on the hub.
        model: folder or hub name of a diffusers pipeline; None verifies alone and encodes nothing.
        to: the prepared folder; None = ``prepared/<name of path>``, where no other data are.
        overrides: ``key.path=value`` settings of ``PrepareConfig``.
        machine: where and how precisely the model encodes.
        family: of the model; None finds it by the pipeline's class.

    Raises:
        InputError: see ``twinrl.data.prepare.prepare``; an unknown or malformed setting; no such model.
    """
    config = validate(PrepareConfig, override({}, overrides))
    if config.read.label_column is not None:
        raise InputError("read.label_column has no effect here", fix="leave it out; twinrl lab build has --label")
    readers.read(path, config.read)  # a wrong path shows before a large model is loaded
    if to is None:
        to = Path("prepared") / path.resolve().name
        check_origin(path, to)
    check_apart(path, to)
    files.check_writable(to, f"the prepared folder {to}", "name another with --to")
    if model is None:
        _verify(path, config, to, console)
    else:
        encode(path, load_encoder(model, config, machine, family), config, to, console)
    return 0


def load_encoder(model: str, config: PrepareConfig, machine: EncodingOptions, name: str | None = None) -> Encoder:
    """The encoder of the pipeline at ``model``, of the family called ``name`` or, by its class, of whichever it is.

    Raises:
        InputError: it is of no known family, cannot be loaded, or cannot have a bucket's size.
    """
    from twinrl.backends.families import FAMILIES, family_class
    from twinrl.backends.families.family import FamilyConfig
    from twinrl.backends.families.pipelines import read_index, resolve

    folder = resolve(model)
    pipeline = read_index(folder)["_class_name"]
    known = {cls.PIPELINE: cls for cls in map(family_class, [name] if name else list(FAMILIES))}
    if pipeline not in known:
        raise InputError(f"{folder} is of no known family", got=pipeline, expected=", ".join(known))
    family = known[pipeline].load(FamilyConfig(path=str(folder), frozen_dtype=machine.dtype)).to(machine.torch_device())
    for bucket in config.buckets.buckets():
        family.latent_shape(bucket.height, bucket.width)
    return FamilyEncoder(family)


def encode(path: Path, encoder: Encoder, config: PrepareConfig, to: Path, console: Console) -> None:
    """Prepare ``path`` with ``encoder``, with progress bars, and print the tables."""
    with Bars(console) as bars:
        result = prepare(path, encoder, config, to, bars)
    console.print(f"{path} read as format {result.format}")
    print_tables(result.pairs, result.problems, to, console)
    for line in cut_short(encoder):
        console.print(line)
    console.print(
        f"encoded {result.encoded_images} images and {result.encoded_prompts} prompts "
        f"that the cache lacked; prepared data in {to}"
    )


def cut_short(encoder: Encoder) -> list[str]:
    """What is said of prompts whose ends a text encoder does not see."""
    if not isinstance(encoder, FamilyEncoder):
        return []
    limits = encoder.family.limits()
    return [
        f"{count} of these prompts are longer than the {limits[name]} tokens of {name}, which sees their beginning"
        for name, count in encoder.cut.items()
        if count
    ]


def _verify(path: Path, config: PrepareConfig, to: Path, console: Console) -> None:
    with Bars(console) as bars:
        found = verify(path, config, None, bars)
    with writing(to):
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
    if not total["validation"]:
        console.print("no pair fell into the validation split; raise `validation`, or add images")
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
    """A progress bar for each stage; Pillow's remarks on odd files stay out of it, the report has what matters."""

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.warnings = warnings.catch_warnings()

    def __enter__(self) -> "Bars":
        self.warnings.__enter__()
        warnings.filterwarnings("ignore", module="PIL")
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.warnings.__exit__(kind, error, trace)

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(STAGES[stage], total=total)
        self.progress.update(self.tasks[stage], completed=done, total=total)
