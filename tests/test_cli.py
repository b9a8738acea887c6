"""The command line: what is wrong is one line and exit code 2, help is quick and teaches, MLflow may be away."""

import errno
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import logs, pages
from tests.fake_source import SMALL, register, small
from tests.tracking import stores
from twinrl import __version__, cli
from twinrl.commands.progress import ConsoleObserver
from twinrl.config.errors import InputError
from twinrl.evaluation import figures as drawn
from twinrl.run import checkpoints, layout, names, runlog
from twinrl.stability import verdict
from twinrl.tracking import mlflow_view
from twinrl.training.opened import OpenedRun
from twinrl.training.runs import RunDirectory

ROOT = Path(__file__).parents[1]
TWINFLOW = ("train", "twinflow", *SMALL)


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """Do not draw what takes longer than a short run itself."""
    for name in ("save_times", "save_curves", "save_norms"):
        patch.setattr(drawn, name, lambda *arguments: None)


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, the fake source under the name digits, figures for those who ask for them, threads as
    before afterwards.
    """
    if "figures" not in request.fixturenames:
        without_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    register(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures() -> None:
    """Figures are drawn."""


class Result:
    """Exit code and output of ``twinrl …``."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def twinrl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process, through its entry point."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["twinrl", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return Result(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return run


def only_run(folder: Path = Path("runs")) -> RunDirectory:
    run = logs.the_run(folder)
    assert run is not None
    return run


def refused(result: Result, *words: str) -> None:
    """One line on stderr with all ``words``, exit code 2, no traceback."""
    assert result.code == 2, result.err
    assert result.err.startswith("twinrl: ")
    assert result.err.count("\n") == 1, result.err
    assert [word for word in words if word not in result.err] == [], result.err


# --- bad input, nothing trained yet ------------------------------------------------------------------------

BAD = {
    "unknown key": (["optim.lrr=1"], ["unknown key optim.lrr", "did you mean lr?"]),
    "unknown section": (["evaluatoin.n=3"], ["unknown key evaluatoin", "did you mean evaluation?"]),
    "unknown key of a term": (["terms.rectify.clampp=1"], ["unknown key terms.rectify.clampp", "did you mean clamp?"]),
    "unknown term": (["terms.recify={}"], ["terms.recify", "unknown term 'recify'", "rectify"]),
    "unknown network": (["model.network=mpl"], ["model.network", "unknown network 'mpl'", "mlp"]),
    "wrong type": (["train.steps=many"], ["train.steps", "valid integer", "got 'many'"]),
    "wrong type of a section": (["train=5"], ["train", "got 5"]),
    "out of range": (["optim.lr=-1"], ["optim.lr", "greater than 0", "got -1"]),
    "not a choice": (["train.precision=fp8"], ["train.precision", "'bf16'", "got 'fp8'"]),
    "no terms": (["terms={base: null, adversarial: null, rectify: null}"], ["terms"]),
    "batch too small": (["train.batch=3"], ["train.batch is too small", "gets no row", "3 rows", "fix: raise"]),
    "live teacher": (["teacher.kind=live"], ["collapse", "fix: teacher.kind=ema", "teacher.allow_live=true"]),
    "branch that the mix lacks": (["branches.adv=0"], ["terms.adversarial.branches", "branch adv"]),
    "no assignment": (["train.steps"], ["override 'train.steps'", "expected key.path=value"]),
    "malformed value": (["train.steps=[1"], ["override 'train.steps=[1'", "malformed"]),
    "no such device": (["machine.device=tpu7"], ["machine.device 'tpu7'", "fix: use auto or cpu"]),
    "a GPU that is not there": (["machine.device=cuda:77"], ["machine.device 'cuda:77'", "got ", "fix: "]),
    "sizes that do not fit": (["model.network={kind: dit, patch: 3}"], ["model.network", "patch 3", "fix: "]),
    "no sign": (["model.network={kind: unsigned}"], ["unsigned", "fix: embed the sign of t"]),
    "start from nothing": (["train.init=runs/none"], ["train.init", "runs/none", "expected teacher"]),
    "unwritable folder": (["run.dir=file/runs"], ["run directory file/runs/", "Not a directory", "fix: set run.dir"]),
    "bad name": (["name=a/b"], ["name", "got 'a/b'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(twinrl: Any, case: str) -> None:
    Path("file").touch()
    overrides, words = BAD[case]
    refused(twinrl(*TWINFLOW, *overrides), *words)
    assert not list(Path().glob("runs/*"))  # nothing half made in the way of the next try


def test_version(twinrl: Any) -> None:
    assert twinrl("--version").out == f"twinrl {__version__}\n"


def test_a_working_directory_that_is_gone(twinrl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(twinrl("--version"), "the working directory is gone", "fix: cd to another")


def test_unknown_preset(twinrl: Any) -> None:
    refused(twinrl("train", "twinflw"), "no preset or file 'twinflw'", "did you mean twinflow?")
    refused(twinrl("train", "absent.yaml"), "absent.yaml", "use a preset", "twinflow")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: [1", ["own.yaml is not valid YAML", "line 1"]),
        ("- 1\n- 2\n", ["own.yaml is not a mapping", "got list", "expected key: value lines"]),
        ("seed: 1\nseed: 2\n", ["own.yaml", "seed twice", "line 1"]),
        ("\ttrain: 1\n", ["own.yaml is not valid YAML"]),
        ("extends: nothing\n", ["no preset or file 'nothing'"]),
        ("extends: own.yaml\n", ["circle"]),
        ("seed: 3\n", ["terms is empty", "see the presets"]),
        ("", ["own.yaml"]),
    ],
)
def test_malformed_files(twinrl: Any, content: str, words: list[str]) -> None:
    Path("own.yaml").write_text(content)
    refused(twinrl("train", "own.yaml"), *words)


def test_files_that_are_no_text(twinrl: Any) -> None:
    Path("own.yaml").write_bytes(b"\xff\xfe\x00")
    refused(twinrl("train", "own.yaml"), "own.yaml")
    Path("folder.yaml").mkdir()
    refused(twinrl("train", "folder.yaml"), "folder.yaml", "is no file")


def test_missing_data(twinrl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinrl.lab import mnist_files

    monkeypatch.setattr(mnist_files, "MIRRORS", ("http://127.0.0.1:9/",))
    refused(twinrl(*TWINFLOW, "data.source=mnist", "data.root=none"), "MNIST", "none", "fix: ")
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize("command", ["resume", "sample", "evaluate", "publish"])
@pytest.mark.parametrize("path", ["absent", "."])
def test_not_a_run_directory(twinrl: Any, command: str, path: str) -> None:
    refused(twinrl(command, path), path, "run directory")


# --- a run and what can be wrong with it ---------------------------------------------------------------------


def interrupt_at(step: int, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Send the signal once the step is shown."""
    shown = ConsoleObserver.after_step

    def press(self: ConsoleObserver, row: dict[str, Any]) -> None:
        shown(self, row)
        if row["step"] == step:
            signal.raise_signal(number)

    patch.setattr(ConsoleObserver, "after_step", press)


def trained(runs: Path, *overrides: str) -> int:
    """The exit code of ``twinrl train twinflow`` under the folder ``runs``, outside a test."""
    from rich.console import Console

    from twinrl.commands.train import train

    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        without_figures(patch)
        return train(small(runs, *overrides), False, Console(quiet=True))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interrupted run of 12 steps with its checkpoints at 5 and 7."""
    runs = tmp_path_factory.mktemp("template") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(7, signal.SIGINT, patch)
        assert trained(runs) == 130
    return only_run(runs).path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint, at step 8, of a finished run of another network."""
    runs = tmp_path_factory.mktemp("foreign") / "runs"
    assert trained(runs, "model.network.width=24", "train.steps=8", "evaluation.every=0") == 0
    return only_run(runs).newest_checkpoint()


@pytest.fixture
def interrupted(template: Path) -> RunDirectory:
    """A copy of the interrupted run, in the working folder."""
    shutil.copytree(template, Path("runs") / template.name)
    return only_run()


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_interrupted_run_is_resumed_to_its_end(twinrl: Any, interrupted: RunDirectory) -> None:
    refused(twinrl(*TWINFLOW), "begun and not finished", f"`twinrl resume {interrupted.path}`", "--fresh")
    done = twinrl("resume", str(interrupted.path))
    assert done.code == 0
    assert "resuming at step 7" in done.out
    assert "final-1nfe.png" in done.out
    drawn = {path.name for path in interrupted.samples.glob("*.png")}
    assert {"final-1nfe.png", "curves.png", "norms.png"} <= drawn
    assert [row["iteration"] for row in runlog.read(interrupted.log)] == list(range(12))
    assert interrupted.result is not None
    assert interrupted.result["status"] == "finished"

    again = twinrl("resume", str(interrupted.path))
    assert again.code == 0
    assert "finished after 12 steps; nothing to resume" in again.out
    refused(twinrl(*TWINFLOW), "finished after 12 steps", "--fresh")

    assert twinrl("sample", str(interrupted.path), "--nfe", "2", "-n", "3", "--out", "new/grid.png").code == 0
    assert Path("new/grid.png").read_bytes()[:4] == b"\x89PNG"
    assert twinrl("evaluate", str(interrupted.path)).code == 0
    judged = json.loads((interrupted.path / "evaluation" / "table.json").read_text())
    assert judged == interrupted.result["table"]  # the same protocol, network and noise


def test_run_that_another_process_trains(twinrl: Any, interrupted: RunDirectory) -> None:
    with interrupted.locked():
        refused(twinrl("resume", str(interrupted.path)), "another process", str(interrupted.path), "fix: wait")
        refused(twinrl(*TWINFLOW, "--fresh"), "another process")
    assert interrupted.newest_checkpoint().name == "step-00000007"


def test_checkpoint_that_is_not_there(twinrl: Any, interrupted: RunDirectory) -> None:
    result = twinrl("sample", str(interrupted.path), "--step", "6")
    refused(result, "no checkpoint of step 6", "expected one of 5, 7")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x.json"), 1),
        (PermissionError(13, "No", "x"), 2),
        (RuntimeError("can't start new thread"), 2),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 2),
    ],
)
def test_what_the_system_says_of_a_file_or_a_thread(
    twinrl: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mlflow_view, "publish", fails)
    result = twinrl("publish", "runs/x")
    assert result.code == code
    assert re.fullmatch(r"twinrl: (x(\.json)? cannot be used; got |no more threads or proc).*; fix: .*\n", result.err)


def test_a_traceback_shows_no_password(twinrl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InputError("away") from OSError("http://me:pw-handed@host:9 does not answer")

    monkeypatch.setattr(mlflow_view, "publish", fails)
    result = twinrl("--debug", "publish", "runs/x")
    assert "http://me:***@host:9 does not answer" in result.err
    assert "pw-handed" not in result.err + result.out


@pytest.mark.parametrize("out", ["file/x.png", "x.nonsense", "x", "folder.png", "/proc/x/x.png"])
def test_a_picture_that_cannot_be_written_is_not_drawn(
    twinrl: Any, interrupted: RunDirectory, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenedRun, "sample", None)
    Path("file").touch()
    Path("folder.png").mkdir()
    result = twinrl("sample", str(interrupted.path), "-n", "1", "--out", out)
    refused(result, f"{out} cannot be written", "fix: ")


@pytest.mark.slow
def test_samples_by_the_sampler_that_was_found(
    twinrl: Any, interrupted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(interrupted.path)
    refused(twinrl("sample", run, "--best", "--nfe", "2"), "no sampler was searched", "fix: twinrl sampler")
    refused(twinrl("sampler", run), "leaves nothing to choose", "--nfe 2")
    found = twinrl("sampler", run, "--nfe", "2")
    assert found.code == 0
    assert re.search(r"2 +[\d.]+ +[\d.]+ +-?[\d.e-]+ \[", found.out)
    kept = json.loads((interrupted.path / layout.EVALUATION / layout.SAMPLERS).read_text())
    assert [each["nfe"] for each in kept["found"]] == [2]
    assert twinrl("sample", run, "--best", "--nfe", "2", "-n", "2", "--out", "a.png").code == 0
    assert twinrl("sample", run, "--nfe", "2", "-n", "2", "--out", "b.png").code == 0
    better = kept["found"][0]["difference"]["high"] < 0
    assert (Path("a.png").read_bytes() != Path("b.png").read_bytes()) == better
    assert twinrl("sample", run, "--best", "--nfe", "1", "-n", "2").code == 0  # one jump is one jump
    refused(twinrl("sample", run, "--best", "--nfe", "3"), "for 3 evaluations at step 7")


@pytest.mark.parametrize(("command", "work"), [("evaluate", "judge"), ("bench", "timings"), ("sampler", "best")])
def test_a_run_that_cannot_be_written_is_refused_before_time_is_spent(
    twinrl: Any, interrupted: RunDirectory, command: str, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    monkeypatch.setattr(OpenedRun, work, None)
    options = ["--nfe", "2"] if command == "sampler" else []
    result = twinrl(command, str(interrupted.path), *options)
    refused(result, "cannot be written; got Read-only file system", "a copy of the run")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["resume", "sample", "evaluate"])
def test_corrupted_checkpoint(twinrl: Any, interrupted: RunDirectory, command: str) -> None:
    file = interrupted.newest_checkpoint() / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(twinrl(command, str(interrupted.path)), str(file), "corrupted", "fix: delete the checkpoint's folder")
    if command == "resume":
        shutil.rmtree(file.parent)  # the fix works
        assert twinrl("resume", str(interrupted.path)).code == 0


def test_corrupted_state(twinrl: Any, interrupted: RunDirectory) -> None:
    (interrupted.newest_checkpoint() / "state.json").write_text("{garbage")
    refused(twinrl("resume", str(interrupted.path)), "state.json", "corrupted", "fix: ")


@pytest.mark.parametrize("part", ["student", "ema", "optimizer"])
def test_foreign_checkpoint(twinrl: Any, interrupted: RunDirectory, foreign: Path, part: str) -> None:
    file = shutil.copy(foreign / f"{part}.safetensors", interrupted.newest_checkpoint())
    refused(twinrl("resume", str(interrupted.path)), file, "another network", "got key", "fix: ")


def test_checkpoint_of_another_run(twinrl: Any, interrupted: RunDirectory, foreign: Path) -> None:
    shutil.copytree(foreign, interrupted.checkpoints / foreign.name)
    refused(twinrl("resume", str(interrupted.path)), "configuration has changed", "model.network.width", "train.steps")


def test_resume_with_a_changed_configuration(twinrl: Any, interrupted: RunDirectory) -> None:
    path = interrupted.path / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 0.01"))
    refused(twinrl("resume", str(interrupted.path)), "has changed", "other values of optim.lr", "fix: restore them")


def test_what_a_run_says_does_not_steer_the_terminal(twinrl: Any, interrupted: RunDirectory) -> None:
    (interrupted.path / "result.json").write_text(json.dumps({"status": "\x1b]52;c;bGk=\x07", "step": 1}))
    said = twinrl("resume", str(interrupted.path))
    refused(said, "result.json is damaged", r"\x1b]52;c;bGk=\x07")
    assert "\x1b" not in said.err


def test_resume_with_a_broken_configuration(twinrl: Any, interrupted: RunDirectory) -> None:
    path = interrupted.path / "config.yaml"
    path.write_text(path.read_text() + "more: 1\n")
    refused(twinrl("resume", str(interrupted.path)), "unknown key more")


def test_resume_with_a_log_that_lost_rows(twinrl: Any, interrupted: RunDirectory) -> None:
    interrupted.log.write_bytes(interrupted.log.read_bytes()[:300])
    refused(twinrl("resume", str(interrupted.path)), "log.jsonl", "does not belong to this checkpoint", "fix: ")


@pytest.mark.slow
def test_divergence_under_a_stop_policy_is_exit_code_1(twinrl: Any) -> None:
    result = twinrl(*TWINFLOW, "terms.poison={at: 6, branches: [any]}")
    assert result.code == 1
    assert "diverged" in result.out
    assert "loss/poison" in result.out
    run = only_run()
    assert run.result is not None
    assert (run.result["status"], run.result["step"]) == ("diverged", 7)
    assert (run.path / layout.METRICS).exists()
    assert run.newest_checkpoint().name == "step-00000005"


@pytest.mark.slow
def test_a_run_that_goes_on_without_finite_numbers_ends_in_a_table(twinrl: Any) -> None:
    result = twinrl(*TWINFLOW, "terms.poison={at: 1, branches: [any]}", "stability.policy=record")
    assert result.code == 0
    assert "nan" in result.out
    assert result.out.count("event nonfinite") == 1  # and not one line for every step
    assert result.out.count("event diverged") == 1
    kinds = [event["kind"] for event in logs.events(only_run())]
    assert kinds == ["nonfinite", "diverged"]


@pytest.mark.slow
def test_a_run_is_measured_against_its_start_which_is_evaluated_once(twinrl: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert twinrl(*TWINFLOW, f"seed={seed}").code == 0
    (cached,) = (tmp_path / "cache" / "starts").rglob("*.json")
    starts = [layout.read_start(run) for run in sorted(Path("runs").glob("*-s*"))]
    assert starts[0] == starts[1] == verdict.decoded(json.loads(cached.read_text()))
    assert starts[0] is not None
    state = checkpoints.load_state(RunDirectory(next(Path("runs").glob("*-s1"))).newest_checkpoint())
    assert state["monitor"]["divergence"]["judged"]["start"] == starts[0][names.val("accuracy", 1)]
    assert twinrl(*TWINFLOW, "train.init=random", "name=random").code == 0
    assert layout.read_start(next(Path("runs").glob("random-*"))) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint_first(twinrl: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt_at(3, number, monkeypatch)
    result = twinrl(*TWINFLOW)
    assert result.code == 130
    assert "interrupted at step 3, checkpoint written" in result.out
    assert f"twinrl resume {only_run().path}" in result.out
    assert only_run().newest_checkpoint().name == "step-00000003"
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once(twinrl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(self: ConsoleObserver, row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(ConsoleObserver, "after_step", press_twice)
    result = twinrl(*TWINFLOW)
    assert result.code == 1  # 130 says that a checkpoint was written
    assert "stopped at once, at step 1; what came after the start is lost; continue with: twinrl resume" in result.out


@pytest.mark.slow
def test_progress_without_a_terminal(twinrl: Any) -> None:
    result = twinrl(*TWINFLOW, "train.steps=30", "evaluation.every=0")
    assert result.code == 0
    shown = re.findall(r"step +(\d+) of 30", result.out)
    assert {str(step) for step in (1, *range(3, 31, 3))} <= set(shown)  # a slow machine has more
    assert "\x1b" not in result.out


@pytest.mark.slow
def test_mlflow_away_then_published_by_the_command_of_the_warning(
    twinrl: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with caplog.at_level(logging.WARNING):
        result = twinrl(*TWINFLOW, "tracking={mlflow: true, uri: 'http://127.0.0.1:9'}")
    assert result.code == 0
    run = only_run()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "MLflow is away" in warnings[0]
    assert warnings[0].endswith(f"twinrl publish {run.path}")
    assert "twinrl ui" not in result.out  # there is nothing to see yet

    refused(twinrl("publish", str(run.path)), "MLflow cannot be reached", "fix: ")
    uri = f"sqlite:///{shutil.copy(stores.empty(tmp_path_factory), tmp_path / 'later.db')}"
    published = twinrl("publish", str(run.path), "--tracking-uri", uri)
    assert published.code == 0, published.err
    run_id = published.out.split()[-1]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    logged = {row["iteration"]: row[names.LOSS_TOTAL] for row in runlog.read(run.log)}
    points = client.get_metric_history(run_id, names.LOSS_TOTAL)
    assert {point.step: point.value for point in points} == logged
    assert len(points) == len(logged)


@pytest.mark.slow
def test_starting_over_replaces_the_mlflow_run(
    twinrl: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "runs").mkdir()
    shutil.copy(stores.empty(tmp_path_factory), tmp_path / "runs" / "mlflow.db")
    ids = []
    for fresh in ([], ["--fresh"]):
        assert twinrl(*TWINFLOW, "tracking.mlflow=true", *fresh).code == 0
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
        (found,) = client.search_runs([client.get_experiment_by_name("twinrl").experiment_id])
        ids.append(found.info.run_id)
        assert len(client.get_metric_history(found.info.run_id, names.LOSS_TOTAL)) == 12
    assert len(set(ids)) == 2


# --- help ------------------------------------------------------------------------------------------------------


def help_of(*arguments: str) -> str:
    """The output of ``twinrl … --help`` in a process of its own, in which nothing heavy may be imported."""
    script = (
        "import sys\n"
        f"sys.argv = ['twinrl', *{arguments!r}, '--help']\n"
        "from twinrl.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'mlflow', 'diffusers', 'pandas', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_light_and_says_how_to_begin() -> None:
    shown = help_of()
    assert "twinrl train lab" in shown
    for command in ("train", "resume", "sample", "evaluate", "publish", "ui", "doctor"):
        assert command in shown


def test_help_of_train_teaches_overrides_and_resume() -> None:
    shown = help_of("train")
    for words in ("train.steps=2000 optim.lr=5e-4 seed=1", "--fresh", "Ctrl-C", "twinrl resume", "twinrl doctor"):
        assert words in shown


def test_every_command_explains_itself() -> None:
    from typer.main import get_command

    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", "given"), f"{name} {parameter.name}"


def test_doctor_explains_every_key(twinrl: Any) -> None:
    result = twinrl("doctor", "--schema")
    assert result.code == 0
    for key in ("train.steps", "checkpoint.every", "optim", "data.root", "stability.policy", "run.dir", "seed"):
        assert key in result.out
    assert twinrl("doctor").code == 0


# --- classes of one's own ----------------------------------------------------------------------------------


def the_example() -> tuple[str, str]:
    """The documentation's own term, and the assignment that uses it."""
    section = pages.sections("extending")["Loss term"]
    (command,) = pages.commands(section)
    return pages.files(section)["my_terms.py"], shlex.split(command)[-1]


@pytest.mark.slow
def test_the_console_script_finds_what_lies_beside_it() -> None:
    """As ``python -m twinrl`` does; and files there stand neither for the packages of the command line itself nor for
    the libraries that it imports late: the folder may be somebody else's."""
    code, assignment = the_example()
    Path("my_terms.py").write_text(code)
    for name in ("analysis", "torch", "pandas"):
        Path(f"{name}.py").write_text("raise SystemExit('a file of the folder was run')")
    command = [Path(sys.executable).with_name("twinrl"), "train", "lab", assignment, "terms.near.wieght=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "twinrl: unknown key terms.near.wieght; did you mean weight?\n")
