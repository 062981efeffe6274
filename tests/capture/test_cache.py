"""TransformerLens's cache, built from a capture; attribution patching; what a capture covers.

Activations are compared with `run_with_cache`, gradients with those of a tensor that a hook puts
into the model's own graph, attribution with real patches and with TransformerLens's tool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model
from attention_cases import PAIR_NAMES, shared_case
from models import Case, bridge_only, build, hooked_only, nll, relative_error, training_loss
from torch import Tensor
from transformer_lens import ActivationCache, patching

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError, InputError, UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

# In float64 the error is 1e-15. Hugging Face computes several norms and softmaxes in float32, and
# a clone in the graph changes the order of sums: there 1e-6.
EXACT, SINGLE = 1e-11, 1e-6
TARGET = 5
READOUT_MODULE = "transformer_lens.tools.analysis.logit_lens"
ATTRIBUTION_MODULE = "transformer_lens.tools.analysis.attribution_patching"


def has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module", params=PAIR_NAMES)
def pair(request: pytest.FixtureRequest) -> Case:
    """Both model classes, with plain and with grouped-query attention, in float64."""
    return shared_case(request.param)


def tolerance_of(case: Case) -> float:
    return SINGLE if case.logits_in_float32 else EXACT


def capture_all(model: Any, tokens: Any, objective: Any = None, **options: Any) -> GradientCapture:
    objective = target_nll(TARGET) if objective is None else objective
    return capture_gradients(model, tokens, objective, **({"matrices": "all"} | options))


Loss = Callable[[Tensor, Tensor], Tensor]


def at_hooks(
    model: Any, names: Sequence[str], tokens: Tensor, loss: Loss | None = None, patches: Any = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and gradients at hook points, all in one pass: every hook puts a copy into the graph.

    `patches` come first, so these are the values that the model continues with.
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable:
        def keep(value: Tensor, hook: Any) -> Tensor:
            assert name not in seen
            seen[name] = value.clone()
            # A rotation table requires no gradient by default.
            seen[name].requires_grad_().retain_grad()
            return seen[name]

        return keep

    hooks = [*patches, *((name, keeper(name)) for name in names)]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
        (loss or nll(TARGET))(logits, tokens).sum().backward()
    model.zero_grad()
    return {
        name: (value.detach(), torch.zeros_like(value) if value.grad is None else value.grad)
        for name, value in seen.items()
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, or absolute where zero is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    distance = float((found.double() - expected.double()).norm())
    return distance / (float(expected.double().norm()) or 1.0)


# -------------------------------------------------------------------------- TransformerLens's names


def expected_names(case: Case) -> set[str]:
    """What `matrices="all"` gives: each matrix's hook points, and the gradient at the scores."""
    found = set()
    for layer in range(case.n_layers):
        at = f"blocks.{layer}"
        found |= {f"{at}.attn.hook_{name}_grad" for name in ("q", "k", "v", "attn_scores")}
        found |= {f"{at}.attn.hook_z", f"{at}.mlp.hook_post"}
        found |= {f"{at}.hook_attn_out_grad", f"{at}.hook_mlp_out_grad", f"{at}.mlp.hook_pre_grad"}
        if "W_gate" in case.matrices:
            found.add(f"{at}.mlp.hook_pre_linear_grad")
    return found


def test_a_cache_has_the_values_of_transformer_lens(case: Case) -> None:
    """Every random model, including post-norm, parallel attention and softcaps."""
    tokens = case.tokens(6, 6)
    cache = capture_all(case.model, tokens, next_token_loss()).to_cache()
    assert type(cache) is ActivationCache
    names = set(cache.keys())
    assert names == {name for name in expected_names(case) if name in known_names(case)}
    _, theirs = case.model.run_with_cache(tokens)
    points = sorted({name.removesuffix("_grad") for name in names})
    reference = at_hooks(case.model, points, tokens, training_loss)
    for name in names:
        value, gradient = reference[name.removesuffix("_grad")]
        if name.endswith("_grad"):
            assert difference(cache[name], gradient) <= tolerance_of(case), name
            assert gradient.any() or name.startswith(f"blocks.{case.n_layers - 1}")
        else:
            assert difference(cache[name], theirs[name]) <= tolerance_of(case), name
            assert difference(cache[name], value) <= tolerance_of(case), name


def known_names(case: Case) -> set[str]:
    """Names of the model's hook points and of their gradients."""
    return set(case.model.hook_dict) | {f"{name}_grad" for name in case.model.hook_dict}


def test_the_cache_holds_only_what_was_requested(pair: Case) -> None:
    tokens = pair.tokens(5)
    cache = capture_all(pair.model, tokens, matrices="W_out", layers=1).to_cache()
    assert set(cache.keys()) == {"blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out_grad"}
    cache = capture_all(pair.model, tokens, matrices="W_Q", layers=0).to_cache()
    at = "blocks.0.attn.hook"
    assert set(cache.keys()) == {f"{at}_q_grad", f"{at}_attn_scores_grad"}


def test_a_result_builds_the_same_cache(pair: Case, tmp_path: Path) -> None:
    tokens = pair.tokens(5)
    options: Any = {"matrices": "all", "hook_points": ["blocks.1.hook_resid_pre"]}
    result = backward_lens(pair.model, tokens, TARGET, **options)
    expected = capture_all(pair.model, tokens, **options).to_cache()
    result.save(tmp_path / "result")
    for cache in (
        result.capture.to_cache(),
        BackwardLensResult.load(tmp_path / "result").capture.to_cache(),
    ):
        assert cache.keys() == expected.keys()
        for name in expected.keys():  # noqa: SIM118  (iterating a cache gives no names)
            assert torch.equal(cache[name], expected[name]), name


# ---------------------------------------------------------------------------- requested hook points


def points_of(case: Case) -> list[str]:
    """Hook points that fire once, with a gradient, in a plain forward pass."""
    _, cache = case.model.run_with_cache(case.tokens(4))
    return [
        name
        for name in case.model.hook_dict
        if name in cache
        and cache[name].is_floating_point()
        # HookedTransformer's norms fire three times; a bridge's show Hugging Face's results.
        and not name.endswith(("hook_scale", "hook_normalized"))
        and not name.startswith("rotary_emb")
    ]


# A bridge's hook points return the same tensor that they got, which is also used elsewhere.
# TransformerLens's hooks, forward and backward, see one use: at ln1.hook_in, attn.q.hook_in (and
# k, v), ln2.hook_in and its alias hook_resid_mid it is the branch, without the residual stream.
def test_every_hook_point_can_be_requested(pair: Case) -> None:
    """All at once, including aliases, each with TransformerLens's value and autograd's gradient."""
    tokens, names = pair.tokens(5, 5), points_of(pair)
    assert {"blocks.1.hook_resid_pre", "blocks.0.attn.hook_pattern", "hook_embed"} <= set(names)
    capture = capture_all(pair.model, tokens, matrices="W_in", layers=0, hook_points=names)
    assert list(capture.hook_gradients) == names
    cache, (_, theirs) = capture.to_cache(), pair.model.run_with_cache(tokens)
    for name in names:
        point = capture.hook_gradients[name]
        assert point.name == name
        assert torch.equal(cache[name], point.value)
        assert torch.equal(cache[f"{name}_grad"], point.vjp)
        finite = theirs[name].isfinite()  # masked scores are not
        assert torch.equal(point.value.isfinite(), finite)
        found, expected = point.value[finite], theirs[name][finite]
        assert difference(found, expected) <= tolerance_of(pair), name
    for name, (value, gradient) in at_hooks(pair.model, names, tokens).items():
        assert capture.hook_gradients[name].vjp.shape == value.shape
        assert difference(capture.hook_gradients[name].vjp, gradient) <= tolerance_of(pair), name


def test_hook_points_chosen_by_a_function_of_their_name(pair: Case) -> None:
    def wanted(name: str) -> bool:
        return name.endswith(("hook_resid_pre", "hook_mlp_in"))

    tokens = pair.tokens(5)
    capture = capture_all(pair.model, tokens, hook_points=wanted)
    # hook_mlp_in fires only with a flag; as in run_with_cache, that is not an error.
    expected = [f"blocks.{layer}.hook_resid_pre" for layer in range(pair.n_layers)]
    assert list(capture.hook_gradients) == expected
    one = capture_all(pair.model, tokens, hook_points="blocks.1.hook_resid_pre")
    two = capture_all(pair.model, tokens, hook_points=["blocks.1.hook_resid_pre"] * 2)
    assert list(one.hook_gradients) == list(two.hook_gradients) == expected[1:2]
    assert not capture_all(pair.model, tokens, hook_points=lambda name: False).hook_gradients


def test_missing_hook_points_are_refused(pair: Case) -> None:
    tokens = pair.tokens(5)
    with pytest.raises(InputError, match=r"no hook point 'blocks.1.hook_resid_per'.*resid_pre"):
        capture_all(pair.model, tokens, hook_points=["blocks.1.hook_resid_per"])
    with pytest.raises(InputError, match=r"no hook point 'zzz'"):
        capture_all(pair.model, tokens, hook_points="zzz")
    with pytest.raises(BackwardLensError, match=r"hook_mlp_in.* 0 times"):
        capture_all(pair.model, tokens, hook_points="blocks.1.hook_mlp_in")


# On a bridge whose norm is Hugging Face's own module these points fire under no_grad: they show a
# copy that the model does not use.
@bridge_only
@pytest.mark.parametrize("name", ["bridge-llama", "bridge-gemma2", "bridge-neox"])
@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
def test_points_inside_a_norm_that_show_a_copy_are_right_or_refused(name: str, point: str) -> None:
    case = shared_case(name)
    try:
        capture = capture_all(case.model, case.tokens(5), hook_points=f"blocks.1.ln1.{point}")
    except BackwardLensError as error:
        assert "ln1" in str(error)  # noqa: PT017
    else:
        assert capture.hook_gradients[f"blocks.1.ln1.{point}"].vjp.any()


def test_all_hook_points_can_be_requested_by_a_function(pair: Case) -> None:
    """Copies are left out, and so are HookedTransformer's norms, which fire three times.

    `run_with_cache` accepts the same function, but keeps the last of several values.
    """
    capture = capture_all(pair.model, pair.tokens(5), hook_points=lambda name: True)
    assert "blocks.1.hook_resid_mid" in capture.hook_gradients
    assert "blocks.1.attn.hook_z" in capture.hook_gradients


def scaled(value: Tensor, hook: Any) -> Tensor:
    return 1.3 * value + 0.1 * value.flip(-1)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"])
def test_under_a_patch_values_are_those_after_the_patch(pair: Case, name: str) -> None:
    tokens, patch = pair.tokens(5), (name, scaled)
    points = [name, "blocks.2.hook_resid_pre"]
    plain = at_hooks(pair.model, points, tokens)
    expected = at_hooks(pair.model, points, tokens, patches=[patch])
    with pair.model.hooks(fwd_hooks=[patch]):
        capture = capture_all(pair.model, tokens, hook_points=points)
    cache = capture.to_cache()
    for point in points:
        value, gradient = expected[point]
        assert difference(capture.hook_gradients[point].value, value) <= tolerance_of(pair)
        assert difference(capture.hook_gradients[point].vjp, gradient) <= tolerance_of(pair)
        assert difference(value, plain[point][0]) > 1e-3
        assert difference(cache[f"{point}_grad"], gradient) <= tolerance_of(pair)


def test_hook_points_of_half_precision_are_float32() -> None:
    case = build("bridge-llama", torch.bfloat16)
    cache = capture_all(
        case.model, case.tokens(5), hook_points="blocks.1.hook_resid_pre"
    ).to_cache()
    assert {tensor.dtype for tensor in cache.values()} == {torch.float32}


def test_prompts_of_different_lengths_match_single_runs(pair: Case) -> None:
    prompts = ["The dog of the king runs", "Rome"]
    points = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]
    batch = capture_all(pair.model, prompts, hook_points=points)
    for index, prompt in enumerate(prompts):
        alone = capture_all(pair.model, prompt, hook_points=points)
        n = alone.mask.shape[1]
        for name in points:
            found, expected = batch.hook_gradients[name], alone.hook_gradients[name]
            torch.testing.assert_close(found.value[index, :n], expected.value[0])
            torch.testing.assert_close(found.vjp[index, :n], expected.vjp[0], atol=1e-7, rtol=1e-5)
            assert not found.vjp[index, n:].any()


# ---------------------------------------------------------------- what TransformerLens does with it


def resid_points(case: Case) -> list[str]:
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(case.n_layers)]
    mids = [f"blocks.{layer}.hook_resid_mid" for layer in range(case.n_layers)]
    return [*names, *mids, f"blocks.{case.n_layers - 1}.hook_resid_post"]


def test_the_methods_of_the_cache_work(pair: Case) -> None:
    tokens = pair.tokens(5, 5)
    capture = capture_all(pair.model, tokens, hook_points=resid_points(pair))
    cache = capture.to_cache(pair.model)
    _, theirs = pair.model.run_with_cache(tokens)
    assert cache.model is pair.model
    assert torch.equal(
        cache["resid_pre", 1], capture.hook_gradients["blocks.1.hook_resid_pre"].value
    )
    ours = cache.accumulated_resid(layer=2, incl_mid=True)
    expected = theirs.accumulated_resid(layer=2, incl_mid=True)
    assert difference(ours, expected) <= tolerance_of(pair)
    ours, expected = cache.stack_head_results(layer=2), theirs.stack_head_results(layer=2)
    assert difference(ours, expected) <= SINGLE
    assert set(cache.to("cpu").keys()) == set(cache.keys())


@pytest.mark.parametrize("pair", ["bridge-gpt2", "hooked-llama"], indirect=True)
def test_activation_patching_accepts_the_cache(pair: Case) -> None:
    """`transformer_lens.patching` gives the same with our cache as with TransformerLens's."""
    clean, corrupt = pair.tokens(2, seed=1), pair.tokens(2, seed=2)
    cache = capture_all(
        pair.model, clean, matrices="W_O", hook_points=lambda name: name.endswith("hook_resid_pre")
    ).to_cache()
    _, theirs = pair.model.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, TARGET].sum().detach()

    for patch in (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_head_out_all_pos):
        with torch.no_grad():
            found = patch(pair.model, corrupt, cache, metric)
            expected = patch(pair.model, corrupt, theirs, metric)
        assert expected.std() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------- attribution patching


ATTRIBUTED = (
    "blocks.1.hook_resid_pre",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_pattern",
    "blocks.2.hook_mlp_out",
    "hook_embed",
)


def two_runs(case: Case, **options: Any) -> tuple[Tensor, Tensor, GradientCapture, GradientCapture]:
    clean, corrupt = case.tokens(5, 5, seed=1), case.tokens(5, 5, seed=2)
    options = {"matrices": "W_out", "hook_points": ATTRIBUTED} | options
    return (
        clean,
        corrupt,
        capture_all(case.model, clean, **options),
        capture_all(case.model, corrupt, **options),
    )


def test_attribution_is_the_difference_times_the_gradient(pair: Case) -> None:
    """`(x_clean - x_corrupt) . grad_corrupt`, in loops, with separate values and gradients."""
    clean, corrupt, of_clean, of_corrupt = two_runs(pair)
    found = of_corrupt.attribution(of_clean)
    assert list(found) == list(ATTRIBUTED)
    there, here = (at_hooks(pair.model, ATTRIBUTED, tokens) for tokens in (clean, corrupt))
    for name in ATTRIBUTED:
        value, gradient = here[name]
        change = there[name][0] - value
        expected = torch.zeros(value.shape[:-1], dtype=torch.float64)
        for index in torch.cartesian_prod(*map(torch.arange, value.shape[:-1])).tolist():
            at = tuple(index)
            expected[at] = sum(
                float(change[(*at, d)]) * float(gradient[(*at, d)]) for d in range(value.shape[-1])
            )
        assert difference(found[name], expected) <= tolerance_of(pair), name
        assert expected.any()
    assert found["blocks.0.attn.hook_z"].shape == (2, 5, pair.model.cfg.n_heads)
    assert found["blocks.1.hook_resid_pre"].shape == (2, 5)
    # It is not symmetric: the gradient is that of the patched run.
    back = of_clean.attribution(of_corrupt)
    assert difference(-back["hook_embed"], found["hook_embed"]) > 0.1


def test_attribution_is_the_slope_of_a_real_patch(pair: Case) -> None:
    """A small move of one position towards the other run's activation changes the loss by it."""
    _, corrupt, of_clean, of_corrupt = two_runs(pair)
    found = of_corrupt.attribution(of_clean)
    # Hugging Face's float32 needs larger steps, which leave a larger second-order term.
    step, tolerance = (1e-2, 2e-2) if pair.logits_in_float32 else (1e-4, 1e-4)
    for name, at in (
        ("blocks.1.hook_resid_pre", (0, 2)),
        ("blocks.0.attn.hook_z", (1, 3, 2)),
        ("blocks.2.hook_mlp_out", (0, 4)),
    ):
        target = of_clean.hook_gradients[name].value
        losses = []
        for size in (step, -step):

            def move(value: Tensor, hook: Any, size: float = size, at: Any = at) -> Tensor:
                value = value.clone()
                value[at] += size * (target[at] - value[at])  # noqa: B023
                return value

            with torch.no_grad(), pair.model.hooks(fwd_hooks=[(name, move)]):
                losses.append(nll(TARGET)(pair.model(corrupt, return_type="logits"), corrupt))
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = float(found[name][at])
        assert float(slope[at[0]]) == pytest.approx(expected, rel=tolerance, abs=1e-4)
        # The other prompt of the batch is unaffected.
        assert float(slope[1 - at[0]]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.1.ln1.hook_in"])
def test_attribution_at_a_branch_is_the_slope_of_a_real_patch(pair: Case, name: str) -> None:
    """On a bridge both patches reach one branch, not the residual stream."""
    if name not in pair.model.hook_dict:
        pytest.skip("HookedTransformer has no such hook point")
    _, corrupt, of_clean, of_corrupt = two_runs(pair, hook_points=[name])
    target, step = of_clean.hook_gradients[name].value, 1e-2

    def loss(size: float) -> float:
        def move(value: Tensor, hook: Any) -> Tensor:
            return value + size * (target - value)

        with torch.no_grad(), pair.model.hooks(fwd_hooks=[(name, move)]):
            return float(nll(TARGET)(pair.model(corrupt, return_type="logits"), corrupt).sum())

    slope = (loss(step) - loss(-step)) / (2 * step)
    expected = float(of_corrupt.attribution(of_clean)[name].sum())
    assert slope == pytest.approx(expected, rel=2e-2, abs=1e-3)


def test_attribution_of_results_equals_that_of_their_captures(pair: Case) -> None:
    clean, corrupt, of_clean, of_corrupt = two_runs(pair)
    options: Any = {"matrices": "W_out", "hook_points": ATTRIBUTED}
    results = [backward_lens(pair.model, tokens, TARGET, **options) for tokens in (clean, corrupt)]
    found, expected = (
        results[1].capture.attribution(results[0].capture),
        of_corrupt.attribution(of_clean),
    )
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_attribution_of_a_run_to_itself_is_zero(pair: Case) -> None:
    _, _, of_clean, _ = two_runs(pair)
    assert not any(scores.any() for scores in of_clean.attribution(of_clean).values())


def test_attribution_needs_matching_positions(gpt2: Case) -> None:
    tokens = gpt2.tokens(5)
    plain = capture_all(gpt2.model, tokens)
    here = capture_all(gpt2.model, tokens, hook_points="hook_embed")
    elsewhere = capture_all(gpt2.model, tokens, hook_points="blocks.1.hook_resid_pre")
    longer = capture_all(gpt2.model, gpt2.tokens(6), hook_points="hook_embed")
    more = capture_all(gpt2.model, gpt2.tokens(5, 5), hook_points="hook_embed")
    for one, other in ((plain, here), (here, plain), (here, elsewhere)):
        with pytest.raises(InputError, match=r"need the same hook points.*hook_points=\["):
            one.attribution(other)
    with pytest.raises(InputError, match=r"lengths \[5\] here and \[6\] there"):
        here.attribution(longer)
    with pytest.raises(InputError, match=r"lengths \[5\] here and \[5, 5\] there"):
        here.attribution(more)


@bridge_only
@pytest.mark.skipif(not has_module(ATTRIBUTION_MODULE), reason="this TransformerLens has no tool")
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-gemma2"])
def test_attribution_matches_the_tool_of_transformer_lens(name: str) -> None:
    """`attribution_patch` on 3.9 and 4.3: heads at `hook_z`, MLPs and the embedding."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    case = shared_case(name)
    clean, corrupt = case.tokens(5, 5, seed=1), case.tokens(5, 5, seed=2)

    def metric(logits: Tensor) -> Tensor:
        return torch.logsumexp(logits[0, -1], -1) - logits[0, -1, TARGET]

    theirs = attribution_patch(case.model, clean, corrupt, metric).node_scores

    def wanted(name: str) -> bool:
        return name.endswith(("hook_z", "hook_mlp_out")) or name == "hook_embed"

    options: Any = {"matrices": "W_out", "hook_points": wanted}
    found = capture_all(case.model, corrupt, **options).attribution(
        capture_all(case.model, clean, **options)
    )
    kinds: dict[str, int] = {}
    size = max(abs(score) for score in theirs.values())
    for node, score in theirs.items():
        ours = found[node.hook_name].mean(0)[node.position]
        value = ours if node.head is None else ours[node.head]
        # The tool runs the prompts one by one; norms in float32.
        assert float(value) == pytest.approx(score, rel=1e-5, abs=1e-6 * size), node
        kinds[node.kind] = kinds.get(node.kind, 0) + 1
    heads = case.model.cfg.n_heads
    assert kinds == {"embed": 5, "attn_head_out": 5 * 3 * heads, "mlp_out": 15}


# --------------------------------------------------------------------------- the vocabulary readout


@bridge_only
@pytest.mark.skipif(not has_module(READOUT_MODULE), reason="this TransformerLens has no readout")
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama", "bridge-gemma2", "bridge-neox"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_readouts_agree_with_transformer_lens(name: str, dtype: torch.dtype) -> None:
    """`logit_readout` of 4.3 on the same vectors: top tokens, scores and the target's rank."""
    from transformer_lens.tools.analysis import logit_readout

    case = shared_case(name, dtype)
    result = backward_lens(
        case.model, case.tokens(6, 6), TARGET, matrices="all", direction="gradient", k=7
    )
    for matrix in result.matrices:
        ours = result.readout(matrix)
        for index, layer in enumerate(result.layers):
            vectors = result.capture[matrix, layer].spanning_set
            top = logit_readout(case.model, vectors, top_k=7)
            ranked = logit_readout(case.model, vectors, targets=TARGET)
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(ours.top_scores[index], top.values, **close)
            assert top.top_ids is not None
            assert ranked.target_ranks is not None
            # Where two scores are equal up to rounding, either order is right.
            same = ours.top_ids[index] == top.top_ids
            gaps = ours.top_scores[index].diff(dim=-1).abs()
            near = torch.nn.functional.pad(gaps, (1, 0), value=1.0) < 1e-5
            near |= torch.nn.functional.pad(gaps, (0, 1), value=1.0) < 1e-5
            assert (same | near).all(), (matrix, layer)
            # Without a bias a zero vector scores all tokens equally, and their tool picks any.
            assert same[vectors.ne(0).any(-1)].float().mean() > 0.99
            ranks = ours.target_rank[index] - ranked.target_ranks[..., 0]
            assert (ranks.abs() <= (1 if dtype == torch.float32 else 0)).all(), (matrix, layer)


# ----------------------------------------------------------------------------------------- coverage


@functools.cache
def build_or_skip(family: str, kind: str) -> Any:
    """A model of one of the many families; no test changes it."""
    try:
        return build_model(family, kind)
    except NotAvailable as reason:
        pytest.skip(str(reason))


def own_parameters(model: Any) -> dict[int, Tensor]:
    """Every parameter by identity; for a bridge, those of the Hugging Face model."""
    root = getattr(model, "original_model", model)
    return {id(parameter): parameter for parameter in root.parameters()}


def test_coverage_lists_the_parameters_whose_gradients_follow(pair: Case) -> None:
    """Autograd's gradient of each has the norm of a captured matrix's or bias's gradient."""
    tokens = pair.tokens(6)
    capture = capture_all(pair.model, tokens)
    coverage = capture.coverage
    assert coverage.parameters == "raw"
    assert coverage.differing == ()
    named = parameters_by_name(pair.model)
    assert set(coverage.covered) | set(coverage.not_covered) == set(named)
    assert not set(coverage.covered) & set(coverage.not_covered)
    sizes = [float(gradient.dense().norm()) for gradient in capture]
    sizes += [float(gradient.bias().norm()) for gradient in capture]
    logits = pair.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    gradients = torch.autograd.grad(
        nll(TARGET)(logits, tokens).sum(), list(named.values()), materialize_grads=True
    )
    for name, gradient in zip(named, gradients, strict=True):
        is_one = any(abs(size - float(gradient.norm())) <= 1e-9 for size in sizes)
        # HookedTransformer's gated MLP adds `b_in` to act(gate) * linear: it is not a bias of W_in.
        assert is_one == (name in coverage.covered), name


def parameters_by_name(model: Any) -> dict[str, Tensor]:
    """Parameters used in the forward pass, by the names that `Coverage` uses."""
    if not hasattr(model, "original_model"):
        return dict(model.named_parameters())
    found = {}
    for root in (model.original_model, model):
        for name, parameter in root.named_parameters():
            short = name.replace("_original_component.", "")
            # GPT-2's fused matrix was split into linear modules of the bridge.
            if ".c_attn." in short or ".qkv." in short or id(parameter) in map(id, found.values()):
                continue
            found[short] = parameter
    return found


def test_coverage_depends_on_the_request(pair: Case) -> None:
    tokens = pair.tokens(5)
    everything = capture_all(pair.model, tokens).coverage
    parts = [capture_all(pair.model, tokens, matrices=name).coverage for name in ("attn", "mlp")]
    assert set(parts[0].covered) | set(parts[1].covered) == set(everything.covered)
    assert not set(parts[0].covered) & set(parts[1].covered)
    assert all("mlp" in name for name in parts[1].covered)
    assert not any("mlp" in name for name in parts[0].covered)
    layer = capture_all(pair.model, tokens, layers=1).coverage
    assert all(".1." in name for name in layer.covered)
    assert len(layer.covered) * 3 == len(everything.covered)
    result = backward_lens(pair.model, tokens, TARGET, matrices="all")
    assert result.capture.coverage == everything
    assert f"{len(everything.covered)} parameters" in repr(result.capture.coverage)


def matrices_of(model: Any) -> dict[str, Tensor]:
    """Layer 1's matrices, through TransformerLens's properties."""
    block = model.blocks[1]
    found = {name: getattr(block.attn, name, None) for name in ("W_Q", "W_K", "W_V", "W_O")}
    found |= {name: getattr(block.mlp, name, None) for name in ("W_in", "W_gate", "W_out")}
    return {name: matrix.detach() for name, matrix in found.items() if matrix is not None}


# On TransformerLens 4.3 the bridge of OLMo-2 has no `ln1`; it was not folded. In
# TransformerLens 2.18 norms are folded without a change of `cfg.normalization_type`.
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_processed_weights_are_named(family: str, kind: str) -> None:
    """Folding changes matrices that read the stream, centring those that write to it."""
    raw = build_or_skip(family, kind)
    other = {"hooked": "hooked-processed", "bridge": "bridge-compat"}[kind]
    processed = build_or_skip(family, other)
    tokens = torch.arange(5, 11)[None]
    plain = capture_all(raw, tokens).coverage
    assert (plain.parameters, plain.differing) == ("raw", ())
    assert "raw weights" in repr(plain)
    before, after = matrices_of(raw), matrices_of(processed)
    changed = tuple(
        name
        for name in before
        if not torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-6)
    )
    coverage = capture_all(processed, tokens).coverage
    assert coverage.differing == changed
    assert coverage.parameters == ("processed" if changed else "raw")
    if changed:
        assert f"not the raw model's: {', '.join(changed)}" in repr(coverage)
        only = capture_all(processed, tokens, matrices="W_O").coverage
        assert only.differing == tuple(name for name in changed if name == "W_O")
        assert only.parameters == "processed"


@pytest.mark.parametrize("kind", ["hooked-processed", "bridge-compat"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_processed_weights_have_different_gradients(family: str, kind: str) -> None:
    """The reason for naming them: different parameters and gradients, the same deltas."""
    raw = build_or_skip(family, kind.split("-")[0])
    processed = build_or_skip(family, kind)
    tokens = torch.arange(5, 11)[None]
    before, after = capture_all(raw, tokens), capture_all(processed, tokens)
    for matrix in after.coverage.differing:
        if matrix not in ("W_O", "W_out"):
            assert relative_error(after[matrix, 1].dense(), before[matrix, 1].dense()) > 0.01
            assert relative_error(after[matrix, 1].vjps, before[matrix, 1].vjps) < 1e-3
    # The model's output is unchanged, so matrices that do not differ have equal gradients.
    for matrix in set(before.matrices) - set(after.coverage.differing):
        assert relative_error(after[matrix, 1].dense(), before[matrix, 1].dense()) < 1e-3


@hooked_only
def test_a_cache_of_ungrouped_heads_has_no_key_gradient() -> None:
    """Theirs is per query head, the factors' per key-value head: they are not interchangeable."""
    case = build("hooked-llama")
    case.model.set_ungroup_grouped_query_attention(True)
    cache = capture_all(case.model, case.tokens(5)).to_cache()
    assert "blocks.1.attn.hook_k_grad" not in cache
    assert "blocks.1.attn.hook_q_grad" in cache


@bridge_only
@pytest.mark.parametrize("family", ["gpt_neo", "opt"])
def test_a_cache_of_delegated_attention_has_no_scores(family: str) -> None:
    """Its hook_attn_scores would show something else; Reversed Attention is still available."""
    model, tokens = build_or_skip(family, "bridge"), torch.arange(5, 11)[None]
    capture = capture_all(model, tokens)
    cache = capture.to_cache()
    assert not any("attn_scores" in name for name in cache.keys())  # noqa: SIM118
    assert capture.reversed_attention(1).any()
    for point in ("hook_pattern", "hook_attn_scores"):
        with pytest.raises(UnsupportedModelError, match=rf"{point}.*matrices='attn'"):
            capture_all(model, tokens, hook_points=f"blocks.1.attn.{point}")


def test_attribution_at_masked_scores_is_zero(pair: Case) -> None:
    """Masked scores are minus infinity in both runs, or nearly so, and nothing depends on them."""
    name = "blocks.1.attn.hook_attn_scores"
    _, _, of_clean, of_corrupt = two_runs(pair, hook_points=[name])
    assert of_corrupt.attribution(of_clean)[name].isfinite().all()
