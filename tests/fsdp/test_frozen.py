"""Frozen models in parts: half of the bytes in each of two processes, and to the last bit what a whole one computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fsdp.measures import kept
from tests.fsdp.spawned import spawned
from twinrl.fsdp.config import FSDPConfig
from twinrl.fsdp.sharded import Sharded
from twinrl.machine.visiting import visiting

pytestmark = pytest.mark.processes

WORLD = 2
CPU = torch.device("cpu")


class Scorer(nn.Module):
    """Tied weights, buffers, two dtypes, sizes that nothing divides, and a method beside ``forward``."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
        self.read, self.write = nn.Linear(7, 301, bias=False), nn.Linear(7, 301, bias=False)
        self.write.weight = self.read.weight
        self.coarse = nn.Linear(301, 1, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.arange(5))

    def features(self, images: Tensor) -> Tensor:
        return self.norm(self.first(images)).tanh().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        wide = self.read(self.features(images)) - self.write(images.mean((2, 3)) @ torch.ones(3, 7))
        return self.scale * self.coarse(wide.bfloat16()).float()[:, 0] + self.steps[1]


def scorer() -> Scorer:
    torch.manual_seed(3)
    return Scorer().eval().requires_grad_(False)


def answers(module: Scorer, times: int = 1) -> list[Tensor]:
    """Scores, their gradient in the images, and features."""
    images = torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6).requires_grad_(True)
    for _ in range(times):
        scores = module(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return [scores.detach(), gradient, module.features(images).detach()]


def work() -> dict[str, Any]:
    """What one process of several computes and holds, each way of keeping the module."""
    found: dict[str, Any] = {"whole": answers(scorer()), "whole, bytes": kept(scorer())}
    for frozen in ("replicated", "sharded"):
        module, ranks = scorer(), Sharded(FSDPConfig(frozen=frozen), CPU)
        ranks.keep_frozen([module])
        ranks.keep_frozen([module.to(CPU)])  # it is in use in two places
        with visiting([module], CPU), visiting([module], CPU):
            found[frozen] = answers(module, times=1 + ranks.rank)  # a text tower meets unequally many prompts
            found[f"{frozen}, tied"] = module.read.weight is module.write.weight
        found[f"{frozen}, after"], found[f"{frozen}, bytes"] = answers(module), kept(module)
        with pytest.raises(KeyError), visiting([module], CPU):
            raise KeyError
        with visiting([module], CPU):
            found[f"{frozen}, again"] = answers(module)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(work, WORLD, tmp_path_factory.mktemp("frozen"))


@pytest.mark.slow
def test_parts_compute_what_the_whole_does_and_take_half(found: list[dict[str, Any]]) -> None:
    for rank in found:
        whole = rank["whole, bytes"]
        for way in ("replicated", "sharded", "sharded, again", "replicated, after"):
            assert all(torch.equal(a, b) for a, b in zip(rank[way], rank["whole"], strict=True)), way
        assert rank["sharded, tied"]
        assert rank["replicated, bytes"] == whole
        assert rank["sharded, bytes"] / whole == pytest.approx(1 / WORLD, rel=0.1)


@pytest.mark.slow
def test_a_use_without_gathering_shows(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert all(answer.isnan().all() for answer in rank["sharded, after"])


def test_trained_modules_are_refused() -> None:
    from twinrl.fsdp.frozen import _tensors

    with pytest.raises(ValueError, match="only frozen modules are kept in parts; weight is trained"):
        list(_tensors(nn.Linear(2, 2)))
