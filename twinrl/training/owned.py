"""The networks that terms own: each with its optimizer, trained on a step's rows before the student's gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twinrl.config.components import checked, wrong_return
from twinrl.flow.branches import Batch
from twinrl.fsdp.ranks import Ranks
from twinrl.gradients.gradient import Gradient
from twinrl.run import names
from twinrl.terms import NetworkOwner
from twinrl.terms.objective import Objective
from twinrl.training.feed import Fed
from twinrl.training.optim import OPTIMIZERS
from twinrl.training.schema import RunConfig


@dataclass(frozen=True)
class Owned:
    """A term's own network in training.

    Attributes:
        name, term: whose it is.
        network: itself; of its parameters those that require gradients are trained.
        optimizer: of the run's kind, at a constant rate.
        ranks: who shares the batch.
    """

    name: str
    term: NetworkOwner
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks

    def train(self, objective: Objective, fed: Fed, micro_batch: int | None) -> dict[str, Tensor]:
        """The network's steps before one of the student's; metric → 0-dim tensor, of the last of them.

        Arguments:
            objective: of the run.
            fed: what the step is fed.
            micro_batch: most rows of a pass; None: all.
        """
        branches = self.term.config.branches
        chunks = [one for one in fed.batch.chunks(micro_batch or len(fed.batch.rows)) if len(one.on(branches))]
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        measures: dict[str, Tensor] = {}
        for update in range(self.term.config.updates):
            loss = self._backward(objective, fed, chunks, update)
            gradient = Gradient.take(parameters)
            measures = {names.own(self.name, "loss"): self.ranks.total(loss)}
            measures[names.own(self.name, "norm")] = gradient.norm
            gradient.put(parameters)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return measures

    def _backward(self, objective: Objective, fed: Fed, chunks: Sequence[Batch], update: int) -> Tensor:
        """The gradient of step number ``update`` into ``.grad``; the loss of this process's rows, 0-dim."""
        self.optimizer.zero_grad()
        losses, normaliser = [], self.term.normaliser(fed.counts, fed.batch.rows.global_batch)
        for number, chunk in enumerate(chunks, start=1):
            rows = chunk.on(self.term.config.branches)
            per_row = self.term.own_losses(rows, objective.evaluate(chunk, fed.counts), update)
            loss = checked(per_row, Tensor, self.term, "own_losses", (len(rows),)).sum() / normaliser
            if not loss.requires_grad:
                raise wrong_return(per_row, self.term, "own_losses", "losses that depend on ctx.own")
            if len(chunks) > 1:
                self.ranks.reduce_after(self.network, number == len(chunks))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def owned_of(settings: RunConfig, objective: Objective, ranks: Ranks) -> list[Owned]:
    """What trains the networks of an objective's terms."""
    found = []
    for name, network in objective.own.items():
        term = objective.terms[name]
        assert isinstance(term, NetworkOwner)
        optim = settings.optim.model_copy(update={"lr": term.config.own_lr or settings.optim.lr})
        optimizer = ranks.prepare(OPTIMIZERS.find(optim.kind).build(optim, network.parameters()))
        found.append(Owned(name, term, network, optimizer, ranks))
    return found
