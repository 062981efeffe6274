"""The tables of an evaluation, column by column. Their names, types and order are stable."""

from __future__ import annotations

from backward_lens_tl.runs.columns import Column, Tables
from backward_lens_tl.runs.columns import key_column as _key

NONE = "none"
"""Name of the method in rows without an edit."""

_METHOD = _key("method", "string", f"name of the method; `{NONE}` is the unedited model")
_RECORD = _key("record", "int64", "row of the data, from 0")
_BLOCK = _key("block", "int32", "index of the records that are edited together")

PASSES = {
    "forward_passes": "forward passes",
    "backward_passes": "backward passes",
    "contrast_prompts": "additional prompts about other subjects,",
}
"""What a method's own report counts."""

PROMPTS = (
    _METHOD,
    _RECORD,
    _key("kind", "string", "rewrite, paraphrase, neighborhood or attribute"),
    _key("index", "int32", "which of the record's prompts of this kind, from 0"),
    _key("prompt", "string", "the prompt"),
    _key("new", "string", "the new answer"),
    _key("true", "string", "the original answer, if there is one"),
    Column("nll_new", "float64", "nll of the new answer, in nats per token"),
    Column("nll_true", "float64", "nll of the original answer; NaN without one"),
    Column("is_new", "bool", "whether every token of the new answer is the most probable one"),
    Column("is_true", "bool", "the same for the original answer", may_miss=True),
    Column("answer", "string", "the most probable token after the prompt"),
    Column("kl", "float64", "KL divergence from the unedited model, in nats; neighborhood only"),
    Column("is_kept", "bool", "whether a neighbor keeps its most probable token", may_miss=True),
)
"""One row per method, record and prompt."""

GENERATIONS = (
    _METHOD,
    _RECORD,
    _key("index", "int32", "which of the record's generation prompts, from 0"),
    _key("prompt", "string", "the prompt"),
    Column("text", "string", "prompt and continuation"),
    Column("ngram_entropy", "float64", "of the text's bigrams and trigrams, in bits"),
)
"""One row per method, record and generation prompt."""

REJECTS = (
    _RECORD,
    _key("id", "string", "the data's own id of the row"),
    _key("reason", "string", "row, prompt, length or target"),
    _key("problem", "string", "what was wrong"),
)
"""One row per row of the data that was not evaluated."""

COSTS = (
    _METHOD,
    _BLOCK,
    Column("seconds", "float64", "time per edit"),
    Column("memory", "float64", "peak memory beyond what was in use, in bytes; NaN if unknown"),
)
"""One row per method and block: the only columns that differ from run to run."""

EDITS = (
    _METHOD,
    _RECORD,
    _BLOCK,
    _key("id", "string", "the data's own id of the row"),
    _key("prompt", "string", "the prompt"),
    _key("subject", "string", "the subject, if the data have one"),
    _key("target", "string", "the new answer"),
    _key("true_answer", "string", "the original answer, if there is one"),
    Column("error", "string", "why the method failed, if it did"),
    Column("answer", "string", "the most probable token after the prompt"),
    Column("continuation", "string", "the model's own continuation, by its most probable tokens"),
    Column("efficacy", "float64", "whether the new answer is the most probable, token by token"),
    Column("free_efficacy", "float64", "whether the continuation begins with the new answer"),
    Column("paraphrase", "float64", "fraction of the paraphrases with `is_new`"),
    Column("neighborhood", "float64", "fraction of the neighbors with `is_true`"),
    Column("efficacy_success", "float64", "ES: whether P(new) > P(true)"),
    Column(
        "paraphrase_success", "float64", "PS: fraction of the paraphrases with P(new) > P(true)"
    ),
    Column(
        "neighborhood_success", "float64", "NS: fraction of the neighbors with P(true) > P(new)"
    ),
    Column("efficacy_magnitude", "float64", "EM: P(new) - P(true)"),
    Column("paraphrase_magnitude", "float64", "PM: mean of P(new) - P(true)"),
    Column("neighborhood_magnitude", "float64", "NM: mean of P(true) - P(new)"),
    Column("kept", "float64", "fraction of the neighbors that keep their most probable token"),
    Column("neighborhood_kl", "float64", "mean of `kl` over the neighbors, in nats"),
    Column("ngram_entropy", "float64", "mean over the record's generations, in bits"),
    Column("text_kl", "float64", "KL divergence from the unedited model on the texts, in nats"),
    Column("perplexity", "float64", "mean of the texts' perplexities under the edit"),
    Column("corpus_perplexity", "float64", "perplexity of all their tokens together"),
    Column("norm", "float64", "Frobenius norm of the edit"),
    Column("rank", "int32", "rank of the edit, summed over its matrices"),
    Column("is_reached", "bool", "whether the method says that the target leads", may_miss=True),
    *(
        Column(name, "int32", f"{meaning} of the edit, if the method reports them", may_miss=True)
        for name, meaning in PASSES.items()
    ),
)
"""One row per method and record."""

TABLES: Tables = {
    "prompts": PROMPTS,
    "generations": GENERATIONS,
    "rejects": REJECTS,
    "costs": COSTS,
    "edits": EDITS,
}
"""The tables in writing order: a shard is finished once its edits are written."""
