"""Builds the lab on first use, caches it, and loads it.

The cache's folder is named by the *recipe* (every constant below), so a changed recipe builds anew; the lab is
identified by the hash of its *content*, which is checked on every load.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from twinrl.backends import MLP, network_key
from twinrl.backends.embedding import Spec
from twinrl.data.digits import HELD_OUT_TEMPLATES, TEMPLATES, Warp, captions, load_digit_splits
from twinrl.data.source import Split, cache_dir
from twinrl.lab.clip import EMBEDDING, Captioned, Clip, train_clip, train_preference
from twinrl.lab.degrade import Degrade
from twinrl.lab.judge import DigitJudge, train_judge
from twinrl.lab.pretrain import FlowData, Pretraining, fresh, pretrain
from twinrl.lab.progress import Stage, stages
from twinrl.lab.source import Lab
from twinrl.lab.storage import (
    content_hash,
    damaged,
    load_json,
    load_tensors,
    publish,
    save_tensors,
)
from twinrl.lab.training import Recipe
from twinrl.lab.vae import LATENT_SHAPE, Codec, train_codec

_VERSION = 1  # raise it when code, not a constant, changes what is built
_THREADS = 2  # fixed while building, so that the content does not depend on the caller's setting
_MANIFEST = "manifest.json"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LabRecipe:
    """Every constant that decides the lab's content; ``cost`` is milliseconds a step, for the progress bar."""

    warp: Warp = field(default_factory=Warp)
    codec: Recipe = Recipe(steps=400, batch=32, lr=4e-3, seed=1)
    judge: Recipe = Recipe(steps=400, batch=128, lr=3e-3, seed=2)
    clip: Recipe = Recipe(steps=500, batch=128, lr=2e-3, seed=3)
    hps: Recipe = Recipe(steps=250, batch=64, lr=1e-3, seed=4)
    preference_judge: Recipe = Recipe(steps=400, batch=64, lr=2e-3, seed=5)
    teacher: Pretraining = Pretraining()
    clip_size: tuple[int, int] = (64, 3)  # width, layers
    preference_judge_size: tuple[int, int] = (96, 2)
    network: MLP.Config = field(default_factory=MLP.Config)

    def hash(self) -> str:
        """Hex digest of all constants."""
        constants = asdict(self) | {"network": self.network.model_dump(), "version": _VERSION}
        constants["captions"] = [TEMPLATES, HELD_OUT_TEMPLATES]
        return hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest()


_COST = {"codec": 45, "judge": 15, "clip": 25, "hps": 40, "preference_judge": 40, "teacher": 16}


def load_lab(device: str = "cpu", progress: bool = True, recipe: LabRecipe = LabRecipe()) -> Lab:
    """The digits lab, built on first use (about a minute and a half on two cores) and cached.

    Arguments:
        device: of models and latents.
        progress: whether building shows a progress bar on standard error.
        recipe: constants of the build; the default is the lab that the project's results refer to.

    Raises:
        InputError: a cached file is damaged; the message says which folder to delete.
    """
    folder = cache_dir() / f"digits-{recipe.hash()[:12]}"
    publish(folder, partial(_build, recipe=recipe, progress=progress))
    return _load(folder, recipe, progress).to(device)


def _build(folder: Path, recipe: LabRecipe, progress: bool) -> None:
    """Train everything and write it into the new ``folder``."""
    folder.mkdir()
    total = sum(cost * getattr(recipe, name).steps for name, cost in _COST.items())
    with _threads(_THREADS), stages("building the digits lab", total, progress) as stage:
        parts = _train(recipe, stage)
    for name, tensors in parts.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    manifest = {"content_hash": _hash(parts), "parts": sorted(parts), "captions": _texts()}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def _train(recipe: LabRecipe, stage: Stage) -> dict[str, dict[str, Tensor]]:
    """All of the lab's tensors, by part."""
    splits = load_digit_splits(recipe.warp)
    train = splits["train"]
    codec = train_codec(train.pixels, recipe.codec, stage("autoencoder", _COST["codec"]))
    judge = train_judge(train.pixels, train.labels, recipe.judge, stage("judge", _COST["judge"]))
    clips = _train_clips(Captioned(train.pixels, train.labels), Degrade(codec), recipe, stage)
    latents = {name: codec.encode_all(split.pixels) for name, split in splits.items()}
    network = fresh(_default_network(recipe), recipe.teacher.seed)
    data = flow_data(latents["train"], train.labels, clips["clip"])
    teacher = pretrain(network, data, recipe.teacher, stage("teacher", _COST["teacher"]))
    return {
        "data": _pack(splits, latents),
        "codec": dict(codec.state_dict()),
        "judge": dict(judge.state_dict()),
        **{name: dict(model.state_dict()) for name, model in clips.items()},
        "teacher": dict(teacher),
    }


def _train_clips(data: Captioned, degrade: Degrade, recipe: LabRecipe, stage: Stage) -> dict[str, Clip]:
    """The three text–image models: ``clip``, ``hps`` (fine-tuned from it) and ``preference_judge``."""
    clips = _new_clips(recipe)
    train_clip(clips["clip"], data, recipe.clip, stage("CLIP", _COST["clip"]))
    clips["hps"].load_state_dict(clips["clip"].state_dict())
    for name, title in (("hps", "preference model"), ("preference_judge", "preference judge")):
        train_preference(clips[name], data, degrade, getattr(recipe, name), stage(title, _COST[name]))
    return clips


def _new_clips(recipe: LabRecipe) -> dict[str, Clip]:
    sizes = {
        "clip": recipe.clip_size,
        "hps": recipe.clip_size,
        "preference_judge": recipe.preference_judge_size,
    }
    models = {}
    for name, size in sizes.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(getattr(recipe, name).seed)
            models[name] = Clip(*size)
    return models


def _default_network(recipe: LabRecipe) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return MLP(recipe.network, Spec(LATENT_SHAPE, text_width=EMBEDDING))


def flow_data(latents: Tensor, labels: Tensor, clip: Clip) -> FlowData:
    """What a teacher of the lab learns from: latents (N, 4, 8, 8) and labels (N,), captioned anew at each step."""

    def condition(rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"text": clip.cached_text_embedding(captions(rows, 0, step))}

    empty = {"text": torch.zeros(1, EMBEDDING, device=latents.device)}
    return FlowData(latents, labels, condition, empty)


def _pack(splits: Mapping[str, Split], latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits and latents as one group of tensors; the images are grey, so one channel is kept."""
    packed = {f"{name}.grey": split.pixels[:, :1] for name, split in splits.items()}
    packed |= {f"{name}.labels": split.labels for name, split in splits.items()}
    return packed | {f"{name}.latents": value for name, value in latents.items()}


def _texts() -> list[list[str]]:
    return [list(TEMPLATES), list(HELD_OUT_TEMPLATES)]


def _hash(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    return content_hash(parts, _texts())


def _load(folder: Path, recipe: LabRecipe, progress: bool) -> Lab:
    """The lab from its files, its content checked."""
    manifest = load_json(folder / _MANIFEST, folder)
    names = ("data", "codec", "judge", "clip", "hps", "preference_judge", "teacher")
    parts = {name: load_tensors(folder / f"{name}.safetensors", folder) for name in names}
    found = _hash(parts)
    if found != manifest.get("content_hash"):
        raise damaged(folder / _MANIFEST, folder, "the files beside it have another content than it says")
    data = parts["data"]
    splits = {
        name: Split(data[f"{name}.grey"].repeat(1, 3, 1, 1), data[f"{name}.labels"])
        for name in ("train", "validation", "test")
    }
    clips = _new_clips(recipe)
    return Lab(
        content_hash=found,
        splits=splits,
        latents={name: data[f"{name}.latents"] for name in splits},
        codec=_filled(Codec(), parts["codec"]),
        judge=_filled(DigitJudge(), parts["judge"]),
        clip=_filled(clips["clip"], parts["clip"]),
        hps=_filled(clips["hps"], parts["hps"]),
        preference_judge=_filled(clips["preference_judge"], parts["preference_judge"]),
        teachers=Teachers(folder, recipe, parts["teacher"], progress),
    )


def _filled(model: Model, weights: Mapping[str, Tensor]) -> Model:
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


class Teachers:
    """The lab's pretrained teachers: the default network's in memory, others from the cache or trained now."""

    def __init__(self, folder: Path, recipe: LabRecipe, default: Mapping[str, Tensor], progress: bool):
        self.folder = folder
        self.recipe = recipe
        self.default = default
        self.progress = progress

    def __call__(self, lab: Lab, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        """See ``Lab.teacher_weights``."""
        if key == network_key(self.recipe.network):
            return self.default
        path = cache_dir() / "teachers" / lab.content_hash[:12] / f"{key}.safetensors"
        publish(path, lambda file: save_tensors(file, self._pretrain(lab, network, key)))
        return load_tensors(path, path)

    def _pretrain(self, lab: Lab, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        steps = self.recipe.teacher.steps
        data = flow_data(lab.latents("train"), lab.train.labels, lab.scorers["lab_clip"])
        with stages(f"pretraining {key}", steps, self.progress) as stage:
            return pretrain(fresh(network, 0).to(lab.device), data, self.recipe.teacher, stage("teacher", 1))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
