"""A step's passes as the gradient engine sees them: named losses, taken apart by gradients."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from twinrl.flow.branches import Batch
from twinrl.gradients.losses import Scalars
from twinrl.terms.objective import Objective, Pass, TermLoss


@dataclass
class Apart:
    """One micro-batch, a :class:`twinrl.gradients.losses.MicroBatch`.

    Attributes:
        one: the passes of its terms.
        owners: the gradients that are taken apart, with the terms in whose losses they are.
        losses: by term, without graphs; filled while the engine works.
    """

    one: Pass
    owners: Mapping[str, tuple[str, ...]]
    losses: dict[str, TermLoss] = field(default_factory=dict)

    def begin(self) -> None:
        self.one.begin()

    def graphs(self, name: str | None = None) -> set[str]:
        """The points at which the student is evaluated for a gradient's terms."""
        queries = self.one.queries()
        terms = queries if name is None else self.owners[name]
        return {queries[term][1].point for term in terms if term in queries}

    @contextmanager
    def evaluated(self, name: str | None = None, cut: bool = False) -> Iterator[Scalars]:
        with self.one.evaluated(None if name is None else self.owners[name], cut) as found:
            self.losses |= {term: part.detached() for term, part in found.losses.items()}
            named = {gradient: _parts(found.losses, terms, gradient) for gradient, terms in self.owners.items()}
            total = [part.loss for part in found.losses.values()]
            yield Scalars(total, named, found.outputs, found.with_graphs)


def _parts(losses: Mapping[str, TermLoss], owners: Iterable[str], name: str) -> list[Tensor]:
    """The scalars in the owners' losses whose gradient goes by ``name``; none in a micro-batch without their rows."""
    return [losses[owner].parts[name] for owner in owners if owner in losses and name in losses[owner].parts]


def passes_of(
    objective: Objective,
    chunks: Iterable[Batch],
    counts: Mapping[str, int],
    owners: Mapping[str, tuple[str, ...]],
    separate: bool,
) -> list[Apart]:
    """The micro-batches of a step; the teacher's average takes in the last step's weights first.

    Arguments:
        counts: rows of each branch in the global batch.
        owners: as in :class:`Apart`.
        separate: whether forward passes serve one set of terms each.
    """
    objective.teacher.update()
    return [Apart(objective.evaluate(chunk, counts, separate), owners) for chunk in chunks]
