"""The report: one page with the statements of the paper and the findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from backward_lens_tl.views.text import running_text

_CLASSES = {
    "holds": "holds",
    "holds with exceptions": "partly",
    "does not hold here": "fails",
    "not measured": "unknown",
}


def render_report(findings: Sequence[Mapping[str, Any]]) -> str:
    """Render the report on all experiments of a folder.

    Args:
        findings: The findings, as `folder.read_findings` returns them.

    Returns:
        An HTML page. Figures and tables are shown in frames, by relative addresses.
    """
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["running_text"] = running_text
    template, style = (
        (files("backward_lens_tl") / "reproduction" / name).read_text(encoding="utf-8")
        for name in ("report.html.jinja", "report.css")
    )
    return environment.from_string(template).render(
        findings=findings,
        model=findings[0]["about"]["model"] if findings else "",
        classes=_CLASSES,
        style=style,
    )
