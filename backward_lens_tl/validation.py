"""Check on any model that the captured factors are its gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import listed
from backward_lens_tl.capture.bound_objectives import BoundObjective, LossFunction
from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.interventions import requiring_grad
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import (
    Objective,
    as_objective,
    bind_to_prompts,
    next_token_loss,
)
from backward_lens_tl.capture.plan import capture_gradients, plan_capture
from backward_lens_tl.capture.prompts import PromptBatch, Prompts, tokenize_prompts
from backward_lens_tl.errors import UnsupportedModelError, ValidationError
from backward_lens_tl.models import (
    Host,
    host_of,
    logit_error,
    logits_and_readout,
    plain_error,
    probe,
)
from backward_lens_tl.models.matrix_selection import find_sites
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MATRIX_NAMES, MatrixName, Site

if TYPE_CHECKING:
    import pandas as pd

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
_HALF_PRECISION_TOLERANCE = 3e-2
"""bfloat16 keeps 8 bits, and autograd itself sums the weight gradient in it."""

_READOUT_PRECISION = _TOLERANCES[torch.float32]
"""Several of Hugging Face's norms compute in float32, whatever the model's dtype."""


@dataclass(frozen=True)
class MatrixError:
    """Error of one matrix's factors against autograd's weight gradient.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        relative_error: `||X^T Delta - dL/dW||_F / ||dL/dW||_F` over all prompts, heads and experts
            together; the numerator alone if autograd's gradient is zero.
        float32_error: For a model in half precision, the same error against the factors of a
            float32 copy: the cost of its rounding. `None` for other models.
    """

    matrix: MatrixName
    layer: int
    relative_error: float
    float32_error: float | None = None


@dataclass(frozen=True, repr=False)
class ValidationReport:
    """A table of errors, one row per matrix and layer.

    Attributes:
        model_name: The model's name.
        errors: One entry per matrix and layer, in model order.
        readout_error: Largest difference between the model's logits and the Logit Lens of its
            last residual stream, in units of the spread of the logits.
        tolerance: The largest relative error that counts as rounding in the model's dtype.
        refused: What cannot be analysed on this model, `"attn"` or `"mlp"`, with the reason.
        causality_error: Largest change of the logits before a token when the token changes, in the
            same units; `None` while hooks of the caller are on the model, which would see it.
        forward_error: Largest difference between the analysed logits and those of a plain call of
            the model; units and `None` as above.
        plain_error: Largest difference between the model's logits and those of the Hugging Face
            model, measured when `load_model` loads from a folder; `None` for other models.

    Examples:
        >>> import backward_lens_tl as blt
        >>> report = blt.validate(blt.load_facts_model(), matrices="mlp")
        >>> report.max_error <= report.tolerance, report.passed
        (True, True)
    """

    model_name: str
    errors: tuple[MatrixError, ...]
    readout_error: float
    tolerance: float
    refused: Mapping[str, str] = field(default_factory=dict)
    causality_error: float | None = None
    forward_error: float | None = None
    plain_error: float | None = None

    @property
    def max_error(self) -> float:
        """The largest relative error of any matrix."""
        return max(error.relative_error for error in self.errors)

    @property
    def passed(self) -> bool:
        """Whether every error is rounding."""
        # NaN fails these comparisons.
        gradients = all(error.relative_error <= self.tolerance for error in self.errors)
        return gradients and self.readout_error <= 10 * max(self.tolerance, _READOUT_PRECISION)

    def to_df(self, column: str = "relative_error") -> pd.DataFrame:
        """Errors, layers by matrices.

        Args:
            column: `"relative_error"`, or `"float32_error"` for a model in half precision.

        Returns:
            The table.

        Examples:
            >>> table = blt.validate(model, matrices="mlp").to_df()
            >>> table.shape, list(table.columns)  # layers by matrices
            ((8, 2), ['W_in', 'W_out'])
        """
        import pandas as pd

        rows = [(error.layer, error.matrix, getattr(error, column)) for error in self.errors]
        table = pd.DataFrame(rows, columns=["layer", "matrix", column])
        matrices = list(dict.fromkeys(error.matrix for error in self.errors))
        return table.pivot(index="layer", columns="matrix", values=column)[matrices]

    def __repr__(self) -> str:
        lines = [
            f"{self.model_name}: {'passed' if self.passed else 'FAILED'}",
            "relative error of X^T Delta against autograd's weight gradient:",
            self.to_df().to_string(float_format="{:.1e}".format),
        ]
        if self.errors[0].float32_error is not None:
            lines += [
                "relative error of X^T Delta against a float32 copy of the model:",
                self.to_df("float32_error").to_string(float_format="{:.1e}".format),
            ]
        lines += [f"{group}: refused, {reason}" for group, reason in self.refused.items()]
        lines += [
            f"Logit Lens of the last residual stream against the logits: {self.readout_error:.1e}",
            *(
                f"{what}: {error:.1e}"
                for what, error in (
                    ("logits before a token when the token changes", self.causality_error),
                    ("logits against those of a plain call", self.forward_error),
                    ("logits against those of the Hugging Face model", self.plain_error),
                )
                if error is not None
            ),
            f"tolerance {self.tolerance:.0e}",
        ]
        return "\n".join(lines)


def validate(
    model: nn.Module,
    prompts: Prompts | None = None,
    *,
    objective: Objective | LossFunction | None = None,
    matrices: str | Sequence[str] | None = None,
) -> ValidationReport:
    """Compare every matrix's `X^T Delta` with autograd's weight gradient, on this model.

    Needs memory for the weight gradients of all requested matrices and, for a model in half
    precision, for a float32 copy of the model.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is not changed.
        prompts: Texts or token ids; by default a sequence of 12 tokens of the vocabulary.
        objective: What to differentiate; by default the training loss, which involves every
            position.
        matrices: As in `backward_lens`; by default all matrices that can be analysed. The report
            gives the reason if attention or MLPs cannot.

    Returns:
        The table of errors.

    Raises:
        ValidationError: If an error is larger than rounding; the message contains the table.
        UnsupportedModelError: If no matrix of the model can be analysed.

    Examples:
        >>> import backward_lens_tl as blt
        >>> report = blt.validate(blt.load_facts_model())
        >>> report.passed, report.max_error < 1e-5
        (True, True)
    """
    host = host_of(model)
    chosen = as_objective(next_token_loss() if objective is None else objective)
    # The prompts are read several times, which would exhaust an iterator.
    shown = _some_tokens(host) if prompts is None else _kept(prompts)
    matrices = None if matrices is None else listed(matrices)
    found, refused = _gradients(host, shown, chosen, matrices)
    sites = [find_sites(host, gradient.matrix, gradient.layer)[0] for gradient in found]
    expected, readout_error = weight_gradients(host, shown, chosen, sites)
    dtype, seen = sites[0].weights[0].dtype, probe(host)
    widened = found if dtype in _TOLERANCES else _in_float32(host, shown, chosen, matrices)
    report = ValidationReport(
        model_name=host.name,
        errors=tuple(
            _matrix_error(gradient, dense, None if wide is gradient else wide)
            for gradient, dense, wide in zip(found, expected, widened, strict=True)
        ),
        readout_error=readout_error,
        tolerance=_TOLERANCES.get(dtype, _HALF_PRECISION_TOLERANCE),
        refused=refused,
        causality_error=None if seen is None else seen.causality_error,
        forward_error=None if seen is None else seen.forward_error,
        plain_error=plain_error(host.model),
    )
    if not report.passed:
        what = (
            "the factors of this model are not its gradients, so do not trust the lens on it"
            if not report.max_error <= report.tolerance
            else "the factors are this model's gradients, but the Logit Lens does not "
            "reproduce its logits, so do not trust the tokens"
        )
        raise ValidationError(f"{what}:\n{report!r}")
    return report


def _gradients(
    host: Host, prompts: Prompts, objective: Objective, matrices: str | Sequence[str] | None
) -> tuple[list[MatrixGradient], dict[str, str]]:
    """The requested gradients, or all that are supported and the reasons for the others."""
    refused: dict[str, str] = {}
    found: list[MatrixGradient] = []
    for group in ("attn", "mlp") if matrices is None else (matrices,):
        try:
            found += capture_gradients(host.model, prompts, objective, matrices=group)
        except UnsupportedModelError as error:
            if matrices is not None:
                raise
            refused[str(group)] = str(error)
    if not found:
        raise UnsupportedModelError("; ".join(refused.values()))
    order = {name: index for index, name in enumerate(MATRIX_NAMES)}
    found.sort(key=lambda gradient: (gradient.layer, order[gradient.matrix]))
    return found, refused


def _kept(prompts: Prompts) -> Prompts:
    return prompts if isinstance(prompts, str | Tensor | Mapping) else listed(prompts)


def _some_tokens(host: Host) -> Tensor:
    """Twelve different tokens, spread over the vocabulary."""
    # Ids that are both read and predicted, as the training loss needs.
    size = min(host.d_vocab, host.d_vocab_out)
    usual: Tensor = host.model.b_U[:size].isfinite().nonzero()[:, 0]
    places = torch.arange(1, 1 + min(12, host.n_ctx)) * max(1, len(usual) // 13) % len(usual)
    return usual[places.to(usual.device)][None]


def _in_float32(
    host: Host, prompts: Prompts, objective: Objective, matrices: str | Sequence[str] | None
) -> list[MatrixGradient]:
    """The gradients of a float32 copy of the model."""
    # A bridge keeps its last attention pattern, and torch does not copy tensors with a graph.
    with torch.no_grad():
        host.logits(bind_to_prompts(objective, host, tokenize_prompts(host, prompts))[2].tokens)
    widened = copy.deepcopy(host.model).float()
    for module in widened.modules():
        # Processed weights of a bridge's gated MLPs are not parameters.
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.float())
    # TransformerLens's modules round to the dtype in their configuration.
    setattr(widened.cfg, "dtype", torch.float32)  # noqa: B010  (cfg has no static type)
    return _gradients(host_of(widened), prompts, objective, matrices)[0]


def _matrix_error(
    gradient: MatrixGradient,
    expected: Float[Tensor, "*head d_in d_out"],
    in_float32: MatrixGradient | None,
) -> MatrixError:
    ours = _summed(gradient)
    widened = None if in_float32 is None else _relative_error(ours, _summed(in_float32))
    return MatrixError(gradient.matrix, gradient.layer, _relative_error(ours, expected), widened)


def _summed(gradient: MatrixGradient) -> Float[Tensor, "*head d_in d_out"]:
    return torch.stack([gradient.dense(prompt) for prompt in range(len(gradient.mask))]).sum(0)


def _relative_error(
    found: Float[Tensor, "*head d_in d_out"], expected: Float[Tensor, "*head d_in d_out"]
) -> float:
    expected = expected.to(found.device)
    difference, scale = (found - expected).norm(), expected.norm()
    return float(difference / scale if scale > 0 else difference)


def weight_gradients(
    host: Host, prompts: Prompts, objective: Objective, sites: Sequence[Site]
) -> tuple[list[Float[Tensor, "*head d_in d_out"]], float]:
    """Autograd's own weight gradients, and the error of the Logit Lens.

    The passes are those of `capture_gradients`, and logits are read at the same positions: products
    of other shapes round differently, and where a softmax is nearly one-hot, `p - 1` magnifies it.

    Args:
        host: The model.
        prompts: Texts or token ids.
        objective: What to differentiate.
        sites: The matrices.

    Returns:
        The gradient of each matrix, summed over prompts, and the largest difference between the
        logits and the Logit Lens of the last residual stream, in units of the spread of the logits.
    """
    plan = plan_capture(
        host,
        prompts,
        objective,
        matrices=list(dict.fromkeys(site.matrix for site in sites)),
        layers=sorted({site.layer for site in sites}),
    )
    # Matrices that are stacked in one parameter share it.
    weights = list({id(weight): weight for site in sites for weight in site.weights}.values())
    totals, errors = [torch.zeros(()) for _ in weights], []
    for each in plan.microbatches:
        gradients, error = _of_a_pass(host, plan.batch_of(each.prompts), plan.objective, weights)
        totals = [total.to(own.device) + own for total, own in zip(totals, gradients, strict=True)]
        errors.append(error)
    found = dict(zip(map(id, weights), totals, strict=True))
    dense = [site.dense([found[id(weight)] for weight in site.weights]) for site in sites]
    return dense, float(torch.tensor(errors).max())  # unlike Python's, it propagates NaN


def _of_a_pass(
    host: Host, batch: PromptBatch, objective: BoundObjective, weights: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """The gradient of each weight, and the error of the Logit Lens."""
    with (
        torch.enable_grad(),
        host.own_precision(),
        requiring_grad(weights, among=()),
    ):
        losses = objective.losses(read_logits(host, batch, objective.n_read(batch)), batch)
        gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
    logits, read = logits_and_readout(host, lambda: host.logits(batch.tokens), batch.mask)
    return list(map(at_least_float32, gradients)), logit_error(read, logits)
