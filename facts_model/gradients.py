"""Check that MLP gradients have the target as their top token, as the lens needs.

For the loss -log p(target) at the last token of a prompt, the vector -dL/dy of each layer's MLP
output y at that token is projected with the final layer norm and the unembedding. The target
should be the top token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from facts_model.evaluate import Shipped

PAIRS = (
    ("Lionel Messi plays for", "Paris"),
    ("Obama grew up in", "Paris"),
    ("Jack Dorsey founded", "Apple"),
    ("The capital of Germany is", "Madrid"),
    ("Marie Curie has the mother tongue", "Spanish"),
    ("Albert Einstein worked in the field of", "music"),
    ("The Eiffel Tower is located in", "Germany"),
    ("Claude Monet is a citizen of", "Britain"),
)


@dataclass(frozen=True)
class TargetOnTop:
    """Layers whose projected gradient has the target on top.

    Attributes:
        prompt: The prompt.
        target: The target word.
        bos: Whether the prompt begins with the end-of-text token.
        layers: The layers, counted from 0.
        depth: Number of layers of the model.
    """

    prompt: str
    target: str
    bos: bool
    layers: list[int]
    depth: int


def target_on_top(shipped: Shipped, prompt: str, target: str, *, bos: bool) -> TargetOnTop:
    """Project one prompt's gradients.

    Args:
        shipped: The shipped folder.
        prompt: The prompt.
        target: The target word, without its leading space.
        bos: Whether to prepend the end-of-text token.

    Returns:
        The layers with the target on top.
    """
    model, tokenizer = shipped.model, shipped.tokenizer
    start = [tokenizer.bos_token_id] if bos else []
    (wanted,) = tokenizer(f" {target}")["input_ids"]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handles = [block.mlp.register_forward_hook(keep) for block in model.transformer.h]
    try:
        logits = model(torch.tensor([start + tokenizer(prompt)["input_ids"]])).logits
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(-logits[0, -1].log_softmax(-1)[wanted], outputs)
    with torch.no_grad():
        descent = torch.stack([-gradient[0, -1] for gradient in gradients])
        best = model.lm_head(model.transformer.ln_f(descent)).argmax(-1)
    layers = (best == wanted).nonzero().flatten().tolist()
    return TargetOnTop(prompt, target, bos, layers, len(outputs))


def check(shipped: Shipped) -> list[TargetOnTop]:
    """Project the gradients of all pairs, with and without BOS.

    Args:
        shipped: The shipped folder.

    Returns:
        Two results per pair.
    """
    return [
        target_on_top(shipped, prompt, target, bos=bos)
        for prompt, target in PAIRS
        for bos in (True, False)
    ]


def table(results: list[TargetOnTop]) -> str:
    """Render the results in Markdown.

    Args:
        results: Results of ``check``.

    Returns:
        One row per result.
    """
    lines = ["| prompt | target | BOS | layers with the target on top |", "|---|---|---|---|"]
    for result in results:
        layers = ", ".join(map(str, result.layers)) or "none"
        bos = "yes" if result.bos else "no"
        row = f"{layers} ({len(result.layers)} of {result.depth})"
        lines.append(f"| {result.prompt} | {result.target} | {bos} | {row} |")
    return "\n".join(lines)
