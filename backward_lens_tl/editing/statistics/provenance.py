"""Where statistics come from, and whether they belong to a given model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.errors import EditError, InputError
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.resumption import stopped_after
from backward_lens_tl.models.sites import MatrixName, MatrixSite

PROBE_TOKENS = 16
"""Maximum number of tokens of a probe prompt."""

_TOLERANCE = 0.1
"""Accepted relative difference of the activations there: edits change them by a few percent,
another model changes them completely."""


@dataclass(frozen=True, repr=False)
class ModelStatistics(Saved):
    """Base class of statistics of a model.

    Attributes:
        model: SHA-256 of the model's parameters.
        name: The model's name.
        prepend_bos: Whether prompts got a BOS token.
        probe: Token ids of a short prompt that identifies the model.
        probe_inputs: What the matrices of `check` read at its last position.
    """

    model: str
    name: str
    prepend_bos: bool | None
    probe: tuple[int, ...]
    probe_inputs: tuple[Float[Tensor, "d_in"], ...]

    def _check_model(
        self, host: Host, matrix: MatrixName, layers: Sequence[int], collect: str
    ) -> None:
        """Refuse a model that the statistics do not belong to.

        What matrices read in a short prompt identifies the model. It depends neither on
        TransformerLens's class nor, where the statistics do not, on its weight processing, and a
        few edits hardly change it.

        Args:
            host: The model.
            matrix: The matrix that reads `probe_inputs`.
            layers: Its layers.
            collect: The call that collects the statistics, for the message.

        Raises:
            EditError: If the inputs of the matrix differ, or the model lacks it.
        """
        try:
            found = last_inputs(host, find_editable(host, matrix, layers), self.probe)
        except InputError:  # the model has no such matrix, layer or token
            found = ()
        pairs = list(zip(self.probe_inputs, found, strict=False))
        if not pairs or not all(_is_alike(*pair) for pair in pairs):
            raise EditError(
                f"these statistics were collected with {self.name!r}, but {host.name!r} has "
                "other activations on the same prompt: it is another model, or its weights were "
                f"processed differently. Collect them again with {collect}"
            )


def last_inputs(
    host: Host, sites: Sequence[MatrixSite], probe: Sequence[int]
) -> tuple[Float[Tensor, "d_in"], ...]:
    """What each matrix reads at the last position of a prompt, in float32, on the CPU."""
    with stopped_after(host, max(site.layer for site in sites)):
        seen = forward_pass(host, pad_prompts(host, [probe]), inputs=sites)
    return tuple(inputs[0, -1].float().cpu() for inputs in seen.inputs)


def _is_alike(own: Float[Tensor, "d_in"], now: Float[Tensor, "_"]) -> bool:
    return own.shape == now.shape and float((own - now).norm()) <= _TOLERANCE * float(own.norm())
