"""`transformer_lens.model_bridge.TransformerBridge`: a Hugging Face model with hook points."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models.families import (
    FUSED,
    expert_stack,
    linear_of,
    mlp_projections,
    processed_copies,
    rotary_limits,
    unwrapped,
)
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.host import Host, is_centered
from backward_lens_tl.models.linear import is_adapted, linear_site
from backward_lens_tl.models.sites import (
    READING_MATRICES,
    WRITING_MATRICES,
    HookPointSite,
    MatrixName,
    MatrixSite,
    Site,
    StackedExpertsSite,
    Stored,
)
from backward_lens_tl.models.unembedding import Unembedding, connected, needs_digits


def has_bridge() -> bool:
    """Whether the installed TransformerLens has a `TransformerBridge` that is supported.

    Returns:
        True from 3.6 on; bridges of 3.0 to 3.5 do not expose how they transform logits.
    """
    if find_spec("transformer_lens.model_bridge") is None:
        return False
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    return hasattr(ArchitectureAdapter, "apply_output_logits_transform")


class _BridgeUnembedding(Unembedding):
    @property
    def norm(self) -> Any:
        # Models whose blocks end in a norm have no final one. A probe checks, before vectors are
        # read, that nothing else comes before the unembedding.
        return getattr(self._model, "ln_final", None)

    def normed(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        if self.norm is None:
            return vectors
        # Hugging Face's own arithmetic, without the hooks of the bridge and of the module.
        normed: Tensor = self.norm.original_component.forward(vectors)
        return normed

    def transformed(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        transformed: Tensor = self._model.adapter.apply_output_logits_transform(logits)
        return transformed


class TransformerBridgeHost(Host):
    """A `TransformerBridge` of TransformerLens 3.6 or later."""

    unembedding_type = _BridgeUnembedding

    def check_state(self) -> None:
        """Raise as `Host.check_state` does, and for bridges that cannot be read.

        Raises:
            UnsupportedModelError: If the model, or its TransformerLens version, is not supported.
            ModelStateError: If it is in a state in which gradients would be wrong.
        """
        if not has_bridge():
            raise UnsupportedModelError(
                f"{self.name!r} is a TransformerBridge of TransformerLens "
                f"{version('transformer-lens')}; bridges are supported from 3.6 on. Update "
                "TransformerLens, or load a HookedTransformer: load_model(name, kind='hooked')"
            )
        super().check_state()
        for layer, block in enumerate(self.model.blocks):
            for branch, name in product(("attn", "mlp"), FUSED):
                fused = getattr(getattr(block, branch, None), name, None)
                if is_adapted(getattr(fused, "original_component", None)):
                    raise UnsupportedModelError(
                        f"layer {layer} has an adapter of PEFT on a fused projection ({name} of "
                        f"{branch}), which TransformerBridge splits without it; merge it before "
                        "the model is wrapped: hf_model = peft_model.merge_and_unload()"
                    )

    @property
    def is_causal(self) -> bool:
        """Whether the architecture is a causal decoder."""
        config = self.model.original_model.config
        return bool(self.model.adapter.supports_causal_loss) and not config.is_encoder_decoder

    @property
    def attention_implementation(self) -> str | None:
        """Which of Hugging Face's attention implementations the model uses."""
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

    def _roots(self) -> list[nn.Module]:
        # The Hugging Face model is not a submodule of its bridge.
        return [self.model, self.model.original_model]

    # --- the forward pass --------------------------------------------------------------------

    def logits_of(
        self, tokens: Int[Tensor, "batch pos"], select: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, and multiply by `W_U` at some positions only."""
        selected: list[Tensor] = []
        linear = self._plain_unembedding

        def of_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args[0].shape[:2] != tokens.shape:
                return None
            own = select(args[0])
            selected.append(own)
            is_reconnected = linear is not None and needs_digits(own)
            return (own.detach() if is_reconnected else own, *args[1:])

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
                f"{self.name!r} uses its unembedding {len(selected)} times in a forward pass; only "
                "models that use it once are supported"
            )
        return logits if selected else select(logits)

    @property
    def _plain_unembedding(self) -> nn.Linear | None:
        """The linear module that maps normed vectors to logits; `None` if there is more to it."""
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
        """What prompts must have in common to share a forward pass; see `Host.length_kind`."""
        for limit in self._rotary_limits["dynamic"]:
            if length >= limit:
                raise InputError(
                    f"a prompt has {length} tokens, and this model's rotary angles (dynamic NTK) "
                    f"also depend on earlier prompts from {limit} tokens on; pass at most "
                    f"{limit - 1}"
                )
        return tuple(length > limit for limit in self._rotary_limits["longrope"])

    @cached_property
    def _rotary_limits(self) -> dict[str, list[int]]:
        return rotary_limits(module for _, module in self._modules)

    # --- attention ---------------------------------------------------------------------------

    def _attention_sites(self, layer: int) -> dict[MatrixName, Site]:
        cfg = self.model.cfg
        attn: Any = getattr(self.model.blocks[layer], "attn", None)
        projections: dict[str, Any] = {
            f"W_{name.upper()}": getattr(attn, name, None) for name in "qkvo"
        }
        lacking = [name for name, found in projections.items() if linear_of(found) is None]
        if lacking:
            raise UnsupportedModelError(
                f"attention of layer {layer} ({type(attn).__name__}) has no separate "
                f"{', '.join(lacking)}; pass matrices='mlp'"
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
            # The bridge then multiplies by W_O itself, head by head, without calling its module.
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
        """A projection with heads along the axis that is not the residual stream's."""
        site = linear_site(matrix, layer, linear_of(projection), **hooks)
        divided: Literal["in", "out"] = "out" if matrix in READING_MATRICES else "in"
        width = site.weight.in_out(site.weight.parameter).shape[1 if divided == "out" else 0]
        heads, rest = divmod(width, self.d_head)
        if rest or heads > self.n_heads:
            raise UnsupportedModelError(
                f"{matrix} of layer {layer} is {width} wide, which is not a number of heads of "
                f"width {self.d_head}; pass matrices='mlp'"
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
        # A bridge that leaves attention to Hugging Face shows its hooks only the finished pattern.
        attn = self.model.get_submodule(name.rpartition(".")[0])
        delegates = type(attn).forward.__qualname__ == "AttentionBridge.forward"
        return replace(site, is_replaceable=not delegates)

    # --- MLPs --------------------------------------------------------------------------------

    def _mlp_sites(self, layer: int) -> dict[MatrixName, Site]:
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        experts = unwrapped(getattr(unwrapped(mlp), "experts", None))
        if experts is not None:
            return self._experts_sites(layer, experts)
        found = mlp_projections(mlp, layer)
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
            # In a gated MLP, mlp.hook_pre is the gate's output.
            hooks = {
                "output_hook": f"{at}.hook_pre{'_linear' if gated and matrix == 'W_in' else ''}"
            }
        site = self._existing_hooks(linear_site(matrix, layer, linear_of(projection), **hooks))
        if not (gated and getattr(mlp, "_use_processed_weights", False)):
            return site
        # A gated MLP with processed weights multiplies by them itself, in TransformerLens 3 by its
        # own copies. It calls its projections' hook points one by one, except those at the inputs
        # of the reading ones.
        copies = processed_copies(mlp)
        weight = site.weight.parameter
        return replace(
            site,
            input=Tap((mlp if matrix in READING_MATRICES else projection).hook_in, "output"),
            output=Tap(projection.hook_out, "input"),
            weight=replace(site.weight, parameter=copies.get(id(weight), weight)),
            bias=copies.get(id(site.bias), site.bias),
        )

    def _experts_sites(self, layer: int, experts: Any) -> dict[MatrixName, Site]:
        stack = expert_stack(experts, layer)
        stored: dict[MatrixName, tuple[str, Tensor | None]] = {
            "W_in": ("gate_up_proj", ~stack.gate),
            "W_gate": ("gate_up_proj", stack.gate),
            "W_out": ("down_proj", None),
        }
        sites: dict[MatrixName, Site] = {}
        for matrix, (name, columns) in stored.items():
            bias = getattr(experts, f"{name}_bias", None)
            sites[matrix] = StackedExpertsSite(
                matrix,
                layer,
                stack,
                weights=(getattr(experts, name),),
                biases=() if bias is None else (bias,),
                columns=columns,
                is_transposed=not experts.is_transposed,
                joins=self._join(layer, "mlp") if matrix == "W_out" else None,
            )
        return sites

    # --- hook points and parameters ----------------------------------------------------------

    def _join(self, layer: int, branch: str) -> HookPointSite:
        """Where the output of a branch is added to the residual stream."""
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
        """The parameters that the forward pass uses, by Hugging Face's names."""
        named = {
            name.replace("_original_component.", ""): parameter
            for root in self._roots()
            for name, parameter in root.named_parameters()
        }
        once = {id(parameter): name for name, parameter in reversed(named.items())}
        copies: dict[int, Tensor] = {}
        for _, module in self._modules:
            if getattr(module, "_use_processed_weights", False):
                copies |= processed_copies(module)
        return {
            name: copies.get(id(parameter), parameter)
            for name, parameter in named.items()
            if once[id(parameter)] == name and not set(name.split(".")[:-1]) & set(FUSED)
        }

    @property
    def processed_matrices(self) -> frozenset[MatrixName]:
        """Matrices that TransformerLens's weight processing changed, judging by the weights."""
        found: set[MatrixName] = set()
        if not getattr(self.model, "_weights_processed", False):
            return frozenset()
        block = self.model.blocks[0]
        gain = getattr(unwrapped(getattr(block, "ln1", None)), "weight", None)
        if gain is not None and bool((gain == gain[0]).all()):  # fold_ln
            found.update(READING_MATRICES)
        output = linear_of(getattr(getattr(block, "attn", None), "o", None))
        if output is not None:
            written = linear_site("W_O", 0, output).weight
            if is_centered(written.in_out(written.parameter)):  # center_writing_weights
                found.update(WRITING_MATRICES)
        return frozenset(found)
