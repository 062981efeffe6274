"""Tokens and running text as HTML. All text from models and users is escaped here."""

from __future__ import annotations

from html import escape

from backward_lens_tl.views.text import LEADS, pieces, running_text

LEAD_MARKUP = f'<b aria-hidden="true">{LEADS}</b><span class="sr">target leads: </span>'
"""Marks a target that is the top token, also for screen readers."""


def isolated(token: str) -> str:
    """A token with every character visible, isolated from the surrounding text direction."""
    return f"<bdi>{compact(token).replace(' ', '<u> </u>')}</bdi>"


def isolated_run(text: str) -> str:
    """Running text in one line, isolated from the surrounding text direction."""
    return f"<bdi>{escape(running_text(text))}</bdi>"


def quoted(token: str) -> str:
    """A token within a sentence."""
    return f"<q>{isolated(token)}</q>"


def compact(token: str) -> str:
    """A token with its control characters marked, and plain spaces, which `isolated` marks."""
    return "".join(
        f"<i>{escape(text)}</i>" if is_mark and text != " " else escape(text)
        for text, is_mark in pieces(token)
    )
