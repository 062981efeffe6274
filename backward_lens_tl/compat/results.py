"""Results with the fields and methods of TransformerLens's own tool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.compat.errors import ArgumentTypeError, LayerNotAnalyzedError, check_type
from backward_lens_tl.compat.factors import LinearGradientFactors
from backward_lens_tl.errors import InputError
from backward_lens_tl.readout.topk import count_beyond

ProjectedFactor = Literal["forward_inputs", "output_gradients"]
"""Which factor has the width of the residual stream and is projected: `x_i` or `delta_i`."""


@dataclass(frozen=True)
class VocabularyRanking:
    """Tokens at one end of the vocabulary, the outermost first.

    Attributes:
        values: Their logits.
        indices: Their ids.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> found = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [6])
        >>> ranking = found.layer(6).output_projection.bottom_ranking
        >>> ranking.values.shape, model.tokenizer.decode(int(ranking.indices[-1, 0]))
        (torch.Size([6, 10]), ' Paris')
    """

    values: Float[Tensor, "*leading k"]
    indices: Int[Tensor, "*leading k"]

    def _first(self, k: int) -> VocabularyRanking:
        kept = self.indices.shape[-1]
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= kept:
            raise InputError(
                f"k is {k!r}; allowed: 1 to {kept}, as many tokens as were kept; "
                "analyze(..., top_k=) keeps more"
            )
        return VocabularyRanking(self.values[..., :k].clone(), self.indices[..., :k].clone())


@dataclass(frozen=True)
class BackwardLensMatrixResult:
    """One weight matrix: the factors of its gradient and the tokens of those of width `d_model`.

    Attributes:
        factors: The gradient.
        projected_factor: Which of its factors is read over the vocabulary.
        factor_norms: Norm of each vector that is read.
        zero_norm_mask: Where the norm is exactly zero.
        vocabulary_size: Number of logits.
        target_token_id: The target of the loss.
        top_ranking: The tokens of the largest logits.
        bottom_ranking: The tokens of the smallest logits.
        target_largest_ranks: Number of logits larger than the target's.
        target_smallest_ranks: Number of logits smaller than the target's.
        normalized_top_ranking: As `top_ranking`, for the directions of the vectors. This and the
            following fields are `None` unless requested.
        normalized_bottom_ranking: Likewise.
        normalized_target_largest_ranks: Likewise.
        normalized_target_smallest_ranks: Likewise.
        vocabulary_logits: All logits.
        normalized_vocabulary_logits: All logits of the directions of the vectors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> layer = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [6]).layer(6)
        >>> output = layer.output_projection
        >>> output.projected_factor, output.top_ranking.indices.shape  # [pos, k]
        ('output_gradients', torch.Size([6, 10]))
        >>> int(output.target_smallest_ranks[-1])  # the target's, counted from the smallest logit
        0
    """

    factors: LinearGradientFactors
    projected_factor: ProjectedFactor
    factor_norms: Float[Tensor, "pos"]
    zero_norm_mask: Bool[Tensor, "pos"]
    vocabulary_size: int
    target_token_id: int
    top_ranking: VocabularyRanking
    bottom_ranking: VocabularyRanking
    target_largest_ranks: Int[Tensor, "pos"]
    target_smallest_ranks: Int[Tensor, "pos"]
    normalized_top_ranking: VocabularyRanking | None = None
    normalized_bottom_ranking: VocabularyRanking | None = None
    normalized_target_largest_ranks: Int[Tensor, "pos"] | None = None
    normalized_target_smallest_ranks: Int[Tensor, "pos"] | None = None
    vocabulary_logits: Float[Tensor, "pos d_vocab"] | None = None
    normalized_vocabulary_logits: Float[Tensor, "pos d_vocab"] | None = None

    def logits(self, *, normalized: bool = False) -> Float[Tensor, "pos d_vocab"]:
        """All logits of all positions, if they were kept.

        Args:
            normalized: Those of the directions of the vectors.

        Returns:
            The logits.

        Raises:
            InputError: If they were not kept.

        Examples:
            >>> from backward_lens_tl.compat import BackwardLens
            >>> found = BackwardLens(model).analyze(
            ...     "Lionel Messi plays for", " Paris", [6], return_full_logits=True
            ... )
            >>> found.layer(6).output_projection.logits().shape  # [pos, d_vocab]
            torch.Size([6, 3072])
        """
        kept: Tensor | None = self._reading("vocabulary_logits", normalized)
        if kept is None:
            raise InputError(
                "the full logits were not kept; analyze(..., return_full_logits=True) keeps them"
            )
        return kept

    def top(self, *, k: int, normalized: bool = False) -> VocabularyRanking:
        """The tokens of the largest logits.

        Args:
            k: Number of tokens, up to those that were kept.
            normalized: Read the directions of the vectors.

        Returns:
            Values and ids, `[pos, k]`, largest first.

        Examples:
            >>> analyzed.layer(6).output_projection.top(k=3).indices.shape  # [pos, k]
            torch.Size([6, 3])
        """
        ranking: VocabularyRanking = self._reading("top_ranking", normalized)
        return ranking._first(k)

    def bottom(self, *, k: int, normalized: bool = False) -> VocabularyRanking:
        """The tokens of the smallest logits.

        Args:
            k: Number of tokens, up to those that were kept.
            normalized: Read the directions of the vectors.

        Returns:
            Values and ids, `[pos, k]`, smallest first.

        Examples:
            >>> lowest = analyzed.layer(6).output_projection.bottom(k=1).indices[-1, 0]
            >>> int(lowest) == analyzed.target_token_id  # what descent adds most, at the last token
            True
        """
        ranking: VocabularyRanking = self._reading("bottom_ranking", normalized)
        return ranking._first(k)

    def top_tokens(self, tokenizer: Any, *, k: int, normalized: bool = False) -> list[list[str]]:
        """Texts of the largest logits' tokens.

        Args:
            tokenizer: Anything with `decode(ids)`.
            k: Number of tokens, up to those that were kept.
            normalized: Read the directions of the vectors.

        Returns:
            `k` texts per position.

        Examples:
            >>> matrix = analyzed.layer(6).input_projection
            >>> matrix.top_tokens(model.tokenizer, k=1)[-1]  # at the last token
            [' Miami']
        """
        return _texts(self.top(k=k, normalized=normalized), tokenizer)

    def bottom_tokens(self, tokenizer: Any, *, k: int, normalized: bool = False) -> list[list[str]]:
        """Texts of the smallest logits' tokens.

        Args:
            tokenizer: Anything with `decode(ids)`.
            k: Number of tokens, up to those that were kept.
            normalized: Read the directions of the vectors.

        Returns:
            `k` texts per position.

        Examples:
            >>> matrix = analyzed.layer(6).output_projection
            >>> matrix.bottom_tokens(model.tokenizer, k=2)[-1]  # at the last token
            [' Paris', ' France']
        """
        return _texts(self.bottom(k=k, normalized=normalized), tokenizer)

    def target_ranks(
        self, target_token_id: int, *, largest: bool, normalized: bool = False
    ) -> Int[Tensor, "pos"]:
        """Number of logits larger or smaller than that of a token.

        Args:
            target_token_id: The token. Tokens other than the analysed target need the full logits.
            largest: Count the larger logits; else the smaller ones.
            normalized: Read the directions of the vectors.

        Returns:
            The counts; 0 is the outermost token.

        Raises:
            InputError: If the token is not in the vocabulary, or the logits were not kept.

        Examples:
            >>> output = analyzed.layer(6).output_projection
            >>> ranks = output.target_ranks(analyzed.target_token_id, largest=True)
            >>> int(ranks[-1]) == output.vocabulary_size - 1  # descent subtracts a gradient
            True
        """
        check_type("target_token_id", target_token_id, int)
        if not 0 <= target_token_id < self.vocabulary_size:
            raise InputError(
                f"target_token_id is {target_token_id}; allowed: 0 to {self.vocabulary_size - 1}"
            )
        check_type("largest", largest, bool)
        end = "largest" if largest else "smallest"
        kept: Tensor = self._reading(f"target_{end}_ranks", normalized)
        if target_token_id == self.target_token_id:
            return kept.clone()
        return ranks_beyond(self.logits(normalized=normalized), target_token_id, largest=largest)

    def gradient_descent_target_ranks(
        self, target_token_id: int, *, normalized: bool = False
    ) -> Int[Tensor, "pos"]:
        """Ranks counted from the smallest logit, which are the ranks in what descent adds.

        Args:
            target_token_id: The token. Tokens other than the analysed target need the full logits.
            normalized: Read the directions of the vectors.

        Returns:
            The number of smaller logits.

        Examples:
            >>> output = analyzed.layer(6).output_projection
            >>> int(output.gradient_descent_target_ranks(analyzed.target_token_id)[-1])
            0
        """
        return self.target_ranks(target_token_id, largest=False, normalized=normalized)

    def _reading(self, name: str, normalized: bool) -> Any:
        """A field for the vectors, or its counterpart for their directions."""
        check_type("normalized", normalized, bool)
        if normalized and self.normalized_top_ranking is None:
            raise InputError(
                "the vectors' directions were not read; analyze(..., normalized=True) reads them"
            )
        return getattr(self, f"normalized_{name}" if normalized else name)


@dataclass(frozen=True)
class BackwardLensLayerResult:
    """The MLP of one layer.

    Attributes:
        layer: The layer, from 0.
        input_projection: `W_in`, read through its inputs.
        output_projection: `W_out`, read through its output gradients.
        gate_projection: `W_gate`, read through its inputs, if the MLP has one. TransformerLens's
            class does not have this field.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> layer = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [6]).layer(6)
        >>> layer.input_projection.projected_factor, layer.output_projection.projected_factor
        ('forward_inputs', 'output_gradients')
    """

    layer: int
    input_projection: BackwardLensMatrixResult
    output_projection: BackwardLensMatrixResult
    gate_projection: BackwardLensMatrixResult | None = None


@dataclass(frozen=True)
class BackwardLensResult:
    """The result of `analyze`; it holds neither the model nor its tokenizer.

    Attributes:
        prompt: As passed.
        prompt_token_ids: Its tokens, including a BOS token if the model uses one.
        target_token: As passed.
        target_token_id: Its id.
        loss: Cross-entropy of the target after the prompt, in nats.
        layers: The analysed layers, in the order requested.
        includes_normalized_logits: Whether the directions of the vectors were read too.
        includes_full_logits: Whether all logits were kept.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> found = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [5, 6])
        >>> [layer.layer for layer in found.layers], found.prompt_token_ids.shape
        ([5, 6], torch.Size([6]))
    """

    prompt: str
    prompt_token_ids: Int[Tensor, "pos"]
    target_token: str
    target_token_id: int
    loss: float
    layers: tuple[BackwardLensLayerResult, ...]
    includes_normalized_logits: bool
    includes_full_logits: bool

    @property
    def max_absolute_reconstruction_error(self) -> float:
        """The largest of the matrices' absolute errors against autograd."""
        return max(factors.absolute_reconstruction_error for factors in self._factors)

    @property
    def max_relative_reconstruction_error(self) -> float:
        """The largest of the matrices' relative errors against autograd."""
        return max(factors.relative_reconstruction_error for factors in self._factors)

    @property
    def _factors(self) -> Iterator[LinearGradientFactors]:
        for layer in self.layers:
            for matrix in (layer.input_projection, layer.gate_projection, layer.output_projection):
                if matrix is not None:
                    yield matrix.factors

    def layer(self, layer: int) -> BackwardLensLayerResult:
        """One of the analysed layers.

        Args:
            layer: Its number.

        Returns:
            The layer.

        Raises:
            LayerNotAnalyzedError: If it was not analysed.

        Examples:
            >>> analyzed.layer(6).layer
            6
        """
        for result in self.layers:
            if result.layer == layer:
                return result
        there = ", ".join(str(result.layer) for result in self.layers)
        raise LayerNotAnalyzedError(f"layer {layer!r} was not analysed; available: {there}")


def ranks_beyond(
    logits: Float[Tensor, "pos d_vocab"], token_id: int, *, largest: bool
) -> Int[Tensor, "pos"]:
    """Number of logits larger or smaller than that of a token.

    Args:
        logits: The logits.
        token_id: The token.
        largest: Count the larger ones.

    Returns:
        The counts, on the CPU.
    """
    return count_beyond(logits, logits[:, token_id, None], largest=largest).cpu()


def _texts(ranking: VocabularyRanking, tokenizer: Any) -> list[list[str]]:
    decode = getattr(tokenizer, "decode", None)
    if not callable(decode):
        raise ArgumentTypeError(
            f"tokenizer is a {type(tokenizer).__name__} and has no decode(); pass the model's "
            "tokenizer"
        )
    return [[str(decode([token_id])) for token_id in row] for row in ranking.indices.tolist()]
