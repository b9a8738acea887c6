"""Where a source's teachers come from: the lab itself for the default network, else trained on first use."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twinrl.backends import network_key
from twinrl.lab.clip import ClipModel
from twinrl.lab.material import Lesson
from twinrl.lab.pretrain import FlowData, fresh, pretrain
from twinrl.lab.progress import stages
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.source import Lab, empty_text
from twinrl.lab.storage import load_tensors, publish, save_tensors
from twinrl.machine.files import cache_dir


def flow_data(latents: Tensor, data: Lesson, clip: ClipModel) -> FlowData:
    """What a teacher learns from: latents (N, C, h, w) of the pictures, captioned anew at each step."""

    def condition(rows: Tensor, step: int) -> dict[str, Tensor]:
        return {"text": clip.cached_text_embedding(data.captions.of(data.split, rows, 0, step))}

    return FlowData(latents, torch.arange(len(data)), condition, empty_text(1, latents.device))


class Teachers:
    """The pretrained teachers of a lab.

    Arguments:
        recipe: how they are pretrained, and which network is the default one.
        default: the default network's teacher.
        progress: whether pretraining another one shows a progress bar.
    """

    def __init__(self, recipe: LabRecipe, default: Mapping[str, Tensor], progress: bool):
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
        recipe = self.recipe.teacher
        data = flow_data(lab.latents("train"), Lesson(lab.train, lab.material.captions), lab.clip)
        with stages(f"pretraining {key}", recipe.steps, self.progress) as stage:
            return pretrain(fresh(network, recipe.seed).to(lab.device), data, recipe, stage("teacher", 1))
