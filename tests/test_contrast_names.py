"""Neighbors that name one of the other subjects of the contrast key, counted by hand."""

from __future__ import annotations

import random

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.methods.shift import N_CONTRAST
from backward_lens_tl.editing.shift.subjects import SUBJECTS
from benchmarks.contrast_names import named_neighbors


def test_neighbors_that_name_another_subject() -> None:
    prompt = "Messi plays for"
    chosen = random.Random(prompt).sample(SUBJECTS, N_CONTRAST)
    [left_out, *_] = [name for name in SUBJECTS if name not in chosen]
    neighbors = ["Neymar plays for", f"{chosen[3]} FC plays for", f"{left_out} 2 plays for"]
    row = {
        "prompt": prompt,
        "subject": "Messi",
        "target": " Paris",
        "neighborhood_prompts": neighbors,
    }
    records = [each for each in read_records([row]).rows if isinstance(each, Record)]
    assert list(named_neighbors(records)) == [
        (neighbors[1], chosen[3], True),
        (neighbors[2], left_out, False),
    ]
