"""Plain texts, one per line: of the facts model, of WikiText, or of a file."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path

from backward_lens_tl.errors import InputError, first_line

FACTS_TEXTS = "facts"
"""Ordinary sentences from the facts model's held-out data."""

WIKITEXT = "Salesforce/wikitext"
"""WikiText on the Hugging Face hub; the paper uses `wikitext-2-raw-v1`."""


def read_lines(name: str) -> list[str]:
    """Read texts by name.

    Args:
        name: `"facts"`, `"Salesforce/wikitext"` (the test split of `wikitext-2-raw-v1`), or a
            UTF-8 file with one text per line.

    Returns:
        The texts. Those of a file and of WikiText end with their line feed.

    Raises:
        InputError: If there are no such texts.
    """
    if name == FACTS_TEXTS:
        file = files("backward_lens_tl") / "facts_model" / "facts.json"
        sentences: list[str] = json.loads(file.read_text(encoding="utf-8"))["ordinary_held_out"]
        return sentences
    if name == WIKITEXT:
        return _wikitext()
    try:
        # Only a line feed ends a line, and it is kept, as in the hub's rows.
        return list(io.StringIO(Path(name).read_bytes().decode()))
    except (OSError, ValueError) as error:
        raise InputError(
            f"texts {name!r} cannot be read: {error}; pass {FACTS_TEXTS!r}, {WIKITEXT!r}, or a "
            "file with one text per line"
        ) from error


def _wikitext() -> list[str]:
    import datasets

    try:
        data = datasets.load_dataset(WIKITEXT, "wikitext-2-raw-v1", split="test")
    except Exception as error:  # errors of the hub, of file systems, and of readers of files
        raise InputError(
            f"{WIKITEXT!r} cannot be loaded: {first_line(error)}; pass texts='wiki.test.raw', a "
            f"file with one text per line, or {FACTS_TEXTS!r}"
        ) from error
    return list(data["text"])
