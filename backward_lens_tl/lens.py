"""The Backward Lens: which tokens a gradient writes into each weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, listed
from backward_lens_tl.capture.batching import Pass
from backward_lens_tl.capture.bound_objectives import LossFunction
from backward_lens_tl.capture.forward_backward import Recorded
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.merging import Gathering
from backward_lens_tl.capture.objectives import (
    Objective,
    Targets,
    target_ids,
    target_nll,
)
from backward_lens_tl.capture.prompts import Prompts
from backward_lens_tl.capture.run import CaptureWork, plan_capture
from backward_lens_tl.capture.selection import select_positions
from backward_lens_tl.choices import Direction, Measure, MultiToken, VjpsAt
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.sites import WRITING_MATRICES
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.readout.projections import LogitLens, Projection, as_projections
from backward_lens_tl.readout.readout import Reading, ReadoutGrid
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
    projection: str | Projection | Sequence[str | Projection] = ("logit_lens", "normalized"),
    direction: Direction = "update",
    k: int = 10,
    measures: Measure | Sequence[Measure] = (),
    prepend_bos: bool | None = None,
    multi_token: MultiToken | None = None,
    vjps_at: VjpsAt = "matrix",
    hook_points: str | Sequence[str] | Callable[[str], bool] | None = None,
    memory: Memory | None = None,
) -> BackwardLensResult:
    """Project the gradients of weight matrices into the vocabulary.

    The gradient of `W_in`, `W_gate`, `W_Q`, `W_K` or `W_V` is read through its inputs `x_i`, which
    an update *imprints*; that of `W_out` or `W_O` through its VJPs `delta_i`, whose negative an
    update adds, which *shifts* the output towards the target (paper, sections 4 and 5).

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; nothing of it is changed.
        prompts: A text, several of any lengths, token ids `[batch, pos]`, or what a tokenizer
            returned (`input_ids` and `attention_mask`).
        target: What the model should say next: text or token id, or one per prompt. `None` is the
            model's own most probable token. Beside an `objective` it is only ranked.
        objective: What is differentiated; `target_nll(target)` by default.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"`, `"all"`.
        layers: Layers, negative ones from the end; `None` for all.
        positions: Positions to project, negative ones from each prompt's end; `None` for all.
        projection: `"logit_lens"`, `"normalized"`, an object with
            `project(vectors, layer) -> logits`, or several of these: the result speaks of the
            first, its table switches between them, and `result.under(name)` speaks of another.
        direction: `"update"` projects what a step of gradient descent adds, `-delta_i` for
            `W_out` and `W_O`; `"gradient"` projects the raw `delta_i`, as the paper does. Inputs
            `x_i` are projected as they are.
        k: Tokens to keep at either end; all of them where the vocabulary has fewer.
        measures: What else is taken of each readout, for `to_df`: `"answer_rank"`, the rank of the
            model's own answer, `"entropy"`, or both. Each costs a pass over the scores.
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.
        multi_token: Which token of a text of several stands for it, `"first"` or `"last"`.
        vjps_at: Which VJPs of `W_out` and `W_O` are projected: `"matrix"`, those at its own output,
            which span the gradient, or `"residual"`, those where its output is added to the
            residual stream. They differ where a norm comes in between, as in Gemma 2 and OLMo 2.
        hook_points: Hook points to keep activations and gradients of, as in `capture_gradients`.
        memory: Limits on memory, and how factors are kept; `Memory` says which there are.

    Returns:
        The result; in a notebook it shows itself as a table of layers and tokens.

    Raises:
        InputError: If an argument is not usable; the message says what is allowed.

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
        raise InputError("an objective goes by name: backward_lens(model, prompts, objective=...)")
    k = checked_k(k, host.d_vocab_out)
    projections = as_projections(projection, host)
    for measure in listed(measures):
        check_choice("measures", measure, get_args(Measure))
    work = plan_capture(
        host,
        prompts,
        target_nll(target, multi_token) if objective is None else objective,
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
        hook_points=hook_points,
        memory=memory,
    )
    batch = work.batch
    ids = None
    if objective is not None and target is not None:
        asked = target_ids(target, work.prompts, multi_token)
        ids = torch.tensor(asked, device=batch.mask.device)
    places = select_positions(positions, batch.mask)
    grids = {name: ReadoutGrid(work.layers, places, work.kept_on) for name in projections}
    reader = _Reader(
        projections=projections,
        direction=direction,
        vjps_at=vjps_at,
        k=k,
        measures=frozenset(listed(measures)),
        d_vocab=host.d_vocab_out,
        most_bytes=work.memory.chunk,
        places=places,
        grids=grids,
    )
    gathering = work.gathering()
    for part in work.passes:
        _analyse(work, part, ids, reader, gathering)
    capture = work.capture(gathering)
    readings = tuple(
        Reading(name, grids[name].by_matrix, _faint_norm(lens))
        for name, lens in projections.items()
    )
    return BackwardLensResult(
        capture=capture,
        readings=readings,
        positions=places.to(work.kept_on),
        token_texts=_texts(host.vocabulary, readings, capture),
        direction=direction,
        vjps_at=vjps_at,
    )


def _analyse(
    work: CaptureWork,
    part: Pass,
    targets: Int[Tensor, "batch"] | None,
    reader: _Reader,
    gathering: Gathering,
) -> None:
    """Run the model once and read what it gave, before factors are rounded or moved."""
    recorded, prompts = work.record(part), list(part.prompts)
    if targets is not None:
        recorded = replace(recorded, targets=targets[prompts])
    reader.read(recorded, prompts)
    gathering.add(recorded, prompts)


def _faint_norm(projection: Projection) -> float:
    return projection.faint_norm if isinstance(projection, LogitLens) else 0.0


@dataclass(frozen=True)
class _Reader:
    """How vectors are read over the vocabulary, and where what they say goes."""

    projections: Mapping[str, Projection]
    direction: Direction
    vjps_at: VjpsAt
    k: int
    measures: frozenset[str]
    d_vocab: int
    most_bytes: int | None
    places: Int[Tensor, "batch pos"]
    grids: Mapping[str, ReadoutGrid]

    def read(self, recorded: Recorded, prompts: Sequence[int]) -> None:
        """Project the spanning set of every matrix and layer at the chosen positions.

        Args:
            recorded: The gradients of some prompts.
            prompts: Which prompts these are.
        """
        places = self.places[prompts]
        rows, columns = (places >= 0).nonzero(as_tuple=True)
        positions, ranked = places[rows, columns], self._ranked(recorded)[rows]
        spanning = {key: self._spanning(gradient) for key, gradient in recorded.gradients.items()}
        # Matrices that read the same have one tensor, which is read once.
        distinct = {id(vectors): key for key, vectors in spanning.items()}
        groups = (
            VectorGroup(
                layer, self._oriented(matrix, spanning[matrix, layer][rows, positions]), ranked
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
        for grid, read in zip(self.grids.values(), by_projection, strict=True):
            found = dict(zip(distinct, read, strict=True))
            for (matrix, layer), vectors in spanning.items():
                grid.write(matrix, layer, cells, found[id(vectors)])

    def _ranked(self, recorded: Recorded) -> Int[Tensor, "batch 2"]:
        """The target and the model's own answer of each prompt, -1 where they are not ranked."""
        nothing = torch.full_like(recorded.answers, -1)
        targets = nothing if recorded.targets is None else recorded.targets
        answers = recorded.answers if "answer_rank" in self.measures else nothing
        return torch.stack([targets, answers], dim=1)

    def _spanning(self, gradient: MatrixGradient) -> Float[Tensor, "batch pos d_model"]:
        if self.vjps_at == "residual" and not gradient.reads_residual:
            return gradient.resid_vjps
        return gradient.spanning_set

    def _oriented(
        self, matrix: str, vectors: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """The vectors with the sign in which they are read."""
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
        ids.append(capture.targets)
    seen = torch.cat(ids).unique().tolist()
    return {token: vocabulary.text(token) for token in seen if token >= 0}
