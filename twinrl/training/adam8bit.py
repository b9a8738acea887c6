"""torchao's AdamW with moments in 8 bits, as a trainer drives optimizers: rates are numbers, states plain tensors."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from twinrl.run.fit import SCALE

warnings.filterwarnings("ignore", "OptimState8bit does not implement")  # a cache of compiled code goes without it

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name of each → whether it has a sign."""


class AdamWIn8Bits(AdamW8bit):
    """Blocks of 256 numbers are kept as places in a table of 256 values, and the block's largest number.

    A checkpoint has the places under the moment's name, and the largest numbers beside them.
    """

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        return OptimState8bit.zeros(p.shape, signed, block_size, p.device)  # numbers of float32, whatever p's are

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; the rates may have been set as plain numbers, and torchao takes tensors alone."""
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """With plain tensors; they share the optimizer's memory."""
        found = super().state_dict()
        return found | {"state": {number: _plain(kept) for number, kept in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, kept in state_dict["state"].items():
            held = self.state[parameters[number]]
            for name in (name for name in MOMENTS if f"{name}{SCALE}" in kept):
                moment = self._new_buffer(parameters[number], MOMENTS[name])
                moment.codes.copy_(kept[name])
                moment.scale.copy_(kept[f"{name}{SCALE}"])
                held[name] = moment
                del held[f"{name}{SCALE}"]


def _plain(kept: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: getattr(value, "codes", value) for name, value in kept.items()}
    return found | {f"{name}{SCALE}": value.scale for name, value in kept.items() if hasattr(value, "codes")}
