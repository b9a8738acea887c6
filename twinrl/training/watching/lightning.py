"""Lightning's automatic optimization, watched by a callback."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from twinrl.config.components import told
from twinrl.config.errors import InputError
from twinrl.training.watching.start import watch
from twinrl.training.watching.watcher import Watch

LOSSES, FURTHER = "losses", ("rows", "outputs")
"""Keys of what ``training_step`` returns: name → loss, and what else ``watch.backward`` takes."""


class WatchCallback(Callback):
    """Back-propagates the named losses that ``training_step`` returns as ``{"loss": …, "losses": {name: loss}}``.

    ``loss`` is their sum, which Lightning itself wants; ``rows`` and ``outputs`` may be beside it.

    *When to use*: in automatic optimization. In manual optimization the module calls ``watch.backward`` and
    ``watch.step`` itself.

    Arguments:
        run, rules, options: as for :func:`twinrl.watch`.
    """

    watch: Watch

    def __init__(self, run: "str | PathLike[str]", rules: Mapping[str, Any] | None = None, **options: Any):
        self.run, self.rules, self.options = run, rules, options
        self._losses: Mapping[str, Tensor] = {}
        self._further: dict[str, Any] = {}
        self._last = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the watch, and take the place of the module's ``backward``."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise InputError(
                "WatchCallback is for automatic optimization with one optimizer",
                got=f"{len(trainer.optimizers)} optimizers", fix="call watch.backward and watch.step in training_step",
            )  # fmt: skip
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.watch = watch(pl_module, trainer.optimizers[0], self.run, self.rules, scaler=scaler, **self.options)
        wanted = pl_module.training_step

        def training_step(*arguments: Any, **named: Any) -> Mapping[str, Any]:
            return self._remember(wanted(*arguments, **named))

        vars(pl_module).update(training_step=training_step, backward=self._backward)

    def _remember(self, output: Any) -> Mapping[str, Any]:
        """Keep the named losses for the backward; the rest is Lightning's."""
        if not isinstance(output, Mapping) or not isinstance(output.get(LOSSES), Mapping):
            raise InputError(
                "training_step returns no named losses", got=told(output),
                expected='{"loss": the sum, "losses": {name: loss}}',
            )  # fmt: skip
        self._losses, self._further = output[LOSSES], {key: output[key] for key in FURTHER if key in output}
        return {key: value for key, value in output.items() if key not in (LOSSES, *FURTHER)}

    def _backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        losses = {name: part / self._micro_batches for name, part in self._losses.items()}
        further, self._losses, self._further = self._further, {}, {}
        self.watch.backward(losses, last=self._last, **further)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whether the step is made after this batch."""
        self._micro_batches = trainer.accumulate_grad_batches
        self._last = (batch_idx + 1) % self._micro_batches == 0 or trainer.is_last_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step."""
        if self._last:
            self.watch.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is finished; the module is as it was."""
        for name in ("training_step", "backward"):
            vars(pl_module).pop(name, None)
        self.watch.close()
