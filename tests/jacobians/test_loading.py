"""Files of Jacobian Lenses, as TransformerLens and the reference implementation write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jacobian_cases import OwnLens, random_lens
from models import HAS_BRIDGE, Case, bridge_only

import backward_lens_tl as blt
from backward_lens_tl.errors import InputError, JacobianLensError
from backward_lens_tl.jacobians.average import jacobians_of
from backward_lens_tl.jacobians.loading import load_jacobians

MATRICES = {
    layer: torch.randn(5, 5, generator=torch.Generator().manual_seed(layer)) for layer in (2, 0)
}
LENS = {"J": MATRICES, "n_prompts": 3, "source_layers": [0, 2], "d_model": 5}


def written(folder: Path, held: object, name: str = "own.pt") -> Path:
    torch.save(held, folder / name)
    return folder / name


def test_a_published_file_has_no_metadata(tmp_path: Path) -> None:
    found = load_jacobians(str(written(tmp_path, LENS)))
    assert (found.layers, found.n_prompts, found.d_model, found.metadata) == ((0, 2), 3, 5, {})
    for layer, matrix in MATRICES.items():
        assert torch.equal(found.matrices[layer], matrix)
    assert found.provenance["n_prompts"] == 3
    assert repr(found) == "Jacobians(2 layers, d_model=5, n_prompts=3)"


def test_half_precision_is_widened(tmp_path: Path) -> None:
    half = {layer: matrix.half() for layer, matrix in MATRICES.items()}
    found = load_jacobians(written(tmp_path, LENS | {"J": half}))
    assert torch.equal(found.matrices[2], MATRICES[2].half().float())


def test_a_checkpoint_holds_the_sum(tmp_path: Path) -> None:
    sums = {layer: 4 * matrix for layer, matrix in MATRICES.items()}
    held = {"jacobian_sum": sums, "n_done": 4, "next_idx": 4, "target_layer": 3}
    found = load_jacobians(written(tmp_path, held))
    assert torch.allclose(found.matrices[0], MATRICES[0])
    assert (found.n_prompts, found.metadata) == (4, {"target_layer": 3})


def test_a_folder_holds_lens_pt(tmp_path: Path) -> None:
    written(tmp_path, LENS, "lens.pt")
    assert load_jacobians(tmp_path).layers == (0, 2)
    assert load_jacobians(str(tmp_path)).layers == (0, 2)


@bridge_only
@pytest.mark.versions
def test_files_of_transformer_lens_are_read_as_by_itself(tmp_path: Path) -> None:
    from transformer_lens.tools.analysis import JacobianLens

    lens = JacobianLens(MATRICES, n_prompts=3, d_model=5, metadata={"corpus": "one"})
    lens.save(str(tmp_path / "own.pt"))
    ours, theirs = load_jacobians(tmp_path / "own.pt"), JacobianLens.load(str(tmp_path / "own.pt"))
    assert ours.metadata == theirs.metadata == {"corpus": "one"}
    for layer, matrix in theirs.jacobians.items():
        assert torch.equal(ours.matrices[layer], matrix)
    assert ours.provenance == jacobians_of(theirs).provenance != jacobians_of(lens).provenance


def test_a_file_is_read_again_only_if_it_changed(tmp_path: Path) -> None:
    file = written(tmp_path, LENS)
    first = load_jacobians(file)
    assert load_jacobians(str(file)) is first
    written(tmp_path, LENS | {"n_prompts": 4})
    os.utime(file, ns=(1, 1))
    assert load_jacobians(file).n_prompts == 4


def test_a_lens_is_taken_as_it_is_until_it_changes() -> None:
    lens = OwnLens(MATRICES)
    first = jacobians_of(lens)
    assert jacobians_of(lens) is first
    lens.jacobians[0] = lens.jacobians[0].clone()
    second = jacobians_of(lens)
    assert second is not first
    assert second.provenance == first.provenance
    lens.jacobians[0][0, 0] += 1
    assert jacobians_of(lens).provenance["sha256"] != second.provenance["sha256"]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"weights": 1}, r"holds no 'J' and no 'jacobian_sum'; pass a file that JacobianLens.save"),
        ([1], "holds no 'J'"),
        (LENS | {"J": {}}, "has no matrices"),
        (LENS | {"J": {0: torch.zeros(5, 4)}}, r"layer 0 has shape \(5, 4\) and .* width 5"),
        (LENS | {"d_model": 6}, r"has shape \(5, 5\) .* width 6; the file is damaged"),
        (LENS | {"J": {0: torch.zeros(5, 5, dtype=torch.long)}}, "dtype torch.int64"),
        (
            LENS | {"J": {"a": torch.zeros(5, 5)}},
            "layer 'a' is a Tensor; a lens has one tensor per",
        ),
        (LENS | {"J": {0: torch.full((5, 5), torch.nan)}}, "NaN or infinity; fit the lens again"),
        ({"jacobian_sum": MATRICES, "n_done": 0}, "a checkpoint after 0 prompts; continue the fit"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    tmp_path: Path, held: object, message: str
) -> None:
    with pytest.raises(JacobianLensError, match=message):
        load_jacobians(written(tmp_path, held))


def test_files_that_are_no_files_of_torch_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.pt"
    for content in (b"", b"PK\x03\x04 but not an archive", b"\x80\x04cos\nsystem\n."):
        file.write_bytes(content)
        with pytest.raises(
            JacobianLensError, match=r"is not the file of a Jacobian Lens, or is da"
        ):
            load_jacobians(file)
    whole = written(tmp_path, LENS).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        JacobianLensError, match="is not the file of a Jacobian Lens, or is damaged"
    ):
        load_jacobians(file)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.pt", "none.pt", str(tmp_path), tmp_path / "gpt2"):
        with pytest.raises(JacobianLensError, match=r"does not exist; pass the file of a lens"):
            load_jacobians(missing)
    for kind in (None, 5, OwnLens):
        with pytest.raises(
            JacobianLensError, match="pass TransformerLens's JacobianLens, the path"
        ):
            load_jacobians(kind)


@pytest.mark.versions
def test_names_are_looked_up_by_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_BRIDGE:
        with pytest.raises(
            JacobianLensError, match=r"TransformerLens 2\.\d+\.\d+ does not look for"
        ):
            load_jacobians("gpt2-small")
        return
    from transformer_lens.tools.analysis import JacobianLens

    asked: list[str] = []

    def found(name: str) -> Any:
        asked.append(name)
        if name != "gpt2-small":
            raise OSError("no network")
        return JacobianLens(MATRICES, n_prompts=3, d_model=5)

    monkeypatch.setattr(JacobianLens, "from_pretrained", found)
    assert load_jacobians("gpt2-small").layers == (0, 2)
    with pytest.raises(
        JacobianLensError, match=r"no lens of that name, or cannot .*: no network\. P"
    ):
        load_jacobians("gpt3")
    assert asked == ["gpt2-small", "gpt3"]


def test_every_argument_that_takes_a_projection_takes_a_lens(
    one_gpt2: Case, tmp_path: Path
) -> None:
    model = one_gpt2.model
    lens = random_lens(model)
    file = written(tmp_path, {"J": lens.jacobians, "n_prompts": 1, "d_model": lens.d_model})
    reads = [
        blt.jacobian_lens(source, check=False).jacobians.provenance["sha256"]
        for source in (lens, file, str(file), jacobians_of(lens))
    ]
    assert len(set(reads)) == 1
    for projection in (lens, file, str(file)):  # compared with the model, and refused
        with pytest.raises(JacobianLensError, match="does not belong to"):
            blt.backward_lens(model, "Rome", " the", projection=projection)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ("jacobian_lens", r"'jacobian_lens' needs a fit: pass jacobian_lens\(\.\.\.\) of its file"),
        ("facts", "unknown projection 'facts'; allowed: 'logit_lens'"),
        ("none.pt", "'none.pt' does not exist"),
    ],
)
def test_names_that_are_no_projection_are_refused(
    one_gpt2: Case, projection: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        blt.backward_lens(one_gpt2.model, "Rome", " the", projection=projection)


@pytest.mark.usefixtures("as_for_a_user")
def test_unusable_arguments_of_jacobian_lens_are_refused() -> None:
    lens = OwnLens(MATRICES)
    with pytest.raises(InputError, match="projection is 'tuned'; allowed: 'logit_lens', 'normaliz"):
        blt.jacobian_lens(lens, "tuned")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="check is 1; allowed: True, False"):
        blt.jacobian_lens(lens, check=1)  # type: ignore[arg-type]
