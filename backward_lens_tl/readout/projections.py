"""Project vectors of the residual stream's width to scores over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.models import Host, probe


@runtime_checkable
class Projection(Protocol):
    """Anything that reads vectors as scores over the vocabulary.

    Results name it after its attribute `name` if that is a text, otherwise after its class.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> class Unembedding:  # without the final norm
        ...     name = "unembedding"
        ...
        ...     def project(self, vectors, layer):
        ...         return vectors @ model.W_U
        >>> isinstance(Unembedding(), blt.Projection)
        True
        >>> result = blt.backward_lens(
        ...     model, "Lionel Messi plays for", " Paris", projection=Unembedding()
        ... )
        >>> result.projection, result.top_tokens("W_out", layer=6, pos=-1, k=1)
        ('unembedding', [' Paris'])
    """

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        """Score every token for every vector.

        Args:
            vectors: Vectors of width `d_model`.
            layer: The layer that they come from.

        Returns:
            Scores; a larger score is more promoted.

        Examples:
            >>> class Unembedding:
            ...     def project(self, vectors, layer):
            ...         return vectors @ model.W_U
            >>> Unembedding().project(-gradient.vjps[0], layer=6).shape  # [n, d_vocab]
            torch.Size([6, 3072])
        """


class LogitLens:
    """The model's own decoding, `LL(v) = softmax(ln_final(v) @ W_U + b_U)` (paper, section 3.3).

    Scores are the logits; the softmax would not change their order. The statistics of the norm are
    computed for each vector, and the model's logit softcap and scale are applied.

    Args:
        host: The model.

    Raises:
        UnsupportedModelError: If this lens does not compute the model's logits from its last
            residual stream.
    """

    def __init__(self, host: Host) -> None:
        if (seen := probe(host)) is not None:
            seen.check_readout(host)
        self._host = host
        self.faint_norm = host.unembedding.faint_norm

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        """Score every token for every vector; the same in all layers."""
        del layer
        return self._host.unembedding.logits(vectors)

    def project_both(
        self, vectors: Float[Tensor, "n d_model"]
    ) -> Iterator[Float[Tensor, "n d_vocab"]]:
        """Score every token for every vector, and then for its direction.

        Args:
            vectors: Vectors of width `d_model`.

        Yields:
            Scores of this lens, then of the normalized one, which may use the same memory.
        """
        yield from self._host.unembedding.logits_of_both(vectors, _directions(vectors))


class NormalizedLogitLens(LogitLens):
    """The Logit Lens of `v / ||v||_2` (paper, appendix F); a zero vector stays zero.

    It differs from the Logit Lens for vectors so short that the `eps` of the final norm matters,
    as VJPs often are.

    Args:
        host: The model.
    """

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.faint_norm = 0.0

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        """Score every token for every vector's direction; the same in all layers."""
        return super().project(_directions(vectors), layer)


class CosineLens(LogitLens):
    """The cosine of a vector and each token's column of `W_U`, seen before the final norm.

    The Logit Lens scores token `t` with `v' . e_t` plus terms that are the same for all tokens or
    all vectors. Here `v'` is `v` as the norm scales it and `e_t = C (g * (w_t - mean_s w_s))`, with
    the norm's gain `g` and, for LayerNorm, the subtraction of the mean `C`. Tokens with long
    columns therefore have larger scores of both signs and lead for many unrelated vectors. This
    lens scores `v' . e_t / (|v'| |e_t|)`: for a vector of random direction all tokens have the same
    chance.

    Scores do not depend on the vector's length, and biases of the norm and of the unembedding do
    not contribute.

    Args:
        host: The model.
    """

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.faint_norm = 0.0
        self._columns = host.unembedding.columns()

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        """Cosine of every vector and every token; the same in all layers."""
        del layer
        return self._host.unembedding.cosines(_directions(vectors), self._columns)


_SHORTEST = 1e-15


def _directions(vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    # The shortest are first scaled to a largest entry of 1; their squares underflow in float32.
    largest = vectors.abs().amax(-1, keepdim=True)
    is_long = (largest > _SHORTEST) | (largest == 0)
    even = vectors / largest.masked_fill(is_long, 1)
    norms: Tensor = even.norm(dim=-1, keepdim=True)
    return even / norms.masked_fill(norms == 0, 1)


LENSES: dict[str, type[LogitLens]] = {
    "logit_lens": LogitLens,
    "normalized": NormalizedLogitLens,
    "cosine": CosineLens,
}
"""The built-in lenses by name."""


def scores_by_each(
    projections: Sequence[Projection], vectors: Float[Tensor, "n d_model"], layer: int
) -> Iterator[tuple[int, Float[Tensor, "n d_vocab"]]]:
    """Score vectors with several projections, one after the other.

    The Logit Lens and its normalized version share one product.

    Args:
        projections: The projections.
        vectors: Vectors of width `d_model`.
        layer: The layer that they come from.

    Yields:
        Index of a projection and its scores, in any order; the next may overwrite them.
    """
    by_kind = {type(lens): (index, lens) for index, lens in enumerate(projections)}
    raw_at, raw = by_kind.get(LogitLens, (-1, None))
    normalized_at, normalized = by_kind.get(NormalizedLogitLens, (-1, None))
    shared: tuple[int, ...] = ()
    if (
        isinstance(raw, LogitLens)
        and isinstance(normalized, LogitLens)
        and raw._host is normalized._host
    ):
        shared = raw_at, normalized_at
        yield from zip(shared, raw.project_both(vectors), strict=True)
    for index, projection in enumerate(projections):
        if index not in shared:
            # A caller's projection may work in place.
            own = vectors if len(projections) == 1 else vectors.clone()
            yield index, projection.project(own, layer)


def reads_layers_alike(projection: Projection) -> bool:
    """Whether a projection is the same in all layers; true for the built-in ones only."""
    return type(projection) in LENSES.values()
