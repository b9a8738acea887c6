"""1, 2 and 4 processes give the same run: numbers, events, checkpoints; and each holds its share alone.

One spawn for each number of processes runs all its cases; the tests compare with runs in this process.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.fake_source import FakeSource
from tests.fsdp import cases, measures
from tests.fsdp.cases import CASES, STEPS, Case, cases_on, copied, folder_of, ranks_of, rows, run, tensors, trainer_of
from twinrl import assembly, checkpoints
from twinrl.backends import NETWORKS
from twinrl.data import SOURCES
from twinrl.errors import InputError
from twinrl.fsdp import agreement
from twinrl.fsdp.checkpoint import convert, shard_checkpoint
from twinrl.schema import RunConfig
from twinrl.terms import TERMS
from twinrl.tracking import names
from twinrl.trainer import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

MIDDLE = STEPS // 2
ELASTIC = Case("twinflow", (*cases.RULES, "gradients.total={zclip: {warmup: 3}}"))
WIDE = Case("twinflow", ("model.network={kind: mlp, width: 64, depth: 4, condition_width: 64}",))
RANDOM = Case("tutorial", ("train.batch=16", *WIDE.overrides))  # starts from random weights
COUNTED = {
    "whole": (),
    "last block freed": ("fsdp.reshard_last=true",),
    "in parts": ("train.micro_batch=2",),
    "in parts, each reduced": ("train.micro_batch=2", "fsdp.reduce_every_micro_batch=true"),
}
ALIKE = {1: "single", 2: "two", 4: "four"}


def elastic(base: Path, at: str) -> RunConfig:
    return ELASTIC.settings(base / "elastic" / at)


# --- what the processes do beside the cases ----------------------------------------------------------------------


def on_four(base: Path) -> dict[str, Any]:
    settings = elastic(base, "four")
    found: dict[str, Any] = {"stopped": run(settings, ranks_of(settings), stop=MIDDLE)}
    wide = WIDE.settings(base / "wide")
    found["shares"] = measures.shares(trainer_of(wide, ranks_of(wide)))
    found["peak"] = _peak(RANDOM.settings(base / "random"))
    return found


def _peak(settings: RunConfig) -> dict[str, int]:
    """Bytes while a sharded student is built, and while a whole one is."""
    source, ranks = FakeSource(), ranks_of(settings)
    plain = {"sharded": ranks, "whole": cases.ALONE}
    return {
        name: measures.peak_of_building(lambda r=r: assembly.student_of(settings, source, cases.CPU, True, r))
        for name, r in plain.items()
    }


def on_two(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for at in ("four to two", "single to two"):
        settings = elastic(base, at)
        found[at] = run(settings, ranks_of(settings))
    found["errors"] = [_refused(base, rank) for rank in range(2)]
    found["starts"] = {at: _start(base, at) for at in ("four", "single")}
    found["messages"] = {name: _messages(base, *overrides) for name, overrides in COUNTED.items()}
    return found


def _messages(base: Path, *overrides: str) -> dict[str, int]:
    settings = Case("twinflow", (*overrides, "train.batch=16")).settings(base / "counted" / "-".join(overrides))
    return measures.messages(trainer_of(settings, ranks_of(settings)))


def _refused(base: Path, rank: int) -> str:
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
    student = assembly.student_of(settings, FakeSource(), cases.CPU, True, ranks_of(settings))
    assert all(isinstance(p, DTensor) for p in student.parameters())
    return {name: p.full_tensor() for name, p in student.state_dict().items()}


# --- fixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _known() -> Any:
    before = SOURCES["digits"]
    cases.register()
    yield
    SOURCES["digits"] = before
    del TERMS["planted"], NETWORKS["scaled"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def single(base: Path) -> Callable[[str], tuple[RunConfig, Outcome]]:
    """A case in this process, run once."""
    done: dict[str, tuple[RunConfig, Outcome]] = {}

    def of(name: str) -> tuple[RunConfig, Outcome]:
        if name not in done:
            settings = CASES[name].settings(folder_of(base, 1, name))
            done[name] = settings, run(settings)
        return done[name]

    return of


@pytest.fixture(scope="module")
def four(base: Path) -> list[dict[str, Any]]:
    """What each of four processes found."""
    return cases.spawn(4, base, on_four)


@pytest.fixture(scope="module")
def two(base: Path, four: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of two found; they go on where four, and one, have stopped."""
    assert run(elastic(base, "single"), stop=MIDDLE) == Outcome("interrupted", MIDDLE)
    for origin, at in (("four", "four to two"), ("single", "single to two")):
        copied(elastic(base, origin), base / "elastic" / at)
    return cases.spawn(2, base, on_two)


# --- the same run --------------------------------------------------------------------------------------------------

PRECISE = [(n, name) for n in (2, 4) for name, case in cases_on(n).items() if case.precise]


@pytest.mark.parametrize(("world", "name"), PRECISE)
def test_processes_equal_one(base: Path, single: Any, world: int, name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(ALIKE[world])
    expected, outcome = single(name)
    settings = CASES[name].settings(folder_of(base, world, name))
    assert [rank[name] for rank in found] == [outcome] * world
    assert_rows(rows(settings), rows(expected), 1e-7)  # shares and cosines are small differences of large numbers
    assert_rows(rows(settings), rows(expected), 1e-9, ("loss/", "grad/total", "opt/", "val/"))
    if outcome.status == "finished":
        ours, theirs = tensors(settings), tensors(expected)
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            size = float(value.nan_to_num().abs().max())
            torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9 * size, equal_nan=True, msg=key)


@pytest.mark.parametrize("world", [2, 4])
def test_single_precision(base: Path, single: Any, world: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(ALIKE[world])
    ours, theirs = rows(CASES["float32"].settings(folder_of(base, world, "float32"))), rows(single("float32")[0])
    assert_rows(ours, theirs, 1e-5, ("loss/", "grad/total", "grad/base/norm", "grad/adversarial/norm"))
    # Δv, about 1e-4 here, is a difference of velocities of about 1, whose last digit is 6e-8 of them: 4e-4 of Δv, of
    # rectify's gradient and of the cosines and shares with it
    assert_rows(ours, theirs, 1e-3, ("grad/", "delta_v/"))


def test_low_precision(base: Path, single: Any, two: Any) -> None:
    """Parameters gathered in bf16 against autocast, which rounds in other places."""
    ours, theirs = rows(CASES["bf16"].settings(folder_of(base, 2, "bf16"))), rows(single("bf16")[0])
    assert_rows(ours, theirs, 2e-2, ("loss/total", "loss/base"))
    assert ours[0]["loss/total"] != theirs[0]["loss/total"]


def assert_rows(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float, which: tuple[str, ...] = ("",)
) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) == set(other)
        for key, value in other.items():
            if key.startswith(which) and not (isinstance(value, float) and math.isnan(value) and math.isnan(mine[key])):
                assert mine[key] == pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2), (other["step"], key)


def test_one_processes_nan_is_one_event_of_all(base: Path, single: Any, two: Any, four: Any) -> None:
    name = "nan on one rank"
    expected, outcome = single(name)
    assert outcome.status == "diverged"
    found, consequence = events(expected)
    assert (found["kind"], len(found["rows"]), consequence["kind"]) == ("nonfinite", 1, "diverged")
    for world in (2, 4):
        assert events(CASES[name].settings(folder_of(base, world, name))) == [found, consequence]


@pytest.mark.parametrize("policy", cases.POLICIES)
def test_one_processes_nan_under_every_policy(base: Path, single: Any, two: Any, policy: str) -> None:
    found = events(CASES[f"nan, {policy}"].settings(folder_of(base, 2, f"nan, {policy}")))
    assert found == events(single(f"nan, {policy}")[0])
    assert next(event["step"] for event in found if event["kind"] == "nonfinite") == 4
    if policy in ("zero", "skip", "cut_lr+skip"):  # under the others nan is in the weights from then on
        assert [event["kind"] for event in found] == ["nonfinite", "diverged"]


def events(settings: RunConfig) -> list[dict[str, Any]]:
    """The events without their measured shares, which agree as the log's do."""
    lines = (settings.directory / "events.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("shares", "value", "reference")} for line in lines]


def test_one_processes_bad_input_is_everybodys(two: list[dict[str, Any]]) -> None:
    assert all(rank["errors"] == ["no file on rank 0", "no file on rank 1"] for rank in two)


def test_gradients_are_summed_once_however_they_accumulate(two: list[dict[str, Any]]) -> None:
    counted = {name: found["reduce_scatter"] for name, found in two[0]["messages"].items()}
    assert counted["in parts"] == counted["whole"] > 0
    assert counted["in parts, each reduced"] > counted["in parts"]


def test_the_last_block_stays_for_its_backward_pass(two: list[dict[str, Any]]) -> None:
    kept, freed = (two[0]["messages"][name] for name in ("whole", "last block freed"))
    assert freed["allgather"] > kept["allgather"] > 0
    assert freed["reduce_scatter"] == kept["reduce_scatter"]


def test_numbers_of_a_step_go_together(two: list[dict[str, Any]]) -> None:
    """Norms of four terms and of their sum, shares, cosines, RMS: not a message for each parameter."""
    assert 0 < two[0]["messages"]["whole"]["all_reduce"] < 30


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["four to two", "single to two", "four to one", "converted"])
def test_resume_on_another_number_of_processes(base: Path, four: Any, two: Any, at: str) -> None:
    assert four[0]["stopped"] == Outcome("interrupted", MIDDLE)
    undisturbed = elastic(base, "undisturbed")
    if not undisturbed.directory.exists():
        run(undisturbed)
    settings = elastic(base, at)
    if at in ("four to one", "converted"):
        copied(elastic(base, "four"), settings.run.dir)
        if at == "converted":
            folder = settings.directory / "checkpoints" / checkpoints.folder_of(MIDDLE)
            convert(folder, folder.with_name("converted"))
            folder.rename(folder.with_name("sharded"))
            folder.with_name("converted").rename(folder)
            assert not (folder / checkpoints.SHARDS).exists()
        assert run(settings) == Outcome("finished", STEPS)
    logged = rows(settings)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert_rows(logged[MIDDLE:], rows(undisturbed)[MIDDLE:], 1e-7)
    for key, value in tensors(undisturbed).items():
        torch.testing.assert_close(tensors(settings)[key], value, rtol=1e-9, atol=1e-9, msg=key)


def test_sharding_a_checkpoint_and_back_is_exact(base: Path, single: Any, tmp_path: Path) -> None:
    settings, _ = single("lab")
    origin = checkpoints.newest(settings.directory / "checkpoints")
    assert origin is not None
    shard_checkpoint(origin, tmp_path / "sharded")
    convert(tmp_path / "sharded", tmp_path / "back")
    before, after = checkpoints.load(origin), checkpoints.load(tmp_path / "back")
    assert before.state == after.state
    for part, values in before.tensors.items():
        assert set(after.tensors[part]) == set(values)
        assert all(torch.equal(after.tensors[part][name], value) for name, value in values.items())


@pytest.mark.parametrize("at", ["four", "single"])
def test_start_weights_are_read_from_either_kind(base: Path, two: Any, at: str) -> None:
    stored = checkpoints.load(checkpoints.newest(elastic(base, at).directory / "checkpoints")).judged  # type: ignore[arg-type]
    for rank in two:
        assert all(torch.equal(rank["starts"][at][name], value) for name, value in stored.items())


# --- memory ----------------------------------------------------------------------------------------------------------


def test_every_process_holds_its_share(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert set(rank["shares"]) == {"parameters", "gradients", "optimizer", "ema"}
        for name, share in rank["shares"].items():
            assert share == pytest.approx(1 / 4, rel=0.05), name


def test_no_process_ever_holds_the_whole_network(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["peak"]["whole"] > 100_000  # the measure sees a whole network
        assert rank["peak"]["sharded"] < 0.5 * rank["peak"]["whole"]


def test_only_the_first_process_writes(base: Path, two: Any) -> None:
    folder = CASES["lab"].settings(folder_of(base, 2, "lab")).directory
    assert len(rows(CASES["lab"].settings(folder_of(base, 2, "lab")))) == STEPS
    shards = checkpoints.newest(folder / "checkpoints") / checkpoints.SHARDS  # type: ignore[operator]
    assert {path.name for path in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert names.VAL_QUALITY in rows(CASES["lab"].settings(folder_of(base, 2, "lab")))[-1]
