"""Second moments that are collected once per model and texts, and kept for later processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from backward_lens_tl.data.texts import read_lines
from backward_lens_tl.editing.statistics.moment_collection import second_moments
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.errors import EditError, first_line, raised_as
from backward_lens_tl.models import host_of

CACHE_FOLDER = "BACKWARD_LENS_CACHE"
"""Environment variable with the folder of the cache; `~/.cache/backward-lens-tl` by default."""

_WIKITEXT, _WIKITEXT_PART = "Salesforce/wikitext", "wikitext-103-raw-v1"

_TOKENIZED = "Paris is in France."
"""A text whose tokens stand for the tokenizer and the BOS token."""


@raised_as(EditError)
def cached_moments(
    model: nn.Module,
    texts: str | Path | Sequence[str] | None,
    *,
    layers: Sequence[int],
    max_tokens: int,
    prepend_bos: bool | None,
    progress: bool,
) -> SecondMoments:
    """Load second moments of `W_out`'s inputs from the cache, or collect and keep them there.

    The file's name has a checksum of the model's weights, the texts and the settings. It says
    nothing about hooks, so a model with hooks of the caller neither reads nor writes the cache.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        texts: Texts, or a name as in `read_lines`; `None` for WikiText-103 on the hub.
        layers: The layers.
        max_tokens: As in `second_moments`.
        prepend_bos: As in `second_moments`.
        progress: Whether to show a progress bar.

    Returns:
        The statistics.

    Raises:
        EditError: If the folder cannot be created, or as for `second_moments`.
    """
    host = host_of(model)
    if texts is None:
        stream, of_texts = _wikitext(), f"{_WIKITEXT} {_WIKITEXT_PART}"
    else:
        lines = read_lines(str(texts)) if isinstance(texts, str | Path) else texts
        held = [line.strip() for line in lines]
        stream, of_texts = iter(held), hashlib.sha256(json.dumps(held).encode()).hexdigest()
    collect = partial(
        second_moments,
        model,
        stream,
        layers=layers,
        max_tokens=max_tokens,
        prepend_bos=prepend_bos,
        progress=progress,
    )
    if host.hooked_modules:
        return collect()
    tokens = host.tokenize(_TOKENIZED, prepend_bos)  # the default of a model can change
    settings = [list(layers), max_tokens, prepend_bos]
    about = [host.fingerprint(), of_texts, tokens, *settings]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = _folder() / f"second_moments-{digest}.safetensors"
    if file.exists():
        found = SecondMoments.load(file)
        if found.n_tokens >= max_tokens:
            return found
    return collect(out=file)  # resumes an interrupted collection


def _folder() -> Path:
    folder = Path(os.environ.get(CACHE_FOLDER) or "~/.cache/backward-lens-tl").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(
            f"second moments cannot be kept in {str(folder)!r}: {first_line(error)}; set the "
            f"environment variable {CACHE_FOLDER} to another folder"
        ) from error
    return folder


def _wikitext() -> Iterator[str]:
    """Paragraphs of WikiText-103, streamed."""
    import datasets

    try:
        data = datasets.load_dataset(_WIKITEXT, _WIKITEXT_PART, split="train", streaming=True)
    # The hub, its file systems and file readers can raise anything.
    except Exception as error:
        raise EditError(
            f"second moments are collected from {_WIKITEXT!r}, which cannot be loaded from the "
            f"hub: {first_line(error)}; pass other texts, preset_methods(..., texts=file) or "
            "--statistics FILE, with one text per line"
        ) from error
    yield from (row["text"] for row in data if row["text"].strip())
