"""``twinrl.watch``: from a model, an optimizer and a folder to a :class:`twinrl.training.watching.watcher.Watch`."""

import weakref
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twinrl.config import validate
from twinrl.config.components import told
from twinrl.config.errors import InputError
from twinrl.stability.events import Event
from twinrl.training.watching import config as configs
from twinrl.training.watching import processes
from twinrl.training.watching.book import Book
from twinrl.training.watching.config import WatchConfig
from twinrl.training.watching.watcher import Watch


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: "str | PathLike[str]",
    rules: Mapping[str, Any] | None = None,
    *,
    stability: Mapping[str, Any] | None = None,
    telemetry: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    steps: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    on_rollback: Callable[[Event], None] | None = None,
    fresh: bool = False,
    resume: bool = False,
) -> Watch:
    """Watch a training loop: a run directory for ``twinrl analyze``, ``twinrl ui`` and the notebooks.

    Arguments:
        model: whose trainable parameters get the gradient; DDP's and FSDP2's, too.
        optimizer: that moves them.
        run: the run directory; runs of one arm may be called ``<arm>-s<seed>``.
        rules: loss → chain of rules, such as ``{"reward": {"relative": {"ratio": 0.1}}}``; ``each``: of every loss
            without rules of its own; ``total``: of the sum.
        stability: thresholds and policies, as in a configuration; where nothing is said, what happens is recorded.
        telemetry: how often shares, cosines, RMS and updates are measured, as in ``gradients.telemetry``.
        settings: what the loop tells of itself; reports over several runs compare by it. Plain values.
        seed: tells repetitions apart; None: torch's own.
        steps: how many the loop will make, where it knows; scheduled rules need it.
        scaler: the loop's GradScaler; losses are given without its factor.
        on_rollback: returns the loop to its last checkpoint and the watch with it (:meth:`Watch.load_state_dict`).
        fresh: an older run there goes. resume: it goes on, from :meth:`Watch.load_state_dict`.

    Raises:
        InputError: nothing to train, a rule or a key that is not known, or a run that exists.
    """
    parameters = _trained(model, optimizer)
    ranks = processes.processes_of(model, parameters)
    period = 1 if telemetry is None else int(telemetry.get("rms_every", 1))
    policies = configs.stability_of(stability or {}, period)
    if policies.rolls_back and on_rollback is None:
        raise InputError("a policy is rollback, which needs on_rollback=", fix="give what returns to your checkpoint")
    path = Path(run)
    config = validate(WatchConfig, {
        "name": path.resolve().name.removesuffix(f"-s{seed}"), "seed": torch.initial_seed() if seed is None else seed,
        "watched": configs.described(model, _innermost(optimizer), sum(p.numel() for p in parameters)),
        "settings": dict(settings or {}), "train": {} if steps is None else {"steps": steps},
        "gradients": configs.gradients_of(rules or {}, telemetry or {}, steps).model_dump(),
        "stability": policies.model_dump(),
    })  # fmt: skip
    book = Book(path, ranks.first, fresh, resume)
    ranks.on_first(book.take)
    _keep_buffers(model)
    made = Watch(model, _innermost(optimizer), config, book, parameters, ranks, scaler, on_rollback)
    weakref.finalize(made, book.close_at_exit)
    return made


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that others (of Accelerate, Lightning) are wrapped around. Raises InputError."""
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer):
        raise InputError("twinrl.watch takes one torch optimizer", got=told(optimizer))
    return found


def _trained(model: nn.Module, optimizer: Any) -> list[nn.Parameter]:
    """What gets a gradient: the model's trainable parameters, and others that the optimizer moves."""
    if not isinstance(model, nn.Module):
        raise InputError("twinrl.watch takes a torch module", got=told(model))
    moved = [p for group in _innermost(optimizer).param_groups for p in group["params"]]
    found = {id(p): p for p in (*model.parameters(), *moved) if p.requires_grad}
    if not found:
        raise InputError("the model has no trainable parameters", fix="requires_grad_(True) where it is to learn")
    return list(found.values())


def _keep_buffers(model: nn.Module) -> None:
    """Let compiled backward passes be repeated, which takes one for each loss."""
    compiled = (m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None)
    if next(compiled, None) is not None:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
