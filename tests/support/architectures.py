"""Small random models of many architectures, in both of TransformerLens's model classes.

Every size differs from every other, gains and biases are random, windows are shorter than prompts,
and routers select experts. `hf_model` gives the raw Hugging Face model with the same weights as
`build_model`, so the two check each other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import HAS_BRIDGE, HAS_HOOKED, NO_BRIDGE, NO_HOOKED, randomise, small_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

KINDS = ("hooked", "hooked-processed", "bridge", "bridge-compat")
"""`HookedTransformer` and `TransformerBridge`: as loaded, and with processed weights."""

D_VOCAB, D_MODEL, D_MLP, N_LAYERS, N_CTX, N_HEADS = 97, 24, 52, 2, 64, 4

_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")

_ROTARY_FACTOR = 0.67  # 4 of a head's 6 dimensions
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_WIDE_HEADS: dict[str, Any] = {"head_dim": 8}  # n_heads * head_dim is not d_model


class NotAvailable(Exception):
    """The installed TransformerLens does not support this family in this class."""


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        config: Fields of the Hugging Face config; shared sizes are added.
        model_type: Hugging Face's name of the family, if not the key in `FAMILIES`.
        official_name: A name that `HookedTransformer` takes its config from, for families whose
            sizes it hard-codes by name.
        hooked: Fields in which the `HookedTransformerConfig` must be corrected.
        gone: Attributes of the Hugging Face config that TransformerLens still reads, and that
            transformers 5 no longer has.
        unprocessed: Steps of weight processing that would change what the model computes.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    official_name: str | None = None
    hooked: dict[str, Any] = field(default_factory=dict)
    gone: dict[str, Any] = field(default_factory=dict)
    unprocessed: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "gpt2": Family({"n_inner": D_MLP, "n_ctx": N_CTX}),
    "gpt_neo": Family(
        {"attention_types": [[["global", "local"], 1]], "num_layers": N_LAYERS, "window_size": 5}
    ),
    "gptj": Family({"n_inner": D_MLP, "rotary_dim": 4}),
    "gpt_neox": Family({"rotary_pct": _ROTARY_FACTOR}),
    "opt": Family({"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}),
    "bloom": Family(hooked={"d_mlp": 4 * D_MODEL}),
    "falcon": Family({"ffn_hidden_size": D_MLP, "bias": True}),
    # With more than one head of keys, as Falcon-40B has, TransformerBridge splits the fused matrix
    # of this layout wrongly.
    "falcon_new": Family(
        {"ffn_hidden_size": D_MLP, "new_decoder_architecture": True, "num_kv_heads": 1},
        model_type="falcon",
    ),
    "falcon_alibi": Family(
        {
            "ffn_hidden_size": D_MLP,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        model_type="falcon",
    ),
    "llama": Family(_GROUPED | _WIDE_HEADS, hooked={"rotary_dim": 8}),
    "mistral": Family(_GROUPED | _WIDE_HEADS | {"sliding_window": 5}),
    "qwen2": Family(_GROUPED),
    "qwen3": Family(_GROUPED | _WIDE_HEADS),
    "gemma": Family(
        _GROUPED | _WIDE_HEADS,
        official_name="google/gemma-2b",
        hooked={"rotary_dim": 8, "act_fn": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        _GROUPED
        | _WIDE_HEADS
        | {
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        official_name="google/gemma-2-2b",
        hooked={
            "attn_scale": 7**0.5,
            "attn_types": ["local", "global"],
            "window_size": 5,
            "attn_scores_soft_cap": 2.0,
            "output_logits_soft_cap": 1.5,
        },
        unprocessed=("center_unembed",),  # HookedTransformer.from_pretrained omits it, too
    ),
    "gemma3": Family(
        _GROUPED
        | _WIDE_HEADS
        | {
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        model_type="gemma3_text",
        official_name="google/gemma-3-1b-pt",
        hooked={"attn_scale": 7**0.5, "window_size": 5, "attn_types": ["local", "global"]},
    ),
    "phi": Family(
        {"partial_rotary_factor": _ROTARY_FACTOR}, gone={"partial_rotary_factor": _ROTARY_FACTOR}
    ),
    "phi3": Family(
        _GROUPED | {"sliding_window": 5},
        hooked={"use_local_attn": True, "attn_types": ["local", "local"], "window_size": 5},
    ),
    "olmo2": Family(
        {"rms_norm_eps": 1e-6, "rope_theta": 500000.0},
        official_name="allenai/OLMo-2-0425-1B",
        unprocessed=("fold_ln", "center_writing_weights"),  # as in from_pretrained
    ),
    "stablelm": Family(_GROUPED | {"partial_rotary_factor": _ROTARY_FACTOR, "use_qkv_bias": True}),
    "mixtral": Family(
        _GROUPED | _WIDE_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
        hooked={"rotary_dim": 8},
    ),
    "qwen2_moe": Family(
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        }
    ),
    # The first layer has a dense MLP.
    "qwen3_moe": Family(
        _GROUPED
        | _WIDE_HEADS
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [0],
        }
    ),
    "gpt_oss": Family(
        _GROUPED
        | _WIDE_HEADS
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        hooked={"use_attention_sinks": True},
        # With attention sinks a pattern does not add up to 1, which folding assumes.
        unprocessed=("fold_value_biases",),
    ),
}

LLAMA_MODULES = {
    "W_Q": "self_attn.q_proj",
    "W_K": "self_attn.k_proj",
    "W_V": "self_attn.v_proj",
    "W_O": "self_attn.o_proj",
    "W_in": "mlp.up_proj",
    "W_gate": "mlp.gate_proj",
    "W_out": "mlp.down_proj",
}
"""Modules of a layer of the transformers model, in the order in which it uses them."""


def hf_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a family, with the same weights at every call."""
    settings = FAMILIES[family]
    config = AutoConfig.for_model(
        settings.model_type or family,
        **{
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "intermediate_size": D_MLP,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
            # The default implementation of experts, grouped_mm, does not support float64.
            "experts_implementation": "eager" if dtype == torch.float64 else None,
        }
        | settings.config,
    )
    for name in list(vars(config)):
        if "drop" in name:
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # As in every saved checkpoint. TransformerBridge identifies some families by nothing else.
    model.config.architectures = [type(model).__name__]
    randomise(model)
    for module in model.modules():
        if type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm"):
            module.weight.data -= 1  # these multiply by 1 + weight
    # Last, so that the numbers fit into float32, to which TransformerLens rounds those it loads.
    return model.to(dtype).eval()


def build_model(family: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small random model with the weights of `hf_model(family, dtype)`.

    Args:
        family: A key of `FAMILIES`.
        kind: One of `KINDS`.
        dtype: The dtype of its weights.

    Raises:
        NotAvailable: If the installed TransformerLens does not support the family in this class.
    """
    processed = kind in ("hooked-processed", "bridge-compat")
    if kind.startswith("hooked"):
        return _hooked(family, dtype, processed)
    return _bridge(family, dtype, processed)


def _bridge(family: str, dtype: torch.dtype, processed: bool) -> Any:
    if not HAS_BRIDGE:
        raise NotAvailable(NO_BRIDGE)
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        f"random-{family}",
        hf_model=hf_model(family, dtype),
        tokenizer=small_tokenizer(),
        device="cpu",
        dtype=dtype,
    )
    if processed:
        bridge.enable_compatibility_mode(
            disable_warnings=True,
            **{step: step not in FAMILIES[family].unprocessed for step in _PROCESSING},
        )
        if any(parameter.dtype != dtype for parameter in bridge.parameters()):
            raise NotAvailable(
                f"TransformerBridge in TransformerLens {version('transformer-lens')}: weight "
                f"processing gives this family biases in float32, which do not run in {dtype}"
            )
    return bridge.eval()


def _hooked(family: str, dtype: torch.dtype, processed: bool) -> Any:
    """Do what `HookedTransformer.from_pretrained` does, which needs a hub name."""
    if not HAS_HOOKED:
        raise NotAvailable(NO_HOOKED)
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading

    settings, raw = FAMILIES[family], hf_model(family, dtype)
    name = settings.official_name or "random"
    fields: dict[str, Any] = {
        "d_model": D_MODEL,
        "d_mlp": D_MLP,
        "d_head": getattr(raw.config, "head_dim", None) or D_MODEL // N_HEADS,
        "d_vocab": D_VOCAB,
        "n_ctx": N_CTX,
        "n_heads": N_HEADS,
        "n_layers": N_LAYERS,
    }
    if "num_key_value_heads" in settings.config:
        fields["n_key_value_heads"] = raw.config.num_key_value_heads
    fields |= settings.hooked
    fields |= {"device": "cpu", "dtype": dtype, "init_weights": False, "model_name": family}
    with _saved_as(name, raw.config, settings.gone):
        try:
            cfg = HookedTransformerConfig.from_dict(loading.convert_hf_model_config(name) | fields)
        except (NotImplementedError, TypeError) as error:  # no such family; no such field
            raise NotAvailable(
                f"HookedTransformer in TransformerLens {version('transformer-lens')}: {error}"
            ) from error
        weights = loading.get_pretrained_state_dict(name, cfg, raw, dtype=dtype)
    model = HookedTransformer(cfg, small_tokenizer())
    model.load_and_process_state_dict(
        {name: weight.detach() for name, weight in weights.items()},
        **{step: processed and step not in settings.unprocessed for step in _PROCESSING},
    )
    return model.to(dtype, print_details=False).eval()


@contextmanager
def _saved_as(name: str, config: Any, gone: dict[str, Any]) -> Iterator[None]:
    """Within the block `name` is a folder with the config, including the removed attributes."""
    before = Path.cwd()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config.save_pretrained(folder / name)
        for attribute, value in gone.items():
            stack.enter_context(patch.object(type(config), attribute, value, create=True))
        stack.callback(os.chdir, before)
        os.chdir(folder)
        yield
