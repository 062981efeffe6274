"""Second moments of what the shipped model's ``W_out`` reads, over its own kind of text.

ROME, MEMIT and the whitened forward pass shift need them. Run with
``python -m facts_model.moments``, after the model was trained anew.
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
    """Draw training text without end.

    Args:
        seed: Source of randomness.

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
    # Half the size; the sums were made in float64.
    return replace(found, moments=tuple(own.float() for own in found.moments))


def main() -> None:
    """Write the file beside the model."""
    moments = build_moments()
    moments.save(SHIPPED / FACTS_MOMENTS)
    print(moments)


if __name__ == "__main__":
    main()
