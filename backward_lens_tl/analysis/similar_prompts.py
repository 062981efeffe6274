"""Which examples teach a prompt's target, and which unteach it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, checked_count
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.errors import InputError
from backward_lens_tl.result import BackwardLensResult

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("query", "prompt", "text", "target", "cosine", "inner", "effect")
_EFFECTS = {1: "lowers the loss", -1: "raises the loss"}


def most_similar(
    examples: GradientCapture | BackwardLensResult,
    queries: GradientCapture | BackwardLensResult | None = None,
    k: int = 5,
    *,
    of: Literal["cosine", "inner"] = "cosine",
) -> pd.DataFrame:
    """The examples whose updates help a query most, and those that undo what it needs.

    A step of gradient descent on an example with learning rate `lr` changes the loss of the query
    by `-lr` times the inner product of their gradients, to first order, if it changes the captured
    matrices. Gradients of long vectors have large inner products with all others; the cosine
    compares directions only.

    Args:
        examples: The gradients of the examples, such as a training set, or a result.
        queries: Those of the queries, of the same matrices and layers; `None` for the examples
            themselves, each compared with all others.
        k: Number of examples at either end; fewer if fewer have an effect of that sign.
        of: What to order by.

    Returns:
        One row per query and example, those that help most first: `query` and `prompt` (numbers),
        `text` and `target` of the example (missing without a target), `cosine` and `inner` of the
        two gradients, and `effect` of a step on the example: `"lowers the loss"` of the query or
        `"raises the loss"`. Examples and queries with a gradient of zero are left out.

    Raises:
        InputError: If the gradients are of different matrices, layers or weights, or an argument is
            not usable.

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
    known = _capture_of("examples", examples)
    asked = None if queries is None else _capture_of("queries", queries)
    similarity = known.similarity(asked)
    cosines = similarity.cosine
    if asked is None:
        cosines.fill_diagonal_(torch.nan)
    scores = (cosines if of == "cosine" else similarity.inner).where(~cosines.isnan(), torch.nan)
    rows: list[dict[str, Any]] = []
    for query in range(scores.shape[1]):
        for sign, effect in _EFFECTS.items():
            found = _most(sign * scores[:, query], k)
            rows += [
                {
                    "query": query,
                    "prompt": prompt,
                    "text": known.prompt(prompt),
                    "target": known.target_texts and known.target_texts[prompt],
                    "cosine": float(cosines[prompt, query]),
                    "inner": float(similarity.inner[prompt, query]),
                    "effect": effect,
                }
                for prompt in (found if sign > 0 else reversed(found))
            ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


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
