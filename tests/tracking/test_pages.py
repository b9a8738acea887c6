"""The MLflow pages of a published run, opened in a real browser against a real server."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import pytest

from tests.tracking.pages import WAIT_SECONDS, drawn, keep_screenshot, wait_for
from tests.tracking.synthetic import SPIKE_AT, TERMS, make_run
from twinrl.config.errors import InputError
from twinrl.tracking import ui
from twinrl.tracking.mlflow_view import publish

EMPTY_WAIT_SECONDS = 5


def assert_as_stored(published: dict[str, Any], curves: dict[str, Any], metrics: list[str]) -> None:
    """The drawn curves of the first run have the points that the store has."""
    run_id, name = published["runs"][0], published["directories"][0].name
    history = mlflow.MlflowClient(published["uri"])
    for metric in metrics:
        stored = sorted((p.step, p.value) for p in history.get_metric_history(run_id, metric))
        assert list(zip(*curves[f"{name} ({metric})"], strict=True)) == stored


def page_text(browser: Any) -> str:
    return " ".join(browser.execute_script("return document.body.innerText").split())


def experiment_of(published: dict[str, Any]) -> str:
    return mlflow.MlflowClient(published["uri"]).get_run(published["runs"][0]).info.experiment_id


@pytest.mark.campaign
@pytest.mark.browser
def test_run_page_draws_every_curve_with_its_spike(browser: Any, server: ui.Server, published: dict[str, Any]) -> None:
    run_id, run_dir = published["runs"][0], published["directories"][0]
    browser.get(ui.run_url(server.url, experiment_of(published), run_id))
    metrics = mlflow.MlflowClient(published["uri"]).get_run(run_id).data.metrics
    expected = {f"{run_dir.name} ({name})" for name in metrics}
    wait_for(lambda: expected <= set(drawn(browser)))
    curves = drawn(browser)
    keep_screenshot(browser, "run-curves")
    assert expected == set(curves)
    assert_as_stored(published, curves, ["loss/total", "grad/total/norm_raw", "val/quality"])
    assert (SPIKE_AT, 1000) in zip(*curves[f"{run_dir.name} (grad/total/norm_raw)"], strict=True)


@pytest.mark.campaign
@pytest.mark.browser
def test_run_page_groups_metrics_by_prefix_and_lists_them(
    browser: Any, server: ui.Server, published: dict[str, Any]
) -> None:
    browser.get(ui.run_url(server.url, experiment_of(published), published["runs"][0]))
    sections = ["loss (4)", "val (2)", "samples (1)", *(f"grad/{term} (2)" for term in TERMS)]
    wait_for(lambda: all(section in page_text(browser) for section in sections))
    text = page_text(browser)
    assert [section for section in sections if section not in text] == []
    browser.get(ui.run_url(server.url, experiment_of(published), published["runs"][0], tab=""))
    wait_for(lambda: "config_hash" in page_text(browser) and "loss/rectify" in page_text(browser))
    keep_screenshot(browser, "run-overview")
    for word in ("loss/rectify", "nonfinite/delta_v/rms", "config_hash", "0a1b2c3d", "optim.lr", "Finished"):
        assert word in page_text(browser)


@pytest.mark.campaign
@pytest.mark.browser
def test_a_run_without_metrics_shows_no_curve(browser: Any, server: ui.Server, published: dict[str, Any]) -> None:
    browser.get(ui.run_url(server.url, experiment_of(published), published["empty"]))
    wait_for(lambda: "empty-0a1b2c3d-s0" in page_text(browser))
    assert not wait_for(lambda: drawn(browser), EMPTY_WAIT_SECONDS)
    keep_screenshot(browser, "run-empty")


@pytest.mark.campaign
@pytest.mark.browser
@pytest.mark.parametrize(
    ("tab", "size"),
    [
        pytest.param("artifacts/samples/1nfe_001000.png", [320, 256], id="as a file"),
        pytest.param("model-metrics", [256, 204], id="as a preview among the charts"),
    ],
)
def test_sample_grid_is_shown(
    browser: Any, server: ui.Server, published: dict[str, Any], tab: str, size: list[int]
) -> None:
    browser.get(ui.run_url(server.url, experiment_of(published), published["runs"][0], tab))

    def grid_is_shown() -> bool:
        return size in browser.execute_script(
            "return [...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
        )

    wait_for(grid_is_shown)
    keep_screenshot(browser, f"sample-grid-{tab.split('/')[0]}")
    assert grid_is_shown()


@pytest.mark.slow
@pytest.mark.browser
def test_compare_page_overlays_runs(browser: Any, server: ui.Server, published: dict[str, Any]) -> None:
    metrics = ["grad/total/norm_raw", "loss/total"]
    browser.get(ui.compare_url(server.url, experiment_of(published), published["runs"], metrics, log_scale=True))
    expected = {f"{run.name} ({name})" for run in published["directories"][:2] for name in metrics}
    wait_for(lambda: expected <= set(drawn(browser)))
    keep_screenshot(browser, "compare")
    curves = drawn(browser)
    assert expected == set(curves)
    assert all(max(steps) == 1999 for steps, _ in curves.values())
    assert_as_stored(published, curves, metrics)
    for run in published["directories"][:2]:
        assert (SPIKE_AT, 1000) in zip(*curves[f"{run.name} (grad/total/norm_raw)"], strict=True)


@pytest.mark.slow
def test_publishing_over_http_is_as_good_and_keeps_files_beside_the_store(
    server: ui.Server, published: dict[str, Any], tmp_path: Path
) -> None:
    run = make_run(tmp_path, rows=300, name="remote")
    for _ in range(2):
        run_id = publish(run, server.url, experiment="remote", final=True)
    remote = mlflow.MlflowClient(server.url)
    history = remote.get_metric_history(run_id, "opt/lr")
    assert len(history) == len({(p.step, p.value) for p in history}) > 100
    assert remote.get_run(run_id).info.status == "FINISHED"
    kept = Path(published["uri"].removeprefix("sqlite:///")).parent / "mlartifacts"
    copies = list(kept.rglob(f"{run_id}/artifacts/samples/1nfe_000000.png"))
    assert [copy.read_bytes() for copy in copies] == [(run / "samples/1nfe_000000.png").read_bytes()]
    assert len(remote.list_artifacts(run_id, "images")) == 4


def answer(url: str, **headers: str) -> int:
    """The status of a search for experiments."""
    request = Request(f"{url}/api/2.0/mlflow/experiments/search", b'{"max_results": 1}', headers)
    try:
        with urlopen(request, timeout=WAIT_SECONDS) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_server_answers_to_its_own_addresses_alone(server: ui.Server) -> None:
    json = {"Content-Type": "application/json"}
    port = server.url.rsplit(":", 1)[1]
    assert answer(server.url, **json) == 200
    assert answer(server.url, **json, Host=f"localhost:{port}", Origin=server.url) == 200
    for host in ("10.evil.example", "192.168.1.1.evil.example", f"localhost:{int(port) + 1}"):
        assert answer(server.url, **json, Host=host) == 403
    assert answer(server.url, **json, Origin="http://localhost:1") == 403


@pytest.mark.campaign
def test_the_server_ends_with_its_starter(published: dict[str, Any]) -> None:
    program = (
        "import sys, time; from twinrl.tracking import ui\n"
        "print(ui.Server(sys.argv[1], port=0).url, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program, published["uri"]], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    url = starter.stdout.readline().strip()
    assert answer(url, **{"Content-Type": "application/json"}) == 200
    starter.kill()
    starter.wait()
    host, port = url.removeprefix("http://").split(":")

    def gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) != 0

    assert wait_for(gone, 20)


def test_missing_store_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no MLflow store .*mlflow\.db; fix: train a run first"):
        ui.Server(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_server_that_cannot_start_repeats_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "print('to stdout'); raise ValueError('no such database')"
    monkeypatch.setattr(ui, "_command", lambda *_: [sys.executable, "-c", complaint])
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(InputError, match=r"did not start; got ValueError: no such database"):
        ui.Server(f"sqlite:///{tmp_path}/mlflow.db", port=0)


def test_the_server_finds_no_modules_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a run of somebody else's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ui, "_command", lambda *_: [sys.executable, "-c", "import brought"])
    for name in ("brought.py", "mlflow.db"):
        Path(name).touch()
    with pytest.raises(InputError, match=r"did not start; got ModuleNotFoundError: No module named 'brought'"):
        ui.Server("sqlite:///mlflow.db", port=0)


@pytest.mark.campaign
def test_server_over_what_is_no_database_repeats_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 1000)
    with pytest.raises(InputError, match=r"did not start; got .*database"):
        ui.Server(f"sqlite:///{tmp_path}/mlflow.db", port=0)


def test_taken_port_is_replaced() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.available_port(port) not in (port, 0)
    assert ui.available_port(port) == port


def test_serving_a_server_only_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.serve("http://example.org:5000") == 0
    assert "http://example.org:5000" in capsys.readouterr().out
