"""The command `python -m benchmarks.readings`: which tokens lead, under several readings.

`docs/looking/readings.json` holds its result on SmolLM2 and 100 prompts of CounterFact:

    python -m benchmarks.readings --model smollm2 --data counterfact.json --out docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.reproduction.readings import compare_readings


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `docs/looking.md`."""
    lines = [
        "| reading | matrix | led by ten tokens | leaders | target leads | median rank |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = " / ".join(f"{row[f'rank_{quarter}']:,.0f}" for quarter in range(1, 5))
        lines.append(
            f"| {row['reading']} | `{row['matrix']}` | {row['share_of_ten']:.1%} | "
            f"{row['leaders']:,} | {row['target_leads']:.1%} | {ranks} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readings", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a name, a folder or a file")
    parser.add_argument("--data", default="facts", help="facts, or a file of prompts")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder for readings.json")
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    table = compare_readings(model, read_records(options.data), options.prompts)
    rows = json.loads(table.to_json(orient="records"))
    sys.stdout.write(f"{as_markdown(rows)}\n")
    if options.out is not None:
        held = {"model": options.model, "prompts": options.prompts, "rows": rows}
        text = json.dumps(held, indent=1, ensure_ascii=False)
        (options.out / "readings.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
