"""What a laboratory is made of: pictures in splits, their classes, and the captions that they go by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from twinrl.flow.draws import generator
from twinrl.flow.source import Split

SPLITS = ("train", "validation", "test")


class Captions(Protocol):
    """How pictures are called.

    Attributes:
        vocabulary: the words that text encoders know, each once.
        kept: those that are never hidden in training, as they name the class.
    """

    @property
    def vocabulary(self) -> Sequence[str]: ...

    @property
    def kept(self) -> Sequence[str]: ...

    def of(self, split: Split, rows: Tensor, seed: int, step: int) -> list[str]:
        """One caption for each of the rows (n,) of a split."""
        ...

    def batch(self, split: Split, rows: Tensor, seed: int, step: int) -> tuple[list[str], Tensor]:
        """The U captions that a contrastive batch compares, and which of them each row (n,) has."""
        ...

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """One caption for each class label (n,), drawn by (seed, step); of held-out ones if asked."""
        ...

    def plain(self) -> object:
        """Everything that decides them, as JSON has it."""
        ...


@dataclass(frozen=True)
class Material:
    """What a laboratory is built from.

    Attributes:
        name: of the source.
        noun: what a picture is, in a word.
        splits: ``train``, ``validation``, ``test``.
        classes: names, in label order; none where clusters are to be found.
        captions: of the pictures.
        grey: whether their three channels are one.
    """

    name: str
    noun: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    captions: Captions
    grey: bool = False


@dataclass(frozen=True)
class Lesson:
    """What models learn from.

    Attributes:
        split: the training pictures. captions: theirs.
        shift: pictures are moved by up to so many pixels, another way in each batch.
    """

    split: Split
    captions: Captions
    shift: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, rows: Tensor, seed: int, step: int) -> Tensor:
        """(B, 3, H, W) of the rows, moved."""
        return shifted(self.split.pixels[rows], self.shift, seed, step) if self.shift else self.split.pixels[rows]

    def texts(self, rows: Tensor, seed: int, step: int) -> tuple[list[str], Tensor]:
        """As :meth:`Captions.batch`."""
        return self.captions.batch(self.split, rows, seed, step)


def shifted(pixels: Tensor, most: int, seed: int, step: int) -> Tensor:
    """The batch (B, C, H, W) moved by up to ``most`` pixels each way, another way for each quarter of it.

    What comes in at an edge repeats it.
    """
    height, width = pixels.shape[-2:]
    padded = pad(pixels, (most,) * 4, mode="replicate")
    corners = torch.randint(2 * most + 1, (4, 2), generator=generator(seed, "shift", step)).tolist()
    quarters = zip(padded.chunk(4), corners, strict=False)  # a batch under 4 rows has fewer chunks
    return torch.cat([part[:, :, top : top + height, left : left + width] for part, (top, left) in quarters])
