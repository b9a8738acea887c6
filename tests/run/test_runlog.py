"""The run log keeps numbers exactly, survives a kill at any byte, and resumes without gap or repeat."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.run import layout, runlog
from twinrl.run.runlog import RunLog, read

FLOATS = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.pi, math.nan, math.inf, -math.inf]


def bits(value: float) -> bytes:
    """The bytes of a float, so that -0.0 and nan are compared too."""
    return struct.pack("<d", value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def write(path: Path, start: int, stop: int) -> int:
    """Append rows start…stop−1; returns the durable length."""
    with RunLog(path) as log:
        for iteration in range(start, stop):
            log.append({"iteration": iteration, "step": iteration, "loss/total": iteration / 7})
        return log.sync()


def iterations(path: Path) -> list[int]:
    return [row["iteration"] for row in read(path)]


def test_floats_come_back_bit_for_bit_and_lines_are_strict_json(path: Path) -> None:
    with RunLog(path) as log:
        log.append({"iteration": 0, **{str(k): value for k, value in enumerate(FLOATS)}})
    (row,) = read(path)
    assert [bits(row[str(k)]) for k in range(len(FLOATS))] == [bits(value) for value in FLOATS]

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert list(strict.values())[-3:] == ["nan", "inf", "-inf"]


def test_scalars_of_numpy_and_torch_are_taken_exactly(path: Path) -> None:
    with RunLog(path) as log:
        log.append({"iteration": np.int64(3), "a": np.float32(0.1), "b": torch.tensor(0.1), "c": np.float64("nan")})
    (row,) = read(path)
    assert row["iteration"] == 3
    assert isinstance(row["iteration"], int)
    assert row["a"] == float(np.float32(0.1)) == row["b"]
    assert math.isnan(row["c"])


def test_what_is_no_scalar_is_refused_and_leaves_no_trace(path: Path) -> None:
    with RunLog(path) as log:
        with pytest.raises(TypeError, match="list"):
            log.append({"iteration": 0, "bad": [1, 2]})
        log.append({"iteration": 0})
    assert iterations(path) == [0]


def test_synced_rows_are_in_the_file_while_the_log_is_open(path: Path) -> None:
    with RunLog(path) as log:
        log.append({"iteration": 0})
        assert log.sync() == path.stat().st_size
        assert iterations(path) == [0]


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_torn_last_line_is_never_a_row(path: Path, torn: int) -> None:
    length = write(path, 0, 3)
    write(path, 3, 4)
    path.write_bytes(path.read_bytes()[: length + torn])
    assert iterations(path) == [0, 1, 2]
    write(path, 3, 5)
    assert iterations(path) == [0, 1, 2, 3, 4]


def test_a_complete_last_line_without_its_newline_is_torn_too(path: Path) -> None:
    write(path, 0, 3)
    path.write_bytes(path.read_bytes()[:-1])
    assert iterations(path) == [0, 1]
    write(path, 2, 4)
    assert iterations(path) == [0, 1, 2, 3]


def test_torn_line_longer_than_the_search_block(path: Path) -> None:
    length = write(path, 0, 1)
    with path.open("ab") as file:
        file.write(b'{"x": "' + b"y" * 200_000)
    assert RunLog(path).sync() == length


def test_resume_trims_to_the_checkpoint_and_equals_an_undisturbed_log(path: Path, tmp_path: Path) -> None:
    checkpoint = write(path, 0, 10)
    write(path, 10, 17)
    with path.open("ab") as file:
        file.write(b'{"iteration": 17, "lo')
    with RunLog(path) as log:
        log.trim(checkpoint)
        assert log.sync() == checkpoint
    write(path, 10, 30)
    undisturbed = tmp_path / "undisturbed.jsonl"
    write(undisturbed, 0, 30)
    assert path.read_bytes() == undisturbed.read_bytes()


def test_trim_of_unsynced_rows_and_to_nothing(path: Path) -> None:
    with RunLog(path) as log:
        log.append({"iteration": 0})
        log.trim(0)
        log.append({"iteration": 1})
    assert iterations(path) == [1]


@pytest.mark.parametrize("offset", [-1, 3, 10_000])
def test_trim_to_an_offset_that_ends_no_row_is_refused(path: Path, offset: int) -> None:
    write(path, 0, 3)
    with RunLog(path) as log, pytest.raises(InputError, match=r"log\.jsonl does not belong"):
        log.trim(offset)
    assert iterations(path) == [0, 1, 2]


@pytest.mark.parametrize("junk", [b"{oops}\n", b"[1]\n", b"\xff\xfe\n", b"\n"])
def test_corrupted_line_in_the_middle_names_file_and_line(path: Path, junk: bytes) -> None:
    length = write(path, 0, 2)
    path.write_bytes(path.read_bytes()[:length] + junk)
    write(path, 2, 3)
    for start in (0, length):
        with pytest.raises(InputError, match=r"log\.jsonl, line 3, is corrupted"):
            list(runlog.rows(path, start=start))


def test_missing_log_and_missing_folder_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "log.jsonl")
    with pytest.raises(InputError, match="cannot write"):
        RunLog(tmp_path / "absent" / "log.jsonl").sync()


def test_a_log_that_is_a_link_is_left_alone(path: Path, tmp_path: Path) -> None:
    """A run of somebody else's would cut a file of this user's, and write to it."""
    mine = tmp_path / ".bashrc"
    mine.write_text("mine\nnot ended")
    path.symlink_to(mine)
    for use in (lambda log: log.append({"step": 1}), lambda log: log.trim(0), lambda log: log.sync()):
        with pytest.raises(InputError, match=r"log\.jsonl is a link; fix: put the file itself"):
            use(RunLog(path))
    assert mine.read_text() == "mine\nnot ended"


def test_a_refused_trim_leaves_every_byte(path: Path, tmp_path: Path) -> None:
    write(path, 0, 3)
    with path.open("ab") as file:
        file.write(b'{"iteration": 3, "lo')
    before = path.read_bytes()
    for log, offset in ((RunLog(path), 7), (RunLog(tmp_path / "none.jsonl"), 12)):
        with pytest.raises(InputError, match="does not belong"):
            log.trim(offset)
    assert path.read_bytes() == before
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_can_be_read_in_stretches(path: Path) -> None:
    first = write(path, 0, 4)
    second = write(path, 4, 9)
    stretch = [row["iteration"] for row in runlog.rows(path, start=first, stop=second - 1)]
    assert stretch == [4, 5, 6, 7]


def test_frame_and_parquet_hold_the_same_numbers(path: Path) -> None:
    with RunLog(path) as log:
        for iteration, value in enumerate(FLOATS):
            log.append({"iteration": iteration, "step": iteration, "x": value} | ({"y": 1.0} if iteration else {}))
    frame = pandas.read_parquet(layout.write_metrics(path.parent))
    assert [bits(value) for value in frame["x"]] == [bits(value) for value in FLOATS]
    assert frame["iteration"].dtype == np.int64
    assert frame["y"].isna().tolist() == [True] + [False] * (len(FLOATS) - 1)


def attempts(*stretches: tuple[int, int]) -> list[dict[str, int]]:
    """Rows of stretches of steps first…last, each after a rollback to before its first; iterations count up."""
    steps = [step for first, last in stretches for step in range(first, last + 1)]
    return [{"iteration": iteration, "step": step} for iteration, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("stretches", "lasting"),
    [
        (((1, 60),), ((1, 60),)),
        (((1, 41), (31, 60)), ((1, 30), (31, 60))),
        (((1, 41), (31, 45), (31, 60)), ((1, 30), (31, 60))),  # to the same checkpoint
        (((1, 41), (31, 52), (11, 20)), ((1, 10), (11, 20))),  # to one before that of the first rollback
        (((1, 41), (31, 52), (43, 60)), ((1, 30), (31, 42), (43, 60))),  # in the second attempt
    ],
)
def test_what_a_rollback_took_back_does_not_survive(
    stretches: tuple[tuple[int, int], ...], lasting: tuple[tuple[int, int], ...]
) -> None:
    rows = attempts(*stretches)
    kept = runlog.surviving(rows, rows)
    assert [row["step"] for row in kept] == [step for first, last in lasting for step in range(first, last + 1)]
    assert runlog.rollbacks(rows) == len(stretches) - 1
    events = [{"kind": "spike", "iteration": row["iteration"]} for row in rows]
    assert [event["iteration"] for event in runlog.surviving(events, rows)] == [row["iteration"] for row in kept]
