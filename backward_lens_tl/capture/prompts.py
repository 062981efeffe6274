"""Prompts as a batch: token ids, padded on the right, with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl._checks import (
    check_choice,
    check_text,
    listed,
)
from backward_lens_tl.capture.chat import Message, Turn, is_chat, render_chat
from backward_lens_tl.capture.token_ids import checked_ids, rows_of_mapping
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.vocabulary import Span, Vocabulary

Chats = Sequence[Message] | Sequence[Sequence[Message]]
Prompts = str | Sequence[str] | Int[Tensor, "batch pos"] | Mapping[str, Any] | Chats


@dataclass(frozen=True)
class Prompt:
    """One prompt in tokens.

    Attributes:
        ids: Token ids, including BOS if there is one.
        text: The caller's text; for ids, and for tokenizers without offsets, the decoded text.
        spans: Each token's position in the text; added tokens have empty spans.
        written: The caller's text, which targets continue; `None` for ids.
        vocabulary: The model's vocabulary.
        turns: The turn of each token of a chat; empty for other prompts.
    """

    ids: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    written: str | None
    vocabulary: Vocabulary
    turns: tuple[Turn, ...] = ()

    @classmethod
    def of_text(cls, host: Host, text: str, prepend_bos: bool | None) -> Prompt:
        """Tokenise a text.

        Args:
            host: The model.
            text: The text.
            prepend_bos: Whether to prepend a BOS token, as in `Host.tokenize`.

        Returns:
            The prompt.
        """
        ids = host.tokenize(text, prepend_bos) if text else []
        spans = host.vocabulary.offsets(text, ids)
        if spans is not None:
            return cls(tuple(ids), text, spans, text, host.vocabulary)
        decoded, spans = host.vocabulary.spans(ids)
        return cls(tuple(ids), decoded, spans, text, host.vocabulary)

    @classmethod
    def of_chat(cls, host: Host, messages: Sequence[object], name: str) -> Prompt:
        """Tokenise a conversation.

        Args:
            host: The model.
            messages: The messages.
            name: The prompt, for messages of errors.

        Returns:
            The prompt, with the template's special tokens and no others.

        Raises:
            InputError: If the messages are not usable, or the tokenizer has no template or reports
                no positions.
        """
        chat = render_chat(host.tokenizer, messages, name)
        prompt = cls.of_text(host, chat.text, prepend_bos=False)
        if prompt.text != chat.text:
            raise InputError(
                f"the tokenizer does not report where the tokens of {name} are, so their turns are "
                "unknown; use a fast tokenizer, or pass the conversation as a text"
            )
        return replace(prompt, turns=chat.turns(prompt.spans))

    @classmethod
    def of_ids(cls, host: Host, ids: Sequence[int]) -> Prompt:
        """Use token ids as they are.

        Args:
            host: The model.
            ids: The ids.

        Returns:
            The prompt.
        """
        text, spans = host.vocabulary.spans(ids)
        return cls(tuple(ids), text, spans, None, host.vocabulary)

    def continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues the prompt.

        Args:
            text: The continuation, such as `" Paris"`.

        Returns:
            The tokens after the prompt's, when prompt and continuation are tokenised together.

        Raises:
            TargetError: If there are none, or the prompt's own tokens change.
        """
        return self.vocabulary.encode(text, self._joinable)

    def token_id(self, target: str | int, multi_token: MultiToken | None = None) -> int:
        """The token that represents a target after the prompt.

        Args:
            target: A text that continues the prompt, or a token id.
            multi_token: Which token represents a text of several tokens; `None` raises.

        Returns:
            The token id.

        Raises:
            TargetError: If it is not one token, or cannot continue the prompt.
        """
        return self.vocabulary.token_id(target, multi_token, self._joinable)

    @property
    def placed_text(self) -> str:
        """The prompt's text, if token positions are known in the text that the caller wrote.

        Raises:
            InputError: If they are only known in the decoded text.
        """
        if self.text != self.written:
            raise InputError(
                f"the tokenizer does not report the positions of its tokens in {self.written!r}, "
                f"and they decode to {self.text!r}, so subject_start cannot be used; omit it, or "
                "use a fast tokenizer"
            )
        return self.text

    @property
    def _joinable(self) -> str | None:
        """The text that a continuation is appended to."""
        return self.written if self.written is not None else self.vocabulary.text_of(self.ids)

    def extended(self, ids: Sequence[int]) -> Prompt:
        """The prompt with tokens appended, for example an answer's.

        Args:
            ids: The tokens.

        Returns:
            The longer prompt.
        """
        if not ids:
            return self
        every = (*self.ids, *ids)
        text, spans = self.vocabulary.spans(every)
        if not text.startswith(self.text):  # special tokens, or a tokenizer that normalises
            added, own = self.vocabulary.concatenated(ids, in_front=False)
            n = len(self.text)
            text = self.text + added
            spans = (*self.spans, *((n + start, n + end) for start, end in own))
        spans = (*self.spans, *spans[len(self.ids) :])
        answering: Turn = "assistant"
        turns = (*self.turns, *(answering for _ in ids)) if self.turns else ()
        return Prompt(every, text, spans, self._joinable, self.vocabulary, turns)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one forward pass.

    Padding is always on the right, regardless of the tokenizer: in a causal model no real token
    attends to it, so a prompt in a batch gives the same numbers as the prompt alone.

    Attributes:
        tokens: Token ids; 0 at padding.
        mask: False at padding.
        prompts: Index of each prompt among all prompts of the call.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    prompts: Int[Tensor, "batch"]

    @property
    def is_padded(self) -> bool:
        """Whether any prompt is shorter than the longest."""
        return not bool(self.mask.all())

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(dim=1)

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Index of the last real token of each prompt."""
        return self.lengths - 1

    def part(self, prompts: Int[Tensor, "part"]) -> PromptBatch:
        """Some of the prompts, padded to the longest of them.

        Args:
            prompts: Their indices in this batch.

        Returns:
            The smaller batch.
        """
        longest = int(self.lengths[prompts].max())
        return PromptBatch(
            self.tokens[prompts, :longest], self.mask[prompts, :longest], self.prompts[prompts]
        )

    def to(self, device: torch.device) -> PromptBatch:
        """Move the batch to a device."""
        return PromptBatch(self.tokens.to(device), self.mask.to(device), self.prompts.to(device))

    def ends(self, values: Float[Tensor, "batch pos d"], n: int) -> Float[Tensor, "batch n d"]:
        """Values at the last `n` positions of each prompt.

        Args:
            values: A value per prompt and position.
            n: Number of positions, at most that of the longest prompt.

        Returns:
            The values; `[:, -1]` is the last token's. Shorter prompts repeat their first position.
        """
        back = torch.arange(1 - n, 1, device=values.device)
        last = self.last.to(values.device)[:, None]
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, (last + back).clamp_min(0)]


def tokenize_prompts(
    host: Host, prompts: Prompts, prepend_bos: bool | None = None
) -> tuple[Prompt, ...]:
    """Tokenise prompts.

    Args:
        host: The model.
        prompts: A text, several texts, token ids `[batch, pos]` without padding, a tokenizer's
            output (a mapping with `input_ids` and, optionally, an `attention_mask` that is 0 at
            padding), the messages of a chat, or several chats.
        prepend_bos: Whether to prepend a BOS token to texts, as in `Host.tokenize`.

    Returns:
        The prompts.

    Raises:
        InputError: If there is no prompt, one is empty or not a text, a token has no embedding, or
            ids have the wrong shape or dtype, or ids or chats come with `prepend_bos`.
    """
    if isinstance(prompts, Mapping):
        rows = rows_of_mapping(host, prompts, prepend_bos)
        return tuple(Prompt.of_ids(host, row) for row in rows)
    if isinstance(prompts, Tensor):
        return tuple(Prompt.of_ids(host, row) for row in checked_ids(host, prompts, prepend_bos))
    check_choice("prepend_bos", prepend_bos, (True, False, None))
    each = [prompts] if is_chat(prompts) else listed(prompts)
    if not each:
        raise InputError("the list of prompts is empty; pass at least one")
    return tuple(_of_one(host, index, prompt, prepend_bos) for index, prompt in enumerate(each))


def _of_one(host: Host, index: int, text: object, prepend_bos: bool | None) -> Prompt:
    if isinstance(text, list | tuple) and is_chat(text):
        if prepend_bos is not None:
            raise InputError(
                f"prompt {index} is a chat, whose template decides about BOS; leave prepend_bos out"
            )
        return Prompt.of_chat(host, text, f"prompt {index}")
    if not isinstance(text, str):
        raise InputError(
            f"prompt {index} is {text!r}, a {type(text).__name__}; pass texts, one tensor of "
            "token ids of shape [batch, pos], the output of a tokenizer, or lists of chat messages"
        )
    check_text(f"prompt {index},", text)
    prompt = Prompt.of_text(host, text, prepend_bos)
    if not prompt.ids:
        raise InputError(
            f"prompt {index}, {text!r}, is empty; a gradient needs at least one token: pass a "
            "text, or the BOS token's id"
        )
    return prompt


def pad_prompts(host: Host, rows: Sequence[Sequence[int]]) -> PromptBatch:
    """Pad token ids of different lengths to one batch.

    Args:
        host: The model, for its context length and device.
        rows: Token ids of each prompt.

    Returns:
        The batch, on the model's device.

    Raises:
        InputError: If a prompt is longer than the model's context, or has a token without a row in
            its embedding.
    """
    longest, d_vocab = max(len(row) for row in rows), host.d_vocab
    for index, row in enumerate(rows):
        if max(row) >= d_vocab:
            raise InputError(
                f"prompt {index} has the token id {max(row)} (answer included); the model's "
                f"embedding has rows 0 to {d_vocab - 1}"
            )
        if len(row) > host.n_ctx:
            raise InputError(
                f"prompt {index} has {len(row)} tokens (answer included); the model's context "
                f"holds {host.n_ctx}; shorten it"
            )
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return PromptBatch(tokens, mask, torch.arange(len(rows))).to(host.device)
