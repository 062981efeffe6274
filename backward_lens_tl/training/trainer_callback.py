"""A callback for `transformers.Trainer`, whose subclasses are TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from backward_lens_tl.training.step_gradient import StepGradient
from backward_lens_tl.training.watching import TrainingWatch


class BackwardLensCallback(TrainerCallback):
    """Calls a function with the gradient of each watched step of a `Trainer`.

    The hooks belong to `watch`, so they are removed when its context ends, whether training
    finishes or raises. Steps are numbered as the trainer numbers them, also in a run that resumes
    from a checkpoint.

    Args:
        watched: The watch on the trainer's model.
        on_step: Gets each [`StepGradient`][backward_lens_tl.training.StepGradient]. Keep numbers,
            not the object, which holds the factors.

    Examples:
        A trainer calls the methods below; see also the [guide](../training.md).

        >>> from transformers import TrainerControl, TrainerState
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> norms = []
        >>> with blt.training.watch(model, "W_out", layers=6) as watched:
        ...     callback = blt.training.BackwardLensCallback(
        ...         watched, lambda step: norms.append(step["W_out", 6].singular_values().norm())
        ...     )
        ...     state = TrainerState(global_step=0)
        ...     callback.on_train_begin(None, state, TrainerControl())
        ...     model(model.to_tokens("Lionel Messi plays for"), return_type="loss").backward()
        ...     callback.on_step_end(None, state, TrainerControl())
        >>> len(norms)
        1
    """

    def __init__(self, watched: TrainingWatch, on_step: Callable[[StepGradient], object]) -> None:
        self._watched, self._on_step = watched, on_step
        self._loss_scale: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments | None,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count from the trainer's own step."""
        self._watched.resume(state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments | None,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the scale of the loss, which the optimizer's step may change; 1 if there is none."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # Accelerate's
        if scaler is not None:
            self._loss_scale = float(scaler.get_scale())
        elif getattr(args, "deepspeed", None) is None:  # which has a scale of its own
            self._loss_scale = 1.0

    def on_step_end(
        self,
        args: TrainingArguments | None,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """End the step, and pass its gradient on if it was watched."""
        found = self._watched.step(self._loss_scale)
        if found is not None:
            self._on_step(found)
