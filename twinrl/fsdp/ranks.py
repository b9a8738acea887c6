"""What training asks of the processes that it runs on. One process answers trivially.

The trainer knows nothing of process groups: it asks its ``ranks`` for its rows of a batch, for sums, for agreement,
and to make, save and load networks. :class:`Ranks` are the answers of a single process,
:class:`twinrl.fsdp.sharded.Sharded` those of several.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twinrl.backends import tells_trajectories_apart
from twinrl.flow.conditions import Condition
from twinrl.flow.teacher import copy_of
from twinrl.fsdp.initial import Outline
from twinrl.machine.compiling import compile_blocks
from twinrl.machine.moving import numbers
from twinrl.run import checkpoints, fit
from twinrl.run.checkpoints import Checkpoint
from twinrl.run.fit import Formats, Kept
from twinrl.terms.objective import Losses

T = TypeVar("T")


class Ranks:
    """A single process.

    Attributes:
        rank, world: this process's number, and how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes logs, events, samples and the console."""
        return self.rank == 0

    def own(self, purpose: str) -> str:
        """The purpose of random numbers that are not of the global batch but of this process's passes (dropout)."""
        return purpose

    # --- a step -----------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """This process begins a step."""

    def check_shares(self, counts: Mapping[str, int]) -> None:
        """Raises InputError where the rows of a branch cannot be shared by the processes equally."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value

    def reduce_after(self, student: nn.Module, backward: bool) -> None:
        """Whether the student's gradient, as it has piled up, is summed over the processes after the next backward."""

    def merge(self, losses: Losses) -> Losses:
        """The losses of all processes."""
        return losses

    def numbers(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """0-dim tensors that every process has in the same way as numbers, equal to the last bit; in one transfer."""
        return numbers(scalars)

    def agree(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers that every process has in the same way, equal to the last bit."""
        return values

    def anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return flag

    def gathered(self, word: str) -> list[str]:
        """What each process says."""
        return [word]

    def on_first(self, action: Callable[[], Any]) -> None:
        """Do something in the first process while the others wait; its InputError is everybody's."""
        action()

    def together(self, action: Callable[[], T]) -> T:
        """Do something that needs no other process; an InputError of any process is everybody's."""
        return action()

    # --- networks and optimizers ----------------------------------------------------------------------------------

    def network(
        self,
        build: Callable[[], nn.Module],
        random: bool,
        trained: bool = True,
        outline: Callable[[], Outline | None] = lambda: None,
    ) -> nn.Module:
        """The network that ``build`` constructs; the values it constructs matter only if ``random``.

        Arguments:
            build: makes it, with its initial weights.
            random: False where other weights are loaded at once.
            trained: whether it is the student; others never see a backward pass.
            outline: gives of a pretrained network the same without values, and where these are read; else None.
        """
        return build()

    def place(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        """The network where it is trained, in the dtype of its parameters; None: as they are."""
        return network.to(device=device, dtype=dtype)

    def copy(self, student: nn.Module, average: bool = False, trained: bool = False) -> nn.Module:
        """See :func:`twinrl.flow.teacher.copy_of`."""
        return copy_of(student, average, trained)

    def compiled(self, network: nn.Module, classes: Sequence[str] | None, backend: str) -> nn.Module:
        """The network with its blocks compiled by a backend of ``torch.compile``.

        Arguments:
            classes: names of the blocks' classes; None: they are found.
        """
        from twinrl.fsdp import wrap

        compile_blocks(wrap.blocks_of(network, wrap.block_classes(network, classes)), backend)
        return network

    def keep_frozen(self, modules: Iterable[nn.Module]) -> None:
        """Keep frozen modules, which are used inside :func:`twinrl.machine.visiting.visiting` alone, as configured."""

    def tells_trajectories_apart(self, network: nn.Module, shape: tuple[int, int, int], condition: Condition) -> bool:
        """See :func:`twinrl.backends.tells_trajectories_apart`."""
        return tells_trajectories_apart(network, shape, condition)

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer, fit for the networks' tensors."""
        return optimizer

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
        """See :func:`twinrl.run.checkpoints.save`."""
        checkpoints.save(directory, step, checkpoint, keep)

    def save_later(self, directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> "Future[None]":
        """See :func:`twinrl.run.checkpoints.save_later`."""
        return checkpoints.save_later(directory, step, checkpoint, keep)

    def load(self, path: Path) -> Checkpoint:
        """See :func:`twinrl.run.checkpoints.load`."""
        return checkpoints.load(path)

    def load_module(
        self, module: nn.Module, tensors: Mapping[str, Tensor], origin: str, formats: Formats | None = None
    ) -> None:
        """See :func:`twinrl.run.fit.load_module`."""
        fit.load_module(module, tensors, origin, formats=formats)

    def load_optimizer(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], origin: str, kept: Kept | None = None
    ) -> None:
        """See :func:`twinrl.run.fit.load_optimizer`."""
        fit.load_optimizer(optimizer, tensors, origin, kept)


ALONE = Ranks()
"""One process."""
