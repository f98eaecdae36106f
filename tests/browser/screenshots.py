"""Screenshots of a report for docs/assets, at three sizes, light and dark: `make screenshots` (REPORT=results/<study>/report.html)."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

SIZES = {"desktop": (1280, 860), "tablet": (820, 1180), "phone": (390, 844)}
PARTS = ("stages", "run_order", "waterfall")
COLOURS = 64


def keep(png: bytes, path: Path) -> None:
    """With a palette: a page has few colours, and the repository keeps every version of a picture."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size // 1000} kB\n")


def take(page: Page, folder: Path, name: str, *, details: bool) -> None:
    keep(page.screenshot(), folder / f"report-{name}.png")
    if details:
        for part in PARTS:
            if found := page.query_selector(f"#figure-{part}"):
                keep(found.screenshot(), folder / f"figure-{part.replace('_', '-')}.png")
        if found := page.query_selector("#answers .answer"):
            keep(found.screenshot(), folder / "report-answers.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("results/demo/report.html"))
    parser.add_argument("--to", type=Path, default=Path("docs/assets"))
    given = parser.parse_args()
    chromium = os.environ.get("STAGEBENCH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium or not given.report.exists():
        sys.exit(f"needs chromium on PATH and {given.report} (make demo)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(given.report.resolve().as_uri())
                take(page, given.to, f"{size}-{scheme}", details=(size, scheme) == ("desktop", "light"))
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
