"""Forward passes that start at a block: the same logits, without the blocks below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import FAMILIES, KINDS, NotAvailable, build_model
from model_state import assert_same, snapshot
from models import HAS_BRIDGE, build, counting_mlps
from torch import Tensor

from backward_lens_tl.models import host_of
from backward_lens_tl.models.resumption import (
    RepeatedPasses,
    can_start_at,
    keeping_start,
    started_at,
)

pytestmark = pytest.mark.usefixtures("as_for_a_user")

ONE = "bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2"
OFTEN = [
    ("gpt2", "hooked"),
    ("gpt2", "bridge"),
    ("gpt2", "bridge-compat"),
    ("llama", "hooked"),
    ("gpt_neox", "bridge"),
    ("bloom", "bridge"),
    ("gemma2", "bridge"),
    ("gemma2", "hooked-processed"),
    ("olmo2", "bridge"),
]
RARE = [
    pytest.param(family, kind, marks=pytest.mark.slow)
    for family in FAMILIES
    for kind in KINDS
    if (family, kind) not in OFTEN
]


def model_of(family: str, kind: str) -> Any:
    try:
        return build_model(family, kind, torch.float64)
    except NotAvailable as error:
        pytest.skip(str(error))


def some_tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, shape, generator=generator)


@pytest.mark.parametrize(("family", "kind"), [*OFTEN, *RARE])
@torch.no_grad()
def test_logits_are_those_of_a_whole_pass(family: str, kind: str) -> None:
    """Bit for bit, because the blocks above compute the same with the same inputs."""
    host = host_of(model_of(family, kind))
    if family in ("mixtral", "gpt_oss", "qwen3_moe"):  # no dense MLP to edit
        pytest.skip("no edits there")
    assert can_start_at(host, 1)
    tokens, other = some_tokens(2, 9), some_tokens(2, 9).flip(1)
    with keeping_start(host, 1) as kept:
        whole = host.logits(tokens)
    with started_at(host, 1, kept[0]):
        partial = host.logits(tokens)
        again = host.logits(tokens)
        of_other = host.logits(other)
    assert torch.equal(partial, whole)
    assert torch.equal(again, whole)
    # What the tokens are does not matter any more.
    assert float((of_other - host.logits(other)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "bridge-llama", "hooked-llama"])
@torch.no_grad()
def test_blocks_below_do_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name).model
    host, tokens = host_of(model), some_tokens(1, 6)
    for layer in (1, 2):
        can_start_at(host, layer)  # before counting
    ran = counting_mlps(model, monkeypatch)
    for layer in (1, 2):
        with keeping_start(host, layer) as kept:
            host.logits(tokens)
        ran.clear()
        with started_at(host, layer, kept[0]):
            host.logits(tokens)
        assert ran == list(range(layer, 3))
        ran.clear()
        host.logits(tokens)
        assert ran == [0, 1, 2]


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_repeated_passes_run_the_blocks_below_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name).model
    host, tokens = host_of(model), some_tokens(1, 6)
    can_start_at(host, 2)  # before counting
    ran = counting_mlps(model, monkeypatch)

    def logits(passes: RepeatedPasses) -> Tensor:
        ran.clear()
        with passes.next():
            return host.logits(tokens)

    later = RepeatedPasses(host, 2)
    whole = logits(later)
    assert ran == [0, 1, 2]
    for _ in range(2):
        assert torch.equal(logits(later), whole)
        assert ran == [2]
    from_first = RepeatedPasses(host, 0)  # where there is nothing to leave out
    for _ in range(2):
        assert torch.equal(logits(from_first), whole)
        assert ran == [0, 1, 2]


def test_a_block_that_is_replaced_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ONE, seed=2).model
    host, kept = host_of(model), []
    assert can_start_at(host, 2)
    first, last = (model.blocks[layer].forward for layer in (0, 2))

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found = first(*args, **kwargs)
        kept[:] = [found[0] if isinstance(found, tuple) else found]
        return found

    def adding(*args: Any, **kwargs: Any) -> Any:
        found = last(*args, **kwargs)
        earlier = kept.pop() if kept else 0.0
        return (found[0] + earlier, *found[1:]) if isinstance(found, tuple) else found + earlier

    with monkeypatch.context() as patch:
        patch.setitem(vars(model.blocks[0]), "forward", keeping)
        patch.setitem(vars(model.blocks[2]), "forward", adding)
        assert not can_start_at(host, 2)
    assert can_start_at(host, 2)


@torch.no_grad()
def test_the_model_is_as_it_was_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ONE).model
    host, tokens = host_of(model), some_tokens(1, 5)
    can_start_at(host, 2)
    own = model.blocks[1].forward
    monkeypatch.setitem(vars(model.blocks[1]), "forward", own)  # a caller's own
    before = snapshot(model)
    with keeping_start(host, 2) as kept:
        host.logits(tokens)
    with pytest.raises(KeyboardInterrupt), started_at(host, 2, kept[0]):
        raise KeyboardInterrupt
    with started_at(host, 2, kept[0]):
        assert vars(model.blocks[1])["forward"] is not own
    assert vars(model.blocks[1])["forward"] is own
    assert_same(before, snapshot(model))


@torch.no_grad()
def test_later_blocks_may_write_into_the_start() -> None:
    host, tokens = host_of(build(ONE).model), some_tokens(1, 5)
    with keeping_start(host, 1) as kept:
        whole = host.logits(tokens)

    def halving(module: Any, args: Any, kwargs: Any) -> None:
        for each in (*args, *kwargs.values()):
            if isinstance(each, Tensor) and each.shape[-1] == host.d_model:
                each.mul_(0.5)

    handle = host.model.blocks[1].register_forward_pre_hook(halving, with_kwargs=True)
    with started_at(host, 1, kept[0]):
        halved = host.logits(tokens)
        again = host.logits(tokens)
    handle.remove()
    assert torch.equal(halved, again)
    assert not torch.equal(halved, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_not_where_a_block_uses_more_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As in models whose last layers share the keys and values of an earlier one."""
    model = build(ONE, seed=3).model.to(dtype)
    first, last = (model.blocks[layer].mlp for layer in (0, 2))
    own_first, own_last, shared = first.forward, last.forward, []

    def writing(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        shared.append(values)
        return own_first(values, *args, **kwargs)

    def reading(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own_last(values + shared.pop() if shared else values, *args, **kwargs)

    host = host_of(model)
    monkeypatch.setitem(vars(first), "forward", writing)
    monkeypatch.setitem(vars(last), "forward", reading)
    assert not can_start_at(host, 1)
    assert not can_start_at(host, 2)
    assert can_start_at(host_of(build(ONE, seed=4).model.to(dtype)), 1)


def test_not_from_the_first_block_nor_with_a_callers_hooks() -> None:
    model = build(ONE).model
    assert not can_start_at(host_of(model), 0)
    assert can_start_at(host_of(model), 1)
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert not can_start_at(host_of(model), 1)
    handle.remove()
    assert can_start_at(host_of(model), 1)
