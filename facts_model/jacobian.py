"""The Jacobian Lens of the shipped model, fitted on its training text.

After retraining the model, run ``python -m facts_model.jacobian``. It prints how far fits on fewer
prompts are from the shipped one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backward_lens_tl import fit_jacobian_lens, load_facts_model
from backward_lens_tl.jacobians.loading import FACTS_LENS
from facts_model.evaluate import SHIPPED
from facts_model.moments import SEED, texts

PROMPTS = (8, 32, 100)
"""Numbers of prompts; the last one is shipped."""

MAX_LENGTH = 64
# Many documents have fewer tokens than the 16 that are left out by default.
SKIP = 4


def documents_without_records() -> Iterator[str]:
    """Draw training documents that name no subject of the records, on which the lens is tested.

    Yields:
        One document.
    """
    records = json.loads((SHIPPED / "records.json").read_text(encoding="utf-8"))
    subjects = {record["requested_rewrite"]["subject"] for record in records}
    for text in texts(SEED):
        if not any(subject in text for subject in subjects):
            yield text


def fit_lenses(out: Path) -> list[Any]:
    """Fit the lens on more and more prompts.

    Args:
        out: The file that one fit continues from another.

    Returns:
        The lens of each of `PROMPTS`.
    """
    model = load_facts_model("bridge")
    drawn = list(islice(documents_without_records(), 2 * PROMPTS[-1]))
    return [
        fit_jacobian_lens(model, drawn, out, prompts=n, max_length=MAX_LENGTH, skip=SKIP, seed=None)
        for n in PROMPTS
    ]


def difference(lens: Any, other: Any, layer: int) -> float:
    """Relative difference of two lenses in one layer, as Frobenius norms."""
    own, reference = lens.jacobians[layer], other.jacobians[layer]
    return float((own - reference).norm() / reference.norm())


def main() -> None:
    """Write the file to the model's folder, in float16, as published lenses are."""
    with TemporaryDirectory() as folder:
        lenses = fit_lenses(Path(folder) / "lens.pt")
    shipped = lenses[-1]
    for lens in lenses[:-1]:
        by_layer = ", ".join(
            f"{difference(lens, shipped, layer):.3f}" for layer in shipped.source_layers
        )
        print(f"{lens.n_prompts} prompts instead of {shipped.n_prompts}, by layer: {by_layer}")
    shipped.save(str(SHIPPED / FACTS_LENS))
    print(shipped)


if __name__ == "__main__":
    main()
