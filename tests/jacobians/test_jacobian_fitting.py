"""Fitting a Jacobian Lens: the estimate, resuming after a kill, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from child_process import in_child
from model_state import assert_same, snapshot
from models import CORPUS, Case, bridge_only, build, hooked_only, relative_error
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl import fit_jacobian_lens
from backward_lens_tl.errors import JacobianLensError, ModelStateError, UnsupportedModelError
from backward_lens_tl.jacobians import fitting
from backward_lens_tl.models import host_of

pytestmark = pytest.mark.versions

SKIP, MAX_LENGTH = 3, 9
QUICK = {"skip": SKIP, "max_length": MAX_LENGTH, "dim_batch": 16, "progress": False}


def estimator() -> Any:
    return pytest.importorskip("transformer_lens.tools.analysis").JacobianLens


@pytest.fixture
def small() -> Case:
    """Two blocks below the last, in float64; a new one, because fits change the model's flags."""
    estimator()
    return build("bridge-gpt2")


def fit(model: Any, out: Path, texts: Any = CORPUS, **options: Any) -> Any:
    return fit_jacobian_lens(model, list(texts), out, **{**QUICK, "seed": None, **options})


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_equal_files(one: Path, other: Path) -> None:
    """Every bit of the matrices, and everything else; pickle's bytes depend on shared strings."""
    first, second = (torch.load(each, weights_only=True) for each in (one, other))
    pairs = [(first["J"][layer], second["J"][layer]) for layer in (0, 1)]
    assert first.pop("J").keys() == second.pop("J").keys() == {0, 1}
    assert all(torch.equal(*pair) for pair in pairs)
    assert first == second


# ------------------------------------------------------------------------------------ the estimate


def test_a_watch_does_not_see_the_fit(small: Case, tmp_path: Path) -> None:
    with blt.training.watch(small.model, "W_out", every=1) as watched:
        fit(small.model, tmp_path / "lens.pt", CORPUS[:1])
        small.model.requires_grad_(True)
        small.model(small.tokens(5), return_type="loss").backward()
        step = watched.step()
    assert step is not None
    assert len(step) == 3
    assert len(step.positions) <= 5


def test_the_average_is_that_of_one_call_of_transformerlens(small: Case, tmp_path: Path) -> None:
    found = fit(small.model, tmp_path / "lens.pt", save_every=2)
    expected = estimator().fit(
        small.model,
        list(CORPUS),
        corpus="all",
        dim_batch=16,
        max_seq_len=MAX_LENGTH,
        skip_first_positions=SKIP,
        show_progress=False,
    )
    assert found.n_prompts == expected.n_prompts == len(CORPUS)
    assert found.source_layers == expected.source_layers == [0, 1]
    for layer in found.source_layers:
        # Averages in float32, in another order.
        assert relative_error(found.jacobians[layer], expected.jacobians[layer]) < 1e-6


def slow_jacobian(model: Any, text: str, layer: int, skip: int, length: int) -> Tensor:
    """Autograd's Jacobian of all positions, and then the sums of the docstring."""
    tokens = model.to_tokens(text)[:, :length]
    n, d_model = tokens.shape[1], model.cfg.d_model

    def last_block(change: Tensor) -> Tensor:
        held: list[Tensor] = []

        def add(activation: Tensor, hook: Any) -> Tensor:
            return activation + change

        def keep(activation: Tensor, hook: Any) -> None:
            held.append(activation[0])

        hooks = [
            (f"blocks.{layer}.hook_out", add),
            (f"blocks.{model.cfg.n_layers - 1}.hook_out", keep),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return held[0]

    start = torch.zeros(n, d_model, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(last_block, start)  # [to, row, from, column]
    used = range(skip, n - 1)
    terms = [sum(jacobian[to, :, at] for to in used if to >= at) for at in used]
    return sum(terms) / len(terms)


def test_the_average_is_the_one_that_is_documented(small: Case, tmp_path: Path) -> None:
    """Later positions are added, source positions and prompts averaged; ends are left out."""
    found = fit(small.model, tmp_path / "lens.pt", CORPUS[:2])
    for layer in found.source_layers:
        own = [slow_jacobian(small.model, text, layer, SKIP, MAX_LENGTH) for text in CORPUS[:2]]
        # Stored in float32.
        assert relative_error(found.jacobians[layer], sum(own) / 2) < 1e-6
        assert relative_error(found.jacobians[layer], own[0]) > 1e-2
        other = slow_jacobian(small.model, CORPUS[0], layer, SKIP + 1, MAX_LENGTH)
        assert relative_error(other, own[0]) > 1e-2


@pytest.mark.usefixtures("as_for_a_user")
def test_a_fit_leaves_the_model_unchanged(small: Case, tmp_path: Path) -> None:
    for parameter in small.model.original_model.parameters():
        parameter.requires_grad_(True)
    small.model(torch.tensor([[3, 4, 5]]))  # TransformerLens sets attributes in the first pass
    before = snapshot(small.model)
    fit(small.model, tmp_path / "lens.pt", CORPUS[:1])
    assert_same(before, snapshot(small.model))


# ------------------------------------------------------------------------------------ what is kept


def test_the_file_says_what_it_was_fitted_on(small: Case, tmp_path: Path) -> None:
    out, texts = tmp_path / "lens.pt", ["Rome", *CORPUS[:3], "A river"]
    found = fit(small.model, out, texts, prompts=3)
    about = found.metadata
    assert about["weights_fingerprint"] == host_of(small.model).fingerprint()
    assert about["model_name"] == small.model.cfg.model_name
    used = [text for text in texts if small.model.to_tokens(text).shape[1] >= SKIP + 2]
    assert used == [*CORPUS[:3]]
    assert about["texts_sha256"] == hashlib.sha256(json.dumps(used).encode()).hexdigest()
    assert (about["n_prompts"], about["n_too_short"]) == (3, 1)  # the last text was not drawn
    assert (about["max_seq_len"], about["skip_first_positions"]) == (MAX_LENGTH, SKIP)
    assert (about["corpus"], about["seed"]) == ("a list of texts", None)
    assert about["prepend_bos"] is True
    assert about["versions"]["torch"] == torch.__version__
    loaded = estimator().load(str(out))
    assert loaded.metadata == about
    assert all(torch.equal(loaded.jacobians[i], found.jacobians[i]) for i in (0, 1))
    loaded.validate_model(small.model)


def test_texts_of_a_file_in_drawn_order(small: Case, tmp_path: Path) -> None:
    """Lines are stripped, a seed shuffles them, and both kinds of argument give the same."""
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(f" {text} " for text in CORPUS) + "\n", encoding="utf-8")
    ways = {
        "file": fit_jacobian_lens(small.model, file, tmp_path / "a.pt", prompts=2, **QUICK),
        "list": fit(small.model, tmp_path / "b.pt", seed=0, prompts=2),
        "other seed": fit(small.model, tmp_path / "c.pt", seed=1, prompts=2),
        "own order": fit(small.model, tmp_path / "d.pt", prompts=2),
    }
    digests = {name: lens.metadata["texts_sha256"] for name, lens in ways.items()}
    assert digests["file"] == digests["list"]
    assert len({*digests.values()}) == 3
    assert ways["file"].metadata["corpus"] == "corpus.txt"
    assert torch.equal(ways["file"].jacobians[0], ways["list"].jacobians[0])


def test_rows_per_pass_are_chosen_from_memory(
    small: Case, facts_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(n_bytes: int) -> None:
        found = SimpleNamespace(available=n_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: found)

    free(2**40)
    wide = fit(small.model, tmp_path / "wide.pt", CORPUS[:1], dim_batch=None)
    free(1)
    narrow = fit(small.model, tmp_path / "narrow.pt", CORPUS[:1], dim_batch=None)
    assert (wide.metadata["dim_batch"], narrow.metadata["dim_batch"]) == (16, 1)
    assert relative_error(narrow.jacobians[0], wide.jacobians[0]) < 1e-6
    # A resumed fit keeps the number with which it began.
    free(2**40)
    more = fit(small.model, tmp_path / "narrow.pt", CORPUS[:2], dim_batch=None)
    assert more.metadata["dim_batch"] == 1


@pytest.mark.parametrize("length", [16, 64])
def test_the_estimate_of_memory_covers_what_autograd_keeps(facts_model: Any, length: int) -> None:
    estimator()
    kept: dict[int, int] = {}
    held: list[Tensor] = []
    own = {each.untyped_storage().data_ptr() for each in facts_model.original_model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    def root(activation: Tensor, hook: Any) -> Tensor:
        return activation.detach().requires_grad_(True)

    tokens = torch.arange(5, 5 + length)[None]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, facts_model.hooks(fwd_hooks=[("blocks.0.hook_out", root)]):
        facts_model(tokens, return_type=None)
    estimate = fitting.bytes_per_row(host_of(facts_model), length)
    # Also covers the logits, and less than half of the free memory is used.
    assert 0.5 * estimate < sum(kept.values()) < 1.5 * estimate


# ------------------------------------------------------------------------------------ resuming


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["fitting", "writing"])
def test_a_killed_fit_resumes_to_the_same_file(small: Case, tmp_path: Path, when: str) -> None:
    """SIGKILL during the fourth prompt, or in the middle of writing the second file."""
    lens, out = estimator(), tmp_path / "killed.pt"
    calls = iter(range(10))
    real = {"fitting": lens.fit, "writing": lens.save}[when]

    def killing(*args: Any, **options: Any) -> Any:
        last = {"fitting": 3, "writing": 1}[when]
        if next(calls) == last:
            if when == "writing":
                args[1].write(b"half of a file")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    def killed() -> None:
        setattr(lens, {"fitting": "fit", "writing": "save"}[when], killing)
        fit(small.model, out, save_every=2)

    assert in_child(killed) == -signal.SIGKILL
    assert lens.load(str(out)).n_prompts == 2
    assert len([*tmp_path.iterdir()]) == (2 if when == "writing" else 1)

    seen: list[str] = []

    def counting(*args: Any, **options: Any) -> Any:
        seen.extend(args[1])
        return real_fit(*args, **options)

    real_fit = lens.fit
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lens, "fit", counting)
        resumed = fit(small.model, out, save_every=2)
    assert seen == list(CORPUS[2:])
    assert [*tmp_path.iterdir()] == [out]

    whole = fit(small.model, tmp_path / "whole.pt", save_every=2)
    assert_equal_files(out, tmp_path / "whole.pt")
    assert resumed.metadata == whole.metadata


def test_a_finished_fit_is_continued_with_more_prompts(small: Case, tmp_path: Path) -> None:
    out = tmp_path / "lens.pt"
    two = fit(small.model, out, prompts=2)
    written = digest(out)
    again = fit(small.model, out, prompts=2)
    assert digest(out) == written
    assert again.metadata == two.metadata
    four = fit(small.model, out, prompts=4)
    whole = fit(small.model, tmp_path / "whole.pt", prompts=4)
    assert four.metadata == whole.metadata
    assert_equal_files(out, tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 8}, "another max_length: it was 9, and is 8"),
        ({"skip": 2}, "another skip: it was 3, and is 2"),
        ({"dim_batch": 8}, "another dim_batch: it was 16, and is 8"),
        ({"seed": 1}, "another seed: it was None, and is 1"),
        ({"texts": CORPUS[::-1]}, "2 prompts, which are not the first of the 5"),
        ({"prompts": 1}, "2 prompts, which are not the first of the 1"),
    ],
)
def test_another_fit_is_not_resumed(
    small: Case, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "lens.pt"
    fit(small.model, out, prompts=2)
    written = digest(out)
    with pytest.raises(JacobianLensError, match=message):
        fit(small.model, out, **change)
    assert digest(out) == written


def test_another_models_fit_is_not_resumed(small: Case, tmp_path: Path) -> None:
    out = tmp_path / "lens.pt"
    fit(small.model, out, prompts=1)
    with torch.no_grad():
        small.own["W_out", 1].tensor[0, 0] += 1
    with pytest.raises(JacobianLensError, match="another weights_fingerprint: it was '"):
        fit(small.model, out)
    small.model.cfg.model_name = "renamed"
    with pytest.raises(JacobianLensError, match="another model_name: it was 'gpt2', and is 'rena"):
        fit(small.model, out)
    small.model.cfg.default_prepend_bos = False
    fresh = build("bridge-gpt2").model
    fresh.cfg.default_prepend_bos = False
    with pytest.raises(JacobianLensError, match="another prepend_bos: it was True, and is False"):
        fit(fresh, out)


def test_a_lens_of_another_program_is_not_resumed(small: Case, tmp_path: Path) -> None:
    lens, out = estimator(), tmp_path / "lens.pt"
    lens({0: torch.eye(24)}, n_prompts=3, d_model=24).save(str(out))
    with pytest.raises(JacobianLensError, match="a lens that fit_jacobian_lens did not write"):
        fit(small.model, out)
    out.write_bytes(b"no lens")
    with pytest.raises(JacobianLensError, match="is not the file of a Jacobian Lens"):
        fit(small.model, out)
    assert out.read_bytes() == b"no lens"


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts is 0; pass an integer of at least 1"),
        ({"max_length": "9"}, "max_length is '9'; pass an integer"),
        ({"save_every": 1.5}, "save_every is 1.5; pass an integer"),
        ({"dim_batch": 0}, "dim_batch is 0; pass an integer"),
        ({"skip": -1}, "skip is -1, but must be from 0 to 7"),
        ({"skip": 8}, "skip is 8, but must be from 0 to 7: of the 9 tokens"),
        ({"seed": "a"}, "seed is 'a'; pass an integer, or None"),
        ({"out": 7}, "path is 7, a int"),
        ({"out": "lens.safetensors"}, "'lens.safetensors'; the name of a lens's file ends in"),
        ({"out": "nowhere/lens.pt"}, "but folder 'nowhere' does not exist"),
        ({"texts": "nowhere.txt"}, "'nowhere.txt' cannot be read: .*; pass 'facts', 'Salesforce"),
        ({"texts": ["Rome", 7]}, "texts is a list; pass a list of texts, a file with one"),
        ({"texts": 7}, "texts is a int; pass a list of texts"),
        ({"texts": ["\ud800"]}, "is not Unicode text"),
        ({"texts": ["Rome", ""]}, "none of the 1 texts of 'a list of texts' has 5 tokens"),
        ({"texts": []}, "none of the 0 texts"),
    ],
)
def test_unusable_arguments(
    small: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"texts": list(CORPUS), "out": "lens.pt", **QUICK, **change}
    with pytest.raises(JacobianLensError, match=message):
        fit_jacobian_lens(small.model, given.pop("texts"), given.pop("out"), **given)
    assert not [*tmp_path.iterdir()]


@hooked_only
def test_a_hooked_transformer_is_refused(tmp_path: Path) -> None:
    model = build("hooked-gpt2").model
    with pytest.raises(UnsupportedModelError, match="cannot fit a Jacobian Lens") as found:
        fit(model, tmp_path / "lens.pt")
    assert "load_model(name, kind='bridge')" in str(found.value)
    assert "can be used with this model too" in str(found.value)


@bridge_only
def test_an_older_transformerlens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.tools.analysis", None)
    with pytest.raises(UnsupportedModelError, match=r"cannot fit .* install 3\.9 or newer\. Fit"):
        fit(build("bridge-gpt2").model, tmp_path / "lens.pt")


def test_processed_weights_are_refused(tmp_path: Path) -> None:
    estimator()
    model = blt.load_facts_model("bridge")
    model.enable_compatibility_mode()
    with pytest.raises(ModelStateError, match="weights of 'facts' were processed, which changes"):
        fit(model, tmp_path / "lens.pt")


def test_a_model_with_hooks_is_refused(small: Case, tmp_path: Path) -> None:
    hooks = [("blocks.1.hook_out", lambda activation, hook: 2 * activation)]
    with (
        small.model.hooks(fwd_hooks=hooks),
        pytest.raises(ModelStateError, match="has hooks, so the lens would be one of the model"),
    ):
        fit(small.model, tmp_path / "lens.pt")
    fit(small.model, tmp_path / "lens.pt", prompts=1)


def test_what_transformerlens_refuses_is_passed_on(small: Case, tmp_path: Path) -> None:
    small.model.original_model.train()
    for module in small.model.original_model.modules():
        module.train(not isinstance(module, torch.nn.Dropout))
    with pytest.raises(UnsupportedModelError, match=r"on 'gpt2': .*Call model\.eval\(\)"):
        fit(small.model, tmp_path / "lens.pt")


def test_a_jacobian_that_is_not_finite_is_refused(small: Case, tmp_path: Path) -> None:
    out = tmp_path / "lens.pt"
    fit(small.model, out, prompts=1)
    lens, real = estimator(), estimator().fit

    def infinite(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        found.jacobians[1][0, 0] = torch.inf
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lens, "fit", infinite)
        with pytest.raises(JacobianLensError, match=r"of text 'Rome is in Italy.* is not finite"):
            fit(small.model, out)
    assert lens.load(str(out)).n_prompts == 1


# ------------------------------------------------------------------------------------ what ships


def test_the_lens_of_the_facts_model(facts_model: Any) -> None:
    """It belongs to the shipped weights, and no subject of the records is in its texts."""
    shipped = Path(blt.__file__).parent / "facts_model" / "jacobian_lens.pt"
    held = torch.load(shipped, weights_only=True)
    about = held["metadata"]
    assert {matrix.dtype for matrix in held["J"].values()} == {torch.float16}
    assert (held["n_prompts"], about["skip_first_positions"], about["max_seq_len"]) == (100, 4, 64)
    if about["transformer_lens_version"] == version("transformer-lens"):  # names differ
        assert about["weights_fingerprint"] == host_of(facts_model).fingerprint()
    assert shipped.stat().st_size < 250_000
