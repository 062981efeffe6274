"""What an edit costs, whatever the process did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backward_lens_tl.evaluation.costs import with_cost

_CPU = [torch.device("cpu")]
_SIZE = 60_000


def _many_small_blocks() -> list[bytearray]:
    """60 MB on the heap, because each block is small."""
    return [bytearray(_SIZE) for _ in range(1000)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="there is no peak to read")
def test_memory_that_was_in_use_before_counts_again() -> None:
    # The C library keeps the freed blocks, because the last one keeps the heap's end in use.
    last = _many_small_blocks()[-1]
    found, cost = with_cost(_many_small_blocks, _CPU)
    assert 0.9 < cost.memory / (_SIZE * len(found)) < 1.2  # overhead of 60 MB is below a tenth
    assert len(last) == _SIZE
