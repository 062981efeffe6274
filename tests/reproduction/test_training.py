"""What training runs write: measures in closed form, training against a real one, verdicts."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import HAS_BRIDGE, build
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.requests import EditRequest, tokenize_requests
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_checksum
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.reproduction import Finding, reproduce, training_changes, training_runs
from backward_lens_tl.reproduction.training_facts import TaughtFacts
from backward_lens_tl.reproduction.training_loop import (
    Checkpoint,
    TrainedChange,
    matched_rate,
    train,
)
from backward_lens_tl.reproduction.training_measures import (
    cosine,
    effective_rank,
    energy,
    share_outside,
    stable_rank,
)
from backward_lens_tl.reproduction.training_readings import Reader
from backward_lens_tl.reproduction.training_relations import relations
from backward_lens_tl.reproduction.training_runs import TrainingConfig

ROWS = [
    {"prompt": "Messi plays for", "target": " Paris"},
    {"prompt": "Rome is in", "target": " the"},
    {"prompt": "The dog of the king", "target": " Rome"},
    {"prompt": "Paris is", "target": " king"},
    {"prompt": "Italy is", "target": " dog"},
]


@pytest.fixture(scope="module")
def small() -> Any:
    return build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model


def facts_of(model: Any, n: int = 4) -> TaughtFacts:
    requests = [EditRequest(row["prompt"], row["target"]) for row in ROWS[:n]]
    return TaughtFacts.of(tokenize_requests(host_of(model), requests, False), [""] * n, [None] * n)


def trained(model: Any, optimizer: Any, *, facts: Any = None, **given: Any) -> list[Checkpoint]:
    host = host_of(model)
    usual = {"rank": None, "rate_of": None, "steps": (1, 3), "batch_size": 2, "seed": 0}
    sites = find_editable(host, "mlp", None, mlp_only=True)
    taught = facts_of(model) if facts is None else facts
    settings = usual | {"rate_of": taught} | given
    return list(train(host, taught, sites, optimizer, **settings))


def random_matrix(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_matrix(m, n, seed)).Q


def dense(values: Tensor) -> MatrixDelta:
    return MatrixDelta("W_out", 0, values=values)


# --- measures -------------------------------------------------------------------------------------


def test_equal_singular_values_count_as_they_are() -> None:
    same = torch.full((7,), 3.0, dtype=torch.float64)
    assert effective_rank(same) == pytest.approx(7)
    assert stable_rank(same) == pytest.approx(7)
    assert energy(same, 1) == pytest.approx(1 / 7)
    assert energy(same, 10) == pytest.approx(1)


def test_unequal_singular_values() -> None:
    values = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    # Shares of 1/2, 1/4 and 1/4 have an entropy of 1.5 bits.
    assert effective_rank(values) == pytest.approx(2**1.5)
    assert stable_rank(values) == pytest.approx(6 / 4)
    assert energy(values, 2) == pytest.approx(5 / 6)
    assert effective_rank(torch.cat([values, torch.zeros(5)])) == pytest.approx(2**1.5)


def test_a_change_of_zero_has_no_measures() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert all(map(math.isnan, (effective_rank(nothing), stable_rank(nothing))))
    assert math.isnan(energy(nothing, 10))


def test_share_outside_of_the_gradients_spaces() -> None:
    u, v = orthonormal(30, 6), orthonormal(20, 6, seed=1)
    gradient = MatrixDelta("W_out", 0, u[:, :3] * torch.tensor([9.0, 3.0, 1.0]), v[:, :3].T)
    inside = u[:, :3] @ random_matrix(3, 3) @ v[:, :3].T
    assert share_outside(dense(inside), gradient) == pytest.approx(0, abs=1e-12)
    outside = u[:, 3:] @ random_matrix(3, 3) @ v[:, 3:].T
    assert share_outside(dense(outside), gradient) == pytest.approx(1)
    # The row space alone is not enough.
    mixed = u[:, 3:] @ random_matrix(3, 3) @ v[:, :3].T
    assert share_outside(dense(mixed), gradient) == pytest.approx(1)
    both = inside / inside.norm() + math.sqrt(3) * outside / outside.norm()
    assert share_outside(dense(both), gradient) == pytest.approx(3 / 4)
    # Of a random matrix, the spaces hold 3 * 3 of 30 * 20 dimensions.
    shares = [share_outside(dense(random_matrix(30, 20, seed)), gradient) for seed in range(50)]
    assert sum(shares) / 50 == pytest.approx(1 - 9 / 600, abs=0.005)


def test_cosine_of_matrices() -> None:
    one = random_matrix(4, 3)
    assert cosine(one, 5 * one) == pytest.approx(1)
    assert cosine(one, -one) == pytest.approx(-1)
    other = random_matrix(4, 3, seed=1)
    assert cosine(one, other - (one * other).sum() / one.square().sum() * one) == pytest.approx(0)


# --- facts ----------------------------------------------------------------------------------------


def facts_with(
    tokens: Sequence[int], relations: str = "", before: tuple[int, ...] = ()
) -> TaughtFacts:
    """Facts with these first tokens, and one relation unless each has a letter."""
    n = len(tokens)
    prompts = tuple((at,) for at in range(n))
    answers = tuple((token, 7) for token in tokens)
    return TaughtFacts(prompts, answers, tuple(relations or "a" * n), before or (None,) * n)


def test_answers_are_shuffled_within_relations() -> None:
    facts = facts_with([1, 2, 3, 4, 5, 6, 7], "abababc")
    for seed in range(10):
        tokens = facts.shuffled(seed).first_tokens
        assert {*tokens[0:6:2]} == {1, 3, 5}
        assert {*tokens[1:6:2]} == {2, 4, 6}
        assert tokens[6] == 7  # alone in its relation
        assert all(new != old for new, old in zip(tokens[:6], facts.first_tokens, strict=False))


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, []),
        (2, [0, 3]),
        (3, [0, 3, 5]),
        (4, [0, 3, 1, 4]),
        (5, [0, 3, 1, 4, 5]),
        (9, [0, 3, 1, 4, 5]),
    ],
)
def test_first_facts_can_be_shuffled(n: int, expected: list[int]) -> None:
    facts = facts_with([1, 2, 8, 3, 4, 1, 5, 5], "abcabadd")  # c is alone, d has one answer
    assert [prompt for (prompt,) in facts.first(n).prompts] == sorted(expected)


def test_relations_of_the_facts_model() -> None:
    """They are those of the file from which the records were made."""
    rows = [row for row in blt.read_records("facts").rows if isinstance(row, Record)]
    file = files("backward_lens_tl") / "facts_model" / "facts.json"
    facts = json.loads(file.read_text(encoding="utf-8"))["facts"]
    known: dict[tuple[str, str], set[str]] = {}
    for each in facts:
        known.setdefault((each["subject"], each["answer"]), set()).add(each["relation"])
    groups: dict[str, list[set[str]]] = {}
    for found, row in zip(relations(rows), rows, strict=True):
        groups.setdefault(found, []).append(known[str(row.subject), str(row.answer).strip()])
    # A subject with one answer to two relations does not tell them apart.
    names = [set.intersection(*own) for own in groups.values()]
    assert all(names)
    assert len(set.union(*names)) == len(names) > 20


def test_relations_of_sentences() -> None:
    rows = [
        Record(0, "0", "Ann speaks", "x", "Ann", paraphrase_prompts=("It rains. Ann says it in",)),
        Record(1, "1", "Bob says it in", "y", "Bob"),
        Record(2, "2", "Bob lives in", "z", "Bob"),
        Record(3, "3", "Nobody", "z"),
    ]
    first, second, third, last = relations(rows)
    assert first == second != third
    assert {first, third} <= {"{} speaks", "{} says it in", "{} lives in"}
    assert last == ""


def test_shuffled_answers_are_not_those_of_before() -> None:
    """Training suppresses them, so that they would be too easy a control."""
    facts = facts_with([1, 2, 3], before=(2, 3, 1))
    assert all(facts.shuffled(seed).first_tokens == (3, 1, 2) for seed in range(10))


def test_other_answers_are_neither_taught_nor_true(
    facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups: list[Any] = []
    monkeypatch.setattr(
        training_runs._Setup, "measure", lambda self, run: setups.append(self) or {}
    )
    rows = blt.read_records("facts").rows
    with pytest.raises(KeyError):
        training_runs.training_runs(
            facts_model, blt.read_records("facts"), tmp_path, TrainingConfig(), progress=False
        )
    reader, host = setups[0].reader, host_of(facts_model)
    prompts = {*setups[0].facts.prompts}
    requests = tokenize_requests(host, [EditRequest.of(row) for row in rows], False)
    taught = [row for row, own in zip(rows, requests, strict=True) if own.prompt in prompts]
    texts = [text for row in taught for text in (row.target, row.answer)]
    excluded = {int(facts_model.to_tokens(text, prepend_bos=False)[0, 0]) for text in texts}
    assert len(taught) == 20
    assert not excluded & {*reader.unseen}
    assert len(reader.unseen) == len({*reader.taught})
    for permuted, compared, own in zip(
        reader.permuted, reader.compared, setups[0].facts.before, strict=True
    ):
        assert not compared or permuted != own
    assert sum(reader.compared) >= 15


def test_shuffled_answers_are_a_permutation_without_fixed_facts() -> None:
    facts = facts_with([n // 2 for n in range(9)])
    shuffled = facts.shuffled(0)
    assert shuffled.prompts == facts.prompts
    assert sorted(shuffled.answers) == sorted(facts.answers)
    assert all(a != b for a, b in zip(shuffled.answers, facts.answers, strict=True))
    assert facts.shuffled(0) == shuffled != facts.shuffled(1)


def test_shuffled_answers_keep_as_few_as_possible() -> None:
    facts = facts_with([5, 5, 6])  # one of them keeps a 5
    kept = zip(facts.shuffled(0).answers, facts.answers, strict=True)
    assert sum(a == b for a, b in kept) == 1


def test_one_answer_cannot_be_shuffled() -> None:
    facts = facts_with([5, 5, 6], "aab")
    with pytest.raises(InputError, match="with the same token in each relation of the 3 facts"):
        facts.shuffled(0)


# --- training -------------------------------------------------------------------------------------


def test_sgd_is_that_of_the_real_weights(small: Any) -> None:
    """The change equals that of weights which torch's own SGD trains, batch by batch."""
    before = tensors_checksum(host_of(small).parameters())
    ends = trained(small, "sgd", steps=(1, 5))
    assert tensors_checksum(host_of(small).parameters()) == before
    assert not any(each.requires_grad and each.grad is not None for each in small.parameters())
    model, facts = copy.deepcopy(small), facts_of(small)
    host = host_of(model)
    sites = find_editable(host, "mlp", None, mlp_only=True)
    weights = [site.weight.parameter for site in sites]
    starts = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(1, 6):
        if not order:
            order = torch.randperm(4, generator=generator).tolist()
        batch, order = order[:2], order[2:]
        losses = []
        for fact in batch:  # one by one, without padding
            ids = [*facts.prompts[fact], *facts.answers[fact]]
            n = len(facts.prompts[fact])
            logits = model(torch.tensor([ids[:-1]]), return_type="logits")[0, n - 1 :]
            chosen = logits.log_softmax(-1)[range(len(ids) - n), ids[n:]]
            losses.append(-chosen.mean())
        gradients = torch.autograd.grad(sum(losses) / 2, weights)
        rate = ends[0].rate * (1 - (step - 1) / 5)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(rate * gradient)
    for site, weight, start, found in zip(sites, weights, starts, ends[-1].changes, strict=True):
        expected = site.joined(site.weight.in_out(weight.detach() - start))
        # The real weights round what is added to them, which is about 1e-3 of their size.
        assert torch.allclose(found.change.dense(), expected, atol=1e-13, rtol=1e-9)
        assert float(expected.norm()) > 1e-3


@pytest.mark.parametrize(("optimizer", "is_descent"), [("sgd", True), ("adam", False)])
def test_only_sgd_writes_the_sum_of_the_gradients(
    small: Any, optimizer: Any, is_descent: bool
) -> None:
    for checkpoint in trained(small, optimizer):
        for found in checkpoint.changes:
            is_equal = torch.allclose(found.change.dense(), found.descent, atol=1e-14)
            assert is_equal == is_descent
            assert (cosine(found.change.dense(), found.descent) > 0.999) == is_descent
            assert (share_outside(found.step, found.gradient) < 1e-12) == is_descent


def test_gradients_are_those_of_the_weights(small: Any) -> None:
    """At the first step of either kind, before the weights differ."""
    host, facts = host_of(small), facts_of(small, 2)
    sites = find_editable(host, "mlp", None, mlp_only=True)
    own = [site.weight.parameter.requires_grad_() for site in sites]
    batch = facts.batch(host, range(2))
    expected = torch.autograd.grad(batch.nll(batch.logits(host)).mean(), own)
    for rank in (None, 3):
        [first] = trained(small, "sgd", facts=facts, rank=rank, steps=(1,))
        for found, site, gradient in zip(first.changes, sites, expected, strict=True):
            dense_gradient = site.joined(site.weight.in_out(gradient))
            assert torch.allclose(found.gradient.dense(), dense_gradient, atol=1e-13, rtol=1e-9)


def test_lora_has_its_rank(small: Any) -> None:
    ends = trained(small, "adam", rank=3)
    for found in ends[-1].changes:
        assert found.change.rank() == 3
        assert found.step.rank() <= 6  # a difference of two products
        total = ends[0].changes[ends[-1].changes.index(found)].change
        assert not torch.allclose(total.dense(), found.change.dense())


def test_muon_makes_singular_values_equal(small: Any) -> None:
    """In the gradient's space all directions weigh about the same; SGD's do not."""
    spreads = {}
    for optimizer in ("muon", "sgd"):
        [first] = trained(small, optimizer, steps=(1,))
        found = first.changes[0]
        u, s, vh = found.gradient.svd()
        n = int((s > 0.03 * s[0]).sum())  # the iterations do not lift smaller ones fully
        values = torch.linalg.svdvals(u[:, :n].T @ found.step.dense().double() @ vh[:n].T)
        spreads[optimizer] = float(values[0] / values[-1])
        assert n > 3
    assert spreads["muon"] < 2 < 4 < spreads["sgd"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_rates_lower_the_loss_by_a_share_to_first_order(optimizer: Any) -> None:
    """A quadratic loss, whose first order is known: the gradient at w is `w - goal`."""
    goal = random_matrix(5, 4).float()
    leaf = torch.zeros(5, 4, requires_grad=True)
    loss = 0.5 * (leaf - goal).square().sum()
    rate = matched_rate(optimizer, [leaf], loss, 0.1)
    # bfloat16 in Muon has a relative precision of 0.4 %.
    size = {"sgd": goal.square().sum(), "adam": goal.abs().sum()}.get(optimizer)
    if size is None:
        step = torch.zeros(5, 4, requires_grad=True)
        step.grad = -goal
        torch.optim.Muon([step], lr=1.0, weight_decay=0.0).step()
        size = (step.detach() * goal).sum()
    assert rate * float(size) == pytest.approx(0.1 * float(loss), rel=1e-4)


@pytest.mark.parametrize("rank", [None, 3])
def test_muon_sees_weights_as_torch_stores_them(small: Any, rank: int | None) -> None:
    """Its steps are longer by `sqrt(out / in)` where the output is wider."""
    site = find_editable(host_of(small), "mlp", [0], mlp_only=True)
    by_name = {each.matrix: each for each in site}
    change = {name: TrainedChange(each, rank, torch.Generator()) for name, each in by_name.items()}
    d_in, d_out = by_name["W_in"].shape
    assert d_out > d_in
    wide, narrow = (change[name].leaves for name in ("W_in", "W_out"))
    inner = rank or d_in
    for leaves, (n_in, n_out) in ((wide, (d_in, d_out)), (narrow, (d_out, d_in))):
        shapes = [(n_out, n_in)] if rank is None else [(rank, n_in), (n_out, rank)]
        assert [tuple(leaf.shape) for leaf in leaves] == shapes
    for leaf, factor in ((wide[-1], math.sqrt(d_out / inner)), (narrow[0], 1.0)):
        before = leaf.detach().clone()
        leaf.grad = random_matrix(*leaf.shape).to(leaf.dtype)
        torch.optim.Muon([leaf], lr=0.1, weight_decay=0.0).step()
        values = torch.linalg.svdvals((leaf.detach() - before).double())
        # The iterations leave singular values between 0.7 and 1.2.
        assert float(values.min()) / (0.1 * factor) > 0.6
        assert float(values.max()) / (0.1 * factor) < 1.3


def test_shuffled_answers_have_the_rate_of_the_taught(small: Any) -> None:
    facts = facts_of(small)
    runs = [
        trained(small, "adam", facts=each, rate_of=facts, steps=(1,))
        for each in (facts, facts.shuffled(0))
    ]
    own = trained(small, "adam", facts=facts.shuffled(0), steps=(1,))
    assert runs[0][0].rate == runs[1][0].rate != own[0].rate


def test_a_loss_that_does_not_depend_on_the_weights() -> None:
    leaf = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(InputError, match="does not depend on the trained matrices"):
        matched_rate("sgd", [leaf], 0 * leaf.sum() + 1, 0.1)


def test_an_older_torch_has_no_muon(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"has no torch\.optim\.Muon; install torch 2\.9"):
        trained(small, "muon", steps=(1,))


# --- readings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(facts_model: Any) -> Reader:
    host = host_of(facts_model)
    records = blt.read_records("facts").rows[:8]
    requests = tokenize_requests(host, [EditRequest.of(row) for row in records], False)
    facts = TaughtFacts.of(requests, [""] * 8, [None] * 8)
    unseen = [5, 6, 7]
    return Reader.of(
        host, facts, facts.shuffled(0), unseen, find_editable(host, "mlp", [2], mlp_only=True)
    )


def columns_of(model: Any, tokens: Any) -> Tensor:
    columns: Tensor = model.W_U[:, list(tokens)].T.detach()
    return columns


def directions(reader: Reader, change: MatrixDelta) -> Mapping[str, float]:
    u, _, vh = change.svd()
    return reader.directions(change, u, vh)


def test_directions_that_are_answers_are_found(facts_model: Any, reader: Reader) -> None:
    inputs = orthonormal(512, 8).float()
    # Each outer product is so much shorter than the last that they are the singular directions.
    written = columns_of(facts_model, reader.taught) * 0.3 ** torch.arange(8)[:, None]
    found = directions(reader, MatrixDelta("W_out", 2, inputs, written))
    assert found["answers_found"] == 1
    assert found["unseen_found"] < 1
    other = orthonormal(512, 10, seed=3).float(), random_matrix(10, 128).float()
    random = directions(reader, MatrixDelta("W_out", 2, *other))
    assert random["answers_found"] <= 0.5
    assert random["peak"] < found["peak"]
    # One direction shows its token whatever its sign.
    alone = []
    for sign in (1, -1):
        one = MatrixDelta("W_out", 2, inputs[:, :1], sign * written[:1])
        alone.append(directions(reader, one)["answers_found"])
    assert alone[0] == alone[1] >= 1 / len(set(reader.taught))


def test_reading_matrices_are_read_at_their_inputs(facts_model: Any, reader: Reader) -> None:
    reads, hidden = columns_of(facts_model, reader.taught[:1]).T, random_matrix(1, 512).float()
    found = directions(reader, MatrixDelta("W_in", 2, reads, hidden))
    assert found["answers_found"] >= 1 / len(set(reader.taught))
    other = directions(reader, MatrixDelta("W_in", 2, orthonormal(128, 1).float(), hidden))
    assert other["answers_found"] < found["answers_found"]
    assert all(map(math.isnan, reader.responses(MatrixDelta("W_in", 2, reads, hidden)).values()))


def test_responses_that_are_answers_are_near(facts_model: Any, reader: Reader) -> None:
    """With a change that maps each input to the column of its answer."""
    left = torch.linalg.pinv(reader.inputs[2].double()).float()
    for tokens, expected in (
        (reader.taught, {"taught_near": 1.0, "permuted_near": 0.0}),
        (reader.permuted, {"taught_near": 0.0, "permuted_near": 1.0}),
    ):
        found = reader.responses(MatrixDelta("W_out", 2, left, columns_of(facts_model, tokens)))
        assert found == pytest.approx(expected, abs=0.13)  # similar answers are near each other


def test_no_change_has_no_readings(reader: Reader) -> None:
    nothing = MatrixDelta("W_out", 2, values=torch.zeros(512, 128))
    assert all(map(math.isnan, [*directions(reader, nothing).values()]))
    assert all(map(math.isnan, [*reader.responses(nothing).values()]))


# --- verdicts -------------------------------------------------------------------------------------

USUAL: Mapping[str, Mapping[str, float]] = {
    "sgd": {"energy_10": 0.9, "cosine": 1.0, "step_outside": 0.0},
    "adam": {"energy_10": 0.4, "cosine": 0.3, "step_outside": 0.8},
    "muon": {"energy_10": 0.2, "cosine": 0.4, "step_outside": 0.1},
}
NUMBERS = [column.name for column in training_runs.CHANGES if not column.is_key]


def finding(**changed: Mapping[str, float]) -> Finding:
    """The finding of tables as expected, except for some numbers of some rows.

    Names of rows are `optimizer`, or with weights, answers and step, joined by `_`.
    """
    rows, losses = [], []
    keys = [
        *((name, weights, answers, step) for name in USUAL for weights in ("full", "lora")
          for answers in ("taught", "shuffled") for step in (1, 10)),
        ("random", "full", "none", 0), ("random", "lora", "none", 0),
        ("untrained", "full", "none", 0),
    ]  # fmt: skip
    for name, weights, answers, step in keys:
        about = {"optimizer": name, "weights": weights, "answers": answers, "step": step}
        if step:
            losses.append({**about, "rate": 0.1, "loss": 0.2, "learned": 1.0})
        is_taught = answers == "taught"
        own = {
            **dict.fromkeys(NUMBERS, 1.0),
            **USUAL.get(name, {}),
            "answers_found": 0.9 if step else 0.2,
            "unseen_found": 0.1,
            "taught_near": 0.8 if is_taught else 0.1,
            "permuted_near": 0.1 if is_taught else 0.8,
            **changed.get(name, {}),
            **changed.get(f"{name}_{weights}_{answers}_{step}", {}),
        }
        for matrix in ("W_in", "W_out"):
            here = own | (
                {"taught_near": math.nan, "permuted_near": math.nan} if matrix == "W_in" else {}
            )
            rows += [{**about, "matrix": matrix, "layer": layer, **here} for layer in (0, 1)]
    return training_changes.finding_of(pd.DataFrame(losses), pd.DataFrame(rows), "a note")


def holds(found: Finding) -> list[bool]:
    values = [check.holds for check in found.checks]
    assert all(type(each) is bool for each in values)  # JSON does not support numpy's bools
    return values


def test_what_was_expected() -> None:
    found = finding()
    assert found.verdict == "holds"
    assert holds(found) == [True] * 8
    assert found.checks[0].found == (
        "1: sgd 90 %, adam 40 %, muon 20 %; 10: sgd 90 %, adam 40 %, muon 20 %"
    )
    assert found.checks[4].found.endswith("random 20 %; the untrained matrix 20 %")
    assert found.notes[0] == "a note"
    assert "lora, shuffled: sgd 100 %" in found.notes[2]
    assert len(found.tables["means"]) == (24 + 3) * 2
    for draw in found.figures.values():
        for backend in ("plotly", "matplotlib"):
            draw(backend=backend)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"adam_full_taught_1": {"energy_10": 0.95}}, [0]),
        ({"adam_full_taught_10": {"energy_10": 0.95}}, [0, 1]),
        ({"muon_full_taught_10": {"energy_10": 0.5}}, [1]),
        ({"sgd": {"energy_10": 0.49}}, [1]),
        ({"sgd_full_taught_1": {"step_outside": 0.02}}, [2]),
        ({"adam_full_taught_1": {"step_outside": 0.49}}, [2]),
        ({"muon_full_taught_1": {"step_outside": 0.26}}, [2]),
        # Later steps have earlier gradients' directions.
        ({"adam_full_taught_10": {"step_outside": 0.1}}, []),
        ({"adam_full_taught_10": {"cosine": 0.5}}, [3]),
        ({"sgd": {"cosine": 0.9}}, []),
        ({"muon_lora_taught_10": {"answers_found": 0.59}}, [4]),
        ({"muon_lora_taught_10": {"answers_found": 0.61}}, []),
        ({"random_lora_none_0": {"answers_found": 0.31}}, [4]),
        ({"sgd_lora_taught_10": {"unseen_found": 0.46}}, [5]),
        ({"sgd_full_taught_10": {"taught_near": 0.75}}, []),
        ({"sgd_full_taught_10": {"taught_near": 0.5}}, [6, 7]),
        ({"sgd_full_taught_10": {"permuted_near": 0.41}}, [6]),
        ({"sgd_full_shuffled_10": {"permuted_near": 0.69}}, [7]),
        ({"sgd_full_shuffled_10": {"permuted_near": 0.91}}, [7]),
        ({"sgd_full_shuffled_10": {"taught_near": 0.41}}, [7]),
        ({"sgd_lora_taught_10": {"taught_near": 0.0}}, []),
    ],
)
def test_what_was_not_expected(changed: Any, failing: list[int]) -> None:
    assert [at for at, each in enumerate(holds(finding(**changed))) if not each] == failing


# --- small real runs ------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on the first layer."""
    few = partial(TrainingConfig, steps=(1, 2), layers=1)
    monkeypatch.setattr(training_changes, "TrainingConfig", few)


@pytest.mark.usefixtures("as_for_a_user", "few_steps")
def test_training_on_a_small_model(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tensors_checksum(host_of(small).parameters())
    measure = partial(reproduce, small, ROWS, tmp_path, "training", progress=False)
    finding = measure(prompts=4)["training"]
    assert tensors_checksum(host_of(small).parameters()) == before
    changes = finding.tables["by layer"]
    assert len(changes) == (12 * 2 + 3) * 2  # runs and steps, and controls, of two matrices
    assert len(finding.checks) == 8
    for matrix in ("W_in", "W_out"):
        [site] = find_editable(host_of(small), matrix, [0], mlp_only=True)
        own = changes[changes["matrix"] == matrix]
        norm = float(site.weight.parameter.detach().norm())
        assert torch.allclose(
            torch.tensor(list(own["relative_norm"] * norm)), torch.tensor(list(own["norm"]))
        )
    rates = finding.tables["losses"].groupby(["optimizer", "weights"])["rate"].nunique()
    assert (rates == 1).all()
    assert (changes["answers_found"].between(0, 1)).all()
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "sweep").exists()
    # It resumes with what is there.
    shards = sorted((tmp_path / "training").glob("*/shard-000001.parquet"))
    assert len(shards) == 2
    for shard in shards:
        shard.unlink()
    trained_runs = []
    monkeypatch.setattr(
        training_runs,
        "train",
        lambda *args, **given: trained_runs.append(args[3]) or train(*args, **given),
    )
    again = measure(prompts=4)["training"]
    assert trained_runs == ["sgd"]
    pd.testing.assert_frame_equal(again.tables["by layer"], changes)
    with pytest.raises(InputError, match="was 4, is 3"):
        measure(prompts=3)
    with pytest.raises(
        InputError, match=r"training needs two or more facts of one relation.*: 5 of the 5"
    ):
        reproduce(small, ROWS, tmp_path / "one", "training", prompts=1, progress=False)


def test_an_interruption_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model
    trains = [parameter.requires_grad for parameter in model.parameters()]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_runs._Setup, "_of_training", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback
        reproduce(model, ROWS, tmp_path, "training", prompts=4, progress=False)
    assert kept.tb is not None
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert not host_of(model).hooked_modules


@pytest.mark.parametrize(
    ("n_layers", "most", "expected"),
    [(8, 8, [*range(8)]), (30, 8, [0, 4, 8, 12, 17, 21, 25, 29]), (3, 1, [0]), (1, 8, [0])],
)
def test_layers_are_spread_evenly(n_layers: int, most: int, expected: list[int]) -> None:
    assert training_runs._spread(n_layers, most) == expected


@pytest.mark.parametrize("steps", [(), (2, 1), (1, 1)])
def test_steps_ascend(steps: Any) -> None:
    with pytest.raises(InputError, match="pass ascending numbers, at least one"):
        TrainingConfig(steps=steps)
