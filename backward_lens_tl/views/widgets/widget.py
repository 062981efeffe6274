"""A CircuitsVis widget that is safe to put into any page.

CircuitsVis's own HTML leaves an element open, and either loads from a CDN or repeats 1.3 MB, which
it decides by a network request. So its components are embedded in HTML of our own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from types import new_class
from typing import Any, cast
from uuid import uuid4

from backward_lens_tl.errors import WidgetError
from backward_lens_tl.views.colors import VERMILION
from backward_lens_tl.views.text import visible
from backward_lens_tl.views.widgets.library import (
    call_script,
    library_script,
    output_must_carry,
    script_json,
    unsupported,
)

# Widgets have a light background and black text; a dark notebook's rules for tables and headings
# would make the text white. The padding below is room for a tooltip, which the cell's output would
# cut off. CircuitsVis leaves 20 pixels per row of a tooltip, so these rows are put into columns.
_STYLE = """\
<style>
.blt-widget { background: #fff; color: #111; color-scheme: light;
  padding: 8px 12px calc(40px + 19px * var(--rows)); font-family: system-ui, sans-serif;
  font-size: 14px; }
.blt-widget > div > div:has(> .colored-tokens) { padding-bottom: 0 !important; }
.blt-widget .colored-tokens { padding-bottom: 12px !important; }
.blt-widget [data-popper-placement] tbody { display: grid; column-gap: 16px;
  grid-auto-flow: column; grid-template-rows: repeat(var(--rows), auto); font-size: 12px; }
.blt-widget [data-popper-placement] tr { display: flex; gap: 8px; justify-content: space-between; }
.blt-widget div:has(> label[for="Negative Bound"]) { display: none; }
.blt-widget :is(p, table, tr, th, h3, label, select, input, button) { color: #111 !important; }
.blt-widget :is(table, tr) { background: none !important; }
.blt-widget td { text-align: left; }
.blt-widget td > span { max-width: 24ch; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.blt-widget > p { margin: 0 0 6px; max-width: 80em; }
</style>"""
_BOUNDARY = f"border-left: 3px solid {VERMILION}; margin-left: 5px; padding: 4px 0 4px 5px;"
_NO_SCRIPTS = "This widget is drawn by JavaScript, which does not run here."


@dataclass(frozen=True, eq=False, repr=False)
class Widget:
    """A CircuitsVis widget that needs no network; `page` combines several.

    It is also an instance of CircuitsVis's `RenderedHTML`.

    Attributes:
        element: CircuitsVis's name of the component.
        props: Properties of the component.
        caption: The caption, as HTML.
        tooltip_rows: Rows of the tooltip's table, for which there is room below the widget.
        answer_start: Index of the first token after a line, if there is a line.
    """

    element: str
    props: dict[str, Any]
    caption: str
    tooltip_rows: int = 2
    answer_start: int | None = None

    @property
    def fragment(self) -> str:
        """HTML without the JavaScript, for which it waits."""
        place = _new_id()
        return f"{self._place(place)}\n{call_script(place, self.element, self.props)}"

    @property
    def local_src(self) -> str:
        """Self-contained HTML."""
        return f"{library_script()}\n{self.fragment}"

    @property
    def cdn_src(self) -> str:
        """Small HTML that loads the JavaScript from a network."""
        place = _new_id()
        address = f"https://unpkg.com/circuitsvis@{version('circuitsvis')}/dist/cdn/esm.js"
        return (
            f'{self._place(place)}\n<script crossorigin type="module">\n'
            f'import {{ render, {self.element} }} from "{address}";\n'
            f"render({json.dumps(place)}, {self.element}, {script_json(self.props)})\n</script>"
        )

    def _place(self, place: str) -> str:
        style = _STYLE
        if self.answer_start is not None:
            token = f"#{place} .colored-tokens > span:nth-of-type({self.answer_start + 1})"
            style += f"<style>{token} {{ {_BOUNDARY} }}</style>"
        return (
            f'<div class="blt-widget" style="--rows: {self.tooltip_rows}">{style}'
            f"<p>{self.caption}</p>"
            f'<div id="{place}" style="margin: 15px 0;">{_NO_SCRIPTS}</div></div>'
        )

    def __str__(self) -> str:
        return self.local_src

    def __repr__(self) -> str:
        return f"<{self.element} of CircuitsVis, shown in a notebook; str() is its HTML>"

    def _repr_html_(self) -> str:
        return self.local_src

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        # Only display calls this. `_repr_html_` is also called to save the HTML, when no page has
        # the JavaScript yet.
        del include, exclude
        return {"text/html": self.local_src if output_must_carry() else self.fragment}


_WORD_JOINER = "\u2060"


def literal(text: str) -> str:
    """A text that CircuitsVis shows as it is, with every character visible.

    It sets some texts as HTML, some as text, and draws others on a canvas, so no escaping fits all
    of them. A word joiner, which has no width, is inserted after each `<` and `&`: it means the
    same in all three, and neither can start a tag or an entity any more.

    Args:
        text: A token, or a label that contains a caller's text.

    Returns:
        The text, with marks for spaces and for other invisible characters.
    """
    return re.sub("[<&]", rf"\g<0>{_WORD_JOINER}", visible(text))


def make_widget(
    element: str,
    caption: str,
    *,
    tooltip_rows: int = 2,
    answer_start: int | None = None,
    **props: Any,
) -> Widget:
    """Make a widget of a CircuitsVis component.

    Args:
        element: CircuitsVis's name of the component.
        caption: The caption, as HTML.
        tooltip_rows: Rows of the tooltip's table.
        answer_start: Index of the first token after a line, if there is a line.
        **props: Properties of the component, as JSON has them.

    Returns:
        The widget, with all numbers rounded to six significant digits.

    Raises:
        WidgetError: If the installed circuitsvis has no such component.
    """
    if element not in library_script():
        raise WidgetError(unsupported(f"has no component {element}"))
    return _widget_class()(element, _rounded(props), caption, tooltip_rows, answer_start)


def _new_id() -> str:
    """A new id each time, since a widget that is shown twice is in two places."""
    return f"circuits-vis-{uuid4().hex}"


@cache
def _widget_class() -> type[Widget]:
    """`Widget` as a subclass of `RenderedHTML`, on demand: importing CircuitsVis is slow."""
    from circuitsvis.utils.render import RenderedHTML

    names = {"__module__": __name__, "__doc__": Widget.__doc__}
    made = new_class("Widget", (Widget, RenderedHTML), exec_body=lambda body: body.update(names))
    return cast("type[Widget]", made)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
