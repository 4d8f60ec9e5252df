#!/usr/bin/env python
"""Pictures of the report for docs/tutorials/debug.md, one of each section, by a headless Chromium.

    python scripts/docs_screenshots.py      # writes docs/images/report-*.png; needs chromium and Pillow

The model and its two faults are the tutorial's own: its first block is run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "tutorials" / "debug.md"
WIDTH, HEIGHT = 1100, 1500
TALLEST = 620
"""Pixels of a picture that are kept; long tables and drawings are cut there."""


def page() -> str:
    """The tutorial's report, as HTML."""
    import fxquant

    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert block is not None, "the tutorial begins with its model"
    names: dict[str, Any] = {}
    exec(compile(block[1], str(PAGE), "exec"), names)
    batches = names["images"].split(16)
    return fxquant.report(names["model"], names["prepared"], batches, progress=False).html()


def picture(browser: str, html: str, section: str, folder: Path) -> Image.Image:
    """One section alone; ``summary`` is what stands above the first."""
    shown = "section {display: none}"
    if section != "summary":
        shown = f"body > * {{display: none !important}} body > #{section} {{display: block !important}}"
    (folder / "page.html").write_text(html.replace("</head>", f"<style>{shown}</style></head>"), encoding="utf-8")
    out = folder / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={out}"]
    command += [
        f"--window-size={WIDTH},{HEIGHT}",
        f"--user-data-dir={folder / 'profile'}",
        (folder / "page.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(out) as shot:
        return trimmed(shot.convert("RGB"))


def trimmed(shot: Image.Image) -> Image.Image:
    """Without the empty margin below, and at most ``TALLEST`` high."""
    blank = Image.new("RGB", shot.size, shot.getpixel((0, shot.height - 1)))
    box = ImageChops.difference(shot, blank).getbbox()
    bottom = shot.height if box is None else box[3] + 16
    return shot.crop((0, 0, shot.width, min(bottom, TALLEST, shot.height)))


def main() -> int:
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        print("docs_screenshots: no chromium is installed", file=sys.stderr)
        return 1
    html = page()
    IMAGES.mkdir(exist_ok=True)
    sections = re.findall(r'<section id="([a-z-]+)"', html)
    with tempfile.TemporaryDirectory() as folder:
        for section in ["summary", *sections]:
            shot = picture(browser, html, section, Path(folder)).quantize(64)
            shot.save(IMAGES / f"report-{section}.png", optimize=True)
            print(f"report-{section}.png: {shot.width} x {shot.height}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
