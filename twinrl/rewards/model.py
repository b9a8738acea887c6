"""What reward models share: a frozen network in a chosen dtype, few images at a time, and prompts embedded once.

    R(y, c) = score(tower(preprocess(y)), c)

The tower computes in ``dtype``; resizing before it and the score after it are in float32 (float64 for a float64
tower): a cosine rounded to bf16 has steps of 2⁻¹⁰ at HPSv2's typical 0.25, more than two samples of a prompt differ.

``chunk`` bounds the images in one forward pass. Without ``recompute`` every chunk keeps its activations for the
backward pass, so it bounds memory only where no gradient is taken; with it (gradient checkpointing, Chen et al.,
arXiv:1604.06174) a chunk keeps its pixels alone and is computed again, and ``chunk`` bounds memory always.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twinrl.config import Settings
from twinrl.machine.dtypes import DTYPES
from twinrl.rewards.reward import WITHOUT_SOURCE, Reward, RewardContext, check_batch


class RewardModelConfig(Settings):
    """Settings that every reward model has."""

    dtype: Literal["float32", "bf16", "float64"] = Field(
        "float32", description="of weights and activations; the score itself is float32 (float64)"
    )
    chunk: int | None = Field(None, ge=1, description="images per forward pass; null = all at once")
    recompute: bool = Field(False, description="keep no activations, compute them again in the backward pass")


class ModelReward(Reward):
    """A reward with a network of its own. Subclasses give :meth:`network` and :meth:`score`."""

    config: Any

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        super().__init__(config, context)
        self.dtype = DTYPES[config.dtype]
        self.precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.model = self._shared()
        self.texts = TextCache()

    def _shared(self) -> nn.Module:
        """The network; rewards of equal settings in equal surroundings have one between them."""
        weights = self.config.model_dump_json(exclude={"chunk", "recompute"})
        networks = {} if self.context.networks is None else self.context.networks
        if weights not in networks:
            networks[weights] = self.network().to(self.dtype).eval().requires_grad_(False)
        return networks[weights]

    @abstractmethod
    def network(self) -> nn.Module:
        """The network with its published weights, on the CPU."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of images (B, 3 or 1, H, W) in [−1, 1], of dtype ``precise``, where the model is."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See ``Reward``. Computes where the model is; scores come back on the images' device."""
        check_batch(images, prompts, self.needs_prompts)
        size = self.config.chunk or len(images)
        scores = [
            self._chunk(images[start : start + size], prompts[start : start + size])
            for start in range(0, len(images), size)
        ]
        return torch.cat(scores).to(images.device)

    def _chunk(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        images = images.to(self.device, self.precise)
        if self.config.recompute and torch.is_grad_enabled() and images.requires_grad:
            # evaluation mode draws no random numbers, so none need be replayed
            scores = checkpoint(self.score, images, prompts, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(scores, Tensor)
            return scores
        return self.score(images, prompts)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self.model.parameters()).device

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}


class TextCache:
    """Embeddings of prompts by a frozen text tower, each computed once and by itself.

    By itself, because rows of a batched product depend in their last bits on the batch: a resumed run meets prompts
    in another grouping and must see the same rewards. The oldest is dropped when there are ``size``.
    """

    def __init__(self, size: int = 4096):
        self.size = size
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], embed: Callable[[str], Tensor], device: torch.device) -> Tensor:
        """(B, D) embeddings on ``device``; ``embed`` gives the (D,) embedding of one prompt."""
        rows = []
        for prompt in prompts:
            if prompt not in self._known:
                if len(self._known) >= self.size:
                    del self._known[next(iter(self._known))]
                self._known[prompt] = embed(prompt)
            rows.append(self._known[prompt].to(device))
        return torch.stack(rows)
