"""The whitened shift, which is not in the paper: what whitening preserves, and where it fails."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Finding, by_layer, count_check, listed_values
from backward_lens_tl.views import figures

_MOST_RECORDS = 40
_PLAIN, _WHITENED, _CONTROL = "scale free", "whitened", "whitened, another layer's C"
_FORMS = [_PLAIN, _WHITENED, _CONTROL]
_MOST_DAMAGE = 75.0
_UNEDITED = 100.0
"""Percentage of the prompts that keep their most probable token without an edit."""

_SHOWN = ["method", "layer", "efficacy", "paraphrase", "neighborhood", "kept", "norm"]


def whitening(evidence: Evidence) -> Finding:
    """The shift of each layer with and without whitening, with the size that each fact needs."""
    shift = evidence.shift_preset("shift_whitened")
    if shift.moments is None:
        raise InputError("the preset of the whitened shift has no statistics for whitening")
    moments = shift.moments
    layers = [int(layer) for layer in moments.layers]
    methods = {
        f"{form}@{layer}": _method(shift, moments, form, layer)
        for layer in layers
        for form in _FORMS
    }
    found = evidence.evaluation(
        "whitening",
        methods,
        records=min(_MOST_RECORDS, evidence.n_prompts),
        generation_length=0,
        n_texts=0,
    )
    summary = found.summary().set_index("method")
    if summary["kept"].isna().any():
        raise InputError("the data have no neighborhood prompts to measure damage with")
    table = summary.drop(NONE).reset_index()
    names = table["method"].str.split("@", n=1, expand=True)
    table = table.assign(method=names[0], layer=names[1].astype(int))
    kept = by_layer(table, "kept", "method")[_FORMS]
    paraphrase = by_layer(table, "paraphrase", "method")[_FORMS]
    damage = (_UNEDITED - kept)[kept[_PLAIN] < _UNEDITED]
    prevented = 100 * (1 - damage[_WHITENED] / damage[_PLAIN])
    means = f"layers; {listed_values(kept.mean().items(), unit=' %')}"
    checks = [
        count_check(
            "with whitening, more neighborhood prompts keep their most probable token, in more "
            "than half of the layers",
            kept[_WHITENED] > kept[_PLAIN],
            means,
        ),
        count_check(
            f"it prevents at least {_MOST_DAMAGE:.0f} % of the damage, in more than half of the "
            "layers with any damage",
            prevented >= _MOST_DAMAGE,
            "layers"
            + "".join(f"; layer {layer}: {value:.0f} %" for layer, value in prevented.items()),
        ),
    ]
    if len(layers) > 1:
        checks.append(
            count_check(
                "with the statistics of another layer, fewer keep it, in more than half of the "
                "layers",
                kept[_WHITENED] > kept[_CONTROL],
                means,
            )
        )
    if paraphrase.notna().all(axis=None):
        checks.append(
            count_check(
                "it costs no paraphrases, in more than half of the layers",
                paraphrase[_WHITENED] >= paraphrase[_PLAIN],
                f"layers; {listed_values(paraphrase.mean().items(), unit=' %')}",
            )
        )
    return Finding(
        tuple(checks),
        {"by layer": table[_SHOWN]},
        {"whitening": partial(figures.edit_curves, table, "layer")},
        notes=(
            f"Number of records: {table['records'].max()}. Each fact gets the smallest multiple of "
            "a small size that makes its target the answer, so all forms edit equally well as far "
            f"as these multiples go: efficacy is at least {table['efficacy'].min():.1f} %.",
            "The layers are those that the presets have statistics of. The control uses C of the "
            "next one, and of the first one for the last.",
        ),
    )


def _method(
    shift: ForwardPassShift, moments: SecondMoments, form: str, layer: int
) -> ForwardPassShift:
    if form == _PLAIN:
        return replace(shift, layer=layer, key="plain", moments=None)
    if form == _CONTROL:
        moments = replace(moments, moments=(*moments.moments[1:], moments.moments[0]))
    return replace(shift, layer=layer, moments=moments)
