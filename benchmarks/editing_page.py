"""The section of docs/editing.md about results on a real model, from the results as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.reproduction.editing_methods import PUBLISHED
from benchmarks.report import table

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
"""The generated part of docs/editing.md is between these lines."""

LENS, OWN, PAPER = "shift with a lens", "shift", "the paper's form, least size"
"""The methods that the section is about: the shift's defaults, and the form of the paper."""

PUBLISHED_SIZE = "the paper's form, its size"
"""The paper's own setting."""

Row = Mapping[str, Any]

_EFFECTS = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "neighborhood": "neighborhood",
    "neighborhood_success": "NS",
    "kept": "kept",
}
_DAMAGE = {
    "neighborhood_kl_median": "neighbor KL",
    "neighborhood_kl": "neighbor KL, mean",
    "text_kl_median": "text KL",
    "corpus_perplexity": "perplexity",
}
_PASSES = {"most_forward_passes": "forward passes"}
_GOALS: Sequence[tuple[str, str, str, float]] = (
    (LENS, "efficacy", "at least", 99.0),
    (OWN, "efficacy", "at least", 95.0),
    *(
        (name, *goal)
        for name in (LENS, OWN)
        for goal in (
            ("kept", "at least", 85.0),
            ("neighborhood_kl_median", "at most", 0.02),
            ("most_forward_passes", "at most", 6.0),
        )
    ),
)
"""The method, what is measured, and what was wanted beforehand."""

_TOLD = ("layer", "layers", "lr", "objective", "key_mode", "regularization")
"""Settings of methods that the page names."""

_ASIDE = ("sizes", "attempts")
"""Trials that have tables of their own."""

_LEAST_RATIO = 10.0
_PUBLISHED_NAMES = {
    "shift": PUBLISHED_SIZE,
    **{name: name for name in ("ft_late", "rome", "memit")},
}


def with_results(text: str, found: Mapping[str, Any]) -> str:
    """Replace the generated part of docs/editing.md.

    Args:
        text: The page.
        found: The results by model, the real one first.

    Returns:
        The page with these results.
    """
    start, rest = text.split(BEGIN)
    return f"{start}{BEGIN}{section(found)}{END}{rest.partition(END)[2]}"


def section(found: Mapping[str, Any]) -> str:
    """Render the section.

    Args:
        found: The results by model, the real one first.

    Returns:
        Markdown.
    """
    name, real = next(iter(found.items()))
    methods = real["methods"]
    single = [row for row in methods if row["facts"] == 1 and row["run"] not in _ASIDE]
    unedited = next(row for row in single if row["name"] == NONE)
    edited = [row for row in single if row["name"] != NONE]
    parts = [
        _intro(name, real),
        table(
            ["method", "n", *_EFFECTS.values()],
            [[_label(row), _n(row), *(_rate(row[each]) for each in _EFFECTS)] for row in single],
        ),
        table(
            ["method", *_DAMAGE.values(), "KL ratio: the paper's form, least size / this method"],
            [
                [_label(row), *(_small(row[each]) for each in _DAMAGE), _ratio(row, real)]
                for row in (unedited, *edited)
            ],
        ),
        table(
            ["method", "forward passes (most)", "backward", "contrast prompts", "s per edit"],
            [[_label(row), *_costs(row)] for row in edited],
        ),
        _settings(single),
        "### Goals\n",
        table(["goal", "measured", ""], _goals(real)),
    ]
    if any(row["run"] == "sizes" for row in methods):
        text = "Multiples of the least size with which the target leads.\n"
        parts += ["### Larger sizes\n", text, _sizes(methods)]
    if any(row["run"] == "attempts" for row in methods):
        text = "On 30 other records, on which no setting was chosen either.\n"
        parts += ["### Attempts at paraphrases\n", text, _attempts(methods)]
    if any(row["facts"] > 1 for row in methods):
        parts += ["### Several facts in one edit of a real model\n", _several(methods)]
    if real.get("experiments"):
        parts += ["### The paper's experiments on editing\n", _experiments(real["experiments"])]
    return "\n".join([*parts, "### Other models\n", _about_models(found), _models(found)])


def _intro(name: str, real: Mapping[str, Any]) -> str:
    about, n = real["about"], max(row["records"] for row in real["methods"] if row["name"] == PAPER)
    first, texts = about["first"], about["texts"]
    text = (
        f"{name}, prompts without BOS, rows {first} to {first + n - 1} of `{about['data']}` with "
        f"`shuffle={about['shuffle']!r}`. No setting was chosen on these records. Values are means "
        "in percent, and medians of KL divergences in nats unless the column says mean, with 95 % "
        f"bootstrap intervals over records. Perplexity and text KL are those of {texts['n']} "
        f"entries of `{texts['name']}`, truncated to 32 tokens."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False) + "\n"


def _label(row: Row) -> str:
    return _named(row["name"])


def _named(name: str) -> str:
    return name if " " in name else f"`{name}`"


def _n(row: Row) -> str:
    return f"{row['records']}" + (f" ({row['failed']} failed)" if row["failed"] else "")


def _rate(value: Sequence[float | None]) -> str:
    return _with_ends(
        value, lambda number: f"{number:.0f}" if number in (0, 100) else f"{number:.1f}"
    )


def _small(value: Sequence[float | None]) -> str:
    return _with_ends(value, _digits)


def _digits(number: float) -> str:
    return "0" if number == 0 else f"{number:.2g}" if number < 1 else f"{number:.3g}"


def _with_ends(value: Sequence[float | None], shown: Any) -> str:
    middle, *ends = value
    if middle is None:
        return ""
    if None in ends or all(end == middle for end in ends):
        return str(shown(middle))
    return f"{shown(middle)} [{', '.join(map(shown, ends))}]"


def _costs(row: Row) -> list[str]:
    forward = row["forward_passes"][0]
    counts = [
        "" if row[each][0] is None else f"{row[each][0]:.3g}"
        for each in ("backward_passes", "contrast_prompts")
    ]
    most, most_if_reached = row["most_forward_passes"], row["most_passes_if_reached"]
    ends = f"{most}" if most_if_reached in (most, None) else f"{most}; {most_if_reached} if reached"
    passes = "" if forward is None else f"{forward:.1f} ({ends})"
    return [passes, *counts, f"{row['seconds'][0]:.2f}"]


def _settings(rows: Sequence[Row]) -> str:
    """The settings that other methods than the shift were measured with."""
    described = [
        f"`{row['name']}` with "
        + ", ".join(f"`{key}={row['settings'][key]}`" for key in _TOLD if key in row["settings"])
        for row in rows
        if row["settings"] and row["settings"]["method"] != ForwardPassShift.__name__
    ]
    return f"Measured: {'; '.join(described)}.\n" if described else ""


def _pair(name: str, real: Mapping[str, Any]) -> Row | None:
    return next((pair for pair in real["pairs"] if pair["name"] == name), None)


def _ratio(row: Row, real: Mapping[str, Any]) -> str:
    pair = _pair(row["name"], real)
    return "" if pair is None else _small(pair["ratio"])


def _goals(real: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    labels = {**_EFFECTS, **_DAMAGE, **_PASSES}
    for name, metric, bound, wanted in _GOALS:
        row = _find(real["methods"], name)
        if row is None:
            continue
        value = row[metric] if metric in _PASSES else row[metric][0]
        if value is None:  # not measured
            continue
        is_met = value >= wanted if bound == "at least" else value <= wanted
        goal = f"{_label(row)}: {labels[metric]} {bound} {wanted:g}"
        rows.append([goal, f"{value:.3g}", _mark(is_met)])
    for name in (LENS, OWN):
        pair = _pair(name, real)
        if pair is not None and pair["ratio"][1] is not None:
            goal = f"{_named(name)}: at least {_LEAST_RATIO:g} times less KL than the paper's form"
            rows.append([goal, _small(pair["ratio"]), _mark(pair["ratio"][1] >= _LEAST_RATIO)])
    return rows


def _mark(is_met: bool) -> str:
    return "✓" if is_met else "✗"


def _find(methods: Sequence[Row], name: str, facts: int = 1) -> Row | None:
    return next((row for row in methods if (row["name"], row["facts"]) == (name, facts)), None)


def _sizes(methods: Sequence[Row]) -> str:
    columns = ("efficacy", "paraphrase", "kept")
    rows = []
    for row in methods:
        if row["run"] == "sizes" and row["name"] != NONE:
            name, _, margin = row["name"].rpartition(", ")
            damage = [_small(row[each]) for each in ("neighborhood_kl_median", "text_kl_median")]
            rows.append([name, margin, _n(row), *(_rate(row[each]) for each in columns), *damage])
    return table(["method", "multiple", "n", *columns, "neighbor KL", "text KL"], rows)


def _attempts(methods: Sequence[Row]) -> str:
    columns = ("efficacy", "paraphrase", "neighborhood_success", "kept")
    rows = [
        [
            f"`{NONE}`" if row["name"] == NONE else row["name"],
            *(_rate(row[each]) for each in columns),
            *(_small(row[each][:1]) for each in ("neighborhood_kl_median", "text_kl_median")),
        ]
        for row in methods
        if row["run"] == "attempts"
    ]
    head = ["efficacy", "paraphrase", "NS", "kept", "neighbor KL", "text KL"]
    return table(["attempt", *head], rows)


def _several(methods: Sequence[Row]) -> str:
    columns = ("efficacy", "paraphrase", "neighborhood_success", "kept")
    rows = [
        row for row in methods if row["name"] in (LENS, PAPER, "memit") and row["run"] not in _ASIDE
    ]
    order = list(dict.fromkeys(row["name"] for row in rows))
    rows.sort(key=lambda row: (order.index(row["name"]), row["facts"]))
    shown = [
        [
            _label(row),
            str(row["facts"]),
            _n(row),
            *(_rate(row[each][:1]) for each in columns),
            *(_small(row[each][:1]) for each in _DAMAGE if each != "neighborhood_kl"),
            # Of several facts, MEMIT reads the values that it found for each alone.
            "" if row["name"] == "memit" and row["facts"] > 1 else f"{row['seconds'][0]:.2f}",
        ]
        for row in rows
    ]
    head = ["efficacy", "paraphrase", "NS", "kept", "neighbor KL", "text KL", "perplexity"]
    return table(["method", "facts", "n", *head, "s per fact"], shown)


def _experiments(findings: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "The records are the first ones of the file. ✓ and ✗ mark claims that hold and fail.\n"
        "[The paper's experiments](reproducing.md) has their thresholds.\n"
    ]
    for each in findings:
        minutes = each["seconds"] / 60
        lines += [
            f"**{each['title']}**: {each['verdict']} (`{each['name']}`, {each['records']} records, "
            f"{minutes:.0f} min).\n",
            *(
                f"- {_mark(check['holds'])} {check['claim'][:1].upper()}{check['claim'][1:]}: "
                f"{check['found']}"
                + (f" (exceptions: {check['exceptions']})" if check["exceptions"] else "")
                for check in each["checks"]
            ),
            "",
            *([_methods(each["methods"])] if each["methods"] else []),
        ]
    return "\n".join(lines)


def _methods(rows: Sequence[Sequence[Any]]) -> str:
    head = ["method", "efficacy", "paraphrase", "neighborhood", "perplexity", "s per edit"]
    shown = [
        [
            f"`{name}`",
            *(f"{rate:.0f}" for rate in rates),
            f"{perplexity:.3g}",
            "" if seconds is None else f"{seconds:.2f}",
        ]
        for name, *rates, perplexity, seconds in rows
    ]
    return table(head, shown)


def _about_models(found: Mapping[str, Any]) -> str:
    name, *others = found
    own = "".join(
        f", for the {other} model on its first {row['records']}"
        for other in others
        if (row := _find(found[other]["methods"], OWN)) is not None
    )
    text = (
        "Efficacy / paraphrase / neighborhood in percent, by the paper's definition: for "
        f"{name} on the records above{own}, and for GPT-2 xl as published, on 1,000."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False) + "\n"


def _models(found: Mapping[str, Any]) -> str:
    published = {
        _PUBLISHED_NAMES[row[0]]: row[1:4] for row in PUBLISHED if row[0] in _PUBLISHED_NAMES
    }
    names = dict.fromkeys(
        row["name"]
        for real in found.values()
        for row in real["methods"]
        if row["facts"] == 1 and row["run"] not in _ASIDE and row["name"] != NONE
    )
    rows = []
    for name in names:
        cells = [_three(_find(real["methods"], name)) for real in found.values()]
        own = published.get(name)
        cells.append("" if own is None else " / ".join(f"{value:.0f}" for value in own))
        rows.append([_named(name), *cells])
    return table(["method", *found, "GPT-2 xl (the paper)"], rows)


def _three(row: Row | None) -> str:
    if row is None:
        return ""
    values = [row[each][0] for each in ("efficacy", "paraphrase", "neighborhood")]
    return " / ".join("" if value is None else f"{value:.0f}" for value in values)
