"""The layer of a shift whose caller names none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edit_pairs import EITHER, pair

import backward_lens_tl as blt
from backward_lens_tl.editing import EditRequest, ForwardPassShift
from backward_lens_tl.editing.shift import layers
from backward_lens_tl.editing.shift.layers import usual_layer
from backward_lens_tl.errors import EditError
from backward_lens_tl.jacobians.loading import load_jacobians
from backward_lens_tl.models import host_of
from backward_lens_tl.models.sites import MatrixSite

REQUEST = EditRequest("Lionel Messi plays for", " Paris", subject="Lionel Messi")


def chosen(
    monkeypatch: pytest.MonkeyPatch, n_layers: int, single: Any = None, fitted: Any = None
) -> int:
    """The layer of a model whose `W_out` is one matrix in some layers, with some Jacobians."""
    found = [
        MatrixSite.__new__(MatrixSite) if single is None or layer in single else SimpleNamespace()
        for layer in range(n_layers)
    ]
    for layer, site in enumerate(found):
        site.__dict__["layer"] = layer
    monkeypatch.setattr(layers, "find_sites", lambda *_: found)
    jacobians: Any = None if fitted is None else SimpleNamespace(layers=fitted)
    host: Any = SimpleNamespace(n_layers=n_layers)
    return usual_layer(host, jacobians)


@pytest.mark.usefixtures("as_for_a_user")
def test_it_is_at_four_fifths_of_the_depth_and_not_the_last(monkeypatch: Any) -> None:
    expected = {1: 0, 2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 8: 6, 12: 10, 24: 19, 30: 24, 48: 38}
    assert {n: chosen(monkeypatch, n) for n in expected} == expected


@pytest.mark.usefixtures("as_for_a_user")
def test_it_is_one_that_can_be_edited_and_has_a_jacobian(monkeypatch: Any) -> None:
    assert chosen(monkeypatch, 30, single=range(12)) == 11
    assert chosen(monkeypatch, 30, single=[20, 29]) == 20
    assert chosen(monkeypatch, 30, single=[29]) == 29
    assert chosen(monkeypatch, 30, fitted=[3, 15, 21, 28]) == 21
    # What there is instead is said by the error about the layer.
    assert chosen(monkeypatch, 30, single=[]) == 24


def test_a_shift_without_settings_edits_there(facts_model: Any) -> None:
    delta = ForwardPassShift()(facts_model, REQUEST)
    assert [(each.matrix, each.layer) for each in delta] == [("W_out", 6)]
    [outcome] = delta.outcomes
    assert (outcome.is_reached, outcome.rank) == (True, 0)
    same = ForwardPassShift(layer=6, size="auto", value="embedding", key="contrast")
    assert torch.equal(delta["W_out", 6].dense(), same(facts_model, REQUEST)["W_out", 6].dense())
    with delta.applied(facts_model):
        assert blt.backward_lens(facts_model, REQUEST.prompt).target() == " Paris"


def test_a_lens_on_some_layers(facts_model: Any) -> None:
    every = load_jacobians("facts")
    some = replace(every, matrices={layer: every.matrices[layer] for layer in (2, 4)})
    [matrix] = ForwardPassShift(jacobian=some)(facts_model, REQUEST)
    assert matrix.layer == 4
    with pytest.raises(EditError, match="matrices for layers 2, 4, not for layer 6"):
        ForwardPassShift(jacobian=some, layer=6)(facts_model, REQUEST)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_models_of_other_families(family: str) -> None:
    own = pair(family, EITHER)
    host = host_of(own.model)
    [matrix] = ForwardPassShift(prepend_bos=False)(own.model, EditRequest("Rome is in", 40, "Rome"))
    assert matrix.layer == max(0, min(host.n_layers - 2, round(0.8 * host.n_layers)))
