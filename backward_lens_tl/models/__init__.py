"""The internals of `HookedTransformer` and `TransformerBridge`.

All other code uses a [`Host`][backward_lens_tl.models.host.Host]: tokens to logits, and a site for
each weight matrix.
"""

from __future__ import annotations

from os import PathLike

from torch import nn

from backward_lens_tl.errors import InputError
from backward_lens_tl.models.hooked_transformer import HookedTransformerHost
from backward_lens_tl.models.host import Host
from backward_lens_tl.models.probing import (
    Probe,
    check_plain,
    logit_error,
    logits_and_readout,
    plain_error,
    probe,
    probe_tokens,
)
from backward_lens_tl.models.transformer_bridge import TransformerBridgeHost, has_bridge

__all__ = [
    "Host",
    "Probe",
    "check_plain",
    "has_bridge",
    "host_of",
    "host_of_trained",
    "logit_error",
    "logits_and_readout",
    "plain_error",
    "probe",
    "probe_tokens",
]

_HOSTS: dict[str, type[Host]] = {
    "HookedTransformer": HookedTransformerHost,
    "TransformerBridge": TransformerBridgeHost,
}


def host_of(model: object) -> Host:
    """Wrap a TransformerLens model, and check that it can be analysed.

    The class is recognised by name along the inheritance chain, because TransformerLens 4 has no
    `HookedTransformer`.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`.

    Returns:
        The model's host.

    Raises:
        InputError: If it is neither.
        UnsupportedModelError: If it is not a causal decoder, or its own forward pass differs from
            the analysed one.
        ModelStateError: If it is in a state in which gradients would be wrong.
    """
    host = host_of_trained(model)
    if host is None:
        raise InputError(
            f"model is {_described(model)}; pass a transformer_lens HookedTransformer or "
            f"TransformerBridge{_advice(model)}"
        )
    host.check_state()
    if (seen := probe(host)) is not None:
        seen.check_forward(host)
    return host


def host_of_trained(model: object) -> Host | None:
    """Wrap a TransformerLens model that somebody trains: it is not checked, and does not run.

    Args:
        model: Any object.

    Returns:
        The model's host; `None` if it is neither a `HookedTransformer` nor a `TransformerBridge`.
    """
    for base in type(model).__mro__:
        if base.__name__ in _HOSTS and isinstance(model, nn.Module) and hasattr(model, "cfg"):
            return _HOSTS[base.__name__](model)
    return None


def _described(model: object) -> str:
    if isinstance(model, str | PathLike):
        return f"the {type(model).__name__} {str(model)!r}"
    return f"a {type(model).__name__}"


def _advice(model: object) -> str:
    """How to get a TransformerLens model from the argument."""
    if isinstance(model, str | PathLike):
        return f": load_model({str(model)!r})"
    hf_model = "model"
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        hf_model = "model.get_base_model()"
    if isinstance(model, nn.Module):
        return (
            ": TransformerBridge.boot_transformers(name, hf_model="
            f"{hf_model}, tokenizer=tokenizer), with the name of its architecture's hub model or "
            "its folder"
        )
    return ", such as load_model(name) returns"
