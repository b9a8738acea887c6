"""Run directories: what exists is not overwritten by accident, and what is wrong is said in one line."""

import errno
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.disk import files_of_at_most
from tests.fake_source import small
from tests.objectives import LAB_PRESETS
from twinrl.commands import processes
from twinrl.config import components
from twinrl.config.errors import InputError
from twinrl.machine import known
from twinrl.run import layout
from twinrl.training import runs, schema
from twinrl.training.runs import RunDirectory


@pytest.fixture
def settings(tmp_path: Path) -> schema.RunConfig:
    return small(tmp_path / "runs")


@pytest.fixture
def begun(settings: schema.RunConfig) -> RunDirectory:
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    return run


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_name_tells_preset_hash_and_seed(settings: schema.RunConfig) -> None:
    assert settings.directory.name == f"twinflow-{settings.hash}-s0"


def test_name_and_bookkeeping_do_not_enter_the_hash(tmp_path: Path) -> None:
    plain = small(tmp_path)
    for same in ("seed=7", "name=other", "checkpoint.every=3", "tracking.mlflow=true", "machine.threads=1"):
        assert small(tmp_path, same).hash == plain.hash, same
    for other in ("optim.lr=1e-5", "train.steps=13", "terms.rectify.weight=0.4", "evaluation.n=24"):
        assert small(tmp_path, other).hash != plain.hash, other


@pytest.mark.parametrize("place", ["beside the runs", "in the run"])
def test_code_that_comes_with_a_run_is_not_run(
    begun: RunDirectory, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package in the run, whose outermost file would run first, named from the folder of runs or from the run."""
    inside = place == "in the run"
    folder, name = (begun.path, "brought") if inside else (begun.path.parent, f"{begun.path.name}.brought")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(components, "_places", [])
    components.look_in(str(folder))
    (begun.path / "brought").mkdir()
    (begun.path / "brought" / "__init__.py").write_text("open('proof', 'w').close()")
    (begun.path / "brought" / "code.py").touch()
    config = begun.path / layout.CONFIG
    config.write_text(config.read_text().replace("kind: adamw", f"kind: {name}.code.Own"))
    with pytest.raises(InputError, match=r"would run code that comes with the run; got .*__init__\.py; fix: read"):
        begun.settings()
    assert not Path("proof").exists()
    config.write_text(config.read_text().replace(f"{name}.code.Own", "beside.Own"))
    (folder.parent / "beside.py").write_text("class Own: pass")
    sys.path.append(str(folder.parent))  # of a file that is the user's own more is asked
    with pytest.raises(InputError, match=r"beside\.Own' is no optimizer"):
        begun.settings()


@pytest.mark.parametrize(
    ("setting", "address", "variable"),
    [
        ("tracking.uri=http://evil.example:5000", "http://evil.example:5000", "MLFLOW_TRACKING_URI"),
        ("launch.address=evil.example:6379", "evil.example:6379", "RAY_ADDRESS"),
    ],
)
def test_a_run_that_names_a_server_of_somebody_else_s_is_not_continued(
    tmp_path: Path, setting: str, address: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would be sent this user's token; a cluster would run what it likes here."""
    monkeypatch.setattr(known, "place", lambda: tmp_path / "servers")
    monkeypatch.delenv(variable, raising=False)
    settings = small(tmp_path, "tracking.mlflow=true", setting)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    for what in ("launch", "_launched_from_here"):
        monkeypatch.setattr(processes, what, lambda *_: pytest.fail("it goes on"))
    with pytest.raises(InputError, match=f"{address}, which you have not named yet; fix: export {variable}={address}"):
        processes.resume(run.path, Console(quiet=True))
    monkeypatch.setenv(variable, address)
    run.check_own(settings)
    monkeypatch.delenv(variable)
    runs.note_named(settings)
    run.check_own(settings)


def test_a_run_that_names_what_is_on_this_machine_is_continued(tmp_path: Path) -> None:
    settings = small(tmp_path, "tracking.mlflow=true", "tracking.uri=sqlite:///x.db", "launch.address=auto")
    RunDirectory(settings.directory).check_own(settings)
    RunDirectory(settings.directory).check_own(small(tmp_path, "tracking.mlflow=false", "tracking.uri=http://away"))


@pytest.mark.parametrize("preset", LAB_PRESETS)
def test_config_yaml_loads_to_the_same_configuration(tmp_path: Path, preset: str) -> None:
    settings = small(
        tmp_path, "lr_policy={kind: plateau, minimum: 1e-3}", "data={source: mnist, root: /data}", preset=preset
    )
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    assert run.settings() == settings
    assert run.settings().hash == settings.hash
    assert run.settings().directory == settings.directory
    assert schema.load(str(run.path / layout.CONFIG)) == settings  # as a preset of one's own


def test_a_new_run_notes_its_environment(begun: RunDirectory) -> None:
    environment = json.loads((begun.path / layout.ENVIRONMENT).read_text())
    assert environment["packages"]["torch"]
    assert begun.exists
    assert begun.result is None


def test_a_run_whose_configuration_is_not_whole_does_not_exist(begun: RunDirectory, tmp_path: Path) -> None:
    sizes = [(begun.path / name).stat().st_size for name in (layout.ENVIRONMENT, layout.CONFIG)]
    assert sizes[0] + 100 < sizes[1]
    settings = small(tmp_path / "full")
    with files_of_at_most(sizes[0] + 100), pytest.raises(InputError, match="cannot be written"):
        RunDirectory(settings.directory).start(settings, fresh=False)
    assert not RunDirectory(settings.directory).exists
    RunDirectory(settings.directory).start(settings, fresh=False)
    assert RunDirectory(settings.directory).settings() == settings


def test_an_unfinished_run_names_resume(begun: RunDirectory, settings: schema.RunConfig) -> None:
    with pytest.raises(InputError) as error:
        begun.start(settings, fresh=False)
    assert f"twinrl resume {begun.path}" in message(error)
    assert "--fresh" in message(error)


def test_a_finished_run_says_so(begun: RunDirectory, settings: schema.RunConfig) -> None:
    begun.finish({"status": "finished", "step": 12})
    with pytest.raises(InputError) as error:
        begun.start(settings, fresh=False)
    assert "finished after 12 steps" in message(error)
    assert "--fresh" in message(error)
    assert "resume" not in message(error)


def test_fresh_starts_over(begun: RunDirectory, settings: schema.RunConfig) -> None:
    begun.finish({"status": "finished", "step": 12})
    (begun.checkpoints / "step-00000012").mkdir()
    (begun.samples / "old.png").touch()
    begun.log.write_text("{}\n")
    begun.start(settings, fresh=True)
    assert begun.result is None
    assert layout.newest(begun.checkpoints) is None
    assert list(begun.samples.iterdir()) == []
    assert not begun.log.exists()


def test_fresh_keeps_the_name_of_the_mlflow_run_to_replace(begun: RunDirectory, settings: schema.RunConfig) -> None:
    (begun.path / layout.MLFLOW).write_text('{"run_id": "abc"}')
    begun.start(settings, fresh=True)
    assert (begun.path / layout.MLFLOW).read_text() == '{"run_id": "abc"}'


def test_fresh_needs_no_older_run(tmp_path: Path) -> None:
    settings = small(tmp_path)
    RunDirectory(settings.directory).start(settings, fresh=True)
    assert RunDirectory(settings.directory).exists


@pytest.mark.parametrize("left", [layout.LOG, f"{layout.CHECKPOINTS}/step-00000005", "notes.txt"])
def test_files_without_a_configuration_are_nobodys_to_delete(settings: schema.RunConfig, left: str) -> None:
    run = RunDirectory(settings.directory)
    (run.path / left).parent.mkdir(parents=True)
    run.refuse_remains()
    (run.path / layout.ENVIRONMENT).touch()  # of a process that was killed before the run existed
    (run.path / layout.LOCK).touch()
    run.refuse_remains()
    (run.path / left).touch()
    with pytest.raises(InputError, match=rf"is no run, and not empty; got {Path(left).parts[0]} .*; fix: restore"):
        run.refuse_remains()
    run.start(settings, fresh=False)
    run.refuse_remains()


@pytest.mark.parametrize("fresh", [False, True])
def test_unwritable_folder(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "file").touch()
    settings = small(tmp_path / "file" / "runs")
    with pytest.raises(InputError) as error:
        RunDirectory(settings.directory).start(settings, fresh)
    assert str(settings.directory) in message(error)
    assert "got Not a directory" in message(error)
    assert "fix: set run.dir" in message(error)
    with (
        pytest.raises(InputError, match="got Not a directory; fix: set run"),
        RunDirectory(settings.directory).locked(),
    ):
        pass


def test_a_run_that_cannot_be_deleted(
    begun: RunDirectory, settings: schema.RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.shutil, "rmtree", refuse)
    with pytest.raises(InputError, match="got Permission denied"):
        begun.start(settings, fresh=True)


def test_one_process_at_a_time(begun: RunDirectory) -> None:
    with begun.locked():
        with pytest.raises(InputError, match=r"another process is training this run: .*; fix: wait"), begun.locked():
            pass
        assert begun.exists
    with begun.locked():  # released
        pass


def test_the_lock_outlives_what_is_deleted_under_it(begun: RunDirectory, settings: schema.RunConfig) -> None:
    with begun.locked():
        begun.start(settings, fresh=True)
        with pytest.raises(InputError, match="another process"), begun.locked():
            pass
        begun.discard()
        with pytest.raises(InputError, match="another process"), begun.locked():
            pass


def refuse(run: RunDirectory, error: Exception) -> None:
    with pytest.raises(type(error), match="wrong"), run.locked():
        raise error


@pytest.mark.parametrize("error", [InputError("it is wrong"), OSError(errno.ELOOP, "wrong links")], ids=repr)
def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, begun: RunDirectory, error: Exception) -> None:
    refuse(RunDirectory(tmp_path / "new" / "runs" / "x"), error)
    assert not (tmp_path / "new").exists()
    before = sorted(begun.path.rglob("*"))
    refuse(begun, error)  # as one of an older version, which had no such file
    assert sorted(begun.path.rglob("*")) == before


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        RunDirectory(tmp_path).settings()
    assert "is not a run directory" in message(error)
    assert layout.CONFIG in message(error)


def test_no_checkpoint_yet(begun: RunDirectory) -> None:
    with pytest.raises(InputError, match="no checkpoint yet; fix: "):
        begun.newest_checkpoint()


def test_the_result_is_written_whole(begun: RunDirectory) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        begun.finish({"status": "finished", "step": 3, "fd": float("nan")})
    assert begun.result is None


def stored(settings: schema.RunConfig) -> dict[str, object]:
    config = settings.numeric() | {"seed": settings.seed}
    return {"config": json.loads(json.dumps(config)), "content_hash": "data"}


def test_an_unchanged_configuration_is_accepted(settings: schema.RunConfig, tmp_path: Path) -> None:
    runs.check_unchanged(settings, "data", stored(settings))
    elsewhere = small(tmp_path / "elsewhere", "checkpoint.every=1", "tracking.mlflow=true", "machine.device=cpu")
    runs.check_unchanged(elsewhere, "data", stored(settings))


def test_changed_keys_are_named(settings: schema.RunConfig, tmp_path: Path) -> None:
    changed = small(tmp_path, "optim.lr=1e-5", "seed=3", "terms.rectify=null", "branches.e2e=2")
    with pytest.raises(InputError) as error:
        runs.check_unchanged(changed, "data", stored(settings))
    assert "other values of branches.e2e, optim.lr, seed, terms.rectify;" in message(error)
    assert "fix: " in message(error)


def test_changed_data_are_named(settings: schema.RunConfig) -> None:
    with pytest.raises(InputError) as error:
        runs.check_unchanged(settings, "other data", stored(settings))
    assert "got content other data; expected content data; fix: restore data.root" in message(error)
