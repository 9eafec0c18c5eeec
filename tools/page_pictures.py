"""Pictures of a report.html in headless Chromium: light, dark, 360 pixels wide, printed.

    apt-get install chromium chromium-driver; pip install selenium
    python tools/page_pictures.py demo/reports/demo/report.html build/pictures
    python tools/page_pictures.py demo/reports/demo/report.html docs/images --first    # the picture of the README

The README's picture is of `fedlora demo --rounds 2 --train_per_cat 6 --test_per_cat 6`.
"""

from __future__ import annotations

import argparse
import base64
import shutil
from pathlib import Path
from typing import Any

WIDE, NARROW = 1280, 360
FIRST_HEIGHT = 900
"""Of the README's picture."""


def find_browser() -> tuple[str, str] | None:
    """Chromium and its driver, None where one of them is not installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def open_browser(*, width: int = WIDE, height: int = FIRST_HEIGHT, dark: bool = False, script: bool = True) -> Any:
    """A browser of this width that runs the scripts of pages unless `script` is false; the caller quits it."""
    from selenium import webdriver  # pyright: ignore[reportMissingImports]

    found = find_browser()
    assert found is not None, "install chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    if not script:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return browser


def take(browser: Any, width: int, height: int | None = None) -> bytes:
    """The page as PNG, whole or its first pixels."""
    whole = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
    shot = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", action="store_true", help="only the top of the light page, as report.png")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    address = given.page.resolve().as_uri()
    kinds = {"light": (WIDE, False), "dark": (WIDE, True), "narrow": (NARROW, False)}
    for name, (width, dark) in {"report": kinds["light"]}.items() if given.first else kinds.items():
        browser = open_browser(width=width, dark=dark)
        try:
            browser.get(address)
            (given.folder / f"{name}.png").write_bytes(take(browser, width, FIRST_HEIGHT if given.first else None))
            if name == "light":
                printed = browser.execute_cdp_cmd(
                    "Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True}
                )
                (given.folder / "printed.pdf").write_bytes(base64.b64decode(printed["data"]))
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
