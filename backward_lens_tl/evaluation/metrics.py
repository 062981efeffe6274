"""CounterFact's metrics of one record, in both definitions, and the entropy of a text.

With `new` the edit's answer and `true` the original one (ROME's definitions; the paper's count
whether an answer is the most probable one, token by token):

    efficacy, paraphrase    new is said                 success: P(new) > P(true)
    neighborhood            true is said                success: P(true) > P(new)

where `P = exp(-nll)`, and a magnitude is the difference of the two.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backward_lens_tl.evaluation.plan import Probe
from backward_lens_tl.evaluation.scoring import Score

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # noqa: RUF001
"""Words, with the apostrophes inside of them, and every other mark by itself."""

_NAMES = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}


@dataclass(frozen=True)
class Answered:
    """A prompt with the scores of its two answers.

    Attributes:
        probe: The prompt.
        new: Score of the new answer.
        true: Score of the original answer; `None` without one.
    """

    probe: Probe
    new: Score
    true: Score | None


def record_metrics(answered: Sequence[Answered]) -> dict[str, float]:
    """A record's efficacy, paraphrase and neighborhood.

    Args:
        answered: Its prompts.

    Returns:
        Three numbers each, the mean over the prompts of a kind: by its name what the paper counts,
        and with `_success` and `_magnitude` what ROME does. NaN where there is no prompt, or no
        original answer.
    """
    found: dict[str, float] = {}
    for kind, name in _NAMES.items():
        of_kind = [each for each in answered if each.probe.kind == kind]
        values = [_values(each, wants_new=kind != "neighborhood") for each in of_kind]
        for place, suffix in enumerate(("", "_success", "_magnitude")):
            found[name + suffix] = _mean([value[place] for value in values])
    return found


def _values(answered: Answered, *, wants_new: bool) -> tuple[float, float, float]:
    """Whether the wanted answer is said, whether it is the likelier one, and by how much."""
    both: tuple[Score | None, Score | None] = (answered.new, answered.true)
    wanted, other = both if wants_new else both[::-1]
    is_said = math.nan if wanted is None else float(wanted.is_said)
    if wanted is None or other is None:
        return is_said, math.nan, math.nan
    difference = math.exp(-wanted.nll) - math.exp(-other.nll)
    return is_said, float(wanted.nll < other.nll), difference


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def begins_with(text: str, answer: str) -> bool:
    """Whether a continuation begins with an answer, as whole words.

    Args:
        text: What a model goes on with.
        answer: The answer.

    Returns:
        Whether it does; spaces in front do not count, and `" Parisian"` does not begin with
        `" Paris"`.
    """
    said, wanted = text.lstrip(), answer.strip()
    behind = said[len(wanted) : len(wanted) + 1]
    return said.startswith(wanted) and not (wanted[-1:].isalnum() and behind.isalnum())


def tidied(text: str) -> str:
    """A generated text as its entropy is taken: NFKD, and a space for two line breaks."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's bigrams and trigrams, `H_2 / 3 + 2 H_3 / 3`.

    `H_n = -sum f log2 f` over the frequencies of the n-grams. The authors take NLTK's words; here
    they are those of a regular expression: runs of letters and digits, with the apostrophes inside
    of them, and every mark by itself.

    Args:
        text: The text.

    Returns:
        Bits; 0 for a text that repeats itself throughout, or has at most two words.

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
