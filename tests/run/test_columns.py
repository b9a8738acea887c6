"""The log by columns: the same from the table and from the log, and no table is believed that is not of this log."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.disk import another_user, open_folder
from twinrl.config.errors import InputError
from twinrl.run import columns, runlog
from twinrl.run.runlog import RunLog

FINITE: list[dict[str, Any]] = [
    {"iteration": 0, "step": 1, "loss/total": 0.1 + 0.2, "count": 1},
    {"iteration": 1, "step": 2, "loss/total": 2, "val/quality": 1e-300, "count": 2},
    {"iteration": 2, "step": 3, "count": 3, "late": -0.0},
]
BROKEN: list[dict[str, Any]] = [*FINITE, {"iteration": 3, "step": 4, "loss/total": math.nan, "late": -math.inf}]


def everything(name: str) -> bool:
    return True


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A log of rows, and where its table goes."""

    def make(rows: list[dict[str, Any]]) -> tuple[Path, Path]:
        with RunLog(tmp_path / "log.jsonl") as log:
            for row in rows:
                log.append(row)
        return tmp_path / "log.jsonl", tmp_path / "metrics.parquet"

    return make


def same(a: columns.Columns, b: columns.Columns) -> bool:
    """To the last bit, and in one order."""
    arrays = ((a.values, b.values), (a.logged, b.logged))
    return all(list(x) == list(y) and all(np.array_equal(x[n], y[n], equal_nan=True) for n in x) for x, y in arrays)


@pytest.mark.parametrize("rows", [FINITE, BROKEN])
def test_table_and_log_give_the_same_and_tell_nan_from_nothing(
    made: Callable[..., tuple[Path, Path]], rows: list[dict[str, Any]]
) -> None:
    log, table = made(rows)
    fresh, kept = (columns.read(log, table, everything) for _ in range(2))
    assert same(fresh, kept)
    assert same(fresh, columns.Columns.of(columns.of_rows(rows, log)))
    read = kept.rows(np.full(len(rows), True))
    for found, row in zip(read, rows, strict=True):
        assert {name: repr(float(value)) for name, value in found.items()} == {
            name: repr(float(value)) for name, value in row.items()
        }


def test_only_what_is_wanted_is_read(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(BROKEN)
    for _ in range(2):
        assert list(columns.read(log, table, "late".__eq__).values) == ["step", "late"]


def test_a_log_that_has_grown_or_changed_is_read_again(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(FINITE)
    columns.write(log, table)
    with RunLog(log) as opened:
        opened.append({"iteration": 3, "step": 4, "count": 9})
    assert columns.read(log, table, everything).values["count"].tolist() == [1, 2, 3, 9]
    log.write_text(log.read_text().replace('"count": 9', '"count": 8'))
    assert columns.read(log, table, everything).values["count"].tolist() == [1, 2, 3, 8]
    stat = log.stat()
    log.write_text(log.read_text().replace('"count": 8', '"count": 7'))
    os.utime(log, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as long and as old as before
    assert columns.read(log, table, everything).values["count"].tolist() == [1, 2, 3, 7]


def test_a_table_that_is_kept_is_not_written_again(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(FINITE)
    columns.write(log, table)
    before = table.stat()
    columns.write(log, table)
    assert (table.stat().st_mtime_ns, table.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-30], lambda content: b"x" * 100,
                                    lambda content: content[:60] + b"\xff" * 40 + content[100:]])  # fmt: skip
def test_a_damaged_table_is_made_again_and_one_line_says_so(
    made: Callable[..., tuple[Path, Path]], damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    log, table = made(BROKEN)
    right = columns.read(log, table, everything)
    table.write_bytes(damage(table.read_bytes()))
    assert same(columns.read(log, table, everything), right)
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"{table} is damaged") for line in said] == [True]
    assert same(columns.read(log, table, everything), right)
    assert capsys.readouterr().err == ""


def test_a_table_that_may_not_be_read_is_not_called_damaged(
    made: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    log, table = made(FINITE)
    columns.write(log, table)
    with open_folder() as folder:
        theirs = [Path(shutil.copy(path, folder)) for path in (log, table)]
        theirs[1].chmod(0)
        with another_user():
            assert columns.read(*theirs, everything).values["count"].tolist() == [1, 2, 3]
    said = capsys.readouterr().err
    assert "may not be read" in said
    assert "damaged" not in said


def test_a_log_that_may_not_be_read_is_left_to_its_owner(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(FINITE)
    with open_folder() as folder:
        theirs = Path(shutil.copy(log, folder))
        theirs.chmod(0)
        with another_user(), pytest.raises(PermissionError, match=r"log\.jsonl"):
            columns.read(theirs, table, everything)


def test_a_folder_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that is no UTF-8, which pyarrow would not take."""
    folder = tmp_path / os.fsdecode(b"run-\xff")
    folder.mkdir()
    with RunLog(folder / "log.jsonl") as log:
        log.append(FINITE[0])
    for _ in range(2):
        assert columns.read(folder / "log.jsonl", folder / "metrics.parquet", everything).values["count"] == [1]
    assert (folder / "metrics.parquet").is_file()
    assert capsys.readouterr().err == ""


def test_a_table_of_another_program_is_replaced(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(FINITE)
    pd.DataFrame(runlog.read(log)).assign(count=0).to_parquet(table)
    assert columns.read(log, table, everything).values["count"].tolist() == [1, 2, 3]


def test_a_table_of_more_rows_than_its_log_can_have_is_made_again(
    made: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A few kilobytes of Parquet hold any number of equal rows."""
    log, table = made(FINITE)
    columns.write(log, table)
    kept = parquet.read_schema(table).metadata
    huge = pa.table({"step": pa.array(np.zeros(10**6, np.int64))}).replace_schema_metadata(kept)
    parquet.write_table(huge, table)
    assert columns.read(log, table, everything).values["count"].tolist() == [1, 2, 3]
    assert "1,000,000 rows of a log of" in capsys.readouterr().err


def test_where_nothing_can_be_written_the_log_is_read_all_the_same(
    made: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    log, _ = made(BROKEN)
    found = columns.read(log, log.parent / "absent" / "metrics.parquet", everything)
    assert found.values["step"].tolist() == [1, 2, 3, 4]
    assert sorted(path.name for path in log.parent.iterdir()) == ["log.jsonl"]
    assert capsys.readouterr() == ("", "")


def test_a_torn_line_is_no_row_and_a_corrupted_one_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    log, table = made(FINITE)
    with log.open("a") as file:
        file.write('{"iteration": 3')
    assert len(columns.read(log, table, everything).values["step"]) == 3
    whole = log.read_text()
    for corrupted in ('"step" 2,', '"step": 2,\r\n'):
        log.write_text(whole.replace('"step": 2,', corrupted))
        table.unlink(missing_ok=True)
        with pytest.raises(InputError, match=r"log\.jsonl, line 2, is corrupted"):
            columns.read(log, table, everything)
        assert not table.exists()


def test_a_column_of_numbers_and_text_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": "many"}\n')
    with pytest.raises(InputError, match="the column x holds more than numbers"):
        columns.read(log, tmp_path / "metrics.parquet", everything)


def test_lasting_rows_and_last_values_are_those_of_the_log(tmp_path: Path) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows, step = [], 0
        for iteration in range(12):
            step = int(rng.integers(0, step + 1)) if step and rng.random() < 0.25 else step
            step += 1
            row: dict[str, Any] = {"iteration": iteration, "step": step}
            rows.append(row | {name: float(rng.random()) for name in "abc" if rng.random() < 0.4})
        found = columns.Columns.of(columns.of_rows(rows, tmp_path))
        lasting = runlog.surviving(rows, rows)
        assert [row for row, kept in zip(rows, found.lasting, strict=True) if kept] == lasting
        assert found.rollbacks == runlog.rollbacks(rows)
        last = {name: (row["step"], row[name]) for row in lasting for name in "abc" if name in row}
        assert found.last("abc".__contains__) == last


def test_the_signature_is_of_what_was_read(made: Callable[..., tuple[Path, Path]]) -> None:
    """A row that is appended while the log is read belongs to the next reading."""
    log, _ = made(FINITE)
    made_of = columns._made_of(log)
    with RunLog(log) as opened:
        opened.append({"iteration": 3, "step": 4, "count": 9})
    assert columns.parsed(log, made_of["bytes"]).num_rows == 3
