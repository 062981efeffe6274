"""Prompts divided into passes by length give the same results as one pass and as single runs.

With a caller's hook everything runs in one pass, so a no-op hook is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest
import torch
from architectures import NotAvailable, build_model
from hypothesis import given
from hypothesis import strategies as st
from models import (
    D_VOCAB,
    HAS_BRIDGE,
    Case,
    build,
    hooked_only,
    nll,
    training_loss,
)
from recorded_passes import (
    ALIKE,
    CLOSE,
    CLOSE_IN_FLOAT32,
    PROMPTS,
    TARGETS,
    assert_equal,
    has_much_padding,
    in_one_pass,
    noop,
    read_values,
    record_forward,
    values,
)
from sampling import examples
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import backward_lens_tl as blt
from backward_lens_tl.capture.batching import length_buckets
from backward_lens_tl.capture.bound_objectives import BoundObjective
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import (
    Objective,
    logit_difference,
    next_token_loss,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models.sites import READING_MATRICES

pytestmark = pytest.mark.usefixtures("as_for_a_user", "not_probed")

LENGTHS = [5, 17, 2, 4]
SHAPES = [(1, 17), (2, 5), (1, 2)]

MOE_NAMES = ("bridge-mixtral", "hooked-mixtral")

Shapes = list[tuple[int, ...]]


# --------------------------------------------------------------------------------- what is compared


def of_prompt(whole: Mapping[str, Tensor], prompt: int) -> dict[str, Tensor]:
    return {name: value[prompt] for name, value in whole.items()}


def padded(alone: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """One prompt's values as in a batch of longer prompts: padded with zeros."""
    found = {}
    for name, value in alone.items():
        shape = list(value.shape)
        kind = name.rpartition(" ")[2]
        fill: float | bool = 0
        if kind in ("experts", "top_ids", "bottom_ids", "target_rank", "positions", "targets"):
            fill = -1
        elif kind in ("top_scores", "bottom_scores"):
            fill = torch.nan
        elif kind == "is_zero":
            fill = True
        if name.startswith("pos "):
            shape[0] = length
            found[name] = value.new_full(shape, fill)
            found[name][: len(value)] = value
        elif name.startswith("query key "):
            shape[1:] = [length, length]
            found[name] = value.new_zeros(shape)
            found[name][:, : value.shape[1], : value.shape[2]] = value
        else:
            found[name] = value
    return found


def close_for(case: Case) -> dict[str, Any]:
    return CLOSE_IN_FLOAT32 if case.logits_in_float32 else CLOSE


# --------------------------------------------------------------------------------- observing passes


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens of every forward pass."""
    seen: list[Tensor] = []
    record_forward(monkeypatch, lambda tokens: seen.append(tokens.clone()))
    return seen


def shapes_of(passes: list[Tensor]) -> Shapes:
    """Number of prompts and length of every pass so far; the record is then cleared."""
    found = [tuple(tokens.shape) for tokens in passes]
    passes.clear()
    return found


@contextmanager
def unembedded() -> Iterator[list[int]]:
    """Number of vectors in each product with the unembedding."""
    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            is_product = func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
            # No other dimension of these models equals the vocabulary size.
            if is_product and D_VOCAB in found.shape:
                rows.append(found.numel() // D_VOCAB)
            return found

    mode: Callable[[], AbstractContextManager[object]] = Watch
    with mode():
        yield rows


def mixture(name: str) -> Any:
    kind, _, family = name.partition("-")
    try:
        return build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(
    scope="module",
    params=[
        "bridge-gemma2",
        "hooked-llama",
        "hooked-no_norm",
        *MOE_NAMES,
        pytest.param("bridge-gpt2", marks=pytest.mark.slow),
        pytest.param("bridge-neox", marks=pytest.mark.slow),
    ],
)
def any_model(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """Models of many kinds, mixtures of experts too, and their precision."""
    if request.param in MOE_NAMES:
        # Mixtral has in both classes an RMS norm that rounds to float32.
        return mixture(request.param), CLOSE_IN_FLOAT32
    case = build(request.param)
    return case.model, close_for(case)


@pytest.fixture(scope="module", params=("bridge-llama", "hooked-llama"))
def own_llama(request: pytest.FixtureRequest) -> Case:
    """A gated model that only this file uses."""
    return build(request.param)


@pytest.fixture(scope="module", params=("bridge-gpt2", "hooked-gpt2"))
def own_gpt2(request: pytest.FixtureRequest) -> Case:
    """A dense model that only this file uses."""
    return build(request.param)


# ------------------------------------------------------------------------------------ the division


lengths_of_prompts = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 1024)), min_size=1, max_size=30
)


@given(lengths_of_prompts)
@examples(150)
def test_buckets_are_as_few_as_the_padding_limit_allows(lengths: list[int]) -> None:
    """Every prompt is in exactly one bucket; no two adjacent buckets could be merged."""
    buckets = length_buckets(lengths)
    assert sorted(prompt for bucket in buckets for prompt in bucket) == list(range(len(lengths)))
    within = [[lengths[prompt] for prompt in bucket] for bucket in buckets]
    assert not any(map(has_much_padding, within))
    for length in set(lengths):
        assert sum(length in own for own in within) == 1
    if len(set(lengths)) == 1:
        assert buckets == [tuple(range(len(lengths)))]
    assert all(has_much_padding(a + b) for a, b in pairwise(sorted(within, key=max)))


def test_the_limit_of_padding_itself_is_allowed() -> None:
    assert length_buckets([6, 4, 5]) == [(0, 1, 2)]  # 3 of 15
    assert length_buckets([12, 8, 8, 12]) == [(0, 1, 2, 3)]  # 8 of 40
    assert length_buckets([12, 7, 8, 12]) == [(0, 2, 3), (1,)]  # 9 of 39


# ------------------------------------------------------------------------- forward passes, values


def test_the_model_runs_once_per_bucket(own_gpt2: Case, passes: list[Tensor]) -> None:
    """The second call too: bridges register their own hooks in their first forward pass."""
    model = own_gpt2.model
    for _ in range(2):
        capture = capture_gradients(model, PROMPTS, target_nll(TARGETS), prepend_bos=True)
        rows = [(len(run), row.tolist()) for run in passes for row in run]
        assert shapes_of(passes) == SHAPES
        assert capture.mask.sum(1).tolist() == LENGTHS
        for tokens, mask in zip(capture.tokens, capture.mask, strict=True):
            length = int(mask.sum())
            own = tokens[mask].tolist()
            assert [row[:length] for _, row in rows].count(own) == 1


def test_prompts_of_equal_length_share_one_pass(own_gpt2: Case, passes: list[Tensor]) -> None:
    capture_gradients(own_gpt2.model, ALIKE, target_nll(5))
    assert shapes_of(passes) == [(3, 10)]


@pytest.mark.versions
def test_several_passes_equal_one_and_each_prompt_alone(
    any_model: Any, passes: list[Tensor]
) -> None:
    model, close = any_model
    options: dict[str, Any] = {"matrices": "all", "prepend_bos": True}
    found = values(capture_gradients(model, PROMPTS, target_nll(TARGETS), **options))
    assert shapes_of(passes) == SHAPES
    with in_one_pass(model):
        one = capture_gradients(model, PROMPTS, target_nll(TARGETS), **options)
    assert shapes_of(passes) == [(4, 17)]
    assert_equal(found, values(one), close)
    for prompt, (text, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        alone = values(capture_gradients(model, text, target_nll(target), **options))
        assert_equal(of_prompt(found, prompt), padded(of_prompt(alone, 0), 17), close)


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "the model's own answer": target_nll,
    "logit_difference": lambda: logit_difference(TARGETS, [5, 6, 7, 8]),
    "sequence_nll": lambda: sequence_nll([" river runs", " Paris", ". Rome is in", " is"]),
    "next_token_loss": next_token_loss,
    "a callable": lambda: nll(5),
}


@pytest.mark.parametrize(
    "own_llama", [f"{'bridge' if HAS_BRIDGE else 'hooked'}-llama"], indirect=True
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_objective(own_llama: Case, objective: str, passes: list[Tensor]) -> None:
    model, made = own_llama.model, OBJECTIVES[objective]()
    found = capture_gradients(model, PROMPTS, made, prepend_bos=True)
    assert len(shapes_of(passes)) == 3
    with in_one_pass(model):
        expected = capture_gradients(model, PROMPTS, made, prepend_bos=True)
    assert len(shapes_of(passes)) == 1
    assert found.objective == expected.objective
    assert found.str_tokens == expected.str_tokens
    assert_equal(values(found), values(expected), close_for(own_llama))


def test_ranks_do_not_depend_on_the_division(own_gpt2: Case) -> None:
    model = own_gpt2.model
    found = capture_gradients(model, PROMPTS, target_nll(TARGETS))
    with in_one_pass(model):
        expected = capture_gradients(model, PROMPTS, target_nll(TARGETS))
    for gradient in expected:
        here = found[gradient.matrix, gradient.layer]
        for prompt in range(4):
            assert here.rank(prompt) == gradient.rank(prompt)
            torch.testing.assert_close(
                here.singular_values(prompt), gradient.singular_values(prompt), **CLOSE
            )


RESULT_OPTIONS: dict[str, dict[str, Any]] = {
    "last position": {"positions": -1, "projection": "normalized", "direction": "gradient"},
    "own answer": {"target": None, "positions": [-1, 0], "vjps_at": "residual", "layers": [0, 2]},
    "target with an objective": {"objective": next_token_loss()},
}


def test_decoding_does_not_depend_on_the_division(passes: list[Tensor]) -> None:
    case = build("bridge-gemma2" if HAS_BRIDGE else "hooked-gemma2")
    model, close = case.model, close_for(case)
    for option, changed in RESULT_OPTIONS.items():
        options: dict[str, Any] = {"target": TARGETS, "matrices": "all", "prepend_bos": True}
        options |= {"k": 4} | changed
        result = backward_lens(model, PROMPTS, **options)
        assert shapes_of(passes) == SHAPES, option
        with in_one_pass(model):
            one = backward_lens(model, PROMPTS, **options)
        assert shapes_of(passes) == [(4, 17)]
        assert_equal(read_values(result), read_values(one), close)
        assert_equal(values(result.capture), values(one.capture), close)
        assert result.token_texts == one.token_texts
        assert repr(result) == repr(one)
        found, expected = result.to_df(), one.to_df()
        for column in ("top_scores", "bottom_scores"):
            for here, there in zip(found.pop(column), expected.pop(column), strict=True):
                assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
        cosines = expected.pop("top_vjp_cosine").tolist()
        own = found.pop("top_vjp_cosine").tolist()
        assert own == pytest.approx(cosines, rel=1e-4, abs=1e-6, nan_ok=True)
        # Norms are compared above; near the limit, rounding decides which are faint.
        pd.testing.assert_frame_equal(
            found.drop(columns=["norm", "is_faint"]), expected.drop(columns=["norm", "is_faint"])
        )


def test_decoding_equals_that_of_each_prompt_alone(own_llama: Case) -> None:
    model = own_llama.model
    options: dict[str, Any] = {"matrices": "all", "k": 3}
    whole = read_values(backward_lens(model, PROMPTS, TARGETS, **options))
    for prompt, (text, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        alone = read_values(backward_lens(model, text, target, **options))
        expected = padded(of_prompt(alone, 0), 17)
        assert_equal(of_prompt(whole, prompt), expected, close_for(own_llama))


@pytest.mark.parametrize(
    "prompts",
    [
        ["The capital of France is Paris", "dog", "Rome is in Italy"],
        ["A river runs through Rome and not France", "Rome", "is Paris"],
    ],
    ids=["the longest apart", "the shortest apart"],
)
def test_matrices_that_share_inputs_for_some_prompts_only(
    prompts: list[str], passes: list[Tensor]
) -> None:
    """As in hand-written models: attention that adds nothing to some prompts, and no norm.

    There W_in reads what W_Q reads, only in the passes of those prompts.
    """
    case = build("hooked-no_norm")
    model = case.model
    paris = int(model.to_tokens(" Paris", prepend_bos=False)[0, 0])
    with torch.no_grad():
        attention = model.blocks[0].attn
        for bias in (attention.b_V, attention.b_O):
            bias.zero_()
        model.W_pos.zero_()
        model.W_E[:, :4] = 0
        model.W_E[paris, :4] = 1
        attention.W_V[:, 4:] = 0
    options: dict[str, Any] = {"matrices": "all", "prepend_bos": False}
    found = capture_gradients(model, prompts, target_nll(5), **options)
    assert len(passes) == 3
    for prompt, text in enumerate(prompts):
        alone = capture_gradients(model, text, target_nll(5), **options)
        assert (alone["W_in", 0].inputs is alone["W_Q", 0].inputs) == ("Paris" not in text)
        expected = padded(of_prompt(values(alone), 0), found.mask.shape[1])
        assert_equal(of_prompt(values(found), prompt), expected, CLOSE)


@pytest.mark.parametrize("prompts", [["Rome", "dog of the king"], ["A river runs", "dog"]])
def test_an_error_names_the_callers_prompt_index(own_gpt2: Case, prompts: list[str]) -> None:
    model = own_gpt2.model
    dog = int(model.to_tokens("dog", prepend_bos=False)[0, 0])

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        has_dog = (tokens == dog).any(1)
        return logits[:, -1, 5].masked_fill(has_dog, torch.nan)

    with pytest.raises(BackwardLensError, match=r"the loss of prompt 1 is nan"):
        capture_gradients(model, prompts, loss, prepend_bos=False)


def test_a_callable_sees_all_prompts_of_one_length_without_padding(own_gpt2: Case) -> None:
    model = own_gpt2.model
    prompts = ["Rome is", *PROMPTS, "Paris is", "dog of the king", "Rome"]
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        seen.append((logits.detach(), tokens))
        return training_loss(logits, tokens)

    capture = capture_gradients(model, prompts, loss, prepend_bos=True)
    lengths = capture.mask.sum(1).tolist()
    called = [tokens.shape[1] for _, tokens in seen]
    assert sorted(called) == sorted(set(lengths)), "once for each length"
    for logits, tokens in seen:
        length = tokens.shape[1]
        own = [prompt for prompt, found in enumerate(lengths) if found == length]
        assert torch.equal(tokens, capture.tokens[own, :length])
        with torch.no_grad():
            torch.testing.assert_close(logits, own_gpt2.logits(tokens), **CLOSE)
            expected = training_loss(own_gpt2.logits(tokens), tokens)
        torch.testing.assert_close(capture.loss[own], expected, **CLOSE)


# ------------------------------------------------------------------------------ the caller's hooks


def at_module(hook: str, module: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """A plain torch hook, by the name of the method that registers it."""

    @contextmanager
    def placed(model: Any) -> Iterator[None]:
        handle = getattr(module(model), hook)(noop)
        try:
            yield
        finally:
            handle.remove()

    return placed


def mlp_input(model: Any) -> nn.Module:
    """The Hugging Face module that multiplies by W_in."""
    module: nn.Module = getattr(model.blocks[1].mlp, "in").original_component
    return module


def raw_head(model: Any) -> nn.Module:
    module: nn.Module = model.original_model.get_output_embeddings()
    return getattr(module, "original_component", module)


HOOKS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "TransformerLens, forward": lambda model: model.hooks(
        fwd_hooks=[("blocks.1.hook_resid_pre", noop_hook)]
    ),
    "TransformerLens, backward": lambda model: model.hooks(
        bwd_hooks=[("blocks.1.mlp.hook_post", noop_hook)]
    ),
    "the whole model": at_module("register_forward_hook", lambda model: model),
    "forward": at_module("register_forward_hook", lambda model: model.blocks[2]),
    "forward, before": at_module("register_forward_pre_hook", lambda model: model.blocks[1].mlp),
    "backward": at_module("register_full_backward_hook", lambda model: model.blocks[1]),
    "backward, before": at_module("register_full_backward_pre_hook", lambda model: model.blocks[1]),
    "a hook point, by torch": at_module(
        "register_forward_hook", lambda model: model.hook_dict["blocks.0.mlp.hook_post"]
    ),
    "Hugging Face, forward": at_module("register_forward_hook", mlp_input),
    "Hugging Face, before": at_module("register_forward_pre_hook", mlp_input),
    "Hugging Face, backward": at_module("register_full_backward_hook", mlp_input),
    "Hugging Face, the head": at_module("register_forward_hook", raw_head),
    "Hugging Face, the whole": at_module(
        "register_forward_hook", lambda model: model.original_model
    ),
}


def noop_hook(value: Tensor, hook: object) -> None:
    del value, hook


@pytest.mark.versions
def test_all_prompts_share_one_pass_under_a_hook(own_gpt2: Case, passes: list[Tensor]) -> None:
    model = own_gpt2.model
    for name, hook in HOOKS.items():
        if name.startswith("Hugging Face") and not hasattr(model, "original_model"):
            continue
        with hook(model):
            capture_gradients(model, PROMPTS, target_nll(5), prepend_bos=True)
            assert shapes_of(passes) == [(4, 17)], name
    capture_gradients(model, PROMPTS, target_nll(5), prepend_bos=True)
    assert shapes_of(passes) == SHAPES, "the hooks are off again"


def test_all_prompts_share_one_pass_when_hook_points_are_requested(
    own_gpt2: Case, passes: list[Tensor]
) -> None:
    model, name = own_gpt2.model, "blocks.1.hook_resid_pre"
    capture = capture_gradients(model, PROMPTS, target_nll(TARGETS), hook_points=name)
    assert shapes_of(passes) == [(4, 17)]
    assert capture.hook_gradients[name].vjp.shape == (4, 17, own_gpt2.d_model)
    plain = capture_gradients(model, PROMPTS, target_nll(TARGETS))
    assert_equal(values(capture), values(plain), CLOSE)


def test_a_patch_of_the_whole_batch_acts_on_every_prompt(own_llama: Case) -> None:
    model, point = own_llama.model, "blocks.1.hook_resid_pre"
    patch = torch.randn(4, 17, own_llama.d_model, dtype=torch.float64)

    def capture(prompts: Any, targets: Any, patch: Tensor) -> dict[str, Tensor]:
        def patched(value: Tensor, hook: object) -> Tensor:
            assert value.shape == patch.shape
            return patch

        with model.hooks(fwd_hooks=[(point, patched)]):
            return values(capture_gradients(model, prompts, target_nll(targets), prepend_bos=True))

    found = capture(PROMPTS, TARGETS, patch)
    for prompt, length in enumerate(LENGTHS):
        alone = capture(PROMPTS[prompt], TARGETS[prompt], patch[prompt : prompt + 1, :length])
        expected = padded(of_prompt(alone, 0), 17)
        assert_equal(of_prompt(found, prompt), expected, close_for(own_llama))


WORK_BEFORE: dict[str, Callable[[Any, Tensor], object]] = {
    "forward": lambda model, tokens: model(tokens),
    "backward": lambda model, tokens: model(tokens).sum().backward(),
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens),
    "run_with_hooks": lambda model, tokens: model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.hook_resid_pre", noop_hook)]
    ),
    "generate": lambda model, tokens: model.generate(tokens, max_new_tokens=2, verbose=False),
    "hooks, then reset": lambda model, tokens: (
        model.add_hook("blocks.0.hook_resid_pre", noop_hook),
        model.reset_hooks(),
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_hooks_of_transformers_do_not_count_as_the_callers(name: str, passes: list[Tensor]) -> None:
    """Transformers hooks its own modules when it is first asked for attention patterns."""
    for work, done in WORK_BEFORE.items():
        model = build(name).model
        done(model, torch.tensor([[4, 5, 6]]))
        passes.clear()
        capture_gradients(model, PROMPTS, target_nll(5), prepend_bos=True)
        assert shapes_of(passes) == SHAPES, work


# ------------------------------------------------------------------ logits only where they are read


ANSWERS = [" river runs", " Paris", ". Rome is in", " is"]


def read_positions(model: Any, objective: str) -> list[int]:
    """Number of positions that each pass over the default prompts reads."""
    if objective == "sequence_nll":
        n = [len(model.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in ANSWERS]
        lengths = [length + extra - 1 for length, extra in zip(LENGTHS, n, strict=True)]
        return [len(bucket) * max(n[p] for p in bucket) for bucket in length_buckets(lengths)]
    reads_last = objective in ("target_nll", "own answer", "logit_difference")
    return [n if reads_last else n * length for n, length in SHAPES]


READING: dict[str, Any] = {
    "target_nll": target_nll(TARGETS),
    "own answer": target_nll(),
    "logit_difference": logit_difference(TARGETS, 5),
    "sequence_nll": sequence_nll(ANSWERS),
    "next_token_loss": next_token_loss(),
    "a callable": nll(5),
}


@pytest.mark.versions
def test_logits_are_computed_only_where_they_are_read(any_model: Any) -> None:
    """Check every model; objectives that read elsewhere follow below."""
    model = any_model[0]
    assert_reads_only(model, "target_nll")
    # A hook in the blocks does not see the logits.
    with in_one_pass(model), unembedded() as seen:
        capture_gradients(model, PROMPTS, target_nll(5), prepend_bos=True)
    assert seen == [4]


@pytest.mark.parametrize("objective", READING)
def test_each_objective_has_its_own_logits(own_gpt2: Case, objective: str) -> None:
    assert_reads_only(own_gpt2.model, objective)


def assert_reads_only(model: Any, objective: str) -> None:
    with unembedded() as seen:
        capture_gradients(model, PROMPTS, READING[objective], layers=-1, prepend_bos=True)
    assert seen == read_positions(model, objective)


OUTSIDE: dict[str, Callable[[Any], nn.Module]] = {
    "unembed": lambda model: model.unembed,
    "ln_final": lambda model: model.ln_final,
    "hook_embed": lambda model: model.hook_dict["hook_embed"],
    "the whole model": lambda model: model,
    "Hugging Face's head": raw_head,
    "Hugging Face's model": lambda model: model.original_model,
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_hook_outside_the_blocks_sees_all_positions(own_llama: Case, where: str) -> None:
    model = own_llama.model
    if where.startswith("Hugging Face") and not hasattr(model, "original_model"):
        pytest.skip("a HookedTransformer has no Hugging Face modules")
    module = OUTSIDE[where](model)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(getattr(output, "logits", output).detach().clone())

    handle = module.register_forward_hook(look)
    try:
        capture = capture_gradients(model, PROMPTS, target_nll(TARGETS), prepend_bos=True)
        analysed = seen.pop()
        model(capture.tokens, attention_mask=torch.ones_like(capture.tokens))
    finally:
        handle.remove()
    assert analysed.shape[:2] == (4, 17)
    torch.testing.assert_close(analysed, seen.pop(), **close_for(own_llama))
    plain = capture_gradients(model, PROMPTS, target_nll(TARGETS), prepend_bos=True)
    assert_equal(values(capture), values(plain), close_for(own_llama))


def test_a_hook_point_of_the_logits_is_given_in_full(own_gpt2: Case) -> None:
    model = own_gpt2.model
    names = [n for n in ("unembed.hook_out", "ln_final.hook_normalized") if n in model.hook_dict]
    capture = capture_gradients(model, PROMPTS, target_nll(TARGETS), hook_points=names)
    assert capture.targets is not None
    for prompt, length in enumerate(capture.mask.sum(1).tolist()):
        tokens = capture.tokens[prompt : prompt + 1, :length]
        _, cache = model.run_with_cache(tokens)
        for name in names:
            point = capture.hook_gradients[name]
            torch.testing.assert_close(point.value[prompt, :length], cache[name][0], **CLOSE)
            if name.startswith("unembed"):
                # dL/dlogits = softmax - onehot, at the last position alone.
                expected = torch.zeros_like(cache[name][0])
                expected[-1] = cache[name][0, -1].softmax(-1)
                expected[-1, int(capture.targets[prompt, 0])] -= 1
                torch.testing.assert_close(point.vjp[prompt, :length], expected, **CLOSE)
                assert not point.vjp[prompt, length:].any()


def sequence_loss(answer: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss over full logits of a prompt and its answer without the last token, written out."""

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        start = tokens.shape[1] - len(answer)
        assert tokens[0, start + 1 :].tolist() == answer[:-1]
        terms = [
            torch.logsumexp(logits[:, start + i], -1) - logits[:, start + i, token]
            for i, token in enumerate(answer)
        ]
        return torch.stack(terms).sum(0)

    return loss


def difference(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, -1, 8] - logits[:, -1, 7]


@pytest.mark.parametrize("name", ["bridge-gemma2", "hooked-no_norm"])
def test_losses_and_gradients_are_those_of_all_logits(name: str) -> None:
    """A callable gets all logits; some of these prompts share a padded pass."""
    case = build(name)
    model = case.model
    prompts = ["A river runs through Rome", "The dog of the king", *PROMPTS[:2], "Rome is in Paris"]
    pairs: list[tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = [
        (target_nll(5), nll(5)),
        (logit_difference(7, 8), difference),
    ]
    for objective, loss in pairs:
        with unembedded() as few:
            found = capture_gradients(model, prompts, objective, matrices="all", prepend_bos=True)
        with unembedded() as full:
            expected = capture_gradients(model, prompts, loss, matrices="all", prepend_bos=True)
        assert sum(few) == len(prompts) > len(few) > 1
        assert sum(full) > int(found.mask.sum()), "padding as well"
        here, there = values(found), values(expected)
        for kind in ("pos targets", "target_probs", "target_ranks"):
            here.pop(kind)
            there.pop(kind, None)
        assert_equal(here, there, close_for(case))


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_answers_of_several_tokens_are_read_at_the_same_positions(name: str) -> None:
    """Prompt by prompt, since in a shared pass the longest answer determines the positions."""
    case = build(name)
    model = case.model
    answers = [model.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    assert len({len(answer) for answer in answers}) > 1
    found = capture_gradients(model, PROMPTS, sequence_nll(ANSWERS), prepend_bos=True)
    longest = found.mask.shape[1]
    for prompt, answer in enumerate(answers):
        tokens = found.tokens[prompt][found.mask[prompt]][None]
        expected = values(capture_gradients(model, tokens, sequence_loss(answer)))
        here = of_prompt(values(found), prompt)
        wanted = padded(of_prompt(expected, 0), longest)
        # The whole text is the prompt of the callable, which has no targets.
        for kind in (*vars(found.predictions), "prompt_lengths"):
            here.pop(kind)
            wanted.pop(kind)
        targets = here.pop("pos targets")[: len(tokens[0])].tolist()
        assert targets[-len(answer) :] == answer
        assert_equal(here, wanted, close_for(case))


# --------------------------------------------------------------------------- only what is needed


def all_parameters(model: Any) -> list[nn.Parameter]:
    roots = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    return list({id(p): p for root in roots for p in root.parameters()}.values())


FREEZING: dict[str, Callable[[int], bool]] = {
    "frozen": lambda index: False,
    "unfrozen": lambda index: True,
    "partly frozen": lambda index: index % 3 == 0,
}


def freeze(model: Any, how: str) -> list[bool]:
    wanted = []
    for index, parameter in enumerate(all_parameters(model)):
        parameter.requires_grad_(FREEZING[how](index))
        wanted.append(parameter.requires_grad)
    return wanted


def flags(model: Any) -> list[bool]:
    return [parameter.requires_grad for parameter in all_parameters(model)]


@pytest.fixture
def thawed(own_llama: Case) -> Iterator[Case]:
    """A model that tests may freeze."""
    yield own_llama
    freeze(own_llama.model, "unfrozen")


@pytest.mark.parametrize("how", FREEZING)
@pytest.mark.parametrize("matrices", ["W_out", "W_gate"])
def test_no_other_parameter_requires_a_gradient_in_the_run(
    thawed: Case, how: str, matrices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = thawed.model
    before = freeze(model, how)
    asked = thawed.own[matrices, 1].tensor
    seen: list[list[nn.Parameter]] = []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append([p for p in all_parameters(model) if p.requires_grad])
        return differentiate(*args, **options)

    differentiate = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", watched)
    capture_gradients(model, PROMPTS, target_nll(5), matrices=matrices, layers=1)
    assert seen
    for requiring in seen:
        assert all(parameter is asked for parameter in requiring)
    assert flags(model) == before


def test_gradients_do_not_depend_on_what_is_frozen(thawed: Case) -> None:
    found = {}
    for how in FREEZING:
        freeze(thawed.model, how)
        capture = capture_gradients(thawed.model, PROMPTS, target_nll(TARGETS), matrices="all")
        found[how] = values(capture)
    assert found["frozen"]["pos W_out 0 vjps"].any()
    assert_equal(found["frozen"], found["unfrozen"], CLOSE)
    assert_equal(found["partly frozen"], found["unfrozen"], CLOSE)


def packed(model: Any, layers: Any, matrices: str = "all") -> int:
    """Number of tensors that autograd saves for the backward pass."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        capture_gradients(model, ALIKE[:1, :4], target_nll(5), matrices=matrices, layers=layers)
    return len(kept)


@pytest.mark.parametrize(("name", "how"), [("bridge-llama", "frozen"), ("hooked-gpt2", "unfrozen")])
def test_nothing_is_saved_for_lower_layers(name: str, how: str) -> None:
    """The last layer of four needs as many as the last of two."""
    shallow, deep = build(name, n_layers=2).model, build(name, n_layers=4).model
    for model in (shallow, deep):
        freeze(model, how)
    assert packed(deep, -1) == packed(shallow, -1)
    assert packed(deep, [2, 3]) == packed(shallow, [0, 1])
    assert packed(deep, -1) < packed(deep, 2) < packed(deep, None)
    assert packed(deep, -1, "W_out") <= packed(deep, -1, "mlp") < packed(deep, -1, "all")


PRODUCTS = ("linear", "addmm", "matmul", "einsum", "bmm", "baddbmm", "__matmul__")


class InterruptedAt(TorchFunctionMode):
    """Raise, like Ctrl-C, at one of the products of a forward pass."""

    def __init__(self, product: int) -> None:
        super().__init__()
        self.left = product

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hooked", [False, True], ids=["no hook", "a caller's hook"])
@pytest.mark.parametrize("name", ["bridge-llama", "hooked-llama"])
def test_requires_grad_is_restored_wherever_a_run_is_interrupted(name: str, hooked: bool) -> None:
    case = build(name, n_layers=2)
    model, tokens = case.model, ALIKE[:1, :3]
    before, product = freeze(model, "partly frozen"), 0
    while True:
        look = in_one_pass(model) if hooked else saved_tensors_hooks(lambda t: t, lambda t: t)
        interrupt = InterruptedAt(product)
        with look, interrupt:
            try:
                capture_gradients(model, tokens, target_nll(5), matrices="all")
            except KeyboardInterrupt:
                assert flags(model) == before, f"after product {product}"
        if interrupt.left >= 0:
            break
        product += 1
    assert product >= 7 * case.n_layers, "every matrix of every layer, at least"
    assert flags(model) == before


@pytest.mark.parametrize(
    ("how", "point"),
    [
        ("frozen", "attn.hook_q"),
        ("unfrozen", "attn.hook_k"),
        ("partly frozen", "mlp.hook_pre"),
        ("partly frozen", "mlp.hook_post"),
    ],
)
def test_requires_grad_is_restored_after_a_hook_raised(thawed: Case, how: str, point: str) -> None:
    model = thawed.model
    before = freeze(model, how)

    def stop(value: Tensor, hook: object) -> Tensor:
        raise KeyboardInterrupt

    with (
        model.hooks(fwd_hooks=[(f"blocks.1.{point}", stop)]),
        pytest.raises(KeyboardInterrupt),
    ):
        capture_gradients(model, ALIKE, target_nll(5), matrices="all")
    assert flags(model) == before


# ------------------------------------------------------------------------------------ shared inputs


def test_matrices_with_equal_inputs_share_one_tensor(any_model: Any, passes: list[Tensor]) -> None:
    assert_inputs_are_shared(any_model[0], passes, None)


@pytest.mark.parametrize(
    "memory", [Memory(factor_dtype=torch.bfloat16), Memory(factor_device="cpu")], ids=str
)
def test_rounded_and_moved_inputs_are_shared(
    own_llama: Case, memory: Memory, passes: list[Tensor]
) -> None:
    assert_inputs_are_shared(own_llama.model, passes, memory)


def assert_inputs_are_shared(model: Any, passes: list[Tensor], memory: Memory | None) -> None:
    for prompts in (PROMPTS, ALIKE):
        capture = capture_gradients(model, prompts, target_nll(5), matrices="all", memory=memory)
        assert (len(shapes_of(passes)) > 1) == (prompts is PROMPTS)
        for layer in capture.layers:
            reading = {
                name: capture[name, layer].inputs
                for name in capture.matrices
                if name in READING_MATRICES
            }
            assert reading["W_K"] is reading["W_Q"]
            assert reading["W_V"] is reading["W_Q"]
            assert reading.get("W_gate", reading["W_in"]) is reading["W_in"]
            # In none of these models do attention and MLP read the same input.
            assert reading["W_in"] is not reading["W_Q"]
            assert not torch.equal(reading["W_in"], reading["W_Q"])


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
@pytest.mark.parametrize("write", ["the tensor", "its data"])
def test_inputs_are_not_shared_across_an_in_place_write(name: str, write: str) -> None:
    """The reference is the input of each Hugging Face module, recorded by the caller's hook."""
    model = build(name).model
    attn = model.blocks[1].attn
    seen: dict[str, Tensor] = {}

    def doubled(value: Tensor, hook: object) -> None:
        target = value.detach() if write == "the tensor" else value.data
        target.mul_(2)

    def look(matrix: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[matrix] = args[0].detach().clone()

        return keep

    handles = [
        getattr(attn, letter).original_component.register_forward_pre_hook(look(f"W_{letter}"))
        for letter in "qkv"
    ]
    try:
        with model.hooks(fwd_hooks=[("blocks.1.attn.k.hook_in", doubled)]):
            capture = capture_gradients(model, ALIKE, target_nll(5), matrices="attn")
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen["W_k"], 2 * seen["W_q"])
    for letter in "qkv":
        found = capture[f"W_{letter.upper()}", 1].inputs
        torch.testing.assert_close(found, seen[f"W_{letter}"], rtol=0, atol=0)
    assert capture["W_K", 1].inputs is capture["W_V", 1].inputs
    assert capture["W_K", 1].inputs is not capture["W_Q", 1].inputs
    assert capture["W_K", 0].inputs is capture["W_Q", 0].inputs


class Counting:
    """A projection that records its arguments."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.asked: list[tuple[int, Tensor]] = []

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.asked.append((layer, vectors.detach().clone()))
        return self._case.lens(vectors)


@pytest.mark.parametrize(
    ("prompts", "memory"),
    [(PROMPTS, None), (ALIKE, None), (PROMPTS, Memory(factor_dtype=torch.bfloat16))],
    ids=["several passes", "one pass", "bfloat16"],
)
def test_shared_vectors_are_projected_once(
    own_llama: Case, prompts: Any, memory: Memory | None
) -> None:
    projection = Counting(own_llama)
    result = backward_lens(
        own_llama.model, prompts, 5, matrices="all", projection=projection, k=2, memory=memory
    )
    cells = int(result.capture.mask.sum())
    for layer in result.layers:
        rows = sum(len(vectors) for at, vectors in projection.asked if at == layer)
        assert rows == 4 * cells, "attention's input, W_O, the MLP's input, W_out"
    own = backward_lens(own_llama.model, prompts, 5, matrices="all", k=2)
    assert_equal(
        {name: v for name, v in read_values(result).items() if "norms" not in name},
        {name: v for name, v in read_values(own).items() if "norms" not in name},
        CLOSE_IN_FLOAT32,
    )


@pytest.mark.parametrize("positions", [None, -1])
def test_a_callers_projection_gets_vectors_of_one_layer(
    own_gpt2: Case, positions: int | None
) -> None:
    projection = Counting(own_gpt2)
    result = backward_lens(
        own_gpt2.model,
        PROMPTS,
        5,
        matrices="all",
        positions=positions,
        projection=projection,
        direction="gradient",
    )
    there: dict[int, set[tuple[float, ...]]] = {layer: set() for layer in result.layers}
    for gradient in result.capture:
        rows = gradient.spanning_set[gradient.mask]
        there[gradient.layer] |= {tuple(row) for row in rows.tolist()}
    assert {layer for layer, _ in projection.asked} == set(result.layers)
    for layer, vectors in projection.asked:
        assert {tuple(row) for row in vectors.tolist()} <= there[layer]


def test_blt_has_the_public_names() -> None:
    """The public names, as with `import backward_lens_tl as blt`."""
    assert blt.Memory is Memory
    assert blt.backward_lens is backward_lens


# ---------------------------------------------------------------------------------- modified models


class Adapted(torch.nn.Module):
    """An unembedding plus a low-rank change."""

    def __init__(self, unembed: Any) -> None:
        super().__init__()
        self.unembed = unembed
        generator = torch.Generator().manual_seed(0)
        d_model, d_vocab = unembed.W_U.shape
        self.down = torch.randn(d_model, 2, generator=generator, dtype=unembed.W_U.dtype)
        self.up = torch.randn(2, d_vocab, generator=generator, dtype=unembed.W_U.dtype)

    @property
    def W_U(self) -> Tensor:
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        return self.unembed.b_U

    def forward(self, resid: Tensor) -> Tensor:
        return self.unembed(resid) + resid @ self.down @ self.up


def adapt_unembedding(model: Any) -> None:
    model.unembed = Adapted(model.unembed)


def scale_unembedding(model: Any) -> None:
    before = model.unembed.forward
    model.unembed.forward = lambda resid: 2 * before(resid)


def scale_logits(model: Any) -> None:
    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options) / 3

    model.__class__ = Scaled


def hook_all_modules(model: Any) -> None:
    def doubled(module: Any, args: Any, output: Any) -> Any:
        return 2 * output if type(module).__name__ == "Unembed" else None

    model.handle = torch.nn.modules.module.register_module_forward_hook(doubled)


@hooked_only
@pytest.mark.parametrize(
    "change", [adapt_unembedding, scale_unembedding, scale_logits, hook_all_modules]
)
def test_the_output_of_a_changed_unembedding_is_differentiated(change: Any) -> None:
    model = build("hooked-gpt2").model
    tokens = torch.tensor([[4, 5, 6, 7], [7, 9, 11, 13]])
    plain = capture_gradients(model, tokens, target_nll(5)).loss
    change(model)
    try:
        capture = capture_gradients(model, tokens, target_nll(5))
        weight = model.blocks[1].mlp.W_out
        losses = -model(tokens)[:, -1].log_softmax(-1)[:, 5]
        [expected] = torch.autograd.grad(losses.sum(), [weight])
    finally:
        if hasattr(model, "handle"):
            model.handle.remove()
    torch.testing.assert_close(capture.loss, losses.detach())
    assert not torch.allclose(capture.loss, plain)
    found = capture["W_out", 1].dense(0) + capture["W_out", 1].dense(1)
    torch.testing.assert_close(found, expected)


@hooked_only
@pytest.mark.parametrize("matrix", ["W_Q", "W_O"])
def test_weights_computed_from_others(matrix: str) -> None:
    model = build("hooked-gpt2").model

    class Scale(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 1.5

    torch.nn.utils.parametrize.register_parametrization(model.blocks[1].attn, matrix, Scale())
    tokens = torch.tensor([[4, 5, 6, 7]])
    capture = capture_gradients(model, tokens, target_nll(5), matrices=matrix)
    original = getattr(model.blocks[1].attn.parametrizations, matrix).original
    assert original.requires_grad
    loss = -model(tokens)[:, -1].log_softmax(-1)[:, 5].sum()
    [expected] = torch.autograd.grad(loss, [original])
    torch.testing.assert_close(1.5 * capture[matrix, 1].dense(), expected)


def test_an_objective_that_reads_all_prompts_gets_them(passes: list[Tensor]) -> None:
    class Spread(BoundObjective):
        def losses(self, logits: Tensor, batch: Any) -> Tensor:
            last = batch.ends(logits, 1)[:, 0, 3]
            return last - last.mean()

    model = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2").model
    spread = Objective("spread", lambda prompts: Spread())
    capture = capture_gradients(model, PROMPTS, spread, prepend_bos=True)
    assert len(passes) == 1
    assert float(capture.loss.abs().min()) > 0
    assert abs(float(capture.loss.sum())) < 1e-9


def test_a_callable_may_differentiate_parameters() -> None:
    model = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2").model

    def penalised(logits: Tensor, tokens: Tensor) -> Tensor:
        loss = -logits[:, -1].log_softmax(-1)[:, 5]
        [slope] = torch.autograd.grad(loss.sum(), [model.W_E], create_graph=True)
        return loss + slope.square().sum()

    plain = capture_gradients(model, torch.tensor([[4, 5, 6]]), target_nll(5)).loss
    assert float(capture_gradients(model, torch.tensor([[4, 5, 6]]), penalised).loss) > float(plain)
