"""The report: what the paper says beside what was found, on one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from backward_lens_tl.views.text import running_text

_CLASSES = {
    "holds": "holds",
    "holds with exceptions": "partly",
    "does not hold here": "fails",
    "not measured": "unknown",
}
_FRAME = 30
"""Pixels of a frame beyond what is in it."""


def render_report(findings: Sequence[Mapping[str, Any]]) -> str:
    """The report on all experiments of a folder.

    Args:
        findings: What each found, as `folder.read_findings` returns it.

    Returns:
        A page; figures and tables beside it are shown in frames, by their relative addresses.
    """
    style = (files("backward_lens_tl") / "reproduction" / "report.css").read_text(encoding="utf-8")
    model = findings[0]["about"]["model"] if findings else ""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Backward Lens on {escape(model)}</title>",
            f"<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f"<h1>Backward Lens on {escape(model)}</h1>",
            _introduction(),
            _overview(findings),
            *map(_section, findings),
            "</main>\n</body>\n</html>\n",
        )
    )


def _introduction() -> str:
    return (
        "<p>The experiments of <cite>Backward Lens: Projecting Language Model Gradients into the "
        "Vocabulary Space</cite> (Katz, Belinkov, Geva and Wolf, EMNLP 2024), measured again. "
        "Each figure's statement was made into checks with thresholds; the first check of each "
        "decides whether it holds. Ranks are those of raw gradients, as in the paper, so that an "
        "update adds what VJPs have at the far end of the vocabulary.</p>"
    )


def _overview(findings: Iterable[Mapping[str, Any]]) -> str:
    rows = "\n".join(
        f'<tr><td><a href="#{each["name"]}">{escape(each["title"])}</a></td>'
        f"<td>{_badge(each['verdict'])}</td><td>{escape(_measured_on(each['about']))}</td></tr>"
        for each in findings
    )
    return (
        '<table class="overview"><thead><tr><th>experiment</th><th>the paper\'s statement</th>'
        f"<th>measured on</th></tr></thead><tbody>\n{rows}\n</tbody></table>"
    )


def _measured_on(about: Mapping[str, Any]) -> str:
    rejected = f", {about['rejected']} rejected" if about["rejected"] else ""
    cut = f", of {about['cut']} only the target's first token" if about["cut"] else ""
    return (
        f"{about['model']} ({about['n_layers']} layers, {about['d_vocab']:,} tokens), "
        f"{about['prompts']} prompts of {about['data']} {about['bos']}{rejected}{cut}, "
        f"{about['seconds']:.0f} s"
    )


def _badge(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES[verdict]}">{escape(verdict)}</span>'


def _section(finding: Mapping[str, Any]) -> str:
    shown = [*finding["results"], *finding["figures"]]
    parts = (
        f'<section id="{finding["name"]}">\n<h2>{escape(finding["title"])} '
        f"{_badge(finding['verdict'])}</h2>",
        f"<p><b>The paper:</b> {escape(finding['statement'])}</p>",
        "<ul>" + "".join(map(_check, finding["checks"])) + "</ul>",
        *(f'<p class="note">{escape(note)}</p>' for note in finding["notes"]),
        *map(_frame, shown),
        *(_table(table, is_open=not shown) for table in finding["tables"]),
        "</section>",
    )
    return "\n".join(parts)


def _check(check: Mapping[str, Any]) -> str:
    mark, word = ("✓", "holds") if check["holds"] else ("✗", "does not hold")
    exceptions = f" Exceptions: {escape(check['exceptions'])}." if check["exceptions"] else ""
    return (
        f'<li><span class="mark" role="img" aria-label="{word}">{mark}</span> '
        f"{escape(check['claim'])}. <b>Found:</b> {escape(check['found'])}.{exceptions}</li>"
    )


def _frame(shown: Mapping[str, Any]) -> str:
    vector = f' · <a href="{escape(shown["svg"])}">SVG</a>' if "svg" in shown else ""
    name = escape(running_text(shown["name"]))
    return (
        f'<figure><figcaption>{name} · <a href="{escape(shown["file"])}">page</a>{vector}'
        f'</figcaption>\n<iframe src="{escape(shown["file"])}" title="{name}" loading="lazy" '
        f'height="{shown["height"] + _FRAME}"></iframe></figure>'
    )


def _table(table: Mapping[str, Any], *, is_open: bool) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table["columns"])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(running_text(cell))}</td>" for cell in row) + "</tr>"
        for row in table["rows"]
    )
    name, count = escape(running_text(table["name"])), len(table["rows"])
    of = f"the first {count} of " if count < table["n_rows"] else ""
    return (
        f"<details{' open' if is_open else ''}>"
        f"<summary>{name}: {of}{table['n_rows']} rows</summary>\n"
        f'<p><a href="{escape(table["file"])}">CSV</a></p>\n'
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></details>"
    )
