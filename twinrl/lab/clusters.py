"""Classes of pictures that no column names: clusters of the features of a text–image model that training never sees."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from twinrl.flow.source import Split
from twinrl.lab.clip import ClipModel, words_of
from twinrl.lab.pictures import LEAST

CHUNK = 256
ROUNDS = 50
HELD_OUT_LEAST = 2
"""Pictures of a class in validation and in test."""


@torch.no_grad()
def clustered(model: ClipModel, splits: Mapping[str, Split], most: int) -> dict[str, Tensor]:
    """Labels (N,) of each split, in at most ``most`` classes of enough pictures.

    k-means (Lloyd) of the training pictures' embeddings. Its first centres are pictures that are far from each other.
    A class of too few pictures in any split goes, and its pictures go to the nearest of the others.
    """
    features = {
        name: torch.cat([model.image_embedding(chunk) for chunk in split.pixels.split(CHUNK)]).double().numpy()
        for name, split in splits.items()
    }
    train = features["train"]
    centres = _lloyd(train, _far_apart(train, max(1, min(most, len(train) // (2 * LEAST)))))
    while True:
        labels = {name: torch.from_numpy(_nearest(own, centres)) for name, own in features.items()}
        counts = {name: own.bincount(minlength=len(centres)) for name, own in labels.items()}
        enough = counts["train"] >= LEAST
        for name in ("validation", "test"):
            enough &= counts[name] >= HELD_OUT_LEAST
        if bool(enough.all()) or len(centres) == 1:
            return labels
        smallest = int(torch.where(enough, counts["train"].max() + 1, counts["train"]).argmin())
        centres = np.delete(centres, smallest, axis=0)


def names_of(labels: Sequence[int], captions: Sequence[str]) -> tuple[str, ...]:
    """A name for each class: the word by which its captions differ most from the others'.

    That is the word of the largest n²/N, n times in the class and N times in all; no word is taken twice.
    """
    everywhere: Counter[str] = Counter()
    inside: dict[int, Counter[str]] = {label: Counter() for label in range(max(labels) + 1)}
    for label, caption in zip(labels, captions, strict=True):
        words = {word for word in words_of(caption) if len(word) > 1}
        everywhere.update(words)
        inside[label].update(words)
    names: list[str] = []
    for label, counts in inside.items():
        ranked = sorted(counts, key=lambda word: (-(counts[word] ** 2) / everywhere[word], word))
        names.append(next((word for word in ranked if word not in names), f"group {label + 1}"))
    return tuple(names)


def _far_apart(features: np.ndarray, k: int) -> np.ndarray:
    """(k, D) centres to begin with: the picture nearest to the mean, then the farthest from those before."""
    chosen = [int(_distances(features, features.mean(0, keepdims=True))[:, 0].argmin())]
    while len(chosen) < k:
        chosen.append(int(_distances(features, features[chosen]).min(1).argmax()))
    return features[chosen]


def _lloyd(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    for _ in range(ROUNDS):
        labels = _nearest(features, centres)
        members = [features[labels == label] for label in range(len(centres))]
        centres = np.stack([own.mean(0) if len(own) else centres[label] for label, own in enumerate(members)])
    return centres


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return _distances(features, centres).argmin(1)


def _distances(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, k) squared distances, summed in one order whatever the number of threads."""
    return np.stack([((features - centre) ** 2).sum(1) for centre in centres], axis=1)
