"""Fine-tuning on the fact alone: the paper's baseline, and its norm-constrained variant.

The weights never change: the trained tensor is the change `D`, which starts at zero and is added
to the matrix's output as `x @ D`. The gradient of `D` equals that of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.interventions import adding, requiring_grad
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod, Layers
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import RepeatedPasses
from backward_lens_tl.models.sites import MatrixName, MatrixSite
from backward_lens_tl.settings import Count, NonNegative, Positive

FineTuningObjective = Literal["teacher_forced", "prompt_last"]
FineTuningOptimizer = Literal["adam", "sgd"]

_OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class FineTuning(EditMethod):
    """Train single matrices until the model predicts the new answers.

    The loss is the mean over requests of the mean over the target's tokens of `-log p`. The result
    is one dense change per matrix, trained in float32 also if the model has half precision. A loss
    that is not finite is an `EditError`.

    Attributes:
        layers: The layers, negative ones from the end; the paper has layer 0 and a late one.
        matrices: Which matrices of the MLP in each layer.
        optimizer: An optimizer of torch, with its default settings except for the learning rate.
        lr: The learning rate.
        steps: Maximum number of steps.
        norm_constraint: Maximum change of an entry (FT-L); `None` for no limit.
        train_bias: Whether to train the bias as well, as the published tools do; a bias of zeros,
            which `HookedTransformer` has for models without one, is not trained.
        objective: `"teacher_forced"` predicts each of the target's tokens after those before it;
            `"prompt_last"` predicts all of them at the prompt's last token, as the published tools
            do, so each is trained as the next token. They agree for targets of one token.
        stop_at: Stop when the loss, in nats, is below this.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.editing import EditRequest, FineTuning
        >>> model = blt.load_facts_model()
        >>> request = EditRequest("Lionel Messi plays for", " Paris")
        >>> delta = FineTuning(layers=6, lr=5e-3)(model, request)
        >>> with delta.applied(model):
        ...     blt.backward_lens(model, request.prompt).target()
        ' Paris'
    """

    layers: int | Layers
    matrices: MatrixName | Sequence[MatrixName] = ("W_out",)
    optimizer: FineTuningOptimizer = "adam"
    lr: Positive = 5e-4
    steps: Count = 25
    norm_constraint: Positive | None = None
    train_bias: bool = True
    objective: FineTuningObjective = "teacher_forced"
    stop_at: NonNegative = 0.01

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Train the changes of all matrices together."""
        sites = find_editable(host, self.matrices, self.layers, mlp_only=True)
        changes = [_Change.at(site, with_bias=self.train_bias) for site in sites]
        leaves = [leaf for change in changes for leaf in change.leaves]
        loss = self._loss(host, requests)
        passes = RepeatedPasses(host, min(site.layer for site in sites))
        optimizer = _OPTIMIZERS[self.optimizer](leaves, lr=self.lr)
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(requiring_grad((), among=host.trained()))
            for change in changes:
                hooks.enter_context(adding(change.site, change.added))
            for step in range(1, self.steps + 1):
                with passes.next():
                    value = loss()
                now = float(value.detach())
                if not math.isfinite(now):
                    raise EditError(
                        f"the loss is {now} in step {step} of fine-tuning; use a smaller lr, or a "
                        "model in higher precision"
                    )
                if now < self.stop_at:
                    break
                optimizer.zero_grad()
                value.backward(inputs=leaves)
                optimizer.step()
                if self.norm_constraint is not None:
                    for leaf in leaves:
                        leaf.data.clamp_(-self.norm_constraint, self.norm_constraint)
        return [change.delta() for change in changes]

    def _loss(
        self, host: Host, requests: Sequence[TokenizedRequest]
    ) -> Callable[[], Float[Tensor, ""]]:
        prompts = [request.prompt for request in requests]
        targets = [request.target for request in requests]
        if self.objective == "teacher_forced":
            answers = Continuations.of(host, prompts, targets)
            return lambda: answers.nll(answers.logits(host)).mean()
        batch = pad_prompts(host, prompts)

        def at_prompt_last() -> Float[Tensor, ""]:
            log_probs = read_logits(host, batch, n_read=1)[:, -1].log_softmax(-1)
            own = [-log_probs[row, list(ids)].mean() for row, ids in enumerate(targets)]
            return torch.stack(own).mean()

        return at_prompt_last


@dataclass(frozen=True)
class _Change:
    """The change of one matrix, and of its bias if that is trained, during training."""

    site: MatrixSite
    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, "d_out"] | None

    @classmethod
    def at(cls, site: MatrixSite, *, with_bias: bool) -> _Change:
        """A change of zeros, in float32 for models in half precision, as Adam's squares need."""
        like = at_least_float32(site.weight.parameter.detach()[:0])
        weight = like.new_zeros(site.shape).requires_grad_()
        # TransformerLens has a bias of zeros where the original model has none.
        has_bias = site.bias is not None and bool(site.bias.detach().any())
        bias = site.bias if with_bias and has_bias else None
        return cls(
            site, weight, None if bias is None else like.new_zeros(bias.shape).requires_grad_()
        )

    @property
    def leaves(self) -> list[Tensor]:
        """The trained tensors."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def added(self, reads: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What the change adds to the matrix's output."""
        written = reads.to(self.weight.dtype) @ self.weight
        return written if self.bias is None else written + self.bias

    def delta(self) -> MatrixDelta:
        """The change as it is now."""
        return MatrixDelta(
            self.site.matrix,
            self.site.layer,
            values=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
        )
