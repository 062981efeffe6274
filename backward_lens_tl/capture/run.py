"""Gradients of weight matrices, as factors, in as many passes over the model as they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from backward_lens_tl._checks import shown
from backward_lens_tl.capture.batching import Pass, pass_size, plan_passes
from backward_lens_tl.capture.bound_objectives import BoundObjective, LossFunction
from backward_lens_tl.capture.forward_backward import Recorded, record
from backward_lens_tl.capture.gradient_capture import Coverage, GradientCapture
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.merging import Gathering
from backward_lens_tl.capture.objectives import (
    Objective,
    as_objective,
    bind_to_prompts,
)
from backward_lens_tl.capture.prompts import Prompt, PromptBatch, Prompts, tokenize_prompts
from backward_lens_tl.capture.selection import select_hook_points
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.selection import find_sites
from backward_lens_tl.models.sites import HookPointSite, Site


def capture_gradients(
    model: nn.Module,
    prompts: Prompts,
    objective: Objective | LossFunction,
    *,
    matrices: str | Sequence[str] = "mlp",
    layers: int | Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    hook_points: str | Sequence[str] | Callable[[str], bool] | None = None,
    memory: Memory | None = None,
) -> GradientCapture:
    """Capture the gradients of weight matrices as factors.

    Works on frozen models and under `torch.no_grad()`. Prompts of similar length go through the
    model together. Hooks that the caller has on the model act on this run: under an activation
    patch, the gradients are those of the patched model, and all prompts go in one pass.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        prompts: A text, several of any lengths, or token ids `[batch, pos]`.
        objective: What is differentiated, for example `target_nll(" Paris")`.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"`, `"all"`.
        layers: Layers, negative ones from the end; `None` for all.
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.
        hook_points: TransformerLens's hook points whose activations and gradients are kept as
            well: a name, several, or a function of the name, as in `run_with_cache`.
        memory: Limits on memory, and how factors are kept.

    Returns:
        The captured gradients, in float32, or in float64 if the model computes in it; a caller's
        autocast does not act on them.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "Obama grew up in", blt.target_nll(" Paris"))
        >>> gradient = capture["W_out", 3]
        >>> gradient.inputs.shape, gradient.vjps.shape
        (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        >>> gradient.rank(), capture["W_out", 7].rank()
        (6, 1)
    """
    work = plan_capture(
        host_of(model),
        prompts,
        objective,
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
        hook_points=hook_points,
        memory=memory,
    )
    gathering = work.gathering()
    for part in work.passes:
        gathering.add(work.record(part), part.prompts)
    return work.capture(gathering)


@dataclass(frozen=True)
class CaptureWork:
    """All that a capture needs, and the passes that it takes.

    Attributes:
        host: The model.
        prompts: All prompts, with the objective's continuations.
        batch: The same, as one batch.
        objective: What is differentiated.
        objective_name: How it was made.
        sites: The matrices, in model order.
        points: Hook points that are kept as well.
        may_skip_points: Whether those that never fire are left out.
        memory: The caller's limits.
        passes: Which prompts and layers go together.
    """

    host: Host
    prompts: tuple[Prompt, ...]
    batch: PromptBatch
    objective: BoundObjective
    objective_name: str
    sites: tuple[Site, ...]
    points: tuple[HookPointSite, ...]
    may_skip_points: bool
    memory: Memory
    passes: tuple[Pass, ...]

    def record(self, part: Pass) -> Recorded:
        """Run the model once.

        Args:
            part: Some prompts and layers.

        Returns:
            Their factors, as they were computed.
        """
        prompts = torch.tensor(part.prompts, device=self.batch.mask.device)
        return record(
            self.host,
            self.batch.part(prompts),
            self.objective,
            [site for site in self.sites if site.layer in part.layers],
            self.points,
            may_skip_points=self.may_skip_points,
        )

    def gathering(self) -> Gathering:
        """Where the passes' results come together."""
        return Gathering(self._kept_batch, self.memory)

    def capture(self, gathering: Gathering) -> GradientCapture:
        """The result of all passes.

        Args:
            gathering: What they gave.

        Returns:
            The captured gradients.
        """
        recorded, batch = gathering.recorded, self._kept_batch
        return GradientCapture(
            gradients=recorded.gradients,
            tokens=batch.tokens,
            mask=batch.mask,
            str_tokens=tuple(self.host.vocabulary.texts(prompt.ids) for prompt in self.prompts),
            prompts=tuple(prompt.text for prompt in self.prompts),
            spans=tuple(prompt.spans for prompt in self.prompts),
            loss=recorded.loss,
            targets=recorded.targets,
            answers=recorded.answers,
            n_layers=self.host.n_layers,
            objective=self.objective_name,
            model_name=self.host.name,
            coverage=_coverage(self.host, self.sites),
            hook_gradients=recorded.hook_gradients,
            attention=recorded.attention,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(dict.fromkeys(site.layer for site in self.sites))

    @property
    def kept_on(self) -> torch.device:
        """The device of the result."""
        return self.memory.device_for(self.batch.mask.device)

    @property
    def _kept_batch(self) -> PromptBatch:
        return self.batch.to(self.kept_on)


def plan_capture(
    host: Host,
    prompts: Prompts,
    objective: Objective | LossFunction,
    *,
    matrices: str | Sequence[str],
    layers: int | Sequence[int] | None,
    prepend_bos: bool | None,
    hook_points: str | Sequence[str] | Callable[[str], bool] | None,
    memory: Memory | None,
) -> CaptureWork:
    """Check the arguments of `capture_gradients`, which it explains, and plan the passes.

    Args:
        host: The model.
        prompts: The prompts.
        objective: What is differentiated.
        matrices: Names or groups of matrices.
        layers: The layers.
        prepend_bos: Whether texts get a BOS token.
        hook_points: Hook points that are kept as well.
        memory: Limits on memory.

    Returns:
        The work.

    Raises:
        InputError: If `memory` is no `Memory`, or its budget too small.
    """
    if not isinstance(memory, Memory | None):
        raise InputError(f"memory is {shown(memory)}; pass a Memory(...), or None for no limits")
    limits, objective = memory or Memory(), as_objective(objective)
    sites = find_sites(host, matrices, layers)
    chosen = tuple(dict.fromkeys(site.layer for site in sites))
    check_sharing(host, sites)
    points = select_hook_points(hook_points, host)
    bound, continued, batch = bind_to_prompts(
        objective, host, tokenize_prompts(host, prompts, prepend_bos)
    )
    lengths = batch.lengths.tolist()
    return CaptureWork(
        host=host,
        prompts=continued,
        batch=batch,
        objective=bound,
        objective_name=objective.name,
        sites=tuple(sites),
        points=tuple(points),
        # As in run_with_cache, a function of the name may name hook points that never fire.
        may_skip_points=callable(hook_points),
        memory=limits,
        passes=tuple(
            plan_passes(
                lengths,
                chosen,
                pass_size(host, sites, bound.n_read(batch), max(lengths)),
                limits,
                in_one=bool(points or host.hooked_modules or bound.looks_at == "batch"),
                by_prompt=bound.looks_at == "prompt",
                groups=host.length_groups(lengths),
            )
        ),
    )


def check_sharing(host: Host, sites: Sequence[Site]) -> None:
    """Refuse a weight that several modules hold, whose gradient is the sum over all of them.

    Args:
        host: The model.
        sites: The matrices.

    Raises:
        UnsupportedModelError: If there is one.
    """
    for site in sites:
        for weight in site.weights:
            holders = host.holders(weight)
            if len(holders) > 1:
                raise UnsupportedModelError(
                    f"{site.matrix} of layer {site.layer} is one weight with {len(holders)} "
                    f"uses ({', '.join(holders)}), and its gradient is the sum over them; untie "
                    "it (give each module a copy) to see its parts"
                )


def _coverage(host: Host, sites: Sequence[Site]) -> Coverage:
    covered = {id(tensor) for site in sites for tensor in (*site.weights, *site.biases)}
    named = host.parameters()
    processed = host.processed_matrices
    captured = dict.fromkeys(site.matrix for site in sites)
    return Coverage(
        covered=tuple(name for name, parameter in named.items() if id(parameter) in covered),
        not_covered=tuple(
            name for name, parameter in named.items() if id(parameter) not in covered
        ),
        parameters="processed" if processed else "raw",
        differing=tuple(matrix for matrix in captured if matrix in processed),
    )
