"""MEND's training data: tokenized records, and the edits that each step draws from them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class Example:
    """One tokenized record.

    Attributes:
        request: The request.
        outer: The request and its paraphrases, each with the same target.
        subject: What it is about.
        neighbors: Prompts with the same relation.
    """

    request: TokenizedRequest
    outer: tuple[TokenizedRequest, ...]
    subject: str | None
    neighbors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DrawnEdit:
    """One edit of a step.

    Attributes:
        request: The request from which the edit is computed.
        outer: What the edited model should predict.
        locality: Prompts on which the edited model should not change.
    """

    request: TokenizedRequest
    outer: TokenizedRequest
    locality: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainingData:
    """All training data.

    Attributes:
        examples: The records.
        locality: Tokenized texts that edits should leave unchanged.
        digest: SHA-256 of all of it.
    """

    examples: tuple[Example, ...]
    locality: dict[str, tuple[int, ...]]
    digest: str

    @classmethod
    def of(
        cls,
        host: Host,
        records: Iterable[Record],
        locality: Sequence[str] | None,
        prepend_bos: bool | None,
    ) -> TrainingData:
        """Tokenize records.

        Args:
            host: The model.
            records: The records.
            locality: Texts that edits should leave unchanged; the records' own by default.
            prepend_bos: Whether texts get a BOS token.

        Returns:
            The data.

        Raises:
            EditError: If there is no record, something is not a record, or `locality` is a text.
        """
        rows = list(records)
        requests = [EditRequest.of(row) for row in rows]
        if not rows:
            raise EditError("records is empty; pass at least one to train on")
        if isinstance(locality, str):
            raise EditError("locality is one text; pass a list of texts")
        texts = locality
        if texts is None:
            texts = [text for row in rows for text in (row.prompt, *row.generation_prompts)]
        known: dict[str, tuple[int, ...]] = {}

        def tokens(text: str) -> tuple[int, ...]:
            if text not in known:
                [prompt] = tokenize_prompts(host, text, prepend_bos)
                known[text] = prompt.ids[: host.n_ctx]
            return known[text]

        examples = []
        for row, request in zip(rows, requests, strict=True):
            paraphrases = [EditRequest(prompt, row.target) for prompt in row.paraphrase_prompts]
            outer = tuple(
                tokenize_request(host, each, prepend_bos) for each in (request, *paraphrases)
            )
            neighbors = tuple(tokens(text) for text in row.neighborhood_prompts)
            examples.append(Example(outer[0], outer, row.subject, neighbors))
        listing = [
            [[[own.prompt, own.target] for own in each.outer], each.subject, each.neighbors]
            for each in examples
        ]
        held = {text: tokens(text) for text in texts}
        digest = hashlib.sha256(json.dumps([listing, list(held)]).encode()).hexdigest()
        return cls(tuple(examples), held, digest)

    def draw(self, training: MENDTraining, seed: int, step: int) -> list[DrawnEdit]:
        """Draw the edits of one step, independently of earlier draws.

        Args:
            training: The settings.
            seed: The seed of the training.
            step: The step, from 0.

        Returns:
            The edits.
        """
        n, n_edits = len(self.examples), training.edits_per_step
        orders: dict[int, list[int]] = {}
        drawn = []
        for place in range(step * n_edits, (step + 1) * n_edits):
            epoch, at = divmod(place, n)
            if epoch not in orders:
                orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(n), n)
            chance = random.Random(f"{seed} {epoch} {at}")
            drawn.append(self._drawn(self.examples[orders[epoch][at]], training.n_locality, chance))
        return drawn

    def _drawn(self, example: Example, n_locality: int, chance: random.Random) -> DrawnEdit:
        half = min(len(example.neighbors), n_locality // 2)
        near = chance.sample(example.neighbors, half)
        own = {outer.prompt for outer in example.outer}
        others = [
            ids
            for text, ids in self.locality.items()
            if ids not in own and (example.subject is None or example.subject not in text)
        ]
        others = others or list(example.neighbors)
        if not others:
            raise EditError(
                f"the edit of {example.request.request.prompt!r} has no prompts that it should "
                "leave unchanged; pass records with neighborhood prompts, or locality texts"
            )
        missing = n_locality - half
        far = (
            chance.sample(others, missing)
            if len(others) >= missing
            else chance.choices(others, k=missing)
        )
        return DrawnEdit(example.request, chance.choice(example.outer), tuple(near + far))
