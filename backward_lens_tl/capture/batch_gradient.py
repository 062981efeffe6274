"""The gradient of a whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl.capture.captured import Captured
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.models.sites import MatrixName


@dataclass(frozen=True, repr=False)
class BatchGradient:
    """The gradients of the summed loss of a batch, as factors.

    `total["W_out", 5]` is one of them, a `MatrixGradient` with one prompt, whose positions are
    those of all prompts without padding; see `MatrixGradient.total`. Iteration is in model order.
    Each one is a copy of the prompts' factors, which is made when it is requested.

    Attributes:
        capture: The gradients of the single prompts.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
        >>> total = blt.capture_gradients(model, prompts, blt.target_nll(" Paris")).total()
        >>> total["W_out", 6]
        MatrixGradient(W_out of layer 6, x [1, 12, 512], delta [1, 12, 128])
        >>> total.prompts.tolist()
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    """

    capture: Captured

    def __getitem__(self, key: tuple[str, int]) -> MatrixGradient:
        return self.capture[key].total()

    def __iter__(self) -> Iterator[MatrixGradient]:
        return (gradient.total() for gradient in self.capture)

    def __len__(self) -> int:
        return len(self.capture)

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the captured matrices, in the order in which a layer uses them."""
        return self.capture.matrices

    @property
    def layers(self) -> tuple[int, ...]:
        """The captured layers, ascending."""
        return self.capture.layers

    @property
    def prompts(self) -> Int[Tensor, "n"]:
        """The prompt that each position belongs to."""
        return self.capture.mask.nonzero()[:, 0]

    @property
    def positions(self) -> Int[Tensor, "n"]:
        """The place of each position in its prompt."""
        return self.capture.mask.nonzero()[:, 1]

    def __repr__(self) -> str:
        return (
            f"BatchGradient({', '.join(self.matrices)} of layers {self.layers[0]} to "
            f"{self.layers[-1]}, {len(self.prompts)} positions of {len(self.capture.mask)} prompts)"
        )
