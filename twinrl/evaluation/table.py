"""The final table: a student at several NFE beside its teacher, decoded real images and the floor."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twinrl.evaluation.distances import frechet_distance
from twinrl.evaluation.protocol import JudgedImages, LabelProtocol, balanced_rows
from twinrl.evaluation.shelf import Entry, has_digest, weights
from twinrl.flow.conditions import Network
from twinrl.sampling import euler, few_step, nfe

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

REPEATED_NOISE = "95% t interval of the mean over repeated start noise, network and real images fixed"
RESPLIT = "middle 95% over random re-splits of the same real images into reference and others"
WILSON = "95% Wilson interval over images (and draws of noise)"
RESPLITS = 50


@dataclass(frozen=True)
class IntervalEstimate:
    """A value with its 95% interval; bounds are ``nan`` where there is none. ``method`` says what varied."""

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str = ""


@dataclass(frozen=True)
class TableRow:
    """One line of the table: what made the images, network evaluations per image (0: real), its metrics."""

    name: str
    nfe: int
    metrics: Mapping[str, IntervalEstimate]

    @staticmethod
    def of(plain: Mapping[str, Any]) -> "TableRow":
        """From ``asdict``."""
        metrics = {name: IntervalEstimate(**estimate) for name, estimate in plain["metrics"].items()}
        return TableRow(plain["name"], plain["nfe"], metrics)


@dataclass(frozen=True)
class FinalTable:
    """The rows with what they share.

    Attributes:
        rows: student rows, teacher, real images through the codec, real images as they are (the floor).
        n: images in every set. split: where the reference images come from. repeats: draws of start noise.
        scorers: names of the reward models that scored the rows. held_out: those that training never follows.
    """

    rows: Sequence[TableRow]
    n: int
    split: str
    repeats: int
    scorers: Sequence[str] = ()
    held_out: Sequence[str] = ()

    @property
    def floor(self) -> float:
        """Fréchet distance of real images against real images at n."""
        return self.rows[-1].metrics["fd"].value

    def as_dict(self) -> dict[str, Any]:
        """Plain mappings and lists; non-finite numbers as the strings "nan", "inf", "-inf"."""
        return _plain(asdict(self) | {"floor": self.floor})

    def write(self, path: Path) -> None:
        """The table as JSON, keys as in :meth:`as_dict`."""
        write_json(self.as_dict(), path)

    def rich(self) -> "list[Table]":
        """For the terminal, 80 columns wide: distances, and rewards where there are any."""
        return [self._distances(), *([self._rewards()] if self.scorers else [])]

    def _distances(self) -> "Table":
        """Intervals are under their values."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"Samples against {self.n} real images ({self.split} split)"
        table = Table(title=title, caption=self._caption(), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("", no_wrap=True)
        for heading in ("NFE", "Fréchet", "− floor", "prec.", "recall", "accuracy"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(row.name, str(row.nfe or "–"), *self._cells(row.metrics))
        return table

    def _cells(self, metrics: Mapping[str, IntervalEstimate]) -> "list[str | Text]":
        fd, accuracy = metrics["fd"], metrics["accuracy"]
        plain = [f"{metrics[name].value:.2f}" for name in ("precision", "recall")]
        return [_show(fd, 2), f"{fd.value - self.floor:.2f}", *plain, _show(accuracy, 3)]

    def _rewards(self) -> "Table":
        """What the reward models say; held-out ones are marked."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title="Mean rewards (* held out: training never follows it)", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("NFE", justify="right")
        for name in self.scorers:
            table.add_column(f"{name}{'*' if name in self.held_out else ''}", justify="right", no_wrap=True)
        for row in self.rows:
            cells = [_show(row.metrics[_score(name)], 4) for name in self.scorers if _score(name) in row.metrics]
            if cells:
                table.add_row(row.name, str(row.nfe or "–"), *cells)
        return table

    def _caption(self) -> str:
        repeats = f"mean over {self.repeats} draws of noise" if self.repeats > 1 else "one draw of noise"
        return (
            f"Fréchet distance in judge features. Samples: {repeats} (95% interval of that mean). "
            "Real images: other held-out images against the reference images (range over re-splits). "
            "Accuracy of the judge: Wilson's 95% interval."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(estimate: IntervalEstimate, digits: int) -> "str | Text":
    from rich.text import Text

    value = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return Text.assemble(f"{value}\n", (f"{estimate.low:.{digits}f}–{estimate.high:.{digits}f}", "dim"))


# --- intervals ------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> IntervalEstimate:
    """Mean with Student's 95% interval over repeats of start noise (no interval for one repeat)."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    x = torch.tensor(values, dtype=torch.float64)
    mean = x.mean().item()
    if len(x) < 2:
        return IntervalEstimate(mean)
    half = float(stdtrit(len(x) - 1, 0.975)) * x.std().item() / math.sqrt(len(x))
    return IntervalEstimate(mean, mean - half, mean + half, REPEATED_NOISE)


def proportion_interval(hits: Tensor) -> IntervalEstimate:
    """Share of ones in ``hits`` (N,) with Wilson's 95% interval (Newcombe 1998, method 3)."""
    from scipy.special import ndtri

    share, n = hits.mean().item(), len(hits)
    if math.isnan(share):
        return IntervalEstimate(share)
    k, z = int(hits.sum()), float(ndtri(0.975))
    p, width = k / n, 2 * (n + z**2)
    centre, half = (2 * n * p + z**2) / width, z / width * math.sqrt(4 * n * p * (1 - p) + z**2)
    return IntervalEstimate(share, 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half, WILSON)


def resplit_interval(value: float, reference: JudgedImages, other: JudgedImages, seed: int) -> IntervalEstimate:
    """``value`` with the spread of the Fréchet distance over random halves of the same 2n images.

    The halves have equal class mixes, as the protocol's sets have. A bootstrap would repeat images, which
    lowers the effective n and so biases the distance.

    Arguments:
        reference: 2n images that the reference half is drawn from.
        other: the same images as judged, in the same order (equal to ``reference`` for the floor).
    """
    distances = []
    for split in range(RESPLITS):
        order = balanced_rows(reference.labels, len(reference.labels), seed, f"evaluation re-split {split}")
        a, b = order.chunk(2)
        distances.append(frechet_distance(reference.features[a], other.features[b]))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.tensor(distances, dtype=torch.float64).quantile(bounds).tolist()
    return IntervalEstimate(value, low, high, RESPLIT)


# --- rows -----------------------------------------------------------------------------------------------


def sample_row(name: str, nfe: int, protocol: LabelProtocol, draw: Callable[[int], Tensor], repeats: int) -> TableRow:
    """A row for samples; ``draw(i)`` gives the n images of start noise number i."""
    judged = [protocol.judge(draw(i)) for i in range(repeats)]
    summaries = [protocol.summary(images) for images in judged]
    metrics = {key: mean_interval([s[key] for s in summaries]) for key in summaries[0]}
    metrics["accuracy"] = proportion_interval(JudgedImages.joined(judged).correct)
    scores = [protocol.scores(images) for images in judged]
    return TableRow(name, nfe, metrics | {_score(n): mean_interval([s[n] for s in scores]) for n in scores[0]})


def _real_row(name: str, protocol: LabelProtocol, reference: JudgedImages, other: JudgedImages) -> TableRow:
    """A row for real images: ``other`` judged against the protocol's reference, accuracy on ``reference``."""
    metrics = {key: IntervalEstimate(value) for key, value in protocol.summary(other).items()}
    originals = JudgedImages.joined([protocol.reference, protocol.other])
    shown = JudgedImages.joined([reference, other])
    metrics["fd"] = resplit_interval(metrics["fd"].value, originals, shown, protocol.config.seed)
    metrics["accuracy"] = proportion_interval(reference.correct)
    metrics |= {_score(n): IntervalEstimate(value) for n, value in protocol.scores(reference).items()}
    return TableRow(name, 0, metrics)


def write_json(plain: Mapping[str, Any], path: Path) -> None:
    """A table's plain values as a file."""
    path.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")


def _score(scorer: str) -> str:
    return f"score/{scorer}"


def real_rows(protocol: LabelProtocol) -> list[TableRow]:
    """Real images through the codec (the best that a generator of latents can do) and as they are (floor)."""

    def make() -> Entry:
        through = _real_row("real, via codec", protocol, *protocol.round_trip())
        floor = _real_row("real (floor)", protocol, protocol.reference, protocol.other)
        return Entry({}, [asdict(through), asdict(floor)])

    return [TableRow.of(row) for row in protocol.kept("real-rows", make).plain]


def teacher_row(
    protocol: LabelProtocol, teacher: Network, repeats: int, guidance: float, settings: Mapping[str, Any] | None
) -> TableRow:
    """The teacher under many Euler steps, from the shelf where all that decides it has a digest."""
    sampler = euler(protocol.config.teacher_steps)

    def make() -> Entry:
        draw = partial(protocol.samples, teacher, sampler, guidance=guidance)
        return Entry({}, asdict(sample_row("teacher, Euler", nfe(sampler, guidance), protocol, draw, repeats)))

    if settings is None or not isinstance(teacher, nn.Module) or not has_digest(teacher):
        return TableRow.of(make().plain)
    about = {"network": dict(settings), "weights": weights(teacher), "steps": protocol.config.teacher_steps}
    return TableRow.of(protocol.kept("teacher-row", make, **about, repeats=repeats, guidance=guidance).plain)


def final_table(
    protocol: LabelProtocol,
    network: Network,
    teacher: Network | None = None,
    *,
    repeats: int = 5,
    teacher_guidance: float = 0.0,
    teacher_settings: Mapping[str, Any] | None = None,
) -> FinalTable:
    """Judge a student at every NFE of the protocol, its teacher, and real images.

    Arguments:
        protocol: usually of the test split.
        network: the student. teacher: sampled with ``teacher_steps`` Euler steps; no such row if None.
        repeats: independent draws of start noise behind each sample row, the same for all rows.
        teacher_guidance: classifier-free guidance of the teacher's samples.
        teacher_settings: plain values that decide the teacher beside its weights; None: its row is not kept.
    """

    def student(evaluations: int) -> TableRow:
        sampler = few_step(evaluations)
        return sample_row("student", nfe(sampler), protocol, partial(protocol.samples, network, sampler), repeats)

    rows = [student(evaluations) for evaluations in protocol.config.nfe]
    if teacher is not None:
        rows.append(teacher_row(protocol, teacher, repeats, teacher_guidance, teacher_settings))
    rows += real_rows(protocol)
    return FinalTable(
        rows, protocol.n, protocol.split, repeats, tuple(protocol.scorers), tuple(sorted(protocol.held_out))
    )
