"""The gradients of one optimizer step, as factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError, ModelStateError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.vectors import VectorReadout
from backward_lens_tl.training.own_readout import OwnReadout
from backward_lens_tl.training.recording import FactorRecorder
from backward_lens_tl.training.weight_change import WeightChange

_Rows = tuple[torch.Size, ...]
"""Batch and position of each backward pass."""


class WatchedGradient(MatrixGradient):
    """The gradient of one weight matrix in one optimizer step.

    A [`MatrixGradient`][backward_lens_tl.MatrixGradient] with one prompt, whose positions are those
    of all sequences of the step. Only the gradient at the matrix's own output is taken.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> with blt.training.watch(model, layers=6) as watched:
        ...     model(model.to_tokens("Lionel Messi plays for"), return_type="loss").backward()
        ...     step = watched.step()
        >>> step["W_out", 6]
        WatchedGradient(W_out of layer 6, x [1, 5, 512], delta [1, 5, 128])
    """

    @property
    def resid_vjps(self) -> Float[Tensor, "batch pos d_model"]:
        """Not taken during training.

        Raises:
            InputError: Always. A norm may follow the matrix, and nothing is taken after it.
        """
        raise InputError(
            f"resid_vjps of {self.matrix} in layer {self.layer} is not taken during training, only "
            "the gradient at the matrix's own output; use vjps"
        )


@dataclass(frozen=True, repr=False)
class StepGradient:
    """The gradients of one optimizer step: what its backward passes add to `.grad`.

    `step["W_out", 5]` is one of them; iteration is in model order. The factors have a row for every
    position at which any of the matrices has a gradient, so padding is left out. Signs are those of
    the raw gradient: gradient descent *subtracts* it. With several processes, it is the gradient
    of this one.

    Attributes:
        step: The optimizer step, from 1.
        gradients: By matrix and layer.
        unavailable: Matrices without a gradient in this step, and why.
        backward_passes: The backward pass of each row, from 0, one per microbatch. If one backward
            pass covers several microbatches, they are numbered in the order of their forward
            passes; with `use_reentrant` checkpointing, in the order of the recomputed passes, which
            is the reverse.
        sequences: The sequence of each row, from 0, in its batch.
        positions: The place of each row in its sequence.
        changes: The optimizer's change of each matrix, if `watch` measures it and it is known.
        references: The gradients of the reference prompt, if `watch` has one, with the weights
            before the step.
        about: The watched model, the matrices and `every`, for the head of a record.
        readout: Reads vectors with the current weights of the trained model; `None` if `watch` has
            no tokenizer for it.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> with blt.training.watch(model, "W_out", layers=[5, 6]) as watched:
        ...     for text in ("Lionel Messi plays for", "The capital of France is"):  # microbatches
        ...         model(model.to_tokens(text), return_type="loss").backward()
        ...     step = watched.step()
        >>> step
        StepGradient(step 1, W_out of layers 5 to 6, 10 positions of 2 backward passes)
        >>> main = step["W_out", 6].principal_directions(1)
        >>> len(blt.read_vectors(model, -main.resid).top_tokens[0])  # what the step promotes
        10
    """

    step: int
    gradients: Mapping[tuple[str, int], WatchedGradient]
    unavailable: Mapping[tuple[str, int], str]
    backward_passes: Int[Tensor, "n"]
    sequences: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    changes: Mapping[tuple[str, int], WeightChange] = field(default_factory=dict)
    references: Mapping[tuple[str, int], WatchedGradient] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    readout: OwnReadout | None = None

    def read(self, vectors: Float[Tensor, "n d_model"], k: int = 10) -> VectorReadout:
        """Read vectors of the residual stream's width as tokens, with the trained model.

        The weights are those at the time of the call: after the optimizer's step, and before the
        next one.

        Args:
            vectors: The vectors, such as `-step["W_out", 6].principal_directions(3).resid`.
            k: Number of tokens at either end.

        Returns:
            Top and bottom tokens by the model's final norm and unembedding.

        Raises:
            InputError: If a transformers model is watched without its tokenizer, or the vectors
                have another width.
            UnsupportedModelError: If the final norm and unembedding of a transformers model do not
                rank tokens as its logits do.

        Examples:
            >>> with blt.training.watch(model, "W_out", layers=6) as watched:
            ...     loss = model(model.to_tokens("Lionel Messi plays for"), return_type="loss")
            ...     loss.backward()
            ...     step = watched.step()
            >>> len(step.read(-step["W_out", 6].principal_directions(2).resid).top_tokens)
            2
            >>> model.zero_grad()
        """
        if self.readout is None:
            raise InputError(
                "the watched model has no tokenizer; pass watch(..., tokenizer=tokenizer), or read "
                "the vectors with another model: read_vectors(reader, vectors)"
            )
        return self.readout.read(vectors, k)

    def __getitem__(self, key: tuple[str, int]) -> WatchedGradient:
        if key in self.gradients:
            return self.gradients[key]
        if key in self.unavailable:
            raise InputError(
                f"step {self.step} has no gradient of {key[0]} in layer {key[1]}: "
                f"{self.unavailable[key]}"
            )
        raise InputError(
            f"{key!r} is not watched; watched: {', '.join(self.matrices)} in layers "
            f"{', '.join(map(str, self.layers))}"
        )

    def __iter__(self) -> Iterator[WatchedGradient]:
        return iter(self.gradients.values())

    def __len__(self) -> int:
        return len(self.gradients)

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the matrices, in the order in which a layer uses them."""
        return tuple(dict.fromkeys(gradient.matrix for gradient in self))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(sorted({gradient.layer for gradient in self}))

    def __repr__(self) -> str:
        n_passes = len(self.backward_passes.unique())
        return (
            f"StepGradient(step {self.step}, {', '.join(self.matrices)} of layers "
            f"{self.layers[0]} to {self.layers[-1]}, {len(self.positions)} positions of "
            f"{n_passes} backward passes)"
        )


def step_gradient(
    step: int, recorders: Sequence[FactorRecorder], loss_scale: float | None
) -> StepGradient:
    """Build the gradients of a step.

    Args:
        step: The step, from 1.
        recorders: The factors of each matrix.
        loss_scale: What the loss was multiplied by; `None` if it was not.

    Returns:
        The gradients.

    Raises:
        InputError: If the training is in float16, and `loss_scale` is `None`.
        ModelStateError: If there is no gradient at all.
    """
    reasons = {_key(recorder): _reason(recorder) for recorder in recorders}
    taken = [recorder for recorder in recorders if reasons[_key(recorder)] is None]
    if not taken:
        raise ModelStateError(
            f"no gradient reached the watched matrices in step {step}: "
            f"{next(iter(reasons.values()))}; train the model that is watched, and call step() "
            "once per optimizer step, after its backward passes"
        )
    _check_scale(taken, loss_scale)
    # A layer that is skipped in some of the passes has rows that cannot be compared.
    sizes = Counter(_sizes(recorder) for recorder in taken).most_common(1)[0][0]
    usual = [recorder for recorder in taken if _sizes(recorder) == sizes]
    for recorder in taken:
        if recorder not in usual:
            reasons[_key(recorder)] = (
                f"it saw {sum(_sizes(recorder))} positions, and most matrices {sum(sizes)}"
            )
    kept = _nonzero(usual)
    labels = _labels([_rows(recorder) for recorder in usual])[kept.cpu()]
    inputs = _Inputs(kept)
    return StepGradient(
        step=step,
        gradients={
            _key(recorder): _gradient(recorder, inputs, kept, loss_scale) for recorder in usual
        },
        unavailable={key: reason for key, reason in reasons.items() if reason is not None},
        backward_passes=labels[:, 0],
        sequences=labels[:, 1],
        positions=labels[:, 2],
    )


def _key(recorder: FactorRecorder) -> tuple[str, int]:
    return recorder.matrix.key


def _rows(recorder: FactorRecorder) -> _Rows:
    return tuple(pair.rows for pair in recorder.ordered)


def _sizes(recorder: FactorRecorder) -> tuple[int, ...]:
    return tuple(rows.numel() for rows in _rows(recorder))


def _reason(recorder: FactorRecorder) -> str | None:
    """Why a matrix has no gradient in this step; `None` if it has one."""
    if not recorder.pairs:
        if recorder.had_no_gradient:
            return "every parameter that its output depends on is frozen"
        return "no backward pass went through it"
    if not all(pair.is_intact for pair in recorder.pairs):
        return "its inputs or their gradients were written into after they were taken"
    return None


def _check_scale(recorders: Sequence[FactorRecorder], loss_scale: float | None) -> None:
    dtypes = {pair.delta.dtype for recorder in recorders for pair in recorder.pairs}
    if loss_scale is None and torch.float16 in dtypes:
        raise InputError(
            "gradients are in float16, where the loss is usually scaled, and loss_scale is None; "
            "pass the scale of the step, step(loss_scale=scaler.get_scale()) before "
            "scaler.update(), or 1.0"
        )


class _Inputs:
    """The inputs of each matrix, joined once for matrices that read the same ones.

    Args:
        kept: The rows that are taken.
    """

    def __init__(self, kept: Bool[Tensor, "rows"]) -> None:
        self._kept = kept
        self._joined: dict[Hashable, Tensor] = {}

    def of(self, recorder: FactorRecorder) -> Float[Tensor, "1 n *head d_in"]:
        """The inputs of all backward passes."""
        tensors = [pair.x for pair in recorder.ordered]
        # All of them are in memory until the first is joined, so an address names one tensor.
        places = [(x.device, x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
        key = *places, recorder.matrix.site.input_heads
        if key not in self._joined:
            self._joined[key] = _join(recorder, tensors, "input", self._kept)
        return self._joined[key]


def _join(
    recorder: FactorRecorder,
    tensors: Sequence[Tensor],
    side: Literal["input", "output"],
    kept: Bool[Tensor, "rows"],
) -> Float[Tensor, "1 n *head d_side"]:
    """The kept rows of all backward passes."""
    chosen = []
    for tensor, own in zip(tensors, kept.split(_sizes(recorder)), strict=True):
        rows = own.nonzero()[:, 0].to(tensor.device)
        chosen.append(tensor.reshape(len(own), -1).index_select(0, rows))
    joined = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
    # Without any row, as for a constant loss, the widths of heads could not be inferred.
    some = joined if len(joined) else joined.new_zeros(1, joined.shape[1])
    laid_out = recorder.matrix.site.by_head(some, side, torch.Size((1, len(some))))
    return at_least_float32(laid_out[:, : len(joined)])


def _deltas(recorder: FactorRecorder) -> list[Float[Tensor, "rows d_out"]]:
    """The gradients of all backward passes, heads concatenated."""
    return [pair.delta.reshape(pair.rows.numel(), -1) for pair in recorder.ordered]


def _nonzero(recorders: Sequence[FactorRecorder]) -> Bool[Tensor, "rows"]:
    """Rows that add something to the gradient of any matrix."""
    found = []
    for recorder in recorders:
        found.append(torch.cat([delta.ne(0).any(1) for delta in _deltas(recorder)]))
    return torch.stack([each.to(found[0].device) for each in found]).any(0)


def _gradient(
    recorder: FactorRecorder, inputs: _Inputs, kept: Bool[Tensor, "rows"], loss_scale: float | None
) -> WatchedGradient:
    """The gradient of one matrix; its recorder is empty afterwards, which frees the memory."""
    site = recorder.matrix.site
    x = inputs.of(recorder)
    delta = _join(recorder, _deltas(recorder), "output", kept)
    recorder.pairs.clear()
    return WatchedGradient(
        matrix=site.matrix,
        layer=site.layer,
        inputs=x,
        vjps=delta if loss_scale in (None, 1.0) else delta / loss_scale,
        mask=delta.new_ones(delta.shape[:2], dtype=torch.bool),
    )


def _labels(rows: Sequence[_Rows]) -> Int[Tensor, "rows 3"]:
    """Backward pass, sequence and position of every row."""
    # Some modules flatten the first two axes; then any other module tells them.
    clearest = max(rows, key=lambda each: min(len(size) for size in each))
    found = []
    for backward_pass, size in enumerate(clearest):
        shape = size if len(size) == 2 else (1, *size)
        at = torch.ones(shape).nonzero()
        found.append(torch.cat([torch.full_like(at[:, :1], backward_pass), at], dim=1))
    return torch.cat(found)
