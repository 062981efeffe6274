"""The paper's figures, of a result or of an analysis's table of thousands of prompts.

Each function takes its numbers from a table of a result, `evaluate` or `backward_lens_tl.analysis`
(`layer_maps` from tensors) and returns a figure without showing it: plotly's by default,
matplotlib's with `backend="matplotlib"`.
"""

from backward_lens_tl.views.figures.batches import principal_directions, similarity
from backward_lens_tl.views.figures.cells import compare, layer_maps, norms
from backward_lens_tl.views.figures.edits import edit_curves, edit_scores, least_rates
from backward_lens_tl.views.figures.gradients import gradient_ranks, singular_values
from backward_lens_tl.views.figures.layers import layer_lines
from backward_lens_tl.views.figures.neurons import neuron_overlap, neuron_similarity
from backward_lens_tl.views.figures.segments import norms_by_segment, token_ranks_by_segment
from backward_lens_tl.views.figures.steps import step_changes
from backward_lens_tl.views.figures.training import training_run
from backward_lens_tl.views.figures.trajectories import target_ranks

__all__ = [
    "compare",
    "edit_curves",
    "edit_scores",
    "gradient_ranks",
    "layer_lines",
    "layer_maps",
    "least_rates",
    "neuron_overlap",
    "neuron_similarity",
    "norms",
    "norms_by_segment",
    "principal_directions",
    "similarity",
    "singular_values",
    "step_changes",
    "target_ranks",
    "token_ranks_by_segment",
    "training_run",
]


def __dir__() -> list[str]:
    return __all__
