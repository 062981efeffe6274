"""Proof, on a user's own model, that the captured factors are the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.capture import (
    at_least_float32,
    capture_gradients,
    hooked,
    in_own_precision,
)
from backward_lens_tl.errors import ValidationError
from backward_lens_tl.gradients import MatrixGradient
from backward_lens_tl.host import Host, host_of
from backward_lens_tl.objectives import (
    LossFunction,
    Objective,
    as_objective,
    bind_to_prompts,
    next_token_loss,
)
from backward_lens_tl.prompts import Prompts
from backward_lens_tl.sites import MatrixName, MatrixSite

if TYPE_CHECKING:
    import pandas as pd

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
_HALF_PRECISION_TOLERANCE = 3e-2
"""bfloat16 keeps 8 bits, and autograd itself sums the weight gradient in it."""

_READOUT_PRECISION = _TOLERANCES[torch.float32]
"""Several of Hugging Face's norms compute in float32, whatever the model's dtype."""


@dataclass(frozen=True)
class MatrixError:
    """How far one matrix's factors are from autograd's weight gradient.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        relative_error: `||X^T Delta - dL/dW||_F / ||dL/dW||_F`, the batch's prompts summed; the
            numerator alone where autograd's gradient is zero.
    """

    matrix: MatrixName
    layer: int
    relative_error: float


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """A table of errors, one row per matrix and layer.

    Attributes:
        model_name: The model's name.
        errors: One entry per matrix and layer, in model order.
        readout_error: Largest difference between the model's logits and the Logit Lens of its
            last residual stream, in standard deviations of the logits.
        tolerance: The largest relative error that still is float rounding in the model's dtype.
    """

    model_name: str
    errors: tuple[MatrixError, ...]
    readout_error: float
    tolerance: float

    @property
    def max_error(self) -> float:
        """The largest relative error of any matrix."""
        return max(error.relative_error for error in self.errors)

    @property
    def passed(self) -> bool:
        """Whether every error is float rounding."""
        # Written so that NaN fails.
        gradients = all(error.relative_error <= self.tolerance for error in self.errors)
        return gradients and self.readout_error <= 10 * max(self.tolerance, _READOUT_PRECISION)

    def to_df(self) -> pd.DataFrame:
        """The relative errors, layers by matrices."""
        import pandas as pd

        rows = [(error.layer, error.matrix, error.relative_error) for error in self.errors]
        table = pd.DataFrame(rows, columns=["layer", "matrix", "relative_error"])
        matrices = list(dict.fromkeys(error.matrix for error in self.errors))
        return table.pivot(index="layer", columns="matrix", values="relative_error")[matrices]

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{self.model_name}: {verdict}\n"
            "relative error of X^T Delta against autograd's weight gradient:\n"
            f"{self.to_df().to_string(float_format='{:.1e}'.format)}\n"
            f"Logit Lens of the last residual stream against the logits: {self.readout_error:.1e}\n"
            f"tolerance {self.tolerance:.0e}"
        )


def validate(
    model: nn.Module,
    prompts: Prompts | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    matrices: str | Sequence[str] = "mlp",
) -> ValidationReport:
    """Compare every matrix's `X^T Delta` with autograd's weight gradient, on this model.

    Needs the memory of the weight gradients of all matrices asked for.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; nothing of it is changed.
        prompts: Texts or token ids; by default a sequence of 12 tokens of the vocabulary.
        objective: What is differentiated; by default the training loss, in which every position
            takes part.
        matrices: Names among `W_in`, `W_gate`, `W_out`, or `"mlp"`.

    Returns:
        The table of errors.

    Raises:
        ValidationError: If an error is larger than float rounding; its message has the table.

    Example:
        >>> import backward_lens_tl as blt
        >>> report = blt.validate(blt.load_facts_model())
        >>> report.passed, report.max_error < 1e-5
        (True, True)
    """
    host = host_of(model)
    chosen = as_objective(next_token_loss() if objective is None else objective)
    shown = _some_tokens(host) if prompts is None else prompts
    capture = capture_gradients(model, shown, chosen, matrices=matrices)
    sites = [host.site(gradient.matrix, gradient.layer) for gradient in capture]
    expected, readout_error = _weight_gradients(host, shown, chosen, sites)
    report = ValidationReport(
        model_name=host.name,
        errors=tuple(
            MatrixError(gradient.matrix, gradient.layer, _relative_error(gradient, dense))
            for gradient, dense in zip(capture, expected, strict=True)
        ),
        readout_error=readout_error,
        tolerance=_TOLERANCES.get(sites[0].weight.dtype, _HALF_PRECISION_TOLERANCE),
    )
    if not report.passed:
        raise ValidationError(
            f"the factors of this model are not its gradients, so do not trust the lens on it:\n"
            f"{report!r}"
        )
    return report


def _some_tokens(host: Host) -> Tensor:
    """Twelve different tokens, spread over the vocabulary."""
    # Ids that are both read and predicted, so that the training loss can be taken of them.
    size = min(host.d_vocab, host.d_vocab_out)
    return (torch.arange(1, 1 + min(12, host.n_ctx)) * max(1, size // 13) % size)[None]


def _relative_error(gradient: MatrixGradient, expected: Float[Tensor, "d_in d_out"]) -> float:
    ours = torch.stack([gradient.dense(prompt) for prompt in range(len(gradient.mask))]).sum(0)
    difference, scale = (ours - expected).norm(), expected.norm()
    return float(difference / scale if scale > 0 else difference)


def _weight_gradients(
    host: Host, prompts: Prompts, objective: Objective, sites: Sequence[MatrixSite]
) -> tuple[list[Float[Tensor, "d_in d_out"]], float]:
    """Autograd's own weight gradients, and how well the Logit Lens gives the model's logits."""
    bound, batch = bind_to_prompts(objective, host, prompts, prepend_bos=None)
    weights = [site.weight for site in sites]
    streams: list[Tensor] = []
    with (
        torch.enable_grad(),
        in_own_precision(host),
        _requiring_grad(weights),
        hooked(host.last_resid, streams.append),
    ):
        logits = host.logits(batch.tokens)
        losses = bound.losses(at_least_float32(logits), batch)
        gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
    with torch.no_grad():
        read = host.unembed(streams[0][batch.mask])
        error = (read - logits[batch.mask]).abs().max() / logits.std()
    dense = [
        site.in_out(at_least_float32(gradient))
        for site, gradient in zip(sites, gradients, strict=True)
    ]
    return dense, float(error)


@contextmanager
def _requiring_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let autograd reach weights, frozen ones too, and freeze those again."""
    with ExitStack() as frozen:
        for weight in weights:
            frozen.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
        yield
