"""``twinrl evaluate RUN --prompts FILE``: images of a set of prompts, judged, of one model or of two beside another."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from twinrl.config import Settings, validate
from twinrl.config.errors import InputError
from twinrl.evaluation import prompt_page, prompt_set
from twinrl.evaluation.prompt_page import interval
from twinrl.evaluation.prompt_set import Painter, PromptSet, Scores
from twinrl.flow.source import Scorer
from twinrl.fsdp import mesh
from twinrl.machine import files
from twinrl.rewards import RewardSettings, build_reward
from twinrl.sampling import few_step
from twinrl.training.opened import OpenedRun, open_run
from twinrl.training.painting import PipelinePainter, RunPainter

PAGE, SUMMARY, SCORES = "index.html", "summary.json", "scores.csv"


class JudgeConfig(Settings):
    """Judges of a prompt set, by name."""

    judge: dict[str, RewardSettings]


@dataclass(frozen=True)
class Model:
    """What draws.

    Attributes:
        name: of its folder. painter: itself. about: what decides its images.
        run: the opened run; None of a pipeline.
    """

    name: str
    painter: Painter
    about: Mapping[str, Any]
    run: OpenedRun | None = None


@dataclass(frozen=True)
class Models:
    """What is evaluated.

    Attributes:
        run: directory; None with a pipeline alone. step: of its checkpoint; None = the newest.
        against: another run. pipeline: folder or hub name.
        nfe: network evaluations of an image.
        guidance: of the pipeline; None = its own. device: of the pipeline.
    """

    run: Path | None
    step: int | None
    against: Path | None
    pipeline: str | None
    nfe: int
    guidance: float | None
    device: str

    def opened(self) -> list[Model]:
        """One model, or two. Raises InputError where there are none or more, or one cannot be opened."""
        made = [self._of_run(path, step) for path, step in ((self.run, self.step), (self.against, None)) if path]
        if self.pipeline is not None:
            device = mesh.device_named(self.device, "--device")
            about = {"pipeline": self.pipeline, "nfe": self.nfe, "guidance": self.guidance}
            painter = PipelinePainter(self.pipeline, self.nfe, self.guidance, device)
            made.append(Model(Path(self.pipeline).name, painter, about))
        if not 1 <= len(made) <= 2 or (self.run is None and self.against is not None):
            raise InputError(
                "one model is evaluated, or two are compared", got=f"{len(made)}",
                expected="RUN, --pipeline PATH, RUN --against RUN or RUN --pipeline PATH",
            )  # fmt: skip
        if len({each.name for each in made}) < len(made):
            made = [Model(f"{n}-{each.name}", each.painter, each.about, each.run) for n, each in enumerate(made, 1)]
        return made

    def _of_run(self, path: Path, step: int | None) -> Model:
        run = open_run(path, step)
        about = {"run": path.name, "step": run.at, "nfe": self.nfe}
        return Model(path.name, RunPainter(run, few_step(self.nfe)), about, run)


def evaluate_prompts(
    models: Models, prompts: Path, judges: Sequence[str], seeds: int, out: Path | None, console: Console
) -> int:
    """Draw, judge and compare; writes images, scores and a page; 0, or 130 where it was interrupted.

    Raises:
        InputError: no such prompts, models or judges; the folder cannot be written.
    """
    wanted, made = prompt_set.read(prompts), models.opened()
    configs = _judges(judges)
    folder = out or (made[0].run.folder if made[0].run else Path("evaluation")) / f"prompts-{prompts.stem}"
    files.check_writable(folder, str(folder), "name another with --out")
    scorers = judging(configs, made)
    for each in made:
        prompt_set.begin(folder / each.name, wanted, {**each.about, "seeds": seeds})
    try:
        scores = list(_evaluated(made, wanted, seeds, folder, scorers, console))
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was")
        return 130
    written = write(folder, prompts.stem, wanted, scores, seeds)
    if scores[0].values:
        console.print(shown(scores))
    console.print(f"images and scores side by side: {written}")
    return 0


def _judges(given: Sequence[str]) -> Mapping[str, Any]:
    """Name → settings. Raises InputError for what names no judge."""
    found: dict[str, Any] = {}
    for text in given:
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError("--judge cannot be read", got=text, expected="a kind, or '{kind: …}'") from error
        name = config.get("kind", "judge") if isinstance(config, dict) else str(config)
        found[name if name not in found else f"{name}_{len(found)}"] = config
    return validate(JudgeConfig, {"judge": found}).judge


def judging(configs: Mapping[str, Any], made: Sequence[Model]) -> dict[str, Scorer]:
    """The judges that are asked for, else those of the first run's configuration, else its data's held-out scorers."""
    provider = next((each.run.provider for each in made if each.run is not None), None)
    source = None if provider is None else provider.source
    if configs or provider is None:
        return {name: build_reward(config, source, f"--judge {name}", False) for name, config in configs.items()}
    return dict(provider.judges()) or {name: provider.source.scorers[name] for name in sorted(provider.source.held_out)}


def _evaluated(
    made: Sequence[Model], wanted: PromptSet, seeds: int, folder: Path, scorers: Mapping[str, Scorer], console: Console
) -> Iterator[Scores]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("images", total=len(made) * len(wanted.prompts) * seeds)
        for each in made:
            progress.update(task, description=f"images of {each.name}")
            prompt_set.draw(folder / each.name, wanted, seeds, each.painter, lambda: progress.advance(task))
        for each in made:
            progress.update(task, description=f"judging {each.name}")
            yield prompt_set.score(folder / each.name, each.name, wanted, seeds, scorers)


def write(folder: Path, title: str, wanted: PromptSet, scores: Sequence[Scores], seeds: int) -> Path:
    """Scores, summary and page; the page's path."""
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(prompt_set.table(scores, wanted))
    files.write_text(folder / SCORES, rows.getvalue())
    files.write_text(folder / SUMMARY, json.dumps(summary(scores), indent=1) + "\n")
    page = prompt_page.page(f"Prompts: {title}", wanted, scores, [each.model for each in scores], seeds)
    files.write_text(folder / PAGE, page)
    return folder / PAGE


def summary(scores: Sequence[Scores]) -> dict[str, Any]:
    """Judge → means of the models, and of two the difference and the second one's wins."""
    found: dict[str, Any] = {}
    for judge in scores[0].values:
        found[judge] = {"mean": {each.model: asdict(each.mean(judge)) for each in scores}}
        if len(scores) == 2:
            first, second = scores
            found[judge] |= {"difference": asdict(second.less(first, judge)), "wins": second.wins(first, judge)}
    return found


def shown(scores: Sequence[Scores]) -> Table:
    """The judges' means beside one another."""
    table = Table(title="Means over prompts, 95 % intervals (higher is better)", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("judge", *(each.model for each in scores), *(["difference", "wins"] if len(scores) == 2 else [])):
        table.add_column(heading)
    for judge in scores[0].values:
        cells = [judge, *(interval(each.mean(judge)) for each in scores)]
        if len(scores) == 2:
            first, second = scores
            cells += [interval(second.less(first, judge)), f"{second.wins(first, judge):.0%}"]
        table.add_row(*cells)
    return table
