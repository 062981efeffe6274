"""MEND: networks, edits and training, against slow computations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import HAS_HOOKED, Case, build, counting_mlps
from torch import Tensor

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend import training as mend_training
from backward_lens_tl.editing.mend.data import TrainingData
from backward_lens_tl.editing.mend.hypernetwork import MENDEditor, ResidualLayer
from backward_lens_tl.editing.mend.losses import edit_losses
from backward_lens_tl.editing.mend.mend import MEND
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.mend.training import train_mend
from backward_lens_tl.editing.methods.normalized_gradient import NormalizedGradient
from backward_lens_tl.editing.requests import EditRequest, tokenize_request
from backward_lens_tl.editing.spanning_pairs import spanning_pairs
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError, ResultFileError
from backward_lens_tl.models import host_of, resumption
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite

RECORDS = tuple(
    Record(
        index=at,
        id=str(at),
        prompt=prompt,
        target=target,
        subject=subject,
        subject_start=None,
        answer=None,
        paraphrase_prompts=paraphrases,
        neighborhood_prompts=neighbors,
        generation_prompts=(f"{subject} is in",),
    )
    for at, (prompt, target, subject, paraphrases, neighbors) in enumerate(
        [
            (
                "The capital of France is",
                " Rome runs",
                "France",
                ("Paris is not. The capital of France",),
                ("The capital of Italy is", "The king of Rome"),
            ),
            (
                "Messi plays for",
                " Rome",
                "Messi",
                ("The dog of Messi plays for", "Messi is"),
                ("The king plays for", "A dog"),
            ),
            (
                "A river runs",
                " of the king",
                "river",
                ("The river",),
                ("The dog of the king runs", "The ball"),
            ),
        ]
    )
)
REQUESTS = [EditRequest.of(record) for record in RECORDS]
SHORT = MENDTraining(
    steps=4, edits_per_step=2, n_locality=3, lr=1e-3, rate_lr=1e-3, initial_rate=0.01
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(case: Case) -> PairStatistics:
    return pair_statistics(
        case.model,
        REQUESTS,
        matrices=("W_in", "W_out"),
        layers=[0, 1, 2],
        prepend_bos=False,
        progress=False,
    )


def untrained(case: Case, **more: Any) -> MENDEditor:
    return MENDEditor.untrained(statistics_of(case), **more)


def learned(case: Case, size: float = 0.1) -> MENDEditor:
    """An editor in which every learned parameter differs from the identity."""
    editor = untrained(case, lr=0.02)
    moved = [
        each
        + size * random(*each.shape, seed=at) * (1 if each.ndim > 1 or each.numel() > 6 else 0.1)
        for at, each in enumerate(editor.parameters)
    ]
    return editor.with_parameters(moved)


def train(case: Case, **more: Any) -> MENDEditor:
    settings = {
        "training": SHORT,
        "layers": (0, -1),
        "prepend_bos": False,
        "progress": False,
        "seed": 3,
    }
    return train_mend(case.model, more.pop("records", RECORDS), **(settings | more))


def same(first: MENDEditor, second: MENDEditor) -> bool:
    pairs = zip(
        [*first.parameters, *first.statistics.mean, *first.statistics.std, first.losses],
        [*second.parameters, *second.statistics.mean, *second.statistics.std, second.losses],
        strict=True,
    )
    return all(torch.equal(own, other) and own.dtype == other.dtype for own, other in pairs)


# --- the networks -----------------------------------------------------------------------------


def test_an_untrained_editor_makes_the_edits_of_the_normalized_gradient(one_gpt2: Case) -> None:
    editor = untrained(one_gpt2, lr=0.03)
    found = MEND(editor, prepend_bos=False)(one_gpt2.model, REQUESTS)
    plain = NormalizedGradient(editor.statistics, lr=0.03, prepend_bos=False)
    expected = plain(one_gpt2.model, REQUESTS)
    assert len(found.matrices) == 6
    for own, other in zip(found.matrices, expected.matrices, strict=True):
        assert (own.matrix, own.layer) == (other.matrix, other.layer)
        assert torch.allclose(own.dense(), other.dense(), rtol=1e-6, atol=0)  # lr in float32
    moved = MEND(learned(one_gpt2), prepend_bos=False)(one_gpt2.model, REQUESTS)
    difference = moved.matrices[0].dense() - expected.matrices[0].dense()
    assert float(difference.norm()) > 0.01 * float(expected.matrices[0].dense().norm())


def slow_layer(layer: ResidualLayer, row: np.ndarray, matrix: int) -> np.ndarray:
    down, up, bias = (each.numpy() for each in (layer.down, layer.up, layer.bias))
    scale, shift = layer.scale[matrix].numpy(), layer.shift[matrix].numpy()
    out = row.copy()
    inner = [sum(row[i] * down[i, r] for i in range(len(row))) for r in range(down.shape[1])]
    for j in range(len(row)):
        value = sum(inner[r] * up[r, j] for r in range(len(inner))) + bias[j]
        out[j] += max(0.0, scale[j] * value + shift[j])
    return out


def test_the_edit_matches_a_loop_over_positions(gpt2: Case) -> None:
    editor = learned(gpt2)
    delta = MEND(editor, prepend_bos=False)(gpt2.model, REQUESTS[:2])
    host = host_of(gpt2.model)
    requests = [tokenize_request(host, each, False) for each in REQUESTS[:2]]
    places = [("W_out", 0), ("W_in", 2), ("W_out", 2)]
    for place in places:
        at = editor.statistics.places.index(place)
        mean, std = (each[at].numpy() for each in (editor.statistics.mean, editor.statistics.std))
        [network] = [each for each in editor.networks if place in each.places]
        assert {name for name, _ in network.places} == {place[0]}
        [pairs] = spanning_pairs(host, requests, find_editable(host, *place))
        expected: Any = 0
        for inputs, vjps in zip(
            *(each[pairs.mask].numpy() for each in (pairs.inputs, pairs.vjps)), strict=True
        ):
            row = (np.concatenate([inputs, vjps]) - mean) / (std + 1e-7)
            for layer in network.layers:
                row = slow_layer(layer, row, network.places.index(place))
            n = len(inputs)
            expected = expected - float(editor.rates[at]) * np.outer(row[:n], row[n:])
        found = next(each for each in delta.matrices if (each.matrix, each.layer) == place)
        np.testing.assert_allclose(found.dense().numpy(), expected, rtol=1e-7, atol=1e-10)


def test_matrices_of_one_shape_share_a_network_but_not_scale_and_shift(one_gpt2: Case) -> None:
    editor = untrained(one_gpt2)
    assert [network.places for network in editor.networks] == [
        tuple(("W_in", layer) for layer in range(3)),
        tuple(("W_out", layer) for layer in range(3)),
    ]
    width = 24 + 52
    own = 2 * (2 * width * width + width + 3 * 2 * width)
    assert editor.n_parameters == 2 * own + 6
    assert editor.rates.dtype == editor.networks[0].layers[0].down.dtype == torch.float64


def test_the_first_factor_has_variance_one_over_width_and_depends_on_the_seed(
    one_gpt2: Case,
) -> None:
    first, again, other = (untrained(one_gpt2, seed=seed) for seed in (0, 0, 1))
    layers = [layer for network in first.networks for layer in network.layers]
    for layer in layers:
        assert abs(float(layer.down.std()) * 76**0.5 - 1) < 0.05
    assert same(first, again)
    assert not torch.equal(layers[0].down, other.networks[0].layers[0].down)
    assert not torch.equal(layers[0].down, layers[1].down)


# --- the losses ---------------------------------------------------------------------------------


def drawn_from(case: Case) -> tuple[Any, list[Any], Any]:
    host = host_of(case.model)
    data = TrainingData.of(host, RECORDS, None, False)
    return host, data.draw(replace(SHORT, edits_per_step=3, n_locality=4), 0, 0), data


def slow_losses(case: Case, editor: MENDEditor, drawn: Sequence[Any]) -> tuple[float, float]:
    """Losses with really changed weights, one edit and one prompt at a time."""
    nlls, divergences = [], []
    for each in drawn:
        delta = MEND(editor, prepend_bos=False)(case.model, each.request.request)
        terms, n = 0.0, 0
        row = torch.tensor([[*each.outer.prompt, *each.outer.target[:-1]]])
        with torch.no_grad():
            before = [case.model(torch.tensor([row])).log_softmax(-1) for row in each.locality]
            with delta.applied(case.model):
                logits = case.model(row).log_softmax(-1)[0]
                after = [case.model(torch.tensor([row])).log_softmax(-1) for row in each.locality]
        first = len(each.outer.prompt) - 1
        said = [float(logits[first + at, token]) for at, token in enumerate(each.outer.target)]
        nlls.append(-sum(said) / len(said))
        for old, new in zip(before, after, strict=True):
            terms += float((old.exp() * (old - new)).sum())
            n += old.shape[1]
        divergences.append(terms / n)
    return sum(nlls) / len(nlls), sum(divergences) / len(divergences)


def test_the_losses_match_models_with_really_edited_weights(gpt2: Case) -> None:
    host, drawn, _ = drawn_from(gpt2)
    editor = learned(gpt2)
    sites = find_editable(host, ("W_in", "W_out"), [0, 1, 2])
    found = [float(each) for each in edit_losses(host, sites, editor, drawn)]
    expected = slow_losses(gpt2, editor, drawn)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    none = editor.with_parameters([*editor.parameters[:-1], 0 * editor.rates])
    at_rest = [float(each) for each in edit_losses(host, sites, none, drawn)]
    assert abs(at_rest[1]) < 1e-12 < found[1]
    assert abs(at_rest[0] - found[0]) > 1e-3


def test_the_layers_below_an_edit_run_once_for_prompts_to_leave_unchanged(
    gpt2: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same losses, bit for bit, as passes of the whole model."""
    host, drawn, _ = drawn_from(gpt2)
    editor, sites = learned(gpt2), find_editable(host, ("W_in", "W_out"), [0, 1, 2])
    late = [site for site in sites if site.layer]

    def losses(own: Sequence[MatrixSite]) -> tuple[list[float], list[int]]:
        ran.clear()
        found = [float(each) for each in edit_losses(host, own, editor, drawn)]
        return found, [ran.count(layer) for layer in range(3)]

    resumption.can_start_at(host, 1)  # probes the model
    ran = counting_mlps(gpt2.model, monkeypatch)
    found, late_counts = losses(late)
    monkeypatch.setattr(resumption, "can_start_at", lambda host, layer: False)
    whole, all_counts = losses(late)
    assert found == whole
    assert [more - less for more, less in zip(all_counts, late_counts, strict=True)] == [1, 0, 0]


def test_the_gradient_through_the_edited_pass_matches_finite_differences(one_gpt2: Case) -> None:
    host, _, data = drawn_from(one_gpt2)
    drawn = data.draw(replace(SHORT, edits_per_step=2, n_locality=2), 0, 0)
    sites = find_editable(host, ("W_in", "W_out"), [0, 1, 2])
    start = learned(one_gpt2)

    def loss(parameters: Sequence[Tensor]) -> Tensor:
        edit, kept = edit_losses(host, sites, start.with_parameters(parameters), drawn)
        return 0.3 * edit + kept

    leaves = [each.clone().requires_grad_() for each in start.parameters]
    gradients = torch.autograd.grad(loss(leaves), leaves)
    h = 1e-6
    for at, gradient in enumerate(gradients):
        way = random(*gradient.shape, seed=at)
        above, below = (
            loss(
                [
                    each + sign * h * way if at == i else each
                    for i, each in enumerate(start.parameters)
                ]
            )
            for sign in (1, -1)
        )
        expected = float(above - below) / (2 * h)
        found = float((gradient * way).sum())
        # Central differences lose about h^2 and eps / h; kinks of ReLU add errors of order h.
        assert abs(found - expected) < 1e-6 + 1e-4 * abs(expected), at
        assert found != 0


# --- training -----------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_changes_every_parameter(one_gpt2: Case) -> None:
    training = replace(SHORT, steps=10, edits_per_step=3, lr=3e-3, rate_lr=3e-3)
    editor = train(one_gpt2, training=training)
    begun = MENDEditor.untrained(editor.statistics, lr=training.initial_rate, seed=3)
    assert len(editor.losses) == 10
    host, drawn, _ = drawn_from(one_gpt2)
    sites = find_editable(host, ("W_in", "W_out"), [0, 2])

    def loss(editor: MENDEditor) -> float:
        edit, kept = edit_losses(host, sites, editor, drawn)
        return training.edit_weight * float(edit) + training.locality_weight * float(kept)

    assert loss(editor) < 0.9 * loss(begun)
    for own, before in zip(editor.parameters, begun.parameters, strict=True):
        assert own.shape == before.shape
        assert not torch.equal(own, before)


def test_the_same_arguments_give_the_same_editor_and_another_seed_another(one_gpt2: Case) -> None:
    training = replace(SHORT, steps=2)
    first, again, other = (train(one_gpt2, training=training, seed=seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not same(first, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_training_leaves_the_model_and_random_state_unchanged(gpt2: Case, mode: Any) -> None:
    model = gpt2.model
    parameters = list(model.parameters())
    before = [each.detach().clone() for each in parameters]
    tracked = [each.requires_grad for each in parameters]
    parameters[0].grad = mark = torch.ones_like(parameters[0])
    state = torch.random.get_rng_state()
    try:
        with mode():
            train(gpt2, training=replace(SHORT, steps=1))
        assert parameters[0].grad is mark
        assert bool((mark == 1).all())
        assert all(each.grad is None for each in parameters[1:])
    finally:
        parameters[0].grad = None
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, parameters))
    assert [each.requires_grad for each in parameters] == tracked
    assert not host_of(model).hooked_modules


class Interrupted(Exception):
    pass


def test_interrupted_training_resumes_to_the_same_editor(
    one_gpt2: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(SHORT, save_every=2, steps=5)
    expected = train(one_gpt2, training=training)
    file = tmp_path / "mend.safetensors"
    step, done = mend_training._Training.step, 0

    def breaking(self: Any) -> None:
        nonlocal done
        if done == 3:
            raise Interrupted
        done += 1
        step(self)

    monkeypatch.setattr(mend_training._Training, "step", breaking)
    with pytest.raises(Interrupted):
        train(one_gpt2, training=training, out=file)
    with pytest.raises(EditError, match="an unfinished training run after 2 steps"):
        MENDEditor.load(file)
    done = -10  # two of five steps are in the file: three remain
    with pytest.raises(EditError, match=r"holds a training run with lr 0\.001, not 0\.5"):
        train(one_gpt2, training=replace(training, lr=0.5), out=file)
    with pytest.raises(EditError, match="holds a training run with records"):
        train(one_gpt2, training=training, out=file, records=RECORDS[:2])
    found = train(one_gpt2, training=training, out=file)
    assert done == -7
    assert same(found, expected)
    again = train(one_gpt2, training=training, out=file)
    assert done == -7
    assert same(again, expected)
    assert same(MENDEditor.load(file), expected)


def test_a_saved_editor_is_loaded_bit_for_bit_and_makes_the_same_edits(
    one_gpt2: Case, tmp_path: Path
) -> None:
    editor = train(one_gpt2)
    editor.save(tmp_path / "mend.safetensors")
    again = MENDEditor.load(tmp_path / "mend.safetensors")
    assert same(editor, again)
    assert again.training == json.loads(json.dumps({**editor.training})) | {
        "places": tuple(tuple(each) for each in editor.training["places"])
    }
    assert again.fingerprint == editor.fingerprint
    assert "after 4 steps" in editor.fingerprint
    assert editor.training["n_records"] == 3
    first, second = (
        MEND(each, prepend_bos=False)(one_gpt2.model, REQUESTS[0]) for each in (editor, again)
    )
    for own, other in zip(first.matrices, second.matrices, strict=True):
        assert torch.equal(own.dense(), other.dense())
    assert MEND(editor).settings() == {
        "method": "MEND",
        "editor": editor.fingerprint,
        "prepend_bos": None,
    }
    editor.statistics.save(tmp_path / "statistics.safetensors")
    with pytest.raises(ResultFileError, match="holds a PairStatistics, not a MENDEditor"):
        train(one_gpt2, out=tmp_path / "statistics.safetensors")


# --- samples --------------------------------------------------------------------------------------


def test_each_record_comes_once_per_epoch_with_its_own_neighbors(one_gpt2: Case) -> None:
    host, _, data = drawn_from(one_gpt2)
    training = replace(SHORT, edits_per_step=2, n_locality=4)
    drawn = [each for step in range(15) for each in data.draw(training, 7, step)]
    prompts = [each.request.request.prompt for each in drawn]
    for epoch in range(10):
        assert sorted(prompts[3 * epoch : 3 * epoch + 3]) == sorted(r.prompt for r in RECORDS)
    by_prompt = {record.prompt: record for record in RECORDS}
    outer = set()
    for each in drawn:
        record = by_prompt[each.request.request.prompt]
        texts = [host.tokenizer.decode(row) for row in each.locality]
        assert len(texts) == 4
        assert set(texts[:2]) == set(record.neighborhood_prompts)
        assert not any(str(record.subject) in text for text in texts)
        assert each.outer.target == each.request.target
        outer.add(host.tokenizer.decode(each.outer.prompt))
    assert outer == {
        text for record in RECORDS for text in (record.prompt, *record.paraphrase_prompts)
    }
    assert data.draw(training, 7, 5) == data.draw(training, 7, 5) != data.draw(training, 8, 5)
    alone = replace(data, examples=data.examples[:1])
    for seeds, steps in (((0, 1, 2, 3, 4, 5), (0,)), ((0,), (0, 1, 2, 3, 4, 5))):
        own = [alone.draw(training, seed, step)[0].locality for seed in seeds for step in steps]
        assert len(set(own)) > 1


def test_every_step_samples_new_edits(one_gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, asked = TrainingData.draw, []

    def watched(self: Any, training: MENDTraining, seed: int, step: int) -> list[Any]:
        asked.append((seed, step))
        return draw(self, training, seed, step)

    monkeypatch.setattr(TrainingData, "draw", watched)
    train(one_gpt2)
    assert asked == [(3, 0), (3, 1), (3, 2), (3, 3)]


def test_locality_texts_with_the_subject_are_not_used(one_gpt2: Case) -> None:
    host = host_of(one_gpt2.model)
    texts = ["The dog runs", "Messi runs", "The ball of France"]
    data = TrainingData.of(host, RECORDS, texts, False)
    drawn = [each for step in range(9) for each in data.draw(SHORT, 0, step)]
    seen: dict[str, set[str]] = {}
    for each in drawn:
        far = {host.tokenizer.decode(row) for row in each.locality[1:]}
        seen.setdefault(str(each.request.request.subject), set()).update(far)
    assert seen == {
        "France": set(texts[:2]),
        "Messi": {texts[0], texts[2]},
        "river": set(texts),
    }


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_for_a_user")
def test_training_needs_records(one_gpt2: Case) -> None:
    with pytest.raises(EditError, match="records is empty"):
        train(one_gpt2, records=[])
    with pytest.raises(EditError, match="is a EditRequest; pass a Record"):
        train(one_gpt2, records=REQUESTS)
    lonely = replace(RECORDS[0], neighborhood_prompts=(), generation_prompts=())
    with pytest.raises(EditError, match="edit of 'The capital of France is' has no prompts"):
        train(one_gpt2, records=[lonely])
    with pytest.raises(EditError, match="locality is one text"):
        train(one_gpt2, locality="The dog runs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("edits_per_step", 1.5),
        ("n_locality", True),
        ("n_statistics", -1),
        ("save_every", None),
        ("lr", 0),
        ("rate_lr", "x"),
        ("initial_rate", -1e-3),
        ("clip_norm", float("inf")),
        ("edit_weight", -1),
        ("locality_weight", float("nan")),
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_settings_must_be_positive(name: str, value: Any) -> None:
    with pytest.raises(EditError, match=f"{name} is"):
        MENDTraining(**{name: value})


@pytest.mark.usefixtures("as_for_a_user")
def test_unsuitable_matrices_and_models_are_refused(one_gpt2: Case) -> None:
    with pytest.raises(EditError, match="has no W_gate"):
        train(one_gpt2, matrices=("W_gate",))
    with pytest.raises(EditError, match="is a matrix of attention"):
        train(one_gpt2, matrices="W_V")
    with pytest.raises(EditError, match="layer -4 does not exist"):
        train(one_gpt2, layers=(-4,))
    with pytest.raises(EditError, match="seed is 'x'"):
        train(one_gpt2, seed="x")
    other = build("hooked-gpt2" if HAS_HOOKED else "bridge-gpt2", seed=1)
    with pytest.raises(EditError, match="it is another model"):
        MEND(untrained(one_gpt2))(other.model, REQUESTS[0])
    answers = pair_statistics(
        one_gpt2.model, REQUESTS, layers=[0], positions="answer", progress=False
    )
    with pytest.raises(EditError, match="uses 'all'"):
        MENDEditor.untrained(answers)


@pytest.mark.parametrize("architecture", ["hooked-llama", "bridge-neox"])
def test_gated_and_parallel_models_are_trained_as_well(architecture: str) -> None:
    case = build(architecture)
    editor = train(case, matrices="mlp", training=replace(SHORT, steps=2))
    assert {name for name, _ in editor.statistics.places} == set(case.matrices)
    delta = MEND(editor, prepend_bos=False)(case.model, REQUESTS)
    assert delta.norm > 0


@pytest.mark.slow
def test_the_facts_model_learns_in_two_minutes(facts: Case) -> None:
    rows = [row for row in read_records("facts") if isinstance(row, Record)]
    asked = {row.subject for row in rows[:200]}
    editor = train_mend(
        facts.model,
        [row for row in rows[300:] if row.subject not in asked],
        prepend_bos=False,
        progress=False,
    )
    losses = editor.losses @ torch.tensor([0.1, 1.0], dtype=torch.float64)
    assert float(losses[-10:].mean()) < 0.5 * float(losses[:10].mean())
