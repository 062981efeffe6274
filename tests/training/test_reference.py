"""The reference prompt's gradient against a capture, and a training that does not notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model, hf_model
from models import relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from backward_lens_tl.capture.objectives import sequence_nll, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensWarning, InputError, TargetError
from backward_lens_tl.models.loading import load_facts_model
from backward_lens_tl.training import StepGradient, TrainingRecord, watch

FACTS_FOLDER = Path(__file__).parents[2] / "backward_lens_tl" / "facts_model"
PROMPT, TARGET = "Lionel Messi plays for", " Paris"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


def watched_step(model: Any, tokens: Tensor, labels: Tensor, **options: Any) -> StepGradient:
    """One step of plain SGD on `labels`, watched with a reference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, **options) as watched:
        logits = model(tokens) if hasattr(model, "cfg") else model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        loss.backward()
        optimizer.step()
        step = watched.step()
    assert step is not None
    return step


@pytest.mark.parametrize("is_hf", [False, True])
def test_it_is_the_gradient_before_the_step(is_hf: bool, tokenizer: Any, tmp_path: Path) -> None:
    reader: Any = load_facts_model()
    model: Any = load_facts_model()
    options: dict[str, Any] = {}
    if is_hf:
        model, options = (
            AutoModelForCausalLM.from_pretrained(FACTS_FOLDER),
            {"tokenizer": tokenizer},
        )
    # The tokenizer itself puts no BOS token in front.
    bos = {"prepend_bos": False} if is_hf else {}
    expected = capture_gradients(reader, PROMPT, target_nll(TARGET), matrices="mlp", **bos)
    other = torch.tensor([tokenizer("The capital of France is Rome")["input_ids"]])
    step = watched_step(model, other, other, matrices="mlp", reference=(PROMPT, TARGET), **options)
    assert set(step.references) == set(expected.gradients)
    for key, gradient in step.references.items():
        # float32, and the model of transformers computes in another order
        assert relative_error(gradient.dense(), expected[key].dense()) < 1e-4, key
    rows = TrainingRecord(tmp_path).add(step)
    for row in rows.itertuples():
        own, reference = (
            step[row.matrix, row.layer].dense(),
            expected[row.matrix, row.layer].dense(),
        )
        cosine = float((own * reference).sum() / own.norm() / reference.norm())
        assert row.reference_cosine == pytest.approx(cosine, abs=1e-5)
    assert rows.reference_cosine.abs().max() < 0.9


def test_training_on_the_reference_has_cosine_1(tokenizer: Any, tmp_path: Path) -> None:
    model: Any = load_facts_model()
    tokens = model.to_tokens(PROMPT + TARGET)
    labels = torch.full_like(tokens, -100)
    labels[0, -1] = tokens[0, -1]
    step = watched_step(model, tokens, labels, matrices="all", reference=(PROMPT, TARGET))
    rows = TrainingRecord(tmp_path).add(step)
    assert rows.reference_cosine.min() > 1 - 1e-5  # float32
    as_ids = tokens[0, :-1].tolist(), int(tokens[0, -1])
    model = load_facts_model()
    again = watched_step(model, tokens, labels, matrices="all", reference=as_ids)
    assert all(
        torch.equal(gradient.vjps, again.references[key].vjps)
        for key, gradient in step.references.items()
    )


def test_targets_of_several_tokens() -> None:
    model: Any = load_facts_model()
    expected = capture_gradients(model, PROMPT, sequence_nll(" Paris France"), matrices="W_out")
    tokens = model.to_tokens("Rome is")
    reference = PROMPT, " Paris France"
    step = watched_step(model, tokens, tokens, matrices="W_out", reference=reference)
    for key, gradient in step.references.items():
        # The sum over the target's tokens, not the mean; float32.
        assert relative_error(gradient.dense(), expected[key].dense()) < 1e-3


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_models_of_transformer_lens_run_in_eval_mode(kind: str) -> None:
    try:
        model: Any = build_model("gpt2", kind, torch.float32)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    inner = getattr(model, "original_model", model)
    for each in (model, inner):
        each.train()
    modes: list[bool] = []
    blocks = inner.blocks if inner is model else inner.transformer.h
    blocks[1].mlp.register_forward_hook(lambda module, *_: modes.append(module.training))
    tokens = torch.tensor([[5, 6, 7, 8]])
    with watch(model, "W_out", reference=([5, 6], 7)) as watched:
        model(tokens, return_type="loss").backward()
        watched.step()
    assert modes == [False, True]
    assert all(module.training for module in inner.modules())


def trained(is_watched: bool, *, autocast: bool) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Losses, weights and the next random number of a short training with dropout."""
    torch.manual_seed(0)
    model = hf_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    frozen = model.transformer.h[0].attn.resid_dropout.eval()  # a mode of its own
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[Tensor] = []
    reference = ([5, 6, 7], 8) if is_watched else None
    options: dict[str, Any] = {"changes": is_watched, "reference": reference}
    with watch(model, "all", every=1 if is_watched else 100, **options) as watched:
        watched.resume(0 if is_watched else 1)
        for number in range(6):
            ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(number))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=ids).loss
            loss.backward()
            assert not frozen.training
            assert model.transformer.h[1].attn.resid_dropout.training
            losses.append(loss.detach())
            if number % 2:  # two microbatches
                optimizer.step()
                optimizer.zero_grad()
                step = watched.step()
                assert (step is not None) == is_watched
                assert step is None or len(step.references) == len(step.changes) == 12
    return losses, model.state_dict(), torch.rand(3)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_identical(autocast: bool) -> None:
    losses, weights, random = trained(False, autocast=autocast)
    same_losses, same_weights, same_random = trained(True, autocast=autocast)
    assert all(map(torch.equal, losses, same_losses))
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert torch.equal(random, same_random)


def test_gradients_of_the_training_are_not_touched() -> None:
    model = hf_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    with watch(model, reference=([5, 6], 7)) as watched:
        loss = model(ids, labels=ids).loss
        assert all(parameter.grad is None for parameter in model.parameters())
        loss.backward()
        step = watched.step()
    assert step is not None
    assert len(step.positions) == 3  # none of the reference's
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_watches_do_not_see_each_others_references() -> None:
    model = hf_model("llama", torch.float64)
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = ([5, 6], 7), ([9, 10, 11], 12)
    with watch(model, reference=first) as one, watch(model, reference=second) as other:
        model(ids, labels=ids).loss.backward()
        steps = one.step(), other.step()
    with watch(model, reference=first) as alone:
        model(ids, labels=ids).loss.backward()
        expected = alone.step()
    for step, n_reference in zip(steps, (2, 4), strict=True):
        assert step is not None
        assert expected is not None
        assert len(step.positions) == 3  # of the training's pass alone
        assert torch.equal(step["W_out", 1].vjps, expected["W_out", 1].vjps)
        assert step.references["W_out", 1].vjps.shape[1] <= n_reference
    assert steps[0] is not None
    assert expected is not None
    own = (each.references["W_out", 1].vjps for each in (steps[0], expected))
    assert torch.equal(*own)


def test_an_evaluation_does_not_run_the_reference() -> None:
    model = hf_model("llama", torch.float64)
    ids = torch.tensor([[5, 6, 7, 8]])
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(len(args[0][0])))
    with watch(model, reference=([5, 6], 7)) as watched:
        with torch.no_grad():
            model(ids)
        assert seen == [4]
        model(ids, labels=ids).loss.backward()
        watched.step()
    assert seen == [4, 3, 4]


def test_the_model_is_restored_after_an_exception() -> None:
    model = hf_model("llama").train()

    def fail(*_: object) -> None:
        raise RuntimeError("in the reference")

    handle = model.model.layers[1].register_forward_hook(fail)
    state = torch.get_rng_state()
    with (
        pytest.raises(RuntimeError, match="in the reference"),
        watch(model, reference=([5, 6], 7)),
    ):
        model(torch.tensor([[5, 6]]))
    handle.remove()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_a_trained_parameter_there_is_no_reference() -> None:
    model = hf_model("llama")
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with watch(model, "W_out", reference=([5, 6], 7)) as watched:
        model(ids, labels=ids).loss.backward()
        step = watched.step()
    assert step is not None
    assert set(step.references) == {("W_out", 1)}


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("Paris", InputError, "reference is 'Paris'; pass a prompt and its target, such as"),
        ((PROMPT, TARGET), InputError, r"is text, but there is no tokenizer; pass watch\(\.\.\.,"),
        (([], 7), InputError, r"tokens of the reference are \[\]; pass a text, or ids from 0 to"),
        (([5], 10**6), InputError, "tokens of the reference are 1000000; pass a text"),
    ],
)
def test_refusals(reference: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), watch(hf_model("llama"), reference=reference):
        pass


@pytest.mark.parametrize("kind", ["hf", "hooked", "bridge"])
def test_references_that_are_longer_than_the_context(kind: str) -> None:
    try:
        model: Any = hf_model("gpt2") if kind == "hf" else build_model("gpt2", kind, torch.float32)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    context = model.config.n_positions if kind == "hf" else model.cfg.n_ctx
    ids = torch.full((1, context), 5)
    with watch(model, "W_out", reference=([5] * (context - 1), 7)) as watched:
        (model(ids).logits if kind == "hf" else model(ids)).sum().backward()
        step = watched.step()
    assert step is not None
    assert step.references
    message = (
        f"prompt has {context} tokens and its target 1, and the model's context holds {context}"
    )
    with pytest.raises(InputError, match=message):
        watch(model, "W_out", reference=([5] * context, 7)).__enter__()


def test_a_reference_without_a_gradient_has_no_cosine(tmp_path: Path) -> None:
    model = hf_model("llama")

    def be_certain(_: object, __: object, logits: Tensor) -> Tensor:
        return logits + 1e4 * nn.functional.one_hot(torch.tensor(7), logits.shape[-1])

    model.get_output_embeddings().register_forward_hook(be_certain)
    ids = torch.tensor([[5, 6, 8]])
    with watch(model, "W_out", reference=([5, 6], 7)) as watched:
        model(ids, labels=ids).loss.backward()
        step = watched.step()
    assert step is not None
    assert not any(gradient.vjps.any() for gradient in step.references.values())
    rows = TrainingRecord(tmp_path).add(step)
    assert rows.norm.min() > 0
    assert rows.reference_cosine.isna().all()


def test_targets_that_do_not_continue_the_prompt(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    with (
        pytest.raises(TargetError, match="changes the tokens of the prompt"),
        watch(model, reference=("Lionel Mess", "i"), tokenizer=tokenizer),
    ):
        pass


def test_loops_that_do_not_call_the_watched_model() -> None:
    model = hf_model("llama")
    with watch(model, "W_out", reference=([5, 6], 7)) as watched:
        model.model(torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()
        with pytest.warns(BackwardLensWarning, match="step 1 has no reference: the training does"):
            step = watched.step()
    assert step is not None
    assert not step.references
