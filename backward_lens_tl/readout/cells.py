"""One cell of the layers x tokens table, in words."""

from __future__ import annotations

from dataclasses import dataclass

from backward_lens_tl.models.sites import MatrixName


@dataclass(frozen=True)
class TokenScore:
    """A token of the vocabulary and the score that a projection gave it."""

    token: str
    token_id: int
    score: float


@dataclass(frozen=True)
class Cell:
    """One matrix, layer and prompt position, in words.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        position: Index in the prompt, from 0.
        token: The prompt's token there.
        top: Most promoted tokens, best first.
        bottom: Least promoted tokens, smallest score first.
        norm: `||delta_i||_2`.
        input_norm: `||x_i||_2`.
        target_rank: Tokens scored above the target; `None` without a target.
        is_zero: Whether the position adds nothing to this gradient. Then it has no words and no
            rank: they would be those of the final norm's bias.
        is_faint: Whether the projected vector is so short that the final norm's `eps` outweighs
            it, and its words lean towards those of the norm's bias.
    """

    matrix: MatrixName
    layer: int
    position: int
    token: str
    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    norm: float
    input_norm: float
    target_rank: int | None
    is_zero: bool
    is_faint: bool

    @property
    def target_leads(self) -> bool:
        """Whether the target is the most promoted token."""
        return self.target_rank == 0
