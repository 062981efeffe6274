"""The benchmark of editing: CounterFact's metrics of any method, each record from the same weights.

    records x methods ── plan ──▶ parts ── measuring ──▶ rows ── folder ──▶ Parquet, part by part
                                                                          └─ summary ──▶ one table

A part is an edit by one method, of one record or of several at once. Parts are independent: an
evaluation that was stopped goes on with those that are missing, and several processes share them.
"""

from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.folder import Evaluation
from backward_lens_tl.evaluation.rates import least_rates, least_rates_by_layer
from backward_lens_tl.evaluation.run import evaluate
from backward_lens_tl.evaluation.tuning import Search, search

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "Search",
    "evaluate",
    "least_rates",
    "least_rates_by_layer",
    "search",
]
