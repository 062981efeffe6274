"""Capture the gradients of weight matrices as factors, in one or several microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from backward_lens_tl._checks import shown
from backward_lens_tl.capture.batching import Microbatch, microbatch_size, plan_microbatches
from backward_lens_tl.capture.bound_objectives import BoundObjective, LossFunction, Ranking
from backward_lens_tl.capture.coverage import coverage_of
from backward_lens_tl.capture.forward_backward import Recorded, record
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.likely_mistakes import warn_of_second_bos
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.merging import Merger
from backward_lens_tl.capture.objectives import (
    Objective,
    Targets,
    as_objective,
    bind_to_prompts,
    target_ids,
)
from backward_lens_tl.capture.prompts import Prompt, PromptBatch, Prompts, tokenize_prompts
from backward_lens_tl.capture.selection import select_hook_points
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import check_sharing, find_sites
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

    Works on frozen models and under `torch.no_grad()`. Prompts of similar length share a
    microbatch. Hooks that the caller has on the model are active: under an activation patch, the
    gradients are those of the patched model, and all prompts share one microbatch.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        prompts: A text, several of any lengths, token ids `[batch, pos]`, the output of a
            tokenizer, or the messages of a chat or of several, as in `backward_lens`.
        objective: What to differentiate, for example `target_nll(" Paris")`.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"`, `"all"`.
        layers: Layers, negative ones from the end; `None` for all.
        prepend_bos: Whether to prepend a BOS token to texts; `None` uses the model's default.
        hook_points: TransformerLens's hook points whose activations and gradients are kept too: a
            name, several, or a function of the name, as in `run_with_cache`.
        memory: Limits on memory, and how factors are kept.

    Returns:
        The captured gradients, in float32, or in float64 if the model is. The caller's autocast
        does not apply.

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
    plan = plan_capture(
        host_of(model),
        prompts,
        objective,
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
        hook_points=hook_points,
        memory=memory,
    )
    return plan.run()


@dataclass(frozen=True)
class CapturePlan:
    """A checked capture and the microbatches that it needs.

    Attributes:
        host: The model.
        prompts: All prompts, with the objective's continuations.
        batch: The same, as one batch.
        objective: What to differentiate.
        objective_name: Its name, with its arguments.
        sites: The matrices, in model order.
        points: Hook points that are kept too.
        may_skip_points: Whether to leave out hook points that never fire.
        memory: The caller's limits.
        microbatches: Which prompts and layers share a microbatch.
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
    microbatches: tuple[Microbatch, ...]

    def run(self, read: Callable[[Recorded, Sequence[int]], None] | None = None) -> GradientCapture:
        """Run all microbatches and merge what they record.

        Args:
            read: Called after each microbatch with what it recorded and the indices of its prompts,
                before factors are rounded or moved.

        Returns:
            The captured gradients.
        """
        batch = self.batch.to(self.kept_on)
        merger = Merger(batch, self.memory)
        for each in self.microbatches:
            recorded = self.record(each)
            if read is not None:
                read(recorded, each.prompts)
            merger.add(recorded, each.prompts)
            del recorded  # before the next microbatch allocates
        merged = merger.merged
        wanted = self.objective.wanted_tokens(merged.predictions.answers, batch)
        return GradientCapture(
            gradients=merged.gradients,
            tokens=batch.tokens,
            mask=batch.mask,
            str_tokens=tuple(self.host.vocabulary.texts(prompt.ids) for prompt in self.prompts),
            prompts=tuple(prompt.text for prompt in self.prompts),
            spans=tuple(prompt.spans for prompt in self.prompts),
            turns=tuple(prompt.turns for prompt in self.prompts),
            loss=merged.loss,
            targets=merged.targets,
            target_texts=None if wanted is None else self._texts(wanted),
            predictions=merged.predictions,
            prompt_lengths=self.objective.prompt_lengths(batch),
            n_layers=self.host.n_layers,
            objective=self.objective_name,
            model_name=self.host.name,
            coverage=coverage_of(self.host, self.sites),
            hook_gradients=merged.hook_gradients,
            attention=merged.attention,
        )

    def record(self, some: Microbatch) -> Recorded:
        """Run one forward and backward pass.

        Args:
            some: Its prompts and layers.

        Returns:
            Their factors, as they were computed.
        """
        return record(
            self.host,
            self.batch_of(some.prompts),
            self.objective,
            [site for site in self.sites if site.layer in some.layers],
            self.points,
            may_skip_points=self.may_skip_points,
        )

    def ranking(self, target: Targets, multi_token: MultiToken | None) -> CapturePlan:
        """The same capture, with readouts compared with a target instead of the objective's own.

        Args:
            target: The target, or one per prompt.
            multi_token: Which token represents a text of several tokens.

        Returns:
            The plan.
        """
        ids = target_ids(target, self.prompts, multi_token)
        objective = Ranking(self.objective, ids, self.objective.looks_at)
        return replace(self, objective=objective)

    def _texts(self, wanted: Int[Tensor, "batch n"]) -> tuple[str, ...]:
        """Text of the tokens that are wanted after each prompt."""
        return tuple(
            self.host.vocabulary.running_text([token for token in row if token >= 0])
            for row in wanted.tolist()
        )

    def batch_of(self, prompts: Sequence[int]) -> PromptBatch:
        """Some of the prompts, as a batch."""
        return self.batch.part(torch.tensor(prompts, device=self.batch.mask.device))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(dict.fromkeys(site.layer for site in self.sites))

    @property
    def kept_on(self) -> torch.device:
        """The device of the result."""
        return self.memory.device_for(self.batch.mask.device)


def plan_capture(
    host: Host,
    prompts: Prompts,
    objective: Objective | LossFunction,
    *,
    matrices: str | Sequence[str],
    layers: int | Sequence[int] | None,
    prepend_bos: bool | None = None,
    hook_points: str | Sequence[str] | Callable[[str], bool] | None = None,
    memory: Memory | None = None,
) -> CapturePlan:
    """Check the arguments of `capture_gradients` and plan the microbatches.

    Args:
        host: The model.
        prompts: The prompts.
        objective: What to differentiate.
        matrices: Names or groups of matrices.
        layers: The layers.
        prepend_bos: Whether to prepend a BOS token to texts.
        hook_points: Hook points to keep too.
        memory: Limits on memory.

    Returns:
        The plan.

    Raises:
        InputError: If `memory` is not a `Memory`, or its budget is too small.
    """
    if not isinstance(memory, Memory | None):
        raise InputError(f"memory is {shown(memory)}; pass a Memory(...), or None for no limits")
    limits, objective = memory or Memory(), as_objective(objective)
    sites = find_sites(host, matrices, layers)
    chosen = tuple(dict.fromkeys(site.layer for site in sites))
    check_sharing(host, sites)
    points = select_hook_points(hook_points, host)
    tokenized = tokenize_prompts(host, prompts, prepend_bos)
    if not isinstance(prompts, Tensor):
        warn_of_second_bos(host, tokenized)
    bound, continued, batch = bind_to_prompts(objective, host, tokenized)
    lengths = batch.lengths.tolist()
    microbatches = plan_microbatches(
        lengths,
        chosen,
        microbatch_size(host, sites, bound.n_read(batch), max(lengths)),
        limits,
        in_one=bool(points or host.hooked_modules or bound.looks_at == "batch"),
        by_prompt=bound.looks_at == "prompt",
        groups=host.length_groups(lengths),
    )
    return CapturePlan(
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
        microbatches=tuple(microbatches),
    )
