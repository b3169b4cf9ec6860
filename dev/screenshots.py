"""Pictures of a run's page for docs/report.md: `python dev/screenshots.py runs/mnist5k-mnist5k/report.html`."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
PARTS = {  # sections of each picture, from the first to the last
    "report-verdict": ("verdict", "scores"),
    "report-curves": ("curves", "spectrum"),
}
WIDTH = 1000  # px


def main(page: Path) -> None:
    """Photograph the parts of the page, in a few colours to keep the files small."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        for name, (first, last) in PARTS.items():
            top, bottom = (tab.locator(f"#{section}").bounding_box() for section in (first, last))
            assert top is not None and bottom is not None, f"{page} has no section {first} or {last}"
            clip = {"x": 0, "y": top["y"], "width": WIDTH, "height": bottom["y"] + bottom["height"] - top["y"]}
            shot = Image.open(io.BytesIO(tab.screenshot(full_page=True, clip=clip)))
            shot.convert("RGB").quantize(64).save(PICTURES / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
