"""The fixed validation protocol: the same images, prompts, noise and times at every step, run and preset.

What is judged depends on the protocol's own seed and on the source, never on the run: two numbers under one
protocol differ because the networks differ. No number involves the training objective or a training reward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from twinrl.config import Settings
from twinrl.evaluation import content
from twinrl.evaluation.distances import frechet_distance, kernel_distance
from twinrl.evaluation.isolation import undisturbed
from twinrl.evaluation.prdc import prdc
from twinrl.evaluation.shelf import Entry, Shelf
from twinrl.flow import conditions, draws, transport
from twinrl.flow.conditions import Condition, Network
from twinrl.flow.source import Scorer, Source, Split, captions_of, scored, seen
from twinrl.run import names
from twinrl.sampling import SamplerConfig, few_step, nfe, sample

HeldOut: TypeAlias = Literal["validation", "test"]
VELOCITY_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
KEPT_BY = ("n", "seed", "batch", "captions", "neighbours")
"""Settings that decide every judgement that is kept."""
DECODED = 50
"""Latents decoded at once: what the codec makes of more leaves a processor's cache."""


class GuidedConfig(Settings):
    """Samples with classifier-free guidance on top of what the student has in its target."""

    strength: float = Field(4.0, gt=0, allow_inf_nan=False, description="g of F(c) + g·(F(c) − F(∅))")
    nfe: int = Field(8, ge=1, description="few-step evaluations, each of two network calls")


class EvaluationConfig(Settings):
    """What is evaluated, on how much, and how often."""

    every: int = Field(500, ge=0, description="training steps between evaluations; 0: only at the end")
    n: int = Field(500, ge=20, description="samples judged; at most the split and half of all held-out images")
    nfe: tuple[PositiveInt, ...] = Field((1, 2, 4), min_length=1, description="network evaluations per sample")
    guided: GuidedConfig | None = Field(
        None, description="also judge guided samples (the published run: strength 4, 8 steps); null = no"
    )
    objective: bool = Field(
        False, description="also report the training objective on validation rows (the published run's validation)"
    )
    teacher_steps: int = Field(50, ge=1, description="Euler steps of the teacher in the final table")
    seed: int = Field(20_240_607, description="of noise, prompts and rows; independent of the run's seed")
    captions: Literal["training", "held_out"] = Field(
        "training",
        description="templates of the judged samples' prompts: those of training, or held-out ones; "
        "held-out images with captions of their own are asked for by these",
    )
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage")
    velocity_rows: int = Field(200, ge=1, description="images in val/velocity_mse, each at five times")
    grid_samples: int = Field(8, ge=1, description="samples per class in the sample grids")
    batch: int = Field(250, ge=1, description="rows per forward; the step noise at NFE ≥ 2 is keyed by it")
    reference: Path | None = Field(
        None, description="families: folder of images; adds FID and KID in Inception features against them"
    )
    inception: Path | None = Field(
        None, description="families: file of FID's Inception weights; null = downloaded once, for evaluation.reference"
    )


@dataclass(frozen=True)
class JudgedImages:
    """What the judge and the scorers say about n images, in order.

    A non-finite image is judged as a grey one and its numbers are then set to ``nan``.

    Attributes:
        labels: (n,) intended classes.
        features: (n, D) judge features.
        correct: (n,) 1 where the judge sees the intended class, else 0.
        scores: scorer → (n,).
        finite: (n,) whether the image was finite.
        content: statistic of :func:`twinrl.evaluation.content.statistics` → (n,).
    """

    labels: Tensor
    features: Tensor
    correct: Tensor
    scores: Mapping[str, Tensor]
    finite: Tensor
    content: Mapping[str, Tensor]

    @staticmethod
    def joined(parts: Sequence["JudgedImages"]) -> "JudgedImages":
        """The images of all parts, one part after the other."""
        return JudgedImages(
            torch.cat([p.labels for p in parts]),
            torch.cat([p.features for p in parts]),
            torch.cat([p.correct for p in parts]),
            {name: torch.cat([p.scores[name] for p in parts]) for name in parts[0].scores},
            torch.cat([p.finite for p in parts]),
            {name: torch.cat([p.content[name] for p in parts]) for name in parts[0].content},
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything by name, as :meth:`of` takes it."""
        own = {"labels": self.labels, "features": self.features, "correct": self.correct, "finite": self.finite}
        own |= {f"scores/{name}": score for name, score in self.scores.items()}
        own |= {f"content/{name}": values for name, values in self.content.items()}
        return {f"{prefix}/{name}": value for name, value in own.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], prefix: str) -> "JudgedImages":
        """From :meth:`tensors`."""
        own = {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
        scores, made = (
            {name.removeprefix(start): own[name] for name in own if name.startswith(start)}
            for start in ("scores/", "content/")
        )
        return JudgedImages(own["labels"], own["features"], own["correct"], scores, own["finite"], made)


def balanced_rows(labels: Tensor, n: int, seed: int, purpose: str) -> Tensor:
    """(n,) rows with classes as equal in number as they can be, sorted so that classes alternate.

    Arguments:
        labels: (N,) class labels, N ≥ n. seed, purpose: key of the choice within each class.
    """
    order = torch.randperm(len(labels), generator=draws.generator(seed, purpose))
    shuffled = labels[order]
    turn = torch.empty_like(shuffled)
    for label in shuffled.unique():
        turn[shuffled == label] = torch.arange(int((shuffled == label).sum()))
    by_turn_then_label = (turn * (int(labels.max()) + 1) + shuffled).argsort(stable=True)
    return order[by_turn_then_label[:n]]


def _strata(labels: Tensor) -> Tensor | None:
    """The labels as strata of the kernel distance; None where a class has a single image."""
    return labels if int(labels.bincount()[labels].min()) > 1 else None


class LabelProtocol:
    """Everything that stays fixed between evaluations, computed once.

    The reference images come from one held-out split. As many other held-out images, from the rest of that
    split and from the other one, give the real-against-real floor. Samples are made for the labels of the
    reference images, so their class mix is the same and as balanced as the split allows.

    Arguments:
        source: data, codec, judge and scorers, already on ``device``.
        config: sizes, seed and NFE.
        split: "validation" during training, "test" for the final table.
        device: where the networks are.
        judges: further rewards by name, which training never follows.
        shelf: keeps what is the same for every run; None keeps nothing.

    Attributes:
        scorers: everything that scores samples, by name. held_out: those that training never follows.
        n: images in every set: ``config.n``, less where the split or half of all held-out images is.
            All distances, the floor included, are at this n, since they depend on it.
        labels: (n,) of reference images and samples alike.
        images: the reference images.
        prompts: n prompts in words, the images' own or from the configured templates. condition: theirs.
        reference: what the judge says about the reference images. other: about the other real images.
        floor: distances and PRDC of ``other`` against ``reference``: what a perfect generator would get.
    """

    def __init__(
        self,
        source: Source,
        config: EvaluationConfig,
        split: HeldOut = "validation",
        device: torch.device | str = "cpu",
        judges: Mapping[str, Scorer] | None = None,
        shelf: Shelf | None = None,
    ):
        self.scorers = {**source.scorers, **(judges or {})}
        self.held_out = source.held_out | frozenset(judges or {})
        self.source, self.config, self.split, self.device = source, config, split, torch.device(device)
        self.shelf = shelf
        held_out = len(source.validation) + len(source.test)
        self.n = min(config.n, len(getattr(source, split)), held_out // 2)
        self.rows, self.images, self._other_images = self._choose_images()
        self.labels = self.images.labels
        self.prompts = self._captions(self.images, 0, config.captions == "held_out")
        with undisturbed(seed=config.seed, device=self.device):
            self.condition = source.condition(self.prompts)
            self._velocity_batch = self._velocity_inputs()
        real = self.kept("real-images", self._judge_originals)
        self.reference, self.other = JudgedImages.of(real.tensors, "reference"), JudgedImages.of(real.tensors, "other")
        self.floor = self.distances(self.other) | self.content(self.other)

    def _choose_images(self) -> tuple[Tensor, Split, Split]:
        """Rows of the n reference images in their split, these images, and n others that are held out."""
        own: Split = getattr(self.source, self.split)
        second: Split = self.source.test if self.split == "validation" else self.source.validation
        rows = balanced_rows(own.labels, self.n, self.config.seed, f"evaluation {self.split}")
        rest = torch.ones(len(own), dtype=torch.bool).index_fill(0, rows, False).nonzero()[:, 0]
        pool = torch.cat([own.labels[rest], second.labels]).cpu()
        chosen = balanced_rows(pool, self.n, self.config.seed, f"evaluation floor {self.split}")
        from_own, from_second = rest[chosen[chosen < len(rest)]], chosen[chosen >= len(rest)] - len(rest)
        a, b = own.take(from_own), second.take(from_second)
        captions = None if a.captions is None or b.captions is None else [*a.captions, *b.captions]
        other = Split(torch.cat([a.pixels, b.pixels]), torch.cat([a.labels, b.labels]), captions)
        return rows, own.take(rows), other

    def _captions(self, images: Split, step: int, held_out: bool = False) -> list[str]:
        return captions_of(self.source, images, torch.arange(len(images)), self.config.seed, step, held_out)

    def kept(self, name: str, make: Callable[[], Entry], **decides: Any) -> Entry:
        """What ``make`` gives, of this protocol's images, from the shelf where there is one."""
        if self.shelf is None:
            return make()
        own = {key: getattr(self.config, key) for key in KEPT_BY}
        return self.shelf.get(f"{name}-{self.split}", make, protocol=own, **decides)

    def _judge_originals(self) -> Entry:
        reference, other = self.judge_real(lambda pixels: pixels)
        return Entry(reference.tensors("reference") | other.tensors("other"))

    def judge_real(self, through: Callable[[Tensor], Tensor]) -> tuple[JudgedImages, JudgedImages]:
        """The reference images and the other real images, judged after ``through`` (pixels → pixels)."""
        reference, other = self.images, self._other_images
        other_prompts = self._captions(other, 1)
        return (
            self.judge(self._chunked(through, reference.pixels)),
            self.judge(self._chunked(through, other.pixels), other.labels, other_prompts),
        )

    def round_trip(self) -> tuple[JudgedImages, JudgedImages]:
        """:meth:`judge_real` after encoding and decoding: the best that a generator of latents can do."""
        return self.judge_real(lambda pixels: self._decode(self.source.encode(pixels)))

    def _chunked(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        with undisturbed(seed=self.config.seed, device=self.device):
            return torch.cat([function(pixels[c].to(self.device)) for c in self._chunks(len(pixels))])

    # --- samples ----------------------------------------------------------------------------------------

    def samples(self, network: Network, sampler: SamplerConfig, draw: int = 0, guidance: float = 0.0) -> Tensor:
        """(n, C, H, W) decoded pixels, one for each prompt, from the fixed noise number ``draw``."""
        noise = self.noise(self.n, f"evaluation noise {draw}")
        return self._decoded(network, sampler, noise, self.condition, draw * self.n, guidance)

    def noise(self, n: int, purpose: str) -> Tensor:
        """(n, C, H, W) start noise of the protocol for ``purpose``."""
        return draws.normal((n, *self.source.latent_shape), self.config.seed, purpose).to(self.device)

    def _decoded(
        self,
        network: Network,
        sampler: SamplerConfig,
        noise: Tensor,
        condition: Condition,
        key: int,
        guidance: float,
    ) -> Tensor:
        """Samples from ``noise``, in chunks whose keyed step noise differs from chunk to chunk."""
        parts = []
        with undisturbed(network, seed=self.config.seed, device=self.device):
            for chunk in self._chunks(len(noise)):
                rows = conditions.rows(condition, chunk)
                null = self.source.null_condition(conditions.size(rows)) if guidance else None
                seed = self.config.seed + key + chunk.start
                z = sample(network, noise[chunk], rows, sampler, seed=seed, guidance=guidance, null=null)
                parts.append(self._decode(z))
        return torch.cat(parts)

    def _decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.source.decode(part) for part in z.split(DECODED)])

    def _chunks(self, n: int) -> list[slice]:
        size = self.config.batch
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def grid(self, network: Network, sampler: SamplerConfig) -> Tensor:
        """(classes, grid_samples, C, H, W) pixels: a row for each class, the same noise in a column.

        Every row repeats the start noise and the noise injected on the way, so a column differs by prompt alone.
        """
        noise = self.noise(self.config.grid_samples, "evaluation grid")
        conditions_by_row = [self.source.condition([prompt] * len(noise)) for prompt in self.grid_prompts()]
        return torch.stack([self._decoded(network, sampler, noise, c, 0, 0.0) for c in conditions_by_row])

    def grid_prompts(self) -> list[str]:
        """One prompt per class, in class order: the labels of the grid's rows."""
        return self.source.prompts(torch.arange(len(self.source.classes)), self.config.seed, 2)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Short names of the rows of a grid: the classes."""
        return self.source.classes

    def diversity(self, network: Network, sampler: SamplerConfig, n: int) -> tuple[str, Tensor]:
        """One prompt and (n, C, H, W) images of it from other noise."""
        prompt = self.grid_prompts()[len(self.source.classes) // 3]
        with undisturbed(network, seed=self.config.seed, device=self.device):
            condition = self.source.condition([prompt] * n)
            z = sample(network, self.noise(n, "evaluation diversity"), condition, sampler)
            return prompt, self._decode(z)

    # --- judgements -------------------------------------------------------------------------------------

    def judge(self, pixels: Tensor, labels: Tensor | None = None, prompts: Sequence[str] | None = None) -> JudgedImages:
        """Features, class verdicts and scores of n images in [−1, 1] (clamped).

        Labels and prompts are those of the protocol's samples unless given.
        """
        labels = self.labels if labels is None else labels
        prompts = self.prompts if prompts is None else prompts
        with undisturbed(seed=self.config.seed, device=self.device):
            parts = [self._judge_chunk(pixels[c], labels[c], prompts[c]) for c in self._chunks(len(pixels))]
        return JudgedImages.joined(parts)

    def _judge_chunk(self, pixels: Tensor, labels: Tensor, prompts: Sequence[str]) -> JudgedImages:
        finite = pixels.isfinite().flatten(1).all(1).cpu()
        shown = torch.where(pixels.isfinite(), pixels, 0).clamp(-1, 1).to(self.device)
        judge, scorers = self.source.judge, self.scorers

        def valid(values: Tensor) -> Tensor:
            values = values.detach().to("cpu", torch.float64)
            return torch.where(transport.like(finite, values), values, torch.nan)

        features, logits = seen(judge, shown)
        correct = logits.argmax(1).cpu() == labels.cpu()
        scores = {name: valid(scored(scorer, shown, prompts)) for name, scorer in scorers.items()}
        made = {name: valid(values) for name, values in content.statistics(shown).items()}
        return JudgedImages(labels.cpu(), valid(features), valid(correct), scores, finite, made)

    def distances(self, judged: JudgedImages) -> dict[str, float]:
        """fd, kid, precision, recall, density and coverage against the reference images."""
        real, fake = self.reference.features, judged.features
        strata = [_strata(self.reference.labels), _strata(judged.labels)]
        return {
            "kid": kernel_distance(real, fake, *strata),
            "fd": frechet_distance(real, fake),
            **prdc(real, fake, self.config.neighbours),
        }

    def content(self, judged: JudgedImages) -> dict[str, float]:
        """What pictures are made of, and what held-out scorers say, in deviations of the reference images."""
        found = content.offsets(self._content(judged), self._real_content)
        return {f"content/{name}": value for name, value in found.items()}

    @cached_property
    def _real_content(self) -> dict[str, Tensor]:
        return self._content(self.reference)

    def _content(self, images: JudgedImages) -> dict[str, Tensor]:
        held_out = {f"held_out/{name}": images.scores[name] for name in sorted(self.held_out & images.scores.keys())}
        unit = float(self.reference.features.norm(dim=1).mean())
        return {**images.content, **content.variety(images.features, images.labels, unit), **held_out}

    def scores(self, judged: JudgedImages) -> dict[str, float]:
        """Scorer → mean score."""
        return {name: score.mean().item() for name, score in judged.scores.items()}

    def summary(self, judged: JudgedImages) -> dict[str, float]:
        """:meth:`distances`, :meth:`content`, accuracy and the share of non-finite images, by plain names."""
        return {
            **self.distances(judged),
            **self.content(judged),
            "accuracy": judged.correct.mean().item(),
            "nonfinite_frac": (~judged.finite).double().mean().item(),
        }

    # --- metrics ----------------------------------------------------------------------------------------

    def quality(self, network: Network, sampler: SamplerConfig) -> dict[str, float]:
        """All metrics of the samples that ``network`` makes with ``sampler``, named by its NFE.

        Non-finite samples make the metrics that they enter ``nan``; ``val/nonfinite_frac`` says how many.

        Arguments:
            network: called as ``network(x, t, r, condition)``; returns to its own modes afterwards.
            sampler: e.g. ``few_step(1)``.
        """
        judged, evaluations = self.judge(self.samples(network, sampler)), nfe(sampler)
        metrics = {names.val(quantity, evaluations): value for quantity, value in self.summary(judged).items()}
        for label, name in enumerate(self.source.classes):
            correct = judged.correct[self.labels == label]
            metrics[names.accuracy(name, evaluations)] = correct.mean().item()
        for name, score in self.scores(judged).items():
            metrics[names.score(name, evaluations, name in self.held_out)] = score
        return metrics

    def draw_quality(self, network: Network, sampler: SamplerConfig, draw: int) -> float:
        """The kernel distance of samples from the fixed noise number ``draw``."""
        return self.distances(self.judge(self.samples(network, sampler, draw)))["kid"]

    def guided(self, network: Network, config: "GuidedConfig") -> dict[str, float]:
        """The summary of samples made with guidance, as the published run made its final ones."""
        sampler = few_step(config.nfe)
        found = self.summary(self.judge(self.samples(network, sampler, guidance=config.strength)))
        return {names.guided(quantity, config.nfe): value for quantity, value in found.items()}

    def evaluate(self, network: Network, samplers: Sequence[SamplerConfig] | None = None) -> dict[str, float]:
        """One evaluation in training: :meth:`quality` of every sampler, ``val/quality``, ``val/velocity_mse``.

        ``val/quality`` is the kernel distance under the first sampler: one jump at 1 NFE by default.

        Arguments:
            network: the student.
            samplers: ``few_step`` at every NFE of the configuration if None; ``[euler(n)]`` suits a network that
                knows no target time.
        """
        samplers = samplers or [few_step(evaluations) for evaluations in self.config.nfe]
        metrics: dict[str, float] = {}
        for sampler in samplers:
            metrics |= self.quality(network, sampler)
        if self.config.guided is not None:
            metrics |= self.guided(network, self.config.guided)
        quality = metrics[names.val("kid", nfe(samplers[0]))]
        return {names.VAL_QUALITY: quality, names.VAL_VELOCITY_MSE: self.velocity_mse(network), **metrics}

    def _velocity_inputs(self) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """x, z, t and condition: reference images at every time of the grid, with noise of their own."""
        rows = self.rows[: self.config.velocity_rows]
        latents = self.source.latents(self.split)
        x = latents[rows.to(latents.device)].to(self.device)
        t = torch.tensor(VELOCITY_TIMES, device=self.device)
        each = conditions.rows(self.condition, slice(0, len(rows)))
        condition = conditions.concatenate([each] * len(t))
        z = self.noise(len(rows) * len(t), "evaluation velocity")
        return x.repeat(len(t), 1, 1, 1), z, t.repeat_interleave(len(rows)), condition

    def velocity_mse(self, network: Network) -> float:
        """``mean ‖F(x_t, t, t) − (z − x)‖²`` per element, on fixed images, noise and times.

        A student whose target contains guidance learns another velocity: compare within a preset only.
        """
        x, z, t, condition = self._velocity_batch
        total = 0.0
        with undisturbed(network, seed=self.config.seed, device=self.device):
            for chunk in self._chunks(len(x)):
                x_t = transport.interpolate(x[chunk], z[chunk], t[chunk])
                F = network(x_t, t[chunk], t[chunk], conditions.rows(condition, chunk))
                total += (F - transport.velocity(x[chunk], z[chunk])).double().square().sum().item()
        return total / x.numel()
