"""From a batch to losses: the terms' queries, shared forward passes, teachers, and {term: loss}.

:class:`Objective` knows the terms and the networks; :class:`Pass` is one micro-batch on its way through them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from twinrl import conditions
from twinrl.branches import Batch, Rows
from twinrl.conditions import Condition
from twinrl.guidance import GuidanceConfig, enhanced_velocity
from twinrl.teacher import RandomState, Teacher
from twinrl.terms import Query, Term

Network = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Objective:
    """The terms of a formulation and how networks are called.

    Attributes:
        terms: name → term.
        teacher: student and teachers.
        guidance: the target velocity's guidance.
        autocast: dtype of mixed precision, or None. Times, predictions and residuals stay in the data's dtype.
    """

    terms: Mapping[str, Term]
    teacher: Teacher
    guidance: GuidanceConfig
    autocast: torch.dtype | None = None

    def call(self, network: torch.nn.Module, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        """``network(x, t, r, c)`` in mixed precision, the result in ``x``'s dtype."""
        if self.autocast is None:
            return network(x, t, r, c)
        with torch.autocast(x.device.type, self.autocast):
            F = network(x, t, r, c)
        return F.to(x.dtype)

    @property
    def joins(self) -> bool:
        """Whether queries of different terms may share a forward pass: not under dropout, whose masks depend on the
        rows of the pass, so that a target's passes over one term's rows would see others than the student's."""
        modules = self.teacher.student.modules()
        return not any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in modules)

    def evaluate(self, batch: Batch, counts: Mapping[str, int]) -> "Pass":
        """All terms on one micro-batch; ``counts`` are the rows per branch of the global batch."""
        return Pass(self, batch, counts)


@dataclass
class TermLoss:
    """A term's part of one micro-batch.

    Attributes:
        loss: scalar, weighted and divided by the global normaliser: sums over micro-batches and terms give the total.
        unweighted: the same without the weight, detached; what is logged.
        per_row: (B,) losses, detached.
        rows: (B,) positions in the global batch.
        aux: metric name → (B,) values per row.
    """

    loss: Tensor
    unweighted: Tensor
    per_row: Tensor
    rows: Tensor
    aux: Mapping[str, Tensor]


@dataclass
class _Forward:
    """Predictions at one point: where each row of the micro-batch stands in which forward pass."""

    rows: Tensor  # (N,) positions in the global batch that were evaluated
    F: Tensor  # (N, C, H, W)


@dataclass
class Pass:
    """One micro-batch: collects queries, evaluates them in as few forwards as possible, then the losses.

    It is the :class:`twinrl.terms.Context` of its terms. The random state is captured before the first student
    pass; every pass starts from it, so that predictions and targets see the same dropout. Passes without gradient
    leave no trace in the generators, those with gradient move them on for the next micro-batch.
    """

    objective: Objective
    batch: Batch
    counts: Mapping[str, int]
    random_state: RandomState = field(default_factory=RandomState.capture)
    _forwards: dict[str, list[_Forward]] = field(default_factory=dict)
    _velocity: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def losses(self) -> dict[str, TermLoss]:
        """Every term's loss; terms without rows in this micro-batch are left out."""
        queries = self.queries()
        self._evaluate([(query, rows) for rows, query in queries.values()])
        return {name: self._loss(self.objective.terms[name], *asked) for name, asked in queries.items()}

    def queries(self) -> dict[str, tuple[Rows, Query]]:
        """Where each term wants the student evaluated, and for which rows; terms without rows are left out."""
        asked = {}
        for name, term in self.objective.terms.items():
            rows = self.batch.on(term.config.branches)
            if len(rows):
                asked[name] = (rows, term.query(rows, self))
        return asked

    def _loss(self, term: Term, rows: Rows, query: Query) -> TermLoss:
        F = self.prediction(query, rows)
        with torch.no_grad():
            target = term.target(rows, query, F.detach(), self)
        per_row = term.loss(rows, query, F, target.value)
        mean = per_row.sum() / term.normaliser(self.counts, rows.global_batch)
        return TermLoss(term.config.weight * mean, mean.detach(), per_row.detach(), rows.index, target.aux)

    # --- Context --------------------------------------------------------------------------------------------

    def prediction(self, query: Query, rows: Rows) -> Tensor:
        self._evaluate([(query, rows)])
        forward = next(f for f in self._forwards[query.point] if _covers(f.rows, rows.index))
        if len(forward.rows) == len(rows):
            return forward.F
        return forward.F[torch.searchsorted(forward.rows, rows.index)]

    def student(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.student, x, t, r, c)

    def teacher(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.recursion, x, t, r, c)

    def target_velocity(self, rows: Rows) -> Tensor:
        key = tuple(rows.index.tolist())
        if key not in self._velocity:
            self._velocity[key] = enhanced_velocity(rows, self.objective.guidance, self._guide)
        return self._velocity[key]

    def _guide(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.guidance, x, t, r, c)

    def _without_gradient(self, network: torch.nn.Module, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        with torch.no_grad(), self.random_state.replayed():
            return self.objective.call(network, x, t, r, c)

    # --- forward passes ---------------------------------------------------------------------------------------

    def _evaluate(self, requests: list[tuple[Query, Rows]]) -> None:
        """Forward passes for what is not yet evaluated; without dropout, requests on disjoint rows share one."""
        pending: list[tuple[Query, Rows]] = []
        for query, rows in requests:
            known = self._forwards.get(query.point, [])
            if not any(_covers(f.rows, rows.index) for f in known):
                pending.append((query, rows))
        requests = _without_covered(pending)
        for group in _disjoint_groups(requests) if self.objective.joins else [[request] for request in requests]:
            self._forward(group)

    def _forward(self, group: list[tuple[Query, Rows]]) -> None:
        queries = [query for query, _ in group]
        self.random_state.restore()
        F = self.objective.call(
            self.objective.teacher.student,
            torch.cat([q.x for q in queries]), torch.cat([q.t for q in queries]), torch.cat([q.r for q in queries]),
            conditions.concatenate([q.c for q in queries]),
        )  # fmt: skip
        for (query, rows), part in zip(group, F.split([len(rows) for _, rows in group]), strict=True):
            self._forwards.setdefault(query.point, []).append(_Forward(rows.index, part))


def _covers(evaluated: Tensor, wanted: Tensor) -> bool:
    return bool(torch.isin(wanted, evaluated).all())


def _without_covered(requests: list[tuple[Query, Rows]]) -> list[tuple[Query, Rows]]:
    """Requests whose rows are not all part of another request at the same point."""
    kept: list[tuple[Query, Rows]] = []
    for query, rows in sorted(requests, key=lambda request: -len(request[1])):
        if not any(k.point == query.point and _covers(r.index, rows.index) for k, r in kept):
            kept.append((query, rows))
    return kept


def _disjoint_groups(requests: list[tuple[Query, Rows]]) -> list[list[tuple[Query, Rows]]]:
    """Requests packed into groups whose members share no row: one forward of the batch's size at most each."""
    groups: list[list[tuple[Query, Rows]]] = []
    for request in requests:
        for group in groups:
            if not any(torch.isin(request[1].index, rows.index).any() for _, rows in group):
                group.append(request)
                break
        else:
            groups.append([request])
    return groups
