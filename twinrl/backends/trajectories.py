"""The structural check that a network can follow the real and the fake trajectory apart."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from twinrl.flow import conditions
from twinrl.flow.conditions import Condition
from twinrl.machine.sharding import local


def tells_trajectories_apart(
    network: nn.Module,
    latent_shape: tuple[int, int, int],
    condition: Condition,
    copy: Callable[[nn.Module], nn.Module] = deepcopy,
) -> bool:
    """Whether ``network`` can answer (t, t) and (−t, −t) differently for some values of its parameters.

    A network that sees only |t|, or only t − r, cannot: its Δv is zero for ever and TwinFlow silently does
    nothing. Initial values do not decide it (a sign embedding starts at zero), so the parameters of a copy
    are perturbed at random and its outputs compared.

    Arguments:
        network: ``F(x, t, r, condition)``; left untouched.
        latent_shape: (C, H, W) of x.
        condition: example condition with at least one row.
        copy: makes the copy, for networks that cannot simply be copied.

    *When to use*: once before training with a term that uses t < 0; refuse the network where it is False.
    """
    probe = copy(network).eval()
    first = next(probe.parameters())
    device, dtype = first.device, first.dtype
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x = torch.randn(4, *latent_shape).to(device, dtype)
        _perturb(probe)
        t = torch.tensor([0.2, 0.45, 0.7, 0.95], device=device, dtype=dtype)
        told = conditions.to(
            {name: value[:1].expand(4, *value.shape[1:]) for name, value in condition.items()}, device, dtype
        )
        real, fake = probe(x, t, t, told), probe(x, -t, -t, told)
    return _relative_difference(real, fake) > 1e-4


def _perturb(network: nn.Module) -> None:
    """Add noise to every parameter, large enough to open zero-initialised gates."""
    for parameter in network.parameters():
        values = local(parameter)
        if values.is_floating_point():
            values.add_(0.1 * torch.randn(values.shape).to(values))


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / (a.float().norm() + b.float().norm()))
