"""Two processes, by DDP and by FSDP2: gradients of the sum to 1e-12, norms and rules of the whole batch, one log."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twinrl
from tests.fsdp.spawned import spawned
from tests.training.watching import loops
from tests.training.watching.loops import Network, batch, losses, plain, sgd
from twinrl.run import names

pytestmark = [pytest.mark.slow, pytest.mark.processes]

RANKS = 2
STEPS = 4
MEASURED = {"shares_every": 1, "cosines_every": 1}
RULES = {
    "flow": {"zclip": {"warmup": 2, "z": 0.01}}, "adversarial": {"clip": {"max_norm": 0.02}},
    "reward": {"relative": {"ratio": 0.1}, "project": {}}, "total": {"clip": {"max_norm": 0.5}},
}  # fmt: skip
KINDS = ("ddp", "fsdp")
CASES = [(kind, by_outputs, parts) for kind in KINDS for by_outputs in (False, True) for parts in (1, 2)]


def wrapped(kind: str) -> tuple[nn.Module, nn.Module]:
    """What is called, and the network in it."""
    network = Network()
    if kind == "ddp":
        return DistributedDataParallel(network, find_unused_parameters=True), network
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (network.enter, network.leave, network.spare, network.idle, network):
        fully_shard(module, mesh=mesh)
    return network, network


def trained(
    called: nn.Module, network: nn.Module, run: Path, rules: Any, by_outputs: bool, parts: int, rank: int, world: int
) -> list[Tensor]:
    """The gradients of a few steps of SGD, micro-batch by micro-batch of this process's rows."""
    found, optimizer = [], sgd(network)
    watch = twinrl.watch(called, optimizer, run=run, rules=rules, telemetry=MEASURED)
    for step in range(STEPS):
        rows = torch.arange(loops.SIZE)[rank::world]
        x = batch(step)[rank::world]
        for k, part in enumerate(x.chunk(parts)):
            y = called(part)
            given = {name: loss / parts for name, loss in losses(y, part, 1e3 if step == 3 else 1.0).items()}
            outputs = [y] if by_outputs else None
            watch.backward(given, outputs=outputs, rows=rows.chunk(parts)[k], last=k == parts - 1)
        found.append(loops.flat(network))
        optimizer.step()
        watch.step()
    watch.close()
    return found


def work(folder: Path) -> dict[Any, list[Tensor]]:
    """What one of the processes finds, by case, without rules and with."""
    found = {}
    for case in CASES:
        for rules in (None, RULES):
            called, network = wrapped(case[0])
            run = folder / f"{'-'.join(map(str, case))}-{rules is not None}"
            found[case, rules is not None] = trained(called, network, run, rules, *case[1:], dist.get_rank(), RANKS)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, list[Tensor]]]:
    return spawned(work, RANKS, folder, folder)


@pytest.mark.parametrize("case", CASES)
def test_without_rules_it_is_the_gradient_of_the_sum(ranks: list[dict[Any, list[Tensor]]], case: Any) -> None:
    network, optimizer = Network(), None
    optimizer = sgd(network)
    for step in range(STEPS):
        x = batch(step)
        expected = plain(network, [x], lambda y, x, step=step: losses(y, x, 1e3 if step == 3 else 1.0))
        for rank in ranks:
            scale = float(expected.abs().max())
            torch.testing.assert_close(rank[case, False][step], expected, rtol=1e-12, atol=1e-12 * max(1.0, scale))
        (sum(losses(network(x), x, 1e3 if step == 3 else 1.0).values())).backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_rules_and_measures_are_those_of_one_process(
    ranks: list[dict[Any, list[Tensor]]], case: Any, folder: Path, tmp_path: Path
) -> None:
    network = Network()
    expected = trained(network, network, tmp_path / "one", RULES, case[1], 1, 0, 1)
    for rank in ranks:
        for mine, single in zip(rank[case, True], expected, strict=True):
            torch.testing.assert_close(mine, single, rtol=1e-10, atol=1e-12)
    log = loops.rows(folder / f"{'-'.join(map(str, case))}-True")
    for mine, single in zip(log, loops.rows(tmp_path / "one"), strict=True):
        mine.pop(names.STEP_SECONDS), single.pop(names.STEP_SECONDS)
        assert mine == pytest.approx(single, rel=1e-9, abs=1e-10)
    assert min(row[names.grad("adversarial", "clip_coef")] for row in log) < 1
