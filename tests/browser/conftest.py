"""A report in Debian's Chromium, driven by Playwright. Skipped, with the reason, where either is missing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES = {"desktop": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
AXE_VERSION = "4.10.3"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = os.environ.get("STAGEBENCH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on PATH: make test-browser installs it where apt may be used")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser does that")
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root; the page is our own file
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, fetched by npm into a temporary folder."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("no npm, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    (folder / "package.json").write_text(json.dumps({"private": True}))
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", f"axe-core@{AXE_VERSION}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm could not fetch axe-core: {(done.stderr or done.stdout).strip()[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with all that a report can show: engines, device readings, failures, pictures. STAGEBENCH_REPORT takes another's."""
    if given := os.environ.get("STAGEBENCH_REPORT"):
        return Path(given)
    from h200_study import h200_study
    from stagebench.report import write_report

    folder = tmp_path_factory.mktemp("study")
    h200_study(folder)
    return write_report(folder)


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids=lambda p: "-".join(p))
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The report at one size and colour scheme; `page.noise` collects console messages, errors and requests other than the page."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone", bypass_csp=True
    )
    opened = context.new_page()
    opened.noise = []
    opened.on("console", lambda message: opened.noise.append(f"console {message.type}: {message.text}"))
    opened.on("pageerror", lambda error: opened.noise.append(f"error: {error}"))
    opened.on(
        "request",
        lambda r: opened.noise.append(f"request: {r.url[:80]}") if r.url != report.as_uri() and not r.url.startswith("data:") else None,
    )
    opened.goto(report.as_uri())
    yield opened
    if folder := os.environ.get("STAGEBENCH_SCREENSHOTS"):
        opened.screenshot(path=Path(folder, f"{size}-{scheme}.png"), full_page=True)
    context.close()
