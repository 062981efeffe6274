"""The whitened shift, which nobody has published: what whitening saves, and where it fails."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_RECORDS = 40
_PLAIN, _WHITENED, _CONTROL = "scale free", "whitened", "whitened, another layer's C"
_FORMS = (_PLAIN, _WHITENED, _CONTROL)
_NEARLY_ALL = 75.0


def whitening(evidence: Evidence) -> Finding:
    """Each layer's shift, whitened or not, with the size that each fact needs."""
    whitened = evidence.shift_preset("shift_whitened")
    moments = whitened.moments
    if moments is None:
        raise InputError("the preset of the whitened shift has no statistics to whiten with")
    methods = {
        f"{form}@{layer}": _shift(whitened, moments, form, layer)
        for layer in range(evidence.n_layers)
        for form in _FORMS
    }
    found = evidence.evaluation(
        "whitening",
        methods,
        records=min(_MOST_RECORDS, evidence.prompts_asked),
        generation_length=0,
        n_texts=0,
    )
    table = found.summary()
    unedited = float(table.loc[table["method"] == NONE, "neighborhood"].iloc[0])
    table = table[table["method"] != NONE].reset_index(drop=True)
    names = table["method"].str.split("@", n=1, expand=True)
    table = table.assign(method=names[0], layer=names[1].astype(int))
    columns = ["method", "layer", "efficacy", "paraphrase", "neighborhood", "norm"]
    if table["neighborhood"].isna().any():
        raise InputError("the data have no neighborhood prompts, which damage is measured on")
    checks = [_saves(table), _nearly_all(table, unedited)]
    if evidence.n_layers > 1:
        checks.append(_controlled(table))
    if table["paraphrase"].notna().all():
        checks.append(_costs(table))
    records = int(table["records"].max())
    return Finding(
        tuple(checks),
        {"by layer": table[columns]},
        {"whitening": partial(figures.edit_curves, table, "layer")},
        notes=(
            f"Of {records} record{'' if records == 1 else 's'}. Each fact gets the least multiple "
            "of a small size that makes its target the answer, so that all forms edit equally well "
            f"as far as these multiples go: efficacy is {table['efficacy'].min():.1f} % at least.",
            "The control takes C of the layer above, or of the first for the last one.",
        ),
    )


def _shift(
    base: ForwardPassShift, moments: SecondMoments, form: str, layer: int
) -> ForwardPassShift:
    if form == _PLAIN:
        return replace(base, layer=layer, form="scale_free", moments=None)
    own = moments if form == _WHITENED else _of_other_layers(moments)
    return replace(base, layer=layer, moments=own)


def _of_other_layers(moments: SecondMoments) -> SecondMoments:
    """The same statistics, each under the number of the layer below."""
    turned = (*moments.moments[1:], moments.moments[0])
    return replace(moments, moments=turned)


def _by_layer(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per layer, a column per form."""
    return table.pivot(index="layer", columns="method", values=column)


def _saves(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "neighborhood")
    more = int((own[_WHITENED] > own[_PLAIN]).sum())
    return Check(
        "whitening leaves more neighbors alone, in more than half of the layers",
        more > len(own) / 2,
        f"in {part(more, len(own))} layers; {_means(own)}",
    )


def _nearly_all(table: pd.DataFrame, unedited: float) -> Check:
    own = unedited - _by_layer(table, "neighborhood")
    own = own[own[_PLAIN] > 0]
    saved = 100 * (1 - own[_WHITENED] / own[_PLAIN])
    return Check(
        f"it removes nearly all damage, at least {_NEARLY_ALL:.0f} % in more than half of the "
        "layers in which there is any",
        int((saved >= _NEARLY_ALL).sum()) > len(own) / 2,
        "; ".join(f"layer {layer}: {value:.0f} %" for layer, value in saved.items())
        or "no layer has any",
    )


def _controlled(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "neighborhood")
    more = int((own[_WHITENED] > own[_CONTROL]).sum())
    return Check(
        "with the statistics of another layer less is saved, in more than half of the layers",
        more > len(own) / 2,
        f"in {part(more, len(own))} layers; {_means(own)}",
    )


def _costs(table: pd.DataFrame) -> Check:
    own = _by_layer(table, "paraphrase")
    more = int((own[_WHITENED] >= own[_PLAIN]).sum())
    return Check(
        "it costs no paraphrases, in more than half of the layers",
        more > len(own) / 2,
        f"in {part(more, len(own))} layers; {_means(own)}",
    )


def _means(table: pd.DataFrame) -> str:
    return ", ".join(f"{form} {table[form].mean():.1f} %" for form in _FORMS)
