"""A study whose driver, Ray workers and trials are killed at random moments ends with the numbers of a quiet one.

``KILLS=30`` in the environment makes it thirty moments; test_ray.py kills a study once.
"""

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ablations.ledger import Ledger
from tests.ablations.disturbing import lines, numbers, parent, progress, start, trials
from tests.ablations.tiny import TINY, write
from tests.logs import rows

KILLS = int(os.environ.get("KILLS", "8"))
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.processes,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
STEPS, PATIENCE, CORES = 30 + 12 * KILLS, 300, ("--cpus", "2")


@dataclass
class Disturbed:
    """A study that is killed and started again."""

    study: str
    root: Path
    moments: random.Random = field(default_factory=lambda: random.Random(7))
    kills: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0, "trial": 0})

    def run(self) -> None:
        """Start it, kill it ``KILLS`` times, and let it end."""
        driver = start(self.study, self.root, *CORES)
        while sum(self.kills.values()) < KILLS and driver.poll() is None:
            (target,) = self.moments.choices(list(self.kills), (1, 2, 3))
            self._wait(driver)
            if self._kill(target, driver):
                self.kills[target] += 1
            driver = driver if driver.poll() is None else start(self.study, self.root, *CORES)
        assert driver.wait(PATIENCE * 4) == 0, self.root.with_suffix(".txt").read_text()

    def _wait(self, driver: subprocess.Popen[bytes]) -> None:
        """Until something is running; every other time until a checkpoint was made, so that the study gets on."""
        before, deadline = progress(self.root), time.monotonic() + PATIENCE
        on = progress if sum(self.kills.values()) % 2 else lambda root: before + len(trials(root))
        while on(self.root) <= before and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(self.moments.uniform(0, 1))

    def _kill(self, target: str, driver: subprocess.Popen[bytes]) -> bool:
        """Whether there was something to kill."""
        if target == "driver":
            driver.kill()
            driver.wait()
            return True
        running = trials(self.root)
        if not running:
            return False
        pid = self.moments.choice(running)
        try:
            os.kill(pid if target == "trial" else parent(pid), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, lab: object) -> tuple[str, Path]:
    """A study that nobody disturbs, and its workspace; ``lab`` is built before, if need be."""
    folder = tmp_path_factory.mktemp("kills")
    study = write(folder / "kills.yaml", set=TINY | {"train.steps": STEPS}, retries=KILLS, seeds=2)
    assert start(study, folder / "quiet", *CORES).wait(PATIENCE * 4) == 0, (folder / "quiet.txt").read_text()
    return study, folder / "quiet"


@pytest.fixture(scope="module")
def disturbed(quiet: tuple[str, Path]) -> Disturbed:
    """The same study under fire."""
    made = Disturbed(quiet[0], quiet[1].with_name("disturbed"))
    made.run()
    return made


def test_logs_and_records_are_equal(quiet: tuple[str, Path], disturbed: Disturbed) -> None:
    runs = sorted(path.relative_to(quiet[1]) for path in quiet[1].glob("????????/*-s?"))
    assert len(runs) == 4
    for run in runs:
        assert rows(disturbed.root / run) == rows(quiet[1] / run)
        assert len(rows(quiet[1] / run)) == STEPS
    ours, theirs = (Ledger(root / "ledger.jsonl").read() for root in (quiet[1], disturbed.root))
    assert {key: numbers(record) for key, record in ours.items()} == {k: numbers(r) for k, r in theirs.items()}


def test_it_was_killed_as_often_as_said(disturbed: Disturbed) -> None:
    print(f"\nkills: {disturbed.kills}")
    assert sum(disturbed.kills.values()) == KILLS


def test_no_finished_trial_was_repeated(disturbed: Disturbed) -> None:
    assert [line["status"] for line in lines(disturbed.root)] == ["finished"] * 4
    for path in (disturbed.root / "studies" / "kills" / "outputs").glob("*.txt"):
        text = path.read_text()
        assert "$ twinrl" not in text[text.index("samples: ") :], f"{path.name}: started after its end"


def test_nothing_is_left_running(disturbed: Disturbed) -> None:
    assert trials(disturbed.root) == []
