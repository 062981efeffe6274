"""Sampling: greedy continuations against a loop, others against exact probabilities."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from model_state import assert_same, make_busy, snapshot
from models import HAS_BRIDGE, Case, build

from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.models import Host, host_of

pytestmark = pytest.mark.usefixtures("as_for_a_user")

EOS = 1
KIND = "bridge" if HAS_BRIDGE else "hooked"
PROMPTS = [[5], [9, 14, 20, 33], [40, 41], [7, 8, 9, 10, 11, 12, 13], [64, 43, 83], [5]]
SEEDS = [3, 1, 4, 1, 5, 9]
N = [8, 3, 12, 5, 0, 8]


@pytest.fixture(scope="module", params=["bridge-gpt2", "bridge-llama", "hooked-gpt2"])
def each(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


@pytest.fixture(scope="module")
def one() -> Case:
    """For tests where the model class does not matter."""
    return build(f"{KIND}-gpt2")


@pytest.fixture(scope="module")
def short() -> Case:
    """A model whose context holds 12 tokens."""
    return build(f"{KIND}-gpt2", n_ctx=12)


def draw(host: Host, top_k: int = 5, **changes: Any) -> list[list[int]]:
    asked = {"prompts": PROMPTS, "n_tokens": N, "seeds": SEEDS} | changes
    return sample(host, asked["prompts"], asked["n_tokens"], top_k=top_k, seeds=asked["seeds"])


def greedy(case: Case, prompt: list[int], n: int, n_ctx: int = 64) -> list[int]:
    """The most probable tokens, one forward pass of the reference each."""
    found: list[int] = []
    while len(found) < n and len(prompt) + len(found) <= n_ctx:
        with torch.no_grad():
            token = int(case.logits(torch.tensor([[*prompt, *found]]))[0, -1].argmax())
        if token == EOS:
            break
        found.append(token)
    return found


@pytest.mark.versions
def test_greedy_sampling_takes_the_most_probable_token(each: Case) -> None:
    expected = [greedy(each, prompt, n) for prompt, n in zip(PROMPTS, N, strict=True)]
    assert draw(host_of(each.model), 1) == expected
    assert max(map(len, expected)) > 6
    # For any seed; sampling from the top five differs.
    assert draw(host_of(each.model), 1, seeds=[0] * 6) == expected
    assert draw(host_of(each.model), 5) != expected


def test_samples_of_a_prompt_do_not_depend_on_batch_and_order(each: Case) -> None:
    host = host_of(each.model)
    together = draw(host)
    alone = [
        sample(host, [prompt], [n], top_k=5, seeds=[seed])[0]
        for prompt, n, seed in zip(PROMPTS, N, SEEDS, strict=True)
    ]
    assert alone == together
    order = [4, 2, 5, 0, 3, 1]
    turned = draw(
        host,
        prompts=[PROMPTS[i] for i in order],
        n_tokens=[N[i] for i in order],
        seeds=[SEEDS[i] for i in order],
    )
    assert turned == [together[i] for i in order]
    # A shorter continuation is a prefix of a longer one.
    fewer = draw(host, n_tokens=[min(n, 4) for n in N])
    assert fewer == [tokens[:4] for tokens in together]


def test_seeds(one: Case) -> None:
    host = host_of(one.model)
    first = draw(host)
    assert draw(host) == first
    assert first[0] != first[5]  # one prompt, two seeds
    assert draw(host, seeds=[3] * 6)[0] == draw(host, seeds=[3] * 6)[5]
    ten = sample(host, [[5]] * 10, [8] * 10, top_k=5, seeds=list(range(10)))
    assert len(set(map(tuple, ten))) == 10


def test_lengths(one: Case) -> None:
    found = draw(host_of(one.model), n_tokens=[0, 1, 2, 3, 4, 5])
    assert all(len(tokens) <= n for tokens, n in zip(found, range(6), strict=True))
    assert found[0] == []
    assert sample(host_of(one.model), [], [], top_k=5, seeds=[]) == []


def test_torchs_random_state_and_the_model_are_unchanged() -> None:
    model = make_busy(build(f"{KIND}-gpt2")).model
    before = snapshot(model)
    first = draw(host_of(model))
    assert_same(before, snapshot(model))
    torch.manual_seed(123)
    random.seed(123)
    assert draw(host_of(model)) == first
    torch.rand(7)
    assert draw(host_of(model)) == first


def test_it_stops_at_the_end_of_the_context(short: Case) -> None:
    """The last token is sampled when the context is full."""
    host = host_of(short.model)
    prompts = [[5] * n for n in (3, 11, 12)]
    found = sample(host, prompts, [30] * 3, top_k=1, seeds=[0] * 3)
    expected = [greedy(short, prompt, 30, n_ctx=12) for prompt in prompts]
    assert found == expected
    free = [not any(token == EOS for token in tokens) for tokens in expected]
    assert [len(tokens) for tokens, is_free in zip(found, free, strict=True) if is_free] == [
        n for n, is_free in zip((10, 2, 1), free, strict=True) if is_free
    ]
    assert any(free)


def test_it_stops_at_the_end_of_text_token(one: Case) -> None:
    """One prompt reaches the end of text at its third token; the others in the batch continue."""
    plain = draw(host_of(one.model), 1)
    passes: list[int] = []

    def end_in_third_pass(_: object, args: tuple[Any, ...], logits: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            logits = logits.clone()
            logits[0, ..., EOS] += 1e6
        return logits

    handle = one.model.unembed.register_forward_hook(end_in_third_pass)
    try:
        found = draw(host_of(one.model), 1)
    finally:
        handle.remove()
    assert found[0] == plain[0][:2]  # without the end-of-text token
    assert found[1:] == plain[1:]


def exact(case: Case, prompt: list[int], k: int) -> dict[int, float]:
    with torch.no_grad():
        logits = case.logits(torch.tensor([prompt]))[0, -1].double()
    best = logits.topk(k)
    weights = best.values.exp() / best.values.exp().sum()
    return dict(zip(best.indices.tolist(), weights.tolist(), strict=True))


def chi_square(found: list[int], expected: dict[int, float]) -> float:
    n = len(found)
    return sum((found.count(t) - n * p) ** 2 / (n * p) for t, p in expected.items())


@pytest.mark.parametrize("k", [2, 8])
def test_tokens_are_sampled_by_probability(one: Case, k: int) -> None:
    """Chi-square of 2000 draws; random draws exceed the bound about once in ten thousand runs."""
    prompt, n = [9, 14, 20, 33], 2000
    expected = exact(one, prompt, k)
    drawn = sample(host_of(one.model), [prompt] * n, [1] * n, top_k=k, seeds=list(range(n)))
    found = [tokens[0] if tokens else EOS for tokens in drawn]
    assert set(found) <= expected.keys()
    bound = {2: 16, 8: 31}[k]
    assert chi_square(found, expected) < bound
    # Uniform probabilities or another temperature would be detected.
    flat = dict.fromkeys(expected, 1 / k)
    sharp = {t: p**2 / sum(q**2 for q in expected.values()) for t, p in expected.items()}
    assert chi_square(found, flat) > 3 * bound or max(expected.values()) < 1.3 / k
    assert chi_square(found, sharp) > 3 * bound or max(expected.values()) < 1.3 / k


def test_the_second_token_depends_on_the_first(one: Case) -> None:
    """Samples are fed back: the second token depends on the first one sampled."""
    prompt, n = [40, 41], 1500
    drawn = sample(host_of(one.model), [prompt] * n, [2] * n, top_k=3, seeds=list(range(n)))
    firsts = [tokens[0] for tokens in drawn if tokens]
    common = max(set(firsts), key=firsts.count)
    expected = exact(one, [*prompt, common], 3)
    seconds = [tokens[1] if len(tokens) > 1 else EOS for tokens in drawn if tokens[:1] == [common]]
    assert set(seconds) <= expected.keys()
    assert chi_square(seconds, expected) < 20


def test_more_choices_than_tokens(one: Case) -> None:
    found = sample(host_of(one.model), [[5]], [3], top_k=10_000, seeds=[0])
    assert len(found[0]) <= 3


def test_a_callers_autocast_changes_nothing(short: Case) -> None:
    host = host_of(short.model)
    first = draw(host, 1, prompts=[[5]] * 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert draw(host, 1, prompts=[[5]] * 6) == first
