"""Which rows a training step sees: one bucket a step, a pure function of (seed, step).

Bucket b has n_b rows and batches of m_b. Its rows come in keyed permutations joined end to end, as in
``draws.shuffled_rows``: no row repeats before every row of the bucket was seen. Epoch e (from 0) has

    k_b(e) = ⌊(e+1)·n_b/m_b⌋ − ⌊e·n_b/m_b⌋

batches of bucket b, in an order drawn for the epoch. So after e epochs bucket b has shown its rows e times but for
less than one batch: buckets are visited in proportion to their rows and small ones are not worn out, all batches
are full, and with m_b dividing n_b an epoch is exactly one pass. Nothing is carried from step to step: a run
resumes anywhere, and ranks take their slices of one global batch, however many there are.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.flow import draws


class BucketBatch(NamedTuple):
    """The global batch of a step.

    Attributes:
        bucket: name of the bucket that all rows are of.
        rows: (B,) row numbers of the data set, int64 on the CPU.
    """

    bucket: str
    rows: Tensor


class BucketSampler:
    """Batches of one bucket each.

    Arguments:
        members: bucket → (n,) row numbers of the data set, in any order of buckets; empty ones are left out.
        batch: bucket → rows of its batches, see ``Bucket.batch_rows``.
        seed: the run's.

    Raises:
        InputError: no bucket has rows.

    *When to use*: whenever samples differ in shape. With one bucket it gives the batches that
    ``draws.shuffled_rows`` gives, under another key.
    """

    def __init__(self, members: Mapping[str, Tensor], batch: Mapping[str, int], seed: int):
        self.members = {name: members[name] for name in sorted(members) if len(members[name])}
        if not self.members:
            raise InputError("no bucket has an image to train on", fix="see report.jsonl beside the prepared data")
        self.batch_size = {name: batch[name] for name in self.members}
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def batch(self, step: int) -> BucketBatch:
        """The global batch of training step ``step`` (from 0)."""
        epoch = self.epoch(step)
        order = self._order(epoch)
        position = step - self.steps_before(epoch)
        index = int(order[position])
        name = list(self.members)[index]
        earlier = self._batches_before(name, epoch) + int((order[:position] == index).sum())
        size, members = self.batch_size[name], self.members[name]
        at = draws.shuffled_rows(len(members), size, self.seed, earlier, f"data order {name}")
        return BucketBatch(name, members[at])

    def epoch(self, step: int) -> int:
        """The epoch of a step: the e with steps_before(e) ≤ step < steps_before(e + 1)."""
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def steps_before(self, epoch: int) -> int:
        """Steps in the first ``epoch`` epochs."""
        return sum(self._batches_before(name, epoch) for name in self.members)

    def _batches_before(self, name: str, epoch: int) -> int:
        return epoch * len(self.members[name]) // self.batch_size[name]

    def _draw_order(self, epoch: int) -> Tensor:
        """(steps of the epoch,) the bucket of each step, by position in ``members``."""
        counts = [self._batches_before(n, epoch + 1) - self._batches_before(n, epoch) for n in self.members]
        slots = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return slots[torch.randperm(len(slots), generator=draws.generator(self.seed, "bucket order", epoch))]
