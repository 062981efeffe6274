"""Which matrices a layer of a Hugging Face model holds, by its name.

Adapters and checkpoints name layers `model.layers.3.self_attn.q_proj`, `transformer.h.3.mlp.c_fc`.
Only layers whose columns follow from their name and size are recognised: others, such as the
interleaved heads of GPT-NeoX, are not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from backward_lens_tl.models.sites import MatrixName

_STEMS = (
    *("model", "transformer", "model.decoder", "decoder", ""),
    *("model.language_model", "language_model.model", "language_model"),
)
"""What comes before the list of layers. Encoders and vision towers have layers too."""

_LAYER = re.compile(r"(?:(?P<stem>.*)\.)?(?:layers|h)\.(?P<layer>\d+)\.(?P<rest>.+)")

_SEPARATE: Mapping[str, MatrixName] = {
    "self_attn.q_proj": "W_Q",
    "self_attn.k_proj": "W_K",
    "self_attn.v_proj": "W_V",
    "self_attn.o_proj": "W_O",
    "self_attn.out_proj": "W_O",  # OPT
    "self_attn.dense": "W_O",  # Phi
    "attn.q_proj": "W_Q",  # GPT-J
    "attn.k_proj": "W_K",
    "attn.v_proj": "W_V",
    "attn.out_proj": "W_O",
    "attn.attention.q_proj": "W_Q",  # GPT-Neo
    "attn.attention.k_proj": "W_K",
    "attn.attention.v_proj": "W_V",
    "attn.attention.out_proj": "W_O",
    "attn.c_proj": "W_O",  # GPT-2
    "mlp.gate_proj": "W_gate",
    "mlp.up_proj": "W_in",
    "mlp.down_proj": "W_out",
    "mlp.c_fc": "W_in",
    "mlp.c_proj": "W_out",
    "mlp.fc_in": "W_in",
    "mlp.fc_out": "W_out",
    "mlp.fc1": "W_in",
    "mlp.fc2": "W_out",
    "fc1": "W_in",
    "fc2": "W_out",
}

_JOINED: Mapping[str, tuple[MatrixName, ...]] = {
    "attn.c_attn": ("W_Q", "W_K", "W_V"),
    "mlp.gate_up_proj": ("W_gate", "W_in"),
}
"""Layers whose columns are equal blocks, one per matrix."""


@dataclass(frozen=True)
class NamedLayer:
    """A layer of a Hugging Face model that holds matrices of attention or the MLP.

    Attributes:
        layer: The layer of the model, from 0.
        rest: Its name in the layer.
    """

    layer: int
    rest: str

    def columns(self, d_in: int, d_out: int, *, is_in_out: bool) -> dict[MatrixName, slice] | None:
        """The columns of each matrix.

        Args:
            d_in: Width of the layer's input.
            d_out: Width of its output.
            is_in_out: Whether the layer stores `[d_in, d_out]`, as GPT-2's.

        Returns:
            The columns by name; `None` if they do not follow from the name and the sizes.
        """
        if self.rest in _SEPARATE:
            return {_SEPARATE[self.rest]: slice(0, d_out)}
        matrices = _JOINED[self.rest]
        width, left = divmod(d_out, len(matrices))
        # Keys and values that heads share make the output narrower. GPT-BigCode, which stores
        # [d_out, d_in], has the queries, keys and values of a head next to each other.
        if left or (self.rest == "attn.c_attn" and (width != d_in or not is_in_out)):
            return None
        return {
            matrix: slice(place * width, (place + 1) * width)
            for place, matrix in enumerate(matrices)
        }


def named_layer(name: str) -> NamedLayer | None:
    """Recognise a layer by its name.

    Args:
        name: The name in the Hugging Face model, without `.weight`.

    Returns:
        The layer; `None` if it holds no matrix that is known.
    """
    found = _LAYER.fullmatch(name)
    if found is None or (found["stem"] or "") not in _STEMS:
        return None
    if found["rest"] not in _SEPARATE and found["rest"] not in _JOINED:
        return None
    return NamedLayer(int(found["layer"]), found["rest"])
