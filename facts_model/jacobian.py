"""The Jacobian Lens of the shipped model, fitted on its training text.

After retraining the model, run ``python -m facts_model.jacobian``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from backward_lens_tl import fit_jacobian_lens, load_facts_model
from backward_lens_tl.jacobians.loading import FACTS_LENS
from facts_model.evaluate import SHIPPED
from facts_model.moments import SEED, texts

PROMPTS = 100
MAX_LENGTH = 64
# Most documents have fewer tokens than the 16 that are left out by default.
SKIP = 4


def documents_without_records() -> Iterator[str]:
    """Draw training documents that name no subject of the records, which remain for tests.

    Yields:
        One document.
    """
    records = json.loads((SHIPPED / "records.json").read_text(encoding="utf-8"))
    subjects = {record["requested_rewrite"]["subject"] for record in records}
    for text in texts(SEED):
        if not any(subject in text for subject in subjects):
            yield text


def main() -> None:
    """Write the file to the model's folder, in float16, as published lenses are."""
    drawn = list(islice(documents_without_records(), 2 * PROMPTS))
    with TemporaryDirectory() as folder:
        lens = fit_jacobian_lens(
            load_facts_model("bridge"),
            drawn,
            Path(folder) / "lens.pt",
            prompts=PROMPTS,
            max_length=MAX_LENGTH,
            skip=SKIP,
            seed=None,
        )
    lens.save(str(SHIPPED / FACTS_LENS))
    print(lens)


if __name__ == "__main__":
    main()
