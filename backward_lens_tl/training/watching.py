"""Watching a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import index
from typing import Any

from torch import nn

from backward_lens_tl._checks import checked_count, checked_number, is_integer, shown
from backward_lens_tl.capture.recorders import recording
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of_trained
from backward_lens_tl.training.own_readout import OwnReadout
from backward_lens_tl.training.recording import FactorRecorder
from backward_lens_tl.training.step_gradient import StepGradient, step_gradient
from backward_lens_tl.training.trained_matrices import TrainedMatrix, find_trained


class TrainingWatch:
    """Counts optimizer steps, and takes the gradients of every n-th one; see `watch`.

    Args:
        matrices: What is watched.
        every: The first step is watched, and every step after this many others.
        about: The same in words, for `StepGradient.about`.
        readout: Reads vectors with the model's weights.

    Attributes:
        n_steps: Number of steps so far.

    Examples:
        >>> import backward_lens_tl as blt
        >>> with blt.training.watch(blt.load_facts_model(), every=10) as watched:
        ...     watched.is_watching, watched.n_steps
        (True, 0)
    """

    def __init__(
        self,
        matrices: Sequence[TrainedMatrix],
        every: int,
        about: Mapping[str, Any],
        readout: OwnReadout | None,
    ) -> None:
        self._matrices, self._every = matrices, every
        self._about, self._readout = about, readout
        self._recorders: list[FactorRecorder] = []
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
            The gradients of the step; `None` if it was not watched.

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

    def _found(self, recorders: Sequence[FactorRecorder], loss_scale: float | None) -> StepGradient:
        step = step_gradient(self.n_steps, recorders, loss_scale)
        return replace(step, about=self._about, readout=self._readout)

    def resume(self, n_steps: int) -> None:
        """Continue to count after the steps of an earlier run.

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
        self._recorders = []
        if self.n_steps % self._every == 0:
            self._recorders = [FactorRecorder(each) for each in self._matrices]
            self._hooks.enter_context(recording(self._recorders))

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
    `d_in + d_out` numbers per position and matrix, and again while they are joined. Choose
    `matrices` and `layers` for large batches.

    Args:
        model: The model that is trained: a transformers model, with or without an adapter of PEFT,
            or a model of TransformerLens.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"` and `"all"`.
        layers: Indices, negative ones from the end, or `None` for all.
        every: The first optimizer step is watched, and every n-th one after it.
        tokenizer: The tokenizer of a transformers model, to read directions as tokens.

    Yields:
        The watch, whose `step()` ends each optimizer step.

    Raises:
        InputError: If an argument is invalid.
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
    found, every = find_trained(model, matrices, layers), checked_count("every", every)
    has_tokenizer = tokenizer is not None or host_of_trained(model) is not None
    readout = OwnReadout(model, tokenizer) if has_tokenizer else None
    with TrainingWatch(found, every, _about(model, found, every), readout)._open() as watched:
        yield watched


def _about(model: nn.Module, watched: Sequence[TrainedMatrix], every: int) -> dict[str, Any]:
    """What identifies the run, for the head of a record."""
    sites = [each.site for each in watched]
    return {
        "model": {
            "name": _name(model),
            "class": type(model).__name__,
            "parameters": sum(each.numel() for each in model.parameters()),
        },
        "matrices": list(dict.fromkeys(site.matrix for site in sites)),
        "layers": sorted({site.layer for site in sites}),
        "every": every,
    }


def _name(model: nn.Module) -> str:
    host = host_of_trained(model)
    if host is not None:
        return host.name
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))
