"""Facts as a model reads them: the edited token, in the bare prompt and after sampled prefixes.

What a matrix reads at that token is the fact's key. Prefixes are prepended as text, and the token
is found by its position in the text, because joined texts may be tokenized differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts, tokenize_prompts
from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import stopped_after
from backward_lens_tl.models.sites import HookPointSite, MatrixSite
from backward_lens_tl.models.vocabulary import Span

FactToken = Literal["subject_last", "last"]
"""The token at which a fact is edited: the last token of its subject, or of the prompt."""

_ESSENCE = " is a"
_REQUESTS = 16
_TOP_K = 5


@dataclass(frozen=True)
class FactContexts:
    """One request in several contexts.

    Attributes:
        rows: Token ids of the prompt in each context; the first is the bare prompt.
        positions: Index of the edited token in each context.
        target: Token ids of the target.
        essence: Token ids of `"<subject> is a"` up to the edited token; `None` without a subject.
    """

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    target: tuple[int, ...]
    essence: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        host: Host,
        asked: TokenizedRequest,
        prefixes: Sequence[str],
        fact_token: FactToken,
        prepend_bos: bool | None,
    ) -> FactContexts:
        """Put a request into the bare prompt and after each prefix.

        Args:
            host: The model.
            asked: The request.
            prefixes: Texts to prepend.
            fact_token: Which token is edited.
            prepend_bos: Whether texts get a BOS token.

        Returns:
            The request in its contexts.

        Raises:
            EditError: If the subject's last token is edited and there is no subject, or prefix,
                prompt and target are longer than the model's context.
        """
        request = asked.request
        is_subject = fact_token == "subject_last"
        position = asked.needed_subject if is_subject else len(asked.prompt) - 1
        n_after = len(asked.text) - asked.spans[position][1]
        rows, positions = [asked.prompt], [position]
        for prefix in prefixes:
            longer = EditRequest(prefix + request.prompt, request.target)
            found = tokenize_request(host, longer, prepend_bos)
            rows.append(found.prompt)
            last = len(found.prompt) - 1
            at = _token_before(found.text, found.spans, n_after) if is_subject else last
            positions.append(at)
        essence = None
        if request.subject is not None:
            [about] = tokenize_prompts(host, request.subject.strip() + _ESSENCE, prepend_bos)
            last = len(about.ids) - 1
            if is_subject:
                last = _token_before(about.text, about.spans, len(_ESSENCE))
            # The tokens after it have no effect on it.
            essence = about.ids[: last + 1]
        return cls(tuple(rows), tuple(positions), asked.target, essence)

    @property
    def bare(self) -> FactContexts:
        """The request in the bare prompt alone."""
        return replace(self, rows=self.rows[:1], positions=self.positions[:1])


def _token_before(text: str, spans: Sequence[Span], n_after: int) -> int:
    """The token of the character that is followed by `n_after` characters."""
    at = len(text) - n_after - 1
    covering = [token for token, (start, end) in enumerate(spans) if start <= at < end]
    if not covering:
        raise EditError(
            f"the subject's last character has no token of its own in {text!r}; pass another "
            "subject, or fact_token='last'"
        )
    return covering[-1]


@dataclass(frozen=True)
class FactActivations:
    """Activations at the edited token, in each context of one request.

    Attributes:
        keys: What the matrix reads.
        values: What it writes, `x @ W + b`.
        points: The values at hook points.
    """

    keys: Float[Tensor, "context d_in"]
    values: Float[Tensor, "context d_out"]
    points: tuple[Float[Tensor, "context _"], ...]


def read_facts(
    host: Host,
    facts: Sequence[FactContexts],
    site: MatrixSite,
    points: Sequence[HookPointSite] = (),
    *,
    last: int | None = None,
) -> list[FactActivations]:
    """Run a model on requests, several per forward pass, and keep the activations of each.

    Args:
        host: The model.
        facts: The requests.
        site: The matrix.
        points: Hook points.
        last: The last layer that has any of them; the matrix's by default. Those above do not run.

    Returns:
        The activations of each request, in at least float32.
    """
    found: list[FactActivations] = []
    for begin in range(0, len(facts), _REQUESTS):
        some = facts[begin : begin + _REQUESTS]
        batch = pad_prompts(host, [row for fact in some for row in fact.rows])
        with stopped_after(host, site.layer if last is None else last):
            seen = forward_pass(host, batch, inputs=[site], outputs=[site], points=points)
        at = [position for fact in some for position in fact.positions]
        counts = [len(fact.rows) for fact in some]
        split = [
            at_least_float32(values[range(len(at)), at]).split(counts)
            for values in (*seen.inputs, *seen.outputs, *seen.points)
        ]
        found += [
            FactActivations(keys, values, tuple(own))
            for keys, values, *own in zip(*split, strict=True)
        ]
    return found


def sampled_prefixes(
    host: Host, starts: Sequence[str], lengths: Sequence[int], seed: int
) -> tuple[str, ...]:
    """Sample sentences from a model, to be prepended to prompts.

    Args:
        host: The model.
        starts: The start of each sentence; `""` stands for the tokenizer's BOS or EOS token.
        lengths: Tokens of each sentence, its start included.
        seed: Seed of the random numbers.

    Returns:
        Texts that end in `". "`.

    Raises:
        EditError: If the model has no tokenizer, or the tokenizer has no token to start with.
    """
    tokenizer = host.tokenizer
    if tokenizer is None:
        raise EditError("the model has no tokenizer, so no prefixes can be sampled; set one on it")
    first = [
        int(token_id)
        for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        if token_id is not None and 0 <= token_id < host.d_vocab
    ][:1]
    if not first and "" in starts:
        raise EditError("the tokenizer has neither a BOS nor an EOS token to sample prefixes from")
    prompts = [tokenize_prompts(host, start, False)[0].ids if start else first for start in starts]
    n_new = [max(1, n - len(prompt)) for n, prompt in zip(lengths, prompts, strict=True)]
    # Hashed, so that consecutive seeds have no prefix in common.
    seeds = [
        int(sha256(f"{seed} {place}".encode()).hexdigest()[:15], 16) for place in range(len(starts))
    ]
    drawn = sample(host, prompts, n_new, top_k=_TOP_K, seeds=seeds)
    texts = [
        start + host.vocabulary.decode(tokens) if tokens else start
        for start, tokens in zip(starts, drawn, strict=True)
    ]
    return tuple(f"{' '.join(text.split())}. " for text in texts)
