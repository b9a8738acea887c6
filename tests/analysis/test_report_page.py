"""The page of a report as a browser shows it: headless Chromium, without network."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import plots
from analysis.intervals import Interval
from analysis.report import report
from tests.analysis import planted, simulated
from tests.tracking.conftest import browser, empty_store  # noqa: F401 (fixtures)
from tests.tracking.pages import keep_screenshot, wait_for
from twinrl.tracking import mlflow_view, store

pytestmark = pytest.mark.browser

STUDY = ("leaderboard", "survival", "hazard-ratios", "effects", "odds", "reward-0", "prompts")
RUN = ("norms", "spike-", "places", "arm")
IMAGES = """return [...document.images].map(i => {
  if (!i.complete || !i.naturalWidth) return [i.src.slice(0, 40), 0, 0, 0];
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  canvas.width = 300; canvas.height = Math.max(1, Math.round(300 * i.naturalHeight / i.naturalWidth));
  pen.drawImage(i, 0, 0, canvas.width, canvas.height);
  const dots = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let k = 0; k < dots.length; k += 4) colours.add((dots[k] >> 5) * 64 + (dots[k+1] >> 5) * 8 + (dots[k+2] >> 5));
  const box = i.getBoundingClientRect();
  return [i.src.slice(0, 40), box.width, box.height, colours.size];
})"""
LOADED = "return [...document.images].every(image => image.complete && image.naturalWidth)"
REQUESTS = """return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def offline(browser: Any) -> Iterator[Any]:  # noqa: F811
    """The browser without network; the test fails for whatever a page still asks for."""
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield browser
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )


def check_page(window: Any, page: Path, figures: int, seconds: float = 60) -> None:
    """Every image is drawn, with more than one colour, and nothing is asked for elsewhere."""
    window.get(page.as_uri())
    wait_for(lambda: window.execute_script(LOADED), seconds)
    images = window.execute_script(IMAGES)
    assert len(images) >= figures
    for source, width, height, colours in images:
        assert source.startswith("data:image/")
        assert (width > 200, height > 50, colours > 3) == (True, True, True), (source, width, height, colours)
    assert window.execute_script(REQUESTS) == []
    assert window.execute_script(OVERFLOW) <= 0


def assert_first_screen(window: Any, arms: int) -> None:
    """At 1280 × 800: the answer, the norms and every arm's samples, without scrolling."""
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    bottoms = window.execute_script(
        "return ['p.lead', 'figure:not(.strip figure) img', '.strip img'].map("
        "what => [...document.querySelectorAll(what)].map(e => e.getBoundingClientRect().bottom + scrollY))"
    )
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    answer, figures, samples = bottoms
    assert len(samples) == arms
    assert 0 < answer[0] < figures[0] < min(samples) <= max(samples) < 800


@pytest.mark.slow
def test_a_small_study_is_drawn_without_network(offline: Any, drawn_page: Path) -> None:
    check_page(offline, drawn_page, len(list(drawn_page.parent.glob("figures/*.svg"))) + 2)
    facts = {dt.text for dt in offline.find_elements("tag name", "dt")}
    assert facts == {"Which factor?", "How sure?", "What does it cost?"}
    assert_first_screen(offline, 2)


TOLD = {
    planted.another_term_leads: ("teacher: live 16 of 16, ema 0 of 16", "adversarial rose first", "matter: reward"),
    planted.nothing: ("No run fell", "no arm is found to differ"),
    planted.only_together: ("fall only where teacher=live and reward=with meet: 8 of 8", "rectify rose first"),
    planted.crossed: ("No run fell", "depends on teacher and reward together"),
}


@pytest.mark.campaign
@pytest.mark.parametrize("truth", TOLD, ids=lambda truth: truth.__name__)
def test_the_first_screen_tells_what_is_planted(offline: Any, tmp_path: Path, truth: planted.Truth) -> None:
    page = report(planted.make(tmp_path, truth), mlflow=False).page
    check_page(offline, page, 5)
    assert_first_screen(offline, 4)
    said = offline.find_element("css selector", "p.lead").text
    assert [words for words in TOLD[truth] if words not in said] == []
    keep_screenshot(offline, f"report-{truth.__name__}")


@pytest.mark.campaign
def test_a_study_is_drawn_without_network(offline: Any, tmp_path: Path) -> None:
    page = report(simulated.make_study(tmp_path, seeds=5)).page
    check_page(offline, page, len(STUDY) + len(simulated.ARMS))
    assert all((page.parent / "figures" / f"{name}.svg").is_file() for name in STUDY)
    facts = {dt.text: dt.find_element("xpath", "following-sibling::dd[1]").text
             for dt in offline.find_elements("tag name", "dt")}  # fmt: skip
    assert "teacher (ema instead of live)" in facts["Which factor?"]
    keep_screenshot(offline, "report-study")


@pytest.mark.campaign
def test_a_run_is_drawn_and_linked_to_its_mlflow_page(offline: Any, tmp_path: Path, empty_store: Path) -> None:  # noqa: F811
    database = tmp_path / store.DATABASE_NAME
    database.write_bytes(empty_store.read_bytes())
    run = simulated.make_run(tmp_path, spikes_at=(120, 200, 330), diverges_at=340)
    simulated.make_run(tmp_path, seed=1)
    run_id = mlflow_view.publish(run, f"sqlite:///{database}", final=True)
    page = report(run).page
    check_page(offline, page, len(RUN) + 3)
    assert all(list(page.parent.glob(f"figures/{name}*.svg")) for name in RUN)
    links = [link.get_attribute("href") for link in offline.find_elements("tag name", "a")]
    assert any(run_id in link for link in links)
    client = store.connect(f"sqlite:///{database}")
    assert "report/report.html" in {file.path for file in client.list_artifacts(run_id, "report")}
    keep_screenshot(offline, "report-run")


@pytest.mark.slow
def test_a_page_without_its_figures_is_noticed(offline: Any, tmp_path: Path) -> None:
    """The check itself: a whole figure, one that cannot be drawn, a blank one, one from elsewhere."""
    page, mark = tmp_path / "page.html", "data:image/svg+xml;base64,"
    blank = f"{mark}PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciIHdpZHRoPSI0MDAiIGhlaWdodD0iMjAwIi8+"
    whole = plots.save(plots.forest({"a": Interval(1.0, 0.5, 2.0, 5, "")}, "hazard ratio"), tmp_path / "whole.svg")
    page.write_text(f'<img src="{mark}{base64.b64encode(whole.read_bytes()).decode()}">')
    check_page(offline, page, 1)
    for source in (f"{mark}AAAA", blank, "https://example.org/figure.svg"):
        page.write_text(f'<img src="{source}">')
        with pytest.raises(AssertionError):
            check_page(offline, page, 1, seconds=1)
