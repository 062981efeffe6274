"""Segments and subjects of prompts, for all kinds of tokenizers."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sampling import examples
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

import backward_lens_tl as blt
from backward_lens_tl.data.segments import SEGMENTS, batch_segments, prompt_segments, subject_span
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.result import BackwardLensResult

FACTS_FOLDER = Path(blt.__file__).parent / "facts_model"
BEFORE, FIRST, MIDDLE, LAST, AFTER, END = SEGMENTS
Spans = tuple[tuple[int, int], ...]


def laid(*pieces: str) -> tuple[str, Spans]:
    """A text and the spans of its pieces."""
    return "".join(pieces), tuple(pairwise(accumulate(map(len, pieces), initial=0)))


# --------------------------------------------------------------------------- from spans to segments


def test_the_six_segments() -> None:
    text, spans = laid("", "The", " city", " of", " New", " York", " City", " is", " in")
    expected = (BEFORE, BEFORE, BEFORE, BEFORE, FIRST, MIDDLE, LAST, AFTER, END)
    assert prompt_segments(text, spans, "New York City") == expected


@pytest.mark.parametrize(
    ("pieces", "subject", "expected"),
    [
        (("Rome", " is"), "Rome", (LAST, END)),  # its only token is the last one
        (("The", " Rome", " is", " in"), "Rome", (BEFORE, LAST, AFTER, END)),
        (("New", " York", " is"), "New York", (FIRST, LAST, END)),
        (("I", " saw", " Rome"), "Rome", (BEFORE, BEFORE, END)),  # the prompt's last token
        (("I", " saw", " New", " York"), "New York", (BEFORE, BEFORE, FIRST, END)),
        (("Rome",), "Rome", (END,)),
        (("R", "omeo", " in", " R", "ome", " is"), "Rome", (BEFORE,) * 3 + (FIRST, LAST, END)),
        (("Romeo", " saw", " him"), "Rome", (LAST, AFTER, END)),  # only inside a longer word
        (("रामायण", " and", " राम", " is"), "राम", (BEFORE, BEFORE, LAST, END)),  # a vowel sign
        (("Rome", "_2", " Rome", " is"), "Rome", (BEFORE, BEFORE, LAST, END)),
        (("Rome", " and", " Rome", " is"), "Rome", (LAST, AFTER, AFTER, END)),  # the first
        (("New", " York", " New", " York", " is"), "New York", (FIRST, LAST, AFTER, AFTER, END)),
        (("New", " York", " New", " York", " is"), "York New", (BEFORE, FIRST, LAST, AFTER, END)),
        (("xa", " b", " a", " b", " a", " is"), "a b a",  # overlapping occurrences
         (BEFORE, BEFORE, FIRST, MIDDLE, LAST, END)),
        (("", " ", "R", "om", "e", " is"), "Rome", (BEFORE, BEFORE, FIRST, MIDDLE, LAST, END)),
        (("The Mes", "si plays", " for"), "Messi", (FIRST, LAST, END)),  # edges inside tokens
        (("A", "", "B", " is"), "AB", (FIRST, MIDDLE, LAST, END)),  # a token without text
        (("", "A", "", " is"), "A", (BEFORE, LAST, AFTER, END)),
        (("C", "++", " is"), "C++", (FIRST, LAST, END)),
        (("Abc", " A", ".c", " is"), "A.c", (BEFORE, FIRST, LAST, END)),  # not a regular expression
        (("A", "\n", "B", " is"), "A\nB", (FIRST, MIDDLE, LAST, END)),
    ],
)  # fmt: skip
def test_edges(pieces: tuple[str, ...], subject: str, expected: tuple[str, ...]) -> None:
    text, spans = laid(*pieces)
    assert prompt_segments(text, spans, subject) == expected
    assert prompt_segments(text, spans, f" {subject}\n") == expected


@pytest.mark.parametrize(
    ("text", "spans", "subject", "expected"),
    [
        # "é" as two tokens, and an emoji with a token that includes the space before it.
        ("Zoé is", ((0, 2), (2, 3), (2, 3), (3, 6)), "Zoé", (FIRST, MIDDLE, LAST, END)),
        ("a 🙂Co is", ((0, 1), (1, 3), (2, 3), (3, 5), (5, 8)), "🙂Co",
         (BEFORE, FIRST, MIDDLE, LAST, END)),
        # Spaces outside the spans, as with GPT-2's tokenizer.
        ("I saw Rome today", ((0, 1), (2, 5), (6, 10), (11, 16)), "Rome",
         (BEFORE, BEFORE, LAST, END)),
        ("New  York is", ((0, 3), (4, 4), (5, 9), (10, 12)), "New  York",
         (FIRST, MIDDLE, LAST, END)),
        # An empty span inside the subject.
        ("Rome is", ((2, 2), (0, 4), (2, 2), (4, 7)), "Rome", (BEFORE, LAST, AFTER, END)),
    ],
)  # fmt: skip
def test_spans_with_gaps_and_overlaps(
    text: str, spans: Spans, subject: str, expected: tuple[str, ...]
) -> None:
    assert prompt_segments(text, spans, subject) == expected


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("Romeo left Rome", "Rome", (11, 15)),
        ("Romeo", "Rome", (0, 4)),
        ("a Rome, Rome", " Rome ", (2, 6)),
        ("a Rome, Rome", (8, 12), (8, 12)),
        ("a Rome, Rome", [7, 12], (8, 12)),  # without its space
        ("a Rome \n", (1, 8), (2, 6)),
        ("a Rome", np.array([2, 4]), (2, 4)),
        ("a Rome", torch.tensor([2, 4]), (2, 4)),
        ("a Rome", (np.int64(0), 6), (0, 6)),
        ("no", (0, 2), (0, 2)),
        ("Å Å", "A\u030a", (2, 4)),  # the exact characters come first
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_spans_of_subjects(text: str, subject: Any, expected: tuple[int, int]) -> None:
    text = text.replace(" Å", " A\u030a")
    found = subject_span(text, subject)
    assert found == expected
    assert all(type(place) is int for place in found)


def test_a_span_selects_an_occurrence() -> None:
    text, spans = laid("Rome", " and", " Rome", " is")
    assert prompt_segments(text, spans, (9, 13)) == (BEFORE, BEFORE, LAST, END)
    assert prompt_segments(text, spans, (8, 13)) == (BEFORE, BEFORE, LAST, END)
    # "is" occurs in the name as well, and a span need not be a word.
    text, spans = laid("Par", "is", " is", " in")
    assert prompt_segments(text, spans, "is") == (BEFORE, BEFORE, LAST, END)
    assert prompt_segments(text, spans, (3, 5)) == (BEFORE, LAST, AFTER, END)
    assert prompt_segments(text, spans, (1, 7)) == (FIRST, MIDDLE, LAST, END)


@pytest.mark.usefixtures("as_for_a_user")
def test_errors_name_subject_and_prompt() -> None:
    text, spans = laid("Rome", "  is")
    with pytest.raises(InputError, match=r"subject 'Paris' is not in the prompt 'Rome  is'; write"):
        prompt_segments(text, spans, "Paris")
    neither = ("", "  ", None, 7, (), (1,), (1, 2, 3), (0, 1.5), (True, 4), ("Rome", "is"), {0, 4})
    for subject in neither:
        wanted = f"subject is {subject!r}; pass text of the prompt, or the span (start"
        with pytest.raises(InputError, match=re.escape(wanted)):
            prompt_segments(text, spans, subject)
    for subject in ((2, 2), (3, 2), (-1, 3), (-4, -2), (0, 9), (8, 9), [5, 10**9], (0, 10**5000)):
        wanted = (
            "which is not in the prompt 'Rome  is'; allowed: spans (start, end) with "
            "0 <= start < end <= 8"
        )
        with pytest.raises(InputError, match=re.escape(wanted)):
            prompt_segments(text, spans, subject)
    with pytest.raises(InputError, match=r"subject is \(4, 6\), which has only spaces in the pro"):
        prompt_segments(text, spans, (4, 6))
    with pytest.raises(InputError, match=r"subject \(0, 4\) has no token in the prompt 'Rome  is'"):
        prompt_segments(text, ((0, 0), (4, 8)), (0, 4))


@pytest.mark.usefixtures("as_for_a_user")
def test_subjects_of_a_batch() -> None:
    prompts = (laid("Rome", " is", " in"), laid("In", " Rome", " we", " are"))
    texts, spans = zip(*prompts, strict=True)
    in_all = tuple(prompt_segments(*prompt, "Rome") for prompt in prompts)
    assert batch_segments(texts, spans, "Rome") == in_all
    assert batch_segments(texts, spans, ["Rome", (3, 7)]) == in_all
    assert batch_segments(texts, spans, [[0, 4], "Rome"]) == in_all
    assert batch_segments(texts, spans, np.array([[0, 4], [3, 7]])) == in_all
    assert batch_segments(texts, spans, ["is", "In"]) == (
        (BEFORE, LAST, END),
        (LAST, AFTER, AFTER, END),
    )
    for one in ((0, 2), [0, 2]):  # one span for all, not two subjects
        assert batch_segments(texts, spans, one) == ((LAST, AFTER, END), (LAST, AFTER, AFTER, END))
    with pytest.raises(InputError, match="there are 3 subjects and 2 prompts; pass one per prompt"):
        batch_segments(texts, spans, ["a", "b", "c"])
    with pytest.raises(InputError, match="there are 1 subjects and 2 prompts; pass one per prompt"):
        batch_segments(texts, spans, [(0, 2)])
    with pytest.raises(InputError, match="'Oslo' is not in the prompt 'In Rome we are'"):
        batch_segments(texts, spans, ["Rome", "Oslo"])


# ---------------------------------------------------------------- spans against decoded beginnings


@pytest.fixture(scope="module", params=["facts", "gpt2", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of the facts model splits most non-English text into bytes."""
    if request.param == "stories":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("stories_folder"))
    if request.param == "gpt2":
        shared: Path = request.getfixturevalue("shared")
        # Only the file: transformers 5 saved the folder, and version 4 has another class name.
        file = shared / "models" / "gpt2_tokenizer" / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


class Slow:
    """A slow (Python) tokenizer, which has no offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if "return_offsets_mapping" in options:
            raise NotImplementedError("not available when using Python tokenizers")
        return self._tokenizer(text, **options)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def placed(tokenizer: Any, ids: list[int]) -> tuple[str, Spans]:
    return Vocabulary(tokenizer, 50257).spans(ids)


def by_prefixes(tokenizer: Any, ids: list[int]) -> Spans:
    """The span of each token, from the text that it adds to the text of the tokens before it."""
    decoded = [
        tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        for count in range(1, len(ids) + 1)
    ]
    spans, whole = [], 0
    for text in decoded:
        # Replacement characters at the end are an incomplete character. Llama's decoder replaces
        # all bytes of a run that ends in one, including complete characters.
        right = max(n for n in range(len(text) + 1) if decoded[-1].startswith(text[:n]))
        start, whole = whole, max(whole, right)
        spans.append((start, whole + text.endswith("\ufffd")))
    return tuple(spans)


def visible(text: str, span: tuple[int, int]) -> list[int]:
    return [place for place in range(*span) if not text[place].isspace()]


def assert_spans_are_those_of_prefixes(tokenizer: Any, ids: list[int]) -> None:
    text, spans = placed(tokenizer, ids)
    expected = by_prefixes(tokenizer, ids)
    assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(spans) == len(ids)
    for (start, end), own in zip(spans, expected, strict=True):
        # GPT-2's tokenizer omits spaces; no others may be missing.
        assert visible(text, (start, end)) == visible(text, own)
        assert own[0] <= start <= end <= own[1] or start == end
    if getattr(tokenizer, "is_fast", False) and tokenizer.decode(ids[:1]) == "":
        assert spans[0] == (0, 0)


# Without replacement characters and surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1)
NAMES = ("Lionel Messi", "Rome", "São Paulo", "Beyoncé", "Zoë", "Hà Nội", "A", "St. Ives", "C++")
SUBJECTS = (*NAMES, "🙂", "東京", "Пётр", "New York")
FILLERS = ("The", "Romeo and", "Beyonc", "in", "é", "…", "Zo", "São", "(", "2,", "\n", "Messi")


@examples(100)
@given(text=TEXTS)
def test_spans_of_any_text(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    assert_spans_are_those_of_prefixes(tokenizer, ids)
    assert placed(tokenizer, ids)[0] == text.replace("▁", " ") or "▁" in text


@examples(50)
@given(text=TEXTS)
def test_spans_without_offsets_of_any_text(tokenizer: Any, text: str) -> None:
    assert_spans_are_those_of_prefixes(Slow(tokenizer), ids_of(tokenizer, text))


def by_spans(spans: Spans, start: int, end: int) -> tuple[str, ...]:
    """The segments, from the characters of each token."""
    covered = [i for i, own in enumerate(spans) if set(range(*own)) & set(range(start, end))]
    expected = [BEFORE if i < covered[0] else AFTER for i in range(len(spans))]
    expected[covered[0] : covered[-1]] = [MIDDLE] * (covered[-1] - covered[0])
    expected[covered[0]], expected[covered[-1]] = FIRST, LAST
    return (*expected[:-1], END)


@examples(80)
@given(
    subject=st.sampled_from(SUBJECTS),
    before=st.lists(st.sampled_from(FILLERS), max_size=4),
    after=st.lists(st.sampled_from((*FILLERS, "Rome", "Zoë")), min_size=1, max_size=4),
    front=st.sampled_from(("", "", " ", "\n")),
    with_bos=st.booleans(),
    is_slow=st.booleans(),
)
def test_segments_are_those_of_decoded_beginnings(
    tokenizer: Any,
    subject: str,
    before: list[str],
    after: list[str],
    front: str,
    with_bos: bool,
    is_slow: bool,
) -> None:
    text = front + " ".join((*before, subject, *after))
    word = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
    ids = ids_of(tokenizer, text)
    expected = by_spans(by_prefixes(tokenizer, ids), *word.span())
    if with_bos:
        ids, expected = [tokenizer.bos_token_id, *ids], (BEFORE, *expected)
    found = placed(Slow(tokenizer) if is_slow else tokenizer, ids)
    assert found[0] == text
    assert prompt_segments(*found, subject) == expected
    assert prompt_segments(*found, word.span()) == expected


@pytest.mark.parametrize("subject", ["東京", "Пётр", "🙂", "👩‍🚀", "नमस्ते", "مصر", "Beyoncé"])
def test_subjects_in_other_scripts(tokenizer: Any, subject: str) -> None:
    text = f"We saw {subject} in the news"
    ids = ids_of(tokenizer, text)
    start = text.index(subject)
    expected = by_spans(by_prefixes(tokenizer, ids), start, start + len(subject))
    assert prompt_segments(*placed(tokenizer, ids), subject) == expected
    assert {BEFORE, LAST, AFTER, END} <= set(expected)


@pytest.mark.parametrize("text", ["\n\nRome is", "  Rome is", " "])
def test_spaces_of_the_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    found, spans = placed(tokenizer, ids_of(tokenizer, text))
    assert (found, "".join(text[slice(*span)] for span in spans)) == (text, text)


def test_a_character_of_several_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    ids = ids_of(tokenizer, "Beyoncé sings")
    text, spans = placed(tokenizer, ids)
    assert [text[slice(*span)] for span in spans][:7] == ["B", "e", "y", "on", "c", "é", "é"]
    assert prompt_segments(text, spans, "Beyoncé").index(LAST) == 6
    assert prompt_segments(text, spans, (6, 7))[4:8] == (BEFORE, FIRST, LAST, AFTER)


@pytest.mark.parametrize(
    ("text", "subject", "start"),
    [
        ("Romeo of Rome is in", "Rome", 9),
        ("New York New York is", "New York", 0),
        ("New York New York is", (9, 17), 9),
        ("This is his island", "is", 5),
        ("This is his island", (2, 4), 2),
        (" Rome and Rome", "Rome", 1),
        ("\nRome\nRome ", "Rome", 1),
    ],
)
@pytest.mark.parametrize("is_slow", [False, True])
def test_subjects_that_occur_several_times(
    tokenizer: Any, text: str, subject: Any, start: int, is_slow: bool
) -> None:
    ids = ids_of(tokenizer, text)
    length = len(subject) if isinstance(subject, str) else subject[1] - subject[0]
    expected = by_spans(by_prefixes(tokenizer, ids), start, start + length)
    found = placed(Slow(tokenizer) if is_slow else tokenizer, ids)
    assert prompt_segments(*found, subject) == expected


# ------------------------------------------------------------------------ where offsets do not help


def test_the_leading_space_of_sentencepiece(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    for own in (tokenizer, Slow(tokenizer)):
        for text, widths in (("Rome", [0, 1, 2, 1]), (" Rome", [0, 1, 1, 2, 1])):
            ids = ids_of(tokenizer, text)
            assert [tokenizer.decode(ids[:1]), len(ids)] == ["", len(widths)]
            found, spans = placed(own, [tokenizer.bos_token_id, *ids])
            assert found == text
            assert spans[:2] == ((0, 0), (0, 0))
            assert [end - start for start, end in spans[1:]] == widths


def test_ids_that_no_text_encodes_to(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    letters = [token for letter in "Rome" for token in ids_of(tokenizer, f"0{letter}")[-1:]]
    ids = [*ids_of(tokenizer, "In"), *letters, *ids_of(tokenizer, "東")[-1:]]
    text, spans = placed(tokenizer, [bos, *ids, bos])
    assert ids_of(tokenizer, text) != ids
    assert text.startswith("InRome")
    assert spans[0] == (0, 0)
    assert spans[-1] == (len(text), len(text))
    assert [text[slice(*span)] for span in spans][-6:-2] == ["R", "o", "m", "e"]
    assert text[slice(*spans[-2])] == "\ufffd"  # an invalid byte
    found = prompt_segments(text, spans, "Rome")
    assert found == (*[BEFORE] * (len(ids) - 4), FIRST, MIDDLE, MIDDLE, LAST, AFTER, END)


def test_characters_of_ids_that_no_text_encodes_to() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    ids = [*ids_of(tokenizer, "Rome in "), *ids_of(tokenizer, "Rome: é🙂 is")]
    text, spans = placed(tokenizer, ids)
    assert ids_of(tokenizer, text) != ids
    assert text == "Rome in Rome: é🙂 is"
    texts = [text[slice(*span)] for span in spans]
    assert texts[-7:] == ["é", "é", "🙂", "🙂", "🙂", "🙂", " is"]


def test_a_prompt_of_special_tokens(tokenizer: Any) -> None:
    bos, end = tokenizer.bos_token_id, len(tokenizer.bos_token)
    text, spans = placed(tokenizer, [bos, bos])
    assert text == tokenizer.bos_token * 2
    assert spans == ((0, end), (end, 2 * end))


def test_positions_of_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    # A special token without a role, such as Llama 3's <|start_header_id|>.
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in tokenizer.all_special_ids
    ids = [0, *ids_of(tokenizer, "The city"), turn, 0, *ids_of(tokenizer, " of Rome"), 0]
    text, spans = placed(tokenizer, ids)
    assert text == "The city of Rome"
    assert spans == ((0, 0), (0, 3), (3, 8), (8, 8), (8, 8), (8, 11), (11, 16), (16, 16))
    expected = (*(BEFORE,) * 2, FIRST, MIDDLE, MIDDLE, LAST, AFTER, END)
    assert prompt_segments(text, spans, "city of") == expected


def test_without_a_tokenizer() -> None:
    text, spans = Vocabulary(None, 100).spans([5, 12, 5])
    assert text == "<5><12><5>"
    assert spans == ((0, 3), (3, 7), (7, 10))
    assert prompt_segments(text, spans, "<12>") == (BEFORE, LAST, END)


# ------------------------------------------------------------------------------------- in a result


PROMPTS = ["Romeo in Rome and Rome is", "Beyoncé met Rome in"]


@pytest.mark.parametrize("bos", [True, False])
def test_a_capture_has_the_spans_of_its_tokens(facts_model: Any, bos: bool) -> None:
    loss = blt.sequence_nll(" Paris and")
    capture = blt.capture_gradients(facts_model, PROMPTS, loss, layers=0, prepend_bos=bos)
    assert capture.prompts == tuple(f"{prompt} Paris" for prompt in PROMPTS)
    for text, spans, tokens, mask in zip(
        capture.prompts, capture.spans, capture.str_tokens, capture.mask, strict=True
    ):
        assert len(spans) == len(tokens) == int(mask.sum())
        assert (spans[0] == (0, 0)) == bos
        assert "".join(text[slice(*span)] for span in dict.fromkeys(spans)) == text
        for span, token in zip(spans[bos:], tokens[bos:], strict=True):
            assert text[slice(*span)] == token or "\ufffd" in token


def test_tables_and_files_have_the_spans(facts_model: Any, tmp_path: Path) -> None:
    result = blt.backward_lens(facts_model, PROMPTS, " Paris", matrices="W_out", layers=[1])
    place = PROMPTS[0].rindex("Rome")
    table = result.to_df(subject=[(place, place + 4), "Beyoncé"])
    rows = [table[table["prompt"] == prompt] for prompt in (0, 1)]
    of_subject = [own[own["segment"].str.contains("subject token")] for own in rows]
    assert list(of_subject[0]["token"]) == [" Rome"]
    assert of_subject[0]["position"].item() == result.capture.str_tokens[0].index(" and") + 1
    assert "".join(of_subject[1]["token"]).startswith("Beyonc")
    assert list(of_subject[1]["segment"])[0::6] == [FIRST, LAST]
    result.save(tmp_path / "result")
    loaded = BackwardLensResult.load(tmp_path / "result")
    assert loaded.capture.prompts == result.capture.prompts
    assert loaded.capture.spans == result.capture.spans
    assert loaded.to_df(subject=(0, 5)).equals(result.to_df(subject=(0, 5)))
    with pytest.raises(InputError, match=r"allowed: spans .* <= 19"):
        result.to_df(subject=(place, place + 4))
