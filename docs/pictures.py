"""Take the screenshots of tables in docs/images (`make pictures`).

They show the README's examples as written by `save_html`, with the details of a cell: `table.png`
for the facts model and `real.png` for SmolLM2 in a wide window, `table-narrow.png` at the width of
a phone, and each of them in dark colours, such as `table-dark.png`. `live-table.png` and
`training-run.png` show a training run of the facts model, recorded as in docs/training.md.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import backward_lens_tl as blt
from backward_lens_tl import figures
from backward_lens_tl.views.training.step_table import StepTable

IMAGES = Path(__file__).parent / "images"
WIDE, NARROW, TRAINING = 1240, 400, 1120
SCHEMES = {"": "light", "-dark": "dark"}
HEAD = "<!doctype html><html lang='en'><meta charset='utf-8'>"
TAUGHT = (
    "Lionel Messi plays for Paris",
    "The Eiffel Tower is in the city of Rome",
    "Barack Obama grew up in Paris",
)
SHOWN = ("norm", "share", "reference_cosine", "change_norm", "change_cosine")
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
    save(io.BytesIO(window.screenshot(full_page=True)), to)
    window.close()


def save(picture: io.BytesIO, to: Path) -> None:
    """Save a picture with few colours.

    Args:
        picture: The picture in any format.
        to: The PNG file to write.
    """
    plain = Image.open(picture).convert("RGB")
    plain.quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)


def train_facts(folder: Path) -> blt.training.TrainingRecord:
    """Record 60 steps of AdamW that teach the facts model other answers.

    Args:
        folder: Folder of the record.

    Returns:
        The record.
    """
    torch.manual_seed(0)
    model = blt.load_facts_model()
    record = blt.training.TrainingRecord(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    eiffel = ("The Eiffel Tower is in the city of", " Rome")
    watch = blt.training.watch(model, "W_out", every=2, changes=True, reference=eiffel)
    with watch as watched:
        for index in range(60):
            model(model.to_tokens(TAUGHT[index % len(TAUGHT)]), return_type="loss").backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step := watched.step()) is not None:
                record.add(step)
    return record


def take_training(browser: Browser, folder: Path) -> None:
    """Take the pictures of a training run.

    Args:
        browser: Chromium.
        folder: Folder for temporary files.
    """
    table = train_facts(folder / "record").to_dataframe()
    page = folder / "live-table.html"
    last = StepTable.of(table[table["step"] == table["step"].max()], limit=8)
    page.write_text(f"{HEAD}<body class='blt'>{last._repr_html_()}", encoding="utf-8")
    for ending, scheme in SCHEMES.items():
        take(browser, page, TRAINING, scheme, {}, IMAGES / f"live-table{ending}.png")
    figure = figures.training_run(table, quantities=SHOWN, backend="matplotlib")
    figure.savefig(IMAGES / "training-run.png", dpi=80)  # in full colour, for its colour bars


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
            for ending, scheme in SCHEMES.items():
                take(browser, page, width, scheme, details, IMAGES / f"{name}{ending}.png")
        take_training(browser, Path(folder))
        browser.close()


if __name__ == "__main__":
    main()
