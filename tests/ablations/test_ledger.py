"""The ledger: atomic appends by several processes, merging, and what it does with torn and foreign files."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ablations import ledger
from ablations.ledger import Ledger, TrialRecord
from analysis import ledger as analysed
from tests.disk import files_of_at_most
from twinrl.config.errors import InputError

DONE = TrialRecord("12345678", 0, "f" * 16, "finished", 20, metrics={"val/quality": 0.5})

WRITER = """
import sys
from pathlib import Path
from ablations.ledger import TrialRecord, append
for i in range(50):
    append(Path(sys.argv[1]), TrialRecord(sys.argv[2], i, "f" * 16, "finished", message="x" * 3000))
"""


def test_records_survive_exactly_non_finite_ones_too(tmp_path: Path) -> None:
    record = replace(
        DONE, status="diverged", metrics={"a": math.inf, "b": -math.inf, "c": 0.1}, diverged={"step": 7, "kind": "x"}
    )
    book = Ledger(tmp_path / "a.jsonl")
    book.append(record)
    assert book.read() == {record.key: record}
    book.append(replace(record, seed=1, metrics={"a": math.nan}))
    assert math.isnan(book.read()[replace(record, seed=1).key].metrics["a"])


def test_processes_append_at_once_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("aaaaaaaa", "bbbbbbbb")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(Ledger(path).read()) == path.read_bytes().count(b"\n") == 100


def test_a_torn_last_line_counts_for_nothing_and_is_cut_off(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "a.jsonl")
    book.append(DONE)
    with book.own.open("a") as file:
        file.write(DONE.line()[:40])
    assert list(book.read()) == [DONE.key]
    other = replace(DONE, seed=1)
    book.append(other)
    assert list(book.read()) == [DONE.key, other.key]


def test_a_full_disk_is_an_error_of_the_trial() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("ab", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        ledger.write_line(full, b"line\n", 0)


def test_a_line_that_fits_in_part_is_undone(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "a.jsonl")
    book.append(DONE)
    before = book.own.read_bytes()
    with files_of_at_most(len(before) + 40), pytest.raises(OSError, match=f"No space left on device: '{book.own}'"):
        book.append(replace(DONE, seed=1))
    assert book.own.read_bytes() == before


def test_a_second_reading_takes_in_what_is_new_and_forgets_what_is_gone(tmp_path: Path) -> None:
    first, other = replace(DONE, seed=1), replace(DONE, seed=2)
    book = Ledger(tmp_path / "books")
    book.own.parent.mkdir()
    book.append(DONE)
    before = book.read()
    Ledger(book.own).append(first)  # another process
    assert list(book.read()) == [DONE.key, first.key]
    assert list(before) == [DONE.key], "what was read before is a snapshot"
    beside = Ledger(tmp_path / "books" / "zz.jsonl")
    beside.append(other)
    assert list(book.read()) == [DONE.key, first.key, other.key]
    book.own.write_text(first.line() + "\n")  # shorter
    assert list(book.read()) == [first.key, other.key]
    beside.own.unlink()
    assert list(book.read()) == [first.key]
    longer = tmp_path / "new"
    longer.write_text(DONE.line() + "\n" + other.line() + "\n")
    longer.replace(book.own)  # another file
    assert list(book.read()) == [DONE.key, other.key]


@pytest.mark.parametrize("line", ["no record", "[" * 100_000], ids=["text", "deep"])
def test_a_foreign_line_that_comes_later_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    book = Ledger(tmp_path / "a.jsonl")
    book.append(DONE)
    book.read()
    with book.own.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2, is not a ledger's"):
        book.read()


def test_ledgers_of_several_machines_add_up(tmp_path: Path) -> None:
    failed, pruned = replace(DONE, status="failed", metrics={}), replace(DONE, seed=1, status="pruned")
    mine, other = Ledger(tmp_path / "mine.jsonl"), Ledger(tmp_path / "shared" / "there.jsonl")
    other.own.parent.mkdir()
    mine.append(failed)
    mine.append(pruned)
    other.append(DONE)
    merged = Ledger(mine.own, tmp_path / "shared").read()
    assert merged == {DONE.key: DONE, pruned.key: pruned}
    concatenated = tmp_path / "both.jsonl"
    concatenated.write_bytes(other.own.read_bytes() + mine.own.read_bytes() * 2)
    assert Ledger(concatenated).read() == merged


DAMAGES = {
    "seed": "0", "step": "800", "seconds": "12", "status": 3, "metrics": {"val/quality": "high"}, "where": [],
    "more": 1,
    "diverged": {"step": "7"},
}  # fmt: skip


@pytest.mark.parametrize("entry", DAMAGES)
def test_text_in_the_place_of_a_number_is_refused_by_either_reader(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(DONE.line() + "\n" + json.dumps(json.loads(DONE.line()) | {entry: DAMAGES[entry]}) + "\n")
    for read in (lambda: Ledger(path).read(), lambda: analysed.read(path, lambda config_hash, fingerprint: True)):
        with pytest.raises(InputError, match=rf"ledger\.jsonl, line 2, is not a ledger's.*{entry}") as error:
            read()
        assert "\n" not in str(error.value)


def test_foreign_and_missing_ledgers_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "log.jsonl"
    foreign.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"log\.jsonl, line 1, is not a ledger's"):
        Ledger(foreign).read()
    with pytest.raises(InputError, match="no ledger at"):
        Ledger(tmp_path / "own.jsonl", tmp_path / "absent.jsonl").read()


def test_a_pipe_in_the_place_of_a_ledger_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    os.mkfifo(path)
    for read in (Ledger(path).read, Ledger(path).check_writable, lambda: analysed.read(path, lambda *_: True)):
        with pytest.raises(InputError, match=r"ledger\.jsonl.*[Ii]s no file"):
            read()


def test_a_held_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LEDGER_PATIENCE_SECONDS", 0.05)
    path = tmp_path / "a.jsonl"
    with path.open("ab") as file:
        ledger._lock(file.fileno(), path)
        with pytest.raises(InputError, match="locked by another process"):
            Ledger(path).append(DONE)
