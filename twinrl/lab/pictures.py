"""Pictures of one's own as a laboratory's material: each with its caption, in classes of a column or of clusters."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from twinrl.flow.draws import generator
from twinrl.flow.source import Split
from twinrl.lab.clip import words_of
from twinrl.lab.material import SPLITS, Material

HELD_OUT_SHARE = 8
"""One picture of so many is for validation, and another one for test; of many pictures fewer."""
MOST_HELD_OUT = 2000
"""Pictures of each held-out split."""
LEAST = 16
"""Pictures of a class: two or more of them are then in each held-out split."""
MOST_CLASSES = 100
MOST_WORDS = 6000
OTHER = "other"
"""The class of what belongs to no class of :data:`LEAST` pictures."""


@dataclass(frozen=True)
class OwnCaptions:
    """Pictures go by captions of their own; satisfies ``twinrl.lab.material.Captions``.

    Attributes:
        vocabulary: the words that text encoders know.
        splits: pictures, labels and captions.
        classes: their names.
    """

    vocabulary: tuple[str, ...]
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def of(self, split: Split, rows: Tensor, seed: int, step: int) -> list[str]:
        """The captions of the rows (n,)."""
        captions = split.captions or ()
        return [captions[row] for row in rows.tolist()]

    def batch(self, split: Split, rows: Tensor, seed: int, step: int) -> tuple[list[str], Tensor]:
        """The rows' different captions, and which of them each row (n,) has."""
        own = self.of(split, rows, seed, step)
        number = {caption: at for at, caption in enumerate(dict.fromkeys(own))}
        return list(number), torch.tensor([number[caption] for caption in own])

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """One caption of each label's class (n,), drawn by (seed, step); of validation and test if asked."""
        known = self._by_class[held_out]
        drawn = torch.randint(2**31 - 1, (len(labels),), generator=generator(seed, "caption", step))
        return [
            known[label][number % len(known[label])]
            for label, number in zip(labels.tolist(), drawn.tolist(), strict=True)
        ]

    @cached_property
    def _by_class(self) -> dict[bool, dict[int, list[str]]]:
        """Whether held out → class → its captions, each once, sorted."""
        found: dict[bool, dict[int, list[str]]] = {}
        for held_out, names in ((False, SPLITS[:1]), (True, SPLITS[1:])):
            captions: dict[int, set[str]] = {label: set() for label in range(len(self.classes))}
            for name in names:
                split = self.splits[name]
                for label, caption in zip(split.labels.tolist(), split.captions or (), strict=True):
                    captions[label].add(caption)
            found[held_out] = {label: sorted(own) for label, own in captions.items()}
        return found

    def plain(self) -> dict[str, object]:
        """Words, classes and every caption."""
        captions = {name: list(split.captions or ()) for name, split in self.splits.items()}
        return {"vocabulary": list(self.vocabulary), "classes": list(self.classes), "captions": captions}


def material(
    name: str, splits: Mapping[str, Split], classes: Sequence[str], vocabulary: Sequence[str] | None = None
) -> Material:
    """What a laboratory of these pictures is built from; without ``classes`` they are found in clusters.

    The vocabulary is that of the training captions where none is given.
    """
    known = tuple(vocabulary or _vocabulary(splits["train"].captions or ()))
    return Material(name, "picture", splits, tuple(classes), OwnCaptions(known, splits, tuple(classes)))


def relabelled(before: Material, labels: Mapping[str, Tensor], classes: Sequence[str]) -> Material:
    """The same pictures with other labels, by split."""
    splits = {name: replace(split, labels=labels[name]) for name, split in before.splits.items()}
    return material(before.name, splits, classes, before.captions.vocabulary)


def _vocabulary(captions: Sequence[str]) -> list[str]:
    """The commonest words, in alphabetical order."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted(ranked[:MOST_WORDS])


# --- classes of a column, and splits -----------------------------------------------------------------------------


def classes_of(names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (N,) and classes of pictures' names of classes; small ones are joined as :data:`OTHER`.

    Of names letters, digits and underscores stay: they become names of metrics.
    """
    plain = [re.sub(r"\W+", "-", name).strip("-") or OTHER for name in names]
    counts = Counter(plain)
    large = sorted((name for name in counts if counts[name] >= LEAST and name != OTHER), key=lambda n: -counts[n])
    while large and 0 < len(plain) - sum(counts[name] for name in large) < LEAST:
        large.pop()
    classes = tuple(sorted(large)) if sum(counts[name] for name in large) == len(plain) else (*sorted(large), OTHER)
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number.get(name, len(classes) - 1) for name in plain]), classes


def split_rows(labels: Tensor) -> dict[str, Tensor]:
    """Rows (n,) of each split, in equal shares of every class; rows have to be in no order that matters."""
    share = min(1 / HELD_OUT_SHARE, MOST_HELD_OUT / len(labels))
    parts: dict[str, list[Tensor]] = {name: [] for name in SPLITS}
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        n = max(2, round(share * len(rows)))
        validation, test, train = rows.tensor_split((n, 2 * n))
        for name, part in zip(SPLITS, (train, validation, test), strict=True):
            parts[name].append(part)
    return {name: torch.cat(rows).sort().values for name, rows in parts.items()}
