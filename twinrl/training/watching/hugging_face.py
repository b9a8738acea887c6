"""``transformers.Trainer`` with named losses, watched."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twinrl.training.watching.start import watch
from twinrl.training.watching.watcher import Watch


class WatchedTrainer(Trainer):
    """A ``transformers.Trainer`` whose gradient is taken apart by losses. Subclasses give :meth:`compute_losses`.

    Arguments:
        arguments, named: of the trainer.
        run, rules: as for :func:`twinrl.watch`.
        options: further ones of :func:`twinrl.watch`.
    """

    watch: Watch | None = None

    def __init__(
        self,
        *arguments: Any,
        run: "str | PathLike[str]",
        rules: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **named: Any,
    ):
        super().__init__(*arguments, **named)
        self._run, self._rules, self._options = run, rules, dict(options or {})
        self.add_callback(_Steps(self))

    def compute_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Name → scalar loss of a micro-batch; each a mean over its samples. To be overridden.

        Raises:
            NotImplementedError: it was not.
        """
        raise NotImplementedError(f"{type(self).__name__} names no losses; write its compute_losses")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum, for evaluation."""
        total = torch.stack(list(self.compute_losses(model, inputs).values())).sum()
        return (total, None) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch's losses, back-propagated one by one; their sum, detached."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses = self.compute_losses(model, inputs)
        parts = self.current_gradient_accumulation_steps
        losses = {name: loss / parts for name, loss in losses.items()}
        self._watch().backward(losses, last=self.accelerator.sync_gradients)
        return torch.stack([loss.detach() for loss in losses.values()]).sum()

    def _watch(self) -> Watch:
        """Made at the first step, when there is an optimizer."""
        if self.watch is None:
            assert isinstance(self.model, nn.Module)
            assert self.optimizer is not None
            options = {"steps": self.state.max_steps, "scaler": self.accelerator.scaler} | self._options
            self.watch = watch(self.model, self.optimizer, self._run, self._rules, **options)
        return self.watch


class _Steps(TrainerCallback):
    """Logs the steps that the trainer has made."""

    def __init__(self, trainer: WatchedTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.watch is not None:
            self.trainer.watch.step()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.watch is not None:
            self.trainer.watch.close()
