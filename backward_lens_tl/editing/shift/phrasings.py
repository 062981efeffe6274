"""Other prompts about a request's subject, which are edited together with its own.

An edit at a prompt's last token responds to what the model reads there, and that depends on the
words before it more than on the subject. So a shift of one prompt hardly changes paraphrases of it.
A shift of several prompts responds to what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_requests
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host

SUBJECT = "{subject}"

GENERIC = "generic"
"""Stands for all of `PHRASINGS`."""

PHRASINGS = (
    "{subject} is known for",
    "What I know about {subject} is",
    "{subject}'s most important feature is",
    "The truth about {subject} is that it is",
    "When people hear of {subject}, they think of",
)
"""Phrasings that suit any relation and any kind of subject."""


def with_phrasings(
    host: Host,
    requests: Sequence[TokenizedRequest],
    phrasings: Sequence[str],
    prepend_bos: bool | None,
) -> list[TokenizedRequest]:
    """Add requests with the same targets in other words.

    Args:
        host: The model.
        requests: The requests.
        phrasings: Prompts with `{subject}` for the subject, or `"generic"`.
        prepend_bos: Whether prompts get a BOS token.

    Returns:
        The requests, and then those in other words, without those that ask for the same prompt.

    Raises:
        EditError: If a request has no subject, or two with the same subject have different targets.
    """
    asked = [each.request for each in requests]
    targets = {each.prompt: each.target for each in asked}
    templates = [
        template
        for phrasing in phrasings
        for template in (PHRASINGS if phrasing == GENERIC else (phrasing,))
    ]
    others: list[EditRequest] = []
    for each in asked:
        for template in templates:
            prompt = template.replace(SUBJECT, _subject(each), 1)
            if prompt not in targets:
                targets[prompt] = each.target
                others.append(
                    EditRequest(prompt, each.target, each.subject, template.index(SUBJECT))
                )
            elif targets[prompt] != each.target:
                raise EditError(
                    f"the phrasing {prompt!r} would get two targets, {targets[prompt]!r} and "
                    f"{each.target!r}; leave phrasings out, or edit the two facts one after the "
                    "other"
                )
    return [*requests, *(tokenize_requests(host, others, prepend_bos) if others else ())]


def _subject(request: EditRequest) -> str:
    if request.subject is None:
        raise EditError(
            f"the request for {request.prompt!r} has no subject, but phrasings are prompts about "
            "one; pass EditRequest(prompt, target, subject=...), or several requests with the "
            "same target in other words"
        )
    return request.subject
