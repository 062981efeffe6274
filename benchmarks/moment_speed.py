"""Speed of collecting second moments, against a plain loop over the texts.

``python -m benchmarks.moment_speed --model smollm2 --texts FILE`` writes
``docs/editing/moment-speed.json``, which docs/editing.md quotes. The loop runs the whole model on
one text after the other and adds `x x^T` in float64. Time is the process's own on one thread, so
other processes on the machine hardly matter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts, tokenize_prompts
from backward_lens_tl.data.texts import read_lines
from backward_lens_tl.editing import second_moments
from backward_lens_tl.files.storage import write_text
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.models.matrix_selection import find_editable
from benchmarks import machine

RESULTS = Path(__file__).parents[1] / "docs" / "editing" / "moment-speed.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the rows, and write them.

    Args:
        arguments: Command-line arguments; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", required=True, help="a file with one text per line")
    parser.add_argument("--number", type=int, default=12, help="number of texts (default: 12)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = load_model(options.model)
    lines = [line.strip() for line in read_lines(options.texts)]
    texts = [line for line in lines if line][: options.number]
    rows = measure(model, texts)
    for row in rows:
        sys.stdout.write(f"{json.dumps(row)}\n")
    found = {"machine": machine.describe("cpu"), "versions": machine.versions(), "rows": rows}
    write_text(options.out, json.dumps(found, indent=1) + "\n")


def measure(model: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens per second for the middle layer, for the last but one fifth, and for all layers.

    Args:
        model: The model.
        texts: The texts.

    Returns:
        One row per choice of layers, with both rates and their ratio.
    """
    host = host_of(model)
    n = host.n_layers
    choices = {"middle": [round(0.4 * n)], "late": [round(0.75 * n)], "all": list(range(n))}
    rows = []
    for name, layers in choices.items():

        def ours(some: Sequence[str], layers: Sequence[int] = layers) -> int:
            found = second_moments(model, some, layers=layers, prepend_bos=False, progress=False)
            return found.n_tokens

        def loop(some: Sequence[str], layers: Sequence[int] = layers) -> int:
            return _loop(host, some, layers)

        fast, slow = (_rate(run, texts) for run in (ours, loop))
        rows.append(
            {
                "layers": name,
                "last": layers[-1],
                "of": n,
                "tokens_per_second": round(fast, 1),
                "loop_tokens_per_second": round(slow, 1),
                "faster": round(fast / slow, 2),
            }
        )
    return rows


def _loop(host: Host, texts: Sequence[str], layers: Sequence[int]) -> int:
    """Collect the plain way."""
    sites = find_editable(host, "W_out", layers)
    totals: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in sites]
    n_tokens = 0
    for text in texts:
        [prompt] = tokenize_prompts(host, text, False)
        ids = prompt.ids[: host.n_ctx]
        seen = forward_pass(host, pad_prompts(host, [ids]), inputs=sites)
        n_tokens += len(ids)
        for place, inputs in enumerate(seen.inputs):
            rows = inputs[0].double()
            totals[place] = totals[place] + rows.T @ rows
    return n_tokens


def _rate(run: Callable[[Sequence[str]], int], texts: Sequence[str]) -> float:
    """Tokens per second of this process, after a short run that is not counted."""
    run(texts[:1])
    start = time.process_time()
    n_tokens = run(texts)
    return n_tokens / (time.process_time() - start)


if __name__ == "__main__":
    main()
