"""The wheel works without the checkout: built, installed into an empty environment, used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.ablations import tiny
from tests.pages import REPOSITORY
from twinrl import __version__

pytestmark = [pytest.mark.campaign, pytest.mark.processes]

SETTINGS = (
    "train.steps=12", "train.batch=16", "tracking.mlflow=false",
    "evaluation={every: 6, n: 20, nfe: [1], teacher_steps: 2, velocity_rows: 5, grid_samples: 1}",
)  # fmt: skip


BUILD = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "built")


def said(*command: object, cwd: Path) -> str:
    """What a command prints; it must succeed, and sees nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, since a build writes beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines():
        if name.startswith(("twinrl/", "ablations/", "analysis/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    said(sys.executable, "-m", "pip", "wheel", *BUILD, ".", cwd=source)
    (built,) = (source / "built").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, and with this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    installed = folder / "bin" / "python"
    said(sys.executable, "-m", "pip", "--python", installed, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    packages = Path(said(installed, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return installed


def test_the_wheel_works_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    twinrl = python.parent / "twinrl"
    found = said(python, "-c", "import twinrl, ablations, analysis; print(twinrl.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(python.parents[1])
    assert said(twinrl, "--version", cwd=tmp_path).strip() == f"twinrl {__version__}"
    said(twinrl, "train", "lab", "name=wheel", *SETTINGS, cwd=tmp_path)
    (run,) = (tmp_path / "runs").glob("wheel-*-s0")
    said(twinrl, "analyze", run, cwd=tmp_path)
    said(twinrl, "notebook", "spikes", run, cwd=tmp_path)
    tiny.write(tmp_path / "study.yaml", design={"kind": "grid"})
    said(twinrl, "ablate", "run", "study.yaml", cwd=tmp_path)
    (ledger,) = (tmp_path / "runs" / "ablations").glob("*.jsonl")
    assert len(ledger.read_text().splitlines()) == 2 * len(tiny.RATES), "trials: two seeds of each arm"
    assert "report.html" in said(twinrl, "ablate", "report", "study.yaml", cwd=tmp_path).replace("\n", "")
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "wheel"
