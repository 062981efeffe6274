"""The first directions by iteration against the whole decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backward_lens_tl.training import spectrum
from backward_lens_tl.training.spectrum import leading_spectrum, spectrum_of
from backward_lens_tl.training.step_gradient import WatchedGradient


def gradient(
    matrix: Any, n: int, d_in: int, d_out: int, *, decay: float, dtype: torch.dtype = torch.float64
) -> WatchedGradient:
    """Random factors, whose positions have norms that differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = torch.logspace(0, -decay, n, dtype=torch.float64)[
        torch.randperm(n, generator=generator)
    ]
    return WatchedGradient(
        matrix=matrix,
        layer=0,
        inputs=(random(1, n, d_in) + 1).to(dtype),
        vjps=(random(1, n, d_out) * sizes[:, None]).to(dtype),
        mask=torch.ones(1, n, dtype=torch.bool),
    )


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "decay"), [(100, 150, 120, 0), (300, 90, 60, 4), (80, 200, 20, 8)]
)
def test_same_as_the_whole_decomposition(
    matrix: str, n: int, d_in: int, d_out: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = gradient(matrix, n, d_in, d_out, decay=decay)
    expected = spectrum_of(own.principal_directions(n), 3)
    # A failure if the iteration leaves the work to the decomposition.
    monkeypatch.setattr(WatchedGradient, "principal_directions", None)
    found = leading_spectrum(own, 3)
    assert found.norm == pytest.approx(expected.norm, rel=1e-12)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-10)
    assert found.energy == pytest.approx(expected.energy, rel=1e-10)
    assert torch.allclose(found.resid, expected.resid, atol=1e-6)  # of unit vectors


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
@pytest.mark.parametrize(("d_in", "d_out"), [(40, 30), (30, 40)])
def test_many_positions_take_no_matrix_of_their_size(
    matrix: str, d_in: int, d_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 3000  # in several blocks
    own = gradient(matrix, n, d_in, d_out, decay=2, dtype=torch.float32)
    own.inputs[0] *= torch.linspace(0, 15, d_in).exp2()  # directions that are well apart
    expected = spectrum_of(own.principal_directions(n), 3)
    monkeypatch.setattr(WatchedGradient, "principal_directions", None)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            largest = max(largest, found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    with Largest():
        found = leading_spectrum(own, 3)
    assert largest <= n * max(d_in, d_out)  # the factors themselves, which are given
    assert found.norm == pytest.approx(expected.norm, rel=1e-12)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-9)
    assert found.energy == pytest.approx(expected.energy, rel=1e-9)
    # The iteration stops at a residual of 1e-9, which the gaps divide. Signs are the same.
    assert torch.allclose(found.resid, expected.resid, rtol=0, atol=1e-7)


def test_gradients_of_low_rank_are_decomposed() -> None:
    """The second direction of a gradient of rank 1 is rounding, and is not returned."""
    own = gradient("W_out", 100, 150, 120, decay=0)
    own.vjps[0] = own.vjps[0, :1]
    found = leading_spectrum(own, 3)
    assert found.energy == [pytest.approx(1)]
    assert found.effective_rank == pytest.approx(1)
    own.vjps[:] = 0
    nothing = leading_spectrum(own, 3)
    assert (nothing.norm, nothing.effective_rank, nothing.energy) == (0, 0, [])


def test_without_convergence_it_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gradient("W_out", 100, 150, 120, decay=0)
    expected = spectrum_of(own.principal_directions(100), 3)
    monkeypatch.setattr(spectrum, "_ITERATIONS", 2)
    found = leading_spectrum(own, 3)
    assert found.energy == expected.energy
    assert torch.equal(found.resid, expected.resid)


def test_random_numbers_of_the_training_are_not_used() -> None:
    own, state = gradient("W_out", 100, 150, 120, decay=0), torch.get_rng_state()
    leading_spectrum(own, 3)
    assert torch.equal(torch.get_rng_state(), state)
