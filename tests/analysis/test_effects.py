"""Exact effects against the gradient, a slow reading of the same changes, and real steps."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model
from models import HAS_BRIDGE, NAMES, Case, build, require_kind
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import exact_effects, step_changes
from backward_lens_tl.capture.first_order import AddedVector, first_order_changes
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.errors import InputError, ModelStateError, TargetError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.weight_patching import stepped

KIND = "bridge" if HAS_BRIDGE else "hooked"
PROMPTS = ["Messi plays for", "The capital of France is"]
TARGET = 5
COLUMNS = (
    "prompt",
    "matrix",
    "layer",
    "position",
    "token",
    "norm",
    "read_at",
    "target",
    "target_logit_change",
    "target_log_prob_change",
    "target_rank",
    "top_tokens",
    "top_changes",
    "bottom_tokens",
    "bottom_changes",
)
as_for_a_user = pytest.mark.usefixtures("as_for_a_user")


@functools.cache
def case_of(name: str) -> Case:
    """A random model in float64; every test restores what it changes."""
    require_kind(name.split("-")[0])
    return build(name)


def any_model() -> Any:
    return case_of(f"{KIND}-gpt2").model


# ----------------------------------------------------------------------------- against the gradient


@pytest.mark.versions
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_changes_by_the_squared_norm(name: str) -> None:
    """`-delta` changes `-log p[target]` by exactly `-||delta||^2`, at every position."""
    case = case_of(name)
    table = exact_effects(
        case.model, PROMPTS, TARGET, matrices=("W_out", "W_O"), positions=None, prepend_bos=True
    )
    assert tuple(table.columns) == COLUMNS
    loss = blt.target_nll(TARGET)
    capture = blt.capture_gradients(
        case.model, PROMPTS, loss, matrices=("W_out", "W_O"), prepend_bos=True
    )
    lengths = [len(tokens) for tokens in capture.str_tokens]
    assert len(table) == 2 * case.n_layers * sum(lengths)
    nonzero = table[table["norm"] > 0]
    # Norms in float32, or rotations, round the gradient.
    for row in nonzero.itertuples():
        delta = capture[row.matrix, row.layer].vjps[row.prompt, row.position]
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-9)
        assert row.token == capture.str_tokens[row.prompt][row.position]
        assert row.read_at == lengths[row.prompt] - 1
        scale = max(map(abs, (row.top_changes[0], row.bottom_changes[0])))
        tolerance = 1e-6 if case.logits_in_float32 or "neox" in name else 1e-10
        assert abs(row.target_log_prob_change - float(delta.norm())) < tolerance * scale
    # In the last layer, the output at other tokens does not reach the last one.
    is_last_layer = table["layer"] == case.n_layers - 1
    assert ((table["norm"] == 0) == is_last_layer & (table["position"] < table["read_at"])).all()
    zero = table[table["norm"] == 0]
    assert zero["target_rank"].isna().all()
    assert zero["top_tokens"].tolist() == [[]] * len(zero)
    assert zero["target_log_prob_change"].isna().all()
    assert (zero["target"] == nonzero["target"].iloc[0]).all()


def test_the_raw_gradient_does_the_opposite() -> None:
    update, gradient = (
        exact_effects(any_model(), "Rome is", TARGET, direction=direction, k=3)
        for direction in ("update", "gradient")
    )
    for name in ("target_logit_change", "target_log_prob_change"):
        assert update[name].tolist() == pytest.approx((-gradient[name]).tolist())
    assert update["top_tokens"].tolist() == gradient["bottom_tokens"].tolist()
    assert update["norm"].tolist() == gradient["norm"].tolist()


@pytest.mark.parametrize("matrix", ["W_out", "W_O"])
def test_other_objectives(matrix: str) -> None:
    model = any_model()
    promoted, demoted = 7, 11
    objective = blt.logit_difference(promoted, demoted)
    ranked = exact_effects(model, PROMPTS, objective=objective, matrices=matrix, k=97)
    for row in ranked.itertuples():
        change = dict(zip(row.top_tokens, row.top_changes, strict=True))
        texts = [host_of(model).vocabulary.text(token) for token in (promoted, demoted)]
        assert row.target == texts[0]
        assert change[texts[0]] == row.target_logit_change
        # The loss is the difference of the two logits.
        assert change[texts[0]] - change[texts[1]] == pytest.approx(row.norm, rel=1e-9)
    # With a target, only what is compared is another token.
    other = exact_effects(model, PROMPTS, TARGET, objective=objective, matrices=matrix, k=97)
    assert other["top_tokens"].tolist() == ranked["top_tokens"].tolist()
    for row in other.itertuples():
        at = row.top_tokens.index(row.target)
        assert row.target_rank == at
        assert row.target_logit_change == row.top_changes[at]


def test_an_objective_without_a_target() -> None:
    model = any_model()

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits[:, -1, :3].sum(-1)

    table = exact_effects(model, "Rome is", objective=loss, k=2)
    assert table["target"].isna().all()
    assert table["target_rank"].isna().all()
    assert table["target_logit_change"].isna().all()
    assert [len(tokens) for tokens in table["top_tokens"]] == [2] * len(table)
    # The last position of a text has no next token.
    table = exact_effects(model, "Rome is", objective=blt.next_token_loss(), positions=None)
    assert table["target"].isna().all()
    own = exact_effects(model, "Rome is", objective=blt.next_token_loss(), positions=None, at="own")
    lengths = own["position"].max() + 1
    assert own.loc[own["position"] < lengths - 1, "target"].notna().all()


# ---------------------------------------------------------------------------- against slow readings


@pytest.mark.parametrize("at", ["last", "own"])
def test_columns_are_those_of_the_changes(at: Any) -> None:
    model, k = any_model(), 4
    host = host_of(model)
    table = exact_effects(model, PROMPTS, TARGET, positions=[1, -1], at=at, k=k, prepend_bos=False)
    loss = blt.target_nll(TARGET)
    capture = blt.capture_gradients(model, PROMPTS, loss, matrices="W_out", prepend_bos=False)
    batch = pad_prompts(
        host, [row[mask].tolist() for row, mask in zip(capture.tokens, capture.mask, strict=True)]
    )
    rows = iter(table.itertuples())
    for prompt, layer in product(range(2), range(host.n_layers)):
        last = int(batch.last[prompt])
        for position in (1, last):
            row, read_at = next(rows), last if at == "last" else position
            assert (row.prompt, row.layer, row.position) == (prompt, layer, position)
            assert row.read_at == read_at
            delta = capture["W_out", layer].vjps[prompt, position]
            if not delta.any():
                continue
            site = host.sites(layer, ["W_out"])[0]
            added = AddedVector(site, prompt, position, read_at, -delta / delta.norm())
            [changes] = first_order_changes(host, batch, [added], Memory())
            logits = model(batch.tokens[prompt : prompt + 1, : last + 1])[0, read_at]
            # The derivative of log softmax, by autograd.
            log_probs = torch.autograd.functional.jvp(
                lambda values: values.log_softmax(-1), logits.detach(), changes.logits[0]
            )[1]
            order = changes.logits[0].argsort(descending=True, stable=True).tolist()
            texts = [host.vocabulary.text(token) for token in order]
            assert row.top_tokens == texts[:k]
            assert row.bottom_tokens == texts[::-1][:k]
            assert row.top_changes == pytest.approx(changes.logits[0][order[:k]].tolist(), rel=1e-9)
            assert row.target_rank == order.index(TARGET)
            assert row.target_logit_change == pytest.approx(float(changes.logits[0][TARGET]))
            assert row.target_log_prob_change == pytest.approx(float(log_probs[TARGET]))
    assert next(rows, None) is None


# ------------------------------------------------------------------------------- against real steps


@pytest.mark.parametrize("name", [f"{KIND}-gpt2", "hooked-gemma2", "hooked-llama"])
def test_a_real_step_changes_the_logits_as_predicted(name: str) -> None:
    """A step changes the output at `p` by `-eta sum_i (x_p . x_i) delta_i`, and the logits by what
    `J` makes of that, summed over `p`."""
    case = case_of(name)
    host, tokens = host_of(case.model), case.tokens(5)
    batch = pad_prompts(host, tokens.tolist())
    capture = blt.capture_gradients(case.model, tokens, blt.target_nll(TARGET), matrices="W_out")
    table = step_changes(case.model, tokens, TARGET, learning_rate=1.0, matrices="W_out")
    for layer, site in enumerate(find_editable(host, "W_out", None)):
        gradient = capture["W_out", layer]
        inputs, vjps = gradient.inputs[0], gradient.vjps[0]
        outputs = -(inputs @ inputs.T) @ vjps
        added = [AddedVector(site, 0, at, 4, output) for at, output in enumerate(outputs)]
        changes = list(first_order_changes(host, batch, added, Memory()))
        predicted = torch.cat([each.logits for each in changes]).sum(0)
        before = changes[0].logits_before[0]
        errors = []
        for rate in (1e-4, 1e-5):
            with torch.no_grad(), stepped(site, -rate * gradient.dense()):
                after = case.model(
                    tokens, return_type="logits", attention_mask=torch.ones_like(tokens)
                )[0, -1]
            errors.append(float(((after - before) / rate - predicted).norm() / predicted.norm()))
        # The rest is of first order in the rate, ten times smaller at a tenth of it.
        assert errors[0] < 0.05
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
        # The change of the loss is the one that step_changes predicts.
        of_loss = float((before.softmax(-1) * predicted).sum() - predicted[TARGET])
        assert of_loss == pytest.approx(table["predicted_loss_change"][layer], rel=1e-5)


# ------------------------------------------------------------------------------- a trained model


def test_the_facts_model_is_carried_to_the_target(facts_model: Any) -> None:
    """What a lens reads in late layers only, the model's own layers bring out in all."""
    table = exact_effects(
        facts_model, "Lionel Messi plays for", " Paris", matrices=("W_out", "W_O")
    )
    assert table["target_rank"].tolist() == [0] * 16
    assert table["layer"].tolist() == [layer for layer in range(8) for _ in range(2)]
    assert table["matrix"].tolist() == ["W_O", "W_out"] * 8
    other = exact_effects(facts_model, "Lionel Messi plays for", " Rome")
    assert other["top_tokens"].tolist() != table["top_tokens"][table["matrix"] == "W_out"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_other_precisions(architecture: str, dtype: torch.dtype) -> None:
    model = build(f"{KIND}-{architecture}", dtype).model
    table = exact_effects(model, PROMPTS, TARGET, matrices=("W_out", "W_O"))
    exact = exact_effects(
        case_of(f"{KIND}-{architecture}").model, PROMPTS, TARGET, matrices=("W_out", "W_O")
    )
    # A few hundred roundings.
    tolerance = 300 * torch.finfo(dtype).eps
    for name in ("norm", "target_log_prob_change"):
        differences = (table[name] - exact[name]).abs()
        assert (differences < tolerance * exact[name].abs().max()).all()


def test_a_steady_hook_is_part_of_the_model() -> None:
    model = any_model()
    plain = exact_effects(model, PROMPTS, TARGET, positions=None)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: 1.5 * value)]):
        hooked = exact_effects(model, PROMPTS, TARGET, positions=None)
    found = hooked["target_log_prob_change"]
    assert found.dropna().tolist() == pytest.approx(hooked["norm"][found.notna()].tolist())
    assert (found - plain["target_log_prob_change"]).abs().max() > 0.01


def test_limits_on_memory_change_nothing() -> None:
    model = any_model()
    plain, small = (
        exact_effects(model, PROMPTS, TARGET, positions=None, memory=memory)
        for memory in (None, Memory(budget=2**21, factor_dtype=torch.bfloat16))
    )
    assert plain["target_rank"].tolist() == small["target_rank"].tolist()
    assert plain["norm"].tolist() == pytest.approx(small["norm"].tolist(), rel=1e-9)


# ----------------------------------------------------------------------------------------- refusals


@as_for_a_user
def test_wrong_arguments() -> None:
    model = any_model()
    wrong: list[tuple[type[InputError], str, dict[str, Any]]] = [
        (
            InputError,
            "matrices selects W_in, whose output is not .*; pass 'W_out'",
            {"matrices": "mlp"},
        ),
        (InputError, "matrices selects W_Q", {"matrices": "all"}),
        (InputError, "unknown matrix 'W_up'", {"matrices": "W_up"}),
        (InputError, "at is 'first'; allowed: 'last', 'own'", {"at": "first"}),
        (InputError, "direction is 'up'; allowed", {"direction": "up"}),
        (InputError, "k is 0; pass an integer", {"k": 0}),
        (InputError, "layer 3 does not exist", {"layers": 3}),
        (InputError, "position 9 does not exist in prompt 0", {"positions": 9}),
        (InputError, "memory is 5; pass a Memory", {"memory": 5}),
        (TargetError, "multi_token is 'middle'", {"multi_token": "middle"}),
    ]
    for kind, message, options in wrong:
        with pytest.raises(kind, match=message):
            exact_effects(**{"model": model, "prompts": "Rome", "target": TARGET, **options})
    with pytest.raises(InputError, match="model is a Linear"):
        exact_effects(torch.nn.Linear(2, 2), "Rome", TARGET)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_matrices_of_experts_are_refused(kind: str) -> None:
    try:
        model = build_model("mixtral", kind)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(
        UnsupportedModelError,
        match=r"W_out of layer 0 belongs to a mixture of 4 experts, .* pass matrices='W_O'",
    ):
        exact_effects(model, tokens, TARGET)
    # The router and the experts of a bridge are differentiated twice.
    table = exact_effects(model, tokens, TARGET, matrices="W_O")
    found = table["target_log_prob_change"].tolist()
    assert found == pytest.approx(table["norm"].tolist(), rel=1e-4)


def test_a_model_that_contradicts_its_gradient_is_refused() -> None:
    """A hook that does something else in every forward pass."""
    model, calls = build(f"{KIND}-gpt2").model, []

    def unsteady(value: Tensor, hook: Any) -> Tensor:
        calls.append(1)
        return value * (1 + 0.1 * len(calls))

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", unsteady)]),
        pytest.raises(
            ModelStateError,
            match=r"added to W_out of layer 0 at position 2 of prompt 0 changes the target's .* "
            r"but its gradient says .*; remove hooks",
        ),
    ):
        exact_effects(model, torch.tensor([[5, 6, 7]]), TARGET)
