"""Small random models, each with a reference from which tests compute expected values.

Every size differs from every other, and gains, biases and final norms are random, so that a wrong
orientation, a forgotten bias or the wrong side of a norm is detected.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

HAS_BRIDGE = find_spec("transformer_lens.model_bridge") is not None
NO_BRIDGE = "TransformerBridge came with TransformerLens 3"
HAS_HOOKED = find_spec("transformer_lens.HookedTransformer") is not None
NO_HOOKED = "HookedTransformer ended with TransformerLens 3.9"

D_VOCAB, D_MODEL, D_MLP, N_LAYERS, N_CTX = 97, 24, 52, 3, 64

BRIDGE_NAMES = ("bridge-gpt2", "bridge-llama", "bridge-gemma2", "bridge-neox")
HOOKED_NAMES = (
    "hooked-gpt2",
    "hooked-llama",
    "hooked-gemma2",
    "hooked-solu_ln",
    "hooked-no_norm",
)
NAMES = BRIDGE_NAMES + HOOKED_NAMES

CORPUS = (
    "The capital of France is Paris.",
    "Rome is in Italy and Paris is not.",
    "Messi plays for Paris, Messi plays the ball.",
    "A river runs through Rome.",
    "The dog of the king runs to Paris.",
)


@dataclass(frozen=True)
class Parameter:
    """A weight of a reference model and whether it is stored as `[d_out, d_in]`."""

    tensor: nn.Parameter
    transposed: bool

    def in_out(self, tensor: Tensor) -> Tensor:
        """TransformerLens's orientation of a tensor laid out like the parameter."""
        return tensor.T if self.transposed else tensor


Parameters = dict[tuple[str, int], Parameter]


@dataclass(frozen=True)
class Case:
    """A TransformerLens model under test and an independent model with equal weights.

    Attributes:
        name: Class and architecture.
        model: The model under test.
        own: The MLP weights of `model` itself, found before TransformerLens wrapped it.
        logits: Token ids to logits by the reference: the raw Hugging Face model, or a copy.
        weights: The MLP weights of the reference.
        outputs: Modules of the reference whose output is `x @ W + b` of each matrix.
        norm: The reference's final norm.
        unembed: The reference's logits of a normalised vector, including softcap.
    """

    name: str
    model: Any
    own: Parameters
    logits: Callable[[Tensor], Tensor]
    weights: Parameters
    outputs: Mapping[tuple[str, int], nn.Module]
    norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The MLP's matrices, in the order of use."""
        return tuple(dict.fromkeys(matrix for matrix, _ in self.weights))

    @property
    def n_layers(self) -> int:
        return 1 + max(layer for _, layer in self.weights)

    @property
    def logits_in_float32(self) -> bool:
        """Whether Hugging Face rounds to float32 in between, as its RMS norms do."""
        kind = type(self.norm)
        return kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm")

    @property
    def d_vocab(self) -> int:
        with torch.no_grad():
            return int(self.unembed(torch.zeros(1, self.d_model, dtype=self.dtype)).shape[-1])

    @property
    def d_model(self) -> int:
        weight = self.weights["W_out", 0]
        return int(weight.in_out(weight.tensor).shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["W_out", 0].tensor.dtype

    def lens(self, vectors: Tensor) -> Tensor:
        """The Logit Lens, one vector at a time."""
        with torch.no_grad():
            return torch.stack([self.unembed(self.norm(vector[None]))[0] for vector in vectors])

    def tokens(self, *lengths: int, seed: int = 0) -> Tensor:
        """Random token ids, one row per length; all lengths equal."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), lengths[0])
        return torch.randint(0, min(self.d_vocab, D_VOCAB), shape, generator=generator)

    def weight_gradients(
        self, tokens: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[tuple[str, int], Tensor]:
        """Autograd's weight gradients of the reference, `[d_in, d_out]`."""
        keys = list(self.weights)
        tensors = [self.weights[key].tensor for key in keys]
        value = loss(self.logits(tokens), tokens).sum()
        gradients = torch.autograd.grad(value, tensors)
        return {
            key: self.weights[key].in_out(gradient)
            for key, gradient in zip(keys, gradients, strict=True)
        }


def nll(target: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of the paper's equation 2, written out."""

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        last = logits[:, -1]
        return torch.logsumexp(last, -1) - last[:, target]

    return loss


def training_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, written out."""
    rows = []
    for row, ids in zip(logits, tokens, strict=True):
        terms = [torch.logsumexp(row[i], -1) - row[i, int(ids[i + 1])] for i in range(len(ids) - 1)]
        rows.append(sum(terms, torch.zeros(())) / len(terms))
    return torch.stack(rows)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN, which fails every comparison, where zero is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# ------------------------------------------------------------------------------------- tokenizers


@functools.cache
def _tokenizer_folder() -> tempfile.TemporaryDirectory[str]:
    """A byte-level BPE trained on a few sentences; TransformerLens reloads it from a folder."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tempfile.TemporaryDirectory()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder.name)
    return folder


def small_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A new tokenizer of 97 tokens: ` the` and ` Paris` are one, `the` is two."""
    return AutoTokenizer.from_pretrained(_tokenizer_folder().name, padding_side=padding_side)


def readable(folder: Path, folders: pytest.TempPathFactory) -> Path:
    """A tokenizer folder saved by transformers 5, converted for the installed version."""
    if hasattr(transformers, "TokenizersBackend"):
        return folder
    # transformers 4 knows the tokenizer's class by an older name.
    copy = shutil.copytree(folder, folders.mktemp("shared") / folder.name)
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return copy


# --------------------------------------------------------------------------------- random weights


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights, gains around 1 and biases around 0, none of them 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = parameter.ndim == 1 and name.endswith(("weight", ".w"))
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.2 * noise)


# ------------------------------------------------------------------------------------------ bridge


_BRIDGE_NAMES = {"neox": "EleutherAI/gpt-neox-20b", "opt": "facebook/opt-125m"}


def _hf_model(architecture: str, n_ctx: int, n_layers: int) -> nn.Module:
    sizes = {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": n_ctx,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=D_VOCAB,
                n_positions=n_ctx,
                n_embd=D_MODEL,
                n_inner=D_MLP,
                n_layer=n_layers,
                n_head=3,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=False,
                attn_implementation="eager",
            )
        )
    if architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
        )
    if architecture == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(
                **sizes,
                num_key_value_heads=2,
                head_dim=6,
                query_pre_attn_scalar=6,
                sliding_window=20,
                final_logit_softcapping=1.5,
                attn_logit_softcapping=5.0,
            )
        )
    if architecture == "opt":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=D_VOCAB,
                hidden_size=D_MODEL,
                word_embed_proj_dim=D_MODEL,
                ffn_dim=D_MLP,
                num_hidden_layers=n_layers,
                num_attention_heads=4,
                max_position_embeddings=n_ctx,
                dropout=0.0,
                tie_word_embeddings=False,
                attn_implementation="eager",
            )
        )
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, rotary_pct=1.0))


def hf_matrices(hf_model: Any) -> dict[tuple[str, int], nn.Module]:
    """The linear modules of a Hugging Face model's MLPs, by TransformerLens's names."""
    names = {
        "gpt2": {"W_in": "c_fc", "W_out": "c_proj"},
        "gpt_neox": {"W_in": "dense_h_to_4h", "W_out": "dense_4h_to_h"},
        "opt": {"W_in": "fc1", "W_out": "fc2"},
    }.get(
        hf_model.config.model_type,
        {"W_in": "up_proj", "W_gate": "gate_proj", "W_out": "down_proj"},
    )
    body = getattr(hf_model.base_model, "decoder", hf_model.base_model)
    blocks = body.h if hasattr(body, "h") else body.layers
    return {
        (matrix, layer): getattr(getattr(block, "mlp", block), name)
        for layer, block in enumerate(blocks)
        for matrix, name in names.items()
    }


def hf_weights(hf_model: Any) -> Parameters:
    """The MLP weights of a Hugging Face model."""
    return {
        key: Parameter(module.weight, transposed=isinstance(module, nn.Linear))
        for key, module in hf_matrices(hf_model).items()
    }


def hf_reading(hf_model: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Final norm and unembedding of a Hugging Face model, through its modules."""
    body = getattr(hf_model.base_model, "decoder", hf_model.base_model)
    names = ("ln_f", "norm", "final_layer_norm")
    norm = next(getattr(body, name) for name in names if hasattr(body, name))
    head = hf_model.get_output_embeddings()
    cap = getattr(hf_model.config, "final_logit_softcapping", None)

    def unembed(vectors: Tensor) -> Tensor:
        logits = head(vectors)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return norm, unembed


def bridge_case(
    hf_model: Any,
    tokenizer: Any,
    *,
    name: str,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Wrap a Hugging Face model and keep a raw copy of it as the reference."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = hf_model.to(dtype).eval()
    raw = copy.deepcopy(hf_model)
    own = hf_weights(hf_model)
    model = TransformerBridge.boot_transformers(
        _BRIDGE_NAMES.get(name, name),
        hf_model=hf_model,
        tokenizer=tokenizer,
        device="cpu",
        dtype=dtype,
    ).eval()
    norm, unembed = hf_reading(raw)
    # TransformerLens rotates GPT-NeoX's queries in float32, so the raw model agrees to 2e-7 only
    # and the bridge's autograd is the reference; likewise OPT's attention.
    itself = name in ("neox", "opt")
    return Case(
        name,
        model,
        own,
        logits=lambda tokens: model(tokens) if itself else raw(tokens).logits,
        weights=own if itself else hf_weights(raw),
        outputs={} if itself else hf_matrices(raw),
        norm=norm,
        unembed=unembed,
    )


# ------------------------------------------------------------------------------------------ hooked


def _hooked_config(architecture: str, n_ctx: int, n_layers: int, d_vocab: int) -> Any:
    from transformer_lens import HookedTransformerConfig

    shared: dict[str, Any] = {
        "d_model": D_MODEL,
        "d_mlp": D_MLP,
        "d_vocab": d_vocab,
        "n_ctx": n_ctx,
        "n_layers": n_layers,
        "dtype": torch.float64,
        "device": "cpu",
        "seed": 0,
        "model_name": f"random-{architecture}",
    }
    dense = {"n_heads": 3, "d_head": 8, "act_fn": "gelu_new", "normalization_type": "LN"}
    gated = {
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 6,
    }
    special = {
        "gpt2": dense,
        "llama": gated,
        "gemma2": gated
        | {
            "use_normalization_before_and_after": True,
            "output_logits_soft_cap": 1.5,
            "attn_scores_soft_cap": 5.0,
        },
        "solu_ln": dense | {"act_fn": "solu_ln"},
        "no_norm": dense | {"normalization_type": None},
        "ln_pre": dense | {"normalization_type": "LNPre"},  # for weights into which it is folded
        "attn_only": dense | {"attn_only": True, "d_mlp": None, "act_fn": None},
    }
    return HookedTransformerConfig(**(shared | special[architecture]))


def hooked_weights(model: Any) -> Parameters:
    """The MLP weights of a HookedTransformer."""
    names = ("W_in", "W_gate", "W_out") if model.cfg.gated_mlp else ("W_in", "W_out")
    return {
        (matrix, layer): Parameter(getattr(block.mlp, matrix), transposed=False)
        for layer, block in enumerate(model.blocks)
        for matrix in names
    }


def _hooked_output(mlp: Any, matrix: str) -> nn.Module:
    if matrix == "W_out":
        return mlp
    return mlp.hook_pre_linear if matrix == "W_in" and mlp.cfg.gated_mlp else mlp.hook_pre


def hooked_case(model: Any, *, name: str) -> Case:
    """A HookedTransformer, with a deep copy as the reference."""
    reference = copy.deepcopy(model)
    cap = model.cfg.output_logits_soft_cap

    def unembed(vectors: Tensor) -> Tensor:
        logits = vectors @ reference.unembed.W_U + reference.unembed.b_U
        return logits if cap <= 0 else torch.tanh(logits / cap) * cap

    return Case(
        name,
        model,
        hooked_weights(model),
        # Every token is real: without the mask HookedTransformer guesses one from pad tokens.
        logits=lambda tokens: reference(
            tokens, return_type="logits", attention_mask=torch.ones_like(tokens)
        ),
        weights=hooked_weights(reference),
        outputs={
            (matrix, layer): _hooked_output(block.mlp, matrix)
            for layer, block in enumerate(reference.blocks)
            for matrix in ("W_in", "W_gate", "W_out")
        },
        norm=getattr(reference, "ln_final", None) or nn.Identity(),
        unembed=unembed,
    )


# -------------------------------------------------------------------------------------------- both


def build(
    name: str,
    dtype: torch.dtype = torch.float64,
    *,
    padding_side: str = "right",
    n_ctx: int = N_CTX,
    n_layers: int = N_LAYERS,
    d_vocab: int = D_VOCAB,
    seed: int = 0,
) -> Case:
    """One random model by class and architecture; skips where TransformerLens lacks the class."""
    kind, architecture = name.split("-")
    require_kind(kind)
    tokenizer = small_tokenizer(padding_side)
    if kind == "bridge":
        hf_model = _hf_model(architecture, n_ctx, n_layers).double()
        randomise(hf_model, seed)
        return bridge_case(hf_model, tokenizer, name=architecture, dtype=dtype)
    from transformer_lens import HookedTransformer

    cfg = _hooked_config(architecture, n_ctx, n_layers, d_vocab)
    tokenizer = tokenizer if d_vocab == D_VOCAB else None
    model = HookedTransformer(cfg, tokenizer, default_padding_side=padding_side).eval()
    randomise(model, seed)
    cfg.dtype = dtype
    return hooked_case(model.to(dtype), name=architecture)


bridge_only = pytest.mark.skipif(not HAS_BRIDGE, reason=NO_BRIDGE)
hooked_only = pytest.mark.skipif(not HAS_HOOKED, reason=NO_HOOKED)


def attention_only_model(*, has_norms: bool = True) -> Any:
    """A HookedTransformer without MLPs."""
    from transformer_lens import HookedTransformer

    cfg = _hooked_config("attn_only", N_CTX, N_LAYERS, D_VOCAB)
    if not has_norms:
        cfg.normalization_type = None
    return HookedTransformer(cfg).eval()


def require_kind(kind: str) -> None:
    """Skip a test of a model class that the installed TransformerLens lacks."""
    has, reason = {"bridge": (HAS_BRIDGE, NO_BRIDGE), "hooked": (HAS_HOOKED, NO_HOOKED)}[kind]
    if not has:
        pytest.skip(reason)


def counting_mlps(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the layer of each MLP that runs."""
    ran: list[int] = []
    for layer, block in enumerate(model.blocks):
        own = block.mlp.forward

        def counted(*args: Any, _own: Any = own, _layer: int = layer, **kwargs: Any) -> Any:
            ran.append(_layer)
            return _own(*args, **kwargs)

        monkeypatch.setitem(vars(block.mlp), "forward", counted)
    return ran
