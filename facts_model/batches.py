"""Token windows drawn from the corpus."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from facts_model.corpus import Corpus

ANSWER_WEIGHT = 3.0
# (rows, tokens per row): every shape has the same number of tokens, so every step costs the same.
# Short rows contain more document starts; long rows train every position of the context.
SHAPES = ((16, 64), (8, 128), (4, 256))


@dataclass(frozen=True)
class Batch:
    """One training step's windows.

    Attributes:
        tokens: Token ids, shape (rows, length).
        weights: Weight of each token as a prediction target, shape (rows, length).
        subjects: At the last token of a subject's name the subject's index in
            ``Corpus.subjects``, elsewhere -1; shape (rows, length).
    """

    tokens: Tensor
    weights: Tensor
    subjects: Tensor


@dataclass
class _Window:
    """One window while it is being filled."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    subjects: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float = 1.0, subject: int = -1) -> None:
        """Append tokens. The subject is assigned to the last one."""
        self.tokens += ids
        self.weights += [weight] * len(ids)
        self.subjects += [-1] * (len(ids) - 1) + [subject]


class BatchSampler:
    """Packs newly drawn documents into windows."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, eos_id: int, seed: int) -> None:
        """Prepare an endless, seeded sequence of batches.

        Args:
            corpus: Source of documents.
            tokenizer: Byte-level BPE without prefix space.
            eos_id: Token that ends a document.
            seed: Seed of the sampling.
        """
        self._rng = random.Random(seed)
        self._documents = corpus.documents(self._rng)
        self._eos_id = eos_id
        self._subject_index = {name: index for index, name in enumerate(corpus.subjects)}

        # Pieces end where the pre-tokenizer splits, so they can be encoded separately.
        @lru_cache(maxsize=50_000)
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text).ids)

        self._encode = encode

    def __iter__(self) -> Iterator[Batch]:
        """Draw batches endlessly."""
        while True:
            rows, length = self._rng.choice(SHAPES)
            windows = [self._window(length) for _ in range(rows)]
            yield Batch(
                tokens=torch.tensor([window.tokens[:length] for window in windows]),
                weights=torch.tensor([window.weights[:length] for window in windows]),
                subjects=torch.tensor([window.subjects[:length] for window in windows]),
            )

    def _window(self, length: int) -> _Window:
        """Fill one window with documents; half of the windows start with the end-of-text token."""
        window = _Window()
        if self._rng.random() < 0.5:
            window.add([self._eos_id])
        while len(window.tokens) < length:
            for piece in next(self._documents):
                ids = self._encode(piece.text)
                if piece.role == "answer":
                    window.add(ids, weight=ANSWER_WEIGHT)
                elif piece.role == "subject":
                    window.add(ids, subject=self._subject_index[piece.text.strip()])
                else:
                    window.add(ids)
            window.add([self._eos_id])
        return window
