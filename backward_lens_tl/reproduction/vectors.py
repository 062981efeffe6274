"""`W_out`'s VJPs of many prompts as tensors, which the explanations read in other ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl.capture import predictions
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.interventions import adding_at
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import HookPointSite

_STEP = 0.01
"""Length of an added vector as a fraction of the stream's: small, but far above rounding."""


@dataclass(frozen=True, eq=False)
class PromptVjps:
    """The VJPs of `W_out` of one prompt in every layer.

    Attributes:
        tokens: Token ids of the prompt.
        target: Id of the target.
        vjps: `delta_i`, with the sign of the raw gradient.
        stream: The residual stream after each layer at the last token.
    """

    tokens: tuple[int, ...]
    target: int
    vjps: Float[Tensor, "layer pos d_model"]
    stream: Float[Tensor, "layer d_model"]

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
            )
        )
    return found


def carried(
    host: Host, prompt: PromptVjps, vectors: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Add a vector to the output of each layer's `W_out`, and measure the last residual stream.

    This is the product of the vector with the Jacobian of the later layers, as a finite difference:
    each vector is scaled to 1 % of the stream's length where it is added.

    Args:
        host: The model.
        prompt: The prompt whose forward pass carries the vectors, at its last token.
        vectors: One vector per layer.

    Returns:
        The change of the last residual stream at the last token, one row per layer. Only directions
        matter to a reading.
    """
    n_layers = len(vectors)
    batch = pad_prompts(host, [prompt.tokens] * (n_layers + 1))  # the last row stays unchanged
    last = [len(prompt.tokens) - 1] * (n_layers + 1)
    lengths = _STEP * prompt.stream.norm(dim=-1, keepdim=True)
    steps = lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    final = HookPointSite("the last residual stream", host.unembedding.input, _as_it_is)
    with ExitStack() as hooks:
        for layer, site in enumerate(find_editable(host, "W_out", None)):
            added = torch.zeros(n_layers + 1, steps.shape[-1], device=batch.tokens.device)
            added[layer] = steps[layer]
            hooks.enter_context(adding_at(site.output, batch, last, added))
        seen = forward_pass(host, batch, points=[final])
    stream = seen.points[0][:, -1]
    return stream[:-1] - stream[-1]


def target_ranks(
    scores: Float[Tensor, "prompt d_vocab"], prompts: Sequence[PromptVjps]
) -> Int[Tensor, "prompt"]:
    """The number of tokens with a larger score than each prompt's target."""
    targets = torch.tensor([each.target for each in prompts], device=scores.device)
    return predictions.target_ranks(scores, targets)


def mean_of_others(scores: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "prompt *rest"]:
    """The mean over all other prompts."""
    return (scores.sum(0) - scores) / (len(scores) - 1)


def _as_it_is(values: Tensor) -> Tensor:
    return values
