"""Several widgets and tables in one document."""

from __future__ import annotations

from html import escape

from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.table import render_table
from backward_lens_tl.views.text import running_text
from backward_lens_tl.views.widgets.library import library_script
from backward_lens_tl.views.widgets.widget import Widget

_STYLE = """\
<style>
body { background: #fff; color: #111; font-family: system-ui, sans-serif; }
section + section { border-top: 1px solid #d5dce3; margin-top: 16px; padding-top: 12px; }
</style>"""


def page(*parts: Widget | BackwardLensResult, title: str = "Backward Lens") -> str:
    """Combine widgets and results into one document.

    It contains the widgets' JavaScript once. A result is shown as in a notebook: the table of each
    of its first prompts.

    Args:
        *parts: Widgets and results, from the top of the page.
        title: Title and heading of the page.

    Returns:
        An HTML document that loads nothing.

    Raises:
        InputError: If there is nothing to show, or something else was passed.
        WidgetError: If the installed version of circuitsvis is not supported.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> parts = [result, blt.widgets.norms(result), blt.widgets.quantities(result)]
        >>> html = blt.widgets.page(*parts, title="Messi")
        >>> html.count("<section>"), "<h1>Messi</h1>" in html
        (3, True)
    """
    strangers = [
        type(part).__name__ for part in parts if not isinstance(part, Widget | BackwardLensResult)
    ]
    if strangers or not parts:
        given = (
            f"{strangers[0]}, which is neither a widget nor a result" if strangers else "nothing"
        )
        raise InputError(
            f"page got {given}; pass results, and what widgets.norms, top_tokens, quantities and "
            "reversed_attention return"
        )
    heading = escape(running_text(title))
    body = "\n".join(f"<section>{_fragment(part)}</section>" for part in parts)
    scripts = library_script() if any(isinstance(part, Widget) for part in parts) else ""
    # Widgets are light in any colour scheme, so the tables next to them are, too.
    return (
        '<!DOCTYPE html>\n<html lang="en" theme="light"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title>{_STYLE}\n{scripts}\n</head>"
        f"<body><main><h1>{heading}</h1>\n{body}\n</main></body></html>\n"
    )


def _fragment(part: Widget | BackwardLensResult) -> str:
    return part.fragment if isinstance(part, Widget) else render_table(part)
