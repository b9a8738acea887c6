"""Several processes give the run of one: numbers, events, checkpoints; and each holds its share alone.

One spawn of two processes and a short one of four, for copies of shards, run all cases; the tests compare with runs in
this process.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.fake_source import SMALL, FakeSource
from tests.fsdp import cases, measures
from tests.fsdp.cases import CASES, ELASTIC, HYBRID, QUICK, STEPS, Case, folder_of, ranks_of, rows, run, trainer_of
from tests.fsdp.spawned import spawned
from tests.rounding import bound
from twinrl.commands.simulate import Simulator
from twinrl.config.errors import InputError
from twinrl.fsdp import agreement
from twinrl.fsdp.ranks import Ranks
from twinrl.run import checkpoints, layout, names
from twinrl.training import assembly
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Outcome, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.usefixtures("known")]

MIDDLE = STEPS // 2
DELTA = 0.01
"""First step of the recursion: what the base term divides by."""
RANDOM = Case("tutorial", ("model.network={kind: mlp, width: 64, depth: 4, condition_width: 64}",))
"""Starts from random weights."""
COUNTED = {
    "whole": (),
    "last block freed": ("fsdp.reshard_last=true",),
    "in parts": ("train.micro_batch=4", "fsdp.reduce_every_micro_batch=false"),
    "in parts, each reduced": ("train.micro_batch=4",),
}


def elastic(base: Path, at: str) -> RunConfig:
    return ELASTIC.settings(base / "elastic" / at)


# --- what the processes do -----------------------------------------------------------------------------------------


def on_two(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(cases.run_all(base, QUICK))
    for at, stop in (("two", MIDDLE), ("single to two", None)):
        settings = elastic(base, at)
        found[at] = run(settings, ranks_of(settings), stop)
    found["errors"] = [_refused(rank) for rank in range(2)]
    found["agreed"] = _agreed(ranks_of(elastic(base, "two")))
    found["starts"] = {at: _start(base, at) for at in ("two", "single")}
    counted = {name: _counted(base, *overrides) for name, overrides in COUNTED.items()}
    found["messages"] = {name: measures.messages(trainer) for name, trainer in counted.items()}
    found["shares"] = measures.shares(counted["whole"])
    return found


def on_four(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(cases.run_all(base, {"hybrid": HYBRID}))
    found["share"] = _share(HYBRID.settings(base / "share"))
    found["peak"] = _peak(RANDOM.settings(base / "random"))
    return found


def _peak(settings: RunConfig) -> dict[str, int]:
    """Bytes while a sharded student is built, and while a whole one is."""
    source, ranks = FakeSource(), ranks_of(settings)
    plain = {"sharded": ranks, "whole": cases.ALONE}
    return {
        name: measures.peak_of_building(lambda r=r: assembly.provider_of(settings, source, cases.CPU, r).student())
        for name, r in plain.items()
    }


def _share(settings: RunConfig) -> float:
    """Part of the student that this process holds."""
    student = assembly.provider_of(settings, FakeSource(), cases.CPU, ranks_of(settings)).student()
    held, whole = (sum(map(measure, student.parameters())) for measure in (measures.held, measures.whole))
    return held / whole


def _counted(base: Path, *overrides: str) -> Trainer:
    settings = Case("twinflow", (*overrides, "train.batch=16")).settings(base / "counted" / "-".join(overrides))
    return trainer_of(settings, ranks_of(settings))


def _agreed(ranks: Ranks) -> dict[str, float]:
    """What this process goes on with where each has numbers of its own."""
    own = {"loss": 0.1 + dist.get_rank(), "norm": math.nan if dist.get_rank() else math.inf}
    return ranks.agree(own) | {"stops": ranks.anywhere(dist.get_rank() == 1)}


def _refused(rank: int) -> str:
    """What this process hears when something is wrong on another one only."""

    def fail() -> None:
        if dist.get_rank() == rank:
            raise InputError(f"no file on rank {rank}")

    try:
        agreement.together(fail)
    except InputError as error:
        return str(error)
    return ""


def _start(base: Path, at: str) -> dict[str, Any]:
    """Whole start weights that came from another run's checkpoint, sharded or not."""
    origin = elastic(base, at).directory
    settings = Case("twinflow", (f"train.init={origin}",)).settings(base / "started")
    student = assembly.provider_of(settings, FakeSource(), cases.CPU, ranks_of(settings)).student()
    assert all(isinstance(p, DTensor) for p in student.parameters())
    return {name: p.full_tensor() for name, p in student.state_dict().items()}


# --- fixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(base: Path, known: None) -> list[dict[str, Any]]:
    """What each of two processes found; they also go on where one has stopped."""
    assert run(elastic(base, "single"), stop=MIDDLE) == Outcome("interrupted", MIDDLE)
    cases.copied(elastic(base, "single"), base / "elastic" / "single to two")
    return spawned(on_two, 2, base, base)


@pytest.fixture(scope="module")
def four(base: Path) -> list[dict[str, Any]]:
    """What each of four found."""
    return spawned(on_four, 4, base, base)


def on(base: Path, world: int, name: str) -> RunConfig:
    return CASES[name].settings(folder_of(base, world, name))


# --- the same run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in QUICK.items() if case.precise])
def test_two_processes_equal_one(base: Path, single: Any, two: Any, name: str) -> None:
    expected, outcome = single(name)
    assert [rank[name] for rank in two] == [outcome] * 2
    cases.assert_same_run(on(base, 2, name), expected)
    assert cases.events(on(base, 2, name)) == cases.events(expected)


def test_two_copies_of_two_shards_equal_one(base: Path, single: Any, four: Any) -> None:
    expected, outcome = single("hybrid")
    assert [rank["hybrid"] for rank in four] == [outcome] * 4
    cases.assert_same_run(on(base, 4, "hybrid"), expected)


@pytest.mark.parametrize("format", ["float32", "bf16"])
def test_the_first_losses_in_other_formats(base: Path, single: Any, two: Any, format: str) -> None:
    """In bf16, parameters are gathered in it, against autocast, which rounds in other places."""
    ours, theirs, exact = (
        losses(settings) for settings in (on(base, 2, format), single(format)[0], single("float32")[0])
    )
    for name in ("loss/base", "loss/adversarial"):
        if format == "float32":
            assert abs(ours[name] - theirs[name]) < bound(100, 1 / DELTA), name
        else:
            assert abs(ours[name] - theirs[name]) < bound(5, theirs[name], torch.bfloat16), name
            assert abs(ours[name] - exact[name]) > bound(10, exact[name]), name


def losses(settings: RunConfig) -> dict[str, float]:
    (row,) = rows(settings)
    return row


def test_one_processes_nan_is_one_event_of_all_who_go_back(base: Path, two: Any) -> None:
    found = cases.events(on(base, 2, "nan, rollback"))
    assert (found[0]["kind"], found[0]["step"], len(found[0]["rows"])) == ("nonfinite", 3, 1)
    assert [rank["nan, rollback"] for rank in two] == [Outcome("finished", STEPS)] * 2


def test_all_go_on_with_the_first_processes_numbers(two: list[dict[str, Any]]) -> None:
    assert [rank["agreed"] for rank in two] == [{"loss": 0.1, "norm": math.inf, "stops": True}] * 2


def test_one_processes_bad_input_is_everybodys(two: list[dict[str, Any]]) -> None:
    assert all(rank["errors"] == ["no file on rank 0", "no file on rank 1"] for rank in two)


def test_a_simulation_sends_the_same(two: list[dict[str, Any]]) -> None:
    overrides = [*SMALL, *cases.COMMON, "data.source=tests.fake_source.ByPath", "train={batch: 16, steps: 40}"]
    with Simulator() as simulator:
        told = simulator.report("twinflow", overrides, processes=2).messages
    sent = two[0]["messages"]["whole"]
    assert (told["gather"], told["reduce-scatter"]) == (sent["allgather"], sent["reduce_scatter"])
    assert told["broadcast"] == sent["broadcast"]
    assert told["all-reduce"] == sent["all_reduce"] + 1  # whether any rank stops, which is asked between steps


def test_gradients_are_summed_pass_by_pass_or_once_for_all_micro_batches(two: list[dict[str, Any]]) -> None:
    counted = {name: found["reduce_scatter"] for name, found in two[0]["messages"].items()}
    assert 0 < counted["in parts"] < counted["in parts, each reduced"]
    assert counted["whole"] == counted["in parts, each reduced"]  # a term's two passes, as two micro-batches


def test_the_last_block_stays_for_its_backward_pass(two: list[dict[str, Any]]) -> None:
    kept, freed = (two[0]["messages"][name] for name in ("whole", "last block freed"))
    assert freed["allgather"] > kept["allgather"] > 0
    assert freed["reduce_scatter"] == kept["reduce_scatter"]


def test_numbers_of_a_step_go_together(two: list[dict[str, Any]]) -> None:
    """Norms of four terms and of their sum, shares, cosines, RMS: not a message for each parameter."""
    assert 0 < two[0]["messages"]["whole"]["all_reduce"] < 30


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["single to two", "two to one"])
def test_resume_on_another_number_of_processes(base: Path, two: Any, at: str) -> None:
    assert two[0]["two"] == Outcome("interrupted", MIDDLE)
    undisturbed = elastic(base, "undisturbed")
    if not undisturbed.directory.exists():
        run(undisturbed)
    settings = elastic(base, at)
    if at != "single to two":
        cases.copied(elastic(base, "two"), settings.run.dir)
        assert run(settings) == Outcome("finished", STEPS)
    assert [row["step"] for row in rows(settings)] == list(range(1, STEPS + 1))
    cases.assert_same_run(settings, undisturbed)


@pytest.mark.parametrize("at", ["two", "single"])
def test_start_weights_are_read_from_either_kind(base: Path, two: Any, at: str) -> None:
    stored = checkpoints.load(RunDirectory(elastic(base, at).directory).newest_checkpoint()).judged
    for rank in two:
        assert set(rank["starts"][at]) == set(stored)
        assert all(torch.equal(rank["starts"][at][name], value) for name, value in stored.items())


def test_only_the_first_process_writes(base: Path, two: Any) -> None:
    settings = elastic(base, "single to two")
    assert [row["step"] for row in rows(settings)] == list(range(1, STEPS + 1))
    assert names.VAL_QUALITY in rows(settings)[-1]
    shards = RunDirectory(settings.directory).newest_checkpoint() / layout.SHARDS
    assert {path.name for path in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


# --- memory ----------------------------------------------------------------------------------------------------------


def test_every_process_holds_its_share(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert set(rank["shares"]) == {"parameters", "gradients", "optimizer", "ema"}
        for name, share in rank["shares"].items():
            assert share == pytest.approx(1 / 2, rel=0.05), name


def test_a_copy_is_shared_by_the_processes_that_have_it(four: list[dict[str, Any]]) -> None:
    assert [rank["share"] for rank in four] == [pytest.approx(1 / 2, rel=0.05)] * 4


def test_no_process_ever_holds_the_whole_network(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["peak"]["whole"] > 100_000  # the measure sees a whole network
        assert rank["peak"]["sharded"] < 0.5 * rank["peak"]["whole"]
