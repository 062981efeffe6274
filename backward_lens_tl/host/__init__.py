"""What `HookedTransformer` and `TransformerBridge` look like inside; nothing else knows.

Everything after it sees a [`Host`][backward_lens_tl.host.base.Host]: tokens in, logits out, and for
each weight matrix its site.
"""

from __future__ import annotations

from torch import nn

from backward_lens_tl.errors import InputError
from backward_lens_tl.host.base import Host
from backward_lens_tl.host.bridge import TransformerBridgeHost, has_bridge
from backward_lens_tl.host.hooked import HookedTransformerHost

__all__ = ["Host", "has_bridge", "host_of"]

_HOSTS: dict[str, type[Host]] = {
    "HookedTransformer": HookedTransformerHost,
    "TransformerBridge": TransformerBridgeHost,
}


def host_of(model: object) -> Host:
    """Wrap a TransformerLens model that can be analysed, in a state in which it can be.

    The class is recognised by name along the inheritance chain, because `HookedTransformer`
    cannot be imported from TransformerLens 4.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`.

    Returns:
        The model's host.

    Raises:
        InputError: If it is neither.
    """
    for base in type(model).__mro__:
        if base.__name__ in _HOSTS and isinstance(model, nn.Module) and hasattr(model, "cfg"):
            host = _HOSTS[base.__name__](model)
            host.check_state()
            return host
    raise InputError(
        f"model is a {type(model).__name__}; pass a transformer_lens HookedTransformer or "
        "TransformerBridge (of a name or a folder: load_model(name); for a Hugging Face model: "
        "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer))"
    )
