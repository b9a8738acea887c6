"""How long MLflow's page that compares a large study's arms takes to show their curves.

    python benchmarks/compare_page.py                    1,000 trials of 50 series each, 20 arms
    python benchmarks/compare_page.py --trials 100       a quick look

A study is planned and its view made as ``twinrl ablate run`` makes it, with curves that nobody trained. One seed run
is published from a made-up log; the others are copies of it under other names, made in the database. Then a headless
Chromium opens the page that the study's run links to, once with an empty cache and some more times, and the clock
stops when every arm's curve is drawn. Needs chromium and chromedriver.
"""

import argparse
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablations import pages, publish
from ablations import plan as plans
from ablations import study as studies
from ablations.display import by_arm
from ablations.plan import Plan, Workspace
from ablations.publish import StudyView
from ablations.summary import MOST_POINTS, Curve
from tests.tracking.conftest import CHROMIUM_OPTIONS
from tests.tracking.pages import drawn, wait_for
from twinrl.run import names
from twinrl.run.runlog import RunLog
from twinrl.tracking import store, ui
from twinrl.tracking.mlflow_view import publish as publish_run
from twinrl.training.runs import dump

RESULTS = Path(__file__).parent / "results"
METRICS = (names.VAL_QUALITY, names.GRAD_TOTAL_RAW)
COPIED = ("runs", "tags", "params", "metrics", "latest_metrics")
STEPS, REPEATS, PATIENCE_SECONDS, CACHE_KIB = 1500, 3, 120, 2**19


def make_study(folder: Path, arms: int, trials: int) -> Plan:
    """A study's plan; its data are loaded, nothing is trained."""
    levels = {f"r{i:02d}": {"optim.lr": 1e-3 * 1.1**i} for i in range(arms)}
    content = {"base": "lab", "set": {"train.steps": STEPS}, "factors": {"rate": levels}, "seeds": trials // arms}
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(content))
    return plans.make(studies.load(str(path)), Workspace(folder / "work"))


def publish_one(view: StudyView, series: int, points: int) -> str:
    """The MLflow run of a made-up trial with ``series`` curves of about ``points`` points."""
    run = view.plan.trials[0].run
    run.samples.mkdir(parents=True)
    (run.path / "config.yaml").write_text(dump(view.plan.trials[0].settings))
    draws = np.random.default_rng(0)
    columns = [*METRICS, *(f"grad/term{i}/norm_raw" for i in range(series - len(METRICS)))]
    with RunLog(run.log) as log:
        for step in range(1, points + 1):
            values = zip(columns, draws.lognormal(size=series).tolist(), strict=True)
            log.append({"iteration": step - 1, "step": step, **dict(values)})
    return publish_run(run.path, view.uri, publish.EXPERIMENT, {"study": view.plan.study.name}, final=True)


def copy(database: Path, run: str, names: list[str]) -> None:
    """Copies of an MLflow run with other ids and names.

    A table's new rows come in the order of its primary key, so that its index grows at its end.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("CREATE TEMP TABLE copies (id, title)")
        connection.executemany("INSERT INTO copies VALUES (?, ?)", [(uuid.uuid4().hex, name) for name in names])
        for table in COPIED:
            described = connection.execute(f"PRAGMA table_info({table})").fetchall()
            columns = [column for _, column, *_ in described]
            picked = ["id" if c == "run_uuid" else "title" if (table, c) == ("runs", "name") else c for c in columns]
            order = [
                picked[number] for number, *_ in sorted(described, key=lambda found: found[5]) if described[number][5]
            ]
            connection.execute(
                f"INSERT INTO {table} SELECT {', '.join(picked)} FROM {table} CROSS JOIN copies WHERE run_uuid = ? "
                f"ORDER BY {', '.join(order)}",
                (run,),
            )


def arm_curves(arm: int, points: int) -> dict[str, Curve]:
    """A falling curve with a band for each metric."""
    step = np.linspace(1, STEPS, points).astype(int)
    middle = 0.3 + 0.02 * arm + np.exp(-step / 300)
    return dict.fromkeys(METRICS, Curve(step, middle, 0.9 * middle, 1.1 * middle, 0.8 * middle, 1.5 * middle))


def fill(folder: Path, arms: int, trials: int, series: int, points: int) -> tuple[StudyView, str, list[str]]:
    """A store with a whole study in it: the view, the page's address, and the names of the curves on it."""
    plan = make_study(folder, arms, trials)
    view = StudyView(plan)
    database = store.sqlite_path(view.uri)
    assert database is not None
    copy(database, publish_one(view, series, points), [trial.title for trial in plan.trials[1:]])
    curves = []
    for i, found in enumerate(by_arm(plan).values()):
        run = view.summary(found, arm_curves(i, MOST_POINTS).items(), [(0, len(found)), (STEPS, len(found))])
        shown = [pages.ALIVE, *(band for metric in METRICS for band in pages.bands(metric))]
        curves += [f"{view.client.get_run(run).info.run_name} ({metric})" for metric in shown]
    return view, view.compare(), curves


def seconds_until_drawn(url: str, expected: list[str], profile: Path, screenshot: Path | None) -> list[float]:
    """Seconds from asking for the page until all curves are on it: at first with an empty cache, then again."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in (*CHROMIUM_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        return [_drawn_after(window, url, expected, screenshot) for _ in range(REPEATS + 1)]
    finally:
        window.quit()


def _drawn_after(window: object, url: str, expected: list[str], screenshot: Path | None) -> float:
    window.get("about:blank")  # type: ignore[attr-defined]
    started = time.monotonic()
    window.get(url)  # type: ignore[attr-defined]
    if not wait_for(lambda: set(expected) <= set(drawn(window)), PATIENCE_SECONDS):
        raise SystemExit(f"no curves after {PATIENCE_SECONDS} s: {len(drawn(window))} of {len(expected)} at {url}")
    elapsed = time.monotonic() - started
    if screenshot is not None:
        window.save_screenshot(str(screenshot))  # type: ignore[attr-defined]
    return elapsed


def page(arms: int, trials: int, series: int, points: int, curves: int, times: list[float], size: float) -> str:
    """The results as Markdown."""
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return (
        f"# The page that compares a study's arms\n\n"
        f"`python benchmarks/compare_page.py --trials {trials} --arms {arms} --series {series} --points {points}`: "
        f"{trials:,} trials × {series} series × {points} points and {arms} summaries of {len(METRICS)} × 3 curves × "
        f"{MOST_POINTS} points in one sqlite store of {size:.0f} MB; headless Chromium and MLflow's server on "
        f"the same machine, whose load average was {load}.\n\n"
        f"| from the click to the last of {curves} curves | seconds |\n|---|---|\n"
        f"| first time, empty browser cache | {times[0]:.1f} |\n"
        f"| again, median of {len(times) - 1} | {statistics.median(times[1:]):.1f} |\n"
    )


def main() -> None:
    """Measure and write ``compare_page.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="a multiple of --arms")
    parser.add_argument("--arms", type=int, default=20)
    parser.add_argument("--series", type=int, default=50, help="of each trial")
    parser.add_argument("--points", type=int, default=100, help="of each series")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare_page.md")
    parser.add_argument("--screenshot", type=Path, help="keep a picture of the page")
    given = parser.parse_args()
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        raise SystemExit("compare_page: needs chromium and chromedriver on the path")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        view, url, curves = fill(folder, given.arms, given.trials, given.series, given.points)
        size = sum(path.stat().st_size for path in (folder / "work").glob("mlflow.db*")) / 2**20
        with ui.Server(view.uri, port=0) as server:
            here = url.replace(publish.SERVER, server.url)
            times = seconds_until_drawn(here, curves, folder / "browser", given.screenshot)
    text = page(given.arms, given.trials, given.series, given.points, len(curves), times, size)
    print(text)
    given.out.write_text(text)


if __name__ == "__main__":
    main()
