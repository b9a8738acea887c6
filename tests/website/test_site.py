"""The site is built with strict links, needs no network, and can be read with a keyboard, a screen reader or a phone.

Accessibility is checked where ``TWINRL_AXE`` names the file ``axe.min.js`` of axe-core (from npm; not part of twinrl).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.analysis.test_report_page import OVERFLOW
from tests.pages import REPOSITORY
from tests.tracking.conftest import browser, empty_store  # noqa: F401 (fixtures)
from tests.tracking.pages import keep_screenshot, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.campaign]

WIDTHS = {"phone": 390, "laptop": 1366}
SERIOUS = ("serious", "critical")
MOUSE = """const asked = window.matchMedia.bind(window);
window.matchMedia = query => query === '(hover)' ? {matches: true} : asked(query)"""
"""The theme lets the keyboard scroll code where something can hover; a headless browser has no mouse."""
FOREIGN = """return performance.getEntriesByType('resource').map(e => e.name)
    .filter(n => !n.startsWith('data:') && !n.startsWith(location.origin))"""
FOUND = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
BROKEN = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
CHECK = """const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations.map(
    v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.target.join(' '))])))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built into a folder of its own; a link that leads nowhere fails."""
    pytest.importorskip("mkdocs", reason="`make docs` installs what builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    """Address of the site on this machine."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_pages_need_no_network_and_fit_a_phone(site: Path, server: str, browser: Any) -> None:  # noqa: F811
    """Every page, at both widths: nothing is fetched, pictures are there, no error is logged, nothing sticks out."""
    wrong = []
    for width in WIDTHS.values():
        _resize(browser, width)
        for page in sorted(site.rglob("*.html")):
            browser.get(f"{server}/{page.relative_to(site).as_posix()}")
            asked, broken, over = (browser.execute_script(script) for script in (FOREIGN, BROKEN, OVERFLOW))
            logged = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            if asked or broken or logged or over > 0:
                wrong.append((str(page.relative_to(site)), width, asked, broken, logged, over))
    assert wrong == []


def test_a_word_is_found(server: str, browser: Any) -> None:  # noqa: F811
    _resize(browser, WIDTHS["laptop"])
    browser.get(f"{server}/index.html?q=glossary")
    found = wait_for(lambda: browser.execute_script(FOUND))
    assert any("glossary" in link for link in found), found


@pytest.mark.skipif("TWINRL_AXE" not in os.environ, reason="TWINRL_AXE names no axe.min.js")
def test_no_serious_barrier(site: Path, server: str, browser: Any) -> None:  # noqa: F811
    """axe-core's serious and critical findings, of every page at both widths."""
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": MOUSE})
    axe, wrong = Path(os.environ["TWINRL_AXE"]).read_text(), []
    for name, width in WIDTHS.items():
        _resize(browser, width)
        for page in sorted(site.rglob("*.html")):
            browser.get(f"{server}/{page.relative_to(site).as_posix()}")
            browser.execute_script(axe)
            found = browser.execute_async_script(CHECK)
            wrong += [(str(page.relative_to(site)), name, *rest) for impact, *rest in found if impact in SERIOUS]
            keep_screenshot(browser, f"{page.parent.name}-{page.stem}-{name}")
    assert wrong == []


def _resize(window: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
