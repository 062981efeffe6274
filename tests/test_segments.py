"""Which tokens of a prompt are its subject, whatever the tokenizer did to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from sampling import examples
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import backward_lens_tl
from backward_lens_tl.errors import InputError
from backward_lens_tl.segments import SEGMENTS, batch_segments, prompt_segments
from backward_lens_tl.vocabulary import Vocabulary

FACTS_FOLDER = Path(backward_lens_tl.__file__).parent / "facts_model"
BEFORE, FIRST, MIDDLE, LAST, AFTER, END = SEGMENTS


def test_the_six_segments() -> None:
    tokens = ("<|endoftext|>", "The", " city", " of", " New", " York", " City", " is", " in")
    expected = (BEFORE, BEFORE, BEFORE, BEFORE, FIRST, MIDDLE, LAST, AFTER, END)
    assert prompt_segments(tokens, "New York City") == expected


@pytest.mark.parametrize(
    ("tokens", "subject", "expected"),
    [
        (("Rome", " is"), "Rome", (LAST, END)),  # its only token is the last one
        (("The", " Rome", " is", " in"), "Rome", (BEFORE, LAST, AFTER, END)),
        (("New", " York", " is"), "New York", (FIRST, LAST, END)),
        (("I", " saw", " Rome"), "Rome", (BEFORE, BEFORE, END)),  # the prompt's last token
        (("I", " saw", " New", " York"), "New York", (BEFORE, BEFORE, FIRST, END)),
        (("Rome",), "Rome", (END,)),
        (("R", "omeo", " in", " R", "ome", " is"), "Rome", (BEFORE,) * 3 + (FIRST, LAST, END)),
        (("Romeo", " saw", " him"), "Rome", (LAST, AFTER, END)),  # no better one
        (("रामायण", " and", " राम", " is"), "राम", (BEFORE, BEFORE, LAST, END)),  # a vowel sign
        (("Rome", " and", " Rome", " is"), "Rome", (LAST, AFTER, AFTER, END)),  # the first
        (("<s>", "Lionel", "Messi", "is"), "Lionel Messi", (BEFORE, FIRST, LAST, END)),
        (("<s>", " ", "R", "om", "e", " is"), "Rome", (BEFORE, BEFORE, FIRST, MIDDLE, LAST, END)),
        (("Be", "yonc", "\ufffd", "\ufffd", " is"), "Beyoncé", (FIRST, MIDDLE, MIDDLE, LAST, END)),
        (("a", " \ufffd", "\ufffd", "Co", " is"), "🙂Co", (BEFORE, FIRST, MIDDLE, LAST, END)),
        (("The Mes", "si plays", " for"), "Messi", (FIRST, LAST, END)),  # edges inside of tokens
        (("A", "", "B", " is"), "AB", (FIRST, MIDDLE, LAST, END)),  # a token without text
        (("C", "++", " is"), "C++", (FIRST, LAST, END)),  # nothing is a pattern
        (("theRome", "oRome", "Rome", "is"), "Rome", (BEFORE, BEFORE, LAST, END)),  # spaces lost
    ],
)  # fmt: skip
def test_edges(tokens: tuple[str, ...], subject: str, expected: tuple[str, ...]) -> None:
    assert prompt_segments(tokens, subject) == expected
    assert prompt_segments(tokens, f" {subject} ") == expected


@pytest.mark.usefixtures("as_for_a_user")
def test_errors_name_subject_and_prompt() -> None:
    with pytest.raises(InputError, match=r"subject 'Paris' is not in the prompt 'Rome is'; write"):
        prompt_segments(("Rome", " is"), "Paris")
    for subject in ("", "  ", None, 7):
        with pytest.raises(InputError, match=f"subject is {subject!r}; pass a word"):
            prompt_segments(("Rome", " is"), subject)


@pytest.mark.usefixtures("as_for_a_user")
def test_subjects_of_a_batch() -> None:
    prompts = (("Rome", " is", " in"), ("In", " Rome", " we", " are"))
    assert batch_segments(prompts, "Rome") == tuple(prompt_segments(p, "Rome") for p in prompts)
    assert batch_segments(prompts, ["is", "In"]) == ((BEFORE, LAST, END), (LAST, AFTER, AFTER, END))
    with pytest.raises(InputError, match="there are 3 subjects and 2 prompts; pass one per prompt"):
        batch_segments(prompts, ["a", "b", "c"])
    with pytest.raises(InputError, match="'Oslo' is not in the prompt 'In Rome we are'"):
        batch_segments(prompts, ["Rome", "Oslo"])


# ------------------------------------------------------------------- against a tokenizer's offsets


@pytest.fixture(scope="module", params=["facts", "gpt2", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of the facts model splits most of what is not English into bytes."""
    if request.param == "stories":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("stories_folder"))
    if request.param == "gpt2":
        shared: Path = request.getfixturevalue("shared")
        # The file alone: transformers 5 saved the folder, and 4 knows its class by another name.
        file = shared / "models" / "gpt2_tokenizer" / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


def tokenized(tokenizer: Any, text: str) -> tuple[list[str], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    texts = Vocabulary(tokenizer, len(tokenizer)).texts(encoded["input_ids"])
    nowhere = (0, 0)
    # SentencePiece says of the space that it puts in front of a text that it is the first letter.
    offsets = [
        nowhere if part.isspace() else offset
        for part, offset in zip(texts, encoded["offset_mapping"], strict=True)
    ]
    return [tokenizer.bos_token, *texts], [nowhere, *offsets]


def by_offsets(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[str, ...]:
    """The segments, by which characters of the text the tokenizer says each token is of."""
    covered = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
    expected = [BEFORE if i < covered[0] else AFTER for i in range(len(offsets))]
    expected[covered[0] : covered[-1]] = [MIDDLE] * (covered[-1] - covered[0])
    expected[covered[0]], expected[covered[-1]] = FIRST, LAST
    return (*expected[:-1], END)


SUBJECTS = ("Lionel Messi", "Rome", "São Paulo", "Beyoncé", "Zoë", "Hà Nội", "A", "St. Ives", "C++")
FILLERS = ("The", "Romeo and", "Beyonc", "in", "é", "…", "Zo", "São", "(", "2,", "\n", "Messi")


@examples(200)
@given(
    subject=st.sampled_from(SUBJECTS),
    before=st.lists(st.sampled_from(FILLERS), max_size=4),
    after=st.lists(st.sampled_from((*FILLERS, "Rome", "Zoë")), min_size=1, max_size=4),
)
def test_segments_are_those_of_the_offsets(
    tokenizer: Any, subject: str, before: list[str], after: list[str]
) -> None:
    text = " ".join((*before, subject, *after))
    word = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
    tokens, offsets = tokenized(tokenizer, text)
    assert prompt_segments(tokens, subject) == by_offsets(offsets, *word.span())


@pytest.mark.parametrize("subject", ["東京", "Пётр", "🙂", "नमस्ते", "مصر"])
def test_subjects_in_other_scripts(tokenizer: Any, subject: str) -> None:
    text = f"We saw {subject} in the news"
    tokens, offsets = tokenized(tokenizer, text)
    start = text.index(subject)
    expected = by_offsets(offsets, start, start + len(subject))
    assert prompt_segments(tokens, subject) == expected
    assert {BEFORE, LAST, AFTER, END} <= set(expected)
