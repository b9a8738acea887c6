"""Losses that somebody else's forward pass has given, as the gradient engine wants them; and what may be wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twinrl.config.components import told
from twinrl.config.errors import InputError
from twinrl.gradients.losses import Scalars

GRAPH = "of the forward pass"
SUM = "watch.backward takes the place of sum(losses).backward()"


@dataclass(frozen=True)
class Given:
    """One micro-batch, a :class:`twinrl.gradients.losses.MicroBatch` whose graph is made already.

    Attributes:
        losses: name → 0-dim loss with its graph.
        outputs: predictions between the model and the losses; empty for the parameter space.
        factor: applied to the losses before they are back-propagated, as a GradScaler does.
        per_row: name → (B,) losses of the samples, detached; of those that were given so.
        rows: (B,) whose samples these are; empty where not told.
    """

    losses: Mapping[str, Tensor]
    outputs: Sequence[Tensor] = ()
    factor: Tensor | None = None
    per_row: Mapping[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()

    def begin(self) -> None:
        """The random state is the loop's own affair."""

    def graphs(self, name: str | None = None) -> set[str]:
        return {GRAPH}

    @contextmanager
    def evaluated(self, name: str | None = None, cut: bool = False) -> Iterator[Scalars]:
        found = {key: [self._scaled(loss)] for key, loss in self.losses.items() if name in (None, key)}
        yield Scalars([scalars[0] for scalars in found.values()], found, self.outputs, self._with_graphs)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.factor is None else loss * self.factor.to(loss.device)

    @contextmanager
    def _with_graphs(self) -> Iterator[Sequence[Tensor]]:
        yield self.outputs

    def numbers(self) -> "Given":
        """The same without graphs, for what is logged."""
        return Given({name: loss.detach() for name, loss in self.losses.items()}, (), None, self.per_row, self.rows)


def given(
    losses: Mapping[str, Tensor], outputs: Sequence[Tensor] | None, rows: Any, factor: Tensor | None = None
) -> Given:
    """What a loop gives for one micro-batch.

    Arguments:
        losses: name → scalar; with ``rows`` also (B,) losses of the samples, whose mean counts.
        outputs: predictions, or None.
        rows: (B,) whole numbers, the samples; or None.

    Raises:
        InputError: a loss is no scalar, or has no graph; rows or outputs do not fit.
    """
    if not isinstance(losses, Mapping) or not losses:
        raise InputError("watch.backward takes losses by name", got=told(losses), expected="{name: loss, …}")
    samples = _samples(rows)
    per_row = {name: loss.detach() for name, loss in losses.items() if _is_per_sample(name, loss, samples)}
    scalars = {name: loss.mean() if name in per_row else loss.reshape(()) for name, loss in losses.items()}
    for number, output in enumerate(outputs or ()):
        if not isinstance(output, Tensor) or not output.requires_grad:
            raise InputError(
                f"outputs[{number}] has no graph", got=told(output), expected="what the model has returned"
            )
    return Given(scalars, tuple(outputs or ()), factor, per_row, samples or ())


def _samples(rows: Any) -> tuple[int, ...] | None:
    """The samples' numbers. Raises InputError where they are none."""
    if rows is None:
        return None
    plain = rows.tolist() if isinstance(rows, Tensor) or hasattr(rows, "tolist") else list(rows)
    if not all(type(row) is int and row >= 0 for row in plain):
        raise InputError("rows= takes the samples' numbers", got=f"{plain!r:.60}", expected="whole numbers from 0 on")
    return tuple(plain)


def _is_per_sample(name: str, loss: object, rows: tuple[int, ...] | None) -> bool:
    """Whether a loss is one of each sample. Raises InputError where it is neither that nor a scalar with a graph."""
    if not isinstance(loss, Tensor):
        raise InputError(f"the loss {name!r} is no tensor", got=told(loss), fix="give the loss itself, not its .item()")
    if not loss.requires_grad:
        raise InputError(
            f"the loss {name!r} has no graph", got="a tensor without requires_grad",
            fix="compute it from the model's output, without detach() or no_grad(), or leave it out",
        )  # fmt: skip
    if loss.numel() == 1:
        return loss.ndim == 1 and rows is not None and len(rows) == 1
    if loss.ndim == 1 and rows is not None and len(rows) == len(loss):
        return True
    fix = "take its mean" if rows is None else f"take its mean, or give one for each of the {len(rows)} rows"
    raise InputError(f"the loss {name!r} is no scalar", got=told(loss), expected="a 0-dim tensor", fix=fix)


# --- where losses lead -----------------------------------------------------------------------------------------


def check_outputs(micro: Given, parameters: Sequence[Tensor]) -> None:
    """That the outputs are all that is between the model and its losses; a walk through the graph, made once.

    Raises:
        InputError: a loss depends on none of the outputs, or on the model beside them; an output on another one.
    """
    ends = {output.grad_fn for output in micro.outputs}
    trained = {id(parameter) for parameter in parameters}
    for name, loss in micro.losses.items():
        reached, beside = _walk([loss.grad_fn], ends, trained)
        if not reached and not beside:
            raise InputError(f"the loss {name!r} does not depend on the model", fix=f"leave it out; {SUM}")
        if beside or not reached:
            raise InputError(
                f"the loss {name!r} depends on the model beside the outputs",
                fix="leave outputs= out, then each loss has a backward pass; or give all that losses are made of",
            )
    for number, output in enumerate(micro.outputs):
        inner = [node for node, _ in output.grad_fn.next_functions] if output.grad_fn else []
        if _walk(inner, ends, set())[0]:
            raise InputError(
                f"outputs[{number}] is computed from another one of the outputs",
                fix="leave outputs= out; or give the later one alone, if no loss needs the earlier one",
            )


def _walk(starts: Sequence[Any], ends: set[Any], trained: set[int]) -> tuple[bool, bool]:
    """Whether a walk back through the graph reaches one of the ``ends``, and a trained parameter beside them."""
    waiting, seen, reached, beside = list(starts), set(), False, False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            reached = True
            continue
        beside = beside or id(getattr(node, "variable", None)) in trained
        waiting += [following for following, _ in node.next_functions]
    return reached, beside


def worst_rows(micros: Sequence[Given], term: str | None, everywhere: Callable[[Any], list[Any]]) -> tuple[int, ...]:
    """The samples of a step, those of all processes: with losses of their own, not finite ones alone where there are
    some, else the largest first; without, in the order in which they were given.

    Arguments:
        micros: of the step. term: the loss that stood out; None: all.
        everywhere: gives what every process has of plain values.
    """
    pairs: list[tuple[int, float | None]] = []
    for micro in micros:
        losses = micro.per_row.get(term or "")
        values = [None] * len(micro.rows) if losses is None else losses.double().tolist()
        pairs += zip(micro.rows, values, strict=True)
    found = [pair for part in everywhere(pairs) for pair in part]
    known = [(row, loss) for row, loss in found if loss is not None]
    if not known:
        return tuple(row for row, _ in found)
    losses = torch.tensor([loss for _, loss in known], dtype=torch.double)
    bad = (~losses.isfinite()).nonzero().flatten()
    order = bad if len(bad) else losses.argsort(descending=True, stable=True)
    return tuple(known[at][0] for at in order.tolist())
