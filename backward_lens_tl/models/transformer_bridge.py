"""`transformer_lens.model_bridge.TransformerBridge`: a Hugging Face model with hook points."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models.host import Host, is_centered
from backward_lens_tl.models.linear import is_adapted, linear_site
from backward_lens_tl.models.sites import (
    READING_MATRICES,
    WRITING_MATRICES,
    HookPointSite,
    MatrixName,
    MatrixSite,
    Site,
    StackedExperts,
    StackedExpertsSite,
    Stored,
    Tap,
)
from backward_lens_tl.models.unembedding import connected, needs_digits

_PROJECTIONS: dict[MatrixName, tuple[str, ...]] = {
    "W_in": ("dense_in", "in"),
    "W_gate": ("dense_gate", "gate"),
    "W_out": ("dense_out", "out"),
}
"""Names of an MLP's projections; the first are those of dense layers among experts."""

_FUSED = ("qkv", "gate_up", "gate_up_proj")
"""Projections that a bridge splits into linear modules of their own, and no longer uses."""

_COPY = "_processed_"
"""What the names of a gated MLP's own copies of processed weights begin with."""


def has_bridge() -> bool:
    """Whether the installed TransformerLens has a `TransformerBridge` that can be read here.

    Returns:
        True from 3.6 on; the bridges of 3.0 to 3.5 do not say what becomes of their logits.
    """
    if find_spec("transformer_lens.model_bridge") is None:
        return False
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    return hasattr(ArchitectureAdapter, "apply_output_logits_transform")


class TransformerBridgeHost(Host):
    """A `TransformerBridge` of TransformerLens 3.6 or later."""

    def check_state(self) -> None:
        """Refuse what no model may be, and bridges of a TransformerLens before 3.6.

        Raises:
            UnsupportedModelError: If the model, or its class, cannot be read.
            ModelStateError: If it is in a state in which gradients would be wrong.
        """
        if not has_bridge():
            raise UnsupportedModelError(
                f"{self.name!r} is a TransformerBridge of TransformerLens "
                f"{version('transformer-lens')}; bridges can be read from 3.6 on. Update "
                "TransformerLens, or load a HookedTransformer: load_model(name, kind='hooked')"
            )
        super().check_state()
        for layer, block in enumerate(self.model.blocks):
            for branch, name in product(("attn", "mlp"), _FUSED):
                fused = getattr(getattr(block, branch, None), name, None)
                if is_adapted(getattr(fused, "original_component", None)):
                    raise UnsupportedModelError(
                        f"layer {layer} has an adapter of PEFT on a fused projection ({name} of "
                        f"{branch}), which TransformerBridge splits without it; merge it before "
                        "the model is wrapped: hf_model = peft_model.merge_and_unload()"
                    )

    @property
    def is_causal(self) -> bool:
        """Whether every token sees only those before it."""
        config = self.model.original_model.config
        return bool(self.model.adapter.supports_causal_loss) and not config.is_encoder_decoder

    @property
    def attention_implementation(self) -> str | None:
        """Which of Hugging Face's implementations of attention the model runs."""
        return getattr(self.model.original_model.config, "_attn_implementation", None)

    @property
    def causality_advice(self) -> str:
        """What to do about a bridge that turns out not to be causal, for a message."""
        if self.attention_implementation == "eager":
            return ""
        return (
            f" Its attention is {self.attention_implementation!r}; load the Hugging Face model "
            "with attn_implementation='eager', as load_model and boot_transformers(name) do"
        )

    def logits_of(
        self, tokens: Int[Tensor, "batch pos"], select: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, and multiply by `W_U` only where it is needed."""
        selected: list[Tensor] = []
        linear = self._plain_unembedding

        def of_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args[0].shape[:2] != tokens.shape:
                return None
            own = select(args[0])
            selected.append(own)
            is_taken = linear is not None and needs_digits(own)
            return (own.detach() if is_taken else own, *args[1:])

        def of_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if linear is None or len(selected) != 1 or not needs_digits(selected[0]):
                return None
            return connected(selected[0], output, linear.weight.T)

        handles = (
            self.model.unembed.register_forward_pre_hook(of_input),
            self.model.unembed.register_forward_hook(of_output),
        )
        try:
            logits = self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        if len(selected) > 1:
            raise UnsupportedModelError(
                f"{self.name!r} uses its unembedding {len(selected)} times in a forward pass; the "
                "lens knows models that use it once"
            )
        return logits if selected else select(logits)

    @property
    def _plain_unembedding(self) -> nn.Linear | None:
        """The linear module that alone makes logits of normed vectors; `None` if there is more."""
        bridge = self.model.unembed
        linear = getattr(bridge, "original_component", None)
        is_usual = (
            type(bridge).forward.__qualname__ == "UnembeddingBridge.forward"
            and type(linear) is nn.Linear
            and not {"forward"} & (vars(bridge).keys() | vars(linear).keys())
            and not is_parametrized(linear)
        )
        return linear if is_usual else None

    def length_kind(self, length: int) -> Hashable:
        """What prompts have to have in common to share a pass; see `Host.length_kind`."""
        for limit in self._rotations["dynamic"]:
            if length >= limit:
                raise InputError(
                    f"a prompt has {length} tokens, and this model's rotary angles (dynamic NTK) "
                    f"depend from {limit} tokens on also on the prompts that it saw before; pass "
                    f"at most {limit - 1}"
                )
        return tuple(length > limit for limit in self._rotations["longrope"])

    @cached_property
    def _rotations(self) -> dict[str, list[int]]:
        """Lengths from which rotary angles change with the length of the pass, by their kind."""
        found: dict[str, list[int]] = {"dynamic": [], "longrope": []}
        for _, module in self._modules:
            rotary: Any = module
            own = getattr(rotary, "rope_type", None)
            by_layer = own if isinstance(own, dict) else {None: own}
            for layer_type, kind in by_layer.items():
                if isinstance(kind, str) and "dynamic" in kind:
                    found["dynamic"].append(int(rotary.original_max_seq_len))
                elif kind == "longrope":
                    found["longrope"].append(_original_context(rotary, layer_type))
        return {kind: sorted(set(limits)) for kind, limits in found.items()}

    def _norm_module(self) -> Any:
        # Models whose blocks end in a norm have none. That nothing else comes in between is checked
        # before vectors are read.
        return getattr(self.model, "ln_final", None)

    def _roots(self) -> list[nn.Module]:
        # The Hugging Face model is not a submodule of its bridge.
        return [self.model, self.model.original_model]

    def _final_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        norm = self._norm_module()
        if norm is None:
            return vectors
        # Hugging Face's own arithmetic, past the hooks of the bridge and of the module itself.
        normed: Tensor = norm.original_component.forward(vectors)
        return normed

    def _output_transform(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        transformed: Tensor = self.model.adapter.apply_output_logits_transform(logits)
        return transformed

    # --- attention ---------------------------------------------------------------------------

    def _attention_sites(self, layer: int) -> dict[MatrixName, Site]:
        cfg = self.model.cfg
        attn: Any = getattr(self.model.blocks[layer], "attn", None)
        projections: dict[str, Any] = {
            f"W_{name.upper()}": getattr(attn, name, None) for name in "qkvo"
        }
        lacking = [name for name, found in projections.items() if _linear(found) is None]
        if lacking:
            raise UnsupportedModelError(
                f"attention of layer {layer} ({type(attn).__name__}) has no separate "
                f"{', '.join(lacking)}; ask for matrices='mlp'"
            )
        if getattr(cfg, "use_split_qkv_input", False) or getattr(cfg, "use_attn_in", False):
            raise UnsupportedModelError(
                "a bridge with use_split_qkv_input or use_attn_in multiplies by W_Q, W_K and W_V "
                "where no hook can see it; switch both off, or use a HookedTransformer"
            )
        at = f"blocks.{layer}.attn"
        sites: dict[MatrixName, Site] = {}
        for matrix in ("W_Q", "W_K", "W_V"):
            sites[matrix] = self._heads_site(
                matrix, layer, projections[matrix], output_hook=f"{at}.hook_{matrix[-1].lower()}"
            )
        written = self._heads_site(
            "W_O",
            layer,
            projections["W_O"],
            input_hook=f"{at}.hook_z",
            output_hook=f"blocks.{layer}.hook_attn_out",
            joins=self._join(layer, "attn"),
        )
        if getattr(cfg, "use_attn_result", False):
            # The bridge then multiplies by W_O itself, head by head, past its module.
            written = replace(
                written,
                input=Tap(projections["W_O"].hook_in, "output"),
                output=Tap(attn.hook_result, "input"),
                output_heads=written.input_heads,
            )
        return sites | {"W_O": written}

    def _heads_site(
        self, matrix: MatrixName, layer: int, projection: Any, **hooks: Any
    ) -> MatrixSite:
        """A projection whose side away from the residual stream is divided into heads."""
        site = linear_site(matrix, layer, _linear(projection), **hooks)
        divided: Literal["in", "out"] = "out" if matrix in READING_MATRICES else "in"
        width = site.weight.in_out(site.weight.parameter).shape[1 if divided == "out" else 0]
        heads, rest = divmod(width, self.d_head)
        if rest or heads > self.n_heads:
            raise UnsupportedModelError(
                f"{matrix} of layer {layer} is {width} wide, which is not a number of heads of "
                f"width {self.d_head}; ask for matrices='mlp'"
            )
        stored = Stored(site.weight.parameter, site.weight.layout, heads, divided)
        named = self._existing_hooks(site)
        if divided == "out":
            return replace(named, weight=stored, output_heads=heads)
        return replace(named, weight=stored, input_heads=heads)

    def _hook_point(self, name: str, point: Any) -> HookPointSite:
        site = super()._hook_point(name, point)
        if not name.endswith((".attn.hook_pattern", ".attn.hook_attn_scores")):
            return site
        # A bridge that leaves attention to Hugging Face only shows its hooks the finished pattern.
        attn = self.model.get_submodule(name.rpartition(".")[0])
        delegates = type(attn).forward.__qualname__ == "AttentionBridge.forward"
        return replace(site, is_replaceable=not delegates)

    # --- MLPs --------------------------------------------------------------------------------

    def _mlp_sites(self, layer: int) -> dict[MatrixName, Site]:
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        experts = _unwrapped(getattr(_unwrapped(mlp), "experts", None))
        if experts is not None:
            return self._experts_sites(layer, experts)
        found = {
            matrix: projection
            for matrix, names in _PROJECTIONS.items()
            for name in names
            if _linear(projection := getattr(mlp, name, None)) is not None
        }
        if not {"W_in", "W_out"} <= found.keys():
            raise UnsupportedModelError(
                f"layer {layer} has no dense or gated MLP "
                f"({'none at all' if mlp is None else type(mlp).__name__})"
            )
        gated = "W_gate" in found
        return {
            matrix: self._projection_site(matrix, layer, mlp, projection, gated)
            for matrix, projection in found.items()
        }

    def _projection_site(
        self, matrix: MatrixName, layer: int, mlp: Any, projection: Any, gated: bool
    ) -> MatrixSite:
        at = f"blocks.{layer}.mlp"
        if matrix == "W_out":
            hooks: dict[str, Any] = {
                "input_hook": f"{at}.hook_post",
                "output_hook": f"blocks.{layer}.hook_mlp_out",
                "joins": self._join(layer, "mlp"),
            }
        else:
            # mlp.hook_pre is the gate's output where there is a gate.
            linear_of_gated = gated and matrix == "W_in"
            point = "hook_pre_linear" if linear_of_gated else "hook_pre"
            hooks = {"output_hook": f"{at}.{point}"}
        site = self._existing_hooks(linear_site(matrix, layer, _linear(projection), **hooks))
        if not (gated and getattr(mlp, "_use_processed_weights", False)):
            return site
        # A gated MLP with processed weights multiplies by them itself, in TransformerLens 3 by
        # copies of its own. It passes the hook points of its projections one by one, all but those
        # on the inputs of the reading ones.
        copies = _processed_copies(mlp)
        return replace(
            site,
            input=Tap((mlp if matrix in READING_MATRICES else projection).hook_in, "output"),
            output=Tap(projection.hook_out, "input"),
            weight=replace(
                site.weight,
                parameter=copies.get(id(site.weight.parameter), site.weight.parameter),
            ),
            bias=copies.get(id(site.bias), site.bias),
        )

    def _experts_sites(self, layer: int, experts: nn.Module) -> dict[MatrixName, Site]:
        stack, join = _stack(experts, layer), self._join(layer, "mlp")
        reading: dict[MatrixName, Tensor] = {"W_in": ~stack.gate, "W_gate": stack.gate}

        def site(
            matrix: MatrixName, name: str, columns: Tensor | None, joins: HookPointSite | None
        ) -> StackedExpertsSite:
            bias = getattr(experts, f"{name}_bias", None)
            return StackedExpertsSite(
                matrix,
                layer,
                stack,
                weights=(getattr(experts, name),),
                biases=() if bias is None else (bias,),
                columns=columns,
                is_transposed=not experts.is_transposed,
                joins=joins,
            )

        sites: dict[MatrixName, Site] = {
            matrix: site(matrix, "gate_up_proj", columns, None)
            for matrix, columns in reading.items()
        }
        return sites | {"W_out": site("W_out", "down_proj", None, join)}

    # --- hook points and parameters ----------------------------------------------------------

    def _join(self, layer: int, branch: str) -> HookPointSite:
        """Where what a branch wrote joins the residual stream."""
        return self.hook_points[getattr(self.model.blocks[layer], f"hook_{branch}_out").name]

    def _existing_hooks(self, site: MatrixSite) -> MatrixSite:
        """The site without names of hook points that this architecture does not have."""
        hooks = self.hook_points
        return replace(
            site,
            input_hook=site.input_hook if site.input_hook in hooks else None,
            output_hook=site.output_hook if site.output_hook in hooks else None,
        )

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that take part in the forward pass, by Hugging Face's names."""
        named = {
            name.replace("_original_component.", ""): parameter
            for root in self._roots()
            for name, parameter in root.named_parameters()
        }
        once = {id(parameter): name for name, parameter in reversed(named.items())}
        copies: dict[int, Tensor] = {}
        for _, module in self._modules:
            if getattr(module, "_use_processed_weights", False):
                copies |= _processed_copies(module)
        return {
            name: copies.get(id(parameter), parameter)
            for name, parameter in named.items()
            if once[id(parameter)] == name and not set(name.split(".")[:-1]) & set(_FUSED)
        }

    @property
    def processed_matrices(self) -> frozenset[MatrixName]:
        """Matrices that TransformerLens's weight processing changed, as far as the model shows."""
        found: set[MatrixName] = set()
        if not getattr(self.model, "_weights_processed", False):
            return frozenset()
        gain = getattr(_unwrapped(getattr(self.model.blocks[0], "ln1", None)), "weight", None)
        if gain is not None and bool((gain == gain[0]).all()):  # fold_ln
            found.update(READING_MATRICES)
        output = _linear(getattr(getattr(self.model.blocks[0], "attn", None), "o", None))
        if output is not None:
            written = linear_site("W_O", 0, output).weight
            if is_centered(written.in_out(written.parameter)):  # center_writing_weights
                found.update(WRITING_MATRICES)
        return frozenset(found)


def _processed_copies(mlp: nn.Module) -> dict[int, Tensor]:
    """Copies that a gated MLP multiplies by, by the `id` of the tensor that they replace."""
    copies: dict[int, Tensor] = {}
    for matrix, names in _PROJECTIONS.items():
        linear = _linear(getattr(mlp, names[-1], None))
        for kind, letter in (("weight", "W"), ("bias", "b")):
            replaced = getattr(linear, kind, None)
            own = vars(mlp).get(f"{_COPY}{letter}{matrix[1:]}")
            if replaced is not None and isinstance(own, Tensor):
                copies[id(replaced)] = own
    return copies


def _original_context(rotary: Any, layer_type: str | None) -> int:
    """The context from which on LongRoPE takes its long factors."""
    settings = getattr(rotary.config, "rope_parameters", None) or rotary.config.rope_scaling
    settings = settings if layer_type is None else settings[layer_type]
    name = "original_max_position_embeddings"
    return int(settings.get(name) or getattr(rotary.config, name))


def _linear(projection: Any) -> Any:
    """The Hugging Face module of a projection, or `None` if there is no such projection."""
    found = getattr(projection, "original_component", None)
    return None if getattr(found, "weight", None) is None else found


def _unwrapped(component: Any) -> Any:
    """The Hugging Face module inside bridges."""
    while (inner := getattr(component, "original_component", None)) is not None:
        component = inner
    return component


def _stack(experts: Any, layer: int) -> StackedExperts:
    """Read the layout of an expert stack off the flags that transformers puts on it."""
    flags = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "_apply_gate")
    known = all(hasattr(experts, name) for name in (*flags, "gate_up_proj", "down_proj"))
    if (
        not known
        or not experts.has_gate
        or getattr(experts, "has_post_expert_norm", False)
        or getattr(experts, "_is_expert_parallel", False)
    ):
        raise UnsupportedModelError(
            f"the experts of layer {layer} ({type(experts).__name__}) are not a stack of gated "
            "MLPs as transformers 5 keeps them, so their factors cannot be derived; ask for "
            "matrices='attn'"
        )
    w_in, w_out = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    columns = torch.arange(w_in.shape[-1], device=w_in.device)
    half = w_in.shape[-1] // 2
    return StackedExperts(
        module=experts,
        w_in=w_in,
        b_in=experts.gate_up_proj_bias if experts.has_bias else None,
        w_out=w_out,
        b_out=experts.down_proj_bias if experts.has_bias else None,
        activate=experts._apply_gate,
        gate=columns < half if experts.is_concatenated else columns % 2 == 0,
    )
