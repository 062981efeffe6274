"""Models that are easy to analyse wrongly: how the package treats each, in numbers."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, hf_model
from hypothesis import given
from hypothesis import strategies as st
from models import (
    HAS_BRIDGE,
    bridge_only,
    build,
    nll,
    randomise,
    relative_error,
    require_kind,
    small_tokenizer,
    training_loss,
)
from sampling import examples
from tokenizer_kinds import KINDS, tokenizer_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import backward_lens_tl as blt
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.editing.fact_contexts import sampled_prefixes
from backward_lens_tl.errors import (
    InputError,
    ModelNotFoundError,
    ModelStateError,
    UnsupportedModelError,
)
from backward_lens_tl.evaluation.scoring import Question, score
from backward_lens_tl.models import host_of, loading, logit_error, probe
from backward_lens_tl.models.unembedding import connected
from conftest import FACTS_FOLDER

D_VOCAB, N_HEADS = 97, 4
SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": N_HEADS,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "openai-gpt": {
        "num_key_value_heads": N_HEADS,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": N_HEADS,
        "n_positions": 64,
    },
}


def plain_model(architecture: str, attention: str = "eager", **settings: Any) -> Any:
    """A random Hugging Face model, with the same weights at every call."""
    if architecture in FAMILIES and not settings:
        return hf_model(architecture)
    config = AutoConfig.for_model(architecture, **SIZES | EXTRA.get(architecture, {}) | settings)
    for name in list(vars(config)):
        if "drop" in name or name.endswith("_pdrop"):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.architectures = [type(model).__name__]
    randomise(model)
    return model.float().eval()


def bridged(raw: Any, name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(raw), tokenizer=small_tokenizer(), device="cpu"
    ).eval()


def saved(raw: Any, folder: Path) -> Path:
    raw.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def some_tokens(n: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, D_VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- models from folders


@bridge_only
@pytest.mark.versions
@pytest.mark.parametrize("architecture", [*FAMILIES, *EXTRA])
def test_a_model_from_a_folder_is_the_plain_model(architecture: str, tmp_path: Path) -> None:
    raw = plain_model(architecture)
    model = blt.load_model(str(saved(raw, tmp_path)), "bridge")
    tokens = some_tokens()
    with torch.no_grad():
        expected = raw(tokens).logits
        other = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % D_VOCAB], 1)
        both = host_of(model).logits(torch.cat([tokens, other]))
    assert logit_error(both[:1], expected) < 1e-4
    assert logit_error(both[1, :-1], both[0, :-1]) < 1e-4
    report = blt.validate(model)
    assert report.causality_error is not None
    assert report.forward_error is not None
    assert report.causality_error < 1e-4
    assert report.forward_error < 1e-4
    assert report.plain_error is not None
    assert report.plain_error < 1e-4
    assert "those of the Hugging Face model" in repr(report)
    assert "logits before a token when the token changes" in repr(report)


@pytest.mark.versions
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["llama", "gemma-2", "my-model"])
def test_a_folders_name_does_not_choose_its_architecture(
    architecture: str, name: str, tmp_path: Path
) -> None:
    """TransformerLens takes a folder for a Llama if its path contains the word."""
    require_kind("hooked")
    usual = {"gpt2": {"n_inner": None}, "llama": {"head_dim": 6}}  # as HookedTransformer assumes
    raw = plain_model(architecture, **usual[architecture])
    folder = saved(raw, tmp_path / name)
    model: Any = blt.load_model(str(folder), "hooked")
    assert model.cfg.model_name == name
    assert model.cfg.tokenizer_name == str(folder)
    tokens = some_tokens()
    with torch.no_grad():
        assert logit_error(host_of(model).logits(tokens), raw(tokens).logits) < 1e-4


@pytest.mark.versions
def test_a_folder_without_an_unembedding_is_refused(tmp_path: Path) -> None:
    """transformers makes up the parameters that the files do not have."""
    raw = plain_model("llama")
    with pytest.raises(ModelNotFoundError, match=r"no weights for lm_head\.weight of the Llama"):
        blt.load_model(str(saved(raw.model, tmp_path / "untied")))
    with torch.no_grad():
        del raw.model.layers[1].mlp.down_proj.weight, raw.model.norm.weight
    with pytest.raises(ModelNotFoundError, match=r"no weights for lm_head\.weight and 2 others"):
        blt.load_model(str(saved(raw.model, tmp_path / "more")))


@bridge_only
@pytest.mark.versions
def test_a_tied_unembedding_need_not_be_in_the_folder(tmp_path: Path) -> None:
    tied = plain_model("llama", tie_word_embeddings=True)
    model = blt.load_model(str(saved(tied.model, tmp_path)), "bridge")
    tokens = some_tokens()
    with torch.no_grad():
        assert logit_error(host_of(model).logits(tokens), tied(tokens).logits) < 1e-4


@pytest.mark.versions
def test_sizes_that_hooked_transformer_does_not_read_are_refused(tmp_path: Path) -> None:
    require_kind("hooked")
    folder = saved(plain_model("gpt2", n_inner=52), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"cannot turn .*\[24, 52\].*kind='bridge'"):
        blt.load_model(str(folder), "hooked")


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_model_that_differs_from_the_plain_one_is_not_loaded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when TransformerLens omits a scale that the configuration requires."""
    require_kind(kind)
    folder = FACTS_FOLDER
    kinds = {"bridge": "_bridge_from_folder", "hooked": "_hooked_from_folder"}
    load = getattr(loading, kinds[kind])

    def changed(*args: Any) -> Any:
        model = load(*args)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".1." in name and "mlp" in name:
                    parameter.mul_(1.01)
        return model

    blt.load_model(str(folder), kind)
    monkeypatch.setattr(loading, kinds[kind], changed)
    with pytest.raises(
        UnsupportedModelError, match="differ from those of Hugging Face's own model"
    ):
        blt.load_model(str(folder), kind)


@bridge_only
@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_that_is_not_causal_is_refused(architecture: str) -> None:
    raw = plain_model(architecture, attention="sdpa")
    model = bridged(raw, architecture)
    tokens = some_tokens()
    with torch.no_grad():
        other = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % D_VOCAB], 1)
        first, second = model(torch.cat([tokens, other]))
    if logit_error(first[:-1], second[:-1]) < 1e-4:
        pytest.skip("the installed TransformerLens masks latent attention under sdpa, too")
    with pytest.raises(UnsupportedModelError, match=r"not causal.*attn_implementation='eager'"):
        blt.backward_lens(model, tokens, 5)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        blt.validate(model)


@bridge_only
def test_gpt1_is_causal_because_it_gets_no_mask() -> None:
    raw = plain_model("openai-gpt")
    model, tokens = bridged(raw, "openai-gpt"), some_tokens()
    capture = blt.capture_gradients(model, tokens, blt.target_nll(5))
    with torch.no_grad():
        expected = float(nll(5)(raw(tokens).logits, tokens))
    assert float(capture.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_any_model_that_attends_to_later_tokens_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(name, torch.float32).model
    kind = type(model.blocks[0].attn)
    before = kind.forward

    def ahead(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        own = found[0] if isinstance(found, tuple) else found
        own = own + 0.1 * own.mean(1, keepdim=True)
        return (own, *found[1:]) if isinstance(found, tuple) else own

    monkeypatch.setattr(kind, "forward", ahead)
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: value)
    with model.hooks(fwd_hooks=[hook]):
        # The caller's hooks would see probing tokens.
        assert probe(host_of(model)) is None
    with pytest.raises(UnsupportedModelError, match="not causal"):
        blt.capture_gradients(model, some_tokens(), blt.target_nll(5))
    with model.hooks(fwd_hooks=[hook]), pytest.raises(UnsupportedModelError, match="not causal"):
        blt.capture_gradients(model, some_tokens(), blt.target_nll(5))


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2", torch.float32).model
    host_of(model)
    passes: list[int] = []
    with monkeypatch.context() as patch:
        kind = type(host_of(model))
        before = kind.logits_of

        def counted(self: Any, tokens: Tensor, select: Any) -> Tensor:
            passes.append(1)
            return before(self, tokens, select)

        patch.setattr(kind, "logits_of", counted)
        for _ in range(3):
            host_of(model)
        assert not passes
        other = copy.deepcopy(model)
        host_of(other)
        assert passes


# ------------------------------------------------------------------------------------- the readout


@bridge_only
@pytest.mark.parametrize("architecture", ["modernbert-decoder", "nanochat"])
def test_a_readout_other_than_norm_and_unembedding_is_refused(architecture: str) -> None:
    try:
        raw = plain_model(architecture)
        model = bridged(raw, architecture)
    except (ValueError, KeyError, NotImplementedError) as reason:
        pytest.skip(f"not in the installed versions: {reason}")
    tokens = some_tokens()
    streams: list[Tensor] = []
    host = host_of(model)
    handle = host.unembedding.input.module.register_forward_pre_hook(
        lambda module, args: streams.append(args[0])
    )
    with torch.no_grad():
        logits = raw(tokens).logits[0]
        model(tokens)
        handle.remove()
        read = host.unembedding.logits(streams[0][0])
    if logit_error(read, logits) < 1e-4:
        found = blt.backward_lens(model, tokens, 5)
        assert found.target_rank("W_out").shape == (2, 1, 12)
        return
    with pytest.raises(UnsupportedModelError, match="does not read its last residual stream"):
        blt.backward_lens(model, tokens, 5)
    # The factors are still right.
    assert blt.capture_gradients(model, tokens, blt.target_nll(5))["W_out", 1].rank() == 1


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_a_readout_with_a_head_in_between_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(name, torch.float32).model
    kind = type(model.unembed)
    before = kind.forward
    turned = torch.eye(model.cfg.d_model) + 0.1 * torch.randn(
        model.cfg.d_model, model.cfg.d_model, generator=torch.Generator().manual_seed(0)
    )
    monkeypatch.setattr(kind, "forward", lambda self, x, *rest: before(self, x @ turned, *rest))
    with pytest.raises(UnsupportedModelError, match="Logit Lens would show wrong tokens"):
        blt.backward_lens(model, some_tokens(), 5)

    class Own:
        def project(self, vectors: Tensor, layer: int) -> Tensor:
            return vectors @ turned @ model.W_U

    found = blt.backward_lens(model, some_tokens(), 5, projection=Own())
    assert found.projection == "Own"


# ------------------------------------------------------ rotary angles that depend on the whole pass


def long_rope(**settings: Any) -> Any:
    width = 24 // N_HEADS // 2
    factors = {
        "rope_type": "longrope",
        "short_factor": [1.0] * width,
        "long_factor": [2.0, 5.0, 9.0][:width],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    }
    return plain_model(
        "phi3",
        original_max_position_embeddings=16,
        rope_parameters=factors,
        rope_scaling=factors,
        **settings,
    )


def dynamic_ntk() -> Any:
    factors = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return plain_model(
        "llama", rope_parameters=factors, rope_scaling=factors, max_position_embeddings=16
    )


@bridge_only
def test_prompts_on_both_sides_of_a_rotary_threshold() -> None:
    """Each prompt of a call has the same numbers as alone in plain transformers."""
    raw = long_rope()
    model = bridged(raw, "phi3")
    rows = [some_tokens(n, seed=n)[0].tolist() for n in (16, 30, 5, 17, 29, 6)]
    prompts = {
        "input_ids": [row + [0] * (30 - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (30 - len(row)) for row in rows],
    }
    found = blt.capture_gradients(model, prompts, blt.target_nll(5))
    weight = raw.model.layers[1].mlp.down_proj.weight
    for at, row in enumerate(rows):
        loss = nll(5)(raw(torch.tensor([row])).logits, torch.tensor([row]))
        [expected] = torch.autograd.grad(loss.sum(), [weight])
        assert float(found.loss[at]) == pytest.approx(float(loss), rel=1e-5)
        assert relative_error(found["W_out", 1].dense(at), expected.T) < 1e-5
    # Control: in one pass the short prompts would get the long prompts' angles.
    together = torch.tensor([rows[2] + [0] * 25])
    with torch.no_grad():
        wrong = float(nll(5)(raw(together).logits[:, :5], together[:, :5]))
    assert abs(wrong - float(found.loss[2])) > 1e-3


@functools.cache
def long_rope_of(kind: str) -> tuple[Any, Any]:
    """A model whose angles depend on the length of the pass, with a tokenizer of the given kind."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = tokenizer_of(kind)
    raw = long_rope(vocab_size=len(tokenizer))
    model = TransformerBridge.boot_transformers(
        "phi3", hf_model=copy.deepcopy(raw), tokenizer=tokenizer, device="cpu"
    )
    return model.eval(), raw


@bridge_only
@examples(20)
@given(
    kind=st.sampled_from(KINDS),
    words=st.lists(st.integers(1, 24), min_size=2, max_size=6),
    text=st.sampled_from(("Rome is ", "Zoë, ", "12 ", "Once upon a time ")),
)
def test_texts_of_any_length_have_their_own_angles(kind: str, words: list[int], text: str) -> None:
    model, raw = long_rope_of(kind)
    prompts = [(text * n).rstrip()[:60] for n in words]
    found = blt.capture_gradients(model, prompts, blt.target_nll(5), layers=-1, prepend_bos=False)
    for row, real, loss in zip(found.tokens, found.mask, found.loss, strict=True):
        ids = row[real][None]
        with torch.no_grad():
            assert float(loss) == pytest.approx(float(nll(5)(raw(ids).logits, ids)), rel=1e-4)


@bridge_only
def test_one_pass_over_both_sides_of_a_threshold_is_refused() -> None:
    model = bridged(long_rope(), "phi3")
    prompts = {"input_ids": [[5] * 30, [5] * 30], "attention_mask": [[1] * 30, [1] * 9 + [0] * 21]}
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: value)
    with model.hooks(fwd_hooks=[hook]), pytest.raises(InputError, match="in separate calls"):
        blt.capture_gradients(model, prompts, blt.target_nll(5))
    requests = [blt.editing.EditRequest(text, 5) for text in ("Paris", "Paris is in France " * 9)]
    assert blt.editing.GradientStep("sgd", lr=1.0)(model, requests).norm > 0


@bridge_only
def test_angles_that_depend_on_earlier_prompts_are_refused() -> None:
    raw = dynamic_ntk()
    model = bridged(raw, "llama")
    model.cfg.n_ctx = 64  # Hugging Face's limit is where scaling begins
    tokens = some_tokens(12)
    found = float(blt.capture_gradients(model, tokens, blt.target_nll(5)).loss)
    with torch.no_grad():
        assert found == pytest.approx(float(nll(5)(raw(tokens).logits, tokens)), rel=1e-5)
        raw(some_tokens(40))
        longer = some_tokens(20)
        after = raw(longer).logits
        raw(tokens)
        assert (
            float((raw(longer).logits - after).abs().max()) > 1e-3
        )  # it depends on earlier passes
    with pytest.raises(InputError, match="has 20 tokens, and this model's rotary angles"):
        blt.capture_gradients(model, longer, blt.target_nll(5))


# ----------------------------------------------------------------------- a bias of the unembedding


@pytest.mark.parametrize("name", ["hooked-gpt2", "bridge-phi"])
@pytest.mark.parametrize("value", [float("-inf"), -1e30, -1e4])
def test_an_unembedding_bias_that_hides_tokens(name: str, value: float) -> None:
    """As with a padded vocabulary; both lenses against a slow loop, vector by vector."""
    if name.startswith("hooked"):
        case = build(name)
        bias, hidden, model = case.model.b_U, list(range(90, 97)), case.model
    else:
        if not HAS_BRIDGE:
            pytest.skip("needs TransformerBridge")
        model = bridged(plain_model("phi"), "phi")
        bias, hidden = model.unembed.b_U, list(range(90, 97))
    with torch.no_grad():
        bias[hidden] = value
    tokens = some_tokens() % 90
    try:
        result = blt.backward_lens(model, tokens, 5, k=D_VOCAB)
        host = host_of(model)
        for lens, unit in (("logit_lens", False), ("normalized", True)):
            read = result.under(lens)
            for layer in range(2):
                for pos in range(12):
                    vector = -result.capture["W_out", layer].vjps[0, pos][None]
                    if not vector.any():
                        continue
                    with torch.no_grad():
                        scores = host.unembedding.logits(
                            vector / vector.norm() if unit else vector
                        )[0]
                    expected = int((scores > scores[5]).sum())
                    assert int(read.target_rank("W_out")[layer, 0, pos]) == expected
                    assert set(read.top_tokens("W_out", layer, pos, k=3)) == {
                        host.vocabulary.text(int(token)) for token in scores.topk(3).indices
                    }
        assert blt.validate(model, tokens).readout_error < 1e-4
        assert blt.validate(model).readout_error < 1e-4
    finally:
        with torch.no_grad():
            bias[hidden] = 0.0


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 0.0),
        ([1.0, float("-inf"), 4.0, 2.0], [1.0, float("-inf"), 4.0, 2.0], 0.0),
        ([1.0, -9.0, 4.0, 2.0], [1.0, float("-inf"), 4.0, 2.0], float("inf")),
        ([1.0, 2.0, 3.5, 0.0], [1.0, 2.0, 3.0, 0.0], 0.5 / 1.4826),
    ],
)
def test_error_of_logits(found: list[float], expected: list[float], error: float) -> None:
    seen = logit_error(torch.tensor(found), torch.tensor(expected))
    assert seen == pytest.approx(error, rel=1e-5)


def test_error_of_logits_propagates_nan() -> None:
    assert logit_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) != 0


# ----------------------------------------------------------------------------------- faint vectors


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-llama", "bridge-gpt2", "hooked-gpt2"])
def test_faint_only_where_the_two_lenses_can_differ(name: str) -> None:
    model: Any = build(name).model
    result = blt.backward_lens(model, some_tokens(), 5, k=5)
    tiny = result.capture["W_out", 0].vjps[0] * 1e-9
    host = host_of(model)
    with torch.no_grad():
        raw, unit = (
            host.unembedding.logits(each) for each in (tiny, tiny / tiny.norm(dim=-1, keepdim=True))
        )
    differ = not torch.equal(raw.argsort(-1)[:, -5:], unit.argsort(-1)[:, -5:])
    has_bias = name.endswith("gpt2") or bool(model.b_U.any())  # RMSNorm has none
    assert differ is has_bias
    assert (result.faint_norm > 0) is differ
    if not differ:
        assert not result.to_df()["is_faint"].any()
        assert "italics" not in repr(result)


def test_a_bias_of_the_unembedding_makes_short_vectors_faint() -> None:
    if not HAS_BRIDGE:
        pytest.skip("needs TransformerBridge")
    host = host_of(bridged(plain_model("llama"), "llama"))
    assert host.unembedding.faint_norm == 0
    host = host_of(bridged(plain_model("phi"), "phi"))
    assert host.unembedding.faint_norm > 0


# ---------------------------------------------------------------------------------- several prompts


@pytest.mark.parametrize("method", ["dense", "factored", "bias", "rank", "singular_values"])
def test_a_prompt_must_be_chosen_if_there_are_several(method: str) -> None:
    model: Any = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2").model
    tokens = torch.cat([some_tokens(seed=0), some_tokens(seed=1)])
    gradient = blt.capture_gradients(model, tokens, blt.target_nll(5))["W_out", 0]
    with pytest.raises(InputError, match=r"there are 2 prompts.*gradient\.total\(\)"):
        getattr(gradient, method)()
    getattr(gradient, method)(batch=1)
    alone = blt.capture_gradients(model, tokens[1:], blt.target_nll(5))["W_out", 0]
    torch.testing.assert_close(gradient.dense(1), alone.dense())


def test_the_sum_in_the_message_is_the_gradient_of_the_summed_loss() -> None:
    case = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2")
    tokens = torch.cat([some_tokens(seed=0), some_tokens(seed=1)])
    gradient = blt.capture_gradients(case.model, tokens, blt.target_nll(5))["W_out", 0]
    total = sum(gradient.dense(batch) for batch in range(len(gradient.mask)))
    assert isinstance(total, Tensor)
    expected = case.weight_gradients(tokens, nll(5))["W_out", 0]
    assert relative_error(total, expected) < 1e-10


# ----------------------------------------------------------------------------------- LoRA adapters


def with_lora(raw: Any, targets: list[str], **settings: Any) -> Any:
    """The model inside PEFT, with a nonzero adapter."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings)
    adapted = peft.get_peft_model(copy.deepcopy(raw), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


@bridge_only
def test_an_unmerged_adapter_is_analysed_like_the_merged_model() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    raw, tokens = plain_model("llama"), some_tokens()
    adapted = with_lora(raw, LLAMA_LINEARS)
    with torch.no_grad():
        expected_logits = adapted(tokens).logits
    merged = bridged(copy.deepcopy(adapted).merge_and_unload(), "llama")
    model = TransformerBridge.boot_transformers(
        "llama", hf_model=adapted.get_base_model(), tokenizer=small_tokenizer(), device="cpu"
    ).eval()
    with torch.no_grad():
        assert logit_error(model(tokens), expected_logits) < 1e-5
    plain = blt.capture_gradients(bridged(raw, "llama"), tokens, blt.target_nll(5), matrices="all")
    found, expected = (
        blt.capture_gradients(each, tokens, blt.target_nll(5), matrices="all")
        for each in (model, merged)
    )
    for own, wanted, without in zip(found, expected, plain, strict=True):
        assert relative_error(own.inputs, wanted.inputs) < 1e-5
        assert relative_error(own.vjps, wanted.vjps) < 1e-5
        assert relative_error(without.vjps, wanted.vjps) > 1e-2  # the adapter has an effect
    assert blt.validate(model, tokens).passed
    read, wanted_read = (blt.backward_lens(each, tokens, 5) for each in (model, merged))
    assert torch.equal(read.target_rank("W_out"), wanted_read.target_rank("W_out"))
    # An edit adds to the effective weight.
    edit = blt.editing.GradientStep("sgd", lr=0.1, layers=1)
    request = blt.editing.EditRequest("Paris is", 5)
    changes = edit(model, request).applied(model), edit(merged, request).applied(merged)
    with changes[0], changes[1], torch.no_grad():
        assert logit_error(model(tokens), merged(tokens)) < 1e-4


@bridge_only
def test_dora_adapters_are_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    adapted = with_lora(plain_model("llama"), ["down_proj"], use_dora=True)
    model = TransformerBridge.boot_transformers(
        "llama", hf_model=adapted.get_base_model(), tokenizer=small_tokenizer(), device="cpu"
    ).eval()
    with pytest.raises(UnsupportedModelError, match=r"W_out of layer 0.*PEFT.*merge_and_unload"):
        blt.backward_lens(model, some_tokens(), 5)
    assert blt.backward_lens(model, some_tokens(), 5, matrices="attn").target() is not None


@bridge_only
def test_an_adapter_on_a_fused_projection_is_refused() -> None:
    """A bridge splits the base weight of a fused projection and drops the adapter."""
    from transformer_lens.model_bridge import TransformerBridge

    adapted = with_lora(plain_model("gpt2"), ["c_attn"], fan_in_fan_out=True)
    tokens = some_tokens()
    with torch.no_grad():
        expected = adapted(tokens).logits
    try:
        model = TransformerBridge.boot_transformers(
            "gpt2", hf_model=adapted.get_base_model(), tokenizer=small_tokenizer(), device="cpu"
        ).eval()
    except Exception:
        return  # refused by TransformerLens
    with torch.no_grad():
        if logit_error(model(tokens), expected) < 1e-4:
            assert blt.validate(model, tokens, matrices="mlp").passed
            return
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        blt.backward_lens(model, tokens, 5)


# ------------------------------------------------------------- objects that are not models, and BOS


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", r"model is the str 'gpt2'.*: load_model\('gpt2'\)"),
        (Path("some/folder"), r"model is the PosixPath 'some/folder'.*load_model"),
        ({"a": 1}, r"model is a dict.*such as load_model\(name\) returns"),
        (nn.Linear(2, 2), r"model is a Linear.*boot_transformers\(name, hf_model=model"),
    ],
)
def test_an_object_that_is_not_a_model_is_refused_with_the_remedy(
    model: Any, message: str, as_for_a_user: None
) -> None:
    with pytest.raises(InputError, match=message):
        blt.backward_lens(model, "Paris")


def test_a_peft_model_is_refused_with_the_way_to_a_bridge() -> None:
    adapted = with_lora(plain_model("llama"), ["down_proj"])
    with pytest.raises(InputError, match=r"hf_model=model\.get_base_model\(\)"):
        blt.backward_lens(adapted, "Paris")


@bridge_only
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_model_in_two_bridges_is_refused(architecture: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    raw = plain_model(architecture)
    first, second = (
        TransformerBridge.boot_transformers(
            architecture, hf_model=raw, tokenizer=small_tokenizer(), device="cpu"
        )
        for _ in range(2)
    )
    with pytest.raises(UnsupportedModelError, match="for each"):
        blt.backward_lens(second, some_tokens(), 5)
    if architecture == "gpt2":
        with pytest.raises(UnsupportedModelError, match="for each"):
            blt.backward_lens(first, some_tokens(), 5)


@bridge_only
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused_in_train_mode(reentrant: bool) -> None:
    raw = plain_model("llama")
    raw.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model, tokens = bridged(raw, "llama"), some_tokens()
    expected = blt.backward_lens(model, tokens, 5)
    model.original_model.train()
    with pytest.raises(ModelStateError, match=r"checkpointing is on .*call model\.eval\(\)"):
        blt.backward_lens(model, tokens, 5)
    model.original_model.gradient_checkpointing_disable()
    found = blt.backward_lens(model, tokens, 5)
    assert torch.equal(found.target_rank("W_out"), expected.target_rank("W_out"))


def test_saved_files_have_the_mode_of_the_umask(facts_model: Any, tmp_path: Path) -> None:
    result = blt.backward_lens(facts_model, "Rome is in", layers=-1)
    before = os.umask(0o027)
    try:
        result.save(tmp_path / "result.safetensors")
        result.save_html(tmp_path / "page.html")
        (tmp_path / "shared.safetensors").touch(0o600)
        result.save(tmp_path / "shared.safetensors")  # an existing file keeps its mode
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert modes == {
        "result.safetensors": "0o640",
        "page.html": "0o640",
        "shared.safetensors": "0o600",
    }


def test_a_vocabulary_smaller_than_k_is_shown_whole() -> None:
    if not HAS_BRIDGE:
        pytest.skip("needs TransformerBridge")
    model = bridged(plain_model("llama", vocab_size=5), "llama")
    result = blt.backward_lens(model, torch.tensor([[0, 1, 2, 3]]), 4)
    assert result.readout("W_out").top_ids.shape[-1] == 5
    assert sorted(result.readout("W_out").top_ids[0, 0, 0].tolist()) == list(range(5))


def test_ranks_do_not_underflow_like_probabilities() -> None:
    """The authors rank float32 probabilities, many of which underflow to zero and tie."""

    class Wide:
        def project(self, vectors: Tensor, layer: int) -> Tensor:
            return torch.arange(97.0).mul(10).expand(len(vectors), -1)

    model: Any = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2", torch.float32).model
    result = blt.backward_lens(model, some_tokens(), 40, projection=Wide())
    assert (result.target_rank("W_out") == 56).all()  # 41 to 96 are larger
    probabilities = (torch.arange(97.0) * 10).softmax(0)
    assert int((probabilities > probabilities[40]).sum()) == 11  # control: the others are 0


@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_a_method_edits_prompts_as_they_are_scored(
    prepend_bos: bool | None, facts_model: Any, tmp_path: Path
) -> None:
    config = blt.EvaluationConfig(
        rows=(0,), generation_length=0, n_texts=0, prepend_bos=prepend_bos
    )
    step = blt.editing.GradientStep("sgd", lr=0.1, layers=5)
    found = blt.evaluate(
        facts_model, "facts", tmp_path / "own", {"step": step}, config, progress=False
    )
    record = blt.read_records("facts").rows[0]
    by_hand = blt.editing.GradientStep("sgd", lr=0.1, layers=5, prepend_bos=prepend_bos)
    delta = by_hand(facts_model, blt.editing.EditRequest.of(record))
    assert float(found.edits()["norm"][1]) == pytest.approx(float(delta.norm), rel=1e-5)
    for other in {True, False, None} - {prepend_bos, None}:
        chosen = blt.editing.GradientStep("sgd", lr=0.1, layers=5, prepend_bos=other)
        with pytest.raises(blt.BackwardLensError, match=f"edits with prepend_bos={other}"):
            blt.evaluate(
                facts_model, "facts", tmp_path / "x", {"step": chosen}, config, progress=False
            )


# -------------------------------------------------------------------------- a single read position


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_a_single_prompt_is_as_precise_as_a_batch(name: str) -> None:
    """One row over a large vocabulary, compared with the same model in float64."""
    architecture = name.split("-")[1]
    if name.startswith("bridge") and not HAS_BRIDGE:
        pytest.skip("needs TransformerBridge")
    if name.startswith("bridge"):
        model = bridged(plain_model("llama", vocab_size=49_152), architecture)
    else:
        model = build(name, torch.float32, d_vocab=49_152).model
    tokens = some_tokens()
    exact = copy.deepcopy(model).to(torch.float64)
    expected = blt.capture_gradients(exact, tokens, blt.target_nll(5))
    for rows in (1, 2, 3, 5):
        found = blt.capture_gradients(model, tokens.expand(rows, -1), blt.target_nll(5))
        errors = [
            relative_error(one.vjps[:1], other.vjps)
            for one, other in zip(found, expected, strict=True)
        ]
        assert max(errors) < 3e-6, rows


def test_prompts_with_few_tokens() -> None:
    """The training loss reads all positions, two or three in a short prompt."""
    case = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2")
    for n in (2, 3, 4):
        tokens = some_tokens(n)
        found = blt.capture_gradients(case.model, tokens, blt.next_token_loss())
        expected = case.weight_gradients(tokens, training_loss)
        for key in (("W_in", 0), ("W_out", 1)):
            assert relative_error(found[key].dense(), expected[key]) < 1e-10


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_vjp_of_the_unembedding_keeps_its_digits(
    rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Compare with float64 where a confident answer leaves small differences of large numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.04 * torch.randn(64, 50_001, generator=generator, dtype=torch.float64) + 0.1
    vectors = torch.randn(*rows, 64, generator=generator, dtype=torch.float64)
    upstream = torch.randn(*rows, 50_001, generator=generator, dtype=torch.float64).exp()
    upstream -= upstream.mean(-1, keepdim=True)
    own = vectors.to(dtype).requires_grad_()
    logits = connected(own, own.detach() @ weight.to(dtype), weight.to(dtype))
    assert torch.equal(logits, own.detach() @ weight.to(dtype))
    [found] = torch.autograd.grad(logits, own, upstream.to(dtype))
    expected = upstream.to(dtype).double() @ weight.to(dtype).double().T
    assert found.shape == own.shape
    assert relative_error(found, expected) < (2e-6 if dtype == torch.float32 else 1e-12)


_SOME = [i if i % 9 == 0 else pytest.param(i, marks=pytest.mark.slow) for i in range(100)]


@pytest.mark.parametrize("index", _SOME)
def test_no_false_alarm_on_the_models_own_answers(index: int, facts_model: Any) -> None:
    record = blt.read_records("facts").rows[index]
    report = blt.validate(facts_model, record.prompt, objective=blt.target_nll())
    assert report.passed


# ----------------------------------------------------------------- other modules at the unembedding


@bridge_only
def test_an_adapter_at_the_unembedding_is_not_lost() -> None:
    """Factors are autograd's through the adapter; the Logit Lens is refused."""
    from transformer_lens.model_bridge import TransformerBridge

    adapted = with_lora(plain_model("llama"), ["down_proj", "lm_head"])
    tokens, weight = some_tokens(), adapted.get_base_model().model.layers[1].mlp.down_proj
    weight.base_layer.weight.requires_grad_(True)
    loss = nll(5)(adapted(tokens).logits, tokens).sum()
    [expected] = torch.autograd.grad(loss, [weight.base_layer.weight])
    model = TransformerBridge.boot_transformers(
        "llama", hf_model=adapted.get_base_model(), tokenizer=small_tokenizer(), device="cpu"
    ).eval()
    found = blt.capture_gradients(model, tokens, blt.target_nll(5))
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert relative_error(found["W_out", 1].dense(), expected.T) < 1e-5
    with pytest.raises(UnsupportedModelError, match="does not read its last residual stream"):
        blt.backward_lens(model, tokens, 5)


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_a_vjp_that_differs_from_the_models_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(name, torch.float32).model

    def wrong(vectors: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        return connected(vectors, logits, weight.flip(1))

    for place in ("transformer_bridge", "hooked_transformer"):
        monkeypatch.setattr(f"backward_lens_tl.models.{place}.connected", wrong)
    with pytest.raises(UnsupportedModelError, match=r"gradients by .* of their size"):
        blt.capture_gradients(model, some_tokens(), blt.target_nll(5))


def test_a_readout_that_is_replaced_later_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("bridge-llama" if HAS_BRIDGE else "hooked-llama", torch.float32).model
    blt.backward_lens(model, some_tokens(), 5)
    kind = type(model.unembed)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *rest: before(self, x.flip(-1), *rest))
    with pytest.raises(UnsupportedModelError, match="does not read its last residual stream"):
        blt.backward_lens(model, some_tokens(), 5)


@bridge_only
@pytest.mark.parametrize("value", [-1e4, -65504.0, -1e6])
def test_a_large_finite_bias_causes_no_false_alarm(value: float) -> None:
    raw = plain_model("phi", vocab_size=8000, hidden_size=128)
    with torch.no_grad():
        raw.lm_head.bias[-500:] = value
    model = bridged(raw, "phi")
    assert blt.backward_lens(model, some_tokens(), 5).target() is not None
    assert blt.validate(model, some_tokens(), matrices="mlp").passed


def test_a_vocabulary_with_mostly_equal_logits() -> None:
    case = build("hooked-gpt2" if not HAS_BRIDGE else "bridge-gpt2", torch.float32)
    with torch.no_grad():
        case.model.W_U[:, 20:] = 0
        case.model.b_U[20:] = 0
    assert blt.backward_lens(case.model, some_tokens(), 5).target() is not None


@bridge_only
def test_evaluation_sampling_and_moments_across_a_rotary_threshold() -> None:
    raw = long_rope()
    model = bridged(raw, "phi3")
    host = host_of(model)
    short, long = some_tokens(8)[0].tolist(), some_tokens(24, seed=1)[0].tolist()
    questions = [Question(tuple(short), (5,)), Question(tuple(long), (6,))]
    together = score(host, questions, 8)
    for question, found in zip(questions, together, strict=True):
        ids = torch.tensor([question.prompt])
        with torch.no_grad():
            expected = float(nll(question.answer[0])(raw(ids).logits, ids))
        assert found.nll == pytest.approx(expected, rel=1e-4)
    options: dict[str, Any] = {"top_k": 1}
    both = sample(host, [short, long], [12, 4], seeds=[0, 1], **options)
    alone = [
        sample(host, [row], [n], seeds=[0], **options)[0] for row, n in ((short, 12), (long, 4))
    ]
    assert both == alone  # the short one crosses the threshold
    texts = ["Paris is", "Rome is in Italy and Paris is not in Italy and Rome is old"]
    whole = blt.editing.second_moments(model, texts, progress=False)
    each = [blt.editing.second_moments(model, [text], progress=False) for text in texts]
    mean = sum(own.of(1) * own.n_tokens for own in each) / whole.n_tokens
    assert isinstance(mean, Tensor)
    assert relative_error(whole.of(1), mean) < 1e-5


def test_answers_without_an_embedding_are_refused() -> None:
    """As when the unembedding is padded and the embedding is not."""
    case = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2")
    with pytest.raises(InputError, match=r"token id 97 \(answer included\)"):
        pad_prompts(host_of(case.model), [[1, 2], [3, 97]])


@bridge_only
@pytest.mark.slow
def test_a_bos_outside_the_embedding_is_not_prepended_to_prefixes() -> None:
    model = bridged(plain_model("llama"), "llama")
    model.tokenizer.add_special_tokens({"bos_token": "<new>"})
    assert model.tokenizer.bos_token_id >= D_VOCAB
    prefixes = sampled_prefixes(host_of(model), ("", ""), (4, 5), seed=0)
    assert all(prefix.endswith(". ") for prefix in prefixes)


def test_a_method_that_is_not_a_dataclass_is_evaluated(facts_model: Any, tmp_path: Path) -> None:
    class Nothing(blt.editing.EditMethod):
        prepend_bos = False

        def compute(self, host: Any, requests: Any) -> list[Any]:
            return list(blt.editing.GradientStep("sgd", lr=0.1, layers=5).compute(host, requests))

        def settings(self) -> dict[str, Any]:
            return {"method": "Nothing"}

    config = blt.EvaluationConfig(rows=(0,), generation_length=0, n_texts=0)
    found = blt.evaluate(facts_model, "facts", tmp_path, {"x": Nothing()}, config, progress=False)
    assert found.edits()["error"].isna().all()
