"""Fine-tuning on the fact alone: the baseline of the paper, and its norm-constrained variant.

The weights are never touched: what is trained is the change `D`, which starts at zero and is added
to the matrix's output as `x @ D`. The gradient at `D` is that at the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, check_number, is_integer, listed, shown
from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.forward_backward import read_logits
from backward_lens_tl.capture.hooks import requiring_grad
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.activations import adding
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MATRIX_NAMES, MatrixName, MatrixSite

FineTuningObjective = Literal["teacher_forced", "prompt_last"]
FineTuningOptimizer = Literal["adam", "sgd"]

_OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class FineTuning(EditMethod):
    """Train single matrices until the model answers as it is taught.

    The loss is the mean over the requests of the mean over the target's tokens of `-log p`. Dense
    changes come out, one per matrix.

    Attributes:
        layers: The layers, negative ones from the end; the paper has layer 0 and a late one.
        matrices: Which of the MLP's matrices in each.
        optimizer: torch's, with its own defaults but for the learning rate.
        lr: The learning rate.
        steps: Steps at most.
        norm_constraint: Each entry changes by at most this (FT-L); `None` for no limit.
        train_bias: Whether the bias is trained too, as in the published tools; where all of it is
            zero, as `HookedTransformer` has it for models without one, it stays so.
        objective: `"teacher_forced"` reads each of the target's tokens behind those before it;
            `"prompt_last"` reads all of them at the prompt's last token, as the published tools do,
            which makes each the next token. They agree for targets of one token.
        stop_at: No more steps once the loss, in nats, is below this.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

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

    layers: int | Sequence[int]
    matrices: MatrixName | Sequence[MatrixName] = ("W_out",)
    optimizer: FineTuningOptimizer = "adam"
    lr: float = 5e-4
    steps: int = 25
    norm_constraint: float | None = None
    train_bias: bool = True
    objective: FineTuningObjective = "teacher_forced"
    stop_at: float = 0.01
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "matrices"):
            object.__setattr__(self, name, tuple(listed(getattr(self, name))))
        check_choice("optimizer", self.optimizer, get_args(FineTuningOptimizer), EditError)
        check_choice("objective", self.objective, get_args(FineTuningObjective), EditError)
        if not is_integer(self.steps) or self.steps < 1:
            raise EditError(f"steps is {shown(self.steps)}; pass an integer from 1 on")
        for name in ("layers", "matrices"):
            if not getattr(self, name):
                raise EditError(f"there is nothing in {name}; name at least one")
        for matrix in self.matrices:
            check_choice("matrices", matrix, MATRIX_NAMES, EditError)
        check_number("lr", self.lr, zero=False, error=EditError)
        check_number("stop_at", self.stop_at, zero=True, error=EditError)
        if self.norm_constraint is not None:
            check_number("norm_constraint", self.norm_constraint, zero=False, error=EditError)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Train the changes of all matrices together."""
        sites = find_editable(host, self.matrices, self.layers, mlp_only=True)
        changes = [_Change.at(site, with_bias=self.train_bias) for site in sites]
        self._train(self._loss(host, requests), changes, host)
        return [change.delta() for change in changes]

    def _train(
        self, loss: Callable[[], Float[Tensor, ""]], changes: Sequence[_Change], host: Host
    ) -> None:
        leaves = [leaf for change in changes for leaf in change.leaves]
        optimizer = _OPTIMIZERS[self.optimizer](leaves, lr=self.lr)
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(requiring_grad((), among=host.trained()))
            for change in changes:
                hooks.enter_context(adding(change.site, change.added))
            for _ in range(self.steps):
                value = loss()
                if float(value.detach()) < self.stop_at:
                    break
                optimizer.zero_grad()
                value.backward(inputs=leaves)
                optimizer.step()
                if self.norm_constraint is not None:
                    for leaf in leaves:
                        leaf.data.clamp_(-self.norm_constraint, self.norm_constraint)

    def _loss(
        self, host: Host, requests: Sequence[TokenizedRequest]
    ) -> Callable[[], Float[Tensor, ""]]:
        prompts = [request.prompt for request in requests]
        targets = [request.target for request in requests]
        if self.objective == "teacher_forced":
            taught = Continuations.of(host, prompts, targets)
            return lambda: taught.nll(taught.logits(host)).mean()
        batch = pad_prompts(host, prompts)

        def at_prompt_last() -> Float[Tensor, ""]:
            log_probs = read_logits(host, batch, n_read=1)[:, -1].log_softmax(-1)
            own = [-log_probs[row, list(ids)].mean() for row, ids in enumerate(targets)]
            return torch.stack(own).mean()

        return at_prompt_last


@dataclass(frozen=True)
class _Change:
    """The change of one matrix while it is trained.

    Attributes:
        site: The matrix.
        weight: What is added to it.
        bias: What is added to its bias, if that is trained.
    """

    site: MatrixSite
    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, "d_out"] | None

    @classmethod
    def at(cls, site: MatrixSite, *, with_bias: bool) -> _Change:
        """No change yet."""
        stored = site.weight.in_out(site.weight.parameter.detach())
        # One of zeros alone TransformerLens puts where the original model has none.
        has_bias = site.bias is not None and bool(site.bias.detach().any())
        bias = site.bias if with_bias and has_bias else None
        return cls(
            site,
            torch.zeros_like(stored, memory_format=torch.contiguous_format).requires_grad_(),
            None if bias is None else torch.zeros_like(bias.detach()).requires_grad_(),
        )

    @property
    def leaves(self) -> list[Tensor]:
        """What is trained."""
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
