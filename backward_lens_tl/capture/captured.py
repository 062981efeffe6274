"""What a capture holds, and how to find one gradient in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.capture.coverage import Coverage
from backward_lens_tl.capture.hook_points import AttentionGradient, HookPointGradient
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.matrix_selection import resolve_layer
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName


@dataclass(frozen=True, repr=False)
class Captured:
    """The gradients of several weight matrices, and their prompts; see `GradientCapture`."""

    gradients: Mapping[tuple[str, int], MatrixGradient]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    str_tokens: tuple[tuple[str, ...], ...]
    loss: Float[Tensor, "batch"]
    targets: Int[Tensor, "batch pos"] | None
    target_texts: tuple[str, ...] | None
    predictions: Predictions
    prompt_lengths: Int[Tensor, "batch"]
    n_layers: int
    objective: str
    model_name: str
    coverage: Coverage = field(default_factory=Coverage)
    hook_gradients: Mapping[str, HookPointGradient] = field(default_factory=dict)
    attention: Mapping[int, AttentionGradient] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    turns: tuple[tuple[str, ...], ...] = ()

    def __getitem__(self, key: tuple[str, int]) -> MatrixGradient:
        if isinstance(key, tuple) and len(key) == 2:
            found = self.gradients.get((str(key[0]), resolve_layer(key[1], self.n_layers)))
            if found is not None:
                return found
        raise InputError(
            f"{key!r} was not captured; available: {', '.join(self.matrices)} in layers "
            f"{', '.join(map(str, self.layers))}"
        )

    def __iter__(self) -> Iterator[MatrixGradient]:
        return iter(self.gradients.values())

    def __len__(self) -> int:
        return len(self.gradients)

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the captured matrices, in the order in which a layer uses them."""
        return tuple(dict.fromkeys(gradient.matrix for gradient in self))

    @property
    def layers(self) -> tuple[int, ...]:
        """The captured layers, ascending."""
        return tuple(dict.fromkeys(gradient.layer for gradient in self))

    @property
    def answers(self) -> Int[Tensor, "batch"]:
        """The model's own most probable token after each prompt, before any update."""
        return self.predictions.answers

    @property
    def top_vjps(self) -> Float[Tensor, "batch d_model"] | None:
        """The VJP of the last layer at each prompt's last token, the origin of all other VJPs.

        Without the final norm it is the sum of token embeddings of lemma 5.1. It is the VJP of
        `W_out` where its output is added to the residual stream; `None` if `W_out` of the model's
        last layer was not captured.
        """
        top = self.gradients.get(("W_out", self.n_layers - 1))
        if top is None:
            return None
        prompts = torch.arange(len(self.mask), device=self.mask.device)
        return at_least_float32(top.resid_vjps[prompts, self.mask.sum(1) - 1])

    def prompt(self, batch: int) -> str:
        """Text of a prompt, or its tokens' joined texts if the text was not kept.

        Args:
            batch: Which prompt.

        Returns:
            The text.

        Examples:
            >>> capture.prompt(0)
            'Lionel Messi plays for'
        """
        return self.prompts[batch] if self.prompts else "".join(self.str_tokens[batch])

    def layer_number(self, layer: int) -> int:
        """The number of a captured layer in the model.

        Args:
            layer: The layer, negative from the end of the model.

        Returns:
            Its number, from 0.

        Raises:
            InputError: If it was not captured.

        Examples:
            >>> capture.layer_number(-1)
            7
        """
        number = resolve_layer(layer, self.n_layers)
        if number not in self.layers:
            raise InputError(
                f"layer {layer} was not captured; available: {', '.join(map(str, self.layers))}"
            )
        return number
