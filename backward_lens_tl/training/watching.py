"""Watching a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import nn

from backward_lens_tl._checks import (
    check_choice,
    checked_count,
    checked_number,
    is_integer,
    shown,
)
from backward_lens_tl.capture.recorders import recording
from backward_lens_tl.errors import InputError, UnsupportedModelError, warn
from backward_lens_tl.models import host_of_trained
from backward_lens_tl.models.own_passes import is_own_pass
from backward_lens_tl.training.own_readout import OwnReadout
from backward_lens_tl.training.recording import FactorRecorder, SharedInputs, weight_changes
from backward_lens_tl.training.reference import reference_of
from backward_lens_tl.training.step_gradient import StepGradient, WatchedGradient, step_gradient
from backward_lens_tl.training.step_memory import StepMemory
from backward_lens_tl.training.trained_matrices import find_trained
from backward_lens_tl.training.watch_settings import WatchSettings


class TrainingWatch:
    """Counts optimizer steps, and takes the gradients of every n-th one; see `watch`.

    Args:
        settings: What is watched.

    Attributes:
        n_steps: Number of steps so far.

    Examples:
        >>> import backward_lens_tl as blt
        >>> with blt.training.watch(blt.load_facts_model(), every=10) as watched:
        ...     watched.is_watching, watched.n_steps
        (True, 0)
    """

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self._recorders: list[FactorRecorder] = []
        self._references: Mapping[tuple[str, int], WatchedGradient] | None = None
        self._memory = StepMemory(None, 0)
        self._hooks = ExitStack()
        self._is_open = False
        self.n_steps = 0

    @property
    def is_watching(self) -> bool:
        """Whether the gradients of the current step are taken."""
        return bool(self._recorders)

    def step(self, loss_scale: float | None = None) -> StepGradient | None:
        """End an optimizer step. Call it once after each `optimizer.step()`.

        Args:
            loss_scale: What the loss was multiplied by before the backward pass, such as
                `GradScaler.get_scale()`; needed in float16 only.

        Returns:
            The gradients of the step; `None` if it was not watched, or would have taken more memory
            than the budget, which is a warning.

        Raises:
            InputError: If it is called outside of the context, or the training is in float16 and
                `loss_scale` is missing.
            ModelStateError: If no gradient reached any of the matrices in a watched step.

        Examples:
            >>> tokens = model.to_tokens("Lionel Messi plays for")
            >>> with blt.training.watch(model, layers=5, every=10) as watched:
            ...     for _ in range(3):
            ...         model(tokens, return_type="loss").backward()
            ...         print(watched.step())  # after optimizer.step()
            StepGradient(step 1, W_in, W_out of layers 5 to 5, 5 positions of 1 backward passes)
            None
            None
            >>> model.zero_grad()
        """
        self._check_open("step()")
        if loss_scale is not None:
            loss_scale = checked_number("loss_scale", loss_scale, is_positive=True)
        recorders, self._recorders = self._recorders, []
        self._hooks.close()
        self.n_steps += 1
        found = self._found(recorders, loss_scale) if recorders else None
        self._begin_step()
        return found

    def _found(
        self, recorders: Sequence[FactorRecorder], loss_scale: float | None
    ) -> StepGradient | None:
        """The gradients of the step that ends."""
        memory = self._memory
        if memory.is_exceeded:
            warn(
                f"step {self.n_steps} is not watched: its factors would take "
                f"{memory.needed:,} bytes or more, and budget is {memory.budget:,}; watch fewer "
                "matrices or layers, use smaller microbatches, or pass a larger budget"
            )
            return None
        step = step_gradient(self.n_steps, recorders, loss_scale)
        if self._settings.reference is not None and self._references is None:
            warn(
                f"step {self.n_steps} has no reference: the training does not call the watched "
                f"{type(self._settings.model).__name__} itself, but a module inside it; watch the "
                "module that the loop calls"
            )
        return replace(
            step,
            changes=weight_changes(recorders, self._settings.model),
            references=self._references or {},
            about=self._settings.about(),
            readout=self._settings.readout,
        )

    def resume(self, n_steps: int) -> None:
        """Resume counting after the steps of an earlier run.

        Args:
            n_steps: Number of its steps.

        Raises:
            InputError: If it is called outside of the context, or it is not a number of steps.

        Examples:
            >>> with blt.training.watch(model, every=10) as watched:
            ...     watched.resume(500)
            ...     watched.is_watching, watched.n_steps
            (True, 500)
        """
        self._check_open("resume()")
        if not is_integer(n_steps) or index(n_steps) < 0:
            raise InputError(f"n_steps is {shown(n_steps)}; pass an integer of at least 0")
        self._hooks.close()
        self.n_steps = index(n_steps)
        self._begin_step()

    def _check_open(self, call: str) -> None:
        if not self._is_open:
            raise InputError(
                f"{call} was called outside of the context of watch; call it inside the with block"
            )

    def _begin_step(self) -> None:
        self._recorders, self._references = [], None
        settings = self._settings
        if self.n_steps % settings.every:
            return
        self._memory = StepMemory(settings.budget, settings.fixed_bytes)
        inputs = SharedInputs()
        self._recorders = [
            FactorRecorder(each, self._memory, inputs, copies_weight=settings.changes)
            for each in settings.matrices
        ]
        self._hooks.enter_context(recording(self._recorders))
        hook = settings.model.register_forward_pre_hook(self._before_forward, prepend=True)
        self._hooks.callback(hook.remove)

    def _before_forward(self, model: nn.Module, args: object) -> None:
        """Take the gradients of the reference, once, before the step's first forward pass."""
        if model is not self._settings.model:
            raise UnsupportedModelError(
                f"a replica of the watched {type(model).__name__} runs, as by torch.nn."
                "DataParallel, whose passes mix in one module; use one process per device, with "
                "DistributedDataParallel, or one device"
            )
        reference = self._settings.reference
        # A pass of the package, such as the reference's own one, does not begin the step.
        is_first = self._references is None and torch.is_grad_enabled() and not is_own_pass()
        if reference is not None and is_first:
            self._references = reference.gradients(model, self._settings.matrices)

    @contextmanager
    def _open(self) -> Iterator[TrainingWatch]:
        self._is_open = True
        try:
            self._begin_step()
            yield self
        finally:
            self._is_open, self._recorders = False, []
            self._hooks.close()


@contextmanager
def watch(
    model: nn.Module,
    matrices: str | Sequence[str] = "mlp",
    layers: int | Sequence[int] | None = None,
    *,
    every: int = 10,
    budget: int | None = None,
    changes: bool = False,
    reference: tuple[Any, Any] | None = None,
    tokenizer: Any = None,
) -> Iterator[TrainingWatch]:
    """Take the factors of a training loop's own gradients, without another pass.

    Hooks read `x_i` and `delta_i` while the loop runs forwards and backwards. They change neither
    losses nor weights, and are on the model in watched steps only. They are removed at the end of
    the context, after exceptions too.

    The gradient of a step is the sum over its backward passes, as in `.grad` before an optimizer
    clips it. It follows the loss: labels that are masked, and a loss that is divided for gradient
    accumulation, need no settings. Works under autocast, with gradient checkpointing, and on models
    with LoRA adapters of PEFT, where the gradient is that of the effective weight, frozen or not.

    A watched step keeps the factors of its positions in memory on the model's device,
    `d_in + d_out` numbers per position and matrix. `changes` adds a copy of each watched matrix, or
    of its adapter if that alone is trained. Choose `matrices` and `layers` for large batches.

    Args:
        model: The model that is trained: a transformers model, with or without a PEFT adapter, or
            a TransformerLens model.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"` and `"all"`.
        layers: Indices, negative ones from the end, or `None` for all.
        every: The first optimizer step is watched, and every n-th one after it.
        budget: Bytes that a watched step may take in addition to the training, estimated from
            sizes; `None` sets no limit. A step that would take more is not watched, with a warning.
        changes: Whether to measure what the optimizer does to each matrix, `StepGradient.changes`.
        reference: A prompt and its target, each a text or token ids. In every watched step, the
            gradient of `-log p(target | prompt)` is taken with the weights that the step begins
            with, in eval mode: `StepGradient.references`. This costs one forward and backward pass
            of the prompt.
        tokenizer: The tokenizer of a transformers model, to read directions as tokens and a
            reference that is text.

    Yields:
        The watch, whose `step()` ends each optimizer step.

    Raises:
        InputError: If an argument is invalid, or copies of the weights exceed the budget.
        UnsupportedModelError: If the model has no matrix of such a name, or several modules share
            one.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> tokens = model.to_tokens(["Lionel Messi plays for Paris"])
        >>> with blt.training.watch(model, "W_out", every=2) as watched:
        ...     for _ in range(4):
        ...         model(tokens, return_type="loss").backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         if (step := watched.step()) is not None:
        ...             print(step.step, step["W_out", 7])
        1 WatchedGradient(W_out of layer 7, x [1, 6, 512], delta [1, 6, 128])
        3 WatchedGradient(W_out of layer 7, x [1, 6, 512], delta [1, 6, 128])
    """
    check_choice("changes", changes, (True, False))
    has_tokenizer = tokenizer is not None or host_of_trained(model) is not None
    settings = WatchSettings(
        model=model,
        matrices=find_trained(model, matrices, layers),
        every=checked_count("every", every),
        budget=None if budget is None else checked_count("budget", budget),
        changes=changes,
        reference=None if reference is None else reference_of(model, reference, tokenizer),
        readout=OwnReadout(model, tokenizer) if has_tokenizer else None,
    )
    if budget is not None and settings.fixed_bytes > budget:
        raise InputError(
            f"copies of the watched weights, and the reference, take {settings.fixed_bytes:,} "
            f"bytes, and budget is {shown(budget)}; watch fewer matrices or layers, or pass a "
            "larger budget or changes=False"
        )
    with TrainingWatch(settings)._open() as watched:
        yield watched
