"""Every command that a page shows is one that the program takes; those of blocks are executed, with small settings."""

import glob
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from ablations import study as studies
from tests import pages
from tests.commands.test_import_simpletuner import DOCUMENTED
from twinrl import cli, config
from twinrl.machine import forks
from twinrl.training import schema

PAGES = pages.all_pages()
PATTERN = re.compile(r"^(…|\[.*|…\])$")
"""Words that stand for others."""
OWN = re.compile(r"\bmy_\w+\.|\blab: my_")
"""Classes of a page's own files, whose commands are executed, which tells more; and laboratories of its own."""


# --- what every command must be --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> Any:
    """The whole command line, with the commands of the packages beside twinrl."""
    cli._register_subcommands()
    return get_command(cli.app)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_are_what_the_program_takes(page: str, app: Any) -> None:
    for command in pages.shown(page):
        check(command, app)


def check(command: pages.Command, app: Any) -> None:
    """Fails where the program would refuse the command's form."""
    where = f"{command.page}:{command.line}: {command.text}"
    first, *words = shlex.split(command.text)
    if first == "torchrun":
        first, words = "twinrl", words[words.index("twinrl") + 1 :] if "twinrl" in words else []
    if first == "twinrl" and words:
        check_twinrl(words, app, where, command.block)
    elif first == "python":
        check_python(words, where)
    elif first == "make":
        assert re.search(rf"^{words[0]}:", (pages.REPOSITORY / "Makefile").read_text(), re.MULTILINE), where
    elif first == "pytest":
        assert [word for word in words if "/" in word and not (pages.REPOSITORY / word).exists()] == [], where


def check_twinrl(words: list[str], app: Any, where: str, whole: bool) -> None:
    """It parses; the keys of a configuration exist, where the page does not define them itself."""
    words = [word for word in words if not PATTERN.search(word) and word != cli.DEBUG]
    command: Any = app
    path: list[str] = []
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        path.append(words.pop(0))
        assert path[-1] in command.commands, where
        command = command.commands[path[-1]]
    told = command.make_context(" ".join(path), list(words), resilient_parsing=not whole).params if words else {}
    check_settings(path, told)


def check_settings(path: list[str], told: dict) -> None:
    """The configuration or study that a command names loads with its overrides."""
    overrides = told.get("overrides") or []
    if OWN.search(" ".join(overrides)) or any(word.startswith("key=") for word in overrides):
        return
    named = told.get("config") or told.get("plan")
    if path == ["replay"]:
        schema.load("recommended", overrides)
    elif named in config.presets():
        schema.load(named, overrides)
    elif path[0] == "ablate" and told.get("study") in studies.shipped():
        studies.load(told["study"])


def check_python(words: list[str], where: str) -> None:
    """The script or module is there and knows the options."""
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found, where
        source = Path(found.origin or "")
    else:
        source = pages.REPOSITORY / words[0]
        assert source.is_file(), where
    options = [word for word in words if word.startswith("--")]
    text = "".join(path.read_text() for path in source.parent.glob("*.py"))
    assert [option for option in options if f'"{option}"' not in text] == [], where


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page: str) -> None:
    """Paths into the repository's folders, in inline code."""
    text = (pages.REPOSITORY / page).read_text()
    named = re.findall(r"`((?:twinrl|tests|benchmarks|analysis|ablations|papers|docs|website)/[\w./-]+)`", text)
    absent = {"benchmarks/results/large_model.json", "benchmarks/results/large_model.md"}
    assert [path for path in named if not (pages.REPOSITORY / path).exists() and path not in absent] == []


# --- executed --------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "docs/extending.md": "tests/test_extending.py, tests/backends/families/test_adding.py",
    "docs/architecture.md": "tests/test_versions.py",
    "CONTRIBUTING.md": "what CI runs",
}
"""Page → who executes its commands."""
SERVES = ("twinrl ui",)
"""Commands that do not end; tests/tracking/test_pages.py opens their pages."""
EXECUTED = [
    page for page in PAGES if page not in ELSEWHERE and any(one.block and not one.needs for one in pages.shown(page))
]
SMALL = (
    "train.steps=12", "train.batch=16", "checkpoint.every=4", "tracking.mlflow=false",
    "evaluation={every: 6, n: 20, nfe: [1], teacher_steps: 2, velocity_rows: 5, grid_samples: 1}",
)  # fmt: skip
EVENTFUL = ("stability.watch.rms_limit=0.001", "stability.capsules={every: 3, before: 2}", "stability.policy=record")
"""An event at once, with a capsule."""
SMALL_STUDY = {
    "train.steps": 12,
    "train.batch": 16,
    "evaluation": {"every": 6, "n": 20, "nfe": [1], "teacher_steps": 2, "velocity_rows": 5, "grid_samples": 1},
}
IMPORTED = ("ablations.cli", "analysis.cli", "twinrl.cli", "twinrl.commands.train", "twinrl.commands.inspect")
"""Before a command is started."""
MARGIN = {"low": 1e-4, "high": 1e-3, "steps": 12, "tolerance": 5.0}


class Workshop:
    """A folder in which a page's commands are run one after the other, as a reader would, with small settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.printed = folder / "printed.txt"
        self.ran: set[str] = set()
        self.environment = os.environ | {"PYTHONPATH": str(pages.REPOSITORY), "PYTHONSAFEPATH": ""}
        with self.printed.open("wb") as printed:
            self.server = forks.Server(IMPORTED, str(folder), self.environment, printed)

    def python(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def twinrl(self, *words: str) -> None:
        self.printed.write_text("")
        code = self.server.start(["twinrl", *words], self.printed).wait()
        assert code == 0, f"{shlex.join(words)}\n{self.printed.read_text()[-4000:]}"

    def write(self, name: str, text: str) -> None:
        """A file that the page shows; of a study its small version."""
        content = yaml.safe_load(text) if name.endswith(".yaml") else None
        if content and "factors" in content:
            small = {"set": content.get("set", {}) | SMALL_STUDY, "seeds": 2, "margin": MARGIN, "budget": {"trials": 8}}
            text = yaml.safe_dump(content | small, sort_keys=False)
        (self.folder / name).write_text(text)

    def run(self, command: pages.Command) -> None:
        """Run a command of a page; what stands for a run, a study or a file is there."""
        program, *words = shlex.split(command.text)
        if program == "python":
            small = SMALL if "train." in command.text else ()
            self.python(str(pages.REPOSITORY / words[0]), *words[1:], *small, "--out", str(self.folder / "out"))
            return
        self._make_what_is_named(words)
        words = [self._stands_for(word, words[0]) for word in words]
        found = [sorted(glob.glob(word, root_dir=self.folder)) if "*" in word else [] for word in words]
        words = [path for word, paths in zip(words, found, strict=True) for path in paths or [word]]
        if words[0] == "train":
            words += [*SMALL, "--fresh"]
        words += {"run": ["--no-mlflow"], "spikes": ["--no-open"], "arms": ["--no-open"]}.get("".join(words[1:2]), [])
        if words[0] == "replay" and "--after" in words:
            words[words.index("--after") + 1], words[words.index("--judge") + 1] = "6", "3"
        self.twinrl(*words)

    def _make_what_is_named(self, words: list[str]) -> None:
        """Run the page's programs that make the run directories which a command names."""
        for program in sorted(self.folder.glob("*.py")):
            makes = any(re.search(rf'"{re.escape(word)}["/]', program.read_text()) for word in words)
            if makes and program.name not in self.ran:
                self.ran.add(program.name)
                self.python(program.name)

    def _stands_for(self, word: str, command: str) -> str:
        if word in ("RUN", "runs/<run>", "runs/mnist-0a1b2c3d-s0"):
            return self._any_run()
        if "<folder>" in word:
            if "TWINRL_MNIST_ROOT" not in os.environ:
                pytest.skip("TWINRL_MNIST_ROOT names no folder with MNIST's files")
            return word.replace("<folder>", os.environ["TWINRL_MNIST_ROOT"])
        if word.startswith(("runs/ablations", "my-study")) and not (self.folder / word).exists():
            self.write("my-study.yaml", (studies.STUDIES / "example.yaml").read_text())
            self.twinrl("ablate", "run", "my-study.yaml", "--no-mlflow")
        if command == "ablate" and word in studies.shipped():
            self.write("shipped.yaml", (studies.STUDIES / f"{word}.yaml").read_text())
            return "shipped.yaml"
        return word

    def _any_run(self) -> str:
        if not (self.folder / "stand-in").exists():
            self.twinrl("train", "published", "run.dir=stand-in", *SMALL, *EVENTFUL)
        (run,) = (self.folder / "stand-in").glob("*-s0")
        return str(run)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    made = Workshop(tmp_path)
    norms = [f"{step},{1 + 0.01 * step}" for step in range(200)]
    (tmp_path / "log.csv").write_text("\n".join(["global_step,train/grad_norm", *norms]))
    (tmp_path / "config.json").write_text(json.dumps(DOCUMENTED))
    for name, text in pages.files(pages.page("extending")).items():
        if name.endswith(".py"):  # classes that other pages name
            made.write(name, text)
    return made


@pytest.mark.campaign
@pytest.mark.processes
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", EXECUTED)
def test_commands_run(page: str, workshop: Workshop) -> None:
    for name, text in pages.files((pages.REPOSITORY / page).read_text()).items():
        workshop.write(name, text)
    for command in pages.shown(page):
        ours = command.text.startswith(("twinrl ", "python ")) and not command.text.startswith(SERVES)
        if command.block and not command.needs and ours:
            workshop.run(command)
