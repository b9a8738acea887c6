"""A packed run as its trainer sees it: a single process whose networks are called together with others'."""

import torch
from torch import nn

from twinrl.errors import InputError
from twinrl.fsdp.ranks import Ranks
from twinrl.packed.networks import Networks
from twinrl.schema import RunConfig


class Member(Ranks):
    """The ``ranks`` of one packed trainer.

    Arguments:
        networks: of all members. number: of this one, from 0.
    """

    def __init__(self, networks: Networks, number: int):
        self.networks, self.number = networks, number

    def begin(self, step: int) -> None:
        """Where members meet that have fallen out of step."""
        self.networks.rendezvous.begin_step()

    def place(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        """As for a single process, and packed."""
        return self.networks.join(super().place(network, device, dtype), self.number)

    def copy(self, student: nn.Module) -> nn.Module:
        """As for a single process, and packed."""
        return self.networks.join(super().copy(student), self.number)


def check_packed(settings: RunConfig) -> None:
    """Raises InputError where runs with these settings can't be packed; what the network draws shows when it joins."""
    if settings.model.family is not None:
        raise InputError(
            "a pretrained family can't be packed", got=f"model.family {settings.model.family}",
            fix="train its seeds one by one (resources.packed: 1)",
        )  # fmt: skip
    if settings.launch.wanted:
        raise InputError(
            "packed runs share one process", got="a launch of several processes",
            fix="leave launch out, or train the seeds one by one (resources.packed: 1)",
        )  # fmt: skip
