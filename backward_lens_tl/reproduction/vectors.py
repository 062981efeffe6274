"""`W_out`'s VJPs of many prompts as tensors, which the explanations read in other ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl.capture import predictions
from backward_lens_tl.capture.first_order import AddedVector, first_order_changes
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.readout.projections import Projection


@dataclass(frozen=True, eq=False)
class PromptVjps:
    """The VJPs of `W_out` of one prompt in every layer.

    Attributes:
        tokens: Token ids of the prompt.
        target: Id of the target.
        vjps: `delta_i`, with the sign of the raw gradient.
        stream: The residual stream after each layer at the last token.
        has_norm_after: Whether a norm changes the output of `W_out` before it joins the stream.
    """

    tokens: tuple[int, ...]
    target: int
    vjps: Float[Tensor, "layer pos d_model"]
    stream: Float[Tensor, "layer d_model"]
    has_norm_after: bool = False

    @property
    def updates(self) -> Float[Tensor, "layer d_model"]:
        """What an update adds at the last token, `-delta_n`."""
        return -self.vjps[:, -1]


def prompt_vjps(
    model: nn.Module, texts: Iterable[str], targets: Iterable[int], prepend_bos: bool | None
) -> list[PromptVjps]:
    """Capture the VJPs of `W_out`, one prompt at a time.

    Args:
        model: The model.
        texts: The prompts.
        targets: Id of each prompt's target.
        prepend_bos: As in `backward_lens`.

    Returns:
        One entry per prompt.
    """
    found = []
    for text, target in zip(texts, targets, strict=True):
        capture = capture_gradients(
            model,
            text,
            target_nll(int(target)),
            matrices="W_out",
            prepend_bos=prepend_bos,
            hook_points=lambda name: name.endswith(".hook_resid_post"),
        )
        layers = range(capture.n_layers)
        found.append(
            PromptVjps(
                tokens=tuple(capture.tokens[0].tolist()),
                target=int(target),
                vjps=torch.stack([capture["W_out", layer].vjps[0] for layer in layers]),
                stream=torch.stack(
                    [
                        capture.hook_gradients[f"blocks.{layer}.hook_resid_post"].value[0, -1]
                        for layer in layers
                    ]
                ),
                has_norm_after=any(
                    capture["W_out", layer].joined_vjps is not None for layer in layers
                ),
            )
        )
    return found


def carried(
    host: Host, prompt: PromptVjps, vectors: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Add a vector to the output of each layer's `W_out`, and compute the last residual stream.

    Args:
        host: The model.
        prompt: The prompt whose forward pass carries the vectors, at its last token.
        vectors: One vector per layer. Each is scaled to the stream's length where it is added.

    Returns:
        The change of the last residual stream at the last token to first order, one row per layer.
        Only directions matter to a reading.
    """
    lengths = prompt.stream.norm(dim=-1, keepdim=True)
    scaled = lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    last = len(prompt.tokens) - 1
    added = [
        AddedVector(site, 0, last, last, vector)
        for site, vector in zip(find_editable(host, "W_out", None), scaled, strict=True)
    ]
    found = torch.zeros_like(scaled)
    for changes in first_order_changes(host, pad_prompts(host, [prompt.tokens]), added, Memory()):
        found[list(changes.indices)] = changes.stream
    return found


def target_ranks(
    scores: Float[Tensor, "prompt d_vocab"], prompts: Sequence[PromptVjps]
) -> Int[Tensor, "prompt"]:
    """The number of tokens with a larger score than each prompt's target."""
    targets = torch.tensor([each.target for each in prompts], device=scores.device)
    return predictions.target_ranks(scores, targets)


@torch.no_grad()
def ranks_by_layer(
    lens: Projection,
    vectors: Float[Tensor, "prompt layer d_model"],
    prompts: Sequence[PromptVjps],
    *,
    is_centred: bool = False,
) -> Int[Tensor, "prompt layer"]:
    """Rank each prompt's target in a vector per layer.

    Args:
        lens: Reads the vectors.
        vectors: The vectors.
        prompts: Their prompts.
        is_centred: Whether the mean of the other prompts' scores is subtracted first.

    Returns:
        The number of tokens with a larger score.
    """
    columns = []
    for layer in range(vectors.shape[1]):
        scores = lens.project(vectors[:, layer], layer)
        if is_centred:
            scores = scores - mean_of_others(scores)
        columns.append(target_ranks(scores, prompts))
    return torch.stack(columns, dim=1)


def mean_of_others(scores: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "prompt *rest"]:
    """The mean over all other prompts."""
    return (scores.sum(0) - scores) / (len(scores) - 1)
