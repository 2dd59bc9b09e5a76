"""A report in a headless Chromium: what the browser tests share.

The browser is Debian's ``chromium`` with ``chromium-driver``, driven by selenium; without it these tests are skipped.
Screenshots go to ``$NSP_ARTIFACTS`` (or ``$CI_ARTIFACTS``), else to the test's folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
DOWN, LEFT, RIGHT = "\ue015", "\ue012", "\ue014"

# What a screen reader needs of every figure, menu and table; gives what is missing.
LABELS = """
const missing = [], named = (one) => (one.getAttribute('aria-label') || '').length > 10;
if (!document.documentElement.lang) missing.push('lang');
for (const one of document.querySelectorAll('canvas, svg.plot')) {
  if (!named(one) || one.getAttribute('role') !== 'img' || one.tabIndex !== 0) missing.push('label of ' + one.outerHTML.slice(0, 80));
  if (!document.getElementById(one.getAttribute('aria-describedby'))) missing.push('description of ' + one.outerHTML.slice(0, 80));
}
for (const one of document.querySelectorAll('select')) if (!one.labels.length) missing.push('label of a menu');
for (const one of document.querySelectorAll('th')) if (one.scope !== 'col') missing.push('scope of ' + one.textContent);
for (const one of document.querySelectorAll('table')) if (!one.caption) missing.push('caption of a table');
for (const one of document.querySelectorAll('section')) {
  if (!document.getElementById(one.getAttribute('aria-labelledby'))) missing.push('name of a run');
}
for (const one of document.querySelectorAll('nav a')) {
  if (!document.querySelector(one.getAttribute('href'))) missing.push('target of ' + one.textContent);
}
for (const one of document.querySelectorAll('.readout')) if (one.getAttribute('aria-live') !== 'polite') missing.push('live region');
return missing;
"""

# Every head of every table, clicked twice: the rows must then descend, then ascend, with what has no value last.
SORTS = """
const wrong = [];
document.querySelectorAll('table.sortable').forEach((table, place) => Array.from(table.tHead.rows[0].cells).forEach((head, index) => {
  for (const sign of [-1, 1]) {
    head.querySelector('button').click();
    const texts = Array.from(table.tBodies[0].rows).map((row) => row.cells[index].dataset.value ?? row.cells[index].textContent);
    const numbers = texts.filter((text) => text !== 'nan' && text !== '-' && text !== '').map(Number);
    const said = head.getAttribute('aria-sort');
    if (said !== (sign < 0 ? 'descending' : 'ascending')) wrong.push('aria-sort of table ' + place + ', column ' + index);
    if (numbers.some(Number.isNaN)) continue;
    if (numbers.some((value, at) => at && sign * (value - numbers[at - 1]) < 0)) wrong.push('order of table ' + place + ', column ' + index);
  }
}));
return wrong;
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that writes down its console and its requests."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """A report in the browser."""

    def __init__(self, driver: Any, path: Path, width: int = 1200, scheme: str = "light") -> None:
        self.driver, self.path = driver, path
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(path.as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> Any:
        """What a script gives once it gives something, within five seconds."""
        end = time.monotonic() + 5
        while not (found := self.js(script)) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def readout(self, figure: str = "figure-0-0") -> str:
        return str(self.js("return document.querySelector('#' + arguments[0] + ' .readout').textContent", figure))

    def tip(self) -> str:
        """The note beside the pointer; nothing where there is none."""
        return str(self.js("const t = document.querySelector('.tip'); return t.hidden ? '' : t.innerText"))

    def hover_cell(self, row: int, column: int, figure: str = "figure-0-0") -> str:
        """Move the real pointer over a cell, rows counted from below; gives what the page then says."""
        left, top, cell, tall, rows = self.js(
            "const c = document.querySelector('#' + arguments[0] + ' canvas');"
            "c.scrollIntoView({block: 'center'});"
            "const b = c.getBoundingClientRect(), d = c.dataset;"
            "return [b.left + Number(d.left), b.top, Number(d.cell), Number(d.tall), Number(d.rows)]",
            figure,
        )
        self._point(left + (column + 0.5) * cell, top + (rows - 1 - row + 0.5) * tall)
        return self.readout(figure)

    def hover_mark(self, series: int | None, index: int | None, figure: str) -> str:
        """Move the real pointer over a point or a bar of a chart (None: the first); gives what the page then says."""
        which = "[data-series]" if series is None else f"[data-series='{series}'][data-index='{index}']"
        x, y = self.js(
            "const p = document.querySelector('#' + arguments[0] + ' svg.plot'); p.scrollIntoView({block: 'center'});"
            "const m = p.querySelector(arguments[1]).getBoundingClientRect();"
            "return [m.left + m.width / 2, m.top + m.height / 2]",
            figure,
            which,
        )
        self._point(x, y)
        return self.readout(figure)

    def _point(self, x: float, y: float) -> None:
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def press(self, *keys: str, figure: str = "figure-0-0") -> str:
        """Press keys in a figure; gives what the page then says."""
        plot = self.driver.find_element("css selector", f"#{figure} canvas, #{figure} svg.plot")
        for key in keys:
            plot.send_keys(key)
        return self.readout(figure)

    def choose(self, view: int, figure: str = "figure-0-0") -> None:
        """Choose what a figure shows."""
        self.js(
            "const s = document.querySelector('#' + arguments[0] + ' select'); s.value = String(arguments[1]);"
            "s.dispatchEvent(new Event('change'))",
            figure,
            view,
        )

    def requests(self) -> list[str]:
        """What the page asked for, besides itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        own = self.path.as_uri()
        return [url for url in urls if url.partition("#")[0] != own and not url.startswith("data:")]

    def console(self) -> list[str]:
        """What stands in the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, name: str, otherwise: Path) -> None:
        folder = Path(os.environ.get("NSP_ARTIFACTS") or os.environ.get("CI_ARTIFACTS") or otherwise)
        folder.mkdir(parents=True, exist_ok=True)
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def shown_number(text: str) -> float:
    """The value in what the page says of a cell or a point: the number after the first colon that a number follows."""
    found = re.search(r": (-?\d[\d.]*(?:e[+-]?\d+)?)(?=$|;| )", text)
    assert found, f"no number in {text!r}"
    return float(found.group(1))
