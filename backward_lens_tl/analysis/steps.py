"""Imprint and shift: the effect of one gradient step, predicted and measured (lemma 5.2).

After a step `W <- W - eta dL/dW` on one matrix, a second run on the same prompt gives this matrix
the same inputs, because they do not depend on `W`. Its output at position `p` therefore changes by
exactly

    -eta * sum_i (x_p . x_i) delta_i

(paper, lemma 5.2, equations 13 and 14, figures 1 and 3): the input of a position is compared with
the *imprinted* input of every position, and the output is *shifted* against the VJP of each. The
loss changes by `-eta ||dL/dW||_F^2`, to first order only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import checked_number
from backward_lens_tl.capture.batching import Microbatch
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import Targets, target_nll
from backward_lens_tl.capture.plan import CapturePlan, plan_capture
from backward_lens_tl.capture.prompts import PromptBatch, Prompts
from backward_lens_tl.choices import MultiToken
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import WRITING_MATRICES, MatrixSite
from backward_lens_tl.models.weight_patching import stepped
from backward_lens_tl.readout.cells import cosines
from backward_lens_tl.readout.vectors import read_vectors

if TYPE_CHECKING:
    import pandas as pd

_USUAL_GAIN = 0.01
"""Default decrease of the loss, as a fraction of it, to first order."""


@torch.no_grad()
def step_changes(
    model: nn.Module,
    prompts: Prompts,
    target: Targets | None,
    *,
    learning_rate: float | None = None,
    matrices: str | Sequence[str] = "mlp",
    layers: int | Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    multi_token: MultiToken | None = None,
) -> pd.DataFrame:
    """Take a gradient step on each matrix separately, and measure what it changes.

    Every step is on one matrix, for one prompt, and is undone bit for bit before the next. Each
    step takes one forward pass, and each prompt one backward pass. One weight gradient,
    `[d_in, d_out]`, is in memory at a time. Prompts are run one by one; the caller's hooks on the
    model are active.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is restored even after exceptions.
        prompts: A text, several of any lengths, or token ids `[batch, pos]`.
        target: What the model should predict next, as in `backward_lens`; the loss is its negative
            log-likelihood.
        learning_rate: `eta`. `None` uses, for each gradient, the rate at which the loss falls by
            1 % to first order, `0.01 L / ||dL/dW||_F^2`, and 0 if the gradient is zero.
        matrices: As in `backward_lens`.
        layers: Layers, negative ones from the end; `None` for all.
        prepend_bos: Whether to prepend a BOS token to texts; `None` uses the model's default.
        multi_token: Which token represents a target text of several, `"first"` or `"last"`.

    Returns:
        One row per prompt, matrix and layer, in the order of a forward pass:

        - `prompt`, `matrix`, `layer`, `learning_rate`;
        - `output_change`: Frobenius norm, over positions, of the measured change of the matrix's
          output;
        - `output_error`: `||measured - predicted||_F / ||predicted||_F` of that change; it differs
          from 0 only by rounding;
        - `rounding`: the order of magnitude of `output_error` that rounding causes: the `eps` of
          the model's dtype times `||output||_F / ||predicted||_F`. It decreases with the learning
          rate;
        - `self_imprint`: cosine, at the last position `n`, of the predicted change and the term
          that comes from this position, `-eta ||x_n||^2 delta_n`. Near 1, the output is shifted
          against its own VJP, as the lemma states for one position;
        - `loss`: before the step, in nats; `loss_change`: its measured change;
          `predicted_loss_change`: `-eta ||dL/dW||_F^2`, to first order;
        - `shift_target_rank`: the target's rank by the Logit Lens in the measured change of the
          output at the last position, 0 for the most promoted token; missing for matrices that read
          the residual stream. A small learning rate gives a short change, which reads mostly as the
          final norm's bias.

        `output_error`, `rounding`, `self_imprint` and `shift_target_rank` are missing where the
        change is zero.

    Raises:
        InputError: If an argument is not usable.
        UnsupportedModelError: If a matrix is a mixture of experts, or cannot be changed.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.analysis.steps import step_changes
        >>> model = blt.load_facts_model()
        >>> steps = step_changes(model, "Lionel Messi plays for", " Paris", layers=[5, 6])
        >>> bool((steps["output_error"] < 1e-3).all())
        True
    """
    import pandas as pd

    rate = _checked_rate(learning_rate)
    plan = plan_capture(
        host_of(model),
        prompts,
        target_nll(target, multi_token),
        matrices=matrices,
        layers=layers,
        prepend_bos=prepend_bos,
    )
    sites = find_editable(plan.host, matrices, layers)
    # Prompt by prompt, so that products before and after the step have the same shape.
    by_prompt = (_rows(plan, sites, prompt, rate) for prompt in range(len(plan.batch.mask)))
    table = pd.DataFrame([row for rows in by_prompt for row in rows])
    return table.astype({"shift_target_rank": "Int64"})


def _checked_rate(learning_rate: object) -> float | None:
    if learning_rate is None:
        return None
    usual = f", or None for the one at which the loss falls by {_USUAL_GAIN:.0%}"
    return checked_number("learning_rate", learning_rate, is_positive=True, or_else=usual)


# --- one prompt --------------------------------------------------------------------------------


def _rows(
    plan: CapturePlan, sites: Sequence[MatrixSite], prompt: int, rate: float | None
) -> list[dict[str, Any]]:
    """A step on each matrix for one prompt."""
    recorded = plan.record(Microbatch((prompt,), plan.layers))
    batch = plan.batch_of([prompt])
    # The same target before and after, even if it is the model's own answer.
    target = -1 if recorded.targets is None else int(recorded.targets[0, -1])
    before = _run(plan.host, batch, target, sites)
    steps = []
    for site, output in zip(sites, before.outputs, strict=True):
        prediction = _Prediction.of(recorded.gradients[site.matrix, site.layer])
        eta = _usual_rate(before.loss, prediction.squared_norm) if rate is None else rate
        with stepped(site, -eta * prediction.gradient.dense()):
            after = _run(plan.host, batch, target, [site])
        steps.append(
            _Step(site, prediction, eta, output, after.outputs[0], before.loss, after.loss)
        )
    ranks = _shift_target_ranks(plan.host, steps, target)
    return [
        {"prompt": prompt, **step.row(), "shift_target_rank": rank}
        for step, rank in zip(steps, ranks, strict=True)
    ]


def _usual_rate(loss: float, squared_norm: float) -> float:
    return _USUAL_GAIN * loss / squared_norm if squared_norm else 0.0


@dataclass(frozen=True)
class _Run:
    """A forward pass over one prompt.

    Attributes:
        outputs: The output of each matrix, as the model computed it.
        loss: The loss.
    """

    outputs: list[Float[Tensor, "pos _"]]
    loss: float


def _run(host: Host, batch: PromptBatch, target: int, sites: Sequence[MatrixSite]) -> _Run:
    seen = forward_pass(host, batch, outputs=sites)
    outputs = [
        _joined_output(output, site, len(batch.mask[0]))
        for site, output in zip(sites, seen.outputs, strict=True)
    ]
    return _Run(outputs, -float(seen.logits[0].double().log_softmax(-1)[target]))


def _joined_output(
    output: Float[Tensor, "*rows d"], site: MatrixSite, n: int
) -> Float[Tensor, "pos d_out"]:
    """An output with heads concatenated, or summed where they write to the residual stream."""
    if site.matrix in WRITING_MATRICES:
        return output.reshape(n, site.output_heads or 1, -1).sum(1)
    return output.reshape(n, -1)


# --- predicted and measured --------------------------------------------------------------------


@dataclass(frozen=True)
class _Prediction:
    """The predicted effect of a step with learning rate 1, in float64.

    Attributes:
        gradient: The gradient of one prompt.
        change: The exact change of the matrix's output.
        own: The term of it that comes from each position's own factors.
        squared_norm: `||dL/dW||_F^2`, the decrease of the loss to first order.
    """

    gradient: MatrixGradient
    change: Float[Tensor, "pos d_out"]
    own: Float[Tensor, "pos d_out"]
    squared_norm: float

    @classmethod
    def of(cls, gradient: MatrixGradient) -> _Prediction:
        """Predict from factors, head by head if there are heads."""
        heads = gradient.n_heads
        weights = [gradient] if heads is None else [gradient.head(index) for index in range(heads)]
        changes, own, squared_norms = zip(*map(_of_weight, weights), strict=True)
        if gradient.reads_residual:  # heads have separate outputs
            whole, own_change = torch.cat(changes, dim=1), torch.cat(own, dim=1)
        else:
            whole, own_change = torch.stack(changes).sum(0), torch.stack(own).sum(0)
        return cls(gradient, whole, own_change, sum(squared_norms))


def _of_weight(
    gradient: MatrixGradient,
) -> tuple[Float[Tensor, "pos d_out"], Float[Tensor, "pos d_out"], float]:
    """`-sum_i (x_p . x_i) delta_i`, its term `i = p`, and `||sum_i x_i^T delta_i||_F^2`."""
    inputs, vjps = gradient.inputs[0].double(), gradient.vjps[0].double()
    likeness = inputs @ inputs.T
    squared_norm = float((likeness * (vjps @ vjps.T)).sum())
    # A sum of squares; rounding may make it negative.
    return -likeness @ vjps, -likeness.diagonal()[:, None] * vjps, max(squared_norm, 0.0)


@dataclass(frozen=True)
class _Step:
    """One step.

    Attributes:
        site: The matrix.
        prediction: The predicted effect of a step with learning rate 1.
        rate: The learning rate.
        before: The matrix's output before the step.
        after: The output after it.
        loss: The loss before the step.
        loss_after: The loss after it.
    """

    site: MatrixSite
    prediction: _Prediction
    rate: float
    before: Float[Tensor, "pos d_out"]
    after: Float[Tensor, "pos d_out"]
    loss: float
    loss_after: float

    @property
    def measured(self) -> Float[Tensor, "pos d_out"]:
        """The measured change of the output, on the device of the factors."""
        change = self.after.double() - self.before.double()
        return change.to(self.prediction.change.device)

    def row(self) -> dict[str, Any]:
        """The columns of `step_changes`, except ranks."""
        measured, predicted = self.measured, self.rate * self.prediction.change
        length = float(predicted.norm())
        eps = torch.finfo(self.before.dtype).eps
        return {
            "matrix": self.site.matrix,
            "layer": self.site.layer,
            "learning_rate": self.rate,
            "output_change": float(measured.norm()),
            "output_error": _ratio(float((measured - predicted).norm()), length),
            "rounding": _ratio(eps * float(self.before.double().norm()), length),
            "self_imprint": float(cosines(self.prediction.change[-1], self.prediction.own[-1])),
            "loss": self.loss,
            "loss_change": self.loss_after - self.loss,
            "predicted_loss_change": -self.rate * self.prediction.squared_norm,
        }


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


def _shift_target_ranks(host: Host, steps: Sequence[_Step], target: int) -> list[int | None]:
    """The target's rank in each change at the last position, if the matrix writes to the stream."""
    written = [
        index
        for index, step in enumerate(steps)
        if step.site.matrix in WRITING_MATRICES and bool(step.measured[-1].any())
    ]
    ranks: list[int | None] = [None] * len(steps)
    if written:
        vectors = torch.stack([steps[index].measured[-1] for index in written])
        read = read_vectors(host.model, vectors, target, k=1)
        for index, rank in zip(written, read.to_df()["target_rank"], strict=True):
            ranks[index] = rank
    return ranks
