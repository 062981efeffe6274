"""The base class of editing methods, which turn requests into a weight delta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import nn

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.outcomes import EditReport
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_requests
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.settings import Checked


def _check_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or len(set(layers)) < len(layers):
        raise ValueError("pass at least one layer, without repeats")
    return layers


UNRECORDED: Mapping[str, bool] = {"recorded": False}
"""Metadata of a field that does not change the edit and is not among `settings()`."""

Layers = Annotated[Sequence[int], AfterValidator(_check_layers)]
"""Layers of a model in any order, at least one and each once."""


@dataclass(frozen=True, kw_only=True)
class EditMethod(Checked, ABC):
    """An editing method with its settings: call it with a model and the facts to teach.

    Subclasses are frozen dataclasses. Their fields are checked against
    their annotations.

    Attributes:
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.editing import EditMethod, EditRequest, FineTuning, GradientStep
        >>> model = blt.load_facts_model()
        >>> request = EditRequest("Lionel Messi plays for", " Paris")
        >>> methods = [FineTuning(layers=6, lr=5e-3), GradientStep("sgd", lr=1.0, layers=6)]
        >>> isinstance(methods[0], EditMethod)
        True
        >>> {method.name: method(model, request).rank for method in methods}
        {'FineTuning': 128, 'GradientStep': 6}
    """

    ERROR = EditError

    prepend_bos: bool | None = None

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return type(self).__name__

    def __call__(
        self, model: nn.Module, requests: EditRequest | Sequence[EditRequest]
    ) -> WeightDelta:
        """Compute an edit; the model does not change.

        Args:
            model: A `HookedTransformer` or `TransformerBridge`.
            requests: One fact, or several that are taught together.

        Returns:
            The edit.

        Raises:
            EditError: If a request or a setting does not fit the model.
            UnsupportedModelError: If the model has a structure that the method cannot edit.
        """
        host = host_of(model)
        tokenized = tokenize_requests(host, requests, self.prepend_bos)
        with torch.no_grad(), host.own_precision(), raised_as(EditError):
            matrices, report = self.reported(host, tokenized)
        found = {} if report is None else report.to_about()
        return WeightDelta(tuple(matrices), {**self.settings(), "model": host.name, **found})

    @abstractmethod
    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute what is added to each matrix.

        Autograd is off; a method that needs it turns it on.

        Args:
            host: The model.
            requests: The facts, at least one.

        Returns:
            The changes, each matrix once, in the order of a forward pass.

        Examples:
            >>> from backward_lens_tl.editing.requests import tokenize_requests
            >>> from backward_lens_tl.models import host_of
            >>> host = host_of(model)
            >>> shift = blt.editing.ForwardPassShift(layer=5, size=4.0, key="plain")
            >>> shift.compute(host, tokenize_requests(host, request, None))
            [MatrixDelta(W_out of layer 5, [512, 128], rank <= 1)]
        """

    def reported(
        self, host: Host, requests: Sequence[TokenizedRequest]
    ) -> tuple[Sequence[MatrixDelta], EditReport | None]:
        """Compute an edit as `compute` does, with what the method found out about it.

        Args:
            host: The model.
            requests: The facts, at least one.

        Returns:
            The changes, and the report of methods that check their edits.

        Examples:
            >>> from backward_lens_tl.editing.requests import tokenize_requests
            >>> from backward_lens_tl.models import host_of
            >>> host = host_of(model)
            >>> step = blt.editing.GradientStep("sgd", lr=1.0, layers=6)
            >>> changes, report = step.reported(host, tokenize_requests(host, request, None))
            >>> report is None  # a gradient step does not check whether its target leads
            True
        """
        return self.compute(host, requests), None

    def settings(self) -> dict[str, Any]:
        """Return the method's name and settings as JSON values.

        Returns:
            The settings; statistics and networks by their fingerprint.

        Examples:
            >>> blt.editing.GradientStep("sgd", lr=1.0, layers=6).settings()
            {'method': 'GradientStep', 'prepend_bos': None, 'optimizer': 'sgd', 'lr': 1.0,
            'matrices': ['W_out'], 'layers': [6]}
        """
        own = {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.metadata.get("recorded", True)
        }
        return {"method": self.name, **own}


def _plain(value: object) -> Any:
    if isinstance(value, EditMethod):
        return value.settings()
    if hasattr(value, "fingerprint"):
        return value.fingerprint
    if isinstance(value, Jacobians):
        return value.provenance
    return list(value) if isinstance(value, tuple) else value
