"""Waiting for pages in a browser, and reading their curves."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120


CURVES = """return [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data
    .filter(trace => plot.querySelector('.js-line'))
    .map(trace => [`${trace.name} (${trace.metricKey})`, [...trace.x], [...trace.y]]))"""


def wait_for(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """The first truthy value of ``condition``; its last value if there is none in time."""
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        waiting = WebDriverWait(None, seconds, ignored_exceptions=[WebDriverException])
        return waiting.until(lambda _: condition())
    except TimeoutException:
        return condition()


def drawn(browser: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Every curve that has a line on the page: its name, steps and values."""
    traces = sorted(browser.execute_script(CURVES), key=lambda trace: len(trace[1]))  # markers have fewer points
    return {name: (steps, values) for name, steps, values in traces}


def keep_screenshot(browser: Any, name: str) -> None:
    """Save what the browser shows where TWINRL_SCREENSHOTS says, if it says so."""
    if folder := os.environ.get("TWINRL_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
