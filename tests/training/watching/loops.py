"""Small training loops with three losses, and the runs that they leave."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.run import layout, runlog
from twinrl.training.watching import Watch

SIZE = 12
Losses = Mapping[str, Tensor]


class Network(nn.Module):
    """(B, 6) → (B, 6); ``spare`` is reached by one loss alone, ``idle`` by none."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.leave = nn.Linear(6, 11), nn.Linear(11, 6)
        self.spare, self.idle = nn.Linear(6, 1), nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.leave(torch.tanh(self.enter(x)))
        return torch.cat([y, self.spare(y)], 1)


def losses(y: Tensor, x: Tensor, fault: float = 1.0) -> dict[str, Tensor]:
    """Means over the samples of a whole batch or a part of it."""
    return {
        "flow": (y[:, :6] - x).square().mean(),
        "adversarial": y[:, :6].abs().mean(),
        "reward": -fault * y[:, 6:].mean(),
    }


def batch(step: int, dtype: torch.dtype = torch.float64, size: int = SIZE) -> Tensor:
    """(B, 6) data of a step."""
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step + 1)).to(dtype)


def flat(module: nn.Module) -> Tensor:
    """All gradients joined, sharded ones whole; zeros where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    wholes = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return torch.cat([g.flatten() for g in wholes])


def plain(network: nn.Module, chunks: Sequence[Tensor], of: Callable[..., Losses] = losses) -> Tensor:
    """The gradient by ``sum(losses).backward()`` over micro-batches."""
    network.zero_grad()
    for x in chunks:
        (sum(of(network(x), x).values()) / len(chunks)).backward()
    found = flat(network)
    network.zero_grad()
    return found


def sgd(network: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=lr)


def follow(
    watch: Watch,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    fault_at: int = -1,
    fault: float = 1e3,
    dtype: torch.dtype = torch.float64,
) -> Iterator[int]:
    """Train; yields each step's number between ``watch.backward`` and ``optimizer.step``."""
    for step in range(steps):
        x = batch(step, dtype)
        watch.backward(losses(network(x), x, fault if step == fault_at else 1.0))
        yield step
        optimizer.step()
        watch.step()


def rows(run: Path) -> list[dict[str, Any]]:
    return list(runlog.rows(run / layout.LOG))


def events(run: Path) -> list[dict[str, Any]]:
    return layout.read_events(run)
