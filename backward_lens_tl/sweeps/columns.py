"""The tables of a sweep, column by column. Their names, types and order are stable."""

from __future__ import annotations

from backward_lens_tl.runs.columns import Column, Tables
from backward_lens_tl.runs.columns import key_column as _key

_PROMPT = _key("prompt", "int64", "row of the data, from 0")

PROMPTS = (
    _PROMPT,
    _key("id", "string", "the data's own id of the row"),
    _key("text", "string", "the prompt"),
    _key("subject", "string", "the subject, if the data have one"),
    _key("target", "string", "text of the target token"),
    _key("target_id", "int64", "its id"),
    _key("answer", "string", "the model's own most probable token"),
    _key("answer_id", "int64", "its id"),
    _key("true_answer", "string", "the data's original answer, if there is one"),
    _key(
        "is_correct",
        "bool",
        "whether the answer is the original answer's first token",
        may_miss=True,
    ),
    _key("n_tokens", "int32", "tokens of the prompt"),
    _key("loss", "float64", "of the target, in nats"),
)
"""One row per prompt that was analysed."""

REJECTS = (
    _PROMPT,
    _key("id", "string", "the data's own id of the row"),
    _key("reason", "string", "row, prompt, length, target, subject or numbers"),
    _key("problem", "string", "what was wrong"),
)
"""One row per row of the data that was not analysed."""

GRADIENTS = (
    _PROMPT,
    _key("matrix", "string", "TransformerLens's name of the matrix"),
    _key("layer", "int32", "the layer, from 0"),
    Column("is_last_layer", "bool", "whether it is the model's last one"),
    Column("n_tokens", "int32", "tokens of the prompt"),
    Column("n_writing", "int32", "positions that contribute to the gradient"),
    Column("loss", "float64", "of the target, in nats"),
    Column("rank", "int32", "rank of the gradient", may_miss=True),
    Column("largest_rank", "int32", "min(n_writing, d_in, d_out), lemma 4.1", may_miss=True),
    Column("input_rank", "int32", "rank of the x_i", may_miss=True),
    Column("vjp_rank", "int32", "rank of the delta_i", may_miss=True),
    Column("norm", "float64", "Frobenius norm of the gradient"),
    Column("top_energy", "float64", "fraction of the sum of squares in the largest singular value"),
    Column("rank_99", "int32", "singular values with 99 % of the sum of squares", may_miss=True),
    Column("singular_values", "list<float64>", "all that can be nonzero", is_default=False),
)
"""One row per prompt, matrix and layer."""

POSITIONS = (
    _PROMPT,
    _key("matrix", "string", "TransformerLens's name of the matrix"),
    _key("layer", "int32", "the layer, from 0"),
    _key("position", "int32", "index in the prompt, from 0"),
    _key("token", "string", "the prompt's token there"),
    _key("segment", "string", "segment of the prompt around its subject; missing without one"),
    _key(
        "projection", "string", "logit_lens, normalized, cosine, or jacobian_lens, in separate rows"
    ),
    Column("norm", "float32", "norm of delta_i"),
    Column("input_norm", "float32", "norm of x_i"),
    Column("write_norm", "float32", "product of both: norm of the term that is written"),
    Column(
        "top_vjp_cosine",
        "float32",
        "cosine of the spanning vector and the last VJP of the last layer's W_out, if measured",
    ),
    Column("is_zero", "bool", "whether the position adds nothing; its tokens are then meaningless"),
    Column("is_faint", "bool", "whether the final norm's eps outweighs the vector"),
    Column("target_rank", "int32", "tokens that score above the target", may_miss=True),
    Column("answer_rank", "int32", "tokens that score above the model's answer", may_miss=True),
    Column("entropy", "float32", "of the softmax of the scores, in nats"),
    Column("top_tokens", "list<string>", "tokens with the largest scores, largest first"),
    Column("top_scores", "list<float32>", "these scores"),
    Column("bottom_tokens", "list<string>", "tokens with the smallest scores, smallest first"),
    Column("bottom_scores", "list<float32>", "these scores"),
)
"""One row per prompt, matrix, layer, position and projection."""

TABLES: Tables = {
    "positions": POSITIONS,
    "gradients": GRADIENTS,
    "rejects": REJECTS,
    "prompts": PROMPTS,
}
"""The tables in writing order: a shard is finished once its prompts are written."""
