"""CounterFact's metrics for one record, in both definitions, and the n-gram entropy of a text.

`new` is the edit's answer and `true` the original answer. The paper counts an answer if each of its
tokens is the most probable one. ROME's success compares probabilities, `P = exp(-nll)`, and its
magnitude is their difference.

                            the paper                   success in ROME
    efficacy, paraphrase    new is the answer           P(new) > P(true)
    neighborhood            true is the answer          P(true) > P(new)
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backward_lens_tl.evaluation.divergence import Moved
from backward_lens_tl.evaluation.plan import ScoredPrompt
from backward_lens_tl.evaluation.scoring import Score

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # noqa: RUF001
"""Words, including apostrophes inside them, and single punctuation marks."""

_NAMES = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}


@dataclass(frozen=True)
class Answered:
    """A prompt with the scores of its two answers.

    Attributes:
        probe: The prompt.
        new: Score of the new answer.
        true: Score of the original answer, if there is one.
        moved: What the edit does to the distribution after a neighborhood prompt.
    """

    probe: ScoredPrompt
    new: Score
    true: Score | None
    moved: Moved | None = None


def record_metrics(answered: Sequence[Answered]) -> dict[str, float]:
    """Efficacy, paraphrase and neighborhood of a record.

    Args:
        answered: The record's prompts with their scores.

    Returns:
        Means over the prompts of each kind: the paper's metric under its name, and ROME's with
        `_success` and `_magnitude`; of the neighborhood also how far it moved. NaN if there is no
        prompt or no original answer.
    """
    found: dict[str, float] = {}
    for kind, name in _NAMES.items():
        of_kind = [each for each in answered if each.probe.kind == kind]
        values = [_values(each, wants_new=kind != "neighborhood") for each in of_kind]
        for place, suffix in enumerate(("", "_success", "_magnitude")):
            found[name + suffix] = mean([value[place] for value in values])
    moved = [each.moved for each in answered if each.moved is not None]
    found["kept"] = mean([float(each.is_kept) for each in moved])
    found["neighborhood_kl"] = mean([each.kl for each in moved])
    return found


def _values(answered: Answered, *, wants_new: bool) -> tuple[float, float, float]:
    """The paper's metric, and ROME's success and magnitude."""
    both: tuple[Score | None, Score | None] = (answered.new, answered.true)
    wanted, other = both if wants_new else both[::-1]
    is_predicted = math.nan if wanted is None else float(wanted.is_predicted)
    if wanted is None or other is None:
        return is_predicted, math.nan, math.nan
    difference = math.exp(-wanted.nll) - math.exp(-other.nll)
    return is_predicted, float(wanted.nll < other.nll), difference


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def begins_with(text: str, answer: str) -> bool:
    """Whether a continuation begins with an answer, as whole words.

    Args:
        text: The continuation.
        answer: The answer.

    Returns:
        Whether it does. Leading spaces are ignored. `" Parisian"` does not begin with `" Paris"`.
    """
    start, wanted = text.lstrip(), answer.strip()
    following = start[len(wanted) : len(wanted) + 1]
    return start.startswith(wanted) and not (wanted[-1:].isalnum() and following.isalnum())


def tidied(text: str) -> str:
    """A generated text in NFKD, with a space for two line breaks, for `ngram_entropy`."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's bigrams and trigrams, `H_2 / 3 + 2 H_3 / 3`.

    `H_n = -sum f log2 f` over the frequencies of the n-grams. The authors use NLTK's words; here a
    regular expression splits the text into runs of letters and digits, including apostrophes inside
    them, and single punctuation marks.

    Args:
        text: The text.

    Returns:
        The entropy in bits. It is 0 if all n-grams are equal, or the text has at most two words.

    Examples:
        >>> from backward_lens_tl.evaluation.metrics import ngram_entropy
        >>> round(ngram_entropy("a b a b a b"), 2)
        0.99
    """
    words = _WORDS.findall(text)
    return _entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3


def _entropy(words: Sequence[str], n: int) -> float:
    counts: Mapping[tuple[str, ...], int] = Counter(
        tuple(words[start : start + n]) for start in range(len(words) - n + 1)
    )
    total = sum(counts.values())
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values()) + 0.0
