"""How a loop's losses are back-propagated: over micro-batches that come one by one, over copies, under a GradScaler."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import Ranks
from twinrl.gradients.gradient import Gradient
from twinrl.gradients.losses import backward, in_own_memory
from twinrl.training.watching.given import SUM, Given
from twinrl.training.watching.processes import average_gradients, replicated

DONATED = "donated buffer"
"""What torch says where a compiled backward pass may not be repeated."""


class Backwards:
    """A :class:`twinrl.gradients.losses.Backward` that also adds what earlier micro-batches have left.

    Copies of a model are back-propagated apart from DDP's own hooks, which allow one backward for a forward, and
    averaged here.

    Arguments:
        parameters: the trained ones.
        ranks: the processes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks):
        self.parameters, self.ranks = parameters, ranks
        self.replicated = replicated(ranks, parameters)
        self.factor: Tensor | None = None
        self._earlier: dict[str | None, Gradient] = {}

    def keep(self, micro: Given) -> None:
        """Back-propagate a micro-batch that is not the step's last one; its gradients wait, loss by loss."""
        names = list(micro.losses)
        with micro.evaluated() as found:
            for name in names:
                if name in self._earlier:
                    self._earlier[name].put(self.parameters)
                self._add([found.named[name][0]], None, retain_graph=name != names[-1])
                self._earlier[name] = Gradient.take(self.parameters)

    def __call__(
        self, name: str | None, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool
    ) -> None:
        if name in self._earlier:
            self._earlier.pop(name).put(self.parameters)
        self._add(tensors, cotangents, retain_graph)
        if self.replicated:
            average_gradients(self.parameters, self.ranks.world)
        if name is not None and all(parameter.grad is None for parameter in self.parameters):
            raise InputError(f"the loss {name!r} does not depend on the model", fix=f"leave it out; {SUM}")
        if self.factor is not None:
            self.multiply(1 / self.factor)

    def _add(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool) -> None:
        try:
            self._add_plainly(tensors, cotangents, retain_graph)
        except RuntimeError as error:
            if DONATED not in str(error):
                raise
            raise InputError(
                "a compiled model gives its buffers away in the first backward pass",
                fix="torch._functorch.config.donated_buffer = False before it is first called, or give outputs=",
            ) from error

    def _add_plainly(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool) -> None:
        if not self.replicated:
            backward(None, tensors, cotangents, retain_graph)
            return
        found = torch.autograd.grad(tensors, self.parameters, cotangents, retain_graph, allow_unused=True)
        for i, grad in in_own_memory(found).items():
            before = self.parameters[i].grad
            self.parameters[i].grad = grad if before is None else before.add_(grad)

    def multiply(self, factor: Tensor) -> None:
        """Every ``.grad`` times a number."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
