"""A CircuitsVis widget, made safe to put into any page.

CircuitsVis's own HTML leaves its element open, loads from a CDN or repeats 1.3 MB, and asks a
network which of the two. Here the component and its properties are taken out of it and embedded
anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from types import new_class
from typing import Any, cast
from uuid import uuid4

from backward_lens_tl.errors import InputError, WidgetError
from backward_lens_tl.views.text import pieces
from backward_lens_tl.views.widgets.library import (
    call_script,
    library_script,
    not_as_known,
    output_must_carry,
    script_json,
)

# Widgets have a light background and black text of their own; a dark notebook's rules for tables
# and headings would give them white text on it. Below there is room for a tooltip, which the output
# of a cell would cut off.
_STYLE = """\
<style>
.blt-widget { background: #fff; color: #111; color-scheme: light;
  padding: 8px 12px 60px; font-family: system-ui, sans-serif; font-size: 14px; }
.blt-widget :is(p, table, tr, th, h3, label, select, input, button) { color: #111 !important; }
.blt-widget :is(table, tr) { background: none !important; }
.blt-widget td { text-align: left; }
.blt-widget td > span { max-width: 24ch; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.blt-widget > p { margin: 0 0 6px; max-width: 80em; }
</style>"""
_NO_SCRIPTS = "This widget is drawn by JavaScript, which does not run here."

_RENDERED = re.compile(
    r'<div id="(?P<id>[\w-]+)"[^>]*>\s*<script crossorigin type="module">\s*'
    r'import \{ render, (?P<element>\w+) \} from "(?P<address>https://[^"\s]+)";\s*'
    r'render\(\s*"(?P=id)",\s*(?P=element),\s*(?P<props>\{.*\})\s*\)\s*</script>\s*',
    re.DOTALL,
)


@dataclass(frozen=True, eq=False, repr=False)
class Widget:
    """A CircuitsVis widget that needs no network; see `page` for several on one page.

    It is an instance of CircuitsVis's `RenderedHTML`, too.

    Attributes:
        element: CircuitsVis's name of the component.
        props: What the component shows.
        address: Where the component can be loaded from a network.
        caption: What it shows, as HTML.
    """

    element: str
    props: dict[str, Any]
    address: str
    caption: str

    @property
    def fragment(self) -> str:
        """HTML without the JavaScript, which it waits for."""
        place = _new_id()
        return f"{self._place(place)}\n{call_script(place, self.element, self.props)}"

    @property
    def local_src(self) -> str:
        """HTML that needs nothing else."""
        return f"{library_script()}\n{self.fragment}"

    @property
    def cdn_src(self) -> str:
        """HTML that loads the JavaScript from a network, and is small."""
        place = _new_id()
        return (
            f'{self._place(place)}\n<script crossorigin type="module">\n'
            f'import {{ render, {self.element} }} from "{self.address}";\n'
            f"render({json.dumps(place)}, {self.element}, {script_json(self.props)})\n</script>"
        )

    def show_code(self) -> str:
        """HTML that loads the JavaScript from a network, as CircuitsVis calls it."""
        return self.cdn_src

    def _place(self, place: str) -> str:
        return (
            f'<div class="blt-widget">{_STYLE}<p>{self.caption}</p>'
            f'<div id="{place}" style="margin: 15px 0;">{_NO_SCRIPTS}</div></div>'
        )

    def __str__(self) -> str:
        return self.local_src

    def __html__(self) -> str:
        return self.local_src

    def __repr__(self) -> str:
        return f"<{self.element} of CircuitsVis, shown in a notebook; str() is its HTML>"

    def _repr_html_(self) -> str:
        return self.local_src

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        # Only what displays asks for this; `_repr_html_` is also called to save the HTML, and then
        # no page has seen the JavaScript.
        del include, exclude
        return {"text/html": self.local_src if output_must_carry() else self.fragment}


_SPACE = "␣"
_WORD_JOINER = "\u2060"


def literal(text: str) -> str:
    """A text that CircuitsVis shows as it is, every character visible.

    It sets some texts as HTML, some as text, and draws others on a canvas, so no escape fits them
    all. A word joiner, which has no width, after each `<` and `&` means the same in all three:
    behind it, neither begins a tag or an entity.

    Args:
        text: A token, or a label with a caller's text in it.

    Returns:
        The text, with marks for spaces and for other characters without a shape.
    """
    visible = (_SPACE if piece == (" ", True) else piece.text for piece in pieces(text))
    return re.sub("[<&]", rf"\g<0>{_WORD_JOINER}", "".join(visible))


def embedded(rendered: Any, caption: str, **props: Any) -> Widget:
    """What CircuitsVis rendered, as a widget that is safe to show.

    Args:
        rendered: CircuitsVis's `RenderedHTML`.
        caption: What it shows, as HTML.
        **props: Properties of the component that CircuitsVis's function does not take.

    Returns:
        The widget, with all numbers rounded to six significant digits.

    Raises:
        WidgetError: If CircuitsVis renders in a way that is not known here.
    """
    found = _RENDERED.fullmatch(str(getattr(rendered, "cdn_src", "")))
    if found is None:
        raise WidgetError(not_as_known("renders HTML in which its component cannot be found"))
    try:
        own = json.loads(found["props"])
    except ValueError as error:
        raise WidgetError(not_as_known("renders properties that are not JSON")) from error
    return _widget_class()(found["element"], _rounded(own | props), found["address"], caption)


def page(widgets: Sequence[Widget], title: str) -> str:
    """Several widgets as one document, with the JavaScript once.

    Args:
        widgets: The widgets, from the top of the page.
        title: Title and heading of the page.

    Returns:
        An HTML document that fetches nothing.

    Raises:
        InputError: If there is no widget, or something is none.
    """
    strangers = [widget for widget in widgets if not isinstance(widget, Widget)]
    if strangers or not widgets:
        given = f"{type(strangers[0]).__name__}, which is no widget" if strangers else "no widget"
        raise InputError(
            f"a page was asked for with {given}; pass what widgets.norms, top_tokens, quantities "
            "and reversed_attention return"
        )
    body = "\n".join(f"<section>{widget.fragment}</section>" for widget in widgets)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        "<style>body { background: #fff; color: #111; font-family: system-ui, sans-serif; }</style>"
        f"\n{library_script()}\n</head>"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def _new_id() -> str:
    """Anew each time: a widget that is shown twice is in two places."""
    return f"circuits-vis-{uuid4().hex}"


@cache
def _widget_class() -> type[Widget]:
    """`Widget` as a subclass of `RenderedHTML`, made here: importing CircuitsVis is slow."""
    from circuitsvis.utils.render import RenderedHTML

    names = {"__module__": __name__, "__doc__": Widget.__doc__}
    made = new_class("Widget", (Widget, RenderedHTML), exec_body=lambda body: body.update(names))
    return cast("type[Widget]", made)


_SMALLEST = 2.0**-149  # of the positive numbers of float32; below are only stand-ins


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return 0.0 if abs(value) < _SMALLEST else float(f"{value:.6g}")
    return value
