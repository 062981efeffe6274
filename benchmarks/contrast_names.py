"""Neighbors of an evaluation that name one of the shift's own other subjects.

``python -m benchmarks.contrast_names --data counterfact_flat_1919.json`` lists them for the records
of docs/editing.md. The contrast key spares prompts about these subjects, whether they are measured
or not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.methods.shift import N_CONTRAST
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.shift.contrast import chosen_names
from backward_lens_tl.editing.shift.subjects import SUBJECTS
from benchmarks.tuning import counterfact_split

_N_RECORDS = 200


def main(arguments: Sequence[str] | None = None) -> None:
    """List the neighbors.

    Args:
        arguments: Command-line arguments; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="flattened CounterFact, 1,919 rows")
    options = parser.parse_args(arguments)
    rows = read_records(options.data).rows
    measured = [rows[at] for at in counterfact_split(len(rows))[1][:_N_RECORDS]]
    records = [row for row in measured if isinstance(row, Record)]
    n_neighbors = sum(len(record.neighborhood_prompts) for record in records)
    named = list(named_neighbors(records))
    for prompt, name, is_chosen in named:
        used = "in the record's contrast" if is_chosen else "not in the record's contrast"
        sys.stdout.write(f"{prompt!r} names {name!r}, {used}\n")
    n_chosen = sum(is_chosen for *_, is_chosen in named)
    sys.stdout.write(
        f"{len(named)} of {n_neighbors} neighbors name one of {len(SUBJECTS)} subjects, "
        f"{n_chosen} of them one of the {N_CONTRAST} that are chosen for their record\n"
    )


def named_neighbors(records: Iterable[Record]) -> Iterator[tuple[str, str, bool]]:
    """Neighbors that name one of the other subjects.

    Args:
        records: The records.

    Yields:
        The prompt, the name, and whether it is one of those that the record's edit is contrasted
        with.
    """
    for record in records:
        chosen = chosen_names(EditRequest.of(record), SUBJECTS, N_CONTRAST)
        for prompt in record.neighborhood_prompts:
            names = [name for name in SUBJECTS if name in prompt]
            if names:
                found = [name for name in names if name in chosen]
                yield prompt, (found or names)[0], bool(found)


if __name__ == "__main__":
    main()
