"""Targets, subjects and prompts on tokenizers of every kind, against plain transformers."""

from __future__ import annotations

import functools
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import HAS_BRIDGE, Case, bridge_case, build, hooked_case, randomise
from sampling import examples
from tokenizer_kinds import KINDS, SPECIAL, tokenizer_of
from transformers import GPT2Config, GPT2LMHeadModel

import backward_lens_tl as blt
from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.data.records import Record
from backward_lens_tl.data.segments import covered_tokens, subject_span
from backward_lens_tl.editing.requests import tokenize_request
from backward_lens_tl.errors import BackwardLensError, InputError, TargetError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.sweeps.plan import Item, plan_shards

PROMPTS = (
    "Once upon a time",
    "She saw two cat",
    "Rome is old. The largest square of Rome is called",
    "Zoë and José met in São",
    "The café costs 3.5",
    "<bos>An apple",
    "  two spaces",
)
CONTINUATIONS = (".", "s", ", there was", " Paris", " paris", "\n", "\n\n", "5", "0 or 12", "!?")
UNUSUAL = (" ", "é", "日本", "🙂", "▁", "'s", "ness of it", " Piazza Navona", "<eos>", "ﬁ", "#s")


@functools.cache
def wrapped(kind: str) -> Case:
    """A small random GPT-2 with a tokenizer, and the plain Hugging Face model."""
    tokenizer = tokenizer_of(kind)
    d_vocab = len(tokenizer)
    if HAS_BRIDGE:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=d_vocab, **sizes)).double()
        randomise(hf_model)
        return bridge_case(hf_model, tokenizer, name="gpt2")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=64,
        d_head=8,
        d_vocab=d_vocab,
        act_fn="gelu_new",
        dtype=torch.float64,
    )
    model = HookedTransformer(cfg, tokenizer).eval()
    randomise(model)
    return hooked_case(model.to(torch.float64), name="gpt2")


def own_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def expected_continuation(tokenizer: Any, prompt: str, text: str) -> list[int] | None:
    """Additional tokens of the joined text, or `None` where joining changes the prompt's tokens."""
    before, both = own_ids(tokenizer, prompt), own_ids(tokenizer, prompt + text)
    return both[len(before) :] if both[: len(before)] == before else None


def by_transformers(case: Case, prompt: list[int], answer: list[int]) -> float:
    """Negative log-likelihood of an answer, position by position."""
    with torch.no_grad():
        log_probs = case.logits(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
    return -float(sum(log_probs[len(prompt) - 1 + at, token] for at, token in enumerate(answer)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_continuations_match_the_joined_text(kind: str, prompt: str) -> None:
    case, n_right = wrapped(kind), 0
    tokenizer = case.model.tokenizer
    ids = [int(token) for token in case.model.to_tokens(prompt, prepend_bos=False)[0]]
    for text in (*CONTINUATIONS, *UNUSUAL):
        expected = expected_continuation(tokenizer, prompt, text)
        loss = functools.partial(
            blt.capture_gradients,
            case.model,
            prompt,
            blt.sequence_nll(text),
            layers=-1,
            prepend_bos=False,
        )
        if not expected:
            with pytest.raises(TargetError, match=r"changes the tokens|has no token"):
                loss()
            continue
        n_right += 1
        found = float(loss().loss)
        assert found == pytest.approx(by_transformers(case, ids, expected), rel=1e-9), text
        first = blt.target_nll(text, "first")
        targets = blt.capture_gradients(case.model, prompt, first, layers=-1).targets
        assert targets is not None
        assert targets.unique().tolist() == expected[:1]
    assert n_right > 5


# No surrogates and no characters that tokenizers use as markers.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
WORDS = st.sampled_from([*PROMPTS, *CONTINUATIONS, *UNUSUAL])


@examples(150)
@given(
    kind=st.sampled_from(KINDS),
    prompt=st.one_of(WORDS, ANY_TEXT),
    text=st.one_of(WORDS, ANY_TEXT),
    with_bos=st.booleans(),
    as_ids=st.booleans(),
)
def test_any_continuation_matches_the_joined_text_or_is_refused(
    kind: str, prompt: str, text: str, with_bos: bool, as_ids: bool
) -> None:
    host = host_of(wrapped(kind).model)
    tokenizer = host.tokenizer
    assume(own_ids(tokenizer, prompt))
    [written] = tokenize_prompts(host, prompt, with_bos)
    expected = expected_continuation(tokenizer, prompt, text)
    given_as = written
    if as_ids:
        [given_as] = tokenize_prompts(host, torch.tensor([written.ids]))
        known = host.vocabulary.text_of(written.ids)
        # Ids that are, or end in, the tokens of a text are continued like that text.
        assume(known is not None)
        assert own_ids(tokenizer, str(known)) == list(
            written.ids[-len(own_ids(tokenizer, str(known))) :]
        )
        expected = expected_continuation(tokenizer, str(known), text)
    if not expected:
        with pytest.raises(TargetError):
            given_as.continuation(text)
    else:
        assert given_as.continuation(text) == expected


def test_losses_on_a_sentencepiece_model(stories: Case) -> None:
    """Expected values from plain transformers."""

    def loss(prompt: str, answer: str) -> float:
        return float(blt.capture_gradients(stories.model, prompt, blt.sequence_nll(answer)).loss)

    assert loss("Once upon a time", ".") == pytest.approx(9.21, abs=0.01)
    assert loss("Once upon a time", ", there was") == pytest.approx(0.116, abs=0.001)
    assert loss("She saw two cat", "s") == pytest.approx(0.135, abs=0.001)
    first = blt.target_nll(".", "first")
    targets = blt.capture_gradients(stories.model, "Once upon a time", first, layers=-1).targets
    assert targets is not None
    assert stories.model.tokenizer.convert_ids_to_tokens(targets.unique().tolist()) == ["."]


def test_every_piece_of_a_sentencepiece_vocabulary(stories: Case) -> None:
    """Pieces without a leading space, with and without a known prompt."""
    host, tokenizer = host_of(stories.model), stories.model.tokenizer
    pieces = {
        token: piece
        for piece, token in tokenizer.get_vocab().items()
        if not piece.startswith(("▁", "<")) and piece not in tokenizer.all_special_tokens
    }
    assert len(pieces) == 161
    [prompt] = tokenize_prompts(host, "Once upon a time")
    for token, piece in pieces.items():
        assert host.vocabulary.token_id(piece) == token
        if expected_continuation(tokenizer, "Once upon a time", piece) == [token]:
            assert prompt.token_id(piece) == token


def test_editing_in_a_full_stop_makes_it_likelier(stories: Case) -> None:
    request = blt.editing.EditRequest("Once upon a time", ".")
    step = blt.editing.GradientStep("sgd", lr=0.05, layers=-1)

    def loss() -> float:
        objective = blt.sequence_nll(".")
        return float(blt.capture_gradients(stories.model, request.prompt, objective).loss)

    before = loss()
    with step(stories.model, request).applied(stories.model):
        assert loss() < before


def test_a_target_that_changes_the_prompt_is_refused(facts_model: Any) -> None:
    with pytest.raises(TargetError, match=r"' ' becomes ' Paris'.*End the prompt without a space"):
        blt.backward_lens(facts_model, "Lionel Messi plays for ", "Paris")


# ------------------------------------------------------------------------------------- subjects


CHAT = "<|user|>Rome is old. The largest square of Rome is called<|end|>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "subject", "nth"),
    [
        (CHAT, "Rome", 1),
        ("<bos>Rome is old. The largest square of Rome is called", "Rome", 1),
        ("Rome is old. The largest square of Rome is called", "Rome", 0),
        ("Zoë met Zoe\u0308 and Zoë in São", "Zoë", 1),
        ("The ﬁne ﬁne apple", "ﬁne", 1),
    ],
)
def test_subject_start_counts_characters_of_the_callers_text(
    kind: str, prompt: str, subject: str, nth: int
) -> None:
    case = wrapped(kind)
    starts = [at for at in range(len(prompt)) if prompt.startswith(subject, at)]
    request = blt.editing.EditRequest(prompt, " Paris", subject, starts[nth])
    last = tokenize_request(host_of(case.model), request, prepend_bos=False).subject_last
    assert last is not None
    assert last == last_token_of(case.model.tokenizer, prompt, starts[nth] + len(subject))
    config = blt.SweepConfig(prepend_bos=False, multi_token="first")
    row = {"prompt": prompt, "target": " Paris", "subject": subject, "subject_start": starts[nth]}
    [[item]] = plan_shards(host_of(case.model), blt.read_records([row]), config)
    assert isinstance(item, Item)
    assert item.subject == (starts[nth], starts[nth] + len(subject))


def last_token_of(tokenizer: Any, text: str, end: int) -> int:
    """The last token with a character before `end`, from tokens of increasingly long texts."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return max(at for at, (start, _) in enumerate(offsets["offset_mapping"]) if start < end)


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalised_subject_at_a_given_start(kind: str) -> None:
    prompt = "Zoe\u0308 met Zoe\u0308 and"
    host = host_of(wrapped(kind).model)
    found = [
        tokenize_request(host, blt.editing.EditRequest(prompt, " Paris", "Zoë", start), False)
        for start in (0, 9)
    ]
    last = [each.subject_last for each in found]
    tokenizer = host.tokenizer
    assert last == [last_token_of(tokenizer, prompt, 4), last_token_of(tokenizer, prompt, 13)]
    record = {"prompt": prompt, "target": " a", "subject": "Zoë", "subject_start": 9}
    assert isinstance(blt.read_records([record]).rows[0], Record)
    with pytest.raises(BackwardLensError, match="does not begin"):
        tokenize_request(host, blt.editing.EditRequest(prompt, " Paris", "Zoë", 1), False)


@pytest.mark.parametrize(
    "prompt", ["<bos>Once upon a time", "<bos><bos>Once upon a time", "Rome<eos> is old. The cat"]
)
def test_ids_after_special_tokens_are_continued_like_their_text(prompt: str) -> None:
    """On SentencePiece, which adds a space after a special token."""
    host = host_of(wrapped("sentencepiece").model)
    ids = own_ids(host.tokenizer, prompt)
    [given] = tokenize_prompts(host, torch.tensor([ids]))
    [written] = tokenize_prompts(host, prompt, False)
    for text in CONTINUATIONS:
        try:
            expected = written.continuation(text)
        except TargetError:
            with pytest.raises(TargetError):
                given.continuation(text)
        else:
            assert given.continuation(text) == expected


def test_the_text_of_an_answer_keeps_its_spaces() -> None:
    model = wrapped("wordpiece").model
    loss = blt.sequence_nll(" time was a cat")
    capture = blt.capture_gradients(model, "Once upon a", loss, layers=-1)
    assert capture.prompts == ("Once upon a time was a",)
    [spans] = capture.spans
    assert capture.prompts[0][slice(*spans[-1])] == "a"


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("We met Zoe\u0308 there", "Zoë", (7, 11)),
        ("We met Zoë there", "Zoe\u0308", (7, 10)),
        ("The ﬁne apple", "fine", (4, 7)),
        ("\u1112\u1161\u11ab is one", "한", (0, 3)),
        ("Zoe and Zoe\u0308", "Zoë", (8, 12)),
    ],
)
def test_a_subject_is_found_up_to_normalisation(
    text: str, subject: str, expected: tuple[int, int]
) -> None:
    assert subject not in text
    assert subject_span(text, subject) == expected
    with pytest.raises(InputError, match="is not in the prompt"):
        subject_span(text, subject + "x")


SUBJECTS = ("Rome", "Zoë", "José", "ﬁne", "日本", "🙂", "Piazza Navona", "12")
FILLERS = ("<bos>", "Rome", "is old.", "The", "  ", "\n", "<eos>", "Romeo", "é", "Zoe", "cafés")


@examples(150)
@given(
    kind=st.sampled_from(KINDS),
    subject=st.sampled_from(SUBJECTS),
    before=st.lists(st.sampled_from(FILLERS), max_size=4),
    after=st.lists(st.sampled_from((*FILLERS, "Zoë", "12")), min_size=1, max_size=4),
    glue=st.sampled_from((" ", "")),
    with_bos=st.booleans(),
)
def test_spans_refer_to_the_original_text(
    kind: str, subject: str, before: list[str], after: list[str], glue: str, with_bos: bool
) -> None:
    host = host_of(wrapped(kind).model)
    front = " ".join(before) + glue
    text = front + subject + glue + " ".join(after)
    [prompt] = tokenize_prompts(host, text, with_bos)
    assert prompt.placed_text == text
    assert len(prompt.spans) == len(prompt.ids)
    covered = covered_tokens(text, prompt.spans, (len(front), len(front) + len(subject)))
    expected = by_longer_texts(host.tokenizer, text, len(front), len(front) + len(subject))
    n_added = len(prompt.ids) - len(own_ids(host.tokenizer, text))
    assert [at - n_added for at in covered] == expected


def by_longer_texts(tokenizer: Any, text: str, start: int, end: int) -> list[int]:
    """Tokens that have a character of `text[start:end]`, by their offsets."""
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = []
    pieces = tokenizer.convert_ids_to_tokens(own["input_ids"])
    for at, (left, right) in enumerate(own["offset_mapping"]):
        is_only_a_mark = pieces[at] == "▁" and not text[left:right].isspace()
        if max(left, start) < min(right, end) and not is_only_a_mark:
            covered.append(at)
    return covered


# ------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prepend", "n_written"), [*itertools.product((None, True, False), (0, 1))]
)
def test_no_second_bos_unless_requested(kind: str, prepend: bool | None, n_written: int) -> None:
    host = host_of(wrapped(kind).model)
    bos = host.tokenizer.bos_token_id
    [plain] = tokenize_prompts(host, "Rome is", None)
    is_usual = plain.ids[0] == bos
    [prompt] = tokenize_prompts(host, "<bos>" * n_written + "Rome is", prepend)
    n_bos = sum(token == bos for token in prompt.ids)
    added = {None: 0 if n_written else int(is_usual), True: 1, False: 0}[prepend]
    assert n_bos == n_written + added


# ------------------------------------------------------------------------------------- ids


@functools.cache
def with_more_tokens_than_rows() -> Any:
    """A model whose tokenizer has added tokens but whose embedding was not resized."""
    case = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2")
    case.model.tokenizer.add_tokens(["<new>", "<extra>"])
    return case.model


CALLS: dict[str, Callable[[Any, str], object]] = {
    "lens": lambda model, text: blt.backward_lens(model, text),
    "capture": lambda model, text: blt.capture_gradients(model, text, blt.next_token_loss()),
    "validate": lambda model, text: blt.validate(model, text),
    "moments": lambda model, text: blt.editing.second_moments(model, [text], progress=False),
    "edit": lambda model, text: blt.editing.GradientStep("sgd", lr=1.0)(
        model, blt.editing.EditRequest(text, 5)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("text", ["<new> cat", "the <extra>"])
def test_tokens_without_an_embedding_are_refused(call: str, text: str) -> None:
    model = with_more_tokens_than_rows()
    with pytest.raises(InputError, match=r"the model's embedding has rows 0 to 96; resize"):
        CALLS[call](model, text)


def test_tokens_without_an_embedding_become_rejects(tmp_path: Any) -> None:
    model = with_more_tokens_than_rows()
    rows = [{"prompt": "the <new>", "target": 5}, {"prompt": "the", "target": 5}]
    swept = blt.sweep(model, rows, tmp_path / "sweep", progress=False)
    rejects = swept.rejects()
    assert rejects[["prompt", "reason"]].to_numpy().tolist() == [[0, "prompt"]]
    assert "rows 0 to 96" in rejects["problem"][0]
    config = blt.EvaluationConfig(generation_length=0, n_texts=0)
    step = blt.editing.GradientStep("sgd", lr=1.0)
    found = blt.evaluate(model, rows, tmp_path / "ev", {"step": step}, config, progress=False)
    assert found.rejects()["reason"].tolist() == ["prompt"]


@examples(60)
@given(kind=st.sampled_from(KINDS), text=st.one_of(WORDS, ANY_TEXT), added=st.sampled_from(SPECIAL))
def test_any_text_is_analysed_or_refused(kind: str, text: str, added: str) -> None:
    case = wrapped(kind)
    for prompt in (text, added + text, text + added):
        try:
            capture = blt.capture_gradients(case.model, prompt, blt.target_nll(), layers=-1)
        except BackwardLensError:
            continue
        ids = capture.tokens
        with torch.no_grad():
            answer = int(case.logits(ids)[0, -1].argmax())
        assert capture.answers.tolist() == [answer]


# ------------------------------------------------------------------------------- tokenizer output


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_a_tokenizer_is_a_prompt(kind: str) -> None:
    case = wrapped(kind)
    tokenizer, texts = case.model.tokenizer, ["Once upon a time", "Rome is"]
    alone = tokenizer(texts[0], return_tensors="pt")
    objective = blt.target_nll(5)
    found = blt.capture_gradients(case.model, alone, objective, layers=-1)
    ids = alone["input_ids"]
    assert torch.equal(found.tokens, ids)
    assert float(found.loss) == pytest.approx(by_transformers(case, ids[0].tolist(), [5]))
    for side, form in itertools.product(("left", "right"), ("pt", None)):
        tokenizer.padding_side = side
        both = tokenizer(texts, padding=True, return_tensors=form)
        tokenizer.padding_side = "right"
        batch = blt.capture_gradients(case.model, both, objective, layers=-1)
        rows = [tokenizer(text)["input_ids"] for text in texts]
        expected = [by_transformers(case, row, [5]) for row in rows]
        assert batch.loss.tolist() == pytest.approx(expected)
        assert batch.mask.sum(1).tolist() == list(map(len, rows))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "Rome"}, "prompts is a dict with 'text' keys; pass texts"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "different shapes"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "without tokens"),
        ({"input_ids": [[1, 10_000]]}, "token ids run from 1 to 10000"),
        ({"input_ids": 3}, "pass lists or tensors"),
        ({"input_ids": [[0.5]]}, r"holds 0\.5; pass lists"),
        ({"input_ids": None}, "pass lists or tensors"),
        ({"input_ids": [["a"]]}, "holds 'a'"),
        ({"input_ids": [[[1, 2], [3]]]}, "pass lists or tensors"),
        ({"input_ids": [[1, 2], 3]}, "pass lists or tensors"),
        ({"input_ids": [[1, 10**30]]}, "pass lists or tensors"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "hides tokens inside"),
    ],
)
def test_other_mappings_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        blt.backward_lens(wrapped("byte-level").model, prompt)


def test_prompts_and_targets_are_tokenised_once(
    facts_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, seen = type(facts_model.tokenizer), []
    tokenise = kind.__call__

    def counted(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        seen.append(text)
        return tokenise(self, text, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    prompt = "The capital of Italy is"
    blt.capture_gradients(facts_model, prompt, blt.target_nll(" Rome"), layers=-1)
    # In addition to the model's `to_tokens`, which passes a list, or the text after a BOS.
    own = [text for text in seen if isinstance(text, str) and text.startswith(prompt)]
    assert own == [prompt, f"{prompt} Rome"]


def test_a_vocabulary_is_pickled_and_freed() -> None:
    """Its cache of tokenised texts keeps neither itself nor the tokenizer alive."""
    tokenizer = tokenizer_of("byte-level")
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    ids = vocabulary.encode(" Paris")
    assert pickle.loads(pickle.dumps(vocabulary)).encode(" Paris") == ids
    ids.append(-1)  # a caller's list is not the cached one
    assert vocabulary.encode(" Paris") == ids[:-1]
    reference = weakref.ref(vocabulary)
    del vocabulary
    assert reference() is None
