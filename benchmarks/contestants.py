"""The contestants: ours, TransformerLens's own tool, the authors' way, and the floor.

All project the gradients of `W_in` and `W_out` in every layer for `-log p(target)` after each
prompt: they apply the final norm and the unembedding to the `x_i` of `W_in` and the `delta_i` of
`W_out`, and compute the top 10, the bottom 10 and the target's rank. Contestants take a model and a
question. The floor computes the scores only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl import (
    BackwardLensResult,
    GradientCapture,
    JacobianProjection,
    VectorReadout,
    backward_lens,
    jacobian_lens,
    read_vectors,
    target_nll,
)
from backward_lens_tl import capture_gradients as capture_factors
from backward_lens_tl.jacobians.average import Jacobians
from benchmarks.sizes import Question, Size

Contestant = Callable[[Any, Question], object]

K = 10
"""Number of top and bottom tokens, the default of all contestants."""

MATRICES = ("W_in", "W_out")
"""The matrices that all contestants project, also in gated models."""

PIECE_BYTES = 2 * 2**30
"""Memory for the scores of one piece of the floor's product."""


# ------------------------------------------------------------------------------------------- ours


def lens(model: Any, question: Question) -> BackwardLensResult:
    """This package with the Logit Lens, on token ids."""
    return backward_lens(
        model, question.ids, question.target, matrices=MATRICES, projection="logit_lens"
    )


def both_lenses(model: Any, question: Question) -> BackwardLensResult:
    """This package with both lenses, its default."""
    return backward_lens(model, question.ids, question.target, matrices=MATRICES)


def identities(size: Size) -> JacobianProjection:
    """A Jacobian Lens that carries vectors to themselves; time does not depend on the numbers."""
    matrices = {layer: torch.eye(size.d_model) for layer in range(size.n_layers - 1)}
    return jacobian_lens(Jacobians(matrices, 0, size.d_model, {}), check=False)


def carried_lens(
    model: Any, question: Question, carrying: JacobianProjection
) -> BackwardLensResult:
    """This package with a Jacobian Lens."""
    return backward_lens(
        model, question.ids, question.target, matrices=MATRICES, projection=carrying
    )


def lens_of_texts(model: Any, question: Question) -> BackwardLensResult:
    """This package with the Logit Lens, on texts."""
    return backward_lens(
        model, question.texts, question.target, matrices=MATRICES, projection="logit_lens"
    )


def capture(model: Any, question: Question) -> GradientCapture:
    """The first phase of `lens`: the factors."""
    objective = target_nll(question.target)
    return capture_factors(model, question.ids, objective, matrices=MATRICES)


def vectors_of(
    captured: GradientCapture,
) -> tuple[Float[Tensor, "matrix_layer batch pos d_model"], Int[Tensor, "matrix_layer batch pos"]]:
    """The vectors that `lens` projects, by matrix and layer, and the targets."""
    if captured.targets is None:
        raise ValueError("the capture has no target to rank")
    vectors = torch.stack(
        [
            gradient.inputs if matrix == "W_in" else -gradient.vjps
            for matrix in captured.matrices
            for gradient in (captured[matrix, layer] for layer in captured.layers)
        ]
    )
    return vectors, captured.targets.expand(vectors.shape[:-1])


def reading(model: Any, vectors: Tensor, targets: Tensor) -> VectorReadout:
    """The second phase of `lens`: the tokens."""
    return read_vectors(model, vectors, targets, k=K)


# --------------------------------------------------------------------------- TransformerLens's tool


def why_no_tool(size: Size) -> str | None:
    """Why the installed TransformerLens cannot run its own tool, or `None` if it can.

    Args:
        size: Size of the model.

    Returns:
        The reason.
    """
    if find_spec("transformer_lens.model_bridge") is None:
        return "this TransformerLens has neither TransformerBridge nor its own tool"
    if find_spec("transformer_lens.tools.analysis.backward_lens") is None:
        return "this TransformerLens does not include its own tool (3.9 to 4.2 do)"
    if size.is_llama:
        return "TransformerLens's tool takes raw GPT-2 bridges only"
    return None


def tool(model: Any, question: Question) -> list[Any]:
    """`transformer_lens.tools.analysis.BackwardLens`, one prompt at a time."""
    from transformer_lens.tools.analysis import BackwardLens

    analyser = BackwardLens(model)
    layers = range(model.cfg.n_layers)
    return [analyser.analyze(text, question.target_text, layers) for text in question.texts]


# -------------------------------------------------------------------------------- the authors' way


@dataclass(frozen=True)
class VectorReading:
    """The projection of one vector.

    Attributes:
        top_ids: Tokens with the largest scores.
        bottom_ids: Tokens with the smallest scores.
        target_rank: Number of tokens with a larger score than the target.
    """

    top_ids: Int[Tensor, "k"]
    bottom_ids: Int[Tensor, "k"]
    target_rank: int


def authors_way(model: Any, question: Question) -> list[list[VectorReading]]:
    """A full backward pass and a loop over vectors, one prompt at a time.

    It follows the paper's description: every parameter gets its gradient, and every `x_i` and raw
    `delta_i` is projected separately.

    Args:
        model: A `HookedTransformer` without a bias in its unembedding.
        question: The prompts.

    Returns:
        The readings of each prompt, layer by layer, first `W_in` and then `W_out`.
    """
    return [_authors_prompt(model, ids[None], question.target) for ids in question.ids]


def _authors_prompt(model: Any, ids: Int[Tensor, "1 pos"], target: int) -> list[VectorReading]:
    with _mlp_tensors(model) as (inputs, outputs):
        loss = _losses(model(ids, return_type="logits"), target).sum()
    for output in outputs:
        output.retain_grad()
    loss.backward()
    deltas = [y.grad for y in outputs[1::2] if y.grad is not None]
    spanning = [
        vector
        for factors in zip(inputs, deltas, strict=True)
        for factor in factors
        for vector in factor[0]
    ]
    with torch.no_grad():
        found = [_read_vector(model, vector, target) for vector in spanning]
    # Otherwise the next prompt's gradients would be added to these.
    model.zero_grad(set_to_none=True)
    return found


def _read_vector(model: Any, vector: Float[Tensor, "d_model"], target: int) -> VectorReading:
    scores = (model.ln_final(vector[None, None]) @ model.W_U)[0, 0]
    return VectorReading(
        top_ids=scores.topk(K).indices,
        bottom_ids=scores.topk(K, largest=False).indices,
        target_rank=int((scores > scores[target]).sum()),
    )


# --------------------------------------------------------------------------------------- the floor


def floor(model: Any, question: Question) -> None:
    """The lower bound: forward pass, gradients of activations, and one product."""
    product(passes(model, question), model.W_U)


def passes(model: Any, question: Question) -> Float[Tensor, "n d_model"]:
    """Forward and backward pass of the floor, without this package's hooks.

    Args:
        model: A `HookedTransformer`.
        question: The prompts.

    Returns:
        All spanning vectors, `x_i` of `W_in` and `delta_i` of `W_out`, layer by layer.
    """
    with _mlp_tensors(model) as (inputs, outputs):
        losses = _losses(model(question.ids, return_type="logits"), question.target)
    gradients = torch.autograd.grad(losses.sum(), outputs)
    factors = zip(inputs, gradients[1::2], strict=True)
    spanning = [factor.detach() for of_layer in factors for factor in of_layer]
    return torch.stack(spanning).flatten(0, -2)


@torch.no_grad()
def product(vectors: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_model d_vocab"]) -> None:
    """The product, in the largest pieces of at most `PIECE_BYTES`. The scores are discarded."""
    for piece in vectors.split(_piece_rows(weight)):
        _ = piece @ weight


@torch.no_grad()
def turned_product(
    vectors: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_model d_vocab"]
) -> None:
    """The same product as its transpose, `W_U^T V^T`, which some machines compute faster."""
    for piece in vectors.split(_piece_rows(weight)):
        _ = weight.T @ piece.T


def _piece_rows(weight: Float[Tensor, "d_model d_vocab"]) -> int:
    return max(1, PIECE_BYTES // (weight.shape[1] * weight.element_size()))


@torch.no_grad()
def plain_forward(model: Any, question: Question) -> None:
    """A forward pass without a graph."""
    model(question.ids, return_type="logits")


@contextmanager
def _mlp_tensors(model: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Record activations of the MLPs of a `HookedTransformer`, with their graph.

    Args:
        model: The model.

    Yields:
        Two lists that the forward pass fills: the inputs of `W_in` of each layer, `[batch, pos,
        d_model]`, and the outputs of `W_in` and `W_out`, alternating.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    def keep_output(tensor: Tensor, hook: object) -> None:
        outputs.append(tensor)

    w_in = "mlp.hook_pre_linear" if model.cfg.gated_mlp else "mlp.hook_pre"
    names = [
        f"blocks.{layer}.{name}"
        for layer in range(model.cfg.n_layers)
        for name in (w_in, "hook_mlp_out")
    ]
    handles = [block.mlp.register_forward_pre_hook(keep_input) for block in model.blocks]
    try:
        with model.hooks(fwd_hooks=[(name, keep_output) for name in names]):
            yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _losses(logits: Float[Tensor, "batch pos d_vocab"], target: int) -> Float[Tensor, "batch"]:
    return -logits[:, -1].float().log_softmax(-1)[:, target]
