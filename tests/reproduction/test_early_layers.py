"""Early layers through average Jacobians: what is read, and that each control can fail."""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from jacobian_cases import identity_lens, random_lens
from models import HAS_BRIDGE, build

import backward_lens_tl as blt
from backward_lens_tl import cli
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.errors import InputError, JacobianLensError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.reproduction import (
    early_layers,
    early_readings,
    early_segments,
    reproduce,
)
from backward_lens_tl.reproduction.early_readings import (
    ANOTHER,
    CIRCULAR,
    DIRECT,
    EARLIER,
    EXACT,
    LAST,
    LATER,
    NORMALIZED,
    SHUFFLED,
    SHUFFLED_DIRECT,
    SPAN,
    THROUGH,
    TURNED,
    TURNED_CIRCULAR,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.jacobian_controls import (
    combinations,
    shuffled_weights,
    targets_of_others,
    turned,
)
from backward_lens_tl.reproduction.vectors import carried

KIND = "bridge" if HAS_BRIDGE else "hooked"
ROWS = [
    {"prompt": "Messi plays for", "target": " Paris", "subject": "Messi"},
    {"prompt": "Rome is in Italy and Paris is", "target": " the", "subject": "Paris"},
    {"prompt": "The dog of the king", "target": " Rome", "subject": "the king"},
    {"prompt": "Rome is in", "target": " Paris", "subject": "Rome"},
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return copy.deepcopy(build(f"{KIND}-llama").model)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def evidence_of(model: Any, folder: Path, *lenses: Any) -> Evidence:
    fits = [blt.jacobian_lens(each, check=False) for each in lenses]
    return Evidence(model, read_records(ROWS), folder, 4, 0, False, False, fits)


# --- controls -------------------------------------------------------------------------------------


def test_random_matrices_keep_the_singular_values():
    matrices = torch.randn(3, 7, 7, generator=seeded())
    found = turned(matrices, seeded())
    sizes = [torch.linalg.svdvals(each.double()) for each in (matrices, found)]
    assert torch.allclose(*sizes, rtol=1e-5)
    # Nothing else is kept: directions are as good as independent, and differ between layers.
    assert (torch.cosine_similarity(found.flatten(1), matrices.flatten(1)).abs() < 0.5).all()
    same = turned(matrices[:1].expand(2, -1, -1), seeded())
    assert not torch.allclose(same[0], same[1], atol=0.1)


def test_rotations_have_no_preferred_direction():
    """The mean over many has no entry far from 0; signs of QR's columns would make them."""
    identity = torch.eye(3).expand(2000, 3, 3)
    found = turned(identity, seeded())
    assert torch.allclose(found @ found.mT, identity, atol=1e-5)
    assert found.mean(0).abs().max() < 4 * (1 / 3) ** 0.5 / 2000**0.5  # four standard errors


def test_random_activations_are_in_the_span_and_as_long():
    streams = torch.randn(3, 2, 9, generator=seeded())
    norms = torch.tensor([[1e-6, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = combinations(streams, norms, seeded(1))
    assert torch.allclose(found.norm(dim=-1), norms)
    for layer in range(2):
        span = streams[:, layer].T
        solved = torch.linalg.lstsq(span, found[:, layer].T).solution
        assert torch.allclose(span @ solved, found[:, layer].T, atol=1e-5)
        outside = torch.linalg.lstsq(span, streams[:, 1 - layer].T).solution
        assert not torch.allclose(span @ outside, streams[:, 1 - layer].T, atol=0.1)
    assert torch.linalg.matrix_rank(found[:, 1]) == 3  # other coefficients in each row


@pytest.mark.versions
def test_weights_are_shuffled_and_restored_bit_for_bit(llama: Any):
    host = host_of(llama)
    before = {name: values.clone() for name, values in llama.state_dict().items()}

    def differing() -> set[str]:
        now = llama.state_dict()
        return {name for name, values in before.items() if not torch.equal(values, now[name])}

    with shuffled_weights(host, seeded()):
        changed = differing()
        now = llama.state_dict()
        for name in changed:
            old, new = (values[name].flatten() for values in (before, now))
            assert torch.allclose(old.sort().values, new.sort().values, atol=1e-6)
            assert float(torch.corrcoef(torch.stack([old, new]))[0, 1]) < 0.2
    assert not differing()
    assert changed
    assert not [name for name in changed if "embed" in name or ".ln" in name or "norm" in name]
    with pytest.raises(KeyboardInterrupt), shuffled_weights(host, seeded()):
        raise KeyboardInterrupt
    assert not differing()


def test_targets_of_others_differ():
    assert targets_of_others([5, 5, 6, 7]) == [6, 6, 7, 5]
    with pytest.raises(InputError, match="all prompts have the same target; pass prompts with"):
        targets_of_others([5, 5])


@pytest.mark.parametrize(
    ("n_layers", "step", "expected"),
    [
        (8, -1, [2, 3, 0, 1, 2, 3, 4, 5]),
        (8, 1, [2, 3, 4, 5, 6, 7, 4, 5]),
        (2, 1, [1, 0]),
        (2, -1, [1, 0]),
    ],
)
def test_another_layer_is_always_another(n_layers: int, step: int, expected: list[int]):
    assert early_readings._a_quarter_away(n_layers, step) == expected


# --- readings -------------------------------------------------------------------------------------


@pytest.mark.versions
def test_identities_read_as_the_logit_lens(llama: Any, tmp_path: Path):
    """With `J_l = I`, all that differ only in the Jacobian agree; with random ones, they do not."""
    last = evidence_of(llama, tmp_path, identity_lens(llama), random_lens(llama))
    plain, random = (early_readings.ranks_by_reading(last, lens) for lens in last.jacobian_lenses)
    for reading in (THROUGH, EARLIER, LATER):
        assert torch.equal(plain[reading], plain[DIRECT]), reading
        assert not torch.equal(random[reading][:, :-1], random[DIRECT][:, :-1]), reading
    assert torch.equal(plain[SHUFFLED], plain[SHUFFLED_DIRECT])
    assert not torch.equal(random[SHUFFLED], random[SHUFFLED_DIRECT])
    at_the_end = plain[DIRECT][:, -1:].expand_as(plain[LAST])
    for reading in (LAST, CIRCULAR, TURNED_CIRCULAR):
        assert torch.equal(plain[reading], at_the_end), reading
        assert not torch.equal(random[reading], at_the_end), reading
    for reading in (DIRECT, NORMALIZED, EXACT):
        assert torch.equal(plain[reading], random[reading]), reading
    assert torch.equal(random[THROUGH][:, -1], random[DIRECT][:, -1])
    for reading in (TURNED, SPAN):
        assert not torch.equal(plain[reading], plain[DIRECT]), reading


def test_ranks_through_the_jacobian_against_a_loop(llama: Any, tmp_path: Path):
    evidence = evidence_of(llama, tmp_path, random_lens(llama))
    [lens] = evidence.jacobian_lenses
    found = early_readings.ranks_by_reading(evidence, lens)
    assert torch.equal(found[THROUGH], early_readings.ranks_through(evidence, lens))
    targets = [each.target for each in evidence.vjps]
    others = [next(t for t in targets[i + 1 :] + targets[:i] if t != targets[i]) for i in range(4)]
    for row, each in enumerate(evidence.vjps):
        for layer, update in enumerate(each.updates):
            matrices = lens.jacobians.matrices
            vector = matrices[layer].to(update) @ update if layer in matrices else update
            for reading, target in ((THROUGH, targets[row]), (ANOTHER, others[row])):
                read = blt.read_vectors(llama, vector, target)
                assert read.target_rank == found[reading][row, layer]
    assert (found[THROUGH] != found[ANOTHER]).any()


@pytest.mark.versions
def test_a_prompts_own_jacobian_makes_its_update(llama: Any, tmp_path: Path):
    """`delta_l = J_p^T delta_last`: the chain rule, for the prompt's own Jacobian only."""
    evidence = evidence_of(llama, tmp_path, random_lens(llama))
    own, other = evidence.vjps[:2]
    matrices = torch.stack(
        [*own_jacobians(llama, own.tokens), torch.eye(llama.cfg.d_model).double()]
    )
    last = own.updates[-1:].expand_as(own.updates)[None]
    made = early_readings._times(matrices.mT, last)[0]
    assert torch.allclose(made, own.updates, rtol=1e-3, atol=1e-5 * float(own.updates.abs().max()))
    not_made = early_readings._times(matrices.mT, other.updates[-1:].expand_as(other.updates)[None])
    assert not torch.allclose(not_made[0, :-1], other.updates[:-1], rtol=0.1)
    forward = early_readings._times(matrices, own.updates[None])[0]
    exact = carried(host_of(llama), own, own.updates)
    assert (torch.cosine_similarity(forward, exact) > 0.999).all()
    assert (torch.cosine_similarity(own.updates, exact)[:-1] < 0.999).all()


def own_jacobians(model: Any, tokens: Sequence[int]) -> list[torch.Tensor]:
    """`d h_final / d h_l` at the last token, column by column."""
    streams: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(stream: torch.Tensor, hook: Any) -> torch.Tensor:
            streams[layer] = stream.detach().requires_grad_() if layer == 0 else stream
            return streams[layer]

        return hook

    last = model.cfg.n_layers - 1
    hooks = [(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in range(last + 1)]
    model.run_with_hooks(torch.tensor([list(tokens)]), fwd_hooks=hooks)
    sources = [streams[layer] for layer in range(last)]
    rows = [torch.autograd.grad(each, sources, retain_graph=True) for each in streams[last][0, -1]]
    return [torch.stack([row[layer][0, -1] for row in rows]) for layer in range(last)]


def test_shuffled_weights_are_those_that_are_read(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evidence = evidence_of(llama, tmp_path, random_lens(llama))
    [lens] = evidence.jacobian_lenses
    found = early_readings.ranks_by_reading(evidence, lens)
    assert not torch.equal(found[SHUFFLED], found[THROUGH])

    class Unchanged:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(early_readings, "shuffled_weights", Unchanged)
    found = early_readings.ranks_by_reading(evidence, lens)
    assert torch.equal(found[SHUFFLED], found[THROUGH])


# --- claims ---------------------------------------------------------------------------------------


def shares(**changed: float) -> pd.DataFrame:
    """Fractions as on a real model; keys are the names of the constants in lower case."""
    usual = {
        DIRECT: 0.36,
        NORMALIZED: 0.36,
        THROUGH: 0.72,
        EXACT: 0.9,
        EARLIER: 0.6,
        LATER: 0.64,
        ANOTHER: 0.14,
        TURNED: 0.004,
        SHUFFLED: 0.4,
        SHUFFLED_DIRECT: 0.5,
        SPAN: 0.09,
        LAST: 0.7,
        CIRCULAR: 0.98,
        TURNED_CIRCULAR: 0.15,
    }
    rows = usual | {getattr(early_readings, name.upper()): share for name, share in changed.items()}
    return pd.DataFrame(
        {
            reading: {
                "top_1_percent": share,
                "top_1_percent_in_first_half": share / 2,
                "top_10": 0.1,
            }
            for reading, share in rows.items()
        }
    ).T


@pytest.mark.parametrize(
    ("changed", "same", "failing"),
    [
        ({}, 0.7, []),
        ({"through": 0.69, "later": 0.62}, 0.7, [0]),
        ({"direct": 0.41}, 0.7, [1]),
        ({"exact": 0.94}, 0.7, [2]),
        ({}, 0.67, [2]),
        ({"earlier": 0.66}, 0.7, [3]),
        ({"later": 0.65}, 0.7, [4]),
        ({"another": 0.21}, 0.7, [5]),
        ({"turned": 0.06}, 0.7, [6]),
        ({"shuffled": 0.51}, 0.7, [7]),
        ({"span": 0.16}, 0.7, [8]),
        # All layers readable in any way, as in the facts model.
        (dict.fromkeys(("direct", "through", "earlier", "later", "shuffled"), 1.0), 1.0,
         [1, 3, 4, 7]),
    ],
)  # fmt: skip
def test_each_claim_can_fail(changed: Mapping[str, float], same: float, failing: list[int]):
    checks = early_layers._checks(shares(**changed), same)
    assert [at for at, check in enumerate(checks) if not check.holds] == failing
    assert len(checks) == 9


# --- segments -------------------------------------------------------------------------------------


def test_segments_against_single_prompts(llama: Any, tmp_path: Path):
    """A segment of one token in each prompt: the median over the prompts' own ranks."""
    evidence = evidence_of(llama, tmp_path, random_lens(llama))
    [lens] = evidence.jacobian_lenses
    table = early_segments.ranks_of_segments(evidence, lens)
    assert table is not None
    assert set(table["matrix"]) == {"W_V", "W_O", "W_out"}
    targets = [each.target for each in evidence.vjps]
    others = targets_of_others(targets)
    prompts = evidence.prompts["text"].tolist()
    for matrix, layer in (("W_V", 1), ("W_O", 0), ("W_out", 0)):
        expected: dict[str, list[int]] = {name: [] for name in table["reading"].unique()}
        for text, target, other in zip(prompts, targets, others, strict=True):
            capture = blt.capture_gradients(
                llama, text, blt.target_nll(target), matrices=matrix, prepend_bos=False
            )
            gradient = capture[matrix, layer]
            vector = gradient.inputs[0, -1] if matrix == "W_V" else -gradient.vjps[0, -1]
            block = layer - 1 if matrix == "W_V" else layer
            carried_vector = lens.jacobians.matrices[block].to(vector) @ vector
            for name, (own, token) in zip(
                expected,
                ((vector, target), (carried_vector, target), (carried_vector, other)),
                strict=True,
            ):
                expected[name].append(int(blt.read_vectors(llama, own, token).target_rank))
        own = table[
            (table["matrix"] == matrix)
            & (table["layer"] == layer)
            & (table["segment"] == "last token")
        ].set_index("reading")["median"]
        assert own.to_dict() == {name: statistics.median(ranks) for name, ranks in expected.items()}
        assert own.nunique() > 1


def test_segments_need_subjects_and_two_targets(llama: Any, tmp_path: Path):
    fit = blt.jacobian_lens(random_lens(llama), check=False)
    bare = [{key: row[key] for key in ("prompt", "target")} for row in ROWS]
    for number, rows in enumerate((bare, [ROWS[0], *bare[1:]], [ROWS[0], ROWS[3]])):
        folder = tmp_path / str(number)
        evidence = Evidence(llama, read_records(rows), folder, 4, 0, False, False, fit)
        assert early_segments.ranks_of_segments(evidence, evidence.jacobian_lenses[0]) is None


def test_segments_without_attention(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evidence = evidence_of(llama, tmp_path, random_lens(llama))
    original = early_segments.backward_lens

    def mlp_only(*given: Any, matrices: Sequence[str], **options: Any) -> Any:
        if "W_V" in matrices:
            raise UnsupportedModelError("attention of layer 0 has no separate W_V")
        return original(*given, matrices=matrices, **options)

    monkeypatch.setattr(early_segments, "backward_lens", mlp_only)
    table = early_segments.ranks_of_segments(evidence, evidence.jacobian_lenses[0])
    assert table is not None
    assert set(table["matrix"]) == {"W_out"}


class Sized(Evidence):
    """Four layers and a vocabulary whose first 1 % are ranks up to 10."""

    n_layers, d_vocab = 4, 1001

    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("direct", "through", "another", "holds"),
    [
        ([500, 500, 9, 0], [10, 500, 0, 0], [400, 400, 9, 9], True),
        ([500, 500, 9, 0], [11, 500, 0, 0], [400, 400, 9, 9], False),
        ([500, 9, 9, 0], [10, 500, 0, 0], [400, 400, 9, 9], False),
        ([500, 500, 9, 0], [10, 500, 0, 0], [400, 9, 9, 9], False),
    ],
)
def test_the_claim_about_the_subject_can_fail(
    direct: Sequence[int], through: Sequence[int], another: Sequence[int], holds: bool
):
    names = ("read directly", "through J", "another prompt's target, through J")
    rows = [
        {"reading": name, "layer": layer, "median": float(rank), "segment": segment}
        | {"matrix": matrix}
        for name, ranks in zip(names, (direct, through, another), strict=True)
        for layer, rank in enumerate(ranks)
        for segment in ("last subject token", "last token")
        for matrix in ("W_out", "W_O")
    ]
    check = early_segments.subject_check(pd.DataFrame(rows), Sized())
    assert check.holds is holds


# --- the experiment -------------------------------------------------------------------------------


def test_without_a_fit_the_command_is_named(llama: Any, tmp_path: Path):
    with pytest.raises(JacobianLensError, match=r"no Jacobian Lens of .* was passed") as caught:
        reproduce(llama, ROWS, tmp_path, "early_layers", progress=False)
    command = re.search(r"backward-lens (.*), and pass (--jacobian \S+)", str(caught.value))
    assert command is not None
    cli.parser().parse_args(command[1].split())
    cli.parser().parse_args(["reproduce", "early_layers", *command[2].split()])
    found = reproduce(llama, ROWS, tmp_path, ["early_layers", "normalization"], progress=False)
    assert found["early_layers"].verdict == "not measured"
    assert "no Jacobian Lens of" in found["early_layers"].notes[0]


def test_a_lens_of_another_model_is_refused(llama: Any, tmp_path: Path):
    with pytest.raises(JacobianLensError, match="fitted on a model of width 128"):
        reproduce(llama, ROWS, tmp_path, "early_layers", jacobian="facts", progress=False)


def test_the_fit_of_most_prompts_is_read(llama: Any, tmp_path: Path):
    fits = [random_lens(llama, seed) for seed in range(3)]
    for fit, n_prompts in zip(fits, (8, 100, 32), strict=True):
        fit.n_prompts = n_prompts
    unchecked = [blt.jacobian_lens(each, check=False) for each in fits]
    found = reproduce(
        llama, ROWS, tmp_path, "early_layers", prompts=4, jacobian=unchecked, progress=False
    )["early_layers"]
    by_fit = found.tables["prompts of the fit"].set_index("reading")["top_1_percent"]
    assert list(by_fit.index) == [f"through J of {n} prompts" for n in (8, 32, 100)]
    readings = found.tables["readings"].set_index("reading")["top_1_percent"]
    assert readings[THROUGH] == by_fit.iloc[-1]
    assert "of 100 texts" in found.notes[0]
    assert "prompts of the fit" in found.figures
    [one] = reproduce(
        llama, ROWS, tmp_path, "early_layers", prompts=4, jacobian=unchecked[0], progress=False
    ).values()
    assert "prompts of the fit" not in one.figures
    assert (tmp_path / "early_layers" / "readings.csv").exists()


def test_a_norm_after_the_matrix_is_refused(tmp_path: Path):
    model = build(f"{KIND}-gemma2").model
    evidence = evidence_of(model, tmp_path, random_lens(model))
    with pytest.raises(UnsupportedModelError, match="passes a norm before it is added"):
        early_layers.early_layers(evidence)
