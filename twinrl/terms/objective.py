"""From a batch to losses: the terms' queries, shared forward passes, teachers, and {term: loss}.

:class:`Objective` knows the terms and the networks; :class:`Pass` is one micro-batch on its way through them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from twinrl.config.components import checked, wrong_return
from twinrl.config.errors import InputError
from twinrl.flow import conditions, draws, returned
from twinrl.flow.branches import Batch, Rows, selection
from twinrl.flow.conditions import Condition
from twinrl.flow.guidance import GuidanceConfig, enhanced_velocity
from twinrl.flow.teacher import RandomState, Teacher
from twinrl.machine.moving import rows_of
from twinrl.run import names
from twinrl.terms import Ascent, NetworkOwner, Query, Target, Term

Request = tuple[Query, Rows]


@dataclass(frozen=True)
class Objective:
    """The terms of a formulation and how networks are called.

    Attributes:
        terms: name → term.
        teacher: student and teachers.
        guidance: the target velocity's guidance.
        autocast: dtype of mixed precision, or None. Times, predictions and residuals stay in the data's dtype.
        reward: gives the reward's ascent at samples; None where no term asks for it.
        own: name of a term that owns a network → the network.
    """

    terms: Mapping[str, Term]
    teacher: Teacher
    guidance: GuidanceConfig
    autocast: torch.dtype | None = None
    reward: Callable[[Tensor, Rows, Sequence[str]], Ascent] | None = None
    own: Mapping[str, nn.Module] = field(default_factory=dict)

    def call(self, network: torch.nn.Module, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        """``network(x, t, r, c)`` in mixed precision, the result in ``x``'s dtype."""
        if self.autocast is None:
            return _velocity(network, network(x, t, r, c), x)
        # casts that were kept from a pass without gradient would cut the gradient of one that has some
        with torch.autocast(x.device.type, self.autocast, cache_enabled=not torch.is_grad_enabled()):
            F = network(x, t, r, c)
        return _velocity(network, F, x).to(x.dtype)

    def casting_once(self, device: torch.device) -> AbstractContextManager[object]:
        """Inside, where no weight may change, the student's are cast once for all its passes without gradient."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, enabled=False)

    @property
    def joins(self) -> bool:
        """Whether queries of different terms may share a forward pass: not under dropout, whose masks depend on the
        rows of the pass, so that a target's passes over one term's rows would see others than the student's."""
        return not any(module.p > 0 and module.training for module in self._dropouts)

    @cached_property
    def _dropouts(self) -> list[nn.modules.dropout._DropoutNd]:
        return [m for m in self.teacher.student.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]

    def evaluate(self, batch: Batch, counts: Mapping[str, int], separate: bool = False) -> "Pass":
        """All terms on one micro-batch.

        Arguments:
            batch: the micro-batch.
            counts: rows per branch of the global batch.
            separate: make one forward pass for each set of terms that share rows, so that one term can be
                back-propagated without paying for the rows of the others; else as few passes as possible.
        """
        return Pass(self, batch, counts, separate)


@dataclass
class TermLoss:
    """A term's part of one micro-batch.

    Attributes:
        loss: scalar, weighted and divided by the global normaliser: sums over micro-batches and terms give the total.
        unweighted: the same without the weight, detached; what is logged.
        per_row: (B,) losses, detached.
        rows: (B,) positions in the global batch.
        aux: metric name → (B,) values per row.
        parts: scalars whose gradients sum to ``loss``'s: the term's own, under its name, and those of others that
            act through its target; none of a term that rests.
    """

    loss: Tensor
    unweighted: Tensor
    per_row: Tensor
    rows: Tensor
    aux: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]

    def detached(self) -> "TermLoss":
        """The numbers without the graph."""
        return replace(self, loss=self.loss.detach(), parts={})


Losses = list[dict[str, TermLoss]]
"""Of a step, micro-batch by micro-batch, by term."""


@dataclass(frozen=True)
class Evaluated:
    """What a micro-batch gave, for as long as its graphs are kept.

    Attributes:
        losses: by term; terms without rows are left out.
        outputs: what the student returned, pass by pass.
        with_graphs: gives the outputs with their graphs; where these were cut, of the same passes once more.
    """

    losses: Mapping[str, TermLoss]
    outputs: Sequence[Tensor]
    with_graphs: Callable[[], AbstractContextManager[Sequence[Tensor]]]


@dataclass
class _Forward:
    """Predictions at one point: where rows of the micro-batch stand in a forward pass."""

    rows: tuple[int, ...]  # N positions in the global batch that were evaluated, ascending
    F: Tensor  # (N, C, H, W)

    def on(self, rows: Sequence[int]) -> Tensor:
        """The predictions of some of the rows, given in ascending order."""
        if len(rows) == len(self.rows):
            return self.F
        return rows_of(self.F, selection([bisect_left(self.rows, row) for row in rows]))


@dataclass
class Pass:
    """One micro-batch: collects queries, evaluates them in as few forwards as possible, then the losses.

    It is the :class:`twinrl.terms.Context` of its terms. The random state is captured before the first student
    pass; every pass starts from it, so that predictions and targets see the same dropout. Passes without gradient
    leave no trace in the generators, those with gradient move them on for the next micro-batch: always to the same
    state, however many passes there are and in whatever order, so that this decides no number.

    Attributes:
        outputs: what the student returned, pass by pass, with its graph.
    """

    objective: Objective
    batch: Batch
    counts: Mapping[str, int]
    separate: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    _forwards: dict[str, list[_Forward]] = field(default_factory=dict)
    _groups: list[list[Request]] = field(default_factory=list)  # what each pass of ``outputs`` evaluated
    _cut: bool = False  # the graph ends at the outputs
    _velocity: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _queries: dict[str, tuple[Rows, Query]] | None = None
    _random_state: RandomState | None = None

    @property
    def random_state(self) -> RandomState:
        """The state from which every forward pass starts, captured when it is first needed."""
        if self._random_state is None:
            self._random_state = RandomState.capture()
        return self._random_state

    def begin(self) -> None:
        """Capture the random state and leave the next micro-batch another, whichever is worked on first."""
        self._move_on()

    @contextmanager
    def evaluated(self, terms: Iterable[str] | None = None, cut: bool = False) -> Iterator[Evaluated]:
        """Losses with their graphs; predictions and graphs are let go of on leaving, and made again when asked for.

        Arguments:
            terms: names, or None for all, whose forward passes are then joined.
            cut: end the graphs at the outputs, so that gradients with respect to these can be taken.
        """
        self._cut = cut
        try:
            yield self._evaluated_now(terms)  # kept by the caller alone
        finally:
            self._release()

    def _evaluated_now(self, terms: Iterable[str] | None) -> Evaluated:
        with self.objective.casting_once(self.batch.rows.x.device):
            losses = self.losses() if terms is None else {n: self.loss(n) for n in terms if n in self.queries()}
        return Evaluated(losses, tuple(self.outputs), self._with_graphs)

    def losses(self) -> dict[str, TermLoss]:
        """Every term's loss; terms without rows in this micro-batch are left out."""
        self.evaluate()
        return {name: self.loss(name) for name in self.queries()}

    def evaluate(self) -> None:
        """Make the predictions of every term."""
        self._evaluate([(query, rows) for rows, query in self.queries().values()])

    def queries(self) -> dict[str, tuple[Rows, Query]]:
        """Where each term wants the student evaluated, and for which rows; terms without rows are left out."""
        if self._queries is None:
            self._queries = {}
            for name, term in self.objective.terms.items():
                rows = self.batch.on(term.config.branches)
                if len(rows):
                    self._queries[name] = (rows, _checked_query(term, rows, term.query(rows, self)))
        return self._queries

    def loss(self, name: str) -> TermLoss:
        """One term's loss, from predictions that are there already or are made now."""
        term, (rows, query) = self.objective.terms[name], self.queries()[name]
        F = self.prediction(query, rows)
        with torch.no_grad():
            target = checked(term.target(rows, query, F.detach(), self), Target, term, "target")
            _check_target(term, target, F)
        share = term.config.weight / term.normaliser(self.counts, rows.global_batch)
        per_row = checked(term.loss(rows, query, F, target.value), Tensor, term, "loss", (len(rows),))
        if F.requires_grad and not per_row.requires_grad:
            raise wrong_return(per_row, term, "loss", f"losses that depend on F (loss: {term.config.loss.kind})")
        loss = share * per_row.sum()
        unweighted = per_row.detach().sum() / term.normaliser(self.counts, rows.global_batch)
        if target.constant is not None:
            mean = target.constant.sum() / sum(self.counts[name] for name in term.config.branches)
            loss, unweighted = loss + term.config.weight * mean, unweighted + mean
        others = checked(term.loss_parts(rows, query, F, target), Mapping, term, "loss_parts")  # type: ignore[type-abstract]
        parts = {other: share * part for other, part in others.items() if other != name}
        own = loss - torch.stack(list(parts.values())).sum() if parts else loss
        parts = {} if target.rests else {name: own, **parts}
        return TermLoss(loss, unweighted, per_row.detach(), rows.index, target.aux, parts)

    def _release(self) -> None:
        """Forget the predictions with their graphs."""
        self._forwards.clear()
        self.outputs.clear()
        self._groups.clear()

    @contextmanager
    def _with_graphs(self) -> Iterator[Sequence[Tensor]]:
        if self._cut:
            groups, self._cut = list(self._groups), False
            self._release()
            for group in groups:
                self._forward(group)
        try:
            yield tuple(self.outputs)
        finally:
            self._release()

    # --- Context --------------------------------------------------------------------------------------------

    def prediction(self, query: Query, rows: Rows) -> Tensor:
        self._evaluate([(query, rows)])
        wanted, forwards = rows.numbers, self._forwards[query.point]
        for forward in forwards:
            if _covers(forward.rows, wanted):
                return forward.on(wanted)
        parts, places, missing = [], [], set(wanted)
        for forward in forwards:
            found = missing.intersection(forward.rows)
            if here := [row for row in wanted if row in found]:
                parts.append(forward.on(here))
                places += here
                missing -= found
        joined = torch.cat(parts)
        return joined if places == sorted(places) else rows_of(joined, torch.tensor(places).argsort())

    def student(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.student, x, t, r, c)

    def both_branches(self, x: Tensor, tau: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        if not self.objective.joins or 2 * len(x) > len(self.batch.rows):
            return self.student(x, -tau, -tau, c), self.student(x, tau, tau, c)
        t = torch.cat([-tau, tau])
        fake, real = self.student(torch.cat([x, x]), t, t, conditions.concatenate([c, c])).chunk(2)
        return fake, real

    def teacher(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.recursion, x, t, r, c)

    def derivative(self, query: Query, v: Tensor) -> Tensor:
        student = self.objective.teacher.student
        try:
            with torch.no_grad(), self.random_state.replayed(), forward_ad.dual_level():
                moving = forward_ad.make_dual(query.x, v), forward_ad.make_dual(query.t, torch.ones_like(query.t))
                F = forward_ad.unpack_dual(self.objective.call(student, *moving, query.r, query.c))
        except NotImplementedError as error:
            raise InputError(
                "the network cannot be differentiated forwards", got=str(error).splitlines()[0],
                fix="use derivative: difference",
            ) from error  # fmt: skip
        return torch.zeros_like(F.primal) if F.tangent is None else F.tangent

    def own(self, term: NetworkOwner, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        name = next(name for name, each in self.objective.terms.items() if each is term)
        with self.random_state.replayed():
            return self.objective.call(self.objective.own[name], x, t, r, c)

    def target_velocity(self, rows: Rows) -> Tensor:
        if rows.numbers not in self._velocity:
            self._velocity[rows.numbers] = enhanced_velocity(rows, self.objective.guidance, self._guide)
        return self._velocity[rows.numbers]

    def reward(self, samples: Tensor, rows: Rows, apart: Sequence[str] = ()) -> Ascent:
        assert self.objective.reward is not None
        with torch.no_grad(), self.random_state.replayed():
            return self.objective.reward(samples, rows, apart)

    def _guide(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self._without_gradient(self.objective.teacher.guidance, x, t, r, c)

    def _without_gradient(self, network: torch.nn.Module, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        with torch.no_grad(), self.random_state.replayed():
            return self.objective.call(network, x, t, r, c)

    # --- forward passes ---------------------------------------------------------------------------------------

    def _evaluate(self, requests: list[Request]) -> None:
        """Forward passes for what is not yet evaluated.

        Without dropout, requests on disjoint rows share one, or each set of terms has its own (``separate``). With
        dropout, whose masks depend on the rows of the pass, a request is never divided nor joined.
        """
        requests = [request for request in requests if not self._known(*request)]
        if not self.objective.joins:
            groups = [[request] for request in _without_covered(requests)]
        elif self.separate:
            groups = [[piece] for piece in _pieces([self._missing(*request) for request in requests])]
        else:
            groups = _disjoint_groups(_without_covered(requests))
        for group in groups:
            self._forward(group)

    def _evaluated(self, point: str) -> set[int]:
        return {row for forward in self._forwards.get(point, []) for row in forward.rows}

    def _known(self, query: Query, rows: Rows) -> bool:
        if self.objective.joins:
            return _covers(self._evaluated(query.point), rows.numbers)
        return any(_covers(forward.rows, rows.numbers) for forward in self._forwards.get(query.point, []))

    def _missing(self, query: Query, rows: Rows) -> Request:
        """The part of a request that is not evaluated yet."""
        known = self._evaluated(query.point)
        return _part((query, rows), [place for place, row in enumerate(rows.numbers) if row not in known])

    def _forward(self, group: list[Request]) -> None:
        queries = [query for query, _ in group]
        self.random_state.restore()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._cut):
            F = self.objective.call(
                self.objective.teacher.student,
                torch.cat([q.x for q in queries]), torch.cat([q.t for q in queries]), torch.cat([q.r for q in queries]),
                conditions.concatenate([q.c for q in queries]),
            )  # fmt: skip
        self._move_on()
        # the gradient at a view ends there; asked for at the network's own output, sharded weights would be gathered
        F = F.requires_grad_() if self._cut else F.view_as(F)
        self.outputs.append(F)
        self._groups.append(group)
        for (query, rows), part in zip(group, F.split([len(rows) for _, rows in group]), strict=True):
            self._forwards.setdefault(query.point, []).append(_Forward(rows.numbers, part))

    def _move_on(self) -> None:
        """Leave the generators where the next micro-batch starts: at a new seed drawn from this one's state."""
        self.random_state.restore()
        draws.seed_global(int(torch.randint(2**62, ())))


def _velocity(network: torch.nn.Module, F: object, x: Tensor) -> Tensor:
    """What a network has returned. Raises InputError where it is no velocity for ``x``."""
    return checked(F, Tensor, network, "forward", x.shape)


def _check_target(term: Term, target: Target, F: Tensor) -> None:
    """Raises InputError where a target does not fit the prediction ``F`` (B, C, H, W)."""
    checked(target.value, Tensor, term, "target.value", F.shape)
    if target.shift is not None:
        checked(target.shift, Tensor, term, "target.shift", F.shape)
    if target.constant is not None:
        checked(target.constant, Tensor, term, "target.constant", F.shape[:1])
    returned.check_aux(target.aux, len(F), term, "target.aux")
    if taken := [name for name in target.aux if name.startswith(names.RESERVED)]:
        expected = f"a name that begins otherwise than {', '.join(names.RESERVED)}"
        raise wrong_return(taken[0], term, "target.aux", expected)


def _checked_query(term: Term, rows: Rows, query: object) -> Query:
    """What a term has asked. Raises InputError where it is no query for its ``rows``."""
    asked = checked(query, Query, term, "query")
    checked(asked.x, Tensor, term, "query.x", rows.x.shape)
    for name in ("t", "r"):
        checked(getattr(asked, name), Tensor, term, f"query.{name}", (len(rows),))
    checked(asked.point, str, term, "query.point")
    returned.check_condition(asked.c, len(rows), term, "query.c")
    return asked


def _covers(evaluated: Iterable[int], wanted: Iterable[int]) -> bool:
    return set(evaluated).issuperset(wanted)


def _part(request: Request, places: Sequence[int]) -> Request:
    """The rows of a request at ascending ``places``."""
    query, rows = request
    keep = selection(places)
    return request if len(places) == len(rows) else (query.select(keep), rows.select(keep))


def _without_covered(requests: list[Request]) -> list[Request]:
    """Requests whose rows are not all part of another request at the same point."""
    kept: list[Request] = []
    for query, rows in sorted(requests, key=lambda request: -len(request[1])):
        if not any(k.point == query.point and _covers(r.numbers, rows.numbers) for k, r in kept):
            kept.append((query, rows))
    return kept


def _pieces(requests: list[Request]) -> list[Request]:
    """Requests cut so that all rows of a piece are wanted by the same requests at its point."""
    pieces: list[Request] = []
    for point in dict.fromkeys(query.point for query, _ in requests):
        here = [request for request in requests if request[0].point == point]
        wanted = [set(rows.numbers) for _, rows in here]
        done: set[int] = set()
        for request, own in zip(here, wanted, strict=True):
            places: dict[tuple[bool, ...], list[int]] = {}  # by which requests want the row
            for place, row in enumerate(request[1].numbers):
                if row not in done:  # else cut already, with an earlier request
                    places.setdefault(tuple(row in rows for rows in wanted), []).append(place)
            pieces += [_part(request, places[pattern]) for pattern in sorted(places)]
            done |= own
    return pieces


def _disjoint_groups(requests: list[Request]) -> list[list[Request]]:
    """Requests packed into groups whose members share no row: one forward of the batch's size at most each."""
    groups: list[list[Request]] = []
    for request in requests:
        for group in groups:
            if all(set(request[1].numbers).isdisjoint(rows.numbers) for _, rows in group):
                group.append(request)
                break
        else:
            groups.append([request])
    return groups
