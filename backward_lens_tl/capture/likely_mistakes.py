"""Warnings about calls that work, but probably do not do what was meant; one per call."""

from __future__ import annotations

import re
from collections.abc import Sequence

from backward_lens_tl.capture.prompts import Prompt
from backward_lens_tl.errors import TargetError, warn
from backward_lens_tl.models import Host

_ENDING = 2
"""Length up to which a target after a letter may be the end of a word, as "s" after "cat"."""

_CLOSING = ".,:;!?)]}%”"
"""Signs after which a word has a space in front of it."""

_SHOWN = 12
"""Last characters of a prompt that a warning shows."""


def warn_of_second_bos(host: Host, prompts: Sequence[Prompt]) -> None:
    """Warn if a prompt begins with two BOS tokens.

    Args:
        host: The model.
        prompts: The prompts, which are not chats.
    """
    bos = getattr(host.tokenizer, "bos_token_id", None)
    for index, prompt in enumerate(prompts):
        if bos is None or prompt.turns or prompt.ids[:2] != (bos, bos):
            continue
        instead = (
            "tokenize a text that begins with it with add_special_tokens=False"
            if prompt.written is None
            else "leave prepend_bos out if the text already begins with it"
        )
        token = prompt.vocabulary.text(bos)
        warn(f"prompt {index} begins with two BOS tokens, {token!r}; {instead}")
        return


def warn_of_missing_space(
    prompts: Sequence[Prompt], *targets: Sequence[object], rows: Sequence[int] | None = None
) -> None:
    """Warn if a target continues a word of its prompt, and was probably meant as a word.

    Args:
        prompts: The prompts.
        targets: Their targets; each sequence has one per prompt.
        rows: Number of each prompt in the warning; by default its index.
    """
    numbers = range(len(prompts)) if rows is None else rows
    for index, prompt, *own in zip(numbers, prompts, *targets, strict=True):
        for target in own:
            if not isinstance(target, str) or not _is_a_word_without_its_space(prompt, target):
                continue
            joined = f"{(prompt.written or '')[-_SHOWN:]}{target}"
            warn(
                f"target {target!r} of prompt {index} is read without a space, as in "
                f"'...{joined}'; {' ' + target!r} is probably meant: begin the target with the "
                "space, or pass a token id"
            )
            return


def _is_a_word_without_its_space(prompt: Prompt, target: str) -> bool:
    """Whether a target's first word would be one token after a space, which is missing."""
    last = (prompt.written or "")[-1:]
    word = re.match(r"[^\W\d_]+", target)
    if prompt.turns or word is None or not (last.isalnum() or (last and last in _CLOSING)):
        return False
    if last.isalpha() and len(target) <= _ENDING:
        return False
    try:
        return len(prompt.continuation(f" {word[0]}")) == 1
    except TargetError:
        return False
