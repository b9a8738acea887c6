"""The MLflow run of a run directory: found or made, described, and given points and files."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinrl.run import layout
from twinrl.stability.divergence import Diverged
from twinrl.tracking import pictures, store
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.thinning import MetricPoint

KEY_TAG = "twinrl.key"
POINTS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 8
VERDICT_TAGS = ("diverged.step", "diverged.after", "diverged.kind", "diverged.recovered", "diverged.why")
PARAM_VALUE_CHARACTERS = 6000
PUBLISHED_FILES = (layout.CONFIG, layout.ENVIRONMENT, layout.EVENTS, f"{layout.SAMPLES}/*.png", "figures/*.png")
RUN_NOTE = (
    "Curves are thinned to few points each, and every spike is kept. `nonfinite/<name>` counts the "
    "values that were nan or infinite; a series that ends with one, or from before the run failed, ends with nan, so "
    "that no earlier value ranks the run. The time axis counts training time. The exact numbers are in "
    "`log.jsonl` and `metrics.parquet` of the run directory `{run}`."
)


class MlflowRun:
    """The one active MLflow run that carries the key of ``state``; every method may be repeated harmlessly.

    Arguments:
        run_dir: the run directory, whose name becomes the run's.
        uri: the MLflow store.
        state: bookkeeping; told which run this is.

    Raises:
        one of :func:`twinrl.tracking.store.failures`, here and in every method.
    """

    def __init__(self, run_dir: Path, uri: str, state: ViewState):
        self._dir = run_dir
        self._client = store.connect(uri)
        self._sent: dict[Path, int] = {}
        self._images: set[str] | None = None
        self._tagged: dict[str, str] = {}
        experiment = store.experiment_id(self._client, state.experiment, uri)
        if state.superseded is not None:
            store.delete_run(self._client, state.superseded)
        run = self._find(experiment, state.key)
        fresh = run is None
        run = run or self._create(experiment, state)
        self.id: str = run.info.run_id
        self._start: int = run.info.start_time
        state.attach(self.id, fresh)
        self._describe(run, state)

    def _find(self, experiment: str, key: str) -> Any:
        found = self._client.search_runs([experiment], filter_string=f"tags.`{KEY_TAG}` = '{key}'")
        return found[0] if found else None

    def _create(self, experiment: str, state: ViewState) -> Any:
        """A new run that starts when the run directory did."""
        born = next((self._dir / name for name in PUBLISHED_FILES[:2] if (self._dir / name).exists()), self._dir)
        return self._client.create_run(
            experiment,
            run_name=self._dir.resolve().name,
            tags={KEY_TAG: state.key},
            start_time=int(born.stat().st_mtime * 1000),
        )

    def _describe(self, run: Any, state: ViewState) -> None:
        """Add the parameters and tags that the run does not have yet, and mark it as running."""
        from mlflow.entities import Param, RunTag

        config = layout.read_config(self._dir)
        params = [Param(name, value) for name, value in flatten(config).items() if name not in run.data.params]
        for batch in _batches(params, PARAMS_PER_REQUEST):
            self._client.log_batch(self.id, params=batch)
        tags = _tags(self._dir, config) | state.tags
        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])
        if run.info.status != "RUNNING":
            self._client.update_run(self.id, status="RUNNING")

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Send points; those already there are not stored again, because their timestamps do not change."""
        from mlflow.entities import Metric

        for batch in _batches(points, POINTS_PER_REQUEST):
            metrics = [Metric(fitting(p.name), p.value, self._time(p.seconds), p.iteration) for p in batch]
            self._client.log_batch(self.id, metrics=metrics)

    def _time(self, seconds: float) -> int:
        """Milliseconds since the epoch, ``seconds`` of training after the run's start."""
        return self._start + round(1000 * seconds)

    def log_files(self) -> None:
        """Send the configuration, sample grids and figures that are new or changed since the last call."""
        found = (path for pattern in PUBLISHED_FILES for path in sorted(self._dir.glob(pattern)))
        whole = (path for path in found if not path.name.startswith("."))  # others are being written
        for path in (path for path in whole if layout.is_own(path, self._dir)):
            modified = path.stat().st_mtime_ns
            if self._sent.get(path) != modified:
                folder = path.parent.relative_to(self._dir).as_posix()
                self._client.log_artifact(self.id, str(path), None if folder == "." else folder)
                if folder == layout.SAMPLES:
                    self._log_step_image(path)
                self._sent[path] = modified

    def tag_events(self) -> None:
        """Say in tags what happened, so that the run table can be searched for it: counts by kind of event.

        A divergence that a rollback has taken back is counted, and is no verdict.
        """
        counts = Counter(event["kind"] for event in layout.read_events(self._dir))
        self._tag({f"events.{kind}": str(count) for kind, count in counts.items()})

    def tag_verdict(self, failure: Diverged | None) -> None:
        """Say in tags whether the run has failed, when, how and why; what an earlier verdict said is gone."""
        if failure is None:
            stale = self._client.get_run(self.id).data.tags.keys() & set(VERDICT_TAGS)
            for name in stale:
                self._client.delete_tag(self.id, name)
                self._tagged.pop(name, None)
            self._tag({"diverged": "false"})
            return
        said = (failure.step, failure.after, failure.kind, str(failure.recovered).lower(), failure.message)
        self._tag({"diverged": "true", **dict(zip(VERDICT_TAGS, map(str, said), strict=True))})

    def _tag(self, tags: Mapping[str, str]) -> None:
        """Set the tags that are new or have changed."""
        from mlflow.entities import RunTag

        changed = {name: value for name, value in tags.items() if self._tagged.get(name) != value}
        if changed:
            self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in changed.items()])
            self._tagged |= changed

    def _log_step_image(self, path: Path) -> None:
        """Show a grid whose name ends in its step also among the charts, with a slider over the steps, once."""
        match = re.fullmatch(r"(?P<name>.*?)[-_]?(?:step)?[-_]?(?P<step>\d+)", path.stem)
        if not match:
            return
        if self._images is None:
            self._images = {Path(file.path).name for file in self._client.list_artifacts(self.id, "images")}
        key, step = f"{path.parent.name}/{match['name'] or 'grid'}", int(match["step"])
        shown = re.compile(rf"{re.escape(path.parent.name)}.{re.escape(key.split('/')[1])}.step.{step}\D")
        if not any(shown.match(name) for name in self._images):
            self._client.log_image(self.id, pictures.opened(path), key=key, step=step, timestamp=self._start + step)

    def finish(self, status: str, seconds: float) -> None:
        """Set the final ``status`` (FINISHED, FAILED or KILLED); the run's duration is its training time."""
        self._client.set_terminated(self.id, status=status, end_time=self._time(seconds))


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters: dotted names that fit, values as text, cut to the limit."""
    if isinstance(config, dict) and config:
        parts = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
        return {name: value for part in parts for name, value in part.items()}
    if not prefix:
        return {}
    value = config if isinstance(config, str) else json.dumps(config, default=str)
    return {fitting(prefix): value[:PARAM_VALUE_CHARACTERS]}


def fitting(name: str) -> str:
    """The name as MLflow takes it, no two alike: where it had to be changed or cut, it ends with a digest of itself."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    if allowed == name and len(name) <= NAME_CHARACTERS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:DIGEST_CHARACTERS]
    return f"{allowed[: NAME_CHARACTERS - DIGEST_CHARACTERS - 1]}.{digest}"


def _tags(run_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """What the run directory says about itself; the caller's tags go before these."""
    name = run_dir.resolve().name
    tags = {"mlflow.source.name": "twinrl", "mlflow.note.content": RUN_NOTE.format(run=name)}
    tags |= {key: str(config[key]) for key in ("name", "seed") if key in config}
    if hashed := re.search(r"-([0-9a-f]{8})-s\d+$", name):
        tags["config_hash"] = hashed[1]
    if revision := _revision(run_dir):
        tags["mlflow.source.git.commit"] = revision
    return tags


def _revision(run_dir: Path) -> str | None:
    """The git revision noted in ``env.json``."""
    git = layout.read_environment(run_dir).get("git")
    return git.get("revision") if isinstance(git, dict) else None


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """``items`` in order, in lists of at most ``size``."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
