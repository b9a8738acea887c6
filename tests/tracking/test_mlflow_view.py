"""The MLflow view equals the thinned log, exactly once, whatever happened on the way."""

import json
import logging
import math
import os
import re
import shutil
import socket
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from tests import forked
from tests.disk import another_user, files_of_at_most, open_folder
from tests.tracking.synthetic import SPIKE_AT, make_row, make_run
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import layout, names, runlog
from twinrl.run.runlog import RunLog
from twinrl.stability.events import Event
from twinrl.tracking import store
from twinrl.tracking.mlflow_run import MlflowRun, flatten
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.mlflow_view import MLflowView, publish
from twinrl.tracking.thinning import Thinner

pytestmark = pytest.mark.slow  # a store on disk: up to a second each

Curves = dict[str, list[tuple[int, float]]]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def client(run: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store.default_uri(run.parent))


def active_runs(run: Path) -> list[Any]:
    found = client(run).search_experiments()
    return client(run).search_runs([e.experiment_id for e in found], run_view_type=ViewType.ACTIVE_ONLY)


def curves_in_mlflow(run: Path) -> Curves:
    """Every stored point of the only active run; duplicates would show."""
    (shown,) = active_runs(run)
    history = {name: client(run).get_metric_history(shown.info.run_id, name) for name in shown.data.metrics}
    return {name: sorted((p.step, p.value) for p in points) for name, points in history.items()}


def curves_in_log(run: Path, total: int, final: bool = True) -> Curves:
    """What the view should show."""
    thinner = Thinner(total)
    points = [point for row in runlog.read(run / "log.jsonl") for point in thinner.feed(row)]
    curves = defaultdict(list)
    for point in points + (thinner.flush() if final else []):
        curves[point.name].append((point.iteration, point.value))
    return {name: sorted(points) for name, points in curves.items()}


def append(run: Path, start: int, stop: int, shift: float = 0.0) -> int:
    """Rows start…stop−1, their losses moved by ``shift``; returns the log's length."""
    with RunLog(run / "log.jsonl") as log:
        for iteration in range(start, stop):
            row = make_row(iteration)
            log.append(row | {"loss/total": float(row["loss/total"]) + shift})  # type: ignore[arg-type]
        return log.sync()


def break_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, calls: int = 1) -> None:
    """Let call number ``calls`` of a method raise after doing its work, then behave again."""
    original, count = getattr(owner, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = original(*args, **kwargs)
        if count == calls:
            raise error
        return result

    monkeypatch.setattr(owner, name, broken)


def test_publishing_at_checkpoints_equals_publishing_at_once_and_repeating_adds_nothing(runs: Path) -> None:
    run = make_run(runs, rows=0)
    view = MLflowView(run, total=2000)
    for start in range(0, 2000, 400):
        assert view.publish_through(append(run, start, start + 400))
    assert view.close()
    expected = curves_in_log(run, total=2000)
    assert curves_in_mlflow(run) == expected
    assert (SPIKE_AT, 1000.0) in expected["grad/total/norm_raw"]
    assert expected["nonfinite/delta_v/rms"][-1] == (1500, 3.0)
    for _ in range(2):
        publish(run, final=True)
    assert curves_in_mlflow(run) == expected


def test_only_durable_rows_are_published(runs: Path) -> None:
    run = make_run(runs, rows=0)
    durable = append(run, 0, 50)
    append(run, 50, 80)
    MLflowView(run, total=100).publish_through(durable)
    assert max(step for step, _ in curves_in_mlflow(run)["loss/total"]) in range(30, 50)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        pytest.param(mlflow.MlflowClient, "create_run", 1, id="before the run's id was kept"),
        pytest.param(mlflow.MlflowClient, "log_batch", 4, id="between two batches of points"),
        pytest.param(mlflow.MlflowClient, "log_artifact", 1, id="between two files"),
        pytest.param(MlflowRun, "log_files", 2, id="before the bookkeeping"),
    ],
)
def test_no_duplicates_after_a_kill(
    runs: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    run = make_run(runs, rows=600)
    lengths = [append(run, 600, 800), append(run, 800, 1000)]

    def publish_twice() -> None:
        view = MLflowView(run, total=1000)
        for length in lengths:
            assert view.publish_through(length)

    with monkeypatch.context() as patch:
        break_once(patch, owner, name, Killed(), calls)
        with pytest.raises(Killed):
            publish_twice()
    publish_twice()
    assert MLflowView(run, total=1000).close()
    assert curves_in_mlflow(run) == curves_in_log(run, total=1000)


def test_resuming_from_the_checkpoint_continues_the_same_mlflow_run(runs: Path) -> None:
    run = make_run(runs, rows=0)
    checkpoint = append(run, 0, 500)
    first = MLflowView(run, total=1000)
    first.publish_through(checkpoint)
    append(run, 500, 640)
    with RunLog(run / "log.jsonl") as log:
        log.trim(checkpoint)
    append(run, 500, 1000)
    second = MLflowView(run, total=1000)
    assert second.close()
    assert second.run_id == first.run_id
    assert curves_in_mlflow(run) == curves_in_log(run, total=1000)


def test_a_log_that_was_rewritten_replaces_the_mlflow_run(runs: Path) -> None:
    run = make_run(runs, rows=0)
    checkpoint = append(run, 0, 500)
    append(run, 500, 1000)
    first = publish(run)
    with RunLog(run / "log.jsonl") as log:
        log.trim(checkpoint)
    append(run, 500, 1000, shift=0.25)
    assert publish(run, final=True) != first
    assert curves_in_mlflow(run) == curves_in_log(run, total=1000)


def test_a_fresh_start_under_another_plan_replaces_the_mlflow_run(runs: Path) -> None:
    run = make_run(runs, rows=0)
    append(run, 0, 300)
    first = MLflowView(run, total=300)
    first.close()
    (run / "log.jsonl").unlink()
    append(run, 0, 600, shift=1.0)
    second = MLflowView(run, total=600)
    assert second.close()
    assert second.run_id != first.run_id
    assert curves_in_mlflow(run) == curves_in_log(run, total=600)


def test_a_replacement_that_was_killed_leaves_one_run_in_the_end(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, rows=300)
    publish(run, final=True)
    (run / "log.jsonl").unlink()
    append(run, 0, 300, shift=1.0)
    with monkeypatch.context() as patch:
        break_once(patch, ViewState, "start_over", Killed())
        with pytest.raises(Killed):
            publish(run)
    publish(run, final=True)
    assert curves_in_mlflow(run) == curves_in_log(run, total=300)


@pytest.mark.parametrize("published", ["at its end", "later"])
def test_an_interrupted_run_leaves_its_last_stretch_open(runs: Path, published: str) -> None:
    run = make_run(runs, rows=0)
    (run / "result.json").unlink()
    view = MLflowView(run, total=1000)
    assert view.publish_through(append(run, 0, 400))
    append(run, 400, 503)
    if published == "later":
        publish(run, final=True)
    else:
        assert view.close("KILLED")
    assert active_runs(run)[0].info.status == "KILLED"
    append(run, 503, 1000)
    assert MLflowView(run, total=1000).publish_through(runlog_length(run))
    assert active_runs(run)[0].info.status == "RUNNING"
    assert MLflowView(run, total=1000).close("FINISHED")
    assert active_runs(run)[0].info.status == "FINISHED"
    assert curves_in_mlflow(run) == curves_in_log(run, total=1000)


def runlog_length(run: Path) -> int:
    return (run / "log.jsonl").stat().st_size


def test_run_is_described(runs: Path) -> None:
    run = make_run(runs, rows=100, seed=3)
    publish(run, experiment="study-a", tags={"study": "a", "arm": "corrected"}, final=True)
    (shown,) = active_runs(run)
    assert shown.info.run_name == run.name
    assert shown.data.params == flatten(yaml.safe_load((run / "config.yaml").read_text()))
    expected = {"study": "a", "arm": "corrected", "name": "twinflow", "seed": "3", "config_hash": "0a1b2c3d"}
    assert expected.items() <= shown.data.tags.items()
    assert client(run).get_experiment(shown.info.experiment_id).name == "study-a"
    artifacts = {file.path for file in client(run).list_artifacts(shown.info.run_id, "samples")}
    assert artifacts == {"samples/1nfe_000000.png", "samples/1nfe_001000.png"}
    steps = {Path(f.path).name.split("+timestamp")[0] for f in client(run).list_artifacts(shown.info.run_id, "images")}
    assert steps == {"samples~1nfe+step+0", "samples~1nfe+step+1000"}
    copy = client(run).download_artifacts(shown.info.run_id, "samples/1nfe_000000.png")
    assert Path(copy).read_bytes() == (run / "samples/1nfe_000000.png").read_bytes()


def write_log(run: Path, **series: list[float]) -> None:
    """A log of these series, one value a step."""
    steps = range(1, 1 + max(map(len, series.values())))
    with runlog.RunLog(run / layout.LOG) as log:
        log.trim(0)
        for step in steps:
            values = {name: values[step - 1] for name, values in series.items() if step <= len(values)}
            log.append({"iteration": step - 1, "step": step, **values})


def event_line(step: int, kind: str, message: str) -> dict[str, object]:
    """What a run writes of an event."""
    return Event(step, step - 1, kind, (), (), message).as_dict()


def test_events_become_tags_and_a_failure_says_when_how_and_why(runs: Path) -> None:
    run = make_run(runs, rows=8)
    spikes = [event_line(step, "spike", "spike of grad/base/norm_raw") for step in (3, 5)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in spikes))
    publish(run)
    assert tags_of(run) == {"events.spike": "2", "diverged": "false"}
    write_log(run, **{names.LOSS_TOTAL: [1.0] * 6 + [math.nan] * 4})
    publish(run)
    assert tags_of(run) == {
        "events.spike": "2",
        "diverged": "true",
        "diverged.step": "7",
        "diverged.after": "6",
        "diverged.kind": "nonfinite",
        "diverged.recovered": "false",
        "diverged.why": "non-finite loss/total at step 7",
    }
    files = {file.path for file in client(run).list_artifacts(active_runs(run)[0].info.run_id)}
    assert "events.jsonl" in files


def test_a_failure_that_a_rollback_took_back_is_counted_and_no_verdict(runs: Path) -> None:
    run = make_run(runs, rows=8)
    write_log(run, **{names.LOSS_TOTAL: [1.0] * 6 + [math.nan]})
    fell = event_line(7, "diverged", "non-finite loss/total")
    (run / "events.jsonl").write_text(json.dumps(fell) + "\n")
    publish(run)
    assert tags_of(run)["diverged.step"] == "7"
    with runlog.RunLog(run / layout.LOG) as log:
        for iteration in range(7, 12):
            log.append({"iteration": iteration, "step": iteration - 2, names.LOSS_TOTAL: 1.0})
    publish(run)
    assert tags_of(run) == {"events.diverged": "1", "diverged": "false"}


def test_no_number_from_before_a_run_broke_ranks_it(runs: Path) -> None:
    """The loss is nan from step 2 on; the other run's quality was measured last before its loss became nan."""
    series = {
        "healthy": {names.LOSS_TOTAL: [1.7] * 8, names.VAL_QUALITY: [50.0] * 8},
        "exploded": {names.LOSS_TOTAL: [1.26] + [math.nan] * 7, names.VAL_QUALITY: [49.0]},
        "stopped": {names.LOSS_TOTAL: [1.3] * 7 + [math.inf], names.VAL_QUALITY: [48.0] * 5},
    }
    for name, values in series.items():
        run = make_run(runs, rows=8, name=name)
        (run / "config.yaml").write_text(f"name: {name}\ntrain: {{steps: 8}}\n")
        write_log(run, **values)
        for _ in range(2):
            publish(run, final=True)
    found = {run.data.tags["name"]: run for run in active_runs(run)}
    assert {name: run.info.status for name, run in found.items()} == {
        "healthy": "FINISHED", "exploded": "FAILED", "stopped": "FAILED",
    }  # fmt: skip
    mlflow, where = client(run), [found["healthy"].info.experiment_id]
    for metric in (names.LOSS_TOTAL, names.VAL_QUALITY):
        for way in ("ASC", "DESC"):
            ranked = mlflow.search_runs(where, order_by=[f"metrics.`{metric}` {way}"])
            assert ranked[0].data.tags["name"] == "healthy", (metric, way)
        assert all(math.isnan(found[name].data.metrics[metric]) for name in ("exploded", "stopped"))
        (only,) = mlflow.search_runs(where, f"metrics.`{metric}` < 1000")
        assert only.data.tags["name"] == "healthy"


def tags_of(run: Path) -> dict[str, str]:
    """Those of the events."""
    tags = active_runs(run)[0].data.tags
    return {name: value for name, value in tags.items() if name.startswith(("events.", "diverged"))}


def test_step_images_are_shown_once_after_publishing_again(runs: Path) -> None:
    run = make_run(runs, rows=10)
    for _ in range(2):
        publish(run)
    (shown,) = active_runs(run)
    assert len(client(run).list_artifacts(shown.info.run_id, "images")) == 4  # two steps, full and preview


def test_a_view_that_was_thrown_away_is_built_again_from_the_run_directory(runs: Path) -> None:
    run = make_run(runs)
    first = publish(run, experiment="study-a", tags={"arm": "x"}, final=True)
    before, (old,) = curves_in_mlflow(run), active_runs(run)
    client(run).delete_run(first)
    second = publish(run, final=True)
    (new,) = active_runs(run)
    assert new.info.run_id == second != first
    assert curves_in_mlflow(run) == before
    assert new.info.experiment_id == old.info.experiment_id
    assert new.data.params == old.data.params
    assert new.data.tags["arm"] == "x"
    assert (new.info.start_time, new.info.end_time) == (old.info.start_time, old.info.end_time)


def test_published_after_mlflow_was_away_all_along(runs: Path) -> None:
    run = make_run(runs, rows=0)
    append(run, 0, 333)
    (run / "result.json").write_text('{"status": "diverged", "step": 8}')
    view = MLflowView(run, uri=f"http://127.0.0.1:{closed_port()}", tags={"arm": "x"}, experiment="a", total=600)
    assert not view.close("FAILED")
    publish(run, store.default_uri(runs), final=True)
    (shown,) = active_runs(run)
    assert shown.info.status == "FAILED"
    assert shown.data.tags["arm"] == "x"
    assert curves_in_mlflow(run)["loss/total"][-1][0] == 332


def test_a_store_that_lost_the_run_gets_all_of_it_again(runs: Path, empty_store: Path) -> None:
    run = make_run(runs, rows=300)
    publish(run)
    shutil.copy(empty_store, runs)
    publish(run, final=True)
    assert curves_in_mlflow(run) == curves_in_log(run, total=300)


def test_moving_to_another_store_publishes_all_of_it_there(runs: Path, tmp_path: Path, empty_store: Path) -> None:
    run = make_run(runs, rows=300)
    publish(run)
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(empty_store, other)
    publish(run, tracking_uri=store.default_uri(other), final=True)
    moved = mlflow.MlflowClient(store.default_uri(other))
    (shown,) = moved.search_runs([moved.get_experiment_by_name("twinrl").experiment_id])
    assert len(moved.get_metric_history(shown.info.run_id, "opt/lr")) == len(curves_in_log(run, 300)["opt/lr"])
    assert publish(run, final=True) == shown.info.run_id  # the store is remembered


def test_environment_variable_names_the_store(
    runs: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.default_uri(tmp_path))
    run = make_run(runs, rows=10)
    publish(run)
    assert not active_runs(run)
    assert ViewState.load(run).store == store.default_uri(tmp_path)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg2"])
def test_unreachable_server_costs_one_warning(runs: Path, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    run = make_run(runs, rows=10)
    view = MLflowView(run, uri=f"{scheme}://127.0.0.1:{closed_port()}/db")
    with caplog.at_level(logging.INFO):
        assert [view.publish_through(runlog_length(run)) for _ in range(5)] == [False] * 5
        assert view.close() is False
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"twinrl publish {run}" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_silent_server_costs_one_short_wait(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = make_run(runs, rows=10)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        view = MLflowView(run, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not view.publish_through(runlog_length(run))
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # it did not try again
            silent.accept()


def test_locked_database_costs_one_warning_and_is_caught_up(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "STORE_PATIENCE_SECONDS", 0.1)
    run = make_run(runs, rows=0)
    view = MLflowView(run, total=300)
    with closing(sqlite3.connect(runs / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert not view.publish_through(append(run, 0, 100))
        assert not view.publish_through(append(run, 100, 200))
    assert len(caplog.records) == 1
    append(run, 200, 300)
    assert view.close()
    assert curves_in_mlflow(run) == curves_in_log(run, total=300)


def test_store_failing_half_way_is_caught_up_without_duplicates(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(runs, rows=600)
    view = MLflowView(run, total=600)
    break_once(monkeypatch, mlflow.MlflowClient, "log_batch", MlflowException("server went away"), calls=4)
    assert not view.publish_through(runlog_length(run))
    assert "server went away" in caplog.text
    assert not view.publish_through(runlog_length(run))  # it tries again at the end
    assert view.close()
    assert curves_in_mlflow(run) == curves_in_log(run, total=600)


def test_broken_database_and_unwritable_place_do_not_raise(runs: Path, tmp_path: Path) -> None:
    run = make_run(runs, rows=10)
    (tmp_path / "broken.db").write_text("this is no database, and long enough to be taken for one" * 100)
    (tmp_path / "file").touch()
    other = make_run(runs, rows=10, seed=1)
    (other / "config.yaml").write_text("a: [")
    assert not MLflowView(other).close()
    for place in ("broken.db", "file/mlflow.db"):
        assert not MLflowView(run, uri=f"sqlite:///{tmp_path / place}").close()


def test_commands_say_what_is_wrong(runs: Path) -> None:
    with pytest.raises(InputError, match=r"has no log\.jsonl"):
        publish(runs / "absent")
    run = make_run(runs, rows=10)
    with pytest.raises(InputError, match="MLflow cannot be reached"):
        publish(run, tracking_uri=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ValueError, match="status"):
        MLflowView(run).close("DONE")


def test_nothing_global_stays_changed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {name: logging.getLogger(name).level for name in store.CHATTY_LOGGERS}
    publish(make_run(runs, rows=10))
    assert {name: logging.getLogger(name).level for name in store.CHATTY_LOGGERS} == levels
    with store.impatient():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert not set(store.IMPATIENT) & set(os.environ)


def test_flattened_configuration_fits_mlflow() -> None:
    config = {"a": {"b": 1, "c": [1, {"d": None}]}, "e": {}, "f": "text", "g": True, "key (odd)": "x" * 7000}
    flat = flatten(config)
    (odd,) = (name for name in flat if name.startswith("key"))
    assert flat["a.b"] == "1"
    assert flat["a.c"] == '[1, {"d": null}]'
    assert flat["e"] == "{}"
    assert flat["f"] == "text"
    assert flat["g"] == "true"
    assert re.fullmatch(r"key _odd_\.[0-9a-f]{8}", odd)
    assert len(flat[odd]) == 6000
    assert flatten({}) == {}


def test_names_that_mlflow_would_cut_or_change_alike_stay_apart(runs: Path) -> None:
    long = "terms." + 260 * "x"
    config = {long + "a": 1, long + "b": 2, "a+b": 3, "a*b": 4, "a_b": 5}
    flat = flatten(config)
    assert sorted(flat.values()) == ["1", "2", "3", "4", "5"]
    assert max(map(len, flat)) == 250
    run = make_run(runs, rows=8)
    (run / "config.yaml").write_text(json.dumps(config | {"train": {"steps": 8}}))
    write_log(run, **{f"loss/{long}a": [1.0] * 8, f"loss/{long}b": [2.0] * 8})
    publish(run, final=True)
    (shown,) = active_runs(run)
    assert flat.items() <= shown.data.params.items()
    assert sorted(shown.data.metrics.values()) == [1.0, 2.0]


@pytest.mark.parametrize("made", [Path.mkdir, os.mkfifo])
def test_what_is_no_picture_is_not_published(runs: Path, made: Callable[[Path], None]) -> None:
    """Opening a pipe would wait for ever."""
    run = make_run(runs, rows=20)
    made(run / "samples" / "step-00000004.png")
    sent = client(run).list_artifacts(publish(run, final=True), "samples")
    assert sorted(Path(file.path).name for file in sent) == ["1nfe_000000.png", "1nfe_001000.png"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("published", "7"), ("published", 10**9), ("claimed", -1), ("tags", ["a"]), ("key", None)],
)
def test_damaged_bookkeeping_is_refused_and_stays(runs: Path, key: str, value: object) -> None:
    run = make_run(runs, rows=20)
    publish(run)
    file = run / "mlflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"mlflow\.json is damaged; got .*{key}.*fix: delete it and publish again"):
        publish(run)
    assert file.read_bytes() == before


def test_bookkeeping_that_lacks_a_key_is_refused(runs: Path) -> None:
    """Or a run whose id is lost would be shown twice."""
    run = make_run(runs, rows=20)
    publish(run)
    file = run / "mlflow.json"
    file.write_text(file.read_text().replace('"run_id"', '"run_idx"'))
    with pytest.raises(InputError, match=r"mlflow\.json is damaged; got no run_id"):
        publish(run)


def test_keys_of_a_later_version_are_kept(runs: Path) -> None:
    run = make_run(runs, rows=20)
    first = publish(run)
    file = run / "mlflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_later": {"a": [1, None]}}))
    append(run, 20, 40)
    assert publish(run) == first
    assert json.loads(file.read_text())["of_later"] == {"a": [1, None]}
    assert len(active_runs(run)) == 1


def test_a_damaged_run_changes_nothing(runs: Path) -> None:
    run = make_run(runs, rows=20)
    publish(run)
    with (run / "events.jsonl").open("a") as file:
        file.write("what\n")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"events\.jsonl"):
        publish(run)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_store_begins_as_a_copy_of_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is made by MLflow and kept, the next copied; a damaged one is made anew. All have the same tables."""
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))

    def made(name: str) -> tuple[dict[str, str], str]:
        store.prepare(store.default_uri(tmp_path / name))
        with closing(sqlite3.connect(tmp_path / name / store.DATABASE_NAME)) as connection:
            tables = dict(connection.execute("SELECT name, sql FROM sqlite_master").fetchall())
            (folder,) = connection.execute("SELECT artifact_location FROM experiments").fetchall()
            return tables, folder[0]

    first, _ = made("first")
    (kept,) = (tmp_path / "cache").glob("*.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    written = kept.stat().st_mtime_ns
    copied, folder = made("second")
    assert copied == first
    assert "alembic_version" in first
    assert folder.startswith(str(tmp_path / "elsewhere"))  # of MLflow's own experiment: not the first store's
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    assert made("third")[0].keys() == first.keys()
    assert made("fourth")[0].keys() == first.keys()
    assert kept.stat().st_mtime_ns != written


@pytest.mark.slow
def test_two_processes_make_one_store(tmp_path: Path) -> None:
    folder, said, own = tmp_path / "runs", tmp_path / "said", str(tmp_path / "cache")
    uri = store.default_uri(folder)
    makers = [forked.start(store.prepare, uri, output=said, TWINRL_CACHE=own) for _ in range(2)]
    assert [maker.wait(300) for maker in makers] == [0, 0], said.read_text()
    assert [path.name for path in folder.iterdir()] == [store.DATABASE_NAME]


@pytest.mark.slow
def test_two_processes_publish_one_run(runs: Path, tmp_path: Path) -> None:
    run, said = make_run(runs, rows=20), tmp_path / "said"
    publishers = [forked.start(publish, str(run), output=said) for _ in range(2)]
    assert 0 in [publisher.wait(300) for publisher in publishers], said.read_text()
    assert [shown.info.run_id for shown in active_runs(run)] == [publish(run)]
    assert not (run / layout.MLFLOW_LOCK).exists()


def test_a_run_that_another_process_publishes_is_left_to_it(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "STORE_PATIENCE_SECONDS", 0.1)
    run = make_run(runs, rows=20)
    before = sorted(run.rglob("*"))
    with files.alone(run / layout.MLFLOW_LOCK, AssertionError()):
        with pytest.raises(InputError, match=r"another process publishes .*; fix: wait for it to end"):
            publish(run)
        assert not MLflowView(run).close()
    assert "another process publishes" in caplog.text
    assert sorted(run.rglob("*")) == before
    assert active_runs(run) == []


@pytest.mark.slow
def test_a_store_that_was_killed_while_it_was_made_is_made_anew(tmp_path: Path) -> None:
    uri = store.default_uri(tmp_path)
    maker = forked.start(store.prepare, uri, output=tmp_path / "said", TWINRL_CACHE=str(tmp_path / "cache"))
    forked.wait_until(lambda: any(path.stat().st_size > 8192 for path in tmp_path.glob("*.db")), 300)
    maker.kill()
    maker.wait(60)
    assert (tmp_path / store.DATABASE_NAME).stat().st_size == 0
    store.prepare(uri)
    run = make_run(tmp_path, rows=20)
    publish(run)
    assert len(active_runs(run)) == 1


def test_a_store_that_cannot_be_made_leaves_no_empty_file(tmp_path: Path) -> None:
    with files_of_at_most(8192), pytest.raises(store.failures()):
        store.prepare(store.default_uri(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_another_program_s_database_stays_as_it_is(tmp_path: Path) -> None:
    """A run of somebody else's may name any file as its store."""
    run, other = make_run(tmp_path, rows=20), tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE notes (text)")
    before = other.read_bytes()
    with pytest.raises(InputError, match=r"cannot be reached; got .*other\.db is another program's database"):
        publish(run, f"sqlite:///{other}")
    assert other.read_bytes() == before


@pytest.mark.parametrize("name", ["../../out", "/abs", "..", "a/../../../b", "team/one"])
def test_artifacts_lie_beside_the_store_whatever_an_experiment_is_called(runs: Path, name: str) -> None:
    run = make_run(runs, rows=20)
    publish(run, experiment=name)
    (shown,) = active_runs(run)
    place = Path(shown.info.artifact_uri.removeprefix("file://"))
    assert place.resolve().is_relative_to(runs.resolve() / store.ARTIFACTS_NAME)
    assert any(place.rglob("config.yaml"))


# --- passwords and stores that are away --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://someone:pw@host:9/x", "http://someone:***@host:9/x"),
        ("postgresql+psycopg://u:p%40x@h/db", "postgresql+psycopg://u:***@h/db"),
        ("postgresql://u@h/db?password=abc&sslmode=on", "postgresql://u@h/db?password=***&sslmode=on"),
        (
            "API request to http://a:b@h:9/x failed (10:30@noon)",
            "API request to http://a:***@h:9/x failed (10:30@noon)",
        ),
        ("http://127.0.0.1:9/api", "http://127.0.0.1:9/api"),
        ("http://u:p/w@h", "http://u:***@h"),
        ("http://u:p@ss:#1@h/x", "http://u:***@h/x"),
        ("http://h:5000/of@me", "http://h:5000/of@me"),
        ("mysql://h/d?ssl_Password=abc&x=1;token=t", "mysql://h/d?ssl_Password=***&x=1;token=***"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("https://ghp_abc123@h/x", "https://***@h/x"),
        ("https://dapi0123@h:8/x and https://eyJh.b.c@h", "https://***@h:8/x and https://***@h"),
        ("postgresql://alice@h/db", "postgresql://alice@h/db"),
        (
            "https://h/x?api-key=1&aws_secret_access_key=2&sig=3#access_token=4",
            "https://h/x?api-key=***&aws_secret_access_key=***&sig=***#access_token=***",
        ),
        ("http://h/#/metric?plot_metric_keys=[1]&design=a", "http://h/#/metric?plot_metric_keys=[1]&design=a"),
    ],
)
def test_no_password_is_shown(text: str, expected: str) -> None:
    assert store.shown(text) == expected
    assert store.shown(expected) == expected


@pytest.mark.parametrize(
    ("uri", "pages"),
    [
        ("http://me:pw@host:9/x/", "http://host:9/x"),
        ("https://host?token=t", "https://host"),
        ("sqlite:////tmp/mlflow.db", store.LOCAL),
        ("postgresql://me:pw@host/db", store.LOCAL),
    ],
)
def test_the_address_of_pages_has_neither_user_nor_password(uri: str, pages: str) -> None:
    assert store.pages(uri) == pages


def test_a_password_of_the_environment_is_used_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, rows=20)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:pw-handed@127.0.0.1:9")
    with pytest.raises(InputError, match="MLflow cannot be reached") as raised:
        publish(run)
    assert "pw-handed" not in str(raised.value)
    assert [path for path in run.rglob("*") if path.is_file() and b"pw-handed" in path.read_bytes()] == []


def test_a_store_that_is_away_does_not_take_the_place_of_the_one_that_has_the_run(runs: Path) -> None:
    run = make_run(runs, rows=20)
    publish(run)
    before = (run / "mlflow.json").read_bytes()
    with pytest.raises(InputError, match="MLflow cannot be reached"):
        publish(run, "http://127.0.0.1:9")
    assert (run / "mlflow.json").read_bytes() == before


def test_a_run_of_another_user_is_one_line(empty_store: Path) -> None:
    with open_folder() as runs:
        shutil.copy(empty_store, runs)
        (runs / store.DATABASE_NAME).chmod(0o444)
        run = make_run(runs, rows=20)
        run.chmod(0o555)
        with another_user(), pytest.raises(PermissionError) as caught:
            publish(run)
        assert Path(caught.value.filename).parent == run
        run.chmod(0o777)
        with another_user(), pytest.raises(InputError, match=r"MLflow cannot be reached; got .*readonly.*rights"):
            publish(run)
        (run / "config.yaml").chmod(0)
        with another_user(), pytest.raises(InputError, match=r"config\.yaml cannot be read.*denied"):
            publish(run)
