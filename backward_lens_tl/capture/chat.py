"""Chat prompts: messages as one text by the tokenizer's template, and the turn of each token.

`apply_chat_template` returns a text and does not say where the messages are in it. The template is
therefore applied a second time with a mark in place of each message's content; the text between the
marks is the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from backward_lens_tl._checks import check_text, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.vocabulary import Span

Message = Mapping[str, Any]
Turn = Literal["template", "system", "developer", "user", "assistant", "tool"]

TURNS: tuple[Turn, ...] = get_args(Turn)
"""Who wrote a token: the chat template, or the message of a role."""

_TEMPLATE, *_ROLES = TURNS
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")
_INSTEAD = (
    "pass the text of tokenizer.apply_chat_template(messages, tokenize=False) with "
    "prepend_bos=False instead"
)


@dataclass(frozen=True)
class Chat:
    """A conversation as one text.

    Attributes:
        text: The text, special tokens included.
        parts: Where the content of each message is in it, and its role.
    """

    text: str
    parts: tuple[tuple[Span, Turn], ...]

    def turns(self, spans: Sequence[Span]) -> tuple[Turn, ...]:
        """The turn of each token.

        Args:
            spans: The span of each token in the text.

        Returns:
            The role of the message that a token has a character of, or `"template"`.
        """
        return tuple(
            next(
                (role for (start, end), role in self.parts if max(left, start) < min(right, end)),
                _TEMPLATE,
            )
            for left, right in spans
        )


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list with messages, rather than a text or a list of texts."""
    return isinstance(prompt, list | tuple) and any(isinstance(each, Mapping) for each in prompt)


def render_chat(tokenizer: Any, messages: Sequence[object], name: str) -> Chat:
    """Apply the tokenizer's chat template to messages.

    After a message of the user, the text ends where the assistant's answer begins. If the last
    message is the assistant's, it ends with that message, without the end of the turn, so that it
    can be continued.

    Args:
        tokenizer: The model's tokenizer; `None` if it has none.
        messages: The messages.
        name: The prompt, for messages of errors.

    Returns:
        The text, and where each message is.

    Raises:
        InputError: If a message is not usable, or the template refuses or changes the messages.
    """
    own = [_checked(message, f"message {at} of {name}") for at, message in enumerate(messages)]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{name} is a chat, but the model's tokenizer has no chat template; set "
            "model.tokenizer.chat_template to one, or pass the conversation as a text"
        )
    is_open = own[-1]["role"] == "assistant"
    text = _applied(tokenizer, own, name, answers=not is_open)
    marks = [{**message, "content": _MARK.format(at)} for at, message in enumerate(own)]
    pieces = _MARKS.split(_applied(tokenizer, marks, name, answers=not is_open))
    parts: dict[int, tuple[Span, Turn]] = {}
    end = len(pieces[0]) if text.startswith(pieces[0]) else -1
    for number, following in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        content = own[number]["content"]
        # Many templates strip messages.
        written = [
            each for each in (content, content.strip()) if text.startswith(each + following, end)
        ]
        if end < 0 or number in parts or not written:
            break
        parts[number] = (end, end + len(written[0])), own[number]["role"]
        end += len(written[0] + following)
    if end != len(text) or list(parts) != list(range(len(own))):
        raise InputError(
            f"the chat template changes the contents or the order of the messages of {name}, so "
            f"their tokens cannot be told apart; {_INSTEAD}"
        )
    last = parts[len(own) - 1][0][1]
    return Chat(text[:last] if is_open else text, tuple(parts.values()))


def _checked(message: object, name: str) -> dict[str, Any]:
    """A message as a dictionary; refuses one without a role or a text."""
    if not isinstance(message, Mapping):
        raise InputError(
            f"{name} is {shown(message)}, a {type(message).__name__}; pass messages such as "
            "{'role': 'user', 'content': 'Hello'}"
        )
    for key in ("role", "content"):
        if key not in message:
            raise InputError(
                f"{name} has no {key!r}, only {', '.join(map(repr, message)) or 'nothing'}; pass "
                "messages such as {'role': 'user', 'content': 'Hello'}"
            )
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise InputError(f"{name} has the role {shown(role)}; allowed: {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise InputError(
            f"{name} has content of type {type(content).__name__}; pass it as one text"
        )
    check_text(f"{name},", content)
    return dict(message)


def _applied(tokenizer: Any, messages: list[dict[str, Any]], name: str, *, answers: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answers
        )
    except TemplateError as error:
        raise InputError(
            f"the tokenizer's chat template refuses the messages of {name}: {error}; change their "
            "roles or their order"
        ) from error
    return text
