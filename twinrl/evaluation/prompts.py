"""The fixed validation protocol of pretrained families: fixed prompts, noise and held-out latents, no class judge.

A folder has no labels, so nothing judges whether a sample shows its class. What is measured instead:

    val/latent_kid   kernel distance (KID, arXiv:1801.01401) between latents of samples and of held-out images, both
                     averaged over a 4×4 grid of regions: C·16 numbers an image, whatever its bucket
    val/score, val/held_out_score   mean of the reward that training follows, and of those that it does not
    val/velocity_mse as for labelled data
    val/fid, val/kid Fréchet and kernel distance in Inception features to a folder of images, ``evaluation.reference``
    val/content/…    what samples are made of, beside the held-out images through the codec; where samples are decoded
                     anyway, for a reward or for Inception

``val/quality`` is the latent kernel distance at the first NFE: it exists without any reward model, and it gets worse
when a reward is hacked, which a reward's mean does not. It sees layout and colour, not detail: read it as a watchdog,
and judge results by held-out rewards and by eye. Data without images have no such distance; there ``val/quality`` is
the negative mean of the first held-out reward, or of the training reward where that is the only one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from twinrl.config.errors import InputError
from twinrl.evaluation import content
from twinrl.evaluation.distances import frechet_distance, kernel_distance
from twinrl.evaluation.isolation import undisturbed
from twinrl.evaluation.protocol import VELOCITY_TIMES, EvaluationConfig
from twinrl.evaluation.table import write_json
from twinrl.flow import draws, transport
from twinrl.flow.conditions import Condition, Network
from twinrl.flow.source import Scorer, scored
from twinrl.machine.visiting import visiting
from twinrl.run import names
from twinrl.sampling import SamplerConfig, few_step, sample

if TYPE_CHECKING:
    from rich.table import Table

    from twinrl.data.prepared import FolderRows, FolderSource

REGIONS = 4
PROMPTS_SHOWN = 8


class Images(Protocol):
    """Images to compare with; see ``twinrl.rewards.inception.Reference``."""

    @property
    def network(self) -> Callable[[Tensor], Tensor]:
        """Pixels (B, 3, H, W) in [−1, 1] → features (B, D)."""

    @property
    def features(self) -> Tensor:
        """(N, D) of the images."""


class Chunk(NamedTuple):
    """Rows of one bucket that are sampled together.

    Attributes:
        rows: (B,) of the validation split.
        prompts: B captions.
        condition: theirs.
        noise: (B, C, h, w) start noise.
        key: of the noise injected on the way.
    """

    rows: Tensor
    prompts: list[str]
    condition: Condition
    noise: Tensor
    key: int


class PromptProtocol:
    """Validation of a family on captions of the validation split.

    Arguments:
        source: data and codec, already on ``device``.
        config: sizes, seed, NFE and guided samples; what is about judges and captions has no meaning here.
        device: where the networks are.
        judges: rewards that training never follows, by name.
        followed: the reward that training follows, by name, if there is one.
        images: images to compare with, by their Inception features, if there are any.
        visitors: frozen modules of source and scorers that may wait on the host.

    Attributes:
        n: prompts judged.
        floor: latent kernel distance of other held-out images, if there are enough of them.
        row_names: short names of the rows of a grid.

    Raises:
        InputError: the validation split is too small, or nothing is there to measure quality by.
    """

    def __init__(
        self,
        source: "FolderSource",
        config: EvaluationConfig,
        device: torch.device | str = "cpu",
        judges: Mapping[str, Scorer] | None = None,
        followed: Mapping[str, Scorer] | None = None,
        images: Images | None = None,
        visitors: Sequence[nn.Module] = (),
    ):
        self.source, self.config, self.device = source, config, torch.device(device)
        self.scorers = {**(judges or {}), **(followed or {})}
        self.held_out, self.images, self.visitors = frozenset(judges or {}), images, visitors
        self.data: FolderRows = source.reader("validation", self.device, torch.float32, {"any": 1.0})
        self.has_images = source.splits["validation"].has_images
        found = len(self.data.dataset)
        if found < 2:
            raise InputError(
                "the validation split is too small", got=f"{found} rows", expected="2 or more",
                fix="raise `validation` of `twinrl data prepare`, or add data",
            )  # fmt: skip
        if not self.has_images and not self.scorers:
            raise InputError(
                "nothing measures quality: the data are prompts, and there is no reward",
                fix="set reward.held_out, or train on images",
            )
        order = torch.randperm(found, generator=draws.generator(config.seed, "evaluation prompts"))
        self.n = min(config.n, found)
        self.rows, self.others = order[: self.n].sort().values, order[self.n : 2 * self.n].sort().values
        self.reference = self._features_of(self.rows) if self.has_images else None
        self.floor = self._floor()
        self.row_names = tuple(_short(prompt) for prompt in self.grid_prompts())

    def _floor(self) -> dict[str, float]:
        if self.reference is None or len(self.others) < 2:
            return {}
        return {"latent_kid": kernel_distance(self.reference, self._features_of(self.others))}

    # --- rows -------------------------------------------------------------------------------------------

    def _buckets(self, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The rows of each bucket."""
        for name, members in self.data.dataset.members.items():
            if len(inside := rows[torch.isin(rows, members)]):
                yield name, inside

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows of one bucket, at most ``evaluation.batch`` at once."""
        for _, inside in self._buckets(rows):
            yield from inside.split(self.config.batch)

    def _chunks(self, draw: int) -> Iterator[Chunk]:
        purpose = f"evaluation noise {draw}" if draw else "evaluation noise"
        for at in self._parts(self.rows):
            prompts, condition = self.data.captioned(at, 0, 0)
            yield Chunk(at, prompts, condition, self._noise(at, purpose), int(at[0]) + draw * len(self.data.dataset))

    def _noise(self, at: Tensor, purpose: str) -> Tensor:
        """Noise that belongs to the rows, however they are chunked."""
        shape = self.data.shape(at)
        return torch.stack([draws.normal(shape, self.config.seed, purpose, int(i)) for i in at]).to(self.device)

    def _features_of(self, rows: Tensor) -> Tensor:
        return torch.cat([_features(self.data.dataset.latents(at).float()) for at in self._parts(rows)])

    # --- samples ----------------------------------------------------------------------------------------

    def _sampled(self, network: Network, sampler: SamplerConfig, chunk: Chunk, guidance: float = 0.0) -> Tensor:
        null, seed = self.data.null(len(chunk.noise)) if guidance else None, self.config.seed + chunk.key
        return sample(network, chunk.noise, chunk.condition, sampler, seed=seed, guidance=guidance, null=null)

    def _grid_rows(self) -> Tensor:
        largest = max(self._buckets(self.rows), key=lambda found: len(found[1]))[1]
        return largest[:PROMPTS_SHOWN]

    def grid_prompts(self) -> list[str]:
        """The captions of the grid's rows: of the bucket with most of them, so that all images have one size."""
        return self.data.dataset.captions(self._grid_rows())

    def grid(self, network: Network, sampler: SamplerConfig) -> Tensor:
        """(rows, K, C, H, W) pixels: a row for each prompt, the same noise in a column; K ≤ 4."""
        columns = min(4, self.config.grid_samples)
        return torch.stack([self._of_prompt(network, sampler, row, columns) for row in self._grid_rows()])

    def diversity(self, network: Network, sampler: SamplerConfig, n: int) -> tuple[str, Tensor]:
        """One prompt and images of it from other noise; ``evaluation.grid_samples`` of them."""
        row = self._grid_rows()[0]
        return self.grid_prompts()[0], self._of_prompt(network, sampler, row, min(n, self.config.grid_samples))

    def _of_prompt(self, network: Network, sampler: SamplerConfig, row: Tensor, n: int) -> Tensor:
        prompts, condition = self.data.captioned(row[None], 0, 0)
        shape, images = self.data.shape(row[None]), []
        with self._undisturbed(network):
            for number in range(n):
                noise = draws.normal((1, *shape), self.config.seed, "evaluation grid", number).to(self.device)
                images.append(self._pixels(self._sampled(network, sampler, Chunk(row, prompts, condition, noise, 0))))
        return torch.cat(images)

    @contextmanager
    def _undisturbed(self, network: Network) -> Iterator[None]:
        """For making and judging samples: what judges them is on the device."""
        with undisturbed(network, seed=self.config.seed, device=self.device), visiting(self.visitors, self.device):
            yield

    def _pixels(self, z: Tensor) -> Tensor:
        """Decoded one by one: large images take gigabytes in the decoder."""
        return torch.cat([self.source.decode(each[None]) for each in z])

    # --- metrics ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def quality(
        self, network: Network, sampler: SamplerConfig, guidance: float = 0.0, draw: int = 0
    ) -> dict[str, float]:
        """Distances to held-out and other images, mean scores and the share of non-finite samples, by plain names; of
        the fixed noise number ``draw``."""
        features, finite, decoded, seen = [], [], [], []
        with self._undisturbed(network):
            for chunk in self._chunks(draw):
                z = self._sampled(network, sampler, chunk, guidance)
                features.append(_features(z.float()).cpu())
                finite.append(z.isfinite().flatten(1).all(1).cpu())
                if self._decodes:
                    pixels = self._pixels(z).clamp(-1, 1)
                    decoded.append(self._looked_at(pixels, chunk.prompts))
                    if self.images is not None:
                        seen += [self.images.network(each[None]) for each in pixels]
            real_content = self._real if self._decodes else None  # made here, where codec and scorers are
        sampled = torch.cat(features)
        found = {} if self.reference is None else {"latent_kid": kernel_distance(self.reference, sampled)}
        if self.images is not None:
            real, made = self.images.features, torch.cat(seen)
            found |= {"fid": frechet_distance(real, made), "kid": kernel_distance(real, made)}
        if self._decodes:
            pictures = _joined(decoded)
            found |= {f"score/{name}": pictures[f"score/{name}"].mean().item() for name in self.scorers}
            if real_content is not None:
                offsets = content.offsets(self._content(pictures, sampled), real_content)
                found |= {f"content/{name}": value for name, value in offsets.items()}
        return {**found, "nonfinite_frac": (~torch.cat(finite)).double().mean().item()}

    @property
    def _decodes(self) -> bool:
        """Whether samples become pictures in a validation."""
        return bool(self.scorers) or self.images is not None

    def _looked_at(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """(B,) of pictures in [−1, 1]: statistics, and scores as ``score/NAME``; nan where one is not finite."""
        found = {f"score/{name}": scored(scorer, pixels, prompts) for name, scorer in self.scorers.items()}
        whole = pixels.isfinite().flatten(1).all(1)
        statistics = content.statistics(torch.where(pixels.isfinite(), pixels, 0))
        found |= {name: torch.where(whole, values, torch.nan) for name, values in statistics.items()}
        return {name: values.double().cpu() for name, values in found.items()}

    def _content(self, pictures: Mapping[str, Tensor], features: Tensor) -> dict[str, Tensor]:
        """Statistics of pictures with latent features (B, D), their variety, and what held-out scorers say."""
        assert self.reference is not None
        held_out = {f"held_out/{name}": pictures[f"score/{name}"] for name in sorted(self.held_out)}
        own = {name: values for name, values in pictures.items() if not name.startswith("score/")}
        alike = torch.zeros(len(features), dtype=torch.long)  # no prompt is like another
        unit = float(self.reference.norm(dim=1).mean())
        return {**own, **content.variety(features.double(), alike, unit), **held_out}

    @cached_property
    def _real(self) -> dict[str, Tensor] | None:
        """The same of the held-out images of the judged prompts, through the codec; None where there are none."""
        if self.reference is None:
            return None
        found = []
        with torch.no_grad():
            for at in self._parts(self.rows):
                pixels = self._pixels(self.data.dataset.latents(at).to(self.device, torch.float32)).clamp(-1, 1)
                found.append(self._looked_at(pixels, self.data.captioned(at, 0, 0)[0]))
        return self._content(_joined(found), self.reference)

    def draw_quality(self, network: Network, sampler: SamplerConfig, draw: int) -> float:
        """What ranks samples, of the fixed noise number ``draw``; smaller is better."""
        return self._ranking(self.quality(network, sampler, draw=draw))

    def _ranking(self, found: Mapping[str, float]) -> float:
        """The distance to held-out images; without any, a held-out score before a followed one, negated."""
        ranked = [*sorted(self.held_out), *(name for name in self.scorers if name not in self.held_out)]
        return found["latent_kid"] if self.has_images else -found[f"score/{ranked[0]}"]

    def evaluate(self, network: Network) -> dict[str, float]:
        """One evaluation in training: metrics at every NFE, ``val/quality``, ``val/velocity_mse`` where there are
        images."""
        found = {evaluations: self.quality(network, few_step(evaluations)) for evaluations in self.config.nfe}
        metrics = {self._metric(q, n): value for n, values in found.items() for q, value in values.items()}
        if (guided := self.config.guided) is not None:
            values = self.quality(network, few_step(guided.nfe), guided.strength)
            metrics |= {names.guided(quantity, guided.nfe): value for quantity, value in values.items()}
        quality = self._ranking(found[self.config.nfe[0]])
        mse = {names.VAL_VELOCITY_MSE: self.velocity_mse(network)} if self.has_images else {}
        return {names.VAL_QUALITY: quality, **mse, **metrics}

    def _metric(self, quantity: str, evaluations: int) -> str:
        kind, _, scorer = quantity.partition("/")
        if kind == "content":
            return names.content(scorer, evaluations)
        return names.score(scorer, evaluations, scorer in self.held_out) if scorer else names.val(kind, evaluations)

    @torch.no_grad()
    def velocity_mse(self, network: Network) -> float:
        """``mean ‖F(x_t, t, t) − (z − x)‖²`` per element, on fixed images, noise and times."""
        total, count = 0.0, 0
        with undisturbed(network, seed=self.config.seed, device=self.device):
            for at in self._parts(self.rows[: self.config.velocity_rows]):
                x = self.data.dataset.latents(at).to(self.device, torch.float32)
                _, condition = self.data.captioned(at, 0, 0)
                z = self._noise(at, "evaluation velocity")
                for time in VELOCITY_TIMES:
                    t = torch.full((len(x),), time, device=self.device)
                    F = network(transport.interpolate(x, z, t), t, t, condition)
                    total += (F - transport.velocity(x, z)).double().square().sum().item()
                    count += x.numel()
        return total / count


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of several parts, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _features(latents: Tensor) -> Tensor:
    """(B, C·16) means over a 4×4 grid of regions of latents (B, C, h, w)."""
    return adaptive_avg_pool2d(latents, REGIONS).flatten(1)


def _short(prompt: str, most: int = 24) -> str:
    return prompt if len(prompt) <= most else f"{prompt[: most - 1]}…"


@dataclass(frozen=True)
class PromptTable:
    """The final table of a family: a row for each NFE.

    Attributes:
        rows: network evaluations → metrics by plain names.
        n: prompts behind each row.
        floor: what other held-out images get, where there are any.
        held_out: names of scores that training did not follow.
    """

    rows: Mapping[int, Mapping[str, float]]
    n: int
    floor: Mapping[str, float] = field(default_factory=dict)
    held_out: Sequence[str] = ()

    @classmethod
    def of(cls, protocol: PromptProtocol, network: Network) -> "PromptTable":
        """The student at every NFE of the protocol."""
        rows = {evaluations: protocol.quality(network, few_step(evaluations)) for evaluations in protocol.config.nfe}
        return cls(rows, protocol.n, protocol.floor, tuple(sorted(protocol.held_out)))

    def as_dict(self) -> dict[str, Any]:
        """Plain mappings and lists; non-finite numbers as the strings "nan", "inf", "-inf"."""
        from twinrl.run import runlog

        rows = {str(n): {k: runlog.encode(v) for k, v in values.items()} for n, values in self.rows.items()}
        return asdict(self) | {"rows": rows}

    def write(self, path: Path) -> None:
        """The table as JSON, keys as in :meth:`as_dict`."""
        write_json(self.as_dict(), path)

    def rich(self) -> "list[Table]":
        """For the terminal: distances, and rewards where there are any; held-out ones are marked."""
        names = list(next(iter(self.rows.values())))
        rewards = [name for name in names if name.startswith("score/")]
        distances = [name for name in names if name not in rewards and not name.startswith("content/")]
        tables = [self._table("Samples against held-out images", distances)]
        return [*tables, self._table("Mean rewards", rewards)] if rewards else tables

    def _table(self, title: str, columns: Sequence[str]) -> "Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=f"{title} ({self.n} prompts)", box=SIMPLE_HEAD, pad_edge=False)
        marks = {name: " (held out)" if name.removeprefix("score/") in self.held_out else "" for name in columns}
        for heading in ("NFE", *(name.removeprefix("score/") + marks[name] for name in columns)):
            table.add_column(heading, justify="right")
        for evaluations, values in self.rows.items():
            table.add_row(str(evaluations), *(f"{values[name]:.4g}" for name in columns))
        if any(name in self.floor for name in columns):
            cells = (f"{self.floor[name]:.4g}" if name in self.floor else "" for name in columns)
            table.add_row("real", *cells)
        return table
