"""What all methods of editing have in common: settings in, requests in, a delta out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from backward_lens_tl._checks import check_choice
from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta
from backward_lens_tl.editing.requests import (
    EditRequest,
    TokenizedRequest,
    listed_requests,
    tokenize_request,
)
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.models import Host, host_of


class EditMethod(ABC):
    """A method of editing with its settings: call it with a model and what it is to be taught.

    Subclasses are frozen dataclasses with a field `prepend_bos`, which says whether prompts get a
    BOS token; `None` is the model's own default.

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

    prepend_bos: bool | None

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def __call__(
        self, model: nn.Module, requests: EditRequest | Sequence[EditRequest]
    ) -> WeightDelta:
        """Compute an edit; the model is as before when this returns or raises.

        Args:
            model: A `HookedTransformer` or `TransformerBridge`.
            requests: What it is to be taught, one fact or several at once.

        Returns:
            The edit.

        Raises:
            EditError: If a request or a setting does not fit the model.
            UnsupportedModelError: If the model has a structure that the method cannot edit.
        """
        host = host_of(model)
        check_choice("prepend_bos", self.prepend_bos, (True, False, None), EditError)
        asked = listed_requests(requests)
        tokenized = [tokenize_request(host, request, self.prepend_bos) for request in asked]
        with torch.no_grad(), host.own_precision(), raised_as(EditError):
            matrices = self.compute(host, tokenized)
        return WeightDelta(tuple(matrices), {**self.settings(), "model": host.name})

    @abstractmethod
    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """What is added to each matrix.

        Autograd is off; a method that needs it switches it on itself.

        Args:
            host: The model.
            requests: What it is to be taught, at least one.

        Returns:
            The changes, each matrix once, in the order of a forward pass.

        Examples:
            >>> from backward_lens_tl.editing.requests import tokenize_request
            >>> from backward_lens_tl.models import host_of
            >>> host = host_of(model)
            >>> shift = blt.editing.ForwardPassShift(layer=5, size=4.0, form="scale_free")
            >>> shift.compute(host, [tokenize_request(host, request, None)])
            [MatrixDelta(W_out of layer 5, [512, 128], rank <= 1)]
        """

    def settings(self) -> dict[str, Any]:
        """The method's name and all its settings, as JSON holds them.

        Returns:
            The settings; statistics and networks by their fingerprint.

        Examples:
            >>> blt.editing.GradientStep("sgd", lr=1.0, layers=6).settings()
            {'method': 'GradientStep', 'optimizer': 'sgd', 'lr': 1.0, 'matrices': ['W_out'],
            'layers': 6, 'prepend_bos': None}
        """
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(cast(Any, self))}
        return {"method": self.name, **own}


def _plain(value: object) -> Any:
    """A setting as JSON holds it; statistics and networks by their fingerprint."""
    if isinstance(value, EditMethod):
        return value.settings()
    if hasattr(value, "fingerprint"):
        return value.fingerprint
    return list(value) if isinstance(value, tuple) else value
