"""Causal tracing (Meng et al. 2022, section 2): where MLPs restore a fact that noise has removed.

Noise on the subject's embeddings makes the model forget the answer. Then the output of the MLPs of
a few neighboring layers, at one token, is set to what it was without noise. The probability of the
answer that this brings back, averaged over facts and noise, says where these MLPs matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.data.records import Record
from backward_lens_tl.data.segments import covered_tokens
from backward_lens_tl.editing.requests import EditRequest, tokenize_request
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.matrix_selection import find_editable

TOKENS = ("last subject token", "first token after the subject", "last token")
"""Tokens at which MLP outputs are restored."""

_NOISE = 3.0
"""Standard deviation of the noise, as a multiple of that of the subjects' embeddings."""

_SAMPLES = 3
_WINDOW = 10 / 48
"""Layers that are restored together, as a fraction of all: ten of GPT-2 xl's 48."""

_ROWS = 96
"""Rows of one forward pass."""


@dataclass(frozen=True)
class Fact:
    """A fact that the model knows.

    Attributes:
        ids: Token ids of its prompt.
        subject: Positions of the subject's tokens.
        answer: The first token of the answer, which is the most probable one.
    """

    ids: tuple[int, ...]
    subject: tuple[int, ...]
    answer: int

    @property
    def positions(self) -> tuple[int, ...]:
        """The position of each of `TOKENS`."""
        last = len(self.ids) - 1
        return self.subject[-1], min(self.subject[-1] + 1, last), last


def known_facts(host: Host, records: Sequence[Record], n: int) -> list[Fact]:
    """The first facts whose answer is the model's most probable token.

    Args:
        host: The model.
        records: Records with a subject and an answer.
        n: The largest number of facts.

    Returns:
        The facts.
    """
    found: list[Fact] = []
    for record in records:
        request = EditRequest(record.prompt, str(record.answer), record.subject)
        asked = tokenize_request(host, request, prepend_bos=False)
        seen = forward_pass(host, pad_prompts(host, [asked.prompt]))
        if int(seen.logits[0].argmax()) == asked.target[0]:
            subject = covered_tokens(asked.text, asked.spans, str(record.subject))
            found.append(Fact(asked.prompt, tuple(subject), asked.target[0]))
        if len(found) == n:
            break
    return found


@torch.no_grad()
def traced(host: Host, facts: Sequence[Fact], seed: int = 0) -> dict[str, Any]:
    """The average indirect effect of the MLPs around each layer, at each of `TOKENS`.

    Args:
        host: The model.
        facts: The facts.
        seed: Seed of the noise.

    Returns:
        Mean probabilities of the answers, without noise (`clean`) and with it (`corrupted`), and
        `effects`: by token, what restoring the MLPs around each layer adds to the latter.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = host.model.W_E.detach().float().cpu()
    std = float(torch.cat([rows[[fact.ids[at] for at in fact.subject]] for fact in facts]).std())
    found = []
    for fact in facts:
        shape = (_SAMPLES, len(fact.subject), rows.shape[1])
        noise = _NOISE * std * torch.randn(shape, generator=generator)
        found.append(_probabilities(host, fact, noise))
    clean, corrupted, restored = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
    effects = (restored - corrupted).tolist()
    return {
        "facts": len(facts),
        "noise_std": _NOISE * std,
        "clean": float(clean),
        "corrupted": float(corrupted),
        "effects": dict(zip(TOKENS, effects, strict=True)),
    }


def _probabilities(
    host: Host, fact: Fact, noise: Float[Tensor, "sample subject d_model"]
) -> tuple[Tensor, Tensor, Float[Tensor, "token layer"]]:
    """Probabilities of the answer: without noise, with it, and restored around each layer."""
    sites = find_editable(host, "W_out", None)
    seen = forward_pass(host, pad_prompts(host, [fact.ids]), outputs=sites)
    clean = torch.stack([each[0] for each in seen.outputs])  # [layer, pos, d_model]
    n = len(sites)
    half = max(1, round(_WINDOW * n)) // 2
    # Each row: a sample of the noise, and a position and the layers that are restored there.
    rows = [(sample, 0, range(0)) for sample in range(len(noise))]
    rows += [
        (sample, at, range(max(0, layer - half), min(n, layer + half + 1)))
        for at in fact.positions
        for layer in range(n)
        for sample in range(len(noise))
    ]

    def answer(some: Sequence[tuple[int, int, range]]) -> Tensor:
        batch = pad_prompts(host, [fact.ids] * len(some))

        def disturb(embedded: Tensor) -> Tensor:
            changed = embedded.clone()
            added = noise[[sample for sample, *_ in some]].to(embedded)
            changed[:, list(fact.subject)] += added
            return changed

        def restore(layer: int, output: Tensor) -> Tensor:
            changed = output.clone().reshape(*batch.mask.shape, -1)
            for row, (_, at, layers) in enumerate(some):
                if layer in layers:
                    changed[row, at] = clean[layer, at]
            return changed.reshape(output.shape)

        with ExitStack() as hooks:
            hooks.enter_context(hooked(host.hook_points["hook_embed"].tap, disturb))
            for layer, site in enumerate(sites):
                hooks.enter_context(
                    hooked(site.output, partial(restore, layer), before_others=True)
                )
            logits = forward_pass(host, batch).logits
        return logits.softmax(-1)[:, fact.answer]

    found = torch.cat([answer(some) for some in _pieces(rows)]).split(len(noise))
    means = torch.stack([each.mean() for each in found])
    known = seen.logits[0].softmax(-1)[fact.answer]
    return known, means[0], means[1:].reshape(len(TOKENS), n)


def _pieces(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(rows), _ROWS):
        yield rows[begin : begin + _ROWS]
