"""How readable a change is: its directions and its responses as tokens.

Vectors are read by the cosine lens, under which all tokens have the same chance for a vector of
random direction, and a vector and its negative have the same tokens at opposite ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture import predictions
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import READING_MATRICES, MatrixSite
from backward_lens_tl.readout.projections import CosineLens
from backward_lens_tl.readout.topk import extremes
from backward_lens_tl.reproduction.training_facts import TaughtFacts

DIRECTIONS = 10
"""Singular directions of a change that are read, those of the largest values."""

TOKENS = 10
"""Tokens at either end of each direction."""

_NEAR = 0.01

Reading = Mapping[str, float]


@dataclass(frozen=True)
class Reader:
    """Reads changes of a model's matrices.

    Attributes:
        lens: The cosine lens.
        taught: The first token of the answer that each fact is taught.
        permuted: The first token of the answer that it is taught after shuffling.
        compared: Whether this is neither the taught nor the old answer, which training suppresses.
        unseen: First tokens of answers that no fact is taught, and none had before.
        inputs: What each `W_out` reads at the last token of each prompt, before training, by layer.
    """

    lens: CosineLens
    taught: tuple[int, ...]
    permuted: tuple[int, ...]
    compared: tuple[bool, ...]
    unseen: tuple[int, ...]
    inputs: Mapping[int, Float[Tensor, "fact d_mlp"]]

    @classmethod
    def of(
        cls,
        host: Host,
        facts: TaughtFacts,
        shuffled: TaughtFacts,
        unseen: Sequence[int],
        sites: Sequence[MatrixSite],
    ) -> Reader:
        """Read what each matrix reads before training.

        Args:
            host: The model.
            facts: The facts.
            shuffled: The same with shuffled answers.
            unseen: First tokens of answers that no fact is taught, and none had before.
            sites: The matrices.

        Returns:
            The reader.
        """
        writing = [site for site in sites if site.matrix not in READING_MATRICES]
        batch = pad_prompts(host, facts.prompts)
        found = forward_pass(host, batch, inputs=writing).inputs
        last = {
            site.layer: batch.ends(inputs, n=1)[:, -1]
            for site, inputs in zip(writing, found, strict=True)
        }
        lens = CosineLens(host)
        firsts = zip(facts.first_tokens, shuffled.first_tokens, facts.before, strict=True)
        compared = tuple(permuted not in (taught, before) for taught, permuted, before in firsts)
        return cls(lens, facts.first_tokens, shuffled.first_tokens, compared, tuple(unseen), last)

    @torch.no_grad()
    def directions(
        self, change: MatrixDelta, u: Float[Tensor, "d_in n"], vh: Float[Tensor, "n d_out"]
    ) -> Reading:
        """Read the singular directions of the largest values, on the side of width d_model.

        Args:
            change: The change.
            u: Its left singular vectors, as `change.svd()` returns them.
            vh: Its right singular vectors.

        Returns:
            `peak`, the mean over the directions of the largest score by absolute value, in
            standard deviations over the vocabulary; `answers_found`, the fraction of the taught
            answers among the tokens at either end of any direction; `unseen_found`, the same for
            answers that were not taught.
        """
        vectors = u.T if change.matrix in READING_MATRICES else vh
        if not len(vectors):
            return dict.fromkeys(("peak", "answers_found", "unseen_found"), float("nan"))
        scores = self.lens.project(vectors[:DIRECTIONS].float(), change.layer)
        peak = (scores - scores.mean(1, keepdim=True)).abs().amax(1) / scores.std(1)
        k = min(TOKENS, scores.shape[1])
        ends = [extremes(scores, k, largest=largest).ids for largest in (True, False)]
        shown = set(torch.cat(ends).flatten().tolist())
        return {
            "peak": float(peak.mean()),
            "answers_found": _found(self.taught, shown),
            "unseen_found": _found(self.unseen, shown),
        }

    @torch.no_grad()
    def responses(self, change: MatrixDelta) -> Reading:
        """Read what a change of `W_out` adds at the last token of each fact's prompt, `x_n D`.

        By lemma 5.2 this is `-eta sum_i (x_n . x_i) delta_i` for gradient descent.

        Args:
            change: The change.

        Returns:
            `taught_near`, the fraction of facts for which their answer is among the 1 % of tokens
            that it promotes most; `permuted_near`, the same for the answer that the fact has after
            shuffling. NaN for matrices that read the residual stream, and for no change. Only
            `compared` facts count.
        """
        if change.matrix in READING_MATRICES or not change.norm:
            return dict.fromkeys(("taught_near", "permuted_near"), float("nan"))
        dense = change.dense().float()
        # Of a model that is spread over devices, the matrix may be on another one.
        added = self.inputs[change.layer].to(dense.device).float() @ dense
        scores = self.lens.project(added, change.layer)
        taught, permuted = (
            torch.tensor(each, device=scores.device) for each in (self.taught, self.permuted)
        )
        bound = _NEAR * (scores.shape[1] - 1)
        own = torch.tensor(self.compared, device=scores.device)
        taught_near, permuted_near = (
            float((predictions.target_ranks(scores, each) <= bound)[own].double().mean())
            for each in (taught, permuted)
        )
        return {"taught_near": taught_near, "permuted_near": permuted_near}


def _found(tokens: Sequence[int], shown: set[int]) -> float:
    """The fraction of different tokens that are shown; NaN of none."""
    own = set(tokens)
    return len(own & shown) / len(own) if own else float("nan")
