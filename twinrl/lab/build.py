"""Trains a laboratory's models, two at a time, and writes its folder. What was killed goes on where it was."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from twinrl.backends import NETWORKS
from twinrl.backends.embedding import Spec
from twinrl.flow.source import Split
from twinrl.lab.clip import EMBEDDING, ClipModel, train_clip, train_preference
from twinrl.lab.clusters import clustered, names_of
from twinrl.lab.degrade import Degrade
from twinrl.lab.fitting import Keeper, seeded
from twinrl.lab.judge import LabJudge, train_judge
from twinrl.lab.material import Lesson, Material
from twinrl.lab.models import Models
from twinrl.lab.pictures import relabelled
from twinrl.lab.pretrain import pretrain
from twinrl.lab.progress import Stage, show, stages
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.storage import content_hash, save_tensors
from twinrl.lab.teachers import flow_data
from twinrl.lab.vae import Autoencoder, train_codec
from twinrl.lab.workshop import Workshop

MANIFEST = "manifest.json"
PARTS = ("data", "codec", "judge", "clip", "hps", "preference_judge", "teacher")
EXAMPLES = 10

# Milliseconds a step, for the progress bar alone: of digits, and of pictures with 32 pixels a side.
_COST = {"codec": 60, "judge": 14, "clip": 14, "hps": 35, "preference_judge": 45, "teacher": 24}
_COST_OF_PICTURES = {
    "codec": 330, "judge": 60, "clip": 350, "grouping": 350, "hps": 350, "preference_judge": 350, "teacher": 200,
}  # fmt: skip

Train: TypeAlias = Callable[[Callable[[], None], Keeper], Mapping[str, Tensor]]
"""(tick, keeper) → the tensors of a part."""


def build(
    folder: Path,
    recipe: LabRecipe,
    material: Callable[[], Material],
    workshop: Workshop,
    progress: bool,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Train everything and write it into the new ``folder``.

    Arguments:
        folder: to be made.
        recipe: constants.
        material: makes the pictures and their captions.
        workshop: where parts are kept until all are there.
        progress: whether a bar is drawn.
        about: what the manifest says beside the content.
    """
    folder.mkdir()
    workshop.begin()
    made = material()
    costs = _costs(recipe, made)
    total = sum(cost * getattr(recipe, name).steps for name, cost in costs.items())
    with one_thread_each() as pool, stages(f"building the {made.name} lab", total, progress) as stage:
        builder = _Builder(recipe, made, workshop, stage, costs)
        parts = builder.parts(pool)
    for name in PARTS:
        save_tensors(folder / f"{name}.safetensors", parts[name])
    captions = builder.material.captions.plain()
    manifest = {"content_hash": content_hash(parts, captions), "captions": captions, **(about or {})}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def one_thread_each() -> ThreadPoolExecutor:
    """Two workers whose tensor operations use one thread each.

    Small models gain little from two threads inside an operation, and nothing when another process is busy; two
    models side by side use both cores, and the result does not depend on the caller's number of threads.
    """
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))


def _costs(recipe: LabRecipe, material: Material) -> Mapping[str, float]:
    if recipe.warp is not None:
        return _COST
    finer = (recipe.form.side // 32) ** 2
    costs = {name: cost * (finer if name in ("codec", "teacher") else 1) for name, cost in _COST_OF_PICTURES.items()}
    return {name: cost for name, cost in costs.items() if name != "grouping" or not material.classes}


class _Builder:
    """All of a laboratory's tensors, by part: first codec beside CLIP and judge, then teacher beside preferences.

    Attributes:
        material: its labels are found on the way where it has none.
    """

    def __init__(
        self, recipe: LabRecipe, material: Material, workshop: Workshop, stage: Stage, costs: Mapping[str, float]
    ):
        self.recipe, self.material, self.workshop, self.stage, self.costs = recipe, material, workshop, stage, costs
        self.models = Models.untrained(recipe, material.captions.vocabulary, len(material.classes) or 1)
        self.lesson = Lesson(material.splits["train"], material.captions, recipe.form.shift)
        with seeded(recipe.teacher.seed):
            spec = Spec(recipe.form.latent_shape, text_width=EMBEDDING)
            self.network: nn.Module = NETWORKS.build(recipe.network, spec)

    def parts(self, pool: ThreadPoolExecutor) -> dict[str, Mapping[str, Tensor]]:
        """Everything, trained or read from the workshop."""
        first, recognised = pool.submit(self.codec), pool.submit(self.recognisers)
        first.result()
        latents = pool.submit(self.encode).result()
        _show(self.material, latents["validation"], self.models.codec)
        recognised.result()
        preferred, taught = pool.submit(self.preferences), pool.submit(self.teacher, latents["train"])
        preferred.result()
        weights = {name: model.state_dict() for name, model in self.models.named().items()}
        return {"data": _pack(self.material, latents), "teacher": taught.result(), **weights}

    def codec(self) -> None:
        """The autoencoder."""
        self._model("codec", partial(train_codec, self.models.codec, self.lesson.split.pixels, self.recipe.codec))

    def encode(self) -> dict[str, Tensor]:
        """The latents of each split."""
        return {name: self.models.codec.encode_all(split.pixels) for name, split in self.material.splits.items()}

    def recognisers(self) -> None:
        """CLIP, classes where none are named, and the judge, which learns them."""
        self._model("clip", partial(train_clip, self.models.clip, self.lesson, self.recipe.clip))
        if not self.material.classes:
            self._group()
        self._model("judge", partial(train_judge, self.models.judge, self.lesson, self.recipe.judge))

    def _group(self) -> None:
        """Classes from clusters of a text–image model that is trained apart and thrown away."""
        recipe, vocabulary = self.recipe, self.material.captions.vocabulary

        def made(tick: Callable[[], None], keeper: Keeper) -> Mapping[str, Tensor]:
            with seeded(recipe.grouping.seed):
                model = ClipModel(vocabulary, recipe.form, *recipe.preference_judge_size)
            train_clip(model, self.lesson, recipe.grouping, tick, keeper)
            return clustered(model, self.material.splits, recipe.form.clusters)

        labels = self._part("grouping", made)
        classes = names_of(labels["train"].tolist(), self.lesson.split.captions or ())
        self.material = relabelled(self.material, labels, classes)
        self.lesson = replace(self.lesson, split=self.material.splits["train"], captions=self.material.captions)
        with seeded(recipe.judge.seed):
            self.models = replace(self.models, judge=LabJudge(len(classes), recipe.form))

    def preferences(self) -> None:
        """The preference model, fine-tuned from CLIP, and the one that judges."""
        models, data, degrade = self.models, self.lesson, Degrade(self.models.codec)
        models.hps.load_state_dict(models.clip.state_dict())
        for name, model in (("hps", models.hps), ("preference_judge", models.preference_judge)):
            recipe = getattr(self.recipe, name)
            self._model(name, partial(train_preference, model, data, degrade, recipe))

    def teacher(self, latents: Tensor) -> Mapping[str, Tensor]:
        """The flow-matching teacher of the default network."""
        data, recipe = flow_data(latents, self.lesson, self.models.clip), self.recipe.teacher
        return self._part("teacher", partial(pretrain, self.network, data, recipe))

    def _model(self, name: str, train: Callable[[Callable[[], None], Keeper], None]) -> None:
        """Train the model called ``name`` in place, or fill it with what was trained before."""
        model: nn.Module = self.models.named()[name]

        def made(tick: Callable[[], None], keeper: Keeper) -> Mapping[str, Tensor]:
            train(tick, keeper)
            return model.state_dict()

        model.load_state_dict(self._part(name, made))
        model.eval().requires_grad_(False)

    def _part(self, name: str, train: Train) -> Mapping[str, Tensor]:
        steps = getattr(self.recipe, name).steps
        tick = self.stage(name.replace("_", " "), self.costs[name], steps)
        if self.workshop.has(name):
            for _ in range(steps):
                tick()
        return self.workshop.part(name, lambda: train(tick, self.workshop.keeper(name)))


@torch.no_grad()
def _show(material: Material, latents: Tensor, codec: Autoencoder) -> None:
    """One picture of each class, or some where none are named yet, and what is left of them after the codec."""
    split = material.splits["validation"]
    some = list(range(min(EXAMPLES, len(split))))
    chosen = [int((split.labels == label).nonzero()[0]) for label in range(len(material.classes))] or some
    rows = {material.noun: split.pixels[chosen], "through the codec": codec.decode(latents[chosen])}
    show(f"the data: {material.noun}s, and what the codec's latents keep of them", rows)


def _pack(material: Material, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits and latents as one group of tensors; of grey images one channel is kept, of others their bytes."""
    packed = dict(_pixels(name, split, material.grey) for name, split in material.splits.items())
    packed |= {f"{name}.labels": split.labels for name, split in material.splits.items()}
    return packed | {f"{name}.latents": value for name, value in latents.items()}


def _pixels(name: str, split: Split, grey: bool) -> tuple[str, Tensor]:
    if grey:
        return f"{name}.grey", split.pixels[:, :1]
    return f"{name}.bytes", ((split.pixels + 1) * 127.5).round().to(torch.uint8)


def unpacked(data: Mapping[str, Tensor], name: str, captions: list[str] | None = None) -> Split:
    """The split called ``name``, from what :func:`_pack` has made."""
    if f"{name}.grey" in data:
        return Split(data[f"{name}.grey"].repeat(1, 3, 1, 1), data[f"{name}.labels"], captions)
    return Split(as_pixels(data[f"{name}.bytes"]), data[f"{name}.labels"], captions)


def as_pixels(levels: Tensor) -> Tensor:
    """Bytes (N, 3, H, W) → float32 in [−1, 1]."""
    return levels.float() / 127.5 - 1
