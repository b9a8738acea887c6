"""Evaluating without leaving a trace: modes and random streams are as before afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(*networks: object, seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Eval mode, no gradients and a seeded random stream inside; everything restored on leaving.

    Our own draws are keyed and need no stream. This covers networks, judges and scorers of others that draw
    from torch's global generators: their result is repeatable and the training around it does not notice.

    Arguments:
        networks: what is called inside; those that are modules go to eval mode, and every submodule returns
            to the mode *it* had (frozen parts stay in eval mode).
        seed: of the global generators inside.
        device: where the networks run; its generator is kept as well as the CPU's.
    """
    modes = {m: m.training for net in networks if isinstance(net, nn.Module) for m in net.modules()}
    where = torch.device(device)
    with torch.random.fork_rng([where] if where.type == "cuda" else []), torch.no_grad():
        try:
            # not torch.manual_seed, which would also re-seed devices that are not being restored
            torch.default_generator.manual_seed(seed)
            if where.type == "cuda":
                torch.cuda.default_generators[where.index or 0].manual_seed(seed)
            for module in modes:
                module.training = False
            yield
        finally:
            for module, training in modes.items():
                module.training = training
