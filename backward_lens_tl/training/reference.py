"""The gradient of a reference prompt, with the weights that a watched step begins with.

A step of gradient descent changes the reference's loss by `-lr <G_step, G_reference>` to first
order, if both gradients are taken at the same weights. So the reference runs again in every watched
step, before the first forward pass of the step: in eval mode, without autocast, and with the
training's random numbers and `.grad` left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import is_token_id, listed, shown
from backward_lens_tl.capture.recorders import recording
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of_trained
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.training.recording import FactorRecorder, SharedInputs
from backward_lens_tl.training.step_gradient import WatchedGradient, step_gradient
from backward_lens_tl.training.step_memory import StepMemory
from backward_lens_tl.training.trained_matrices import TrainedMatrix
from backward_lens_tl.training.undisturbed import undisturbed

_SCALE = 2.0**10
"""Factor of the loss, against underflow in float16. Powers of two do not round."""


@dataclass(frozen=True)
class Reference:
    """A prompt and its target, as tokens.

    Attributes:
        prompt: Tokens of the prompt.
        target: Tokens that follow it.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Number of positions of the pass."""
        return len(self.prompt) + len(self.target)

    def gradients(
        self, model: nn.Module, matrices: Sequence[TrainedMatrix]
    ) -> Mapping[tuple[str, int], WatchedGradient]:
        """The gradients of `-log p(target | prompt)`, with the model's current weights.

        Args:
            model: The model.
            matrices: Its matrices.

        Returns:
            The gradients by matrix and layer; without those that depend on no trained parameter.
        """
        inputs = SharedInputs()
        recorders = [_OutputRecorder(each, StepMemory(None, 0), inputs) for each in matrices]
        with undisturbed(model), torch.enable_grad(), recording(recorders):
            loss = self._loss(model)
            outputs = {id(y): y for y in (each.output for each in recorders) if y is not None}
            if not outputs:
                return {}
            # With respect to outputs alone: no `.grad` is written.
            torch.autograd.grad(loss * _SCALE, list(outputs.values()), allow_unused=True)
            for each in recorders:
                each.output = None  # whose hook refers to the recorder
        return step_gradient(0, recorders, _SCALE).gradients

    def _loss(self, model: Any) -> Float[Tensor, ""]:
        device = next(model.parameters()).device
        tokens = torch.tensor([[*self.prompt, *self.target]], device=device)
        if host_of_trained(model) is None:
            logits = model(input_ids=tokens, use_cache=False).logits
        else:
            logits = model(tokens, return_type="logits")
        target = tokens[0, len(self.prompt) :]
        predicting = logits[0, len(self.prompt) - 1 : -1]
        loss: Tensor = torch.nn.functional.cross_entropy(
            at_least_float32(predicting), target.to(predicting.device), reduction="sum"
        )
        return loss


class _OutputRecorder(FactorRecorder):
    """Keeps the output of a matrix too, to differentiate with respect to it alone."""

    output: Tensor | None = None

    @property
    def is_paused(self) -> bool:
        """Never: its hooks are on the model in the reference's own pass only."""
        return False

    def _keep_output(self, y: Tensor) -> None:
        super()._keep_output(y)
        if y.requires_grad:
            self.output = y


def reference_of(model: Any, reference: object, tokenizer: Any) -> Reference:
    """Tokenize a reference prompt.

    Args:
        model: The model that is trained.
        reference: A prompt and its target, each a text or token ids.
        tokenizer: The tokenizer of a transformers model.

    Returns:
        The reference.

    Raises:
        InputError: If it is not a prompt and a target, is longer than the model's context, or is
            text and there is no tokenizer.
        TargetError: If the target does not continue the prompt.
    """
    if not isinstance(reference, tuple | list) or len(reference) != 2:
        raise InputError(
            f"reference is {shown(reference)}; pass a prompt and its target, such as "
            "('The capital of France is', ' Paris')"
        )
    prompt, target = reference
    host = host_of_trained(model)
    tokenizer = tokenizer if host is None else host.tokenizer
    if tokenizer is None and (isinstance(prompt, str) or isinstance(target, str)):
        raise InputError(
            f"reference {shown(reference)} is text, but there is no tokenizer; pass watch(..., "
            "tokenizer=tokenizer), or token ids"
        )
    embedding: Any = model.get_input_embeddings().weight if host is None else host.model.W_E
    vocabulary = Vocabulary(tokenizer, len(embedding))
    ids = _prompt_ids(prompt, host, tokenizer) if isinstance(prompt, str) else prompt
    after = prompt if isinstance(prompt, str) else None
    following = vocabulary.encode(target, after) if isinstance(target, str) else target
    found = Reference(*(_checked_ids(each, len(embedding)) for each in (ids, following)))
    context = _context(model, host)
    if context is not None and found.n_tokens > context:
        raise InputError(
            f"the reference's prompt has {len(found.prompt)} tokens and its target "
            f"{len(found.target)}, and the model's context holds {context}; shorten the prompt"
        )
    return found


def _context(model: Any, host: Host | None) -> int | None:
    """Number of positions that a model accepts; `None` if its config does not say."""
    if host is not None:
        return host.n_ctx
    config = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _prompt_ids(prompt: str, host: Host | None, tokenizer: Any) -> list[int]:
    """Tokens of a prompt with those that the tokenizer puts in front, but none after it."""
    if host is not None:
        return host.tokenize(prompt, None)
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(prompt)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    raise InputError(
        f"the tokenizer changes the tokens of {prompt!r} when it adds its special tokens; pass "
        "token ids as the reference's prompt"
    )


def _checked_ids(ids: object, size: int) -> tuple[int, ...]:
    found = tuple(listed(ids))
    if not found or not all(is_token_id(each) and index(each) < size for each in found):
        raise InputError(
            f"the tokens of the reference are {shown(ids)}; pass a text, or ids from 0 to "
            f"{size - 1}"
        )
    return tuple(index(each) for each in found)
