"""How a training step reads its rows: the seam between a batch and where its data lie.

A *reader* belongs to one split. Its batches may differ in size and shape from step to step (aspect buckets: one bucket
a batch), so everything is asked for the rows at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.flow import conditions, draws
from twinrl.flow.conditions import Condition
from twinrl.flow.source import Source, Split, captions_of
from twinrl.machine.moving import rows_of

ALL = slice(None)


class Reader(Protocol):
    """Rows of one split, on the device; latents in the dtype of training."""

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        """(B,) row numbers of the global batch of ``step``, on the CPU, all of one shape; B is ``batch`` on average."""
        ...

    def sizes(self, batch: int) -> Sequence[int]:
        """Every B that :meth:`rows` can give."""
        ...

    def shape(self, at: Tensor) -> tuple[int, int, int]:
        """(C, h, w) of the rows' latents."""
        ...

    def latents(self, at: Tensor) -> Tensor:
        """(B, C, h, w) latents of the rows; zeros where the data are prompts alone."""
        ...

    def captioned(self, at: Tensor, seed: int, step: int, of: Tensor | slice = ALL) -> tuple[list[str], Condition]:
        """The captions of all B rows, and the conditions of those at the positions ``of``."""
        ...

    def null(self, n: int) -> Condition:
        """The empty condition ∅, n rows, padded as :meth:`captioned`'s."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A split whose latents are all on the device; captions that images lack are drawn for every step.

    Attributes:
        source: the data.
        split: its labels.
        data: (N, C, h, w) latents of the rows that are read, the split's first.
    """

    source: Source
    split: Split
    data: Tensor

    @classmethod
    def of(
        cls, source: Source, split: str, device: torch.device, dtype: torch.dtype, rows: int | None = None
    ) -> "InMemory":
        """The split called ``split``, or its first ``rows`` rows.

        Raises:
            InputError: it has fewer.
        """
        here: Split = getattr(source, split)
        latents = source.latents(split)
        if rows is not None and rows > len(latents):
            raise InputError(
                "data.rows is larger than the data",
                got=rows,
                expected=f"at most {len(latents)}, the {split} images of {source.name}",
            )
        return cls(source, here, latents[:rows].to(device, dtype))

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        return draws.shuffled_rows(len(self.data), batch, seed, step)

    def sizes(self, batch: int) -> Sequence[int]:
        return (batch,)

    def shape(self, at: Tensor) -> tuple[int, int, int]:
        return (self.data.shape[1], self.data.shape[2], self.data.shape[3])

    def latents(self, at: Tensor) -> Tensor:
        return rows_of(self.data, at)

    def captioned(self, at: Tensor, seed: int, step: int, of: Tensor | slice = ALL) -> tuple[list[str], Condition]:
        prompts = captions_of(self.source, self.split, at, seed, step)
        return prompts, conditions.rows(self._cast(self.source.condition(prompts)), of)

    def null(self, n: int) -> Condition:
        return self._cast(self.source.null_condition(n))

    def _cast(self, c: Condition) -> Condition:
        return conditions.to(c, self.data.device, self.data.dtype)
