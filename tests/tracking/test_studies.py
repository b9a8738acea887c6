"""Where ``twinrl ui`` opens: the store and the page that its argument stands for."""

import io
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.synthetic import make_run
from twinrl.config.errors import InputError
from twinrl.machine import known
from twinrl.tracking import store, studies, ui
from twinrl.tracking.mlflow_state import ViewState

PAGE = "/#/experiments/1/runs?viewStateShareKey=first-norms"


@pytest.fixture
def shown(tmp_path: Path, empty_store: Path) -> str:
    """A store in which the study ``first`` was published twice, and a run of another kind."""
    shutil.copy(empty_store, tmp_path)
    uri = store.default_uri(tmp_path)
    client = store.connect(uri)
    experiment = client.create_experiment(studies.EXPERIMENT)
    for start, page in enumerate(["/#/metric?runs=[]", PAGE]):
        tags = {"level": "study", "study": "first", "compare": f"http://127.0.0.1:5000{page}"}
        client.create_run(experiment, tags=tags, start_time=1 + start)
    client.create_run(experiment, tags={"level": "arm", "study": "other", "compare": "http://elsewhere/#/x"})
    return uri


@pytest.mark.slow
def test_the_newest_page_of_a_study_is_found(shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.pages(shown) == {"first": PAGE}
    assert studies._of_server(shown) == studies._of_sqlite(store.sqlite_path(shown) or Path())
    assert studies.page_of("first", studies.pages(shown), shown) == PAGE
    with pytest.raises(InputError, match=r"no study secnod; expected one of first; fix: twinrl ablate run secnod"):
        ui.serve(shown, study="secnod")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_store_that_nobody_used_has_no_studies(tmp_path: Path, empty_store: Path) -> None:
    assert studies.pages(f"sqlite:///{empty_store}") == {}
    (tmp_path / "empty.db").touch()
    assert studies.pages(f"sqlite:///{tmp_path}/empty.db") == {}
    assert studies.pages(f"sqlite:///{tmp_path}/gone.db") == {}
    (tmp_path / "text.db").write_text("no database " * 1000)
    with pytest.raises(InputError, match="can't be read; got file is not a database"):
        studies.pages(f"sqlite:///{tmp_path}/text.db")


def test_an_argument_is_a_folder_of_runs_or_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("work/studies/mine").mkdir(parents=True)
    Path("named.yaml").write_text("name: theirs\n")
    own, workspace = store.default_uri(Path("work")), store.default_uri(studies.WORKSPACE)
    assert studies.located("work", None) == (own, None)
    assert studies.located("work/studies/mine", None) == (own, "mine")
    assert studies.located("runs", None) == (store.default_uri(Path("runs")), None)
    assert studies.located("./gone", None) == (store.default_uri(Path("gone")), None)
    assert studies.located("mine", None) == (workspace, "mine")
    assert studies.located("named.yaml", None) == (workspace, "theirs")
    assert studies.located("mine", "http://there:1") == ("http://there:1", "mine")


def test_a_run_is_shown_where_it_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path / "runs", rows=3)
    assert studies.located(str(run), None) == (store.default_uri(tmp_path / "runs"), None)
    published = ViewState.load(run)
    published.store = "http://elsewhere:1"
    published.save()
    monkeypatch.setattr(known, "has", lambda address: address == "http://elsewhere:1")
    assert studies.located(str(run), None) == ("http://elsewhere:1", None)
    assert studies.located(str(run), "http://there:1") == ("http://there:1", None)


def test_a_page_is_opened_where_there_is_a_screen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not ui._has_screen()
    monkeypatch.setenv("DISPLAY", ":0")
    assert ui._has_screen()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert not ui._has_screen()


def test_a_store_s_password_is_on_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on the machine can read those; what the server complains of is in the error."""
    started: dict[str, Any] = {}

    class Ended:
        pid, stdin = 0, io.BytesIO()

        def __init__(self, command: list[str], *, env: dict[str, str], stderr: Any, **_: object):
            started.update(command=command, env=env)
            stderr.write(b"Error: no postgresql://me:pw-handed@h/db")

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(ui.subprocess, "Popen", Ended)
    with pytest.raises(InputError, match=r"did not start; got Error: no postgresql://me:\*\*\*@h/db"):
        ui.Server("postgresql://me:pw-handed@h/db", port=0)
    assert "pw-handed" not in " ".join(started["command"])
    assert started["env"][ui.STORE] == "postgresql://me:pw-handed@h/db"


def test_the_server_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the environment's would look for it on a machine of its own."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.0 200 OK\r\n\r\n"))
        thread.start()
        ui.DIRECT.open(f"http://127.0.0.1:{server.getsockname()[1]}/health", timeout=10).close()
        thread.join()


@pytest.mark.parametrize(("port", "shown"), [(5000, ":5000"), (80, "")])
def test_addresses_are_as_browsers_write_them(port: int, shown: str) -> None:
    assert ui._addresses("127.0.0.1", port) == [f"127.0.0.1{shown}", f"localhost{shown}"]
