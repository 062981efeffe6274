"""The calls of `transformer_lens.tools.analysis.BackwardLens`, computed by this package.

TransformerLens 3.9 to 4.2 had its own Backward Lens. Code written for it runs with

    from backward_lens_tl.compat import BackwardLens

on every model that this package supports. Names, defaults, shapes and error types are those of
TransformerLens: tensors are copies on the CPU, in float32 or int64, and gradients have the sign
that descent *subtracts*. New code should use
[`backward_lens`][backward_lens_tl.lens.backward_lens]; `docs/migration.md` compares the two.
"""

from backward_lens_tl.compat.errors import AnalysisError, ArgumentTypeError, LayerNotAnalyzedError
from backward_lens_tl.compat.factors import LinearGradientFactors, WeightLayout
from backward_lens_tl.compat.lens import DEFAULT_TOP_K, BackwardLens
from backward_lens_tl.compat.results import (
    BackwardLensLayerResult,
    BackwardLensMatrixResult,
    BackwardLensResult,
    ProjectedFactor,
    VocabularyRanking,
)

__all__ = [
    "DEFAULT_TOP_K",
    "AnalysisError",
    "ArgumentTypeError",
    "BackwardLens",
    "BackwardLensLayerResult",
    "BackwardLensMatrixResult",
    "BackwardLensResult",
    "LayerNotAnalyzedError",
    "LinearGradientFactors",
    "ProjectedFactor",
    "VocabularyRanking",
    "WeightLayout",
]
