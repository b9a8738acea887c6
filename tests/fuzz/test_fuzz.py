"""Damaged files and odd values end in the right numbers or in one line: 2,000 in a campaign, 60 otherwise."""

import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from tests import forked
from tests.fuzz import loop, mutations, targets, trying
from tests.fuzz.trying import Done

COUNT, SMALL = 2000, 60
QUICK = ("cut run", "run", "images", "configuration")
"""Targets that need neither a pipeline nor the laboratory."""


def fuzz(count: int, only: tuple[str, ...], work: Path) -> None:
    """In a process of its own, whose forks try."""
    raise SystemExit(loop.main(0, count, work, only, again=False, seconds=None))


def found(count: int, only: tuple[str, ...], work: Path, limit: float) -> tuple[list[loop.Tried], str]:
    """What was tried, and what the process printed."""
    output = work.with_name("output.txt")
    process = forked.start(fuzz, count, only, work, output=output)
    process.wait(limit)
    return loop.known(work / "seed-0.jsonl"), output.read_text()


@pytest.mark.slow
def test_sixty_mutations_end_well(tmp_path: Path) -> None:
    tried, printed = found(SMALL, QUICK, tmp_path / "work", 600)
    assert len(tried) == SMALL, printed
    assert [loop.told(each) for each in tried if each.wrong] == []
    ended = Counter(each.rc for each in tried)
    assert ended[0] > 5
    assert ended[2] > 10
    again, printed = found(SMALL, QUICK, tmp_path / "work", 100)
    assert again == tried, printed  # nothing is left to try


@pytest.mark.campaign
@pytest.mark.timeout(3 * 3600)
def test_two_thousand_mutations_end_well() -> None:
    work = Path(__file__).parents[2] / "runs" / "fuzz"
    (work / "seed-0.jsonl").unlink(missing_ok=True)
    tried, printed = found(COUNT, (), work, 3 * 3600)
    assert len(tried) == COUNT, printed
    assert [loop.told(each) for each in tried if each.wrong] == []


# --- the judge and the mutations ----------------------------------------------------------------------------


FINE = {"changed": [], "different": {}, "may_end_badly": False}


@pytest.mark.parametrize(
    ("done", "more", "said"),
    [
        (Done(0, "", "", 1), {}, ""),
        (Done(2, "", "twinrl: no such key\n", 1), {}, ""),
        (Done(0, "", "", 1), {"different": {"loss": 1.0}}, "other numbers"),
        (Done(2, "", "twinrl: no\n", 1), {"changed": ["log.jsonl"]}, "changed log.jsonl"),
        (Done(2, "", "no such key\n", 1), {}, "no line of twinrl's"),
        (Done(2, "", "a\nb\nc\ntwinrl: no\n", 1), {}, "4 lines"),
        (Done(2, "", f"twinrl: {'x' * 2000}\n", 1), {}, "characters"),
        (Done(1, "", "Traceback (most recent call last):\nKeyError: 'a'\n", 1), {"may_end_badly": True}, "traceback"),
        (Done(1, "", "twinrl: diverged\n", 1), {"may_end_badly": True}, ""),
        (Done(1, "", "twinrl: diverged\n", 1), {}, "exit code 1"),
        (Done(-11, "", "", 1), {}, "exit code -11"),
        (Done(None, "", "", 150), {}, "no end"),
    ],
)
def test_the_judge_sees_what_is_wrong(done, more, said):
    wrong = trying.wrong(done, **(FINE | more))
    assert said in wrong
    assert bool(said) == bool(wrong)


def test_a_mutation_is_decided_by_its_seed(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, {"b": "text"}], "c": None}
    for number in range(40):
        said, left = [], []
        for _ in range(2):
            path = tmp_path / "x.json"
            targets.remove(path)
            path.write_text(json.dumps(content))
            said.append(mutations.damage(path, Random(number)))
            left.append(path.read_bytes() if path.is_file() else os.path.lexists(path) and os.lstat(path).st_mode)
        assert said[0] == said[1]
        assert left[0] == left[1]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".yaml"])
def test_changed_values_stay_readable(suffix: str, tmp_path: Path) -> None:
    """Or the readers' checks of values would never be tried."""
    path, whole = tmp_path / f"x{suffix}", {"step": 4, "list": [1, 2], "inner": {"name": "a"}}
    readable = 0
    for number in range(60):
        path.write_text(yaml.safe_dump(whole) if suffix == ".yaml" else json.dumps(whole) + "\n")
        (mutations.yaml_value if suffix == ".yaml" else mutations.json_value)(path, Random(number))
        try:
            value = yaml.safe_load(path.read_text()) if suffix == ".yaml" else json.loads(path.read_text())
        except (ValueError, RecursionError, yaml.YAMLError):
            continue
        readable += value != whole
    assert readable > 40
