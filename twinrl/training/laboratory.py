"""The laboratory: labelled data in memory with judges that training never sees, and networks of one's own."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from twinrl.backends import build_network, network_key
from twinrl.backends.wrappers import unwrapped
from twinrl.config.errors import InputError
from twinrl.evaluation import FinalTable, LabelProtocol, final_table
from twinrl.evaluation.protocol import HeldOut
from twinrl.evaluation.shelf import Shelf
from twinrl.flow.reading import InMemory
from twinrl.flow.source import Source
from twinrl.fsdp.ranks import ALONE
from twinrl.machine.dtypes import MASTER_DTYPES
from twinrl.training import sources
from twinrl.training.provider import Provider
from twinrl.training.schema import RunConfig


class Laboratory(Provider[Source]):
    """Digits, pictures of one's own, MNIST, and whatever else is a labelled ``twinrl.flow.source.Source``."""

    @classmethod
    def load(cls, settings: RunConfig, device: torch.device) -> Source:
        return sources.load(settings.data.source, settings.data.place).to(str(device))

    @classmethod
    def export(
        cls, settings: RunConfig, checkpoint: Path, folder: Path, lora: bool, dtype: Literal["float32", "bf16"] | None
    ) -> str:
        raise InputError(
            f"a run on {settings.data.source} has no diffusers pipeline to export", expected="a run with model.family"
        )

    def reader(self, split: str) -> InMemory:
        rows = self.settings.data.rows if split == "train" else None
        return InMemory.of(self.source, split, self.device, MASTER_DTYPES[self.settings.train.precision], rows)

    def network(self) -> nn.Module:
        try:
            return self.told(build_network(self.settings.model.network, self.source, self.settings.seed))
        except ValueError as error:
            shape = "×".join(map(str, self.source.latent_shape))
            raise InputError(
                "model.network does not fit the data", got=f"{error} ({self.source.name} has latents {shape})",
                fix="change the sizes under model.network",
            ) from error  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return MASTER_DTYPES[self.settings.train.precision]

    def check_branches_apart(self, network: nn.Module) -> None:
        shape, condition = self.source.latent_shape, self.source.null_condition(1)
        if not self.ranks.tells_trajectories_apart(network, shape, condition):
            raise InputError(
                f"network {self.settings.model.network.kind} answers (t, t) and (−t, −t) alike, so Δv is zero and the "
                "negative-time terms do nothing",
                fix="embed the sign of t (twinrl.backends.embedding.TimeEmbedding), or remove those terms",
            )

    def start_as_teacher(self, network: nn.Module) -> None:
        self._fill(unwrapped(network), "the pretrained teacher")

    def _fill(self, network: nn.Module, origin: str) -> None:
        weights = self.source.teacher_weights(network, network_key(self.settings.model.network))
        self.ranks.load_module(network, weights, origin)

    def teacher(self) -> nn.Module | None:
        """The flow-matching teacher of the configured architecture, in eval mode; None if training began elsewhere."""
        if self.settings.train.init != "teacher":
            return None
        config = self.settings.model.network
        network = self.ranks.network(partial(build_network, config, self.source, 0), random=False, trained=False)
        self._fill(network, "the teacher")
        return self.ranks.place(network, self.device, torch.float32).eval()

    def protocol(self, split: HeldOut) -> LabelProtocol:
        judges = self.judges()
        shelf = Shelf.of(self.source, judges, self.device) if self.ranks is ALONE else None
        return LabelProtocol(self.source, self.settings.evaluation, split, self.device, judges, shelf)

    def final(self, network: nn.Module) -> tuple[LabelProtocol, FinalTable]:
        """On the test split, beside the teacher that training started from."""
        protocol, settings = self.protocol("test"), self.settings.model.network.model_dump(mode="json")
        return protocol, final_table(protocol, network, self.teacher(), teacher_settings=settings)

    def judged(self, network: nn.Module) -> nn.Module:
        single = all(parameter.dtype == torch.float32 for parameter in network.parameters())
        return network if single else deepcopy(network).float()

    def example_prompts(self, seed: int) -> list[str]:
        """One of each class."""
        return self.source.prompts(torch.arange(len(self.source.classes)), seed, 0)
