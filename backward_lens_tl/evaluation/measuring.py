"""The rows of one shard of an evaluation: an edit, and what is measured under it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from backward_lens_tl.capture.memory import is_lack_of_memory
from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.editing.outcomes import EditReport
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import BackwardLensError, ModelStateError
from backward_lens_tl.evaluation.columns import PASSES
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.costs import with_cost
from backward_lens_tl.evaluation.divergence import Moved, moved
from backward_lens_tl.evaluation.metrics import (
    Answered,
    begins_with,
    mean,
    ngram_entropy,
    record_metrics,
    tidied,
)
from backward_lens_tl.evaluation.perplexity import Texts
from backward_lens_tl.evaluation.plan import Item, Shard
from backward_lens_tl.evaluation.scoring import Question, batches, score
from backward_lens_tl.evaluation.text_scores import TextScorer
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_checksum
from backward_lens_tl.runs.shards import Rows

_BEYOND = 3
"""Tokens generated after the new answer, to check whether its last word ends there."""

_NEIGHBOR = "neighborhood"

_Rows = list[dict[str, Any]]
_linalg: Any = torch.linalg  # its error has no type
_NO_EDIT = WeightDelta((), {})


class Bench:
    """A model and what is measured on it.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        config: The settings.
        texts: What perplexity is measured on.
    """

    def __init__(self, model: nn.Module, config: EvaluationConfig, texts: Texts) -> None:
        self.model = model
        self.host = host_of(model)
        self.config = config
        self._text_rows = texts.tokens(self.host, config)
        self._devices = {tensor.device for tensor in self.host.parameters().values()}
        self._unedited = self._weights()

    def measure(self, shard: Shard) -> Rows:
        """Apply an edit temporarily, and measure the model under it.

        A shard whose edit fails is measured on the unedited model, with the reason.

        Args:
            shard: The shard.

        Returns:
            The rows of each table.

        Raises:
            ModelStateError: If the weights are no longer those of the unedited model.
        """
        (delta, error), cost = with_cost(partial(self._edit, shard), self._devices)
        neighbors = self._neighbors(delta, shard.items)
        texts = self._texts_scorer
        with delta.applied(self.model):
            answered = self._answered(shard.items, neighbors)
            generations = self._generations(shard)
            continuations = self._continuations(shard.items)
            on_texts = texts.edited() if len(delta) else texts.unedited
        if self._weights() != self._unedited:
            raise ModelStateError(
                f"the weights of {self.host.name!r} changed by the edit {shard.name!r} or during "
                "it; methods must not change the model. Load the model again"
            )
        shared = {"method": shard.name, "block": shard.block}
        common = {
            **shared,
            "error": error,
            "perplexity": on_texts.perplexity.mean_of_texts,
            "corpus_perplexity": on_texts.perplexity.corpus,
            "text_kl": on_texts.kl,
            "norm": delta.norm,
            "rank": delta.rank,
        }
        edits = [
            {**common, **self._edit_row(item, own, text, generations), **report}
            for item, own, text, report in zip(
                shard.items, answered, continuations, _reported(delta, len(shard)), strict=True
            )
        ]
        seconds, memory = cost.seconds / max(1, len(shard)), cost.memory
        if shard.method is None:
            seconds = memory = math.nan
        return {
            "prompts": self._prompt_rows(shard, answered),
            "generations": generations,
            "rejects": shard.rejects,
            "costs": [{**shared, "seconds": seconds, "memory": memory}] if shard.items else [],
            "edits": edits,
        }

    def _weights(self) -> str:
        return tensors_checksum(self.host.parameters())

    def _edit(self, shard: Shard) -> tuple[WeightDelta, str | None]:
        """A method's edit of the shard's records; if it failed, an empty one and the reason."""
        if shard.method is None:
            return _NO_EDIT, None
        try:
            delta = shard.method(self.model, [item.request for item in shard.items])
        except (BackwardLensError, MemoryError, RuntimeError) as error:
            is_known = isinstance(error, BackwardLensError | _linalg.LinAlgError)
            if not is_known and not is_lack_of_memory(error):
                raise  # a bug, whatever the request
            return _NO_EDIT, str(error)
        for each in delta:
            factors = (each.left, each.right, each.values, each.bias)
            if not all(bool(factor.isfinite().all()) for factor in factors if factor is not None):
                return _NO_EDIT, f"the change of {each.matrix} in layer {each.layer} is not finite"
        return delta, None

    # --- what is measured ------------------------------------------------------------------------

    def _answered(self, items: Sequence[Item], neighbors: Iterator[Moved]) -> list[list[Answered]]:
        probes = [probe for item in items for probe in item.probes]
        questions = [
            Question(probe.ids, answer)
            for probe in probes
            for answer in (probe.new, probe.true)
            if answer is not None
        ]
        scores = iter(score(self.host, questions, self.config.batch_size))
        return [
            [
                Answered(
                    probe,
                    next(scores),
                    None if probe.true is None else next(scores),
                    next(neighbors) if probe.kind == _NEIGHBOR else None,
                )
                for probe in item.probes
            ]
            for item in items
        ]

    def _neighbors(self, delta: WeightDelta, items: Sequence[Item]) -> Iterator[Moved]:
        """What the edit does to all neighbors, in their order."""
        probes = [probe for item in items for probe in item.probes if probe.kind == _NEIGHBOR]
        prompts = [probe.ids for probe in probes]
        return iter(moved(self.model, self.host, delta, prompts, self.config.batch_size))

    def _continuations(self, items: Sequence[Item]) -> list[str | None]:
        """The model's own continuation of each record's prompt."""
        if not self.config.continuations:
            return [None] * len(items)
        prompts = [item.probes[0].ids for item in items]
        lengths = [len(item.probes[0].new) + _BEYOND for item in items]
        texts = self._sampled(prompts, lengths, top_k=1, seeds=[0] * len(items))
        # Decoders may drop the space at the beginning of a text, but not after a prompt.
        return [text[len(self._text(ids)) :] for ids, text in zip(prompts, texts, strict=True)]

    def _generations(self, shard: Shard) -> _Rows:
        asked = [
            (item.record.index, place, ids)
            for item in shard.items
            for place, ids in enumerate(item.generations)
        ]
        prompts = [ids for _, _, ids in asked]
        lengths = [max(0, self.config.generation_length - len(ids)) for ids in prompts]
        seeds = [_seed(self.config.seed, record, place) for record, place, _ in asked]
        texts = self._sampled(prompts, lengths, top_k=self.config.top_k, seeds=seeds)
        return [
            {
                "method": shard.name,
                "record": record,
                "index": place,
                "prompt": self._text(ids),
                "text": tidied(text),
                "ngram_entropy": ngram_entropy(tidied(text)),
            }
            for (record, place, ids), text in zip(asked, texts, strict=True)
        ]

    def _sampled(
        self, prompts: Sequence[Sequence[int]], lengths: list[int], *, top_k: int, seeds: list[int]
    ) -> list[str]:
        """Prompts with their continuations."""
        drawn: list[list[int]] = []
        for some in batches(zip(prompts, lengths, seeds, strict=True), self.config.batch_size):
            ids, n_tokens, own_seeds = zip(*some, strict=True)
            with self.host.own_precision():
                drawn += sample(self.host, ids, n_tokens, top_k=top_k, seeds=own_seeds)
        return [self._text([*ids, *more]) for ids, more in zip(prompts, drawn, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        return self.host.vocabulary.decode(ids)

    @cached_property
    def _texts_scorer(self) -> TextScorer:
        """Created on the unedited model, when it is first needed."""
        return TextScorer(self.host, self._text_rows, self.config.denominator)

    # --- rows ------------------------------------------------------------------------------------

    def _prompt_rows(self, shard: Shard, answered: Sequence[Sequence[Answered]]) -> _Rows:
        return [
            {
                "method": shard.name,
                "record": item.record.index,
                "kind": each.probe.kind,
                "index": each.probe.index,
                "prompt": each.probe.prompt,
                "new": item.new_text,
                "true": each.probe.true_text,
                "nll_new": each.new.nll,
                "nll_true": math.nan if each.true is None else each.true.nll,
                "is_new": each.new.is_predicted,
                "is_true": None if each.true is None else each.true.is_predicted,
                "answer": self.host.vocabulary.text(each.new.first),
                "kl": math.nan if each.moved is None else each.moved.kl,
                "is_kept": None if each.moved is None else each.moved.is_kept,
            }
            for item, own in zip(shard.items, answered, strict=True)
            for each in own
        ]

    def _edit_row(
        self,
        item: Item,
        answered: Sequence[Answered],
        continuation: str | None,
        generations: _Rows,
    ) -> dict[str, Any]:
        record = item.record
        entropies = [row["ngram_entropy"] for row in generations if row["record"] == record.index]
        return {
            "record": record.index,
            "id": record.id,
            "prompt": record.prompt,
            "subject": record.subject,
            "target": item.new_text,
            "true_answer": record.answer,
            "answer": self.host.vocabulary.text(answered[0].new.first),
            "continuation": continuation,
            **record_metrics(answered),
            "free_efficacy": math.nan
            if continuation is None
            else float(begins_with(continuation, item.new_text)),
            "ngram_entropy": mean(entropies),
        }


def _reported(delta: WeightDelta, n_items: int) -> list[dict[str, Any]]:
    """What the method says about the edit of each record, if it says anything."""
    report = EditReport.from_about(delta.about)
    if report is None:
        return [dict.fromkeys(("is_reached", *PASSES)) for _ in range(n_items)]
    passes = {name: delta.about.get(name) for name in PASSES}
    return [{"is_reached": each.is_reached, **passes} for each in report.outcomes[:n_items]]


def _seed(seed: int, record: int, place: int) -> int:
    """The seed of one prompt, the same for every method."""
    return int.from_bytes(sha256(f"{seed} {record} {place}".encode()).digest()[:7], "big")
