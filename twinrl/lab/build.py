"""Trains the lab's models, two at a time, and writes the cache's folder."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from twinrl.backends import MLP
from twinrl.backends.embedding import Spec
from twinrl.flow.source import Split
from twinrl.lab.clip import EMBEDDING, train_clip, train_preference
from twinrl.lab.degrade import Degrade
from twinrl.lab.digits import CLASSES, HELD_OUT_TEMPLATES, TEMPLATES, load_digit_splits
from twinrl.lab.fitting import seeded
from twinrl.lab.judge import train_judge
from twinrl.lab.models import Models
from twinrl.lab.pretrain import pretrain
from twinrl.lab.progress import Stage, show, stages
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.storage import content_hash, save_tensors
from twinrl.lab.teachers import flow_data
from twinrl.lab.vae import LATENT_SHAPE, Autoencoder, train_codec

MANIFEST = "manifest.json"
PARTS = ("data", "codec", "judge", "clip", "hps", "preference_judge", "teacher")

# Milliseconds a step, for the progress bar alone.
_COST = {"codec": 60, "judge": 14, "clip": 14, "hps": 35, "preference_judge": 45, "teacher": 24}


def build(folder: Path, recipe: LabRecipe, progress: bool) -> None:
    """Train everything and write it into the new ``folder``, with a progress bar if asked."""
    folder.mkdir()
    total = sum(cost * getattr(recipe, name).steps for name, cost in _COST.items())
    with one_thread_each() as pool, stages("building the digits lab", total, progress) as stage:
        parts = _train(recipe, pool, stage)
    for name in PARTS:
        save_tensors(folder / f"{name}.safetensors", parts[name])
    manifest = {"content_hash": hash_of(parts), "captions": _texts()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def hash_of(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The content hash of the lab made of these groups of tensors and the captions."""
    return content_hash(parts, _texts())


def one_thread_each() -> ThreadPoolExecutor:
    """Two workers whose tensor operations use one thread each.

    Small models gain little from two threads inside an operation, and nothing when another process is busy; two
    models side by side use both cores, and the result does not depend on the caller's number of threads.
    """
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))


def _train(recipe: LabRecipe, pool: ThreadPoolExecutor, stage: Stage) -> dict[str, Mapping[str, Tensor]]:
    """All of the lab's tensors, by part: first codec beside CLIP and judge, then teacher beside preferences."""
    splits = load_digit_splits(recipe.warp)
    models = Models.untrained(recipe)
    with seeded(recipe.teacher.seed):
        network = MLP(recipe.network, Spec(LATENT_SHAPE, text_width=EMBEDDING))
    train = splits["train"]

    def tick(name: str) -> Callable[[], None]:
        return stage(name.replace("_", " "), _COST[name], getattr(recipe, name).steps)

    def recognisers() -> None:
        train_clip(models.clip, train, recipe.clip, tick("clip"))
        train_judge(models.judge, train, recipe.judge, tick("judge"))

    def preferences() -> None:
        models.hps.load_state_dict(models.clip.state_dict())
        degrade = Degrade(models.codec)
        train_preference(models.hps, train, degrade, recipe.hps, tick("hps"))
        judge = models.preference_judge
        train_preference(judge, train, degrade, recipe.preference_judge, tick("preference_judge"))

    def teacher() -> Mapping[str, Tensor]:
        data = flow_data(latents["train"], train.labels, models.clip)
        return pretrain(network, data, recipe.teacher, tick("teacher"))

    first = pool.submit(train_codec, models.codec, train.pixels, recipe.codec, tick("codec"))
    recognised = pool.submit(recognisers)
    first.result()
    encoding = pool.submit(_encode, models, splits)
    latents = encoding.result()
    _show(splits["validation"], latents["validation"], models.codec)
    recognised.result()
    preferred, taught = pool.submit(preferences), pool.submit(teacher)
    preferred.result()
    weights = {name: model.state_dict() for name, model in models.named().items()}
    return {"data": _pack(splits, latents), "teacher": taught.result(), **weights}


def _encode(models: Models, splits: Mapping[str, Split]) -> dict[str, Tensor]:
    return {name: models.codec.encode_all(split.pixels) for name, split in splits.items()}


@torch.no_grad()
def _show(split: Split, latents: Tensor, codec: Autoencoder) -> None:
    """One digit of each class, and what is left of it on the way through the codec."""
    chosen = [int((split.labels == label).nonzero()[0]) for label in range(len(CLASSES))]
    rows = {"digit": split.pixels[chosen], "through the codec": codec.decode(latents[chosen])}
    show("the data: digits, and what the codec's latents keep of them", rows)


def _pack(splits: Mapping[str, Split], latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits and latents as one group of tensors; the images are grey, so one channel is kept."""
    packed = {f"{name}.grey": split.pixels[:, :1] for name, split in splits.items()}
    packed |= {f"{name}.labels": split.labels for name, split in splits.items()}
    return packed | {f"{name}.latents": value for name, value in latents.items()}


def _texts() -> list[list[str]]:
    return [list(TEMPLATES), list(HELD_OUT_TEMPLATES)]
