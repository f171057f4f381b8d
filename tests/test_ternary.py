"""The quantiser meets its theory, and what its docstring promises for special rows."""

import pytest
import torch

from vsa_ddp import ternary


def gaussian(rows: int, block: int = 1024) -> torch.Tensor:
    return torch.randn(rows, block, generator=torch.Generator().manual_seed(0))


def nmse(y: torch.Tensor, estimate: torch.Tensor) -> float:
    return ((estimate - y).square().sum() / y.square().sum()).item()


def rounded(y_TK: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate."""
    trits_TK, energy_T, kept_T = ternary.quantize(y_TK)
    return ternary.dequantize(trits_TK, ternary.level(energy_T, kept_T))


def test_the_error_of_a_gaussian_is_the_theorys() -> None:
    y_TK = gaussian(1000)
    unbiased = rounded(y_TK)
    assert nmse(y_TK, unbiased) == pytest.approx(ternary.NMSE, rel=0.01)
    # at the level of least error, the Lloyd-Max quantiser's own: 0.1902
    assert nmse(y_TK, unbiased / (1 + ternary.NMSE)) == pytest.approx(0.1902, rel=0.01)
    assert unbiased.amax(1).mean().item() == pytest.approx(1.2240 * (1 + ternary.NMSE), rel=0.01)


def test_the_estimate_has_the_projection_one_on_every_row() -> None:
    y_TK = gaussian(50)
    estimate_TK = rounded(y_TK)
    projection_T = (estimate_TK * y_TK).sum(1) / y_TK.square().sum(1)
    torch.testing.assert_close(projection_T, torch.ones(50), rtol=0, atol=1e-5)


def test_rows_of_equal_magnitudes_are_exact() -> None:
    y_TK = torch.tensor([[0.25, -0.25, 0.25, 0.25]])
    assert torch.equal(rounded(y_TK), y_TK)


def test_a_row_of_zeros_gives_zeros() -> None:
    assert not rounded(torch.zeros(2, 8)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_its_row_only(bad: float) -> None:
    y_TK = gaussian(2)
    y_TK[1, 5] = bad
    estimate_TK = rounded(y_TK)
    assert estimate_TK[0].isfinite().all()
    assert not estimate_TK[1].isfinite().any()


def test_a_rows_trits_do_not_depend_on_its_scale() -> None:
    y_TK = gaussian(3)
    assert torch.equal(ternary.quantize(y_TK)[0], ternary.quantize(y_TK * 2.0**-20)[0])
