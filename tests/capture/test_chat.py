"""Chat prompts, against plain transformers: `apply_chat_template` with `tokenize=True`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from models import Case
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import norms_by_segment, token_ranks_by_segment
from backward_lens_tl.capture.chat import TURNS, render_chat
from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

# The end of a turn is a special token, the rest is text, as in ChatML.
CHATML = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Llama's and Gemma's: BOS, messages are stripped, and the roles have to alternate.
STRIPPING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m['role'] + '] ' + m['content'] | trim + ' <eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# SmolLM2's own system message, if there is none.
WITH_A_SYSTEM_MESSAGE = (
    "{% if messages[0]['role'] != 'system' %}The king runs.<eos>{% endif %}" + CHATML
)
TEMPLATES = {"chatml": CHATML, "stripping": STRIPPING, "system": WITH_A_SYSTEM_MESSAGE}

USER = {"role": "user", "content": "The capital of France is"}
ANSWER = {"role": "assistant", "content": "Paris is"}
LATER = {"role": "user", "content": " Messi plays for "}
SYSTEM = {"role": "system", "content": "Rome is in Italy"}
CHATS = ([USER], [USER, ANSWER], [USER, ANSWER, LATER])


SetTemplate = Callable[[str], Any]


@pytest.fixture
def with_template(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> SetTemplate:
    """The random model, after its tokenizer got a template, for one test."""

    def set_template(name: str) -> Any:
        template = TEMPLATES.get(name, name)
        monkeypatch.setattr(gpt2.model.tokenizer, "chat_template", template, raising=False)
        return gpt2.model

    return set_template


def by_transformers(model: Any, messages: list[dict[str, str]]) -> list[int]:
    is_open = messages[-1]["role"] == "assistant"
    encoded = model.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not is_open,
        continue_final_message=is_open,
        return_dict=True,
    )
    return list(encoded["input_ids"])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_the_tokens_are_those_of_transformers(
    with_template: SetTemplate, name: str, messages: Any
) -> None:
    model = with_template(name)
    [prompt] = tokenize_prompts(host_of(model), messages)
    assert list(prompt.ids) == by_transformers(model, messages)
    assert sum(token == model.tokenizer.bos_token_id for token in prompt.ids) == (
        name == "stripping"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turn_of_every_token(with_template: SetTemplate, name: str) -> None:
    """Token by token, from the characters of a text in which every message is unique."""
    model = with_template(name)
    messages = [USER, ANSWER, LATER]
    [prompt] = tokenize_prompts(host_of(model), messages)
    owners = ["template"] * len(prompt.text)
    for message in messages:
        content = message["content"].strip() if name == "stripping" else message["content"]
        assert prompt.text.count(content) == 1
        start = prompt.text.index(content)
        owners[start : start + len(content)] = [message["role"]] * len(content)
    assert len(prompt.turns) == len(prompt.ids)
    for (start, end), turn in zip(prompt.spans, prompt.turns, strict=True):
        own = [owner for owner in owners[start:end] if owner != "template"]
        assert turn == (own[0] if own else "template")
    assert {"template", "user", "assistant"} == set(prompt.turns)


def test_a_message_that_occurs_in_the_template(with_template: SetTemplate) -> None:
    """Searching for "user" would find the role."""
    model = with_template("chatml")
    [prompt] = tokenize_prompts(host_of(model), [{"role": "user", "content": "user"}])
    texts = [prompt.text[start:end] for start, end in prompt.spans]
    at = [place for place, turn in enumerate(prompt.turns) if turn == "user"]
    assert "".join(texts[place] for place in at).strip() == "user"
    assert "".join(texts[: at[0]]).strip(": ") == "user"  # the vocabulary has no colon


def test_a_message_that_ends_as_the_template_goes_on() -> None:
    """Its last line break is its own, although the text of the stripped message fits, too."""

    class Tokenizer:
        chat_template = "every message on a line"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "".join(message["content"] + "\n" for message in messages)

    messages = [{"role": "user", "content": "Rome\n"}, {"role": "system", "content": "Paris\n"}]
    chat = render_chat(Tokenizer(), messages, "prompt 0")
    assert chat.text == "Rome\n\nParis\n\n"
    assert chat.parts == (((0, 5), "user"), ((6, 12), "system"))


def test_several_chats_and_a_text(with_template: SetTemplate) -> None:
    model = with_template("chatml")
    own = [[USER], [SYSTEM, USER], "Messi plays for"]
    capture = blt.capture_gradients(model, own, blt.target_nll(5), layers=0)
    for batch, messages in enumerate(own[:2]):
        alone = blt.capture_gradients(model, messages, blt.target_nll(5), layers=0)
        assert capture.prompts[batch] == alone.prompts[0]
        assert capture.turns[batch] == alone.turns[0]
        torch.testing.assert_close(capture.loss[batch], alone.loss[0])
    assert capture.turns[2] == ()


def test_the_gradient_is_that_of_the_rendered_text(with_template: SetTemplate) -> None:
    model = with_template("stripping")
    text = model.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    found = blt.backward_lens(model, [USER], " Paris")
    expected = blt.backward_lens(model, text, " Paris", prepend_bos=False)
    assert found.capture.prompts == expected.capture.prompts == (text,)
    assert torch.equal(found.capture.tokens, expected.capture.tokens)
    assert torch.equal(found.target_rank("W_out"), expected.target_rank("W_out"))


def test_an_answer_belongs_to_the_assistant(with_template: SetTemplate) -> None:
    """Joined with the prompt's text, so a target with and without a space are both read."""
    model = with_template("chatml")
    tokenizer = model.tokenizer
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    for answer in (" Paris is in Rome", "Paris is"):
        result = blt.backward_lens(model, [USER], objective=blt.sequence_nll(answer))
        whole = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        assert result.capture.tokens[0].tolist() == whole[:-1]
        n = int(result.capture.prompt_lengths[0])
        assert set(result.capture.turns[0][n:]) == {"assistant"}
        assert "assistant" not in result.capture.turns[0][:n]
        assert result.target() == answer


def test_an_answer_as_the_last_message_is_continued(with_template: SetTemplate) -> None:
    model = with_template("chatml")
    result = blt.backward_lens(model, [USER, ANSWER], " Rome", layers=0)
    assert result.capture.prompts[0].endswith("assistant: Paris is")
    assert result.capture.turns[0][-1] == "assistant"
    assert result.target() == " Rome"


# ------------------------------------------------------------------------------ segments by turn


def test_segments_by_turn(with_template: SetTemplate) -> None:
    model = with_template("chatml")
    result = blt.backward_lens(model, [[SYSTEM, USER], [USER, ANSWER, LATER]], 7)
    table = result.to_df(turns=True)
    for row in table.itertuples():
        own = result.capture.turns[row.prompt]
        is_last = row.position == len(own) - 1
        assert row.segment == ("last token" if is_last else own[row.position])
    pd.testing.assert_frame_equal(table.drop(columns="segment"), result.to_df())
    norms = norms_by_segment(table)
    first = norms[(norms["matrix"] == "W_out") & (norms["layer"] == 0)]
    order = ["template", "system", "user", "assistant", "last token"]
    assert [name for name in first["segment"] if first.set_index("segment")["count"][name]] == order
    for name, mean in zip(first["segment"], first["mean"], strict=True):
        own = table[(table["matrix"] == "W_out") & (table["layer"] == 0)]
        own = own.loc[own["segment"] == name, "norm"]
        if len(own):
            assert mean == pytest.approx(sum(own) / len(own))
    ranks = token_ranks_by_segment(table)
    assert set(ranks.loc[ranks["count"] > 0, "segment"]) == set(order)


def test_turns_of_a_prompt_that_is_no_chat(with_template: SetTemplate) -> None:
    result = blt.backward_lens(with_template("chatml"), "Messi plays for", 7, layers=0)
    with pytest.raises(InputError, match="turns=True is for chats, but prompt 0 is not"):
        result.to_df(turns=True)
    with pytest.raises(InputError, match="subject is 'Messi' and turns is True"):
        result.to_df("Messi", turns=True)


def test_turns_of_one_chat_next_to_a_text(with_template: SetTemplate) -> None:
    result = blt.backward_lens(with_template("chatml"), [[USER], "Messi plays for"], 7, layers=0)
    table = result.to_df(turns=True, batch=0)
    assert {"template", "user", "last token"} == set(table["segment"])
    for own in (None, 1):
        with pytest.raises(InputError, match="turns=True is for chats, but prompt 1 is not"):
            result.to_df(turns=True, batch=own)


def test_turns_are_saved(with_template: SetTemplate, tmp_path: Any) -> None:
    model = with_template("chatml")
    result = blt.backward_lens(model, [USER], 7, layers=0)
    result.save(tmp_path / "chat")
    loaded = blt.BackwardLensResult.load(tmp_path / "chat")
    assert loaded.capture.turns == result.capture.turns
    assert set(loaded.capture.turns[0]) <= set(TURNS)


# ---------------------------------------------------------------------------------------- refused


def refused(model: Any, prompts: Any, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        blt.backward_lens(model, prompts, 7, layers=0, **options)


def test_messages_that_are_refused(with_template: SetTemplate) -> None:
    no_template = "prompt 0 is a chat, but the model's tokenizer has no chat template; set"
    refused(with_template(""), [USER], no_template)
    model = with_template("chatml")
    refused(
        model, [[USER], [{"content": "a"}]], "message 0 of prompt 1 has no 'role', only 'content'"
    )
    refused(model, [USER, {"role": "user"}], "message 1 of prompt 0 has no 'content', only 'role'")
    refused(model, [USER, {}], "has no 'role', only nothing")
    refused(
        model, [USER, "Paris"], "message 1 of prompt 0 is 'Paris', a str; pass messages such as"
    )
    parts = [{"type": "text", "text": "Paris"}]
    refused(
        model, [{"role": "user", "content": parts}], "content of type list; pass it as one text"
    )
    refused(model, [{"role": "asistant", "content": "a"}], "role 'asistant'; allowed: system,")
    refused(model, [USER], "a chat, whose template decides about BOS", prepend_bos=True)
    refused(model, USER, "'role', 'content' keys; pass texts, .*or a list of chat messages")
    refused(model, [[]], r"prompt 0 is \[\], a list; pass texts, .*or lists of chat messages")


def test_templates_that_refuse_or_change_messages(with_template: SetTemplate) -> None:
    model = with_template("stripping")
    refused(model, [USER, LATER], "refuses the messages of prompt 0: roles must alternate; change")
    changed = "the chat template changes the contents or the order of the messages of prompt 0"
    for template in (
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] }}",
    ):
        refused(with_template(template), [USER, LATER], changed)


def test_a_tokenizers_own_output_still_works(with_template: SetTemplate) -> None:
    model = with_template("chatml")
    encoded = model.tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    found = blt.backward_lens(model, encoded, 7, layers=0)
    expected = blt.backward_lens(model, [USER], 7, layers=0)
    assert torch.equal(found.capture.tokens, expected.capture.tokens)


def test_next_token_loss_of_a_conversation(with_template: SetTemplate) -> None:
    model = with_template("chatml")
    result = blt.backward_lens(model, [USER, ANSWER], objective=blt.next_token_loss(), layers=0)
    tokens: Tensor = result.capture.tokens
    assert result.capture.targets is not None
    assert result.capture.targets[0].tolist() == [*tokens[0, 1:].tolist(), -1]
