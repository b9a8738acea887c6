"""A run that was moved has one MLflow run, here; nothing is written where it was."""

import json
import shutil
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking._tracking_service import utils

from analysis.frames import load_run
from analysis.mlflow_store import log_report, mlflow_links
from tests.tracking.synthetic import make_run
from twinrl.config.errors import InputError
from twinrl.machine import known
from twinrl.tracking import store, studies
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.mlflow_view import publish
from twinrl.tracking.moved import published

pytestmark = pytest.mark.slow  # a store on disk: up to a second each


def active(folder: Path) -> list[Run]:
    """The active runs of a folder's default store."""
    client = mlflow.MlflowClient(store.default_uri(folder))
    experiments = [found.experiment_id for found in client.search_experiments()]
    return list(client.search_runs(experiments, run_view_type=ViewType.ACTIVE_ONLY))


def artifacts(run: Run) -> Path:
    """Where MLflow has the files of a run."""
    return Path(unquote(urlsplit(run.info.artifact_uri or "").path))


@pytest.fixture
def other(tmp_path: Path, empty_store: Path) -> Path:
    """Another folder for runs, with an empty store."""
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    return folder


@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
def test_with_its_store(runs: Path, named: bool) -> None:
    """Also where the store's place had been given, as studies do."""
    run = make_run(runs, rows=20)
    first = publish(run, store.default_uri(runs) if named else None)
    moved = runs.rename(runs.with_name("a new place"))
    utils._artifact_repos_cache.clear()  # type: ignore[attr-defined]  # as in another process
    (moved / run.name / "samples" / "1nfe_000000.png").touch()
    assert studies.located(str(moved / run.name), None) == (store.default_uri(moved), None)
    assert published(moved / run.name) is not None
    assert publish(moved / run.name, final=True) == first
    (shown,) = active(moved)
    assert shown.info.run_id == first
    assert artifacts(shown).is_relative_to(moved)
    assert (artifacts(shown) / "samples" / "1nfe_000000.png").is_file()
    assert not runs.exists()


def test_without_its_store(runs: Path, other: Path) -> None:
    run = make_run(runs, rows=20)
    publish(run)
    moved = other / "renamed"
    run.rename(moved)
    utils._artifact_repos_cache.clear()  # type: ignore[attr-defined]
    assert mlflow_links([load_run(moved)]) == []
    assert log_report([load_run(moved)], moved, "report") is None
    second = publish(moved)
    assert active(runs) == []
    (shown,) = active(other)
    assert shown.info.run_id == second
    assert artifacts(shown).is_relative_to(other)
    assert publish(moved) == second


def test_without_the_store_that_was_named_and_is_gone(runs: Path, other: Path, empty_store: Path) -> None:
    run = make_run(runs, rows=20)
    (other / "named").mkdir()
    named = store.default_uri(other / "named")
    shutil.copy(empty_store, other / "named")
    publish(run, named)
    shutil.rmtree(other / "named")
    before = (run.rename(other / run.name) / "mlflow.json").read_bytes()
    with pytest.raises(InputError, match=r"which has the run that was moved to .*, is gone; fix: name its new place"):
        publish(other / run.name)
    assert (other / run.name / "mlflow.json").read_bytes() == before
    assert not (other / "named").exists()


@pytest.mark.parametrize("home", ["/home/somebody/runs/else", None, "here"])
def test_a_server_that_this_user_has_never_named_is_not_asked(
    runs: Path, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be sent this user's token. Where the run lies now anybody may have guessed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(known, "place", lambda: runs / "servers")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = make_run(runs, rows=20)
        state = ViewState.load(run)
        state.asked_for = state.store = uri
        state.run_id = "a" * 32
        state.save()
        if home != "here":
            text = (run / "mlflow.json").read_text()
            (run / "mlflow.json").write_text(text.replace(json.dumps(str(run)), json.dumps(home)))
        strange = f"names the MLflow store {uri}, which you have not named yet; fix: name it with --tracking-uri"
        with pytest.raises(InputError, match=strange):
            publish(run)
        with pytest.raises(InputError, match=strange):
            studies.located(str(run), None)
        assert mlflow_links([load_run(run)]) == []
        assert log_report([load_run(run)], run, "report") is None
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert studies.located(str(run), uri) == (uri, None)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert studies.located(str(run), None) == (uri, None)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        known.note(uri)
        assert studies.located(str(run), None) == (uri, None)


def test_a_server_that_was_named_once_is_known_to_all_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "place", lambda: runs / "servers")
    with pytest.raises(InputError, match="cannot be reached"):
        publish(make_run(runs, rows=20), "http://127.0.0.1:9")
    assert known.has("http://127.0.0.1:9")


@pytest.mark.parametrize("where", ["runs", "other"])
def test_a_copy_leaves_the_original_alone(runs: Path, other: Path, where: str) -> None:
    run = make_run(runs, rows=20)
    first = publish(run)
    copy = shutil.copytree(run, (runs if where == "runs" else other) / "copy")
    assert log_report([load_run(copy)], copy, "report") is None
    second = publish(copy)
    assert second != first
    assert publish(run) == first
    assert {shown.info.run_id for shown in (*active(runs), *active(other))} == {first, second}


def test_a_copy_with_its_store_keeps_its_mlflow_run(runs: Path) -> None:
    run = make_run(runs, rows=20)
    first = publish(run)
    copy = shutil.copytree(runs, runs.with_name("copy"))
    assert publish(copy / run.name) == first
    assert [artifacts(shown).is_relative_to(copy) for shown in active(copy)] == [True]
    assert [artifacts(shown).is_relative_to(runs) for shown in active(runs)] == [True]


def test_a_state_of_an_older_version_is_found_again(runs: Path) -> None:
    run = make_run(runs, rows=20)
    first = publish(run)
    moved = runs.rename(runs.with_name("moved")) / run.name
    state = ViewState.load(moved)
    state.save()
    text = (moved / "mlflow.json").read_text()
    (moved / "mlflow.json").write_text(text.replace(f'"home": "{moved}"', '"home": null'))
    assert ViewState.load(moved).home is None
    assert publish(moved) == first
