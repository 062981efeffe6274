"""Which examples teach a prompt's target, and which unteach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, checked_count
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.similarity import Similarity
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.run import Sweep, compared

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("query", "prompt", "text", "target", "cosine", "inner", "effect")
_EFFECTS = {1: "lowers the loss", -1: "raises the loss"}


def most_similar(
    examples: GradientCapture | BackwardLensResult | Sweep,
    queries: GradientCapture | BackwardLensResult | None = None,
    k: int = 5,
    *,
    of: Literal["cosine", "inner"] = "cosine",
) -> pd.DataFrame:
    """The examples whose updates help a query most, and those that undo what it needs.

    A step of gradient descent on an example with learning rate `lr` changes the loss of the query
    by `-lr` times the inner product of their gradients, to first order, if it changes the captured
    matrices. Long gradients have large inner products with all others; the cosine
    compares directions only.

    Args:
        examples: The gradients of the examples, such as a training set, a result, or a sweep that
            kept the factors of its gradients.
        queries: Those of the queries, of the same matrices and layers; `None` for the examples
            themselves, each compared with all others.
        k: Number of examples at either end; fewer if fewer have an effect of that sign.
        of: What to order by.

    Returns:
        One row per query and example, those that help most first: `query` and `prompt` (numbers;
        of a sweep, `prompt` is the row of the data), `text` and `target` of the example (missing
        without a target), `cosine` and `inner` of the two gradients, and `effect` of a step on the
        example: `"lowers the loss"` of the query or `"raises the loss"`. Examples and queries with
        a gradient of zero are left out.

    Raises:
        InputError: If the gradients are of different matrices, layers or weights, or an argument is
            not usable.
        SweepError: If the sweep has not kept the factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["The capital of France is", "Obama grew up in", "Messi plays for"]
        >>> examples = blt.backward_lens(model, prompts, [" Paris", " Hawaii", " Barcelona"])
        >>> query = blt.backward_lens(model, "The capital of Italy is", " Rome")
        >>> table = blt.analysis.most_similar(examples, query, k=1)
        >>> table[["text", "effect"]].values.tolist()[0]
        ['The capital of France is', 'lowers the loss']
    """
    import pandas as pd

    k = checked_count("k", k)
    check_choice("of", of, ("cosine", "inner"))
    asked = None if queries is None else _capture_of("queries", queries)
    known = _compared(examples, asked)
    cosines, inner = known.similarity.cosine, known.similarity.inner
    if asked is None:
        cosines.fill_diagonal_(torch.nan)
    scores = (cosines if of == "cosine" else inner).where(~cosines.isnan(), torch.nan)
    rows: list[dict[str, Any]] = []
    for query in range(scores.shape[1]):
        for sign, effect in _EFFECTS.items():
            found = _most(sign * scores[:, query], k)
            rows += [
                {
                    "query": query,
                    "prompt": known.numbers[place],
                    "text": known.texts[place],
                    "target": known.targets[place],
                    "cosine": float(cosines[place, query]),
                    "inner": float(inner[place, query]),
                    "effect": effect,
                }
                for place in (found if sign > 0 else reversed(found))
            ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


class _Compared(NamedTuple):
    """The examples, and their similarities to the queries.

    Attributes:
        similarity: Of the gradients.
        numbers: The number of each example.
        texts: Its prompt.
        targets: Its target, if it has one.
    """

    similarity: Similarity
    numbers: Sequence[int]
    texts: Sequence[str]
    targets: Sequence[str | None]


def _compared(examples: object, asked: GradientCapture | None) -> _Compared:
    if isinstance(examples, Sweep):
        if asked is None:
            raise InputError(
                "queries is None; pass the gradients to compare a sweep with, as returned by "
                "capture_gradients or backward_lens"
            )
        rows, similarity = compared(examples, asked, "all")
        prompts = examples.prompts().set_index("prompt").loc[rows]
        return _Compared(similarity, rows, prompts["text"].tolist(), prompts["target"].tolist())
    known = _capture_of("examples", examples)
    numbers = range(len(known.mask))
    targets = known.target_texts or [None] * len(numbers)
    texts = [known.prompt(number) for number in numbers]
    return _Compared(known.similarity(asked), numbers, texts, targets)


def _most(scores: Float[Tensor, "n"], k: int) -> list[int]:
    """The largest scores that are positive, the largest first."""
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:k]
    best: list[int] = order[scores[order] > 0].tolist()
    return best


def _capture_of(name: str, source: object) -> GradientCapture:
    found = source.capture if isinstance(source, BackwardLensResult) else source
    if not isinstance(found, GradientCapture):
        raise InputError(
            f"{name} is a {type(source).__name__}; pass what capture_gradients or backward_lens "
            "returned"
        )
    return found
