"""Perplexity on ordinary text, which the paper uses to measure the damage of an edit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.choices import Denominator
from backward_lens_tl.data.texts import FACTS_TEXTS, WIKITEXT, read_lines
from backward_lens_tl.errors import EvaluationError, InputError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.models import Host
from backward_lens_tl.models.loading import FACTS_MODEL

_POSITIONS = 1024
"""The largest number of tokens per forward pass; each has logits for the whole vocabulary."""

Rows = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on several texts.

    Attributes:
        mean_of_texts: The mean over texts, which a single text can dominate.
        corpus: The perplexity of all texts together.
    """

    mean_of_texts: float
    corpus: float


@dataclass(frozen=True)
class Texts:
    """Texts to measure perplexity on.

    Attributes:
        name: Where the texts come from.
        texts: The texts.
    """

    name: str
    texts: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the texts in hex."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def tokens(self, host: Host, config: EvaluationConfig) -> Rows:
        """Tokenize the texts.

        Args:
            host: The model.
            config: The settings.

        Returns:
            The token ids of each text, truncated to `max_tokens`. Texts of one token are left out.

        Raises:
            EvaluationError: If no text has two tokens.
        """
        longest = min(config.max_tokens, host.n_ctx)
        rows = [tuple(host.tokenize(text, config.prepend_bos)[:longest]) for text in self.texts]
        long_enough = [row for row in rows if len(row) > 1]
        if self.texts and not long_enough:
            raise EvaluationError(f"no text of {self.name!r} has two tokens")
        return long_enough


def read_texts(host: Host, config: EvaluationConfig) -> Texts:
    """Read the texts that the settings select.

    Args:
        host: The model.
        config: The settings.

    Returns:
        The first texts that are long enough.

    Raises:
        EvaluationError: If the texts cannot be read, or none is long enough.
    """
    name = config.texts or (FACTS_TEXTS if host.name == FACTS_MODEL else WIKITEXT)
    if config.n_texts == 0:
        return Texts("no texts", ())
    try:
        lines = read_lines(name)
    except InputError as error:
        raise EvaluationError(f"{error}, or n_texts=0 to skip perplexity") from error
    long_enough = [text for text in lines if len(text) >= config.min_characters]
    if not long_enough:
        raise EvaluationError(f"no text of {name!r} has {config.min_characters} characters")
    return Texts(name, tuple(long_enough[: config.n_texts]))


@dataclass(frozen=True)
class TextPass:
    """One forward pass over texts.

    Attributes:
        pairs: The first token of each text as prompt, and the others as its answer.
        logits: The logits that predict them.
    """

    pairs: Continuations
    logits: Float[Tensor, "batch n d_vocab"]


def perplexity(host: Host, rows: Rows, denominator: Denominator) -> Perplexity:
    """Perplexity of texts, `exp(sum_i -log P(x_i | x_<i) / n)`, with `i` from the second token on.

    Args:
        host: The model.
        rows: The token ids of each text, at least two.
        denominator: Whether `n` is the number of tokens, as in the authors' code, or the number of
            predicted tokens, which is one less.

    Returns:
        The perplexity. NaN without texts, infinite if the model returns NaN.
    """
    return perplexity_of(text_passes(host, rows), denominator)


@torch.no_grad()
def perplexity_of(passes: Iterable[TextPass], denominator: Denominator) -> Perplexity:
    """Perplexity of texts that the model reads; see `perplexity`.

    Args:
        passes: The forward passes.
        denominator: What is divided by.

    Returns:
        The perplexity.
    """
    less = 0 if denominator == "n-1" else 1
    sums, counts = [], []
    for each in passes:
        terms = each.pairs.log_probs(each.logits)
        sums += (-terms.double().sum(1)).nan_to_num(nan=torch.inf).tolist()
        counts += (each.pairs.mask.sum(1) + less).tolist()
    if not sums:
        return Perplexity(math.nan, math.nan)
    values = [_exp(total / count) for total, count in zip(sums, counts, strict=True)]
    return Perplexity(sum(values) / len(values), _exp(math.fsum(sums) / sum(counts)))


@torch.no_grad()
def text_passes(host: Host, rows: Rows) -> Iterator[TextPass]:
    """Read texts, those of similar length together.

    Args:
        host: The model.
        rows: The token ids of each text, at least two.

    Yields:
        One forward pass after the other.
    """
    for some in _batches(host, rows):
        pairs = Continuations.of(host, [row[:1] for row in some], [row[1:] for row in some])
        with host.own_precision():
            logits = pairs.logits(host)
        yield TextPass(pairs, logits)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _batches(host: Host, rows: Rows) -> Iterator[Rows]:
    """Groups of texts of similar length, each for one forward pass."""
    # The last token is predicted but not read.
    for group in host.length_groups([len(row) - 1 for row in rows]):
        together: list[tuple[int, ...]] = []
        for row in sorted((rows[at] for at in group), key=len):
            if together and (len(together) + 1) * len(row) > _POSITIONS:
                yield together
                together = []
            together.append(row)
        if together:
            yield together
