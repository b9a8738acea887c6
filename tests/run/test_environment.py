"""The environment's description is plain JSON, light, and knows the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from twinrl.run import environment


def test_description_is_json_and_names_what_decides_the_numbers() -> None:
    found = environment.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["packages"]["numpy"] == numpy.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["threads"]["cores"] >= 1


@pytest.mark.slow
def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from twinrl.run import environment, runlog; from twinrl.tracking import mlflow_view, ui; "
        "environment.describe();"
        "print(sorted({'torch', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert environment.git_state(tmp_path) is None
    git("init")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-m", "one")
    clean = environment.git_state(tmp_path)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a.txt").write_text("two")
    assert environment.git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "untracked").mkdir()
    assert environment.git_state(tmp_path / "untracked") is None
