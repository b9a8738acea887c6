"""The gradient of a step, term by term.

Terms outermost, micro-batches inside; every gradient is taken by ``backward`` into ``.grad``, which works for sharded
parameters too (gradients taken with respect to parameters directly do not). Two spaces:

- *parameter*: each term is back-propagated alone, its gradient measured and changed exactly, and added up. Forward
  passes serve one set of terms each, so rows that one term sees are back-propagated once, and only rows that
  several terms share are repeated. With micro-batches a term's forwards are repeated for each term that shares
  them, since graphs of all micro-batches would not fit.
- *output*: the rules see each term's gradient with respect to the predictions (its cotangent), and one backward
  carries the sum. With micro-batches the predictions are made twice: norms need the whole batch.

Buffers of the size of a gradient, beside ``.grad``: one for rules in parameter space, none in output space; on steps
with shares or cosines in parameter space one per term, of a GPU in the host's memory; one more where several terms
are projected.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.gradients import losses
from twinrl.gradients.chain import Chain, GradientsConfig
from twinrl.gradients.gradient import Gradient, dots
from twinrl.gradients.losses import Backward, MicroBatch, Scalars, in_own_memory
from twinrl.gradients.transforms import RuleContext
from twinrl.run import names

Measures = dict[str, Tensor]


class Engine:
    """Puts the gradient of the losses' sum into ``.grad`` and measures the losses one by one on the way.

    Arguments:
        config: space, rules, telemetry.
        parameters: the trainable parameters.
        terms: names of the losses whose gradients are taken apart.
        total: sums a 0-dim tensor over the ranks that hold other rows; for the output space.
        reduce: told, where there are micro-batches, before each one's backward whether the gradient that has piled
            up is summed over the ranks after it: it is after the last one of a term.
        steps: length of the run. renoise_end: step at which renoise stands still; both for scheduled rules.
        back: back-propagates into ``.grad``.
        by_pass: go back through one forward pass at a time. A loss that depends on several otherwise has autograd hold
            every weight's gradient until all passes have given their part, whole where the weights are sharded.
    """

    def __init__(
        self,
        config: GradientsConfig,
        parameters: Iterable[nn.Parameter],
        terms: Iterable[str],
        total: Callable[[Tensor], Tensor] = lambda value: value,
        reduce: Callable[[bool], None] = lambda last: None,
        steps: int = 1,
        renoise_end: Fraction | None = None,
        back: Backward = losses.backward,
        by_pass: bool = False,
    ):
        self.config, self.total, self.reduce, self.back, self.by_pass = config, total, reduce, back, by_pass
        self.steps, self.renoise_end = steps, renoise_end
        self.parameters = [p for p in parameters if p.requires_grad]
        self.terms = sorted(terms, key=config.needs_others)  # stable: those that wait for the others come last
        self.chains = {name: Chain(config.rules(name)) for name in self.terms}
        self.total_chain = Chain(config.total)

    def backward(self, batches: Sequence[MicroBatch], step: int = 0) -> Measures:
        """The changed gradient into ``.grad``; the measures by metric name.

        Arguments:
            batches: the micro-batches of the step.
            step: decides which periodic measures are due.
        """
        for parameter in self.parameters:
            parameter.grad = None
        for one in batches:
            one.begin()
        space = {"parameter": self._in_parameter_space, "output": self._in_output_space, "none": self._together}
        return space[self.config.space](batches, step)

    def _finish(self, step: int, gradient: Gradient | None = None) -> Measures:
        """Apply the rules of the sum, which lies in ``.grad`` unless it is given, and leave it there."""
        gradient = Gradient.take(self.parameters) if gradient is None else gradient
        raw = gradient.norm
        self.total_chain(gradient, RuleContext(self.parameters, None, step, self.steps, self.renoise_end))
        gradient.put(self.parameters)
        return {names.GRAD_TOTAL_RAW: raw, names.GRAD_TOTAL_CLIPPED: gradient.norm}

    # --- none ---------------------------------------------------------------------------------------------------

    def _together(self, batches: Sequence[MicroBatch], step: int) -> Measures:
        last = _last([bool(one.graphs()) for one in batches])
        for number, one in enumerate(batches):
            self._announce(batches, number == last)
            with one.evaluated() as found:
                self._back(None, found.total, found.outputs)
        return self._finish(step)

    # --- parameter space ----------------------------------------------------------------------------------------

    def _in_parameter_space(self, batches: Sequence[MicroBatch], step: int) -> Measures:
        account = _Account(self._keeps(step), self._several_need_others, aside=True)
        back = self._at_once if len(batches) == 1 else self._in_turn
        back(batches, lambda name: self._settle(
            name, Gradient.take(self.parameters), account, self.parameters, step
        ))  # fmt: skip
        measures = account.measures | self._geometry(account, step)
        return measures | self._finish(step, account.sum)

    def _at_once(self, batches: Sequence[MicroBatch], settle: Callable[[str], None]) -> None:
        """Back through the one micro-batch's graphs, loss by loss; each is settled with its gradient in ``.grad``."""
        (one,) = batches
        with one.evaluated() as found:
            goes_through = {name: one.graphs(name) if _of(found, name) else set() for name in self.terms}
            for name in self.terms:
                graphs = goes_through.pop(name)  # which are freed unless a later loss needs them
                again = any(graphs & later for later in goes_through.values())
                self._back(name, _of(found, name), found.outputs, again)
                settle(name)

    def _in_turn(self, batches: Sequence[MicroBatch], settle: Callable[[str], None]) -> None:
        """Forward and back through every micro-batch for each loss."""
        for name in self.terms:
            last = _last([bool(one.graphs(name)) for one in batches])
            for number, one in enumerate(batches):
                self._announce(batches, number == last)
                with one.evaluated(name) as found:
                    self._back(name, _of(found, name), found.outputs)
            settle(name)

    # --- output space -------------------------------------------------------------------------------------------

    def _in_output_space(self, batches: Sequence[MicroBatch], step: int) -> Measures:
        cotangents: dict[str, dict[int, Tensor]] = {name: {} for name in self.terms}
        first, account = [0], _Account(self._keeps(step), self._several_need_others)
        graphs: list[Callable[[], AbstractContextManager[Sequence[Tensor]]]] = []
        with ExitStack() as kept:
            for one in batches:
                found = kept.enter_context(one.evaluated(cut=len(batches) > 1))
                for name in self.terms:
                    cotangents[name] |= _cotangents(_of(found, name), found.outputs, first[-1])
                first.append(first[-1] + len(found.outputs))
                graphs.append(found.with_graphs)
            for name, found_cotangents in cotangents.items():
                gradient = Gradient(found_cotangents, self.total, self.parameters[0].device)
                self._settle(name, gradient, account, (), step)
            for (start, end), with_graphs in zip(pairwise(first), graphs, strict=True):
                self._announce(batches, end > max(account.sum.tensors, default=0) >= start)
                with with_graphs() as outputs:
                    pulled = {i: F for i, F in enumerate(outputs, start) if i in account.sum.tensors}
                    self._pull(None, pulled, account.sum.tensors, False)
        return account.measures | self._geometry(account, step) | self._finish(step)

    # --- what they share ----------------------------------------------------------------------------------------

    def _back(
        self, name: str | None, scalars: Sequence[Tensor], outputs: Sequence[Tensor], retain_graph: bool = False
    ) -> None:
        if not scalars:  # a micro-batch may hold rows that no loss sees
            return
        if self.by_pass:
            self._pull(name, dict(enumerate(outputs)), _cotangents(scalars, outputs, 0), retain_graph)
        else:
            self.back(name, [torch.stack(list(scalars)).sum()], None, retain_graph)

    def _pull(
        self, name: str | None, outputs: Mapping[int, Tensor], cotangents: Mapping[int, Tensor], retain_graph: bool
    ) -> None:
        """Back from the outputs that have a cotangent, by position: the last pass first, as autograd goes."""
        places = sorted(cotangents.keys() & outputs.keys())
        for group in [[place] for place in reversed(places)] if self.by_pass else [places]:
            self.back(name, [outputs[i] for i in group], [cotangents[i] for i in group], retain_graph)

    def _announce(self, batches: Sequence[MicroBatch], last: bool) -> None:
        if len(batches) > 1:
            self.reduce(last)

    @property
    def _several_need_others(self) -> bool:
        return sum(self.config.needs_others(name) for name in self.terms) > 1

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
        terms, telemetry, whole = list(account.kept), self.config.telemetry, len(account.kept)
        shares = [(i, whole) for i in range(whole)] if telemetry.due("shares", step) else []
        pairs = list(combinations(range(whole), 2)) if telemetry.due("cosines", step) else []
        parts = [*account.kept.values(), account.sum]
        measures: Measures = {}
        for (a, b), product in zip([*shares, *pairs], dots(parts, [*shares, *pairs], account.sum), strict=True):
            name = names.grad(terms[a], "share") if b == whole else names.cosine(terms[a], terms[b])
            size = account.sum.norm.square() if b == whole else parts[a].norm * parts[b].norm
            measures[name] = _ratio(product, size, 0.0)
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
        aside: hold them where they take none of a GPU's memory.
    """

    def __init__(self, keep: bool, several_wait: bool, aside: bool = False):
        self.keep, self.several_wait, self.aside = keep, several_wait, aside
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
        kept = gradient.aside() if self.keep and self.aside else gradient
        shown = self.keep and kept is gradient
        if self.keep:
            self.kept[name] = kept
        if self._empty:
            self.sum, self._shown, self._empty = gradient, shown, False
        elif not self.sum.tensors:
            self.sum, self._shown = gradient.unmeasured(), shown
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
    return (part / whole).masked_fill(whole == 0, of_nothing)


def _of(found: Scalars, name: str) -> Sequence[Tensor]:
    """The scalars whose gradient goes by ``name``; none in a micro-batch without them."""
    return found.named.get(name, ())


def _cotangents(scalars: Sequence[Tensor], outputs: Sequence[Tensor], first: int) -> dict[int, Tensor]:
    """The gradient of the scalars' sum with respect to each forward pass that it depends on, by position from
    ``first``."""
    if not scalars:
        return {}
    found = torch.autograd.grad(list(scalars), list(outputs), retain_graph=True, allow_unused=True)
    return {first + i: cotangent for i, cotangent in in_own_memory(found).items()}  # rules write in place
