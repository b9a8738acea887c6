"""Prompt sets: files of prompts as people and benchmarks have them, a model's images of them, and their scores.

Every image has noise of its own, keyed by (prompt, seed): two models see the same. Images are kept as the benchmarks'
own scorers want them:

    GenEval (arXiv:2310.11513)   00000/metadata.jsonl, 00000/samples/0000.png, …; so are plain prompts
    DPG-Bench (arXiv:2403.05135)   samples/<name>/0000.png, …; grids/<name>.png, all images of a prompt in one

Scores are taken from these files, so that what was drawn before a kill is not drawn again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.evaluation.table import IntervalEstimate, mean_interval
from twinrl.flow.source import Scorer, scored
from twinrl.machine import files
from twinrl.machine.pixels import as_uint8

Form = Literal["plain", "geneval", "dpg"]
Painter = Callable[[str, int], Tensor]
"""Prompt and seed → (C, H, W) pixels in [−1, 1]."""
MADE = "made.json"
MOST = 100_000
"""Prompts of a set."""


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: what is asked for. name: of its files. about: the rest of its line.
    """

    text: str
    name: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, and whose format they have."""

    form: Form
    prompts: Sequence[Prompt]

    def image(self, prompt: Prompt, seed: int) -> Path:
        """Where an image of a model goes, relative to the model's folder."""
        file = f"{seed:04d}.png"
        return Path("samples", prompt.name, file) if self.form == "dpg" else Path(prompt.name, "samples", file)

    def digest(self) -> str:
        """Of the prompts."""
        return hashlib.sha256(json.dumps([prompt.text for prompt in self.prompts]).encode()).hexdigest()


# --- files of prompts -----------------------------------------------------------------------------------------------


def read(path: Path) -> PromptSet:
    """The prompts of a file, or of a folder of text files.

    Arguments:
        path: one prompt a line; JSON lines with ``prompt`` (GenEval's have ``tag`` and ``include``, too); a JSON list
            of prompts or of such objects; a folder with one text file a prompt, as DPG-Bench has it.

    Raises:
        InputError: it cannot be read, holds no prompt, or too many; names the line.
    """
    try:
        if path.is_dir():
            found = [Prompt(_text(file).strip(), file.stem) for file in sorted(path.glob("*.txt"))]
            return _checked(path, PromptSet("dpg", found))
        lines = [line for line in enumerate(_text(path).splitlines(), start=1) if line[1].strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error.strerror, expected="a file of prompts") from error
    if path.suffix.lower() == ".json":
        entries = _json(path, None, "\n".join(line for _, line in lines))
        if not isinstance(entries, list):
            raise InputError(f"{path} has no list of prompts", got=type(entries).__name__, expected="[…]")
    elif path.suffix.lower() == ".jsonl":
        entries = [_json(path, number, line) for number, line in lines]
    else:
        entries = [line.strip() for _, line in lines]
    abouts = [_about(path, number, entry) for number, entry in enumerate(entries, start=1)]
    of_geneval = bool(abouts) and all({"tag", "include"} <= about.keys() for about in abouts)
    prompts = [Prompt(about["prompt"], f"{number:05d}", about) for number, about in enumerate(abouts)]
    return _checked(path, PromptSet("geneval" if of_geneval else "plain", prompts))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8", got=f"byte {error.start}", fix="save it as UTF-8") from error


def _json(path: Path, line: int | None, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = str(path) if line is None else f"{path}, line {line}"
        raise InputError(f"{at} is not JSON", got=str(error)[:100]) from error


def _about(path: Path, number: int, entry: Any) -> dict[str, Any]:
    about = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(about, dict) or not isinstance(about.get("prompt"), str):
        got = f"entry {number}: {entry!r:.60}"
        raise InputError(f"{path} has an entry without a prompt", got=got, expected='text, or {"prompt": text}')
    return about


def _checked(path: Path, found: PromptSet) -> PromptSet:
    if not 0 < len(found.prompts) <= MOST:
        raise InputError(f"{path} has no prompts to evaluate", got=f"{len(found.prompts):,}", expected=f"1 to {MOST:,}")
    if empty := [prompt.name for prompt in found.prompts if not prompt.text.strip()]:
        raise InputError(f"{path} has an empty prompt", got=f"prompt {empty[0]}")
    return found


# --- images ---------------------------------------------------------------------------------------------------------


def begin(folder: Path, wanted: PromptSet, about: Mapping[str, Any]) -> None:
    """Make a model's folder, or find the one of an evaluation that was begun.

    Raises:
        InputError: it holds images of other prompts or settings.
    """
    made = {**about, "prompts": wanted.digest()}
    file = folder / MADE
    if file.exists():
        before = _json(file, None, _text(file))
        if changed := [key for key in made if not isinstance(before, dict) or before.get(key) != made[key]]:
            raise InputError(
                f"{folder} holds images of another evaluation", got=f"another {', '.join(changed)}",
                fix="name another folder with --out, or remove this one",
            )  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(made, indent=1) + "\n")


def draw(folder: Path, wanted: PromptSet, seeds: int, painter: Painter, tick: Callable[[], None]) -> None:
    """Images that a model has not drawn yet, into its folder; ``tick`` is called after each, drawn or found."""
    for prompt in wanted.prompts:
        for seed in range(seeds):
            path = folder / wanted.image(prompt, seed)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _save(as_uint8(painter(prompt.text, seed)), path)
            tick()
        if wanted.form == "dpg":
            _save(_grid([_pixels(folder / wanted.image(prompt, seed)) for seed in range(seeds)]),
                  folder / "grids" / f"{prompt.name}.png")  # fmt: skip
        else:
            files.write_text(folder / prompt.name / "metadata.jsonl", json.dumps(dict(prompt.about)) + "\n")


def _save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with files.publishing(path) as new:
        Image.fromarray(pixels).save(new, format="png")


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises InputError where the file is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is damaged", got=str(error)[:100], fix="remove it; it is drawn again") from error


def _grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """(rows·H, columns·W, 3): all images of a prompt, row by row in a square, what is left over black."""
    columns = math.ceil(math.sqrt(len(images)))
    blank = np.zeros_like(images[0])
    cells = [*images, *[blank] * (-len(images) % columns)]
    return np.concatenate(
        [np.concatenate(cells[at : at + columns], axis=1) for at in range(0, len(cells), columns)], axis=0
    )


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What judges say of a model's images.

    Attributes:
        model: its name.
        values: judge → (P, S) scores of P prompts and S seeds; higher is better.
    """

    model: str
    values: Mapping[str, Tensor]

    def mean(self, judge: str) -> IntervalEstimate:
        """Over prompts, with Student's 95 % interval over them: a prompt counts once, however many seeds it has."""
        return mean_interval(self.values[judge].double().mean(1).tolist())

    def less(self, other: "Scores", judge: str) -> IntervalEstimate:
        """The mean over prompts of the difference to another model, paired by prompt and seed."""
        return mean_interval((self.values[judge] - other.values[judge]).double().mean(1).tolist())

    def wins(self, other: "Scores", judge: str) -> float:
        """Share of the images that are better than the other model's of the same prompt and seed; ties count half."""
        gap = self.values[judge] - other.values[judge]
        return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


def score(
    folder: Path, model: str, wanted: PromptSet, seeds: int, judges: Mapping[str, Scorer], batch: int = 16
) -> Scores:
    """The judges' scores of a model's images. Raises InputError where an image is damaged."""
    values: dict[str, list[Tensor]] = {name: [] for name in judges}
    with torch.no_grad():
        for at in _batches(list(product(wanted.prompts, range(seeds))), batch):
            pixels = [_pixels(folder / wanted.image(prompt, seed)) for prompt, seed in at]
            images = torch.stack([torch.tensor(each).movedim(-1, 0).float() / 127.5 - 1 for each in pixels])
            for name, judge in judges.items():
                values[name].append(scored(judge, images, [prompt.text for prompt, _ in at]).detach().float().cpu())
    return Scores(model, {name: torch.cat(found).view(len(wanted.prompts), seeds) for name, found in values.items()})


def _batches(items: Sequence[tuple[Prompt, int]], size: int) -> Iterator[Sequence[tuple[Prompt, int]]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def table(scores: Sequence[Scores], wanted: PromptSet) -> Iterator[list[str]]:
    """Rows of a CSV file, with their heading: a number for every image and judge."""
    yield ["model", "prompt", "seed", "judge", "score", "text"]
    for each in scores:
        for judge, values in each.values.items():
            for prompt, of_prompt in zip(wanted.prompts, values.tolist(), strict=True):
                for seed, value in enumerate(of_prompt):
                    yield [each.model, prompt.name, str(seed), judge, repr(value), prompt.text]
