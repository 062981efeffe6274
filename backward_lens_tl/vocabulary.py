"""Tokens as words: from a target's text to its token ids, and from ids to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from backward_lens_tl.arguments import check_text, shown
from backward_lens_tl.errors import TargetError

TargetPosition = Literal["first", "last"]

_SENTENCEPIECE_SPACE = "▁"
_PARTIAL = "\ufffd"
"""What bytes decode to that are no character."""


class Vocabulary:
    """The model's tokenizer, as far as targets and readouts need it.

    Args:
        tokenizer: A Hugging Face tokenizer, or `None`; without one, targets are token ids and
            the text of token 7 is `<7>`.
        size: Number of logits.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self.size = size

    def text(self, token_id: int) -> str:
        """Text of one token as it stands in running text, with its leading space if it has one."""
        return self._running_text([token_id])

    def texts(self, token_ids: Iterable[int]) -> tuple[str, ...]:
        """Text of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt as a whole, without its special tokens.

        Args:
            token_ids: The prompt.

        Returns:
            The text; unlike the tokens' texts, it has characters that several tokens share.
        """
        if self._tokenizer is None:
            return "".join(self.texts(token_ids))
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text or "".join(self.texts(token_ids))

    def spans(self, token_ids: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Text of a prompt as a whole, and where in it each token stands.

        The spans are the tokenizer's own offsets. Where it has none, or where it would make other
        tokens of the text (ids need not come from a text), they are those of the tokens' texts
        side by side.

        Args:
            token_ids: The prompt.

        Returns:
            The text, as `decode` gives it but for ids of no text, and for each token a half-open
            span of its characters. Tokens that share a character each have it in their span;
            whether a token's leading space is in its span depends on the tokenizer. Special tokens
            have spans of no width, and so has a space that SentencePiece puts in front of a text.
        """
        # Where nothing else is in a prompt, the special tokens are its text.
        own = [i for i in token_ids if i not in self._special_ids] or token_ids
        text, own_spans = self._by_offsets(own) or self._side_by_side(own)
        hidden, rest = set(token_ids) - set(own), iter(own_spans)
        spans = [(0, 0)]
        for token_id in token_ids:
            end = spans[-1][1]
            spans.append((end, end) if token_id in hidden else next(rest))
        return text, tuple(spans[1:])

    def _by_offsets(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]] | None:
        """A text and its tokens' spans, if the tokenizer makes these tokens of it."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        text = self.decode(token_ids)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] != list(token_ids):
            return None
        spans: list[tuple[int, int]] = [(start, end) for start, end in encoded["offset_mapping"]]
        # The space in front of a text is not in it; its offsets are those of the first character.
        if len(spans) > 1 and spans[0][0] == spans[1][0] and self.text(token_ids[0]).isspace():
            spans[0] = (0, 0)
        return text, spans

    def _side_by_side(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The tokens' texts and their spans; those that only together are text share a span."""
        text = ""
        spans: list[tuple[int, int]] = []
        group: list[int] = []
        for index, token_id in enumerate(token_ids, start=1):
            group.append(token_id)
            piece = self._running_text(group, in_front=not spans)
            if index == len(token_ids) or not piece.endswith(_PARTIAL):
                spans += [(len(text), len(text) + len(piece))] * len(group)
                text, group = text + piece, []
        return text, spans

    def _running_text(self, token_ids: Sequence[int], *, in_front: bool = False) -> str:
        """Text of tokens as it stands in running text, or in front of it."""
        if self._tokenizer is None:
            return "".join(f"<{token_id}>" for token_id in token_ids)
        text: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        # SentencePiece decoders drop the space in front of a text, so a lone token loses its own.
        piece = self._tokenizer.convert_ids_to_tokens(token_ids[0]) or ""
        if not in_front and piece.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" "):
            text = " " + text
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that continues a prompt: no BOS, its own leading space.

        Args:
            text: The continuation, such as `" Paris"`.

        Returns:
            The ids.

        Raises:
            TargetError: If it is no text, there is no tokenizer, or the text has no token or one
                without a logit.
        """
        if not isinstance(text, str):
            raise TargetError(f"target {text!r} is a {type(text).__name__}; pass a text")
        check_text("target", text, TargetError)
        if self._tokenizer is None:
            raise TargetError(
                f"target {text!r} is text, but the model has no tokenizer; pass an id"
            )
        # SentencePiece puts a space in front of every text by itself.
        bare = text[1:] if self._adds_space and text.startswith(" ") else text
        ids: list[int] = self._tokenizer(bare, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TargetError(f"target {text!r} has no token; pass a word such as ' Paris'")
        return [self._checked(token_id) for token_id in ids]

    def token_id(self, target: str | int, target_position: TargetPosition | None = None) -> int:
        """The one token that a target stands for.

        Args:
            target: Text, or a token id.
            target_position: Which token of a text of several stands for it; `None` refuses such
                a text.

        Returns:
            The token id.

        Raises:
            TargetError: If a text has several tokens and no `target_position` is given, or an id
                is outside the vocabulary.
        """
        if not isinstance(target, str):
            return self._checked(target)
        ids = self.encode(target)
        if len(ids) == 1 or target_position == "first":
            return ids[0]
        if target_position == "last":
            return ids[-1]
        pieces = " | ".join(repr(self.text(token_id)) for token_id in ids)
        raise TargetError(
            f"target {target!r} is {len(ids)} tokens ({pieces}), and a gradient is read against "
            f"one.{self._space_hint(target)} Ask for target_position='first' or 'last', pass a "
            "token id, or differentiate all of them with objective=sequence_nll(...)"
        )

    def _space_hint(self, target: str) -> str:
        spaced = " " + target
        if target.startswith(" ") or len(self.encode(spaced)) > 1:
            return ""
        return f" With a leading space, {spaced!r} is one token: probably that is meant."

    def _checked(self, token_id: int) -> int:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TargetError(
                f"target {shown(token_id)} is a {type(token_id).__name__}; pass text or a token id"
            )
        if not 0 <= token_id < self.size:
            raise TargetError(
                f"token id {shown(token_id)} is not in the vocabulary; allowed are 0 to "
                f"{self.size - 1}"
            )
        return token_id

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        if self._tokenizer is None:
            return frozenset()
        added = self._tokenizer.added_tokens_decoder
        named = self._tokenizer.all_special_ids
        return frozenset((*named, *(token_id for token_id in added if added[token_id].special)))

    @cached_property
    def _adds_space(self) -> bool:
        pieces = self._tokenizer.tokenize("a")
        return bool(pieces) and str(pieces[0]).startswith(_SENTENCEPIECE_SPACE)
