"""An MLflow store that is made once, and for the browser tests a server and a headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tracking import stores
from tests.tracking.synthetic import make_run
from twinrl.tracking import mlflow_run, store, thinning, ui
from twinrl.tracking.mlflow_view import publish

CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,6000",  # charts are drawn when they come into view
)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty sqlite store, to be copied."""
    return stores.empty(tmp_path_factory)


def _few_points(patch: pytest.MonkeyPatch) -> None:
    """Curves get few points, to be quick."""
    patch.setattr(thinning, "REGULAR_BUCKETS", 10)
    patch.setattr(mlflow_run, "POINTS_PER_REQUEST", 80)


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with an empty default store in it; curves get few points."""
    _few_points(monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> dict[str, Any]:
    """Two published runs and one without a single row, in one store."""
    folder = tmp_path_factory.mktemp("shown") / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    uri = store.default_uri(folder)
    directories = [make_run(folder, seed=seed) for seed in (0, 1)] + [make_run(folder, rows=0, name="empty")]
    with pytest.MonkeyPatch.context() as patch:
        _few_points(patch)
        ids = [publish(run, uri, final=True) for run in directories]
    return {"uri": uri, "runs": ids[:2], "empty": ids[2], "directories": directories}


@pytest.fixture(scope="module")
def server(published: dict[str, Any]) -> Iterator[ui.Server]:
    """A real MLflow server on loopback over the published runs."""
    with ui.Server(published["uri"], port=0) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; tests that need it are skipped where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs a browser: install chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    for option in (*CHROMIUM_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()
