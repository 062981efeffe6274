"""Sample continuations from a model, with a random generator per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.models import Host


@torch.no_grad()
def sample(
    host: Host,
    prompts: Sequence[Sequence[int]],
    n_tokens: Sequence[int],
    *,
    top_k: int,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Sample continuations of prompts.

    Each prompt has its own generator on the CPU, so its continuation depends neither on the other
    prompts nor on the device, and torch's global generator is unchanged. Every token needs a
    forward pass over the whole text: key-value caches differ between TransformerLens's classes, and
    the caller's hooks see whole prompts.

    Args:
        host: The model.
        prompts: Token ids of each prompt, at least one token each.
        n_tokens: Number of tokens for each prompt; fewer if the model's context is full (its last
            position still predicts a token), or after the tokenizer's end of text.
        top_k: Number of most probable tokens to sample from; 1 is greedy. If logits are not finite,
            sampling is greedy too.
        seeds: One for each prompt.

    Returns:
        The continuations, without prompts and end of text.
    """
    end = getattr(host.tokenizer, "eos_token_id", None)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))
    while True:
        left = [
            at
            for at in left
            if len(drawn[at]) < n_tokens[at]
            and len(prompts[at]) + len(drawn[at]) <= host.n_ctx
            and not (drawn[at] and drawn[at][-1] == end)
        ]
        if not left:
            break
        rows = [[*prompts[at], *drawn[at]] for at in left]
        for group in host.length_groups(list(map(len, rows))):
            batch = pad_prompts(host, [rows[place] for place in group])
            with host.own_precision():
                logits = read_logits(host, batch, n_read=1)[:, -1].cpu()
            for place, own in zip(group, logits, strict=True):
                drawn[left[place]].append(_drawn(own, top_k, generators[left[place]]))
    return [tokens[:-1] if tokens and tokens[-1] == end else tokens for tokens in drawn]


def _drawn(logits: Float[Tensor, "d_vocab"], top_k: int, generator: torch.Generator) -> int:
    """Sample one of the most probable tokens, in proportion to its probability."""
    # Logits are not finite if a very large edit has broken the model.
    if top_k == 1 or not bool(logits.isfinite().all()):
        return int(logits.argmax())
    best, tokens = logits.topk(min(top_k, len(logits)))
    place = torch.multinomial(best.double().softmax(-1), 1, generator=generator)
    return int(tokens[place])
