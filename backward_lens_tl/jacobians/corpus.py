"""The texts that a Jacobian Lens is fitted on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backward_lens_tl._checks import check_text, is_integer, shown
from backward_lens_tl.data.texts import FACTS_TEXTS, WIKITEXT, read_lines
from backward_lens_tl.errors import JacobianLensError
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class Corpus:
    """Texts in the order in which they are used.

    Attributes:
        name: Where they come from.
        texts: The texts.
        n_too_short: Number of texts that were drawn and left out.
    """

    name: str
    texts: tuple[str, ...]
    n_too_short: int

    def fingerprint(self, n: int) -> str:
        """SHA-256 of the first texts in hex.

        Args:
            n: The number of texts.

        Returns:
            The checksum.
        """
        return hashlib.sha256(json.dumps(self.texts[:n]).encode()).hexdigest()


def draw_corpus(
    host: Host, texts: str | Path | Sequence[str], n: int, n_tokens: int, seed: int | None
) -> Corpus:
    """Draw texts that are long enough.

    Args:
        host: The model, whose tokens count.
        texts: Texts, or the name of a file or data set as in `read_lines`.
        n: Number of texts to draw; fewer if there are not as many.
        n_tokens: Tokens that a text needs, with BOS.
        seed: Seed of the order; `None` is their own.

    Returns:
        The texts. A smaller number gives the first of them.

    Raises:
        JacobianLensError: If no text is long enough, or an argument is invalid.
    """
    name, found = _read(texts)
    if seed is not None and not is_integer(seed):
        raise JacobianLensError(f"seed is {shown(seed)}; pass an integer, or None for no shuffling")
    if seed is not None:
        random.Random(int(seed)).shuffle(found)
    drawn: list[str] = []
    n_seen = 0
    for text in found:
        n_seen += 1
        if host.model.to_tokens(text).shape[1] >= n_tokens:
            drawn.append(text)
        if len(drawn) == n:
            break
    if not drawn:
        raise JacobianLensError(
            f"none of the {len(found)} texts of {name!r} has {n_tokens} tokens; pass longer texts, "
            "or a smaller skip"
        )
    return Corpus(name, tuple(drawn), n_seen - len(drawn))


def _read(texts: object) -> tuple[str, list[str]]:
    """The name of texts, and those that are not empty."""
    if isinstance(texts, str | Path):
        name = str(texts)
        lines = [line.strip() for line in read_lines(name)]
        is_file = name not in (FACTS_TEXTS, WIKITEXT)
        return (Path(name).name if is_file else name), [line for line in lines if line]
    if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        raise JacobianLensError(
            f"texts is a {type(texts).__name__}; pass a list of texts, a file with one text per "
            f"line, {FACTS_TEXTS!r} or {WIKITEXT!r}"
        )
    for text in texts:
        check_text("text", text, JacobianLensError)
    return "a list of texts", [text for text in texts if text]
