"""Two ranks with sharded parameters and half of every branch's rows each give the single process's numbers.

Losses are divided by the rows of the *global* batch, so gradients are summed over the ranks, not averaged. One spawn
computes every case; the tests compare.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.fsdp.spawned import spawned
from tests.gradients.steps import BATCH, Perceptron, Step, step_of
from twinrl.flow.branches import Batch
from twinrl.gradients import telemetry
from twinrl.gradients.gradient import over_ranks
from twinrl.run import names
from twinrl.training.optim import update

pytestmark = [pytest.mark.slow, pytest.mark.processes]

RANKS = 2
STEPS = 3  # past ZClip's warm-up, which then clips
ALL = "gradients.telemetry={shares_every: 1, cosines_every: 1}"
CHAINS = (
    ALL, "gradients.terms.base={zclip: {warmup: 2, z: 0.01}}", "gradients.terms.adversarial={clip: {max_norm: 0.05}}",
    "gradients.terms.rectify={relative: {ratio: 0.3}, project: {}}",
    "gradients.total={zclip: {warmup: 2, z: 0.01}, clip: {max_norm: 0.5}}",
)  # fmt: skip
TUTORIAL = (
    ALL, "gradients.each={clip: {max_norm: 0.1}}", "gradients.terms.real_velocity={project: {}}",
    "gradients.terms.adversarial={relative: {ratio: 0.2}}",
)  # fmt: skip
AGC = ALL, "gradients.each.agc={ratio: 0.02}", "gradients.total={agc: {ratio: 0.01}, clip: {max_norm: 0.5}}"
OUTPUT = "gradients.space=output"
UNEQUAL = (
    "branches={mul: 1, any: 3}", "terms.base.branches=[any]",
    "terms.other={kind: real_velocity, point: own, branches: [mul]}", ALL, "gradients.terms.other.relative.ratio=0.1",
)  # fmt: skip

CASES: dict[str, tuple[str, tuple[str, ...], int]] = {  # preset, overrides, rows of a rank's micro-batch
    "twinflow, parameter": ("twinflow", CHAINS, BATCH),
    "twinflow, output": ("twinflow", (*CHAINS, OUTPUT), BATCH),
    "micro-batches, output": ("tutorial", (*TUTORIAL, OUTPUT), 3),
    "agc": ("lab", AGC, BATCH),
    "a rank without rows of a term": ("flow_matching", (*UNEQUAL, OUTPUT), BATCH),
}


def summed(value: Tensor) -> Tensor:
    """The sum over the ranks, as the engine wants it for output space."""
    value = value.clone()
    dist.all_reduce(value)
    return value


def of_rank(batch: Batch, rank: int, unequal: bool) -> Batch:
    """Half of every branch's rows; or all of ``mul`` and less of ``any`` for rank 0."""
    if unequal:
        half = len(batch.rows) // RANKS
        mine = {name: at[(at // half) == rank] for name, at in batch.branch.items()}
    else:
        mine = {name: at.chunk(RANKS)[rank] for name, at in batch.branch.items()}
    keep = torch.cat(list(mine.values())).sort().values
    return Batch(batch.rows.select(keep), {name: torch.searchsorted(keep, at) for name, at in mine.items()})


def shard(step: Step) -> None:
    """Shard the student in place, layer by layer; 13 hidden units divide unequally."""
    mesh, student = init_device_mesh("cpu", (RANKS,)), step.student
    for module in (student.enter, student.leave, student):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def case(name: str) -> Step:
    preset, overrides, micro = CASES[name]
    return step_of(preset, *overrides, student=Perceptron(), micro=micro)


def numbers(step: Step, total: Any = lambda value: value) -> dict[str, Any]:
    """Gradients, measures and telemetry of a few steps of Adam on data that grow, so that ZClip has work."""
    engine = step.engine(total)
    optimizer = torch.optim.AdamW(step.student.parameters(), fused=True)
    found: dict[str, Any] = {"measures": [], "gradients": []}
    for at in range(STEPS):
        measures = engine.backward(step.apart(), at)
        found["gradients"].append([whole(p.grad) for p in engine.parameters if p.grad is not None])
        measures[names.RMS_MAX] = telemetry.largest(list(telemetry.rms(optimizer).values()))
        measures |= update(optimizer, 1e-3, engine.parameters, measure=True)
        found["measures"].append({key: float(value) for key, value in measures.items()})
        step.batch.rows.x.mul_(1.5)
    found["state"] = engine.state()
    return found


def broken(step: Step, rank: int, total: Any) -> dict[str, float]:
    """Norms where only the last rank has a nan, in one of its real rows."""
    if rank == RANKS - 1:
        step.batch.rows.x[step.batch.branch["mul"][0]] = torch.nan
    engine = step.engine(total)
    measures = engine.backward(step.apart())
    return {key: float(value) for key, value in measures.items()}


def work() -> dict[str, Any]:
    """What one of the ranks finds, by case."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    for name in CASES:
        step = case(name)
        step.batch = of_rank(step.batch, rank, name.startswith("a rank"))
        shard(step)
        found[name] = numbers(step, summed)
        assert all(isinstance(p, DTensor) for p in step.student.parameters())
    for space in ("parameter", "output"):
        step = step_of("lab", ALL, f"gradients.space={space}", "gradients.each.clip.max_norm=0.1", student=Perceptron())
        step.batch = copy.deepcopy(of_rank(step.batch, rank, unequal=False))
        shard(step)
        found[f"broken, {space}"] = broken(step, rank, summed)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    return spawned(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(ranks: list[dict[str, Any]], name: str) -> None:
    expected = numbers(case(name))
    for found in (rank[name] for rank in ranks):
        for a, b in zip(found["gradients"], expected["gradients"], strict=True):
            for mine, single in zip(a, b, strict=True):
                torch.testing.assert_close(mine, single, rtol=1e-9, atol=1e-10)
        for mine, single in zip(found["measures"], expected["measures"], strict=True):
            assert mine == pytest.approx(single, rel=1e-9, abs=1e-10)
        assert flattened(found["state"]) == pytest.approx(flattened(expected["state"]), rel=1e-9)
    assert ranks[0][name]["measures"] == ranks[1][name]["measures"]  # to the last bit: decisions must agree
    assert ranks[0][name]["state"] == ranks[1][name]["state"]


def flattened(state: Any, at: str = "") -> dict[str, float]:
    if not isinstance(state, dict):
        return {at: state}
    return {key: value for name, part in state.items() for key, value in flattened(part, f"{at}/{name}").items()}


def test_the_rules_had_something_to_do(ranks: list[dict[str, Any]]) -> None:
    last = ranks[0]["twinflow, parameter"]["measures"][-1]
    for term in ("base", "adversarial", "rectify"):
        assert last[names.grad(term, "clip_coef")] < 1
    assert last[names.GRAD_TOTAL_CLIPPED] < last[names.GRAD_TOTAL_RAW]


@pytest.mark.parametrize("space", ["parameter", "output"])
def test_one_ranks_nan_is_seen_by_all(ranks: list[dict[str, Any]], space: str) -> None:
    """In the norms of the term that has the row, which both ranks then record; the other terms stay sound."""
    for found in (rank[f"broken, {space}"] for rank in ranks):
        assert found[names.grad("base", "norm_raw")] != found[names.grad("base", "norm_raw")]
        assert found[names.GRAD_TOTAL_RAW] != found[names.GRAD_TOTAL_RAW]
        for term in ("adversarial", "rectify"):
            assert found[names.grad(term, "norm_raw")] > 0
            assert found[names.grad(term, "norm_clipped")] == pytest.approx(0.1)


def test_ranks_divide_the_batch() -> None:
    step = case("twinflow, output")
    parts = [of_rank(step.batch, rank, unequal=False) for rank in range(RANKS)]
    assert torch.cat([part.rows.index for part in parts]).sort().values.tolist() == list(range(BATCH))
    assert all(len(part.branch[name]) == 2 for part in parts for name in step.batch.branch)
    assert over_ranks(torch.tensor(1.0)) == 1
