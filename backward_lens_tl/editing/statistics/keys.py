"""Where a model reads a fact: the token that is edited, in the bare prompt and behind prefixes.

What a matrix reads there is the fact's key. A prefix is put in front as text, and the token is
found again by its place in the text: tokens of two texts side by side need not be those of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_kind
from backward_lens_tl.capture.prompts import tokenize_prompts
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.editing.statistics.activations import activations
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.models.vocabulary import Span

FactToken = Literal["subject_last", "last"]
"""The token at which a fact is edited: its subject's last one, or the prompt's."""

Moments = SecondMoments | Literal["identity"] | None
"""Statistics that keys are whitened with; `"identity"` says that they are not."""

_ESSENCE = " is a"
_REQUESTS = 16


@dataclass(frozen=True)
class FactContexts:
    """One request as a model reads it in several contexts.

    Attributes:
        rows: Token ids of the prompt in each context; the first is the bare prompt.
        positions: Index of the fact's token in each.
        target: Token ids of the target.
        essence: Token ids of `"<subject> is a"` up to the fact's token; `None` without a subject.
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
        """Put prefixes in front of a request.

        Args:
            host: The model.
            asked: The request.
            prefixes: Texts; the bare prompt comes before them by itself.
            fact_token: Which token is edited.
            prepend_bos: Whether texts get a BOS token; `None` is the model's own default.

        Returns:
            The request in the bare prompt and behind each prefix.

        Raises:
            EditError: If the request names no subject and the edit is made there, or prefix,
                prompt and target are longer than the model's context.
        """
        request = asked.request
        is_subject = fact_token == "subject_last"
        position = asked.needed_subject if is_subject else len(asked.prompt) - 1
        behind = len(asked.text) - asked.spans[position][1]
        rows, positions = [asked.prompt], [position]
        for prefix in prefixes:
            longer = EditRequest(prefix + request.prompt, request.target)
            found = tokenize_request(host, longer, prepend_bos)
            rows.append(found.prompt)
            last = len(found.prompt) - 1
            positions.append(_token_before(found.text, found.spans, behind) if is_subject else last)
        essence = None
        if request.subject is not None:
            [about] = tokenize_prompts(host, request.subject.strip() + _ESSENCE, prepend_bos)
            last = len(about.ids) - 1
            if is_subject:
                last = _token_before(about.text, about.spans, len(_ESSENCE))
            # No token sees those behind it, and nothing is read there.
            essence = about.ids[: last + 1]
        return cls(tuple(rows), tuple(positions), asked.target, essence)


@dataclass(frozen=True)
class Reads:
    """What matrices read and wrote at the fact's token, in each context of one request.

    Attributes:
        keys: `x` of each layer's matrix.
        values: `x @ W + b` of each.
        resid: The residual stream after each layer asked for.
    """

    keys: Mapping[int, Float[Tensor, "context d_in"]]
    values: Mapping[int, Float[Tensor, "context d_out"]]
    resid: Mapping[int, Float[Tensor, "context d_model"]]


def read_facts(
    host: Host,
    facts: Sequence[FactContexts],
    sites: Sequence[MatrixSite],
    resid_layers: Sequence[int] = (),
) -> list[Reads]:
    """Run a model on requests, some at a time.

    Args:
        host: The model.
        facts: The requests.
        sites: Matrices of one name, of different layers.
        resid_layers: Layers after which the residual stream is read.

    Returns:
        What was read and written for each request.
    """
    found: list[Reads] = []
    for begin in range(0, len(facts), _REQUESTS):
        some = facts[begin : begin + _REQUESTS]
        seen = activations(host, [row for fact in some for row in fact.rows], sites, resid_layers)
        places = [position for fact in some for position in fact.positions]
        counts = [len(fact.rows) for fact in some]

        def split(
            every: Mapping[int, Tensor], at: list[int] = places, of: list[int] = counts
        ) -> list[dict[int, Tensor]]:
            rows = {layer: own[range(len(at)), at].split(of) for layer, own in every.items()}
            return [{layer: own[i] for layer, own in rows.items()} for i in range(len(of))]

        kept = (
            split({layer: own for (_, layer), own in seen.inputs.items()}),
            split({layer: own for (_, layer), own in seen.outputs.items()}),
            split(seen.resid),
        )
        found += [Reads(*each) for each in zip(*kept, strict=True)]
    return found


def whitened(
    moments: SecondMoments | Literal["identity"],
    layer: int,
    keys: Float[Tensor, "d_in n"],
    ridge: float,
) -> Float[Tensor, "d_in n"]:
    """`C^-1 K`.

    Args:
        moments: Holds `C`.
        layer: The layer.
        keys: The keys, as columns.
        ridge: Part of the mean variance that is added to the diagonal of `C`.

    Returns:
        The solution, in float64.
    """
    return keys.double() if isinstance(moments, str) else moments.solve(layer, keys, ridge)


def checked_moments(
    host: Host, moments: Moments, layers: Sequence[int]
) -> SecondMoments | Literal["identity"]:
    """Statistics that are there, and are of the model.

    Args:
        host: The model.
        moments: What was passed.
        layers: The layers that they are needed of.

    Returns:
        The same.

    Raises:
        EditError: If there are none, or they are of another model, matrix or layer.
    """
    listed = ", ".join(map(str, layers))
    if moments is None:
        raise EditError(
            "there are no second moments to whiten keys with; collect them with "
            f"second_moments(model, texts, layers=[{listed}]), take facts_moments() for the facts "
            "model, or pass moments='identity' to do without (which harms other facts)"
        )
    if isinstance(moments, str):
        if moments != "identity":
            raise EditError(f"moments is {moments!r}; pass SecondMoments, or 'identity' for none")
        return moments
    check_kind("moments", moments, SecondMoments, "second_moments(model, texts)", EditError)
    if moments.matrix != "W_out":
        raise EditError(
            f"these statistics are of what {moments.matrix} reads, and W_out is edited; collect "
            f"them with second_moments(model, texts, matrix='W_out', layers=[{listed}])"
        )
    moments.check(host, layers)
    return moments


def _token_before(text: str, spans: Sequence[Span], behind: int) -> int:
    """The token of the last character that has so many characters behind it."""
    character = len(text) - behind - 1
    covering = [at for at, span in enumerate(spans) if _is_in(character, span)]
    if not covering:
        raise EditError(
            f"the subject's last character has no token of its own in {text!r}; pass another "
            "subject, or fact_token='last'"
        )
    return covering[-1]


def _is_in(character: int, span: Span) -> bool:
    return span[0] <= character < span[1]
