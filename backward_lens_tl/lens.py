"""The Backward Lens: which tokens a gradient writes into each weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, listed
from backward_lens_tl.capture.bound_objectives import LossFunction
from backward_lens_tl.capture.forward_backward import Recorded
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import (
    Objective,
    Targets,
    target_nll,
)
from backward_lens_tl.capture.plan import plan_capture
from backward_lens_tl.capture.prompts import Prompts
from backward_lens_tl.capture.selection import select_positions
from backward_lens_tl.choices import Direction, Measure, MultiToken, VjpsAt
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.sites import WRITING_MATRICES
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.readout.cells import projected_vectors
from backward_lens_tl.readout.jacobian_projection import CarriedLens, blocks_to_read
from backward_lens_tl.readout.projections import LogitLens, Projection
from backward_lens_tl.readout.readout import Reading, ReadoutGrid
from backward_lens_tl.readout.requested import ProjectionLike, as_projections
from backward_lens_tl.readout.streaming import VectorGroup, read_groups
from backward_lens_tl.readout.topk import checked_k
from backward_lens_tl.result import BackwardLensResult


def backward_lens(
    model: nn.Module,
    prompts: Prompts,
    target: Targets | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    matrices: str | Sequence[str] = "mlp",
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
    projection: ProjectionLike | Sequence[ProjectionLike] = ("logit_lens", "normalized"),
    direction: Direction = "update",
    k: int = 10,
    multi_token: MultiToken | None = None,
    prepend_bos: bool | None = None,
    measures: Measure | Sequence[Measure] = (),
    vjps_at: VjpsAt = "matrix",
    hook_points: str | Sequence[str] | Callable[[str], bool] | None = None,
    memory: Memory | None = None,
) -> BackwardLensResult:
    """Project the gradients of weight matrices into the vocabulary.

    The gradient of `W_in`, `W_gate`, `W_Q`, `W_K` or `W_V` is read through its inputs `x_i`, which
    an update *imprints*. The gradient of `W_out` or `W_O` is read through its VJPs `delta_i`: an
    update adds their negative, which *shifts* the output towards the target (paper, sections 4 and
    5).

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is not changed.
        prompts: A text, several of any lengths, token ids `[batch, pos]`, the output of a tokenizer
            (`input_ids` and `attention_mask`), or a chat: a list of messages such as
            `{"role": "user", "content": "Hello"}`, or several such lists. The tokenizer's template
            makes a text of it that ends where the assistant's answer begins; an answer as the last
            message is continued.
        target: What the model should predict next: text or token id, or one per prompt. `None` is
            the model's own most probable token. With an `objective`, the target is only ranked, at
            every position, instead of the objective's own targets.
        objective: What to differentiate; `target_nll(target)` by default.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"`, `"all"`.
        layers: Layers, negative ones from the end; `None` for all.
        positions: Positions to project, negative ones from the end of each prompt; `None` for all.
        projection: `"logit_lens"`, `"normalized"`, `"cosine"`, TransformerLens's `JacobianLens`
            or its `.pt` file, what `jacobian_lens` returned, an object with
            `project(vectors, layer) -> logits`, or several of these. Methods of the result use the
            first, its table switches between them, and `result.under(name)` uses another.
        direction: `"update"` projects what a step of gradient descent adds, `-delta_i` for
            `W_out` and `W_O`; `"gradient"` projects the raw `delta_i`, as the paper does. Inputs
            `x_i` are projected as they are.
        k: Number of tokens to keep at either end; all of them if the vocabulary has fewer.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.
        prepend_bos: Whether to prepend a BOS token to texts; `None` uses the model's default.
        measures: Further columns of `to_df`: `"answer_rank"`, the rank of the model's own answer,
            `"entropy"`, or both. Each costs a pass over the scores.
        vjps_at: Which VJPs of `W_out` and `W_O` to project: `"matrix"` for those at the matrix's
            own output, which span the gradient, or `"residual"` for those where the output is added
            to the residual stream. They differ if a norm comes in between, as in Gemma 2 and OLMo
            2.
        hook_points: Hook points whose activations and gradients to keep, as in `capture_gradients`.
        memory: Limits on memory, and how factors are kept.

    Returns:
        The result. A notebook shows it as a table of layers and tokens.

    Raises:
        InputError: If an argument is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> result.top_tokens("W_out", layer=6, pos=-1, k=1)
        [' Paris']
        >>> result.target_rank("W_out").shape  # [layer, batch, pos]
        torch.Size([8, 1, 6])
    """
    host = host_of(model)
    check_choice("direction", direction, get_args(Direction))
    check_choice("vjps_at", vjps_at, get_args(VjpsAt))
    if isinstance(target, Objective) or callable(target):
        raise InputError(
            "target is an objective; pass it as a keyword, backward_lens(model, prompts, "
            "objective=...)"
        )
    k = checked_k(k, host.d_vocab_out)
    projections = as_projections(projection, host)
    for measure in listed(measures):
        check_choice("measures", measure, get_args(Measure))
    plan = plan_capture(
        host,
        prompts,
        target_nll(target, multi_token) if objective is None else objective,
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
        hook_points=hook_points,
        memory=memory,
    )
    if objective is not None and target is not None:
        plan = plan.ranking(target, multi_token)
    blocks = blocks_to_read(host, plan.sites, projections.values(), vjps_at)
    places = select_positions(positions, plan.batch.mask)
    grids = {name: ReadoutGrid(plan.layers, places, plan.kept_on) for name in projections}
    reader = _Reader(
        projections=projections,
        direction=direction,
        vjps_at=vjps_at,
        k=k,
        measures=frozenset(listed(measures)),
        d_vocab=host.d_vocab_out,
        most_bytes=plan.memory.chunk,
        blocks=blocks,
        places=places,
        grids=grids,
    )
    capture = plan.run(reader.read)
    readings = tuple(
        Reading(name, grids[name].by_matrix, _faint_norm(lens), _fit(lens))
        for name, lens in projections.items()
    )
    return BackwardLensResult(
        capture=capture,
        readings=readings,
        positions=places.to(plan.kept_on),
        token_texts=_texts(host.vocabulary, readings, capture),
        direction=direction,
        vjps_at=vjps_at,
    )


def _faint_norm(projection: Projection) -> float:
    lens = projection.lens if isinstance(projection, CarriedLens) else projection
    return lens.faint_norm if isinstance(lens, LogitLens) else 0.0


def _fit(projection: Projection) -> str:
    return projection.jacobians.fit if isinstance(projection, CarriedLens) else ""


@dataclass(frozen=True)
class _Reader:
    """Reads the vectors of each pass into grids, one grid per projection."""

    projections: Mapping[str, Projection]
    direction: Direction
    vjps_at: VjpsAt
    k: int
    measures: frozenset[str]
    d_vocab: int
    most_bytes: int | None
    blocks: Mapping[tuple[str, int], int]
    places: Int[Tensor, "batch pos"]
    grids: Mapping[str, ReadoutGrid]

    def read(self, recorded: Recorded, prompts: Sequence[int]) -> None:
        """Project the spanning set of every matrix and layer at the chosen positions.

        Args:
            recorded: The gradients of one pass.
            prompts: The indices of its prompts.
        """
        places = self.places[list(prompts)]
        rows, columns = (places >= 0).nonzero(as_tuple=True)
        positions = places[rows, columns]
        ranked = self._ranked(recorded, rows, positions)
        vectors = {
            key: projected_vectors(gradient, self.vjps_at)
            for key, gradient in recorded.gradients.items()
        }
        # Matrices with the same inputs share one tensor, which is read once.
        distinct = {id(own): key for key, own in vectors.items()}
        groups = (
            VectorGroup(
                layer,
                self.blocks[matrix, layer],
                self._oriented(matrix, vectors[matrix, layer][rows, positions]),
                ranked,
            )
            for matrix, layer in distinct.values()
        )
        by_projection = read_groups(
            groups,
            list(self.projections.values()),
            self.k,
            self.d_vocab,
            entropy="entropy" in self.measures,
            most_bytes=self.most_bytes,
        )
        cells = (rows.new_tensor(prompts)[rows], columns)
        for grid, readouts in zip(self.grids.values(), by_projection, strict=True):
            found = dict(zip(distinct, readouts, strict=True))
            for (matrix, layer), own in vectors.items():
                grid.write(matrix, layer, cells, found[id(own)])

    def _ranked(
        self, recorded: Recorded, rows: Int[Tensor, "n"], positions: Int[Tensor, "n"]
    ) -> Int[Tensor, "n 2"]:
        """Each position's target and the model's own answer, -1 if they are not ranked."""
        nothing = torch.full_like(rows, -1)
        targets, answers = recorded.targets, recorded.predictions.answers
        return torch.stack(
            [
                nothing if targets is None else targets[rows, positions],
                answers[rows] if "answer_rank" in self.measures else nothing,
            ],
            dim=1,
        )

    def _oriented(
        self, matrix: str, vectors: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        negate = self.direction == "update" and matrix in WRITING_MATRICES
        return -vectors if negate else vectors


def _texts(
    vocabulary: Vocabulary, readings: Iterable[Reading], capture: GradientCapture
) -> dict[int, str]:
    """Text of every token that is shown."""
    readouts = (readout for reading in readings for readout in reading.readouts.values())
    ids = [ids.flatten() for readout in readouts for ids in (readout.top_ids, readout.bottom_ids)]
    ids.append(capture.answers)
    if capture.targets is not None:
        ids.append(capture.targets.flatten())
    seen = torch.cat(ids).unique().tolist()
    return {token: vocabulary.text(token) for token in seen if token >= 0}
