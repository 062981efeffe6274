"""What an adapter or a fine-tuned checkpoint writes, layer by layer: a page, and a terminal table.

Both show a table of `delta_tokens` with `components="singular"`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backward_lens_tl._checks import check_kind
from backward_lens_tl.analysis.tables import checked_table
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.views.table import stylesheet
from backward_lens_tl.views.table.markup import isolated
from backward_lens_tl.views.text import number, visible

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_COLUMNS = ("matrix", "layer", "component", "role", "norm", "top_tokens", "bottom_tokens")
_HEADS = ("layer", "matrix", "share", "singular value", "", "top tokens", "bottom tokens")
_SHOWN_NAMES = 6


def weight_change_page(table: pd.DataFrame, delta: WeightDelta) -> str:
    """Return a page of the main directions of a weight change.

    Args:
        table: What `delta_tokens(model, delta, components="singular")` returned.
        delta: The change.

    Returns:
        An HTML page without scripts: a row per layer, matrix and singular vector, the last layer on
        top, with its share of the squared norm of the whole change and its tokens.

    Raises:
        InputError: If an argument is something else.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> delta = blt.editing.ForwardPassShift(layer=6, size=20.0, key="plain")(model, request)
        >>> from backward_lens_tl.views.weight_changes import weight_change_page
        >>> table = blt.editing.delta_tokens(model, delta, components="singular")
        >>> page = weight_change_page(table, delta)
        >>> "<bdi><u> </u>Paris</bdi>" in page
        True
    """
    rows = _rows(table, delta)
    heads = "".join(f"<th>{escape(head)}</th>" for head in _HEADS)
    body = "\n".join(f"<tr>{''.join(_html_cells(row))}</tr>" for row in rows)
    about = "".join(f"<p>{escape(text)}</p>" for text in summary(delta))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title(delta))}</title><style>{stylesheet()}{_STYLE}</style></head>"
        f"<body class='blt'><main class='blt-page'><h1>{escape(title(delta))}</h1>{about}"
        f"<p>{escape(_EXPLANATION)}</p>"
        f"<div class='wide'><table class='changes'><thead><tr>{heads}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div></main></body></html>\n"
    )


def weight_change_table(table: pd.DataFrame, delta: WeightDelta) -> Table:
    """Return the same table for a terminal.

    Args:
        table: What `delta_tokens(model, delta, components="singular")` returned.
        delta: The change.

    Returns:
        A table of rich.

    Raises:
        InputError: If an argument is something else.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> delta = blt.editing.ForwardPassShift(layer=6, size=20.0, key="plain")(model, request)
        >>> from backward_lens_tl.views.weight_changes import weight_change_table
        >>> table = blt.editing.delta_tokens(model, delta, components="singular")
        >>> weight_change_table(table, delta).row_count
        1
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in _HEADS:
        is_number = head in ("layer", "share", "singular value")
        shown.add_column(head, justify="right" if is_number else "left", no_wrap=is_number)
    for row in _rows(table, delta):
        tokens = (" ".join(map(visible, row[end])) for end in ("top_tokens", "bottom_tokens"))
        shown.add_row(*map(Text, (*_numbers(row), row["role"], *tokens)))
    return shown


def title(delta: WeightDelta) -> str:
    """What the change is."""
    about = delta.about
    if "tuned" in about:
        return f"What {_name(about['tuned'])} adds to {_name(about['base'])}"
    if "adapter" in about:
        base = _name(about["base"]) or "its base"
        return f"What the adapter {_name(about['adapter'])} adds to {base}"
    return "What the change adds"


def _name(source: str) -> str:
    """The last part of a path; names on the hub as they are."""
    return Path(source).name if os.path.isabs(source) else source


def summary(delta: WeightDelta) -> Iterator[str]:
    """The size of the change, and what it leaves out.

    Args:
        delta: The change.

    Yields:
        Sentences.
    """
    what = "1 matrix" if len(delta) == 1 else f"{len(delta)} matrices"
    yield f"{what}, norm {number(delta.norm)}."
    biases = sum(each.bias is not None and bool(each.bias.any()) for each in delta)
    if biases:
        yield f"In {biases} of them the bias changes too."
    discarded: Mapping[str, float] = delta.about.get("discarded") or {}
    if discarded:
        worst = max(discarded, key=discarded.__getitem__)
        yield (
            f"Rank {delta.about['rank']} leaves out {100 * discarded_share(delta):.3g} % of the "
            f"squared norm; most in {worst}: {100 * discarded[worst]:.3g} %."
        )
    rounded: Sequence[str] | None = delta.about.get("rounded")
    if rounded:
        yield f"The base is rounded from {rounded[0]} to {rounded[1]}, as the other is stored."
    rounding: Mapping[str, float] = delta.about.get("rounding") or {}
    if rounding:
        worst = max(rounding, key=rounding.__getitem__)
        yield (
            "The base is stored with fewer digits than the other. If training started from weights "
            f"that were rounded later, this explains at most {100 * rounding[worst]:.3g} % of the "
            f"squared norm of a matrix ({worst})."
        )
    left_out: Sequence[str] = delta.about.get("left_out") or ()
    if left_out:
        more = len(left_out) - _SHOWN_NAMES
        names = ", ".join(left_out[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        yield f"Not shown, but changed too: {names}."


def discarded_share(delta: WeightDelta) -> float:
    """The share of the squared norm of the whole change that its rank leaves out."""
    discarded: Mapping[str, float] = delta.about["discarded"]
    kept = {each.name: each.norm**2 for each in delta}
    whole = {name: square / (1 - discarded[name]) for name, square in kept.items()}
    total = sum(whole.values())
    return 1 - sum(kept.values()) / total if total else 0.0  # 0 if only biases change


_EXPLANATION = (
    "A row is a singular vector of the change of one matrix. The share is that of the squared norm "
    "of the whole change. W_out and W_O write the top tokens for inputs along the other singular "
    "vector, and remove the bottom tokens; the other matrices respond to the tokens. The common "
    "sign of both vectors is arbitrary: here, the largest entry of the input side is positive."
)

_STYLE = """
.blt .changes { border-collapse: collapse; }
.blt .changes th { color: var(--quiet); font-size: 12px; font-weight: 400; text-align: left; }
.blt .changes th, .blt .changes td { padding: .2rem .9rem .2rem 0; vertical-align: top; }
.blt .changes td { border-top: 1px solid var(--line); }
.blt .changes td:nth-child(-n+4) { font-variant-numeric: tabular-nums; white-space: nowrap; }
.blt .changes bdi { background: var(--raised); border-radius: 3px; display: inline-block;
  margin: 0 .3rem .15rem 0; padding: 0 .25rem; white-space: nowrap; }
.blt .changes td:nth-child(n+6) { min-width: 15rem; }
.blt .changes u { opacity: .35; text-decoration: none; border-bottom: 1px solid; }
.blt .wide { overflow-x: auto; }
"""


def _rows(table: pd.DataFrame, delta: WeightDelta) -> list[dict[Any, Any]]:
    """The rows in the order of a backward pass, with their shares."""
    check_kind("delta", delta, WeightDelta, "WeightDelta.from_lora or WeightDelta.between")
    checked_table(
        table, _COLUMNS, 'what delta_tokens(model, delta, components="singular") returned'
    )
    whole = delta.norm**2
    rows = table.to_dict("records")
    for row in rows:
        row["share"] = row["norm"] ** 2 / whole if whole else 0.0
    return sorted(rows, key=lambda row: -row["layer"])


def _numbers(row: Mapping[Any, Any]) -> tuple[str, str, str, str]:
    share = f"{100 * row['share']:.2g} %"
    return str(row["layer"]), row["matrix"], share, number(row["norm"])


def _html_cells(row: Mapping[Any, Any]) -> Iterator[str]:
    for text in (*_numbers(row), row["role"]):
        yield f"<td>{escape(text)}</td>"
    for end in ("top_tokens", "bottom_tokens"):
        yield f"<td>{''.join(map(isolated, row[end]))}</td>"
