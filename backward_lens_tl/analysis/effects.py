"""What an update changes in the model's output: the exact reference for every reading of it.

An update adds `-delta_i` to the output of `W_out` or `W_O`. A lens reads this vector as if the last
layer's norm and unembedding saw it. Here the model's own later layers carry it to the logits, to
first order and in the prompt's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice
from backward_lens_tl.capture.bound_objectives import LossFunction, TargetNLL
from backward_lens_tl.capture.first_order import (
    AddedVector,
    FirstOrderChanges,
    first_order_changes,
)
from backward_lens_tl.capture.forward_backward import Recorded
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import Objective, Targets, target_nll
from backward_lens_tl.capture.plan import CapturePlan, plan_capture
from backward_lens_tl.capture.prompts import Prompts
from backward_lens_tl.capture.selection import select_positions
from backward_lens_tl.choices import Direction, MultiToken, ReadAt
from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import select_matrices
from backward_lens_tl.models.sites import READING_MATRICES, MatrixSite, Site
from backward_lens_tl.readout.topk import checked_k, count_beyond, extremes

if TYPE_CHECKING:
    import pandas as pd

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2}
_HALF_PRECISION_TOLERANCE = 0.5
"""Error of the change of the loss that may be rounding, as a fraction of the largest change of a
logit. Some models compute norms in float32 even in float64."""


def exact_effects(
    model: nn.Module,
    prompts: Prompts,
    target: Targets | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    matrices: str | Sequence[str] = "W_out",
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = -1,
    at: ReadAt = "last",
    direction: Direction = "update",
    k: int = 10,
    prepend_bos: bool | None = None,
    multi_token: MultiToken | None = None,
    memory: Memory | None = None,
) -> pd.DataFrame:
    """Compute what `-delta_i` changes in the logits when it is added to a matrix's output.

    For the unit vector `u = -delta_i / ||delta_i||` at position `i` of the output of `W_out` or
    `W_O`, the logits `z` at position `j` change by

        dz_j / du = J u,    J = the Jacobian of z_j with respect to this output at position i

    in the prompt's own forward pass, with everything in it: a norm after the matrix, the later
    layers, attention from `j` to `i`, the final norm and a softcap. It is exact up to rounding, for
    an infinitely small step; nothing is averaged over prompts. For `target_nll` and the last token,
    the log-probability of the target changes by `||delta_i||` per unit, because `delta_i` is its
    gradient. If it does not, an error is raised.

    A row costs about as much as three forward passes of its prompt. The caller's hooks on the model
    are active.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is not changed.
        prompts: As in `backward_lens`.
        target: As in `backward_lens`.
        objective: What to differentiate; `target_nll(target)` by default.
        matrices: `"W_out"`, `"W_O"`, or both.
        layers: Layers, negative ones from the end; `None` for all.
        positions: Positions `i`, negative ones from the end of each prompt; `None` for all.
        at: Position `j`: `"last"` for the last token, appended answers included; `"own"` for `i`.
        direction: `"update"` adds `-delta_i`, as gradient descent does; `"gradient"` adds
            `delta_i`.
        k: Number of tokens to keep at either end; all of them if the vocabulary has fewer.
        prepend_bos: Whether to prepend a BOS token to texts; `None` uses the model's default.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.
        memory: Limits on memory.

    Returns:
        One row per prompt, matrix, layer and position, in the order of a forward pass:

        - `prompt`, `matrix`, `layer`, `position`, `token`;
        - `norm`: `||delta_i||`. Multiply the changes by it for those of the whole `-delta_i`;
        - `read_at`: position `j`; `target`: the token that it is compared with;
        - `target_logit_change`: change of the target's logit, per unit;
        - `target_log_prob_change`: change of its log-probability, in nats per unit;
        - `target_rank`: number of tokens whose logit increases more, 0 for the most increased;
        - `top_tokens`, `top_changes`: the most increased tokens, and the changes of their logits
          per unit, the largest first; `bottom_tokens`, `bottom_changes`: the most decreased ones.

        Changes and tokens are missing, or empty, where `delta_i` is zero; what belongs to the
        target, also where there is none.

    Raises:
        InputError: If an argument is not usable.
        UnsupportedModelError: If a matrix belongs to a mixture of experts.
        ModelStateError: If a change is not finite, or contradicts the gradient.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> effects = blt.analysis.exact_effects(model, "Lionel Messi plays for", " Paris", k=1)
        >>> effects["target_rank"].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0]
        >>> effects["top_tokens"].tolist()[0]
        [' Paris']
    """
    import pandas as pd

    host = host_of(model)
    check_choice("direction", direction, get_args(Direction))
    check_choice("at", at, get_args(ReadAt))
    k = checked_k(k, host.d_vocab_out)
    _check_writing(select_matrices(matrices, host))
    plan = plan_capture(
        host,
        prompts,
        target_nll(target, multi_token) if objective is None else objective,
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
        memory=memory,
    )
    if objective is not None and target is not None:
        plan = plan.ranking(target, multi_token)
    chosen = select_positions(positions, plan.batch.mask)
    capture, cells = _cells(plan, chosen, at, -1 if direction == "update" else 1)
    effects = _effects(plan, cells, k)
    rows = [
        cell.row(capture) | effects.get(index, _without_effect())
        for index, cell in enumerate(cells)
    ]
    return pd.DataFrame(rows).astype({"target_rank": "Int64"})


def _check_writing(matrices: Sequence[str]) -> None:
    for matrix in matrices:
        if matrix in READING_MATRICES:
            raise InputError(
                f"matrices selects {matrix}, whose output is not added to the residual stream; "
                "pass 'W_out', 'W_O', or both"
            )


# --- what is added ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cell:
    """One matrix, layer and position of a prompt.

    Attributes:
        added: The vector of length 1 that is added there; zero if the VJP is.
        norm: Length of the VJP.
        target: The token that the effect is compared with; -1 if there is none.
        target_text: Its text.
        expected: How the gradient says that the target's log-probability changes; `None` if the
            gradient is of something else.
    """

    added: AddedVector
    norm: float
    target: int
    target_text: str | None
    expected: float | None

    def row(self, capture: GradientCapture) -> dict[str, Any]:
        """The columns that do not need the effect."""
        added = self.added
        return {
            "prompt": added.prompt,
            "matrix": added.site.matrix,
            "layer": added.site.layer,
            "position": added.position,
            "token": capture.str_tokens[added.prompt][added.position],
            "norm": self.norm,
            "read_at": added.read_at,
            "target": self.target_text,
        }


def _cells(
    plan: CapturePlan, chosen: Int[Tensor, "prompt selected"], at: ReadAt, sign: int
) -> tuple[GradientCapture, list[_Cell]]:
    """Capture the VJPs, and list the vectors in the order of a forward pass."""
    sites = [_single(site) for site in plan.sites]
    places = [row[row >= 0] for row in chosen]
    vjps: dict[tuple[int, str, int], Float[Tensor, "selected d_model"]] = {}

    def keep(recorded: Recorded, prompts: Sequence[int]) -> None:
        for (matrix, layer), gradient in recorded.gradients.items():
            for prompt, own in zip(prompts, gradient.spanning_set, strict=True):
                vjps[prompt, matrix, layer] = own[places[prompt]]

    capture = plan.run(keep)
    cells: list[_Cell] = []
    for prompt, site in product(range(len(places)), sites):
        own, last = vjps[prompt, site.matrix, site.layer], int(plan.batch.last[prompt])
        norms = torch.linalg.vector_norm(own, dim=-1).tolist()
        for position, vjp, norm in zip(places[prompt].tolist(), own, norms, strict=True):
            read_at = position if at == "own" else last
            unit = sign * vjp / norm if norm else vjp
            target = -1 if capture.targets is None else int(capture.targets[prompt, read_at])
            is_loss = isinstance(plan.objective, TargetNLL) and read_at == last
            cells.append(
                _Cell(
                    AddedVector(site, prompt, position, read_at, unit),
                    norm,
                    target,
                    None if target < 0 else plan.host.vocabulary.text(target),
                    -sign * norm if is_loss else None,
                )
            )
    return capture, cells


def _single(site: Site) -> MatrixSite:
    if not isinstance(site, MatrixSite):
        raise UnsupportedModelError(
            f"{site.matrix} of layer {site.layer} belongs to a mixture of {site.n_experts} "
            "experts, each with its own output; pass matrices='W_O', or the layers without experts"
        )
    return site


# --- what it changes ----------------------------------------------------------------------------


def _effects(plan: CapturePlan, cells: Sequence[_Cell], k: int) -> dict[int, dict[str, Any]]:
    """The other columns of each cell whose vector is not zero, by the cell's index."""
    effects: dict[int, dict[str, Any]] = {}
    nonzero = [index for index, cell in enumerate(cells) if cell.norm]
    added = [cells[index].added for index in nonzero]
    for changes in first_order_changes(plan.host, plan.batch, added, plan.memory):
        indices = [nonzero[own] for own in changes.indices]
        some = [cells[index] for index in indices]
        effects |= zip(indices, _columns(plan.host, some, changes, k), strict=True)
    return effects


def _columns(
    host: Host, cells: Sequence[_Cell], changes: FirstOrderChanges, k: int
) -> Iterator[dict[str, Any]]:
    """The columns of the cells of one pass."""
    vocabulary, logits = host.vocabulary, changes.logits
    targets = torch.tensor([[max(0, cell.target)] for cell in cells], device=logits.device)
    of_target = logits.gather(1, targets)
    of_log_prob = _log_prob_changes(changes, targets)
    _check_losses(host, cells, of_log_prob, logits)
    ranks = count_beyond(logits, of_target, largest=True)
    ends = [extremes(logits, k, largest=largest) for largest in (True, False)]
    for row, cell in enumerate(cells):
        has_target = cell.target >= 0
        (top, top_changes), (bottom, bottom_changes) = (
            ([vocabulary.text(token) for token in end.ids[row].tolist()], end.scores[row].tolist())
            for end in ends
        )
        yield {
            "target_logit_change": float(of_target[row]) if has_target else math.nan,
            "target_log_prob_change": float(of_log_prob[row]) if has_target else math.nan,
            "target_rank": int(ranks[row]) if has_target else None,
            "top_tokens": top,
            "top_changes": top_changes,
            "bottom_tokens": bottom,
            "bottom_changes": bottom_changes,
        }


def _without_effect() -> dict[str, Any]:
    """The same columns for a zero vector."""
    changes = dict.fromkeys(("target_logit_change", "target_log_prob_change"), math.nan)
    ends = ("top_tokens", "top_changes", "bottom_tokens", "bottom_changes")
    return {**changes, "target_rank": None, **{end: [] for end in ends}}


def _log_prob_changes(
    changes: FirstOrderChanges, targets: Int[Tensor, "row 1"]
) -> Float[Tensor, "row"]:
    """`dz_t - sum_s p_s dz_s`; in float64, because the two terms may nearly cancel."""
    found = []
    rows = zip(changes.logits, changes.logits_before, targets[:, 0], strict=True)
    for logits, before, target in rows:  # one by one, to save memory
        wide = logits.double()
        found.append(wide[target] - before.double().softmax(-1) @ wide)
    return torch.stack(found)


def _check_losses(
    host: Host,
    cells: Sequence[_Cell],
    found: Float[Tensor, "row"],
    logits: Float[Tensor, "row d_vocab"],
) -> None:
    """Raise if the change of a loss is not the one that the gradient says."""
    tolerance = _TOLERANCES.get(host.model.W_U.dtype, _HALF_PRECISION_TOLERANCE)
    rooms = (tolerance * logits.abs().amax(-1)).tolist()
    for cell, change, room in zip(cells, found.tolist(), rooms, strict=True):
        if cell.expected is not None and not abs(change - cell.expected) <= room:
            added = cell.added
            raise ModelStateError(
                f"a unit vector added to {added.site.matrix} of layer {added.site.layer} at "
                f"position {added.position} of prompt {added.prompt} changes the target's "
                f"log-probability by {change:.3g}, but its gradient says {cell.expected:.3g}; "
                "remove hooks that do not do the same in every forward pass, or report this model "
                "as unsupported"
            )
