"""What the positions of a result should say, and what the model says: targets and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from backward_lens_tl._checks import check_index
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.readout.readout import Reading


@dataclass(frozen=True)
class Prediction:
    """What the model predicts after one prompt, before any update.

    Attributes:
        answer: The model's most probable token.
        answer_prob: Its probability.
        target: The target, or the whole answer of `sequence_nll`; `None` without a target.
        target_prob: Its probability, of all its tokens.
        target_rank: Number of tokens that are more probable than its first token.
    """

    answer: str
    answer_prob: float
    target: str | None
    target_prob: float | None
    target_rank: int | None


@dataclass(frozen=True, repr=False)
class LensTargets:
    """Targets and predictions of a result; the base of `LensReadouts`.

    `BackwardLensResult` explains the fields.
    """

    capture: GradientCapture
    readings: tuple[Reading, ...]
    positions: Int[Tensor, "batch pos"]
    token_texts: Mapping[int, str]

    def target(self, batch: int = 0) -> str | None:
        """Text of what the objective wants after a prompt: a token, or the answer of several.

        Args:
            batch: Which prompt.

        Returns:
            The text; `None` for `next_token_loss`, which has a target at every position, and for a
            caller's own loss, unless a target was given in addition.

        Raises:
            InputError: If there is no such prompt.

        Examples:
            >>> result.target()
            ' Paris'
        """
        self._check_prompt(batch)
        texts = self.capture.target_texts
        return None if texts is None else texts[batch]

    def position_targets(self, batch: int = 0) -> tuple[str | None, ...]:
        """Text of the token that each analysed position should say.

        Args:
            batch: Which prompt.

        Returns:
            One text per position, in the order of `positions` and without padding; `None` where
            there is no target.

        Raises:
            InputError: If there is no such prompt.

        Examples:
            >>> answer = blt.sequence_nll(" in the garden")
            >>> said = blt.backward_lens(model, "The cat is", objective=answer)
            >>> said.capture.str_tokens[0]
            ('<|endoftext|>', 'The', ' cat', ' is', ' in', ' the')
            >>> said.position_targets()
            (' in', ' in', ' in', ' in', ' the', ' garden')
        """
        self._check_prompt(batch)
        places = [place for place in self.positions[batch].tolist() if place >= 0]
        if self.capture.targets is None:
            return (None,) * len(places)
        targets = self.capture.targets[batch].tolist()
        return tuple(self.token_texts.get(targets[place]) for place in places)

    @property
    def has_position_targets(self) -> bool:
        """Whether targets differ between the positions of a prompt."""
        targets, mask = self.capture.targets, self.capture.mask
        return targets is not None and bool(((targets != targets[:, :1]) & mask).any())

    def prediction(self, batch: int = 0) -> Prediction:
        """What the model predicts after a prompt, before any update.

        Args:
            batch: Which prompt.

        Returns:
            The model's own answer, the target, and their probabilities at the prompt's last token.

        Raises:
            InputError: If there is no such prompt.

        Examples:
            >>> seen = result.prediction()
            >>> seen.answer, f"{seen.answer_prob:.3f}"
            (' Miami', '0.997')
            >>> seen.target, f"{seen.target_prob:.1e}", seen.target_rank
            (' Paris', '6.0e-07', 96)
        """
        target, found = self.target(batch), self.capture.predictions
        answer = self.token_texts[int(found.answers[batch])]
        answer_prob = float(found.answer_probs[batch])
        if target is None:
            return Prediction(answer, answer_prob, None, None, None)
        target_prob, target_rank = found.target_probs[batch], found.target_ranks[batch]
        return Prediction(answer, answer_prob, target, float(target_prob), int(target_rank))

    def _check_prompt(self, batch: int) -> None:
        check_index("prompt", batch, len(self.positions))
