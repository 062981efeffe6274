"""Makes the pictures of the table in docs/images: `.venv/bin/python docs/pictures.py`.

The README's example with the model that ships here, as `save_html` writes it and Chromium shows
it, with the details of a cell: `table.png` and `table-dark.png` in a wide window,
`table-narrow.png` and `table-narrow-dark.png` in one as wide as a phone.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import backward_lens_tl as blt

IMAGES = Path(__file__).parent / "images"
WIDE, NARROW = 1240, 400
COLOURS = 128  # of a palette: a third of the bytes, and no difference that is seen


def take(browser: Browser, page: Path, width: int, scheme: str, to: Path) -> None:
    """Take one picture of the whole page.

    Args:
        browser: Chromium.
        page: The page.
        width: Of the window, in CSS pixels.
        scheme: `"light"` or `"dark"`.
        to: Where the PNG goes.
    """
    window = browser.new_page(
        viewport={"width": width, "height": 500}, color_scheme=scheme, device_scale_factor=2
    )
    window.goto(page.as_uri())
    cells = {"W_in": (3, 3), "W_out": (6, 5)} if width == WIDE else {"W_out": (6, 5)}
    for matrix, (layer, pos) in cells.items():
        rows = window.locator(f"figure[data-matrix={matrix}] tbody tr")
        rows.nth(-1 - layer).locator("td").nth(pos).focus()
    # As high as what is on it.
    height = window.evaluate("Math.ceil(document.body.getBoundingClientRect().bottom)")
    window.set_viewport_size({"width": width, "height": height})
    picture = Image.open(io.BytesIO(window.screenshot(full_page=True)))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)
    window.close()


def main() -> None:
    """Take all four."""
    result = blt.backward_lens(blt.load_facts_model(), "Lionel Messi plays for", " Paris")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "table.html"
        result.save_html(page)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width in {"table": WIDE, "table-narrow": NARROW}.items():
            for ending, scheme in {"": "light", "-dark": "dark"}.items():
                take(browser, page, width, scheme, IMAGES / f"{name}{ending}.png")
        browser.close()


if __name__ == "__main__":
    main()
