"""The reference network and the values of ``golden/reference_values.npz``, for the tests that use them.

The values were computed in float64 by public TwinFlow, TwinFlow-Qwen and SimpleTuner code on small
closed-form networks. Keys are ``regime/case/name``; regime ``big`` is at unit scale, ``small`` has x and
noises × 1e-3.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twinrl.flow.conditions import Condition

PATH = Path(__file__).parent / "golden" / "reference_values.npz"


class ReferenceNetwork(nn.Module):
    """``F = out·(h·oᵀ) + 0.3·x`` with ``h = tanh((x/out)·aᵀ + f·bᵀ + c·wᵀ)`` on flattened x.

    The time features are ``f = [t, r, t − r, sin 3t, cos 2r, sign t]``, so the network tells (t, t) from
    (−t, −t). Parameters a (16, 18), b (16, 6), w (16, 3), o (18, 16) in that order, float64; ``out`` is the
    scale of the data.
    """

    def __init__(self, a: Tensor, b: Tensor, w: Tensor, o: Tensor, out: float):
        super().__init__()
        self.a, self.b, self.w, self.o = (nn.Parameter(p.double().clone()) for p in (a, b, w, o))
        self.out = out

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """x (B, 2, 3, 3), signed times t, r (B,), condition ``{"c": (B, 3)}`` → F (B, 2, 3, 3)."""
        flat = x.flatten(1)
        features = torch.stack([t, r, t - r, torch.sin(3 * t), torch.cos(2 * r), torch.sign(t)], dim=1)
        hidden = flat / self.out @ self.a.T + features @ self.b.T + condition["c"] @ self.w.T
        return (self.out * (torch.tanh(hidden) @ self.o.T) + 0.3 * flat).view_as(x)


@cache
def _values() -> dict[str, np.ndarray]:
    with np.load(PATH) as archive:
        return {key: archive[key] for key in archive.files}


def case(name: str, regime: str = "big") -> dict[str, Tensor]:
    """All values of one case, e.g. ``case("sample_few_2")["z"]``; fresh tensors at every call."""
    prefix = f"{regime}/{name}/"
    known = {key.removeprefix(prefix): value for key, value in _values().items() if key.startswith(prefix)}
    if not known:
        raise KeyError(f"no case {prefix}; known: {', '.join(cases(regime))}")
    return {key: torch.tensor(value) for key, value in known.items()}


def cases(regime: str = "big", prefix: str = "") -> list[str]:
    """The names of the cases of a regime (networks included) that start with ``prefix``."""
    names = {key.split("/")[1] for key in _values() if key.startswith(f"{regime}/")}
    return sorted(name for name in names if name.startswith(prefix))


def network(name: str, regime: str = "big") -> ReferenceNetwork:
    """``net_student``, ``net_teacher`` or (``big`` only) ``net_sampler``, freshly built."""
    arrays = case(name, regime)
    return ReferenceNetwork(*(arrays[key] for key in "abwo"), out=float(arrays["out"]))


def flat_gradient(model: ReferenceNetwork) -> Tensor:
    """The gradients of a, b, w, o, flattened and joined in that order, as the stored ``grad`` are."""
    parameters = [model.a, model.b, model.w, model.o]
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the largest absolute expected value."""
    return float((value.double() - expected).abs().max() / expected.abs().max())
