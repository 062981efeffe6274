"""The analysis of TransformerLens's own tool, computed by this package."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.compat.errors import AnalysisError, ArgumentTypeError, check_type
from backward_lens_tl.compat.factors import LinearGradientFactors
from backward_lens_tl.compat.results import (
    BackwardLensLayerResult,
    BackwardLensMatrixResult,
    BackwardLensResult,
    ProjectedFactor,
    VocabularyRanking,
    ranks_beyond,
)
from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_sites
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.projections import Projection
from backward_lens_tl.readout.requested import as_projection
from backward_lens_tl.readout.vectors import read_vectors
from backward_lens_tl.validation import weight_gradients

DEFAULT_TOP_K = 10
"""Number of tokens that `analyze` keeps at either end by default."""


class BackwardLens:
    """Reads the gradients of MLP matrices over the vocabulary, one prompt at a time.

    Args:
        model: A `HookedTransformer` or `TransformerBridge` with a tokenizer.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.compat import BackwardLens
        >>> model = blt.load_facts_model()
        >>> analyzed = BackwardLens(model).analyze("Lionel Messi plays for", " Paris", [5, 6])
        >>> analyzed.max_relative_reconstruction_error < 1e-5
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        with suppress(ModelStateError):  # analyze checks again; the state may change until then
            _host_with_tokenizer(model)

    def analyze(
        self,
        prompt: str,
        target_token: str,
        layers: Sequence[int],
        *,
        normalized: bool = False,
        top_k: int = DEFAULT_TOP_K,
        return_full_logits: bool = False,
    ) -> BackwardLensResult:
        """Analyse the loss of one target token after one prompt.

        Args:
            prompt: The text.
            target_token: A text of exactly one token.
            layers: Layers from 0 without repeats, in the order of the result.
            normalized: Also read the directions of the vectors (paper, appendix F).
            top_k: Number of tokens to keep at either end.
            return_full_logits: Keep all logits, `[pos, d_vocab]` per matrix and reading.

        Returns:
            The result.

        Raises:
            InputError: If an argument is not usable.

        Examples:
            >>> from backward_lens_tl.compat import BackwardLens
            >>> found = BackwardLens(model).analyze(
            ...     "Lionel Messi plays for", " Paris", [6], normalized=True
            ... )
            >>> output = found.layer(6).output_projection
            >>> output.bottom_tokens(model.tokenizer, k=1, normalized=True)[-1]  # at the last token
            [' Paris']
        """
        check_type("prompt", prompt, str)
        check_type("target_token", target_token, str)
        check_type("normalized", normalized, bool)
        check_type("top_k", top_k, int)
        check_type("return_full_logits", return_full_logits, bool)
        with _state_errors_as_theirs():
            host = _host_with_tokenizer(self._model)
            vocabulary = host.vocabulary
            if not 1 <= top_k <= vocabulary.size:
                raise InputError(
                    f"top_k is {top_k}; allowed: 1 to {vocabulary.size}, the vocabulary's size"
                )
            wanted = _checked_layers(layers, host.n_layers)
            target = vocabulary.token_id(target_token)
            capture = capture_gradients(
                self._model, prompt, target_nll(target), matrices="mlp", layers=wanted
            )
            matrices = [(gradient.matrix, gradient.layer) for gradient in capture]
            by_autograd = _WeightGradients(self._model, prompt, target, matrices)
            reader = _Reader(host, target, top_k, normalized, return_full_logits, by_autograd)
            found: dict[tuple[str, int], BackwardLensMatrixResult] = {}
            for layer in wanted:
                gradients = [gradient for gradient in capture if gradient.layer == layer]
                for gradient, result in zip(gradients, reader.read(gradients), strict=True):
                    found[gradient.matrix, layer] = result
        return BackwardLensResult(
            prompt=prompt,
            prompt_token_ids=capture.tokens[0].to("cpu", copy=True),
            target_token=target_token,
            target_token_id=target,
            loss=float(capture.loss[0]),
            layers=tuple(
                BackwardLensLayerResult(
                    layer,
                    input_projection=found["W_in", layer],
                    output_projection=found["W_out", layer],
                    gate_projection=found.get(("W_gate", layer)),
                )
                for layer in wanted
            ),
            includes_normalized_logits=normalized,
            includes_full_logits=return_full_logits,
        )


class _WeightGradients:
    """Autograd's own weight gradients of one analysis, computed on first access.

    A result does not keep the model alive; it has a weak reference to it.

    Args:
        model: The model.
        prompt: The text.
        target: The target's id.
        matrices: Names and layers.
    """

    def __init__(
        self, model: nn.Module, prompt: str, target: int, matrices: Sequence[tuple[MatrixName, int]]
    ) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._prompt, self._target, self._matrices = prompt, target, list(matrices)

    def of(self, matrix: MatrixName, layer: int) -> Float[Tensor, "d_in d_out"]:
        """The gradient of one matrix, on the CPU."""
        return self._all[self._matrices.index((matrix, layer))]

    @cached_property
    def _all(self) -> list[Float[Tensor, "d_in d_out"]]:
        model = self._model()
        if model is None:
            raise AnalysisError(
                "the model that was analysed no longer exists, so autograd's weight gradient "
                "cannot be computed; read weight_gradient or a reconstruction error before it is "
                "deleted"
            )
        host = host_of(model)
        sites = [find_sites(host, matrix, layer)[0] for matrix, layer in self._matrices]
        dense, _ = weight_gradients(host, self._prompt, target_nll(self._target), sites)
        return [gradient.float().cpu() for gradient in dense]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": _gone}


def _gone() -> None:
    """Stands for the model in a copy of a result."""


@dataclass(frozen=True)
class _Reader:
    """How the matrices of one analysis are read over the vocabulary."""

    host: Host
    target: int
    top_k: int
    normalized: bool
    keeps_logits: bool
    by_autograd: _WeightGradients

    def read(self, gradients: Sequence[MatrixGradient]) -> list[BackwardLensMatrixResult]:
        """Factors and readings of the matrices of one layer."""
        factors = [self._factors(gradient) for gradient in gradients]
        projected: list[ProjectedFactor] = [
            "forward_inputs" if gradient.reads_residual else "output_gradients"
            for gradient in gradients
        ]
        vectors = [getattr(pair, name) for pair, name in zip(factors, projected, strict=True)]
        readings = self._readings(vectors, "logit_lens", gradients[0])
        if self.normalized:
            directions = self._readings(vectors, "normalized", gradients[0])
            readings = [
                raw | {f"normalized_{name}": value for name, value in normalized.items()}
                for raw, normalized in zip(readings, directions, strict=True)
            ]
        norms = [of_matrix.norm(dim=-1) for of_matrix in vectors]
        return [
            BackwardLensMatrixResult(
                factors=pair,
                projected_factor=name,
                factor_norms=norm,
                zero_norm_mask=norm == 0,
                vocabulary_size=self.host.vocabulary.size,
                target_token_id=self.target,
                **reading,
            )
            for pair, name, norm, reading in zip(factors, projected, norms, readings, strict=True)
        ]

    def _factors(self, gradient: MatrixGradient) -> LinearGradientFactors:
        if gradient.inputs.ndim != 3 or gradient.vjps.ndim != 3:
            raise UnsupportedModelError(
                f"{gradient.matrix} of layer {gradient.layer} is not one matrix but several, as in "
                "a mixture of experts; backward_lens and capture_gradients may support them"
            )
        return LinearGradientFactors(
            _float32(gradient.inputs[0], gradient).to("cpu", copy=True),
            _float32(gradient.vjps[0], gradient).to("cpu", copy=True),
            partial(self.by_autograd.of, gradient.matrix, gradient.layer),
        )

    def _readings(
        self,
        vectors: Sequence[Float[Tensor, "pos d_model"]],
        projection: str,
        gradient: MatrixGradient,
    ) -> list[dict[str, Any]]:
        """The fields that one projection fills, for several matrices in one product."""
        lens = _KeepingScores(as_projection(projection, self.host), gradient)
        read = read_vectors(
            self.host.model,
            torch.cat(list(vectors)),
            projection=lens,
            layer=gradient.layer,
            k=self.top_k,
        )
        scores, sizes = torch.cat(lens.scores), [len(of_matrix) for of_matrix in vectors]
        by_matrix = zip(torch.arange(len(scores)).split(sizes), scores.split(sizes), strict=True)
        return [
            {
                "top_ranking": VocabularyRanking(read.top_scores[rows], read.top_ids[rows]),
                "bottom_ranking": VocabularyRanking(
                    read.bottom_scores[rows], read.bottom_ids[rows]
                ),
                "target_largest_ranks": ranks_beyond(logits, self.target, largest=True),
                "target_smallest_ranks": ranks_beyond(logits, self.target, largest=False),
                "vocabulary_logits": logits.clone() if self.keeps_logits else None,
            }
            for rows, logits in by_matrix
        ]


class _KeepingScores:
    """A projection that keeps the scores it computes, in float32 on the CPU."""

    def __init__(self, projection: Projection, gradient: MatrixGradient) -> None:
        self.scores: list[Tensor] = []
        self._projection, self._gradient = projection, gradient

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        scores = _float32(self._projection.project(vectors, layer), self._gradient)
        self.scores.append(scores.cpu())
        return scores


def _float32(tensor: Float[Tensor, "*shape"], gradient: MatrixGradient) -> Float[Tensor, "*shape"]:
    """Convert to float32, which values of a float64 model may overflow."""
    converted = tensor.detach().float()
    if not bool(converted.isfinite().all()):
        raise AnalysisError(
            f"the gradient of {gradient.matrix} in layer {gradient.layer}, or its reading, is not "
            "finite in float32; check the weights, and in half precision load the model in float32"
        )
    return converted


def _host_with_tokenizer(model: nn.Module) -> Host:
    try:
        host = host_of(model)
    except InputError as error:  # the class is not one of TransformerLens's
        raise ArgumentTypeError(str(error)) from error
    if host.tokenizer is None:
        raise InputError(
            "the model has no tokenizer, but BackwardLens takes texts; set one, or pass token ids "
            "to backward_lens_tl.backward_lens"
        )
    return host


@contextmanager
def _state_errors_as_theirs() -> Iterator[None]:
    try:
        yield
    except ModelStateError as error:
        raise AnalysisError(str(error)) from error


def _checked_layers(layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    if isinstance(layers, str | bytes) or not isinstance(layers, Sequence):
        raise ArgumentTypeError(
            f"layers is {layers!r}, a {type(layers).__name__}; pass a list such as [0, 1]"
        )
    for layer in layers:
        check_type("a layer", layer, int)
    wanted = tuple(layers)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(n_layers)):
        raise InputError(
            f"layers is {wanted}; pass at least one of 0 to {n_layers - 1}, without repeats"
        )
    return wanted
