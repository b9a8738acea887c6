"""Networks around networks."""

from typing import Any

import torch
from torch import Tensor, nn

from twinrl.flow.conditions import Condition


class WithoutTargetTime(nn.Module):
    """A network that is never told the target time: it receives r = 0 always, t keeps its sign (SimpleTuner)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """As the wrapped network at ``(x, t, 0)``."""
        return self.network(x, t, torch.zeros_like(r), condition)


def unwrapped(network: nn.Module) -> Any:
    """The network inside a :class:`WithoutTargetTime`; any other itself."""
    return network.network if isinstance(network, WithoutTargetTime) else network
