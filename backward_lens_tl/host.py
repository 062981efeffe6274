"""What the lens needs from a TransformerLens model, for both of its model classes.

This is the one file that knows what `HookedTransformer` (TransformerLens up to 3.9) and
`TransformerBridge` (3.x and 4.x) look like inside. Everything after it sees a
[`Host`][backward_lens_tl.host.Host]: tokens in, logits out, and for each weight matrix its
[site][backward_lens_tl.sites.MatrixSite].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.sites import READING_MATRICES, MatrixName, MatrixSite, Tap
from backward_lens_tl.vocabulary import Vocabulary


class Host(ABC):
    """A TransformerLens model, seen through the operations that the lens needs.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    # --- sizes -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's name, for titles and saved results."""
        return str(getattr(self.model.cfg, "model_name", None) or type(self.model).__name__)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def n_ctx(self) -> int:
        """Longest prompt, in tokens, that the model accepts."""
        return int(self.model.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model reads."""
        return int(self.model.cfg.d_vocab)

    @property
    def d_vocab_out(self) -> int:
        """Number of logits; with padded embeddings not the same."""
        return int(self.model.W_U.shape[1])

    @property
    def device(self) -> torch.device:
        """The device that tokens are sent to."""
        device: torch.device = next(self.model.parameters()).device
        return device

    # --- tokens ----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or `None`."""
        return self.model.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer, as far as targets and readouts need it."""
        return Vocabulary(self.tokenizer, self.d_vocab_out)

    def tokenize(self, prompt: str, prepend_bos: bool | None) -> list[int]:
        """Token ids of one prompt, by the model's own `to_tokens`, never truncated.

        Args:
            prompt: The text.
            prepend_bos: Whether a BOS token goes in front; `None` is the model's own default.

        Returns:
            The ids, BOS included where there is one.

        Raises:
            InputError: If the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                f"prompt {prompt!r} is text, but the model has no tokenizer; pass token ids of "
                "shape [batch, pos], or set a tokenizer on the model"
            )
        tokens = self.model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)
        return [int(token) for token in tokens[0]]

    # --- the forward pass --------------------------------------------------------------------

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model, with whatever hooks the caller has on it.

        Args:
            tokens: Token ids, padded on the right.

        Returns:
            The logits of every position, connected to the autograd graph.
        """
        # In a causal model no real token sees padding on its right, so nothing is masked. The mask
        # is passed all the same: without one, HookedTransformer guesses it from the pad token
        # whenever its tokenizer pads on the left. One that hides the padding would leave padded
        # positions with nothing to see under a sliding window, and NaN in their gradients.
        logits: Tensor = self.model(
            tokens, return_type="logits", attention_mask=torch.ones_like(tokens)
        )
        return logits

    # --- the vocabulary ----------------------------------------------------------------------

    def unembed(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Read vectors as the model reads its last residual stream.

        `ln_final(v) @ W_U + b_U` and then the model's own softcap or scale; the norm's
        statistics are those of each `v`. The caller's hooks do not run here.

        Args:
            vectors: Vectors of the residual stream's width.

        Returns:
            Logits, in the dtype of `W_U`.
        """
        weight = self.model.W_U
        normed = self._final_norm(vectors.to(device=weight.device, dtype=weight.dtype))
        return self._output_transform(normed @ weight + self.model.b_U)

    @property
    def faint_norm(self) -> float:
        """Length below which the final norm's `eps` outweighs a vector, `sqrt(d_model * eps)`.

        A shorter vector is not scaled up to the usual size, and what is read of it is more and
        more the norm's bias. Without a final norm there is no such length, and this is 0.
        """
        if self.model.cfg.normalization_type is None:
            return 0.0
        return math.sqrt(self.model.cfg.d_model * self.model.cfg.eps)

    @property
    def last_resid(self) -> Tap:
        """Where the last residual stream passes, before the final norm if there is one."""
        norm = self._norm_module()
        return Tap(self.model.unembed if norm is None else norm, "input")

    @abstractmethod
    def _norm_module(self) -> Any:
        """The final norm, or `None` if there is none."""

    @abstractmethod
    def _final_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]: ...

    @abstractmethod
    def _output_transform(
        self, logits: Float[Tensor, "n d_vocab"]
    ) -> Float[Tensor, "n d_vocab"]: ...

    # --- the matrices ------------------------------------------------------------------------

    @abstractmethod
    def _mlp_sites(self, layer: int) -> dict[MatrixName, MatrixSite]:
        """The MLP matrices that a layer has."""

    def matrices(self, layer: int) -> tuple[MatrixName, ...]:
        """Names of the matrices that a layer has, in the order in which it uses them."""
        return tuple(self._mlp_sites(layer))

    def site(self, matrix: MatrixName, layer: int) -> MatrixSite:
        """Where a matrix meets its input and its output.

        Args:
            matrix: One of `W_in`, `W_gate`, `W_out`.
            layer: The layer, from 0.

        Returns:
            The site, with its weight.

        Raises:
            InputError: If the layer has no such matrix.
        """
        sites = self._mlp_sites(layer)
        if matrix not in sites:
            raise InputError(
                f"layer {layer} of this model has no {matrix}; it has {', '.join(sites)}"
            )
        return sites[matrix]

    # --- states in which the answer would be wrong ---------------------------------------------

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether every token sees only those before it."""

    def _roots(self) -> list[nn.Module]:
        """Modules under which every module of the forward pass is found."""
        return [self.model]

    def check_state(self) -> None:
        """Refuse a model that is no causal decoder, and states in which gradients would be wrong.

        Raises:
            UnsupportedModelError: If tokens see those after them, or there are no blocks.
            ModelStateError: Inside `torch.inference_mode()`, if a parameter was made in it or is
                on the meta device, or if dropout is active.
        """
        if not self.is_causal or not hasattr(self.model, "blocks"):
            raise UnsupportedModelError(
                f"{self.name!r} is not a causal decoder with a stack of blocks; the lens knows "
                "GPT-2, Llama and their like"
            )
        if torch.is_inference_mode_enabled():
            raise ModelStateError(
                "gradients do not exist inside torch.inference_mode(); leave it, or use "
                "torch.no_grad(), which this package can work under"
            )
        for name, parameter in self.model.named_parameters():
            if parameter.is_inference():
                raise ModelStateError(
                    f"parameter {name!r} was created in torch.inference_mode(), so autograd cannot "
                    "run through it; load the model outside inference mode"
                )
            if parameter.is_meta:
                raise ModelStateError(
                    f"parameter {name!r} is on the meta device and has no values; load the weights"
                )
        for name, module in chain.from_iterable(root.named_modules() for root in self._roots()):
            if module.training and _drops_values(module):
                raise ModelStateError(
                    f"dropout is active in {name!r} (the model is in train mode), so the gradient "
                    "would be a random one; call model.eval() first"
                )


def _drops_values(module: nn.Module) -> bool:
    """Whether a module would drop values in train mode, as a layer or by an attribute."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        "dropout" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


class HookedTransformerHost(Host):
    """`transformer_lens.HookedTransformer`: own modules, weights as `[d_in, d_out]`."""

    @property
    def is_causal(self) -> bool:
        """Whether every token sees only those before it."""
        return bool(self.model.cfg.attention_dir == "causal")

    def _norm_module(self) -> Any:
        return None if self.model.cfg.normalization_type is None else self.model.ln_final

    def _final_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        # The module itself cannot be called here: its hook points would run the caller's hooks.
        kind, norm = self.model.cfg.normalization_type, self._norm_module()
        if norm is None:
            return vectors
        shape = vectors.shape[-1:]
        weight, bias, eps = getattr(norm, "w", None), getattr(norm, "b", None), norm.eps
        if kind in ("LN", "LNPre"):
            return nn.functional.layer_norm(vectors, shape, weight, bias, eps)
        if kind in ("RMS", "RMSPre"):
            return nn.functional.rms_norm(vectors, shape, weight, eps)
        raise UnsupportedModelError(
            f"the final norm is {kind!r}; the lens knows LN, LNPre, RMS, RMSPre and None"
        )

    def _output_transform(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        cap = getattr(self.model.cfg, "output_logits_soft_cap", -1.0)
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits

    def _mlp_sites(self, layer: int) -> dict[MatrixName, MatrixSite]:
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        gated = hasattr(mlp, "W_gate")
        if mlp is None or not isinstance(getattr(mlp, "W_out", None), nn.Parameter):
            raise UnsupportedModelError(
                f"layer {layer} has no dense or gated MLP "
                f"({'attention only' if mlp is None else type(mlp).__name__})"
            )
        reads = Tap(mlp, "input")
        # mlp.hook_pre is the gate's output where there is a gate.
        sites: dict[MatrixName, tuple[Tap, Tap]] = {
            "W_in": (reads, Tap(mlp.hook_pre_linear if gated else mlp.hook_pre, "input"))
        }
        if gated:
            sites["W_gate"] = (reads, Tap(mlp.hook_pre, "input"))
        sites["W_out"] = (Tap(mlp.hook_post, "output"), Tap(mlp, "output"))
        return {
            matrix: MatrixSite(matrix, layer, x, y, getattr(mlp, matrix), transposed=False)
            for matrix, (x, y) in sites.items()
        }


_BRIDGE_PROJECTIONS: dict[MatrixName, str] = {"W_in": "in", "W_gate": "gate", "W_out": "out"}


class TransformerBridgeHost(Host):
    """`transformer_lens.model_bridge.TransformerBridge`: a Hugging Face model with hook points."""

    @property
    def is_causal(self) -> bool:
        """Whether every token sees only those before it."""
        config = self.model.original_model.config
        return bool(self.model.adapter.supports_causal_loss) and not config.is_encoder_decoder

    def _norm_module(self) -> Any:
        norm = getattr(self.model, "ln_final", None)
        if norm is None:
            raise UnsupportedModelError(
                "this bridge has no ln_final, so vectors cannot be read as the model reads its "
                "last residual stream"
            )
        return norm

    def _roots(self) -> list[nn.Module]:
        # The Hugging Face model is not a submodule of its bridge.
        return [self.model, self.model.original_model]

    def _final_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        # Hugging Face's own arithmetic, past the hooks of the bridge and of the module itself.
        normed: Tensor = self._norm_module().original_component.forward(vectors)
        return normed

    def _output_transform(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        transformed: Tensor = self.model.adapter.apply_output_logits_transform(logits)
        return transformed

    def _mlp_sites(self, layer: int) -> dict[MatrixName, MatrixSite]:
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        found = {
            matrix: projection
            for matrix, name in _BRIDGE_PROJECTIONS.items()
            if (projection := getattr(mlp, name, None)) is not None
        }
        if not {"W_in", "W_out"} <= found.keys():
            raise UnsupportedModelError(
                f"layer {layer} has no dense or gated MLP "
                f"({'none at all' if mlp is None else type(mlp).__name__})"
            )
        return {
            matrix: self._projection_site(matrix, layer, mlp, projection)
            for matrix, projection in found.items()
        }

    def _projection_site(
        self, matrix: MatrixName, layer: int, mlp: Any, projection: Any
    ) -> MatrixSite:
        linear = projection.original_component
        transposed = _stores_out_in(linear, matrix, layer)
        if not (getattr(mlp, "_use_processed_weights", False) and hasattr(mlp, "gate")):
            x, y = Tap(linear, "input"), Tap(linear, "output")
            return MatrixSite(matrix, layer, x, y, linear.weight, transposed)
        # A gated MLP with processed weights multiplies by them itself, in TransformerLens 3 by
        # copies of its own. It passes the hook points of its projections one by one, all but those
        # on the inputs of the reading ones.
        own_copy = getattr(mlp, f"_processed_{matrix}", None)
        return MatrixSite(
            matrix,
            layer,
            input=Tap((mlp if matrix in READING_MATRICES else projection).hook_in, "output"),
            output=Tap(projection.hook_out, "input"),
            weight=linear.weight if own_copy is None else own_copy,
            transposed=transposed,
        )


def _stores_out_in(linear: nn.Module, matrix: str, layer: int) -> bool:
    """Whether a Hugging Face projection keeps its weight as `[d_out, d_in]`, by its class."""
    if not is_parametrized(linear):
        if isinstance(linear, nn.Linear):
            return True
        if type(linear).__name__ == "Conv1D":
            return False
    raise UnsupportedModelError(
        f"{matrix} of layer {layer} is a {type(linear).__name__}; the lens knows torch.nn.Linear "
        "and transformers' Conv1D, without parametrizations"
    )


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
        if base.__name__ in _HOSTS and isinstance(model, nn.Module):
            host = _HOSTS[base.__name__](model)
            host.check_state()
            return host
    raise InputError(
        f"model is a {type(model).__name__}; pass a transformer_lens HookedTransformer or "
        "TransformerBridge (for a Hugging Face model: "
        "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer))"
    )
