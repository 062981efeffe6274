"""Text of models and users as HTML, escaped."""

from __future__ import annotations

from html import escape

from backward_lens_tl.views.appearance import LEADS, pieces, running_text

LEAD_MARKUP = f'<b aria-hidden="true">{LEADS}</b><span class="sr">target leads: </span>'
"""Marks a target that leads, also for a screen reader."""


def compact_markup(token: str) -> str:
    """A token with its control characters drawn, and spaces that `isolated` would draw."""
    return "".join(
        f"<i>{escape(text)}</i>" if is_mark and text != " " else escape(text)
        for text, is_mark in pieces(token)
    )


def isolated(token: str) -> str:
    """A token with all of it drawn, isolated from the direction of its surroundings."""
    return f"<bdi>{compact_markup(token).replace(' ', '<u> </u>')}</bdi>"


def isolated_run(text: str) -> str:
    """Running text in one line, isolated from the direction of its surroundings."""
    return f"<bdi>{escape(running_text(text))}</bdi>"
