"""Second moments of the inputs of the shipped model's ``W_out``, on its training text.

ROME, MEMIT and the whitened forward pass shift need them. After retraining the model, run
``python -m facts_model.moments``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from backward_lens_tl.editing import SecondMoments, second_moments
from backward_lens_tl.editing.statistics.moments import FACTS_MOMENTS
from backward_lens_tl.models.loading import load_facts_model
from facts_model.corpus import Corpus
from facts_model.evaluate import SHIPPED

SEED = 1
TOKENS = 100_000


def texts(seed: int) -> Iterator[str]:
    """Draw training text endlessly.

    Args:
        seed: Seed of the sampling.

    Yields:
        One document.
    """
    for pieces in Corpus().documents(random.Random(seed)):
        yield "".join(piece.text for piece in pieces)


def build_moments() -> SecondMoments:
    """Collect the statistics of all layers.

    Returns:
        The statistics, in float32.
    """
    found = second_moments(load_facts_model(), texts(SEED), max_tokens=TOKENS, prepend_bos=False)
    # The sums are computed in float64; float32 halves the file.
    return replace(found, moments=tuple(own.float() for own in found.moments))


def main() -> None:
    """Write the file to the model's folder."""
    moments = build_moments()
    moments.save(SHIPPED / FACTS_MOMENTS)
    print(moments)


if __name__ == "__main__":
    main()
