"""Properties that hold for all sizes, dtypes, prompts and requests.

Sizes collide here on purpose, unlike those of `models.py`: the same number of tokens, heads
and prompts, an MLP as wide as the stream. Every property runs on models of the four kinds below,
sixteen in all, made once; the examples are the same in every run.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import HAS_BRIDGE, hf_reading, randomise, require_kind
from sampling import examples
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import logit_difference, next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models.sites import ATTENTION_MATRICES, READING_MATRICES, WRITING_MATRICES
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.validation import validate

pytestmark = pytest.mark.usefixtures("as_for_a_user")

KINDS = ("bridge-gpt2", "bridge-llama", "hooked-gpt2", "hooked-llama")
MODELS_PER_KIND = 4
N_CTX = 12
SPECIAL = ("<bos>", "<eos>", "<pad>")


# ------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model."""

    kind: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    dtype: torch.dtype
    padding_side: str
    option: str | None
    seed: int


@dataclass(frozen=True)
class Weight:
    """A parameter of the reference, and a function for TransformerLens's layout of its gradient."""

    parameter: Tensor
    lay_out: Callable[[Tensor], Tensor]


class Tiny:
    """A model under test, and an independent one with equal weights."""

    def __init__(
        self,
        sizes: Sizes,
        model: Any,
        reference: nn.Module,
        *,
        logits: Callable[[Tensor], Tensor],
        weights: dict[tuple[str, int], Weight],
        biases: dict[tuple[str, int], Weight],
        norm: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor], Tensor],
    ) -> None:
        self.sizes, self.model = sizes, model
        self.names = {id(parameter): name for name, parameter in reference.named_parameters()}
        self.logits, self.weights, self.biases = logits, weights, biases
        self.norm, self.unembed = norm, unembed

    def __repr__(self) -> str:
        return repr(self.sizes)

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(matrix for matrix, _ in self.weights))

    @property
    def is_rounded(self) -> bool:
        """Whether results are rounded to float32, as in Hugging Face's RMS norms."""
        return self.sizes.dtype == torch.float32 or self.sizes.kind == "bridge-llama"

    @property
    def rtol(self) -> float:
        """Relative tolerance between two computations of the same number.

        Both sum the same products in another order, and softmax and norms in between cancel: a
        thousand roundings of either dtype.
        """
        return 1e-4 if self.is_rounded else 1e-10

    def tokens_of(self, prompt: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in prompt)

    def scores(self, vectors: Tensor) -> Tensor:
        """The Logit Lens by the reference's norm and unembedding."""
        with torch.no_grad():
            return self.unembed(self.norm(vectors.to(self.sizes.dtype))).double()


@functools.cache
def tokenizer_folder(d_vocab: int) -> tempfile.TemporaryDirectory[str]:
    """Words `w3`, `w4`, ... with their numbers as ids."""
    words = [*SPECIAL, *(f"w{token}" for token in range(3, d_vocab))]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tempfile.TemporaryDirectory()
    bos, eos, pad = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    ).save_pretrained(folder.name)
    return folder


def all_sizes(kind: str) -> list[Sizes]:
    """Some models of one kind, including small and large values of every size."""
    rng = random.Random(f"sizes of {kind}")
    found = []
    for seed in range(MODELS_PER_KIND):
        is_llama, is_bridge = kind.endswith("llama"), kind.startswith("bridge")
        n_heads = rng.choice([1, 2, 3, 4, 6])
        d_head = rng.choice([2, 4, 6] if is_llama else [1, 2, 3, 5])
        d_model = n_heads * d_head if is_bridge else rng.choice([3, 4, 7, 12])
        if d_model < 3:  # normalising two numbers leaves only their sign
            d_head, d_model = 4, 4 * n_heads
        divisors = [heads for heads in range(1, n_heads + 1) if n_heads % heads == 0]
        n_kv_heads = rng.choice(divisors) if is_llama else n_heads
        options = [None] if is_bridge else [None, "use_attn_result", "use_split_qkv_input"]
        if not is_bridge and n_kv_heads < n_heads:
            options.append("ungroup_grouped_query_attention")
        found.append(
            Sizes(
                kind,
                n_layers=rng.choice([1, 2, 3]),
                d_model=d_model,
                d_mlp=rng.choice([1, 2, d_model, 9]),
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                d_head=d_head,
                d_vocab=rng.choice([6, 11, 24]),
                dtype=torch.float32 if seed % 3 == 2 else torch.float64,
                padding_side=rng.choice(["left", "right"]),
                option=rng.choice(options),
                seed=seed,
            )
        )
    return found


@functools.cache
def tiny(sizes: Sizes) -> Tiny:
    folder = tokenizer_folder(sizes.d_vocab).name
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=sizes.padding_side)
    return (tiny_bridge if sizes.kind.startswith("bridge") else tiny_hooked)(sizes, tokenizer)


def as_stored(gradient: Tensor) -> Tensor:
    return gradient


def tiny_hooked(sizes: Sizes, tokenizer: Any) -> Tiny:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    gated = sizes.kind == "hooked-llama"
    special: dict[str, Any] = (
        {
            "n_key_value_heads": sizes.n_kv_heads,
            "act_fn": "silu",
            "normalization_type": "RMS",
            "gated_mlp": True,
            "positional_embedding_type": "rotary",
            "rotary_dim": sizes.d_head,
        }
        if gated
        else {"act_fn": "gelu_new", "normalization_type": "LN"}
    )
    if sizes.option is not None:
        special[sizes.option] = True
    cfg = HookedTransformerConfig(
        n_layers=sizes.n_layers,
        d_model=sizes.d_model,
        d_mlp=sizes.d_mlp,
        n_heads=sizes.n_heads,
        d_head=sizes.d_head,
        d_vocab=sizes.d_vocab,
        n_ctx=N_CTX,
        dtype=sizes.dtype,
        device="cpu",
        seed=0,
        model_name=f"tiny-{sizes.kind}",
        **special,
    )
    model = HookedTransformer(cfg, tokenizer, default_padding_side=sizes.padding_side).eval()
    randomise(model, sizes.seed)
    reference = copy.deepcopy(model)
    weights, biases = {}, {}
    for layer, block in enumerate(reference.blocks):
        grouped = "_" if hasattr(block.attn, "_W_K") else ""
        names = {"Q": "", "K": grouped, "V": grouped, "O": ""}
        for letter, prefix in names.items():
            for letters, stored in (("W", weights), ("b", biases)):
                parameter = getattr(block.attn, f"{prefix}{letters}_{letter}")
                stored[f"W_{letter}", layer] = Weight(parameter, as_stored)
        for name in ("in", "gate", "out") if gated else ("in", "out"):
            weights[f"W_{name}", layer] = Weight(getattr(block.mlp, f"W_{name}"), as_stored)
            # TransformerLens adds a gated MLP's b_in after the gate, not to the output of W_in.
            bias = None if gated and name == "in" else getattr(block.mlp, f"b_{name}", None)
            if bias is not None:
                biases[f"W_{name}", layer] = Weight(bias, as_stored)
    return Tiny(
        sizes,
        model,
        reference,
        # Every token is real: without the mask HookedTransformer guesses one from pad tokens.
        logits=lambda tokens: reference(
            tokens, return_type="logits", attention_mask=torch.ones_like(tokens)
        ),
        weights=weights,
        biases=biases,
        norm=reference.ln_final,
        unembed=lambda vectors: vectors @ reference.unembed.W_U + reference.unembed.b_U,
    )


def tiny_bridge(sizes: Sizes, tokenizer: Any) -> Tiny:
    from transformer_lens.model_bridge import TransformerBridge

    if sizes.kind == "bridge-gpt2":
        hf_model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=sizes.d_vocab,
                n_positions=N_CTX,
                n_embd=sizes.d_model,
                n_inner=sizes.d_mlp,
                n_layer=sizes.n_layers,
                n_head=sizes.n_heads,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=False,
                attn_implementation="eager",
            )
        )
    else:
        hf_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.d_vocab,
                hidden_size=sizes.d_model,
                intermediate_size=sizes.d_mlp,
                num_hidden_layers=sizes.n_layers,
                num_attention_heads=sizes.n_heads,
                num_key_value_heads=sizes.n_kv_heads,
                max_position_embeddings=N_CTX,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=False,
                attention_bias=True,
                mlp_bias=True,
                attn_implementation="eager",
            )
        )
    hf_model = hf_model.double()
    randomise(hf_model, sizes.seed)
    hf_model = hf_model.to(sizes.dtype).eval()
    raw = copy.deepcopy(hf_model)
    model = TransformerBridge.boot_transformers(
        sizes.kind.removeprefix("bridge-"),
        hf_model=hf_model,
        tokenizer=tokenizer,
        device="cpu",
        dtype=sizes.dtype,
    ).eval()
    weights, biases = gpt2_weights(raw) if sizes.kind == "bridge-gpt2" else llama_weights(raw)
    norm, unembed = hf_reading(raw)
    return Tiny(
        sizes,
        model,
        raw,
        logits=lambda tokens: raw(tokens).logits,
        weights=weights,
        biases=biases,
        norm=norm,
        unembed=unembed,
    )


def by_head(gradient: Tensor, d_head: int) -> Tensor:
    """`[..., head * d_head]` as `[head, ..., d_head]`."""
    return torch.stack(gradient.split(d_head, dim=-1))


def gpt2_weights(raw: Any) -> tuple[dict, dict]:
    weights, biases = {}, {}
    width = raw.config.n_embd
    d_head = width // raw.config.n_head
    for layer, block in enumerate(raw.transformer.h):
        for part, matrix in enumerate(("W_Q", "W_K", "W_V")):

            def lay_out(gradient: Tensor, part: int = part) -> Tensor:
                return by_head(gradient[..., part * width : (part + 1) * width], d_head)

            weights[matrix, layer] = Weight(block.attn.c_attn.weight, lay_out)
            biases[matrix, layer] = Weight(block.attn.c_attn.bias, lay_out)
        weights["W_O", layer] = Weight(
            block.attn.c_proj.weight, lambda gradient: gradient.unflatten(0, (-1, d_head))
        )
        biases["W_O", layer] = Weight(block.attn.c_proj.bias, as_stored)
        for matrix, conv in (("W_in", block.mlp.c_fc), ("W_out", block.mlp.c_proj)):
            weights[matrix, layer] = Weight(conv.weight, as_stored)
            biases[matrix, layer] = Weight(conv.bias, as_stored)
    return weights, biases


def llama_weights(raw: Any) -> tuple[dict, dict]:
    weights, biases = {}, {}
    d_head = raw.config.hidden_size // raw.config.num_attention_heads
    for layer, block in enumerate(raw.model.layers):
        for letter in "qkv":
            linear = getattr(block.self_attn, f"{letter}_proj")
            matrix = f"W_{letter.upper()}"
            weights[matrix, layer] = Weight(linear.weight, lambda g: by_head(g.T, d_head))
            biases[matrix, layer] = Weight(linear.bias, lambda g: by_head(g, d_head))
        linear = block.self_attn.o_proj
        weights["W_O", layer] = Weight(linear.weight, lambda g: g.T.unflatten(0, (-1, d_head)))
        biases["W_O", layer] = Weight(linear.bias, as_stored)
        for matrix, name in (("W_in", "up"), ("W_gate", "gate"), ("W_out", "down")):
            linear = getattr(block.mlp, f"{name}_proj")
            weights[matrix, layer] = Weight(linear.weight, lambda gradient: gradient.T)
            biases[matrix, layer] = Weight(linear.bias, as_stored)
    return weights, biases


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    require_kind(request.param.split("-")[0])
    return request.param


# ----------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Question:
    """A model, prompts, and an objective written twice: with the package, and by hand."""

    tiny: Tiny
    rows: tuple[tuple[int, ...], ...]
    as_text: bool
    objective: Any
    losses: tuple[Callable[[Tensor, Tensor], Tensor], ...]

    @property
    def prompts(self) -> Any:
        """Texts where lengths differ, otherwise texts or ids."""
        return self.prompts_of(range(len(self.rows)))

    def prompts_of(self, chosen: Sequence[int]) -> Any:
        rows = [self.rows[index] for index in chosen]
        if self.as_text:
            return [self.tiny.tokens_of(row) for row in rows]
        return torch.tensor(rows)

    def objective_of(self, chosen: Sequence[int]) -> Any:
        """The objective of some of the prompts, one at a time."""
        return self.objective(chosen)

    def capture(self, chosen: Sequence[int] | None = None, **options: Any) -> GradientCapture:
        chosen = range(len(self.rows)) if chosen is None else chosen
        options = {"matrices": "all"} | options
        objective = options.pop("objective", None) or self.objective_of(chosen)
        return capture_gradients(
            self.tiny.model, self.prompts_of(chosen), objective, **self.bos(options)
        )

    def result(self, chosen: Sequence[int] | None = None, **options: Any) -> BackwardLensResult:
        chosen = range(len(self.rows)) if chosen is None else chosen
        options = {"matrices": "all", "k": 3} | options
        objective = self.objective_of(chosen)
        return backward_lens(
            self.tiny.model,
            self.prompts_of(chosen),
            options.pop("target", None),
            objective=objective,
            **self.bos(options),
        )

    def bos(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | ({"prepend_bos": False} if self.as_text else {})


def nll_of(target: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.logsumexp(logits[-1], -1) - logits[-1, target]

    return loss


def difference_of(promoted: int, demoted: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, tokens: logits[-1, demoted] - logits[-1, promoted]


def own_answer(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.logsumexp(logits[-1], -1) - logits[-1].max()


def training(logits: Tensor, tokens: Tensor) -> Tensor:
    terms = [torch.logsumexp(row, -1) - row[t] for row, t in zip(logits, tokens[1:], strict=False)]
    return torch.stack(terms).mean()


def anything(logits: Tensor, tokens: Tensor) -> Tensor:
    """Every logit of every position has a different weight."""
    weights = torch.arange(1, logits.numel() + 1, dtype=logits.dtype).reshape(logits.shape)
    return (logits.tanh() * weights.cos()).sum()


@st.composite
def questions(draw: st.DrawFn, kind: str, most: int = 3) -> Question:
    model = tiny(draw(st.sampled_from(all_sizes(kind))))
    d_vocab = model.sizes.d_vocab
    as_text = draw(st.booleans())
    count = draw(st.integers(1, most))
    lengths = st.integers(1, 7)
    if as_text:
        word = st.integers(3, d_vocab - 1)
        rows = [
            tuple(draw(st.lists(word, min_size=n, max_size=n)))
            for n in draw(st.lists(lengths, min_size=count, max_size=count))
        ]
    else:  # the pad token is an ordinary token
        n = draw(lengths)
        word = st.integers(0, d_vocab - 1)
        rows = [tuple(draw(st.lists(word, min_size=n, max_size=n))) for _ in range(count)]
    token = st.integers(0, d_vocab - 1)
    a = draw(st.lists(token, min_size=count, max_size=count))
    b = draw(st.lists(token, min_size=count, max_size=count))
    names = ["target", "own answer", "difference", "anything"]
    if min(map(len, rows)) > 1:
        names.append("training")
    name = draw(st.sampled_from(names))
    made: dict[str, tuple[Callable[[Sequence[int]], Any], list]] = {
        "target": (lambda chosen: target_nll([a[i] for i in chosen]), [nll_of(i) for i in a]),
        "own answer": (lambda chosen: target_nll(), [own_answer] * count),
        "difference": (
            lambda chosen: logit_difference([a[i] for i in chosen], [b[i] for i in chosen]),
            [difference_of(i, j) for i, j in zip(a, b, strict=True)],
        ),
        "training": (lambda chosen: next_token_loss(), [training] * count),
        "anything": (
            lambda chosen: lambda logits, tokens: torch.stack(list(map(anything, logits, tokens))),
            [anything] * count,
        ),
    }
    objective, losses = made[name]
    return Question(model, tuple(rows), as_text, objective, tuple(losses))


# --------------------------------------------------------------------------------------- tolerances


def assert_close(found: Tensor, expected: Tensor, rtol: float, scale: float, where: Any) -> None:
    """Close relative to the expected tensor, or within the rounding of a much larger one."""
    assert found.shape == expected.shape, (where, found.shape, expected.shape)
    error = float((found.double() - expected.double()).norm())
    allowed = rtol * float(expected.double().norm()) + 1e-3 * rtol * scale
    assert error <= allowed, (where, error, allowed)


def largest(tensors: Sequence[Tensor]) -> float:
    return max(float(tensor.double().norm()) for tensor in tensors)


def assert_same_gradient(
    found: MatrixGradient, expected: MatrixGradient, rtol: float, scale: float
) -> None:
    where = expected.matrix, expected.layer
    assert (found.matrix, found.layer) == where
    assert_close(found.inputs, expected.inputs, rtol, 0.0, where)
    assert_close(found.vjps, expected.vjps, rtol, scale, where)


def assert_same_zeros(found: Tensor, expected: Tensor, norms: Tensor, scale: float) -> None:
    """Equal, except where terms cancel up to rounding, as in `W_Q` under equal keys."""
    assert (found == expected)[norms > 1e-5 * scale].all()


def vjp_scale(capture: GradientCapture) -> float:
    return largest([gradient.vjps for gradient in capture])


# ----------------------------------------------------------------- (a) the factors are the gradient


@pytest.mark.versions
@examples(8)
@given(data=st.data())
def test_factors_are_autograds_gradient(kind: str, data: st.DataObject) -> None:
    """Per prompt, against an independent model that runs the prompt by itself, without padding."""
    question = data.draw(questions(kind))
    model = question.tiny
    capture = question.capture()
    assert set(capture.gradients) == set(model.weights)
    parameters = {
        id(weight.parameter): weight.parameter
        for weight in (*model.weights.values(), *model.biases.values())
    }
    for prompt, (row, loss) in enumerate(zip(question.rows, question.losses, strict=True)):
        assert capture.tokens[prompt][capture.mask[prompt]].tolist() == list(row)
        tokens = torch.tensor(row)
        value = loss(model.logits(tokens[None])[0], tokens)
        found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
        expected = dict(zip(parameters, found, strict=True))
        assert_close(capture.loss[prompt], value.detach(), model.rtol, 1.0, "loss")
        scale = largest(found)
        for key, gradient in capture.gradients.items():
            weight = model.weights[key]
            dense = weight.lay_out(expected[id(weight.parameter)])
            assert_close(gradient.dense(prompt), dense, model.rtol, scale, key)
            if key in model.biases:
                bias = model.biases[key]
                summed = bias.lay_out(expected[id(bias.parameter)])
                assert_close(gradient.bias(prompt), summed, model.rtol, scale, (*key, "bias"))


@pytest.mark.versions
@examples(2)
@given(data=st.data())
def test_coverage_names_the_parameters_whose_gradient_follows(
    kind: str, data: st.DataObject
) -> None:
    model = tiny(data.draw(st.sampled_from(all_sizes(kind))))
    layer = data.draw(st.integers(0, model.sizes.n_layers - 1))
    for matrix in model.matrices:
        capture = capture_gradients(
            model.model, torch.tensor([[1, 2]]), target_nll(0), matrices=matrix, layers=layer
        )
        both = (model.weights, model.biases)
        found = [own[matrix, layer].parameter for own in both if (matrix, layer) in own]
        expected = {model.names[id(parameter)] for parameter in found}
        if kind == "bridge-gpt2" and matrix in ATTENTION_MATRICES:
            # A bridge splits Hugging Face's c_attn, and has its own names for the results.
            name = f"transformer.h.{layer}.attn.{matrix[-1].lower()}"
            expected = {f"{name}.weight", f"{name}.bias"}
        assert set(capture.coverage.covered) == expected
        assert not expected & set(capture.coverage.not_covered)


@examples(2)
@given(data=st.data())
def test_validate_finds_no_error(kind: str, data: st.DataObject) -> None:
    model = tiny(data.draw(st.sampled_from(all_sizes(kind))))
    assert validate(model.model).passed


# -------------------------------------------------------------------- (b) a batch, prompt by prompt


@examples(4)
@given(data=st.data())
def test_a_batch_equals_its_prompts_one_by_one(kind: str, data: st.DataObject) -> None:
    question = data.draw(questions(kind, most=4))
    rtol = question.tiny.rtol
    batch = question.result()
    for prompt, row in enumerate(question.rows):
        alone = question.result([prompt])
        n = len(row)
        assert batch.capture.str_tokens[prompt] == alone.capture.str_tokens[0]
        assert_close(batch.capture.loss[prompt], alone.capture.loss[0], rtol, 1.0, "loss")
        scale = vjp_scale(alone.capture)
        for key, expected in alone.capture.gradients.items():
            found = batch.capture[key]
            for name in ("inputs", "vjps"):
                values = getattr(found, name)[prompt]
                assert (values[n:] == 0).all(), key
                one = getattr(expected, name)[0]
                assert_close(values[:n], one, rtol, scale if name == "vjps" else 0.0, key)
            assert_close(found.norms[prompt, :n], expected.norms[0], rtol, scale, key)
            assert found.is_zero[prompt, n:].all()
            assert_same_zeros(
                found.is_zero[prompt, :n], expected.is_zero[0], expected.norms[0], scale
            )
        if question.tiny.is_rounded:
            continue  # scores of a short vector depend on its last digits
        for matrix in batch.matrices:
            together, single = batch.readout(matrix), alone.readout(matrix)
            live = ~alone.is_zero(matrix)[:, 0]
            for name in ("top_scores", "bottom_scores"):
                values = getattr(together, name)[:, prompt, :n][live]
                torch.testing.assert_close(
                    values, getattr(single, name)[:, 0][live], rtol=1e-6, atol=1e-6
                )
            assert (together.target_rank[:, prompt, n:] == -1).all()
            assert (together.top_ids[:, prompt, n:] == -1).all()


# -------------------------------------------------------------------------- (c) requesting a subset


def one_or_all(indices: list[int]) -> int | list[int]:
    """A single index without its list."""
    return indices[0] if len(indices) == 1 else indices


@examples(5)
@given(data=st.data())
def test_a_subset_equals_the_subset_of_all(kind: str, data: st.DataObject) -> None:
    question = data.draw(questions(kind))
    model, sizes = question.tiny, question.tiny.sizes
    shortest = min(map(len, question.rows))
    matrices = data.draw(st.lists(st.sampled_from(model.matrices), min_size=1, max_size=4))
    layer = st.integers(-sizes.n_layers, sizes.n_layers - 1)
    layers = data.draw(st.lists(layer, min_size=1, max_size=4))
    position = st.integers(-shortest, shortest - 1)
    columns = data.draw(st.lists(position, min_size=1, max_size=4))
    full = question.result()
    part = question.result(
        matrices=matrices, layers=one_or_all(layers), positions=one_or_all(columns)
    )

    rows = sorted({index % sizes.n_layers for index in layers})
    assert part.layers == tuple(rows)
    assert part.matrices == tuple(name for name in full.matrices if name in matrices)
    expected = [[index % len(row) for index in columns] for row in question.rows]
    assert part.positions.tolist() == expected
    scale = vjp_scale(full.capture)
    for gradient in part.capture:
        key = gradient.matrix, gradient.layer
        assert_same_gradient(gradient, full.capture[key], model.rtol, scale)
    for matrix, row, prompt in itertools.product(
        part.matrices, range(len(rows)), range(len(question.rows))
    ):
        at = part.positions[prompt]
        norms = full.norms(matrix)[rows[row], prompt, at]
        assert_close(part.norms(matrix)[row, prompt], norms, model.rtol, scale, matrix)
        zero = full.is_zero(matrix)[rows[row], prompt, at]
        assert_same_zeros(part.is_zero(matrix)[row, prompt], zero, norms, scale)
        if not model.is_rounded:
            live = ~zero
            scores = part.readout(matrix).top_scores[row, prompt][live]
            wanted = full.readout(matrix).top_scores[rows[row], prompt, at][live]
            torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------- (d) rank, spectrum


def joined(dense: Tensor, matrix: str) -> Tensor:
    """Concatenate heads along the axis that they divide."""
    if dense.ndim == 2:
        return dense
    return torch.cat(list(dense), dim=1 if matrix in READING_MATRICES else 0)


@examples(3)
@given(data=st.data())
def test_rank_and_singular_values_match_the_dense_matrix(kind: str, data: st.DataObject) -> None:
    question = data.draw(questions(kind))
    for gradient in question.capture():
        for prompt, row in enumerate(question.rows):
            dense = joined(gradient.dense(prompt).double(), gradient.matrix).numpy()
            assert_spectrum(gradient, prompt, len(row), dense)


def assert_spectrum(gradient: MatrixGradient, prompt: int, n: int, dense: np.ndarray) -> None:
    values = gradient.singular_values(prompt)
    rank = gradient.rank(prompt)
    assert len(values) == min(n, *dense.shape)
    assert rank <= n
    expected = np.linalg.svd(dense, compute_uv=False)
    # If the factors are float32, the dense product is rounded to float32.
    eps = torch.finfo(gradient.inputs.dtype).eps
    slack = 1e2 * eps * max(expected.max(initial=0), spread(gradient, prompt))
    np.testing.assert_allclose(values.numpy(), expected[: len(values)], rtol=0, atol=slack)
    assert (expected[len(values) :] <= slack).all()
    assert rank >= (expected > 10 * slack).sum()
    if rank:  # every relevant value is above rounding in float64
        assert values[rank - 1] > 0


def spread(gradient: MatrixGradient, prompt: int) -> float:
    """The magnitude of the sum before cancellation."""
    x, delta = (
        factor[prompt].flatten(1).norm(dim=1) for factor in (gradient.inputs, gradient.vjps)
    )
    return float((x * delta).sum())


# ------------------------------------------------------------------------------------ (e) linearity


@examples(4)
@given(data=st.data(), a=st.integers(-30, 30), b=st.integers(-30, 30))
def test_the_gradient_is_linear_in_the_loss(kind: str, data: st.DataObject, a: int, b: int) -> None:
    question = data.draw(questions(kind))
    target = data.draw(st.integers(0, question.tiny.sizes.d_vocab - 1))
    a, b = a / 10, b / 10

    def first(logits: Tensor, tokens: Tensor) -> Tensor:
        return -logits[:, -1].log_softmax(-1)[:, target]

    def second(logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.stack(list(map(anything, logits, tokens)))

    def both(logits: Tensor, tokens: Tensor) -> Tensor:
        return a * first(logits, tokens) + b * second(logits, tokens)

    one, two, sum_of_both = (question.capture(objective=loss) for loss in (first, second, both))
    scale = abs(a) * vjp_scale(one) + abs(b) * vjp_scale(two)
    for gradient in sum_of_both:
        key = gradient.matrix, gradient.layer
        expected = a * one[key].vjps + b * two[key].vjps
        size = abs(a) * largest([one[key].vjps]) + abs(b) * largest([two[key].vjps])
        error = float((gradient.vjps - expected).norm())
        assert error <= question.tiny.rtol * (size + 1e-3 * scale), key
        assert torch.equal(gradient.inputs, one[key].inputs)
    assert_close(
        sum_of_both.loss, a * one.loss + b * two.loss, question.tiny.rtol, scale + 1, "loss"
    )


# -------------------------------------------------------------------------------------- (f) readout


class Recording:
    """A projection that records its arguments, and scores by fixed random directions.

    Scores are rounded, so that ties are common.
    """

    def __init__(self, d_vocab: int, digits: int = 0) -> None:
        self.d_vocab, self.digits = d_vocab, digits
        self.seen: list[tuple[int, Tensor]] = []

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.seen.append((layer, vectors.clone()))
        return self.scores(vectors, layer)

    def scores(self, vectors: Tensor, layer: int) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        shape = (vectors.shape[1], self.d_vocab)
        directions = torch.randn(shape, generator=generator, dtype=torch.float64)
        unit = nn.functional.normalize(vectors.double(), dim=-1)
        return (unit @ directions).round(decimals=self.digits)


def read_vectors_of(result: BackwardLensResult, matrix: str) -> Tensor:
    """The vectors of one matrix with the sign of `direction`, `[layer, batch, pos, d]`."""
    sign = -1 if matrix in WRITING_MATRICES and result.direction == "update" else 1
    vectors = []
    for layer in result.layers:
        gradient = result.capture[matrix, layer]
        factor = gradient.inputs if matrix in READING_MATRICES else gradient.vjps
        at = result.positions.clamp_min(0)[..., None].expand(-1, -1, factor.shape[-1])
        vectors.append(sign * factor.gather(1, at))
    return torch.stack(vectors)


@examples(4)
@given(data=st.data(), direction=st.sampled_from(["update", "gradient"]))
def test_ranks_and_tokens_of_any_projection_by_brute_force(
    kind: str, data: st.DataObject, direction: str
) -> None:
    """With ties: the rank counts strictly larger scores, and a token is listed once."""
    question = data.draw(questions(kind))
    sizes = question.tiny.sizes
    k = data.draw(st.integers(1, sizes.d_vocab))
    target = data.draw(st.integers(0, sizes.d_vocab - 1))
    lens = Recording(sizes.d_vocab)
    result = question.result(k=k, target=target, projection=lens, direction=direction)
    assert result.k == k
    for matrix in result.matrices:
        vectors = read_vectors_of(result, matrix)
        readout = result.readout(matrix)
        by_layer = zip(vectors, result.layers, strict=True)
        table = torch.stack([lens.scores(own.flatten(0, 1), layer) for own, layer in by_layer])
        listed_scores = table.reshape(*vectors.shape[:3], -1).tolist()
        for row, prompt, column in itertools.product(*map(range, vectors.shape[:3])):
            at = row, prompt, column
            if result.positions[prompt, column] < 0:
                assert int(result.target_rank(matrix)[at]) == -1
                continue
            scores = listed_scores[row][prompt][column]
            assert int(result.target_rank(matrix)[at]) == sum(s > scores[target] for s in scores)
            for name, ordered in (
                ("top", sorted(scores, reverse=True)),
                ("bottom", sorted(scores)),
            ):
                listed = getattr(readout, f"{name}_scores")[at].tolist()
                ids = getattr(readout, f"{name}_ids")[at].tolist()
                assert listed == ordered[:k]
                assert [scores[token] for token in ids] == listed
                assert len(set(ids)) == k


@examples(5)
@given(
    data=st.data(),
    direction=st.sampled_from(["update", "gradient"]),
    projection=st.sampled_from(["logit_lens", "normalized"]),
)
def test_the_logit_lens_matches_the_models_own_readout(
    kind: str, data: st.DataObject, direction: str, projection: str
) -> None:
    question = data.draw(questions(kind))
    model, sizes = question.tiny, question.tiny.sizes
    k = data.draw(st.integers(1, sizes.d_vocab))
    target = data.draw(st.integers(0, sizes.d_vocab - 1))
    result = question.result(k=k, target=target, projection=projection, direction=direction)
    # The same sums in another order; norms of short vectors magnify errors: 1e3 roundings.
    close = 1e-3 if model.is_rounded else 1e-9
    for matrix in result.matrices:
        vectors = read_vectors_of(result, matrix)
        if projection == "normalized":
            vectors = nn.functional.normalize(
                vectors, dim=-1, eps=1e-300 if vectors.dtype == torch.float64 else 1e-37
            )
        scores = model.scores(vectors)
        readout = result.readout(matrix)
        real = result.positions.expand(len(result.layers), -1, -1) >= 0
        ranks = result.target_rank(matrix)
        wanted = scores[..., target, None]
        assert (ranks[~real] == -1).all()
        assert ((scores > wanted + close).sum(-1) <= ranks)[real].all()
        assert ((scores > wanted - close).sum(-1) > ranks)[real].all()
        for name, largest_first in (("top", True), ("bottom", False)):
            ordered = scores.sort(-1, descending=largest_first).values[..., :k]
            listed = getattr(readout, f"{name}_scores").double()
            ids = getattr(readout, f"{name}_ids")
            torch.testing.assert_close(listed[real], ordered[real], rtol=0, atol=close)
            chosen = scores.gather(-1, ids.clamp_min(0))
            torch.testing.assert_close(chosen[real], ordered[real], rtol=0, atol=close)
            assert (ids[~real] == -1).all()
            assert listed[~real].isnan().all()


# ------------------------------------------------------------------------------------- (g) the file


def assert_same(found: Any, expected: Any, where: str = "result") -> None:
    """Equal in every field, bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=where)
    elif is_dataclass(expected):
        for field in fields(expected):
            name = f"{where}.{field.name}"
            assert_same(getattr(found, field.name), getattr(expected, field.name), name)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected, where


@examples(8)
@given(data=st.data())
def test_a_saved_result_is_loaded_bit_for_bit(data: st.DataObject) -> None:
    """For any request; files do not depend on the model class."""
    question = data.draw(questions("bridge-llama" if HAS_BRIDGE else "hooked-llama"))
    sizes = question.tiny.sizes
    shortest = min(map(len, question.rows))
    optional = {
        "layers": st.integers(0, sizes.n_layers - 1),
        "positions": st.lists(st.integers(-shortest, -1), min_size=1),
        "k": st.integers(1, sizes.d_vocab),
        "target": st.integers(0, sizes.d_vocab - 1),
        "matrices": st.sampled_from(["all", "mlp", "attn", *question.tiny.matrices]),
        "projection": st.sampled_from(["logit_lens", "normalized", Recording(sizes.d_vocab)]),
        "direction": st.sampled_from(["update", "gradient"]),
        "vjps_at": st.sampled_from(["matrix", "residual"]),
        "hook_points": st.sampled_from(["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"]),
    }
    result = question.result(**data.draw(st.fixed_dictionaries({}, optional=optional)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        result.save(path)
        loaded = BackwardLensResult.load(path)
        assert [file.name for file in path.parent.iterdir()] == ["result"]
    assert_same(loaded, result)
    # The tensors are equal bit for bit; norms over other strides are summed in another order.
    pd.testing.assert_frame_equal(loaded.to_df(), result.to_df(), rtol=1e-6)
    assert repr(loaded) == repr(result)


# --------------------------------------------------------------- (h) the algebra, without any model


@dataclass(frozen=True)
class Plain:
    """Factors as lists of outer products: for each prompt, `(part, x, delta)` per term.

    A part is a head or an expert, or `None` where there are none.
    """

    gradient: MatrixGradient
    n_parts: int | None
    terms: tuple[tuple[tuple[int, int | None, Tensor, Tensor], ...], ...]

    def dense(self, prompt: int) -> Tensor:
        """The sum of outer products of the paper's equation 8, one by one."""
        d_in, d_out = self.gradient.inputs.shape[-1], self.gradient.vjps.shape[-1]
        parts = torch.zeros(self.n_parts or 1, d_in, d_out, dtype=torch.float64)
        for _, part, x, delta in self.terms[prompt]:
            parts[part or 0] += x.double()[:, None] * delta.double()[None, :]
        return parts[0] if self.n_parts is None else parts


LAYOUTS: dict[str, tuple[str, ...]] = {
    "plain": ("W_in", "W_gate", "W_out"),
    "heads": ("W_Q", "W_K", "W_V", "W_O"),
    "both heads": ("W_Q", "W_K", "W_V", "W_O"),
    "experts": ("W_in", "W_gate"),
    "both slots": ("W_in", "W_gate", "W_out"),
}
"""Which factors are divided, and the matrices for which that is possible."""


@st.composite
def random_gradients(draw: st.DrawFn, layout: str) -> Plain:
    """Random factors of one layout, with zeros in them."""
    batch, longest = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = [draw(st.integers(1, longest)) for _ in range(batch)]
    d_in, d_out, parts = (draw(st.integers(1, 5)) for _ in range(3))
    matrix = draw(st.sampled_from(LAYOUTS[layout]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share_of_zeros = draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    slots = draw(st.integers(1, parts))

    def factor(width: int, is_divided: bool) -> Tensor:
        axes = {"experts": slots, "both slots": slots}.get(layout, parts)
        shape = (batch, longest, *(axes,) * is_divided, width)
        values = torch.randn(shape, generator=generator, dtype=dtype)
        kept = torch.rand(shape[:-1], generator=generator) >= share_of_zeros
        real = mask.reshape(*mask.shape, *(1,) * (len(shape) - 2))
        return values * kept[..., None] * real

    in_divided = layout in ("both heads", "both slots") or (layout == "heads" and matrix == "W_O")
    out_divided = layout != "plain" and not (layout == "heads" and matrix == "W_O")
    inputs, vjps = factor(d_in, in_divided), factor(d_out, out_divided)
    experts = None
    if layout in ("experts", "both slots"):
        scores = torch.rand(batch, longest, parts, generator=generator)
        experts = scores.argsort(-1)[..., :slots].masked_fill(~mask[..., None], -1)
    gradient = MatrixGradient(
        matrix,
        0,
        inputs,
        vjps,
        mask,
        experts=experts,
        n_experts=None if experts is None else parts,
    )
    terms = []
    for prompt, length in enumerate(lengths):
        own: list[tuple[int, int | None, Tensor, Tensor]] = []
        for position in range(length):
            if layout == "plain":
                own.append((position, None, inputs[prompt, position], vjps[prompt, position]))
                continue
            for index in range(slots if experts is not None else parts):
                x = inputs[prompt, position, index] if in_divided else inputs[prompt, position]
                delta = vjps[prompt, position, index] if out_divided else vjps[prompt, position]
                part = index if experts is None else int(experts[prompt, position, index])
                own.append((position, part, x, delta))
        terms.append(tuple(own))
    return Plain(gradient, None if layout == "plain" else parts, tuple(terms))


def close_to(found: Tensor, expected: Tensor, gradient: MatrixGradient) -> None:
    """Sums of few products of numbers around 1: a hundred roundings."""
    slack = 1e2 * torch.finfo(gradient.inputs.dtype).eps
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=slack, atol=slack)


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(15)
@given(data=st.data())
def test_the_algebra_of_the_factors(layout: str, data: st.DataObject) -> None:
    plain = data.draw(random_gradients(layout))
    gradient = plain.gradient
    for prompt, terms in enumerate(plain.terms):
        dense = plain.dense(prompt)
        close_to(gradient.dense(prompt), dense, gradient)
        assert_bias(plain, prompt)
        for position in range(gradient.mask.shape[1]):
            here = [(x, delta) for at, _, x, delta in terms if at == position]
            adds = any((x[:, None] * delta).any() for x, delta in here)
            assert bool(gradient.is_zero[prompt, position]) == (not adds)
            squares = sum(float(value) ** 2 for value in gradient.vjps[prompt, position].flatten())
            assert float(gradient.norms[prompt, position]) == pytest.approx(squares**0.5, rel=1e-5)
        if gradient.experts is None and 3 in (gradient.inputs.ndim, gradient.vjps.ndim):
            assert_whole(gradient, prompt, joined(dense, gradient.matrix))
        else:
            for ask in (gradient.factored, gradient.singular_values, gradient.rank):
                with pytest.raises(InputError, match=r"its own factors"):
                    ask(prompt)
        if plain.n_parts is None:
            continue
        for index in range(plain.n_parts):
            part = (gradient.head if gradient.experts is None else gradient.expert)(index)
            close_to(part.dense(prompt), dense[index], gradient)
            assert_whole(part, prompt, dense[index])
            assert part.n_heads is None
            if gradient.experts is not None:
                routed = {at for at, number, _, _ in terms if number == index}
                assert set(part.mask[prompt].nonzero()[:, 0].tolist()) == routed


def heads_write_differently(gradient: MatrixGradient) -> bool:
    is_writing = gradient.matrix in WRITING_MATRICES
    return is_writing and gradient.experts is None and gradient.vjps.ndim == 4


def assert_bias(plain: Plain, prompt: int) -> None:
    """Check the sum of VJPs of each head or expert that has separate VJPs."""
    gradient = plain.gradient
    if heads_write_differently(gradient):  # and the residual stream has one bias
        with pytest.raises(InputError, match=r"its own factors"):
            gradient.bias(prompt)
        return
    has_parts = gradient.vjps.ndim == 4 or gradient.experts is not None
    d_out = gradient.vjps.shape[-1]
    parts = torch.zeros(plain.n_parts if has_parts else 1, d_out, dtype=torch.float64)
    seen = set()
    for position, part, _, delta in plain.terms[prompt]:
        which = part if has_parts else 0
        if (position, which) not in seen:  # heads that share a VJP add it once
            parts[which] += delta.double()
        seen.add((position, which))
    close_to(gradient.bias(prompt), parts if has_parts else parts[0], gradient)


def assert_whole(gradient: MatrixGradient, prompt: int, dense: Tensor) -> None:
    """Compare all methods that treat a gradient as one matrix with that matrix."""
    factored = gradient.factored(prompt)
    n = int(gradient.mask[prompt].sum())
    assert factored.A.shape == (dense.shape[0], n)
    assert factored.B.shape == (n, dense.shape[1])
    close_to(factored.AB, dense, gradient)
    assert_spectrum(gradient, prompt, n, dense.numpy())
    assert gradient.rank(prompt) == numerical_rank(factored.A.double(), factored.B.double())
    neurons = dense.T if gradient.reads_residual else dense
    for index, neuron in enumerate(neurons):
        close_to(gradient.neuron(index, prompt), neuron, gradient)
    with pytest.raises(InputError, match=f"neuron {len(neurons)} does not exist"):
        gradient.neuron(len(neurons), prompt)


def numerical_rank(a: Tensor, b: Tensor) -> int:
    """numpy's rank of the product, formed in float64."""
    return int(np.linalg.matrix_rank((a @ b).numpy()))


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(10)
@given(data=st.data())
def test_the_spanning_set_is_the_side_of_the_stream(layout: str, data: st.DataObject) -> None:
    plain = data.draw(random_gradients(layout))
    gradient = plain.gradient
    factor = gradient.inputs if gradient.reads_residual else gradient.vjps
    if factor.ndim == 3:
        assert torch.equal(gradient.spanning_set, factor)
    elif gradient.experts is not None and not gradient.reads_residual:
        summed = torch.zeros_like(factor[:, :, 0])
        for slot in range(factor.shape[2]):
            summed = summed + factor[:, :, slot]
        close_to(gradient.spanning_set, summed, gradient)
    else:
        part = "head" if gradient.experts is None else "expert"
        with pytest.raises(InputError, match=rf"\.{part}\(index\)"):
            _ = gradient.spanning_set
    if gradient.reads_residual:
        with pytest.raises(InputError, match=gradient.matrix):
            _ = gradient.resid_vjps
    elif factor.ndim == 3:
        assert torch.equal(gradient.resid_vjps, factor)


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(8)
@given(data=st.data(), scale=st.sampled_from([-2.0, 0.5, 4.0]))
def test_the_algebra_is_bilinear(layout: str, data: st.DataObject, scale: float) -> None:
    """Powers of two scale without rounding."""
    plain = data.draw(random_gradients(layout))
    gradient = plain.gradient
    larger = replace(gradient, vjps=gradient.vjps * scale)
    assert torch.equal(larger.is_zero, gradient.is_zero)
    assert torch.equal(larger.norms, gradient.norms * abs(scale))
    for prompt in range(len(gradient.mask)):
        assert torch.equal(larger.dense(prompt), gradient.dense(prompt) * scale)
        if not heads_write_differently(gradient):
            assert torch.equal(larger.bias(prompt), gradient.bias(prompt) * scale)
