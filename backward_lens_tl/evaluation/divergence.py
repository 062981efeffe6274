"""How far an edit moves the model's next-token distributions where it should not.

With `p` the unedited distribution and `q` the edited one,

    KL(p || q) = sum_v p_v (log p_v - log q_v)     in nats

and a prompt *keeps* its answer if both have the same most probable token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.evaluation.scoring import batches
from backward_lens_tl.models import Host


def kl_divergence(
    unedited: Float[Tensor, "*rows d_vocab"], edited: Float[Tensor, "*rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """KL divergence of the edited from the unedited distribution, in float64.

    Args:
        unedited: Logits of the unedited model.
        edited: Logits of the edited model.

    Returns:
        Nats, at least 0; infinite if the edited model returns NaN.

    Examples:
        >>> import torch
        >>> from backward_lens_tl.evaluation.divergence import kl_divergence
        >>> round(float(kl_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]))), 3)
        0.12
    """
    # In float32, the rounding of the normalization would hide divergences below 1e-6.
    before, after = unedited.double().log_softmax(-1), edited.double().log_softmax(-1)
    p = before.exp()
    # A token that the model never predicts has -inf in both.
    terms = torch.where(p > 0, p * (before - after), 0.0)
    return terms.sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min(0)


@dataclass(frozen=True)
class Moved:
    """What an edit does to the distribution after a prompt.

    Attributes:
        kl: KL divergence of the edited from the unedited distribution.
        is_kept: Whether the most probable token is the same.
    """

    kl: float
    is_kept: bool


@torch.no_grad()
def moved(
    model: nn.Module,
    host: Host,
    delta: WeightDelta,
    prompts: Sequence[tuple[int, ...]],
    batch_size: int,
) -> list[Moved]:
    """Compare the distributions after prompts, with and without an edit.

    Args:
        model: The unedited model.
        host: The same as a `Host`.
        delta: The edit.
        prompts: Token ids of each prompt.
        batch_size: The largest number of prompts per forward pass.

    Returns:
        One result per prompt.
    """
    if not len(delta):
        return [Moved(0.0, True) for _ in prompts]
    found: dict[int, Moved] = {}
    groups = host.length_groups(list(map(len, prompts)))
    # Both models read a batch before the next one, so that only its logits are in memory.
    for some in chain.from_iterable(batches(group, batch_size) for group in groups):
        batch = pad_prompts(host, [prompts[at] for at in some])
        with host.own_precision():
            before = read_logits(host, batch, 1)[:, -1]
            with delta.applied(model):
                after = read_logits(host, batch, 1)[:, -1]
        kl, kept = kl_divergence(before, after), before.argmax(-1) == after.argmax(-1)
        found |= dict(zip(some, map(Moved, kl.tolist(), kept.tolist()), strict=True))
    return [found[at] for at in range(len(prompts))]
