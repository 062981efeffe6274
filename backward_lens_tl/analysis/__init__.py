"""The paper's analyses: each turns a sweep, a result or one of their tables into a small table.

For a result, analyses by segment take the table `to_df(subject)`, which needs the subject.

`gradient_ranks` and `rank_exceptions` are figure 4; `norms_by_segment` and `norm_correlation`
figures 6, 16 and 17; `token_ranks_by_segment` figures 7 and 18 to 21; `neuron_tokens`,
`spanning_tokens` and `neuron_overlap` appendix B, and `top_neurons` its reading of single neurons
in all layers; `step_changes` lemma 5.2. `principal_directions` reads the gradient of a batch, and
`most_similar` compares the gradients of prompts. `exact_effects` computes what updates change in
the model's output, which readings of the updates approximate.
"""

from backward_lens_tl.analysis.by_segment import (
    norm_correlation,
    norms_by_segment,
    token_ranks_by_segment,
)
from backward_lens_tl.analysis.directions import principal_directions
from backward_lens_tl.analysis.effects import exact_effects
from backward_lens_tl.analysis.neuron_ranking import top_neurons
from backward_lens_tl.analysis.neurons import neuron_overlap, neuron_tokens, spanning_tokens
from backward_lens_tl.analysis.ranks import gradient_ranks, rank_exceptions
from backward_lens_tl.analysis.similar_prompts import most_similar
from backward_lens_tl.analysis.steps import step_changes

__all__ = [
    "exact_effects",
    "gradient_ranks",
    "most_similar",
    "neuron_overlap",
    "neuron_tokens",
    "norm_correlation",
    "norms_by_segment",
    "principal_directions",
    "rank_exceptions",
    "spanning_tokens",
    "step_changes",
    "token_ranks_by_segment",
    "top_neurons",
]
