"""The MLflow pages of a store on this machine: the server behind ``twinrl ui``, and addresses to open.

The server listens on loopback unless told otherwise, and takes some 10 s to start and half a gigabyte;
MLflow's job runner, which would need four times that, is switched off.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Mapping, Sequence
from itertools import islice
from types import FrameType
from urllib.parse import quote

from twinrl.config.errors import InputError
from twinrl.machine.text import printable
from twinrl.tracking import store, studies
from twinrl.tracking.guard import ADDRESSES
from twinrl.tracking.views import TRAINING_PAGES

LOOPBACK = "127.0.0.1"
START_SECONDS = 120
STOP_SECONDS = 10
START_PAGE = f"/#/experiments?{TRAINING_PAGES}"
MOST_STUDIES = 10
SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONSAFEPATH": "1",  # no modules of the working directory, which may be a run of somebody else's
    "UVICORN_APP_DIR": os.devnull,  # nor by the option of uvicorn whose default is that directory
}


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine, and no proxy of the environment's, which knows another one by that name."""
STORE = "MLFLOW_BACKEND_STORE_URI"
"""By this variable the server is told its store: everybody on the machine can read a command line."""


class Server:
    """A running MLflow server over ``store_uri``; leaving its ``with`` block ends it.

    Arguments:
        store_uri: the store to show.
        port: wanted port; if it is in use, a free one is taken instead.
        host: address to listen on.

    Attributes:
        url: address of the pages.

    Raises:
        InputError: the store is a sqlite file that does not exist, or the server does not come up.
    """

    def __init__(self, store_uri: str, port: int = 5000, host: str = LOOPBACK):
        database = store.sqlite_path(store_uri)
        if database and not database.exists():
            raise InputError(
                f"there is no MLflow store {database}",
                fix="train a run first, name its store, or twinrl publish a run directory",
            )
        port = available_port(port, host)
        self.url = f"http://{host}:{port}"
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (the server writes to it until it ends)
        self._process = subprocess.Popen(
            _command(store_uri, host, port),
            env=os.environ | SETTINGS | {STORE: store_uri, ADDRESSES: ",".join(_addresses(host, port))},
            stdin=subprocess.PIPE,  # the lifeline: however this process ends, the server does
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        """Return once the server answers; end it and raise InputError with its last words otherwise."""
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                DIRECT.open(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.2)
        self._stderr.seek(0)
        complaint = _last_complaint(self._stderr.read().decode(errors="replace"))
        self.stop()
        raise InputError("the MLflow server did not start", got=complaint)

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """End the server and its workers; harmless if it has ended."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, request)
                try:
                    self._process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._stderr.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _command(store_uri: str, host: str, port: int) -> list[str]:
    """The command line of the server; experiments made through it keep their artifacts beside the database."""
    options = {
        "--host": host, "--port": str(port), "--workers": "1", "--app-name": "twinrl",
    }  # fmt: skip
    if database := store.sqlite_path(store_uri):
        options["--artifacts-destination"] = str(database.resolve().parent / store.ARTIFACTS_NAME)
    words = [word for pair in options.items() for word in pair]
    return [sys.executable, "-m", "twinrl.machine.lifeline", "mlflow", "server", *words]


def _addresses(host: str, port: int) -> list[str]:
    """The server's addresses as browsers write them, who leave out the port that is usual."""
    return [f"{name}:{port}" if port != 80 else name for name in (host, "localhost")]


def _last_complaint(output: str) -> str:
    """The last line of a server's output that names an error, else the last line."""
    lines = output.strip().splitlines() or ["no answer"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


def available_port(wanted: int, host: str = LOOPBACK) -> int:
    """``wanted`` if nothing listens there, else a free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if port == 0:
                    raise InputError(f"cannot listen on {host}", got=error.strerror) from error
                continue
            return probe.getsockname()[1]
    raise AssertionError("a free port was found or an error raised")


def serve(store_uri: str, port: int = 5000, host: str = LOOPBACK, study: str | None = None, show: bool = False) -> int:
    """Show ``store_uri`` until Ctrl-C: start the server, print its address and wait; returns the exit code.

    For a store that is a server already, only its address is printed.

    Arguments:
        study: whose page is opened; the pages of the store's other studies are named.
        show: open the page in a browser, where there is a screen for one.

    Raises:
        InputError: as for :class:`Server`; there is no such study.
    """
    remote = store_uri.startswith(("http://", "https://"))
    found = studies.pages(store_uri) if study is not None or not remote else {}
    page = START_PAGE if study is None else studies.page_of(study, found, store_uri)
    if remote:
        print(printable(f"MLflow: {store.pages(store_uri)}{page if study is not None else ''}"))
        return 0
    print(printable(f"starting MLflow over {store.shown(store_uri)} …"), flush=True)
    for name in ("SIGTERM", "SIGHUP"):  # a polite kill, a closed terminal
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    try:
        with Server(store_uri, port, host) as server:
            _announce(server.url, page, {} if study is not None else found)
            if show and _has_screen():
                webbrowser.open(f"{server.url}{page}")
            return 1 if server.wait() else 0
    except KeyboardInterrupt:
        return 0


def _announce(url: str, page: str, found: Mapping[str, str]) -> None:
    """Print the addresses: of the first page, and of the newest studies'."""
    for study, own in islice(found.items(), MOST_STUDIES):
        print(printable(f"study {study}: {url}{own}"))
    print(printable(f"MLflow: {url}{page}   (Ctrl-C ends it)"), flush=True)


def _has_screen() -> bool:
    """Whether a browser would have a window; one in the terminal would take the terminal away."""
    windows = sys.platform == "darwin" or os.name == "nt" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return sys.stdout.isatty() and windows


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Ends the server as Ctrl-C does."""
    raise KeyboardInterrupt


def compare_url(
    base: str,
    experiment_id: str,
    run_ids: Sequence[str],
    metrics: Sequence[str] = ("loss/total",),
    log_scale: bool = False,
) -> str:
    """Address of the page that overlays ``metrics`` of several runs as curves.

    Arguments:
        base: address of the server, e.g. ``Server.url``.
        experiment_id, run_ids: MLflow's ids.
        metrics: one name or more.
        log_scale: logarithmic vertical axis.
    """
    query = {
        "runs": list(run_ids),
        "metric": metrics[0],
        "experiments": [experiment_id],
        "plot_metric_keys": list(metrics),
    }
    encoded = "&".join(f"{name}={quote(json.dumps(value), safe='')}" for name, value in query.items())
    axes = f"x_axis=step&y_axis_scale={'log' if log_scale else 'linear'}"
    return f"{base.rstrip('/')}/#/metric?{encoded}&{axes}&{TRAINING_PAGES}"


def run_url(base: str, experiment_id: str, run_id: str, tab: str = "model-metrics") -> str:
    """Address of one run's page; ``tab`` is model-metrics (curves) or artifacts (grids, files)."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}/{tab}?{TRAINING_PAGES}"
