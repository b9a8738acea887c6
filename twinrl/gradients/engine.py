"""The gradient of a step, term by term.

Terms outermost, micro-batches inside; every gradient is taken by ``backward`` into ``.grad``, which works for sharded
parameters too (gradients taken with respect to parameters directly do not). Two spaces:

- *parameter*: each term is back-propagated alone, its gradient measured and changed exactly, and added up. Forward
  passes serve one set of terms each, so rows that one term sees are back-propagated once, and only rows that
  several terms share are repeated. With micro-batches a term's forwards are repeated for each term that shares
  them, since graphs of all micro-batches would not fit.
- *output*: the rules see each term's gradient with respect to the predictions (its cotangent), and one backward
  carries the sum. With micro-batches the predictions are made twice: norms need the whole batch.

Buffers of the size of a gradient, beside ``.grad``: one for rules in parameter space, none in output space; one per
term on steps with shares or cosines in parameter space; one more where several terms are projected.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.flow.branches import Batch
from twinrl.gradients.chain import Chain, GradientsConfig
from twinrl.gradients.gradient import Gradient, dots
from twinrl.gradients.transforms import RuleContext
from twinrl.run import names
from twinrl.terms.objective import Objective, Pass, TermLoss

Losses = list[dict[str, TermLoss]]
Measures = dict[str, Tensor]


class Engine:
    """Puts the gradient of the terms' sum into ``.grad`` and measures the terms on the way.

    Arguments:
        config: space, rules, telemetry.
        parameters: the student's trainable parameters.
        owners: the gradients that are taken apart, with the terms in whose losses they are.
        total: sums a 0-dim tensor over the ranks that hold other rows; for the output space.
        reduce: told, where there are micro-batches, before each one's backward whether the gradient that has piled
            up is summed over the ranks after it: it is after the last one of a term.
        steps: length of the run. renoise_end: step at which renoise stands still; both for scheduled rules.
    """

    def __init__(
        self,
        config: GradientsConfig,
        parameters: Iterable[nn.Parameter],
        owners: Mapping[str, tuple[str, ...]],
        total: Callable[[Tensor], Tensor] = lambda value: value,
        reduce: Callable[[bool], None] = lambda last: None,
        steps: int = 1,
        renoise_end: Fraction | None = None,
    ):
        self.config, self.total, self.reduce = config, total, reduce
        self.steps, self.renoise_end = steps, renoise_end
        self.parameters = [p for p in parameters if p.requires_grad]
        ordered = sorted(owners, key=config.needs_others)  # stable: the terms that wait for the others come last
        self.owners = {name: owners[name] for name in ordered}
        self.chains = {name: Chain(config.rules(name)) for name in ordered}
        self.total_chain = Chain(config.total)

    @property
    def separate(self) -> bool:
        """Whether forward passes should serve one set of terms each."""
        return self.config.space == "parameter"

    def passes(self, objective: Objective, chunks: Iterable[Batch], counts: Mapping[str, int]) -> list[Pass]:
        """The micro-batches of a step, given the rows of each branch in the global batch; the teacher's average takes
        in the last step's weights first."""
        objective.teacher.update()
        return [objective.evaluate(chunk, counts, self.separate) for chunk in chunks]

    def backward(self, passes: Sequence[Pass], step: int = 0) -> tuple[Losses, Measures]:
        """The changed gradient into ``.grad``; the losses of every micro-batch, and the measures by metric name.

        Arguments:
            passes: the micro-batches of the step.
            step: decides which periodic measures are due.
        """
        for parameter in self.parameters:
            parameter.grad = None
        for one in passes:
            one.begin()
        space = {"parameter": self._in_parameter_space, "output": self._in_output_space, "none": self._together}
        return space[self.config.space](passes, step)

    def _finish(self, step: int, gradient: Gradient | None = None) -> Measures:
        """Apply the rules of the sum, which lies in ``.grad`` unless it is given, and leave it there."""
        gradient = Gradient.take(self.parameters) if gradient is None else gradient
        raw = gradient.norm
        self.total_chain(gradient, RuleContext(self.parameters, None, step, self.steps, self.renoise_end))
        gradient.put(self.parameters)
        return {names.GRAD_TOTAL_RAW: raw, names.GRAD_TOTAL_CLIPPED: gradient.norm}

    # --- none ---------------------------------------------------------------------------------------------------

    def _together(self, passes: Sequence[Pass], step: int) -> tuple[Losses, Measures]:
        losses = []
        last = _last([bool(one.queries()) for one in passes])
        for number, one in enumerate(passes):
            self._announce(passes, number == last)
            with one.evaluated() as found:
                _backward(part.loss for part in found.losses.values())
                losses.append(_detached(found.losses))
        return losses, self._finish(step)

    # --- parameter space ----------------------------------------------------------------------------------------

    def _in_parameter_space(self, passes: Sequence[Pass], step: int) -> tuple[Losses, Measures]:
        account = _Account(self._keeps(step), self._several_need_others)
        back = self._at_once if len(passes) == 1 else self._in_turn
        losses = back(passes, lambda name: self._settle(
            name, Gradient.take(self.parameters), account, self.parameters, step
        ))  # fmt: skip
        measures = account.measures | self._geometry(account, step)
        return losses, measures | self._finish(step, account.sum)

    def _at_once(self, passes: Sequence[Pass], settle: Callable[[str], None]) -> Losses:
        """Back through the one micro-batch's graph, term by term; each is settled with its gradient in ``.grad``."""
        (one,) = passes
        with one.evaluated() as found:
            parts = {name: _parts(found.losses, owners, name) for name, owners in self.owners.items()}
            goes_through = {name: self._points(name, one) if parts[name] else set() for name in parts}
            for name, scalars in parts.items():
                points = goes_through.pop(name)  # whose graphs are freed unless a later term needs them
                _backward(scalars, retain_graph=any(points & later for later in goes_through.values()))
                settle(name)
            return [_detached(found.losses)]

    def _points(self, name: str, one: Pass) -> set[str]:
        """Where the student was evaluated for a gradient's terms."""
        return {one.queries()[owner][1].point for owner in self.owners[name] if owner in one.queries()}

    def _in_turn(self, passes: Sequence[Pass], settle: Callable[[str], None]) -> Losses:
        """Forward and back through every micro-batch for each term."""
        losses: Losses = [{} for _ in passes]
        for name, owners in self.owners.items():
            last = _last([not one.queries().keys().isdisjoint(owners) for one in passes])
            for number, (one, known) in enumerate(zip(passes, losses, strict=True)):
                self._announce(passes, number == last)
                with one.evaluated(owners) as found:
                    _backward(_parts(found.losses, owners, name))
                    known |= _detached(found.losses)
            settle(name)
        return losses

    # --- output space -------------------------------------------------------------------------------------------

    def _in_output_space(self, passes: Sequence[Pass], step: int) -> tuple[Losses, Measures]:
        cotangents: dict[str, dict[int, Tensor]] = {name: {} for name in self.owners}
        first, account = [0], _Account(self._keeps(step), self._several_need_others)
        losses: Losses = []
        graphs: list[Callable[[], AbstractContextManager[Sequence[Tensor]]]] = []
        with ExitStack() as kept:
            for one in passes:
                found = kept.enter_context(one.evaluated(cut=len(passes) > 1))
                for name, owners in self.owners.items():
                    cotangents[name] |= _cotangents(_parts(found.losses, owners, name), found.outputs, first[-1])
                first.append(first[-1] + len(found.outputs))
                losses.append(_detached(found.losses))
                graphs.append(found.with_graphs)
            for name, found_cotangents in cotangents.items():
                gradient = Gradient(found_cotangents, self.total, self.parameters[0].device)
                self._settle(name, gradient, account, (), step)
            for (start, end), with_graphs in zip(pairwise(first), graphs, strict=True):
                self._announce(passes, end > max(account.sum.tensors, default=0) >= start)
                with with_graphs() as outputs:
                    pulled = {i: F for i, F in enumerate(outputs, start) if i in account.sum.tensors}
                    torch.autograd.backward(list(pulled.values()), [account.sum.tensors[i] for i in pulled])
        return losses, account.measures | self._geometry(account, step) | self._finish(step)

    # --- what they share ----------------------------------------------------------------------------------------

    def _announce(self, passes: Sequence[Pass], last: bool) -> None:
        if len(passes) > 1:
            self.reduce(last)

    @property
    def _several_need_others(self) -> bool:
        return sum(self.config.needs_others(name) for name in self.owners) > 1

    def _keeps(self, step: int) -> bool:
        telemetry = self.config.telemetry
        return telemetry.due("shares", step) or telemetry.due("cosines", step)

    def _settle(
        self, name: str, gradient: Gradient, account: "_Account", parameters: Sequence[Tensor], step: int
    ) -> None:
        """Apply a term's rules, note its norms and add it to the sum."""
        others = account.others(self.config.needs_others(name))
        context = RuleContext(parameters, others, step, self.steps, self.renoise_end)
        raw = gradient.norm
        self.chains[name](gradient, context)
        clipped = gradient.norm
        account.measures |= {
            names.grad(name, "norm_raw"): raw,
            names.grad(name, "norm_clipped"): clipped,
            names.grad(name, "clip_coef"): _ratio(clipped, raw, 1.0),
        }
        account.add(name, gradient)

    def _geometry(self, account: "_Account", step: int) -> Measures:
        """Signed shares and pairwise cosines of what the terms contribute."""
        kept, telemetry = list(account.kept.items()), self.config.telemetry
        measures: Measures = {}
        if telemetry.due("shares", step):
            square = account.sum.norm.square()
            products = dots(list(account.kept.values()), account.sum)
            measures = {
                names.grad(name, "share"): _ratio(product, square, 0.0)
                for name, product in zip(account.kept, products, strict=True)
            }
        if telemetry.due("cosines", step):
            for i, (a, first) in enumerate(kept):
                for b, second in kept[i + 1 :]:
                    measures[names.cosine(a, b)] = _ratio(first.dot(second), first.norm * second.norm, 0.0)
        return measures

    def zero(self) -> None:
        """A gradient of zeros in place of the one in ``.grad``: the optimizer's moments still decay."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter)

    # --- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "terms": {name: state for name, chain in self.chains.items() if (state := chain.state())},
            "total": self.total_chain.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; rules that are not there any more (in a changed replay) are left out."""
        for name, values in state["terms"].items():
            if name in self.chains:
                self.chains[name].load(values)
        self.total_chain.load(state["total"])


class _Account:
    """The sum of the terms' gradients as it grows.

    Arguments:
        keep: hold every term's gradient until the end.
        several_wait: more than one term will ask for the others, so what they see must not be added to.
    """

    def __init__(self, keep: bool, several_wait: bool):
        self.keep, self.several_wait = keep, several_wait
        self.sum = Gradient({})
        self.kept: dict[str, Gradient] = {}
        self.measures: Measures = {}
        self._others: Gradient | None = None
        self._empty = True
        self._shown = True  # the sum is also somebody else's, so it is not to be written to

    def others(self, wanted: bool) -> Gradient | None:
        """The sum of the terms that do not wait for others, for one that does."""
        if wanted and self._others is None:
            self._others, self._shown = self.sum, self._shown or self.several_wait
        return self._others if wanted else None

    def add(self, name: str, gradient: Gradient) -> None:
        """Add a term's gradient, which belongs to the account from now on.

        A rank may hold nothing of it; whether the sum's norm is known must not depend on that.
        """
        if self.keep:
            self.kept[name] = gradient
        if self._empty:
            self.sum, self._shown, self._empty = gradient, self.keep, False
        elif not self.sum.tensors:
            self.sum, self._shown = gradient.unmeasured(), self.keep
        elif not gradient.tensors:
            self.sum = self.sum.unmeasured()
        elif self._shown:
            self.sum, self._shown = self.sum.plus(gradient), False
        else:
            self.sum.add_(gradient)


def _last(adds: Sequence[bool]) -> int:
    """Position of the last micro-batch that adds to a gradient; −1 if none does."""
    return max((number for number, added in enumerate(adds) if added), default=-1)


def _ratio(part: Tensor, whole: Tensor, of_nothing: float) -> Tensor:
    """``part / whole``; where there is nothing to divide by, what it is called then. Nan stays nan."""
    return torch.where(whole == 0, of_nothing, part / whole)


def _parts(losses: Mapping[str, TermLoss], owners: Iterable[str], name: str) -> list[Tensor]:
    """The scalars in the owners' losses whose gradient goes by ``name``; none in a micro-batch without their rows."""
    return [losses[owner].parts[name] for owner in owners if owner in losses and name in losses[owner].parts]


def _backward(scalars: Iterable[Tensor], retain_graph: bool = False) -> None:
    found = list(scalars)
    if found:  # a micro-batch may hold rows of branches that no term sees
        torch.stack(found).sum().backward(retain_graph=retain_graph)


def _cotangents(scalars: Sequence[Tensor], outputs: Sequence[Tensor], first: int) -> dict[int, Tensor]:
    """The gradient of the scalars' sum with respect to each forward pass that it depends on, by position from
    ``first``."""
    if not scalars:
        return {}
    found = torch.autograd.grad(list(scalars), list(outputs), retain_graph=True, allow_unused=True)
    # rules write in place, where a broadcast gradient has one element for many
    return {first + i: cotangent.contiguous() for i, cotangent in enumerate(found) if cotangent is not None}


def _detached(losses: Mapping[str, TermLoss]) -> dict[str, TermLoss]:
    """The numbers of a micro-batch's losses without their graphs."""
    return {name: part.detached() for name, part in losses.items()}
