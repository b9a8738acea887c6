"""``Lab``: pictures, handwritten digits or one's own, with everything that training and evaluation need."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from twinrl.backends import NetworkConfig
from twinrl.flow.conditions import Condition
from twinrl.flow.source import Judge, Scorer
from twinrl.lab.clip import EMBEDDING, ClipModel
from twinrl.lab.material import SPLITS, Material
from twinrl.lab.models import Models

TeacherWeights = Callable[["Lab", nn.Module, str], Mapping[str, Tensor]]
"""(lab, network, architecture key) → state dict of the pretrained network."""


class Lab:
    """A laboratory; satisfies ``twinrl.flow.source.Source``. Made by ``load_lab`` and ``open_lab``.

    Arguments:
        content_hash: of everything below.
        material: the pictures with their captions.
        latents: of each split, normalised, (N, C, h, w).
        models: makes codec, judge and scorers, when one is first asked for: their libraries take seconds to import.
        teachers: where teachers come from.
        network: settings of the network whose teacher belongs to the laboratory.
    """

    held_out: frozenset[str] = frozenset({"lab_judge"})

    def __init__(
        self,
        content_hash: str,
        material: Material,
        latents: Mapping[str, Tensor],
        models: Callable[[], Models],
        teachers: TeacherWeights,
        network: NetworkConfig,
    ):
        self.content_hash = content_hash
        self.material, self.name, self.classes = material, material.name, material.classes
        self.train, self.validation, self.test = (material.splits[name] for name in SPLITS)
        self.latent_shape: tuple[int, int, int] = tuple(latents["train"].shape[1:])  # type: ignore[assignment]
        self.device, self.network = "cpu", network
        self._make_models = models
        self._latents = dict(latents)
        self._teachers = teachers

    @cached_property
    def models(self) -> Models:
        """Codec, judge and the text–image models, on the lab's device."""
        return self._make_models().to(self.device)

    @property
    def judge(self) -> Judge:
        """The classifier that training never sees."""
        return self.models.judge

    @property
    def clip(self) -> ClipModel:
        """The text–image model whose text embeddings are the condition."""
        return self.models.clip

    @cached_property
    def scorers(self) -> Mapping[str, Scorer]:
        """Rewards by name."""
        models = self.models
        return {"lab_clip": models.clip, "lab_hps": models.hps, "lab_judge": models.preference_judge}

    def latents(self, split: str) -> Tensor:
        """(N, C, h, w) normalised latents of ``train``, ``validation`` or ``test``, on the lab's device."""
        return self._latents[split]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised latents (B, C, h, w); differentiable."""
        return self.models.codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) → pixels (B, 3, H, W), not clamped; differentiable."""
        return self.models.codec.decode(latents)

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """One caption for each label, drawn by (seed, step); from held-out ones if asked."""
        return self.material.captions.prompts(labels, seed, step, held_out)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """``{"text": (B, 64)}``: the lab CLIP's unit text embeddings, the same for a prompt in every batch."""
        return {"text": self.clip.cached_text_embedding(prompts)}

    def null_condition(self, n: int) -> Condition:
        """∅: n zero vectors, which no prompt's unit embedding can be."""
        return empty_text(n, self.device)

    def teacher_weights(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        """State dict of a flow-matching teacher of ``network``'s architecture, on the lab's device.

        The default network's teacher belongs to the lab; another one is pretrained on first use (minutes) and
        cached under the lab's content hash and ``key`` (see ``twinrl.backends.network_key``). Neither the
        weights of ``network`` nor the global random state matter, and both are left untouched.

        Raises:
            InputError: the cached file is damaged.
        """
        return {name: value.to(self.device) for name, value in self._teachers(self, network, key).items()}

    def to(self, device: str) -> "Lab":
        """Codec, judge, scorers and latents on ``device``, in place; the splits' pixels stay where they are."""
        self.device = device
        if "models" in self.__dict__:
            self.models.to(device)
        self._latents = {split: value.to(device) for split, value in self._latents.items()}
        return self


def empty_text(n: int, device: torch.device | str) -> dict[str, Tensor]:
    """n rows of the empty condition ∅."""
    return {"text": torch.zeros(n, EMBEDDING, device=device)}
