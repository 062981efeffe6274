"""Take the screenshots of the table in docs/images (`make pictures`).

They show the README's examples as written by `save_html`, with the details of a cell: `table.png`
for the facts model and `real.png` for SmolLM2 in a wide window, `table-narrow.png` at the width of
a phone, and each of them in dark colours, such as `table-dark.png`.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import backward_lens_tl as blt

IMAGES = Path(__file__).parent / "images"
WIDE, NARROW = 1240, 400
COLOURS = 128  # palette size: saves two thirds of the bytes without a visible difference


def take(
    browser: Browser,
    page: Path,
    width: int,
    scheme: str,
    details: Mapping[str, tuple[int, int]],
    to: Path,
) -> None:
    """Take one screenshot of the whole page.

    Args:
        browser: Chromium.
        page: The HTML file.
        width: Width of the window in CSS pixels.
        scheme: `"light"` or `"dark"`.
        details: Layer and position of the cell to show details of, by matrix.
        to: The PNG file to write.
    """
    window = browser.new_page(
        viewport={"width": width, "height": 500}, color_scheme=scheme, device_scale_factor=2
    )
    window.goto(page.as_uri())
    for matrix, (layer, pos) in details.items():
        rows = window.locator(f"figure[data-matrix={matrix}] tbody tr")
        rows.nth(-1 - layer).locator("td").nth(pos).focus()
    # Fit the height of the window to the page.
    height = window.evaluate("Math.ceil(document.body.getBoundingClientRect().bottom)")
    window.set_viewport_size({"width": width, "height": height})
    picture = Image.open(io.BytesIO(window.screenshot(full_page=True)))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)
    window.close()


def main() -> None:
    """Take all screenshots."""
    facts = blt.backward_lens(blt.load_facts_model(), "Lionel Messi plays for", " Paris")
    eiffel = "The Eiffel Tower is located in the city of"
    real = blt.backward_lens(blt.load_model("smollm2"), eiffel, " Rome", matrices="W_out")
    pictures = (
        ("table", facts, WIDE, {"W_in": (3, 3), "W_out": (6, 5)}),
        ("table-narrow", facts, NARROW, {"W_out": (6, 5)}),
        ("real", real, WIDE, {"W_out": (26, 9)}),
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, result, width, details in pictures:
            page = Path(folder) / f"{name}.html"
            result.save_html(page)
            for ending, scheme in {"": "light", "-dark": "dark"}.items():
                take(browser, page, width, scheme, details, IMAGES / f"{name}{ending}.png")
        browser.close()


if __name__ == "__main__":
    main()
