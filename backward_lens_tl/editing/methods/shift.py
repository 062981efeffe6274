"""The forward pass shift: a fact written with one outer product, found without a backward pass.

The gradient of `W_out` *shifts* its output towards the target (paper, section 5.2). The forward
pass shift writes that without a backward pass: with the input `x` of `W_out` at the prompt's last
token, and the target's row `e_t` of the decoding matrix,

    W_out <- W_out + eta x^T e_t                                      (paper, section 7)

so that the output there changes by `eta ||x||^2 e_t`, and at any other position, which reads `x_j`,
by `eta <x_j, x> e_t`. The other keys choose the input direction `l` in `W_out + c l^T e_t` with
`x l^T = 1`, so that the output changes by exactly `c e_t`, and little where it should not
(`shift/keys.py`).

Other values than `e_t` say what to write at a layer further down: the model's own gradient there,
or its average over other texts (`shift/values.py`).

The size, `eta` or `c`, does not carry over between models, layers or prompts. With `size="auto"` it
is found for each fact: a multiple of the least size with which the target leads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field, PlainValidator
from torch import Tensor

from backward_lens_tl._checks import check_kind
from backward_lens_tl.editing.fact_contexts import FactToken
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.outcomes import EditReport
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.shift.cells import Cells, TargetTokens
from backward_lens_tl.editing.shift.contrast import Contrast
from backward_lens_tl.editing.shift.keys import check_read, input_directions
from backward_lens_tl.editing.shift.layers import usual_layer
from backward_lens_tl.editing.shift.phrasings import GENERIC, SUBJECT, with_phrasings
from backward_lens_tl.editing.shift.reports import shift_outcomes
from backward_lens_tl.editing.shift.sizes import Products, Sized, best, least_sizes, stepped_sizes
from backward_lens_tl.editing.shift.subjects import SUBJECTS
from backward_lens_tl.editing.shift.trials import Trials
from backward_lens_tl.editing.shift.values import (
    TargetEmbedding,
    carried_on,
    embeddings,
    transported,
    vjps,
)
from backward_lens_tl.editing.statistics.moments import RIDGE, SecondMoments
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.jacobians.average import FittedLens, Jacobians
from backward_lens_tl.jacobians.checking import check_fits
from backward_lens_tl.jacobians.loading import load_jacobians
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.settings import Count, Finite, NonNegative

Value = Literal["embedding", "transported", "vjp"]
Key = Literal["paper", "plain", "whitened", "contrast"]

_PASSES = 6
"""Forward passes of an edit with `size="auto"`: one without the edit, and five with it."""

_MOST_PASSES = 20
"""The same where fewer do not reach all targets."""

_MARGIN = 1.1

N_CONTRAST = 16
"""Other subjects of each request."""

_CONTRAST_RIDGE = 1.0
"""Large, because the prompts of a contrast are few: with less, a key of a small model lies in
directions where they hardly vary but other text does."""

_ADVICE = (
    "Choose another layer, allow more iterations, or edit fewer facts at once; delta.outcomes has "
    "all numbers"
)


def _check_size(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if value != "auto":
        raise ValueError("pass 'auto', or a finite number")
    return value


Size = Annotated[float | Literal["auto"], PlainValidator(_check_size)]


def _check_phrasing(value: str) -> str:
    if value != GENERIC and value.count(SUBJECT) != 1:
        raise ValueError(f"pass {GENERIC!r}, or prompts with {SUBJECT} once, for the subject")
    return value


Phrasing = Annotated[str, AfterValidator(_check_phrasing)]

Factor = Annotated[Finite, Field(ge=1)]

Probability = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class ForwardPassShift(EditMethod):
    """Add the target's embedding to the output of `W_out` at the prompt's last token.

    An edit adds one outer product to `W_out` for each token of each target, at the position where
    the model predicts it; biases do not change.

    `size="auto"` uses `margin` times the least size with which every token of every target is the
    most probable one, or the least size with which each also has a `probability`. A token that is
    most probable anyway gets none. The size is searched for on the model's own logits: the first
    forward pass is of the whole model, the others of the edited layer and those above. The delta
    reports what was found (`delta.outcomes`), and a warning the targets that no size reached.

    Several requests share the edit. With the paper's key their outer products are added up, so each
    of them also writes where others read something similar. The other keys solve for `l_i` with
    `x_j l_i^T = 1` where `i = j` and 0 elsewhere, so each prompt's output changes by its own
    `c e_t` alone. Each has a size of its own; all are searched for, and checked, together.

    Attributes:
        layer: The layer, negative ones from the end; by default the one nearest to 0.8 of the
            depth, among those of `jacobian`, and not the last one.
        size: `eta` with the paper's key, where it depends on the layer and the model (GPT-2 xl:
            0.24 at layer 35); `c` with the others; `"auto"` to search for it.
        value: What is written, scaled to the norm of `e_t`: `"embedding"`, `e_t` itself;
            `"transported"`, the direction that raises the token's logit above the others', carried
            to the layer by the average Jacobian; `"vjp"`, the gradient of the target's
            log-probability, which takes a backward pass. By default it is transported if there is a
            `jacobian`, else the embedding.
        key: The input direction: `"paper"`, the input itself; `"plain"`, along the input;
            `"whitened"`, the direction that changes the outputs for the texts of `moments` least;
            `"contrast"`, the one that also spares the same prompt about other subjects, which run
            up to the layer. By default it is the contrast if there is a subject, else whitened if
            there are moments, else plain.
        jacobian: TransformerLens's `JacobianLens`, the path of its file, or `"facts"`, the one that
            ships with the facts model. The size that is tried first is guessed with it, too.
        margin: For `size="auto"`, the multiple of the least sufficient size; 1.1 by default.
        probability: For `size="auto"`, the probability that each token has to reach, instead of a
            margin.
        iterations: For `size="auto"`, the largest number of forward passes; by default 6, or 20
            if a target is not reached with fewer, as can happen with many tokens at once. If
            `size` is a number, how many times it is added at most; 1 by default. With more, a
            forward pass after each addition finds the tokens that are not yet the most probable
            ones, and only these get another.
        skip_if_answered: For a number as `size`, whether to leave out tokens that are most probable
            without an edit, as in the authors' code; `size="auto"` always does.
        target_tokens: Which tokens of a target are written: `"all"`, or the `"first"`, as in the
            authors' code.
        target_embedding: Whether `e_t` comes from the unembedding or the embedding. `"auto"` uses
            the embedding where both are or were one matrix, because weight processing folds the
            final norm into the unembedding and centers it; otherwise the unembedding.
        moments: Second moments of `W_out`'s inputs. The whitened key needs them; for the contrast
            key, those of the batch are used if there are none.
        ridge: Fraction of the mean variance that is added to the diagonal of `C`; by default 1e-6
            for the whitened key, and 1 for the contrast key.
        contrast: Names of other subjects; by default well-known names of several kinds.
        n_contrast: The number of them that is used for each request; 16 by default.
        fact_token: The token where `W_out` is edited: the prompt's `"last"`, or the subject's last
            (`"subject_last"`), where all tokens of a target are written; their sizes add up there.
        phrasings: Other prompts that get the same target in the same edit, with `{subject}` for the
            request's subject; `"generic"` for some that suit any relation. An edit of one prompt
            hardly changes paraphrases; an edit of several changes more of them, and more of
            everything else. They apply to every request: for phrasings that suit only one of
            several facts, pass further requests.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.editing import EditRequest, ForwardPassShift
        >>> model = blt.load_facts_model()
        >>> delta = ForwardPassShift(layer=5)(
        ...     model, EditRequest("Lionel Messi plays for", " Paris")
        ... )
        >>> delta["W_out", 5].shape, delta.rank
        ((512, 128), 1)
        >>> delta.outcomes[0].is_reached, delta.outcomes[0].rank
        (True, 0)
    """

    layer: int | None = None
    size: Size = "auto"
    value: Value | None = None
    key: Key | None = None
    jacobian: Jacobians | FittedLens | str | Path | None = None
    margin: Factor | None = None
    probability: Probability | None = None
    iterations: Count | None = None
    skip_if_answered: bool = False
    target_tokens: TargetTokens = "all"
    target_embedding: TargetEmbedding = "auto"
    moments: SecondMoments | None = None
    ridge: NonNegative | None = None
    contrast: Sequence[str] | None = None
    n_contrast: Count | None = None
    fact_token: FactToken = "last"
    phrasings: Sequence[Phrasing] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jacobian is not None:
            with raised_as(EditError):
                object.__setattr__(self, "jacobian", load_jacobians(self.jacobian))
        elif self.value == "transported":
            raise EditError(
                "value='transported' needs jacobian, the average Jacobians of the model: pass "
                "TransformerLens's JacobianLens, the path of its file, or 'facts' for the facts "
                "model; fit_jacobian_lens(model, texts, out) makes one"
            )
        if self.key == "whitened" and self.moments is None:
            raise EditError(
                "the whitened key needs moments, the statistics of what W_out reads: collect them "
                "with second_moments(model, texts), or pass facts_moments() for the facts model"
            )
        if self.moments is not None:
            made = "second_moments(model, texts)"
            check_kind("moments", self.moments, SecondMoments, made, EditError)
        names = ("contrast", "n_contrast", "moments", "ridge")
        check_read(self.key, {name: getattr(self, name) for name in names})
        if self.margin is not None and self.probability is not None:
            raise EditError(
                f"margin is {self.margin} and probability is {self.probability}; pass one of the "
                "two: a multiple of the least sufficient size, or what each token has to reach"
            )
        if self.size != "auto" and (self.margin, self.probability) != (None, None):
            raise EditError(
                f"margin and probability are for size='auto', but size is {self.size}; leave them "
                "out, or the size"
            )
        if self.size == "auto" and self.skip_if_answered:
            raise EditError(
                "skip_if_answered is for a number as size, but size is 'auto', which always leaves "
                "out tokens that are most probable; leave it out"
            )
        if self.size == "auto" and self.iterations == 1:
            raise EditError(
                "iterations is 1, but size='auto' needs at least 2 forward passes, one without the "
                "edit and one with it"
            )

    @classmethod
    def paper(cls, layer: int, size: float, **settings: Any) -> ForwardPassShift:
        """Create the shift exactly as in the paper, section 7.

        Args:
            layer: The layer, negative ones from the end; 35 for GPT-2 xl.
            size: `eta`; 0.24 for GPT-2 xl.
            **settings: Other settings.

        Returns:
            The method: the input of `W_out` as it is, times the embedding of the target's first
            token, once and unchecked.

        Examples:
            >>> import backward_lens_tl as blt
            >>> blt.editing.ForwardPassShift.paper(35, 0.24).key
            'paper'
        """
        papers: dict[str, Any] = {"key": "paper", "target_tokens": "first"}
        return cls(layer=layer, size=size, **papers | settings)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Compute the shift of all requests together."""
        return self.reported(host, requests)[0]

    def reported(
        self, host: Host, requests: Sequence[TokenizedRequest]
    ) -> tuple[list[MatrixDelta], EditReport]:
        """Compute the shift of all requests together, and report how their targets stand."""
        if self._jacobians is not None:
            check_fits(self._jacobians, host)
        layer = usual_layer(host, self._jacobians) if self.layer is None else self.layer
        [site] = find_editable(host, "W_out", [layer])
        requests = with_phrasings(host, requests, self.phrasings, self.prepend_bos)
        cells = Cells.of(host, requests, self.target_tokens, self.fact_token)
        trials = Trials(host, site, cells)
        values = self._output_directions(host, cells, trials, site, requests).to(trials.reads)
        contrast = self._contrast(host, site, cells, requests)
        left = self._input_directions(host, site.layer, trials.reads, contrast)
        effects = carried_on(self._jacobians, host, site.layer, values)
        products = Products(trials, cells, left, values, effects)
        n_backward = int(self._value == "vjp")
        n_before = trials.n_passes + n_backward
        tried = self._sized(host, products, n_before)
        chosen = best(tried, cells, self.probability) if self.size == "auto" else tried[-1]
        written = chosen.sizes != 0
        right = chosen.sizes[:, None].to(values) * values
        matrix = MatrixDelta("W_out", site.layer, left[:, written], right[written])
        outcomes = shift_outcomes(requests, cells, tried, chosen, self.probability)
        n_prompts = 0 if contrast is None else contrast.n_prompts
        report = EditReport(outcomes, trials.n_passes + n_backward, n_backward, n_prompts)
        report.warn_if_missed(_ADVICE)
        return [matrix], report

    def _sized(self, host: Host, products: Products, n_before: int) -> list[Sized]:
        """The sizes that were tried, after some forward passes, the unedited model first."""
        if self.size == "auto":
            default = _MARGIN if self.probability is None else 1.0
            return least_sizes(
                host,
                products,
                factor=self.margin or default,
                probability=self.probability,
                n_passes=max(1, (self.iterations or _PASSES) - n_before),
                n_most=max(1, (self.iterations or _MOST_PASSES) - n_before),
            )
        return stepped_sizes(
            products,
            self.size,
            n_steps=self.iterations or 1,
            skip_if_answered=self.skip_if_answered,
        )

    def _contrast(
        self, host: Host, site: MatrixSite, cells: Cells, requests: Sequence[TokenizedRequest]
    ) -> Contrast | None:
        """What the matrix reads for other subjects, if the key needs that."""
        lacking = [each for each in requests if each.request.subject is None]
        if self.key not in (None, "contrast") or (self.key is None and lacking == [*requests]):
            return None
        if self.key == "contrast" and lacking:
            raise EditError(
                f"the request for {lacking[0].request.prompt!r} has no subject, but key='contrast' "
                "compares its prompt with those of other subjects; pass EditRequest(prompt, "
                "target, subject=...), or key='plain'"
            )
        return Contrast.of(
            host,
            site,
            requests,
            cells.targets,
            SUBJECTS if self.contrast is None else self.contrast,
            n_subjects=self.n_contrast or N_CONTRAST,
            fact_token=self.fact_token,
            prepend_bos=self.prepend_bos,
        )

    def _input_directions(
        self,
        host: Host,
        layer: int,
        reads: Float[Tensor, "n d_mlp"],
        contrast: Contrast | None,
    ) -> Float[Tensor, "d_mlp n"]:
        """`l` of each cell, as columns."""
        if self.key == "paper":
            return reads.T.contiguous()
        moments = None if self.key == "plain" else self.moments
        if moments is not None:
            moments.check(host, [layer], matrix="W_out")
        if contrast is not None:
            ridge = _CONTRAST_RIDGE if self.ridge is None else self.ridge
            return input_directions(reads, contrast.solver(layer, moments, ridge))
        if moments is not None:
            ridge = RIDGE if self.ridge is None else self.ridge
            return input_directions(reads, lambda keys: moments.solve(layer, keys, ridge))
        return input_directions(reads, lambda keys: keys)

    def _output_directions(
        self,
        host: Host,
        cells: Cells,
        trials: Trials,
        site: MatrixSite,
        requests: Sequence[TokenizedRequest],
    ) -> Float[Tensor, "n d_out"]:
        """What is written for each cell at size 1, as long as the token's embedding."""
        embedded = embeddings(host, cells.tokens, self.target_embedding)
        if self._value == "embedding":
            return embedded
        found = (
            vjps(host, cells, site, requests)
            if self._value == "vjp" or self._jacobians is None
            else transported(host, cells, trials, self._jacobians)
        )
        lengths = embedded.norm(dim=-1, keepdim=True).to(found)
        scaled: Tensor = lengths * torch.nn.functional.normalize(found, dim=-1)
        return scaled

    @property
    def _value(self) -> Value:
        """The value, which is transported by default where there is a lens."""
        return self.value or ("embedding" if self.jacobian is None else "transported")

    @property
    def _jacobians(self) -> Jacobians | None:
        return self.jacobian if isinstance(self.jacobian, Jacobians) else None
