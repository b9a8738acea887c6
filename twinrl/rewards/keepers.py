"""Rewards that keep statistics of what they score learn from whole steps of training."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from twinrl.machine.moving import moved
from twinrl.rewards.reward import Reward
from twinrl.run import names


def metric_of(part: str) -> str:
    """Metric of the scores of a part that keeps statistics, before these are applied."""
    return f"{names.REWARD_MEAN}_of_{part}"


def observe(reward: Reward, scored: Iterable[tuple[Tensor, Mapping[str, Tensor]]], captions: Sequence[str]) -> None:
    """Take the scores of a whole step into the statistics of the parts of ``reward`` that keep some.

    *When to use*: once, after the step's passes, in every process with the same arguments.

    Arguments:
        reward: that training follows.
        scored: rows (B,), as positions in the global batch, and ``aux`` of the ascents there, of all micro-batches
            and processes, in any order.
        captions: the prompts of the global batch.
    """
    scored = list(scored)
    for part, keeper in reward.keepers().items():
        metric = metric_of(part)
        here = [(moved(rows, aux[metric].device), aux[metric]) for rows, aux in scored if metric in aux]
        pairs = [torch.stack([rows.double(), scores.double()], 1) for rows, scores in here]
        found = torch.cat(pairs).tolist() if pairs else []
        finite = sorted((int(row), score) for row, score in found if math.isfinite(score))
        if finite:
            scores = torch.tensor([score for _, score in finite], dtype=torch.double)
            keeper.observe(scores, [captions[row] for row, _ in finite])
