"""What a run needs from its data, whatever they are: the contract between data and everything above.

A *source* brings data splits, a codec between pixels and the space in which the flow lives, and the
conditioning. Laboratories and MNIST are a :class:`Source`: in memory, labelled, with judges that training never
sees. A prepared folder with a pretrained family is :class:`Data` and no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from twinrl.config.components import checked, wrong_return
from twinrl.flow.conditions import Condition


@dataclass(frozen=True)
class Split:
    """One part of a data set, in memory.

    Attributes:
        pixels: (N, C, H, W) float32 in [−1, 1].
        labels: (N,) int64 class labels.
        captions: of each image, where images have their own; None: the source draws them by the label.
    """

    pixels: Tensor
    labels: Tensor
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "Split":
        """The chosen rows (n,), on the CPU."""
        captions = None if self.captions is None else [self.captions[row] for row in rows.tolist()]
        return Split(self.pixels.cpu()[rows], self.labels.cpu()[rows], captions)


class Judge(Protocol):
    """A classifier that training never sees; its features define the quality metrics.

    One whose logits follow from its features may say so by ``logits_of``: (B, D) → (B, K); see :func:`seen`.
    """

    def features(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) pixels in [−1, 1] → (B, D) features."""
        ...

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) pixels in [−1, 1] → (B, K) class logits."""
        ...


def seen(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) features and (B, K) logits; a judge that has ``logits_of`` looks once."""
    features = _rows(judge.features(images), judge, "features", len(images))
    if hasattr(judge, "logits_of"):
        return features, _rows(judge.logits_of(features), judge, "logits_of", len(images))
    return features, _rows(judge.logits(images), judge, "logits", len(images))


def _rows(value: object, judge: Judge, method: str, rows: int) -> Tensor:
    """What a judge says of its images. Raises InputError where it is not (B, D)."""
    found = checked(value, Tensor, judge, method)
    if found.ndim != 2 or len(found) != rows:
        raise wrong_return(found, judge, method, f"Tensor of shape ({rows}, D)")
    return found


class Scorer(Protocol):
    """A preference or reward model: how good is each image for its prompt? Higher is better."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str], /) -> Tensor:
        """(B, C, H, W) pixels in [−1, 1] and B prompts → (B,) scores."""
        ...


def scored(scorer: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(B,) scores. Raises InputError where the scorer returns anything else: (B, 1) would broadcast silently."""
    return checked(scorer(images, prompts), Tensor, scorer, "__call__", (len(images),))


class Data(Protocol):
    """What every run needs of its data, wherever they lie: a codec, conditions, an identity.

    Attributes:
        name: as in ``data.source``.
        content_hash: hex digest of what decides a run's numbers (pixels, captions, frozen models' weights).
        latent_shape: (C, H, W) of the space of the flow; of the commonest size where there are several.
        scorers: reward models that come with the data, by name, the held-out ones included.
        held_out: names of scorers that training must never use.
    """

    name: str
    content_hash: str
    latent_shape: tuple[int, int, int]
    held_out: frozenset[str]

    @property
    def scorers(self) -> Mapping[str, Scorer]: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised latents (B, C, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The network's condition for B prompts, (B, ...) tensors on the source's device."""
        ...

    def null_condition(self, n: int) -> Condition:
        """The empty condition ∅, n rows."""
        ...

    def to(self, device: str) -> "Data":
        """Codec, judges and scorers on ``device``."""
        ...


class Source(Data, Protocol):
    """A labelled data set in memory, with judges: a laboratory, MNIST.

    Attributes:
        classes: names of the classes, in label order.
        train, validation, test: the fixed splits.
        judge: classifier for quality metrics.
    """

    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def judge(self) -> Judge: ...

    def latents(self, split: str) -> Tensor:
        """(N, C, H, W) latents of a split, encoded once."""
        ...

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """One caption for each label, template drawn by (seed, step); from the held-out templates if asked."""
        ...

    def teacher_weights(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        """State dict of a flow-matching teacher of this architecture, pretrained on first use and cached.

        ``key`` identifies the architecture (kind and settings) and goes into the cache's name.
        """
        ...

    def to(self, device: str) -> "Source":
        """Codec, judges and scorers on ``device``."""
        ...


def captions_of(source: Source, split: Split, at: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
    """A caption for each row ``at`` (n,) of a split: the image's own, or by its label as :meth:`Source.prompts`."""
    if split.captions is None:
        return source.prompts(split.labels[at], seed, step, held_out)
    return [split.captions[row] for row in at.tolist()]
