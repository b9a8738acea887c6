"""The site is built with strict links, needs no network, and can be read with a keyboard, a screen reader or a phone.

Accessibility is checked where ``TWINRL_AXE`` names the file ``axe.min.js`` of axe-core (from npm; not part of twinrl).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.test_report_page import OVERFLOW, offline  # noqa: F401 (fixture)
from tests.pages import REPOSITORY
from tests.tracking.conftest import browser, empty_store  # noqa: F401 (fixtures)
from tests.tracking.pages import keep_screenshot

pytestmark = [pytest.mark.browser, pytest.mark.campaign]

WIDTHS = {"phone": 390, "laptop": 1366}
SERIOUS = ("serious", "critical")
FOREIGN = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => /^https?:/.test(n))"
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


def test_pages_need_no_network_and_fit_a_phone(site: Path, offline: Any) -> None:  # noqa: F811
    """Every page, at both widths: nothing is fetched, pictures are there, no error is logged, nothing sticks out."""
    wrong = []
    for width in WIDTHS.values():
        _resize(offline, width)
        for page in sorted(site.rglob("*.html")):
            offline.get(page.as_uri())
            asked, broken, over = (offline.execute_script(script) for script in (FOREIGN, BROKEN, OVERFLOW))
            logged = [entry["message"] for entry in offline.get_log("browser") if entry["level"] == "SEVERE"]
            if asked or broken or logged or over > 0:
                wrong.append((str(page.relative_to(site)), width, asked, broken, logged, over))
    assert wrong == []


def test_a_word_is_found(site: Path, offline: Any) -> None:  # noqa: F811
    offline.get((site / "index.html").as_uri() + "?q=renoise")
    from tests.tracking.pages import wait_for

    found = wait_for(
        lambda: [a.get_attribute("href") for a in offline.find_elements("css selector", ".md-search-result__link")]
    )
    assert any("glossary" in link for link in found)


@pytest.mark.skipif("TWINRL_AXE" not in os.environ, reason="TWINRL_AXE names no axe.min.js")
def test_no_serious_barrier(site: Path, offline: Any) -> None:  # noqa: F811
    """axe-core's serious and critical findings, of every page at both widths."""
    axe, wrong = Path(os.environ["TWINRL_AXE"]).read_text(), []
    for name, width in WIDTHS.items():
        _resize(offline, width)
        for page in sorted(site.rglob("*.html")):
            offline.get(page.as_uri())
            offline.execute_script(axe)
            found = offline.execute_async_script(CHECK)
            wrong += [(str(page.relative_to(site)), name, *rest) for impact, *rest in found if impact in SERIOUS]
            keep_screenshot(offline, f"{page.parent.name}-{page.stem}-{name}")
    assert wrong == []


def _resize(window: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
