"""MNIST (LeCun, Cortes, Burges): 28×28 digits, ten classes, the flow in pixel space.

All 70,000 digits are used where they are there, the 10,000 of t10k where only those are, and a download fills
an empty folder. The network is told a class label. Captions are words about that label, so that
``--prompt "a handwritten three"`` and reward models that read text both work.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.flow.conditions import Condition
from twinrl.flow.source import Judge, Scorer, Split
from twinrl.lab.digits import CLASSES, TEMPLATES, all_captions, captions
from twinrl.lab.fitting import Recipe, fit
from twinrl.lab.mnist_files import read_splits
from twinrl.lab.pretrain import FlowData, Pretraining, fresh, pretrain
from twinrl.lab.progress import stages
from twinrl.lab.storage import content_hash, load_tensors, publish, save_tensors
from twinrl.machine.files import cache_dir

NULL_LABEL = len(CLASSES)
"""The label of the empty condition ∅."""

JUDGE_RECIPE = Recipe(steps=700, batch=128, lr=4e-3, seed=0)
CLASSIFIER_RECIPE = replace(JUDGE_RECIPE, seed=1)
TEACHER_RECIPE = Pretraining(steps=2000, batch=128)


def parse_label(prompt: str) -> int:
    """The label that a caption speaks of: the one number word or digit in it.

    Raises:
        InputError: the caption names no digit, or several.
    """
    words = re.findall(r"[a-z]+|[0-9]+", prompt.lower())
    labels = {label for label, word in enumerate(CLASSES) if word in words or str(label) in words}
    if len(labels) == 1:
        return labels.pop()
    raise InputError(
        f"MNIST does not understand the prompt {prompt!r}",
        got=f"{len(labels) or 'no'} digits named in it",
        expected=f"exactly one of {', '.join(CLASSES)} (or 0 to 9), as in '{TEMPLATES[0].format('three')}'",
    )


class MNISTJudge(nn.Module):
    """A small convolutional classifier; its 64 features before the last nonlinearity define the quality."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 7 * 7, 64)),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.2), nn.Linear(64, len(CLASSES)))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] → (B, 64) features, computed in chunks to bound the memory."""
        return torch.cat([self.trunk(chunk) for chunk in pixels.split(1000)])

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] → (B, 10) class logits."""
        return self.logits_of(self.features(pixels))

    def logits_of(self, features: Tensor) -> Tensor:
        """(B, 64) features → (B, 10) class logits."""
        return self.head(features)


def train_judge(digits: Split, recipe: Recipe) -> MNISTJudge:
    """A judge trained on ``digits`` with label smoothing, pixel noise and shifts of up to 2 pixels.

    These keep its features from separating training images from new ones. One thread is used, so that the
    weights do not depend on how many there are; the global random state is left as it was.
    """

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(digits), step)
        pixels = _augmented(digits.pixels[rows], recipe.seed, step)
        return cross_entropy(judge.logits(pixels), digits.labels[rows], label_smoothing=0.1)

    with (
        _one_thread(),
        torch.random.fork_rng(devices=[]),
        stages("MNIST", recipe.steps) as stage,
    ):
        torch.default_generator.manual_seed(recipe.seed)
        judge = MNISTJudge()
        fit(judge.parameters(), loss, recipe, stage("judge", 1))
    return judge


def _augmented(pixels: Tensor, seed: int, step: int) -> Tensor:
    """The batch with noise, moved by up to 2 pixels each way (another shift for each quarter of it)."""
    padded = pad(pixels, (2, 2, 2, 2), value=-1.0)  # −1 is the background
    corners = torch.randint(5, (4, 2), generator=draws.generator(seed, "judge shift", step)).tolist()
    quarters = zip(padded.chunk(4), corners, strict=False)  # a batch under 4 rows has fewer chunks
    shifted = torch.cat([part[:, :, top : top + 28, left : left + 28] for part, (top, left) in quarters])
    return shifted + 0.1 * draws.normal(tuple(pixels.shape), seed, "judge noise", step)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cached_judge(train: Split, recipe: Recipe) -> MNISTJudge:
    """The judge of these training digits, frozen; trained if it is not in the cache."""
    with torch.device("meta"):
        judge = MNISTJudge()
    key = content_hash({"train": {"pixels": train.pixels, "labels": train.labels}}, f"{recipe} {judge}")
    path = cache_dir() / f"mnist-judge-{key[:16]}.safetensors"
    publish(path, lambda file: save_tensors(file, train_judge(train, recipe).state_dict()))
    judge.load_state_dict(load_tensors(path, path), assign=True)
    return judge.eval().requires_grad_(False)


class LabelLogProbability:
    """The log-probability that a classifier gives the digit named in the prompt, as a preference model."""

    def __init__(self, classifier: Judge):
        self.classifier = classifier

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] and B prompts → (B,) scores ≤ 0."""
        labels = torch.tensor([parse_label(prompt) for prompt in prompts], device=pixels.device)
        return self.classifier.logits(pixels).log_softmax(1).gather(1, labels[:, None])[:, 0]


class MNISTSource:
    """MNIST as a ``twinrl.flow.source.Source``: pixel space, class labels, a reward and a held-out judge.

    The scorer ``judge_logprob`` is the log-probability that the judge gives the digit of the prompt; it is held out.
    ``classifier_logprob`` is the same by a classifier trained apart (other initial weights and batches), for training.

    Arguments:
        root: folder with the idx files (default: ``mnist`` in the cache folder); filled by download if there
            are none. Judge and classifier are trained the first time (half a minute each) and cached.

    Raises:
        InputError: files are missing and cannot be downloaded, damaged, or not MNIST's.

    *When to use*: the public tutorial's experiment (``data.source=mnist``).
    """

    def __init__(self, root: Path | None = None):
        self.name = "mnist"
        self.latent_shape: tuple[int, int, int] = (1, 28, 28)
        self.classes: tuple[str, ...] = CLASSES
        self.train, self.validation, self.test = read_splits(root.expanduser() if root else cache_dir() / "mnist")
        judge, classifier = (cached_judge(self.train, recipe) for recipe in (JUDGE_RECIPE, CLASSIFIER_RECIPE))
        self.judge: Judge = judge
        self.scorers: Mapping[str, Scorer] = {
            "judge_logprob": LabelLogProbability(judge),
            "classifier_logprob": LabelLogProbability(classifier),
        }
        self.held_out = frozenset({"judge_logprob"})
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        digits = {name: {"pixels": split.pixels, "labels": split.labels} for name, split in splits.items()}
        models = {"judge": judge.state_dict(), "classifier": classifier.state_dict()}
        self.content_hash = content_hash(digits | models, all_captions())
        self._latents = {name: split.pixels for name, split in splits.items()}
        self._models = (judge, classifier)
        self._device = "cpu"

    def latents(self, split: str) -> Tensor:
        """(N, 1, 28, 28): the pixels of ``train``, ``validation`` or ``test``, on the source's device."""
        return self._latents[split]

    def encode(self, pixels: Tensor) -> Tensor:
        """The identity: the flow lives on pixels (B, 1, 28, 28) in [−1, 1]."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """The identity; not clamped."""
        return latents

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """One caption for each label in 0…9, as in the digits lab."""
        return captions(labels, seed, step, held_out)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """``{"label": (B,)}`` of the digits that the prompts name; the empty prompt is ∅.

        Raises:
            InputError: a prompt names no digit, or several.
        """
        labels = [parse_label(prompt) if prompt.strip() else NULL_LABEL for prompt in prompts]
        return {"label": torch.tensor(labels, dtype=torch.int64, device=self._device)}

    def null_condition(self, n: int) -> Condition:
        """``{"label": (n,)}``, all of them 10."""
        return {"label": torch.full((n,), NULL_LABEL, device=self._device)}

    def teacher_weights(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        """State dict of a flow-matching teacher of ``network``'s architecture, on the source's device.

        Pretrained on first use (minutes for a narrow UNet; the tutorial trains from scratch) and cached under the
        content hash, the recipe and ``key``. ``network`` itself is left as it is.
        """
        recipe = content_hash({}, f"{TEACHER_RECIPE} {self.content_hash}")
        path = cache_dir() / "teachers" / f"mnist-{recipe[:12]}" / f"{key}.safetensors"
        publish(path, lambda file: save_tensors(file, self._pretrain(network, key)))
        return {name: value.to(self._device) for name, value in load_tensors(path, path).items()}

    def _pretrain(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        labels = self.train.labels.to(self._device)
        data = FlowData(self.latents("train"), labels, lambda rows, step: {"label": rows}, self.null_condition(1))
        teacher = fresh(network, TEACHER_RECIPE.seed).to(self._device)
        with stages(f"pretraining {key}", TEACHER_RECIPE.steps) as stage:
            return pretrain(teacher, data, TEACHER_RECIPE, stage("teacher", 1))

    def to(self, device: str) -> "MNISTSource":
        """Judge, classifier, latents and conditions on ``device``, in place; the splits' pixels stay where they are."""
        self._device = device
        for model in self._models:
            model.to(device)
        self._latents = {split: value.to(device) for split, value in self._latents.items()}
        return self
