"""The model's vocabulary: from texts to token ids, and from token ids to texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from backward_lens_tl._checks import check_text, shown
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import TargetError

_SENTENCEPIECE_SPACE = "▁"
_PARTIAL = "\ufffd"
"""Decoded bytes that are not a whole character."""

_ANCHORS = ("\n", ".", "a", "0")
"""Texts to put before a continuation whose prompt is unknown; the first whose tokens stay the same
is used."""

_SOME = 16
"""Last tokens of a prompt that are tried as text, if the whole prompt is not text."""

_RECENT = 64
"""Number of texts whose tokens are cached: a prompt needs them for BOS, spans and target."""

Span = tuple[int, int]
"""A half-open span of a text's characters."""

_Encoded = tuple[tuple[int, ...], tuple[Span, ...] | None]


class Vocabulary:
    """The model's tokenizer, as targets and readouts need it.

    Args:
        tokenizer: A Hugging Face tokenizer, or `None`; then targets are token ids and the text of
            token 7 is `<7>`.
        size: Number of logits.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self._recent: dict[str, _Encoded] = {}

    def text(self, token_id: int) -> str:
        """Text of one token within running text, including its leading space if it has one."""
        return self.running_text([token_id])

    def texts(self, token_ids: Iterable[int]) -> tuple[str, ...]:
        """Text of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole prompt without its special tokens.

        Args:
            token_ids: The prompt.

        Returns:
            The text. Unlike the tokens' texts it contains characters that several tokens share.
        """
        if self._tokenizer is None:
            return "".join(self.texts(token_ids))
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text or "".join(self.texts(token_ids))

    def offsets(self, text: str, token_ids: Sequence[int]) -> tuple[Span, ...] | None:
        """Position of each token in a text, by the tokenizer's own offsets.

        Args:
            text: The text.
            token_ids: Its tokens. Tokens that the tokenizer or the model added before or after the
                text, such as BOS, get empty spans there.

        Returns:
            One span per token, or `None` if the tokenizer has no offsets, or tokenises the text
            differently. Special tokens that are written in the text have the span of their
            characters.
        """
        ids, spans = self._encoded(text)
        if spans is None:
            return None
        for start in range(len(token_ids) - len(ids) + 1):
            if tuple(token_ids[start : start + len(ids)]) == ids:
                added = len(token_ids) - len(ids) - start
                end = (len(text), len(text))
                return ((0, 0),) * start + spans + (end,) * added
        return None

    def spans(self, token_ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        """Text of a prompt that was given as ids, and each token's position in it.

        The spans are the tokenizer's own offsets. If it has none, or would tokenise the text
        differently (ids need not come from a text), the tokens' own texts are concatenated.

        Args:
            token_ids: The prompt.

        Returns:
            The text, as in `decode` if the ids come from a text, and for each token a half-open
            span of its characters. Tokens that share a character both have it in their span.
            Whether a token's leading space is in its span depends on the tokenizer. Special tokens
            have empty spans, and so has a space that SentencePiece prepends to a text.
        """
        # In a prompt of special tokens only, these are the text.
        own = [i for i in token_ids if i not in self.special_ids] or token_ids
        text = self.decode(own)
        ids, own_spans = self._encoded(text)
        if own_spans is None or ids != tuple(own):
            text, own_spans = self.concatenated(own)
        hidden, rest = set(token_ids) - set(own), iter(own_spans)
        spans = [(0, 0)]
        for token_id in token_ids:
            end = spans[-1][1]
            spans.append((end, end) if token_id in hidden else next(rest))
        return text, tuple(spans[1:])

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """A text that has some ids, or the last of them, as its tokens.

        Args:
            token_ids: A prompt.

        Returns:
            The text of all ids if it is tokenised to them, else that of the ids after the last
            special token, else that of the last few; `None` if there is none.
        """
        if self._tokenizer is None:
            return None
        n = len(token_ids)
        last = max((at for at in range(n) if token_ids[at] in self.special_ids), default=-1)
        for start in dict.fromkeys((0, last + 1, last, *range(max(0, n - _SOME), n))):
            own = tuple(token_ids[max(0, start) :])
            text: str = self._tokenizer.decode(list(own), clean_up_tokenization_spaces=False)
            if own and self._ids(text) == own:
                return text
        return None

    def _encoded(self, text: str) -> _Encoded:
        """A text's tokens without added ones, and their offsets if the tokenizer has any."""
        if text not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[text] = self._encode(text)
        return self._recent[text]

    def _encode(self, text: str) -> _Encoded:
        if self._tokenizer is None:
            return (), None
        is_fast = getattr(self._tokenizer, "is_fast", False)
        encoded = self._tokenizer(
            text, add_special_tokens=False, **({"return_offsets_mapping": True} if is_fast else {})
        )
        ids = tuple(encoded["input_ids"])
        if not is_fast:
            return ids, None
        spans: list[Span] = [(start, end) for start, end in encoded["offset_mapping"]]
        for at in range(len(ids) - 1):
            # A space that SentencePiece adds before a text, and after a special token, is not in
            # the text; its offsets are those of the next character.
            start = spans[at][0]
            if start == spans[at + 1][0] and self.text(ids[at]).isspace():
                spans[at] = (start, start)
        return ids, tuple(spans)

    def concatenated(
        self, token_ids: Sequence[int], *, in_front: bool = True
    ) -> tuple[str, tuple[Span, ...]]:
        """The tokens' own texts, concatenated, and their spans.

        Args:
            token_ids: The tokens.
            in_front: Whether they begin a text, where SentencePiece drops a leading space.

        Returns:
            The text, and one span per token; tokens that form a character together share a span.
        """
        text = ""
        spans: list[Span] = []
        group: list[int] = []
        for index, token_id in enumerate(token_ids, start=1):
            group.append(token_id)
            piece = self.running_text(group, in_front=in_front and not spans)
            if index == len(token_ids) or not piece.endswith(_PARTIAL):
                spans += [(len(text), len(text) + len(piece))] * len(group)
                text, group = text + piece, []
        return text, tuple(spans)

    def running_text(self, token_ids: Sequence[int], *, in_front: bool = False) -> str:
        """Text of tokens within running text, or at its beginning.

        Args:
            token_ids: The tokens.
            in_front: Whether they begin a text, where SentencePiece drops a leading space.

        Returns:
            The text, special tokens included.
        """
        if self._tokenizer is None:
            return "".join(f"<{token_id}>" for token_id in token_ids)
        text: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        # SentencePiece decoders drop the first space of a text, so a single token loses its own.
        piece = self._tokenizer.convert_ids_to_tokens(token_ids[0]) or ""
        if not in_front and piece.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" "):
            text = " " + text
        return text

    def encode(self, text: str, after: str | None = None) -> list[int]:
        """Token ids of a text that continues a prompt: prompt and text are tokenised together.

        Tokenizers treat the beginning of a text differently from its middle, and may merge
        characters across the border, so a continuation is never tokenised alone.

        Args:
            text: The continuation, such as `" Paris"` or `"."`.
            after: The prompt's text; `None` if it is unknown.

        Returns:
            The ids that follow the prompt's.

        Raises:
            TargetError: If it is not a text, there is no tokenizer, the text has no token or one
                without a logit, or it changes the prompt's own tokens.
        """
        if not isinstance(text, str):
            raise TargetError(f"target {text!r} is a {type(text).__name__}; pass a text")
        check_text("target", text, TargetError)
        if self._tokenizer is None:
            raise TargetError(
                f"target {text!r} is text, but the model has no tokenizer; pass an id"
            )
        ids = self._after_anchor(text) if after is None else self._joined(after, text)
        if not ids:
            raise TargetError(f"target {text!r} has no token; pass a word such as ' Paris'")
        return [self._checked(token_id) for token_id in ids]

    def _joined(self, prompt: str, text: str) -> tuple[int, ...]:
        before, both = self._ids(prompt), self._ids(prompt + text)
        if both[: len(before)] == before:
            return both[len(before) :]
        differs = next(at for at, own in enumerate(before) if at == len(both) or both[at] != own)
        raise TargetError(
            f"target {text!r} changes the tokens of the prompt {prompt!r} that it continues: "
            f"{self._pieces(before[differs:])} becomes {self._pieces(both[differs:])} in the "
            "joined text, so the target has no probability after this prompt. "
            f"{self._space_advice(prompt, text)}or pass the target as a token id"
        )

    def _space_advice(self, prompt: str, text: str) -> str:
        if prompt[-1:].isspace():
            return "End the prompt without a space and begin the target with it, "
        if text[:1].isspace():
            return "Move the border between prompt and target to one between words, "
        return f"Begin the target with a space, as in {' ' + text!r}, if a new word is meant, "

    def _after_anchor(self, text: str) -> tuple[int, ...]:
        for anchor in _ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + text)
            if before and len(both) > len(before) and both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text)

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._encoded(text)[0]

    def token_id(
        self,
        target: str | int,
        multi_token: MultiToken | None = None,
        after: str | None = None,
    ) -> int:
        """The token that represents a target.

        Args:
            target: Text, or a token id.
            multi_token: Which token represents a text of several tokens; `None` raises.
            after: The text of the prompt that it continues; `None` if it is unknown.

        Returns:
            The token id.

        Raises:
            TargetError: If a text has several tokens and no `multi_token` is given, it does
                not continue the prompt, or an id is outside the vocabulary.
        """
        if not isinstance(target, str):
            return self._checked(target)
        ids = self.encode(target, after)
        if len(ids) == 1 or multi_token == "first":
            return ids[0]
        if multi_token == "last":
            return ids[-1]
        raise TargetError(
            f"target {target!r} is {len(ids)} tokens ({self._pieces(ids)}), but a gradient is read "
            f"against one.{self._space_hint(target, after)} Pass multi_token='first' or "
            "'last', pass a token id, or differentiate all of them with objective=sequence_nll(...)"
        )

    def _pieces(self, token_ids: Iterable[int]) -> str:
        return " | ".join(repr(self.text(token_id)) for token_id in token_ids)

    def _space_hint(self, target: str, after: str | None) -> str:
        spaced = " " + target
        if target.startswith(" ") or len(self.encode(spaced, after)) > 1:
            return ""
        return f" With a leading space, {spaced!r} is one token; did you mean that?"

    def _checked(self, token_id: int) -> int:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TargetError(
                f"target {shown(token_id)} is a {type(token_id).__name__}; pass text or a token id"
            )
        if not 0 <= token_id < self.size:
            raise TargetError(
                f"token id {shown(token_id)} is not in the vocabulary; allowed: 0 to "
                f"{self.size - 1}"
            )
        return token_id

    def begins_with_bos(self, text: str) -> bool:
        """Whether a text already begins with the BOS token, as after a chat template."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        return bos is not None and self._ids(text)[:1] == (bos,)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` skips."""
        if self._tokenizer is None:
            return frozenset()
        added = self._tokenizer.added_tokens_decoder
        named = self._tokenizer.all_special_ids
        return frozenset((*named, *(token_id for token_id in added if added[token_id].special)))
