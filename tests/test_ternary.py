"""Quantisers meet their theory, and what their docstrings promise for special input."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsa_ddp import ternary
from vsa_ddp.ternary import ternary_quantize_deterministic, ternary_quantize_stochastic


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


FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def finely(y_TK: torch.Tensor, trits: int) -> torch.Tensor:
    """The unbiased estimate of several trits per element."""
    digits, energy_T, kept_T = ternary.quantize_finely(y_TK, trits)
    return ternary.dequantize_finely(digits, ternary.level(energy_T, kept_T), trits)


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_the_error_of_several_trits_is_least_at_their_step(trits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    y_TK = gaussian(2000)
    best = nmse(y_TK, finely(y_TK, trits))
    assert best == pytest.approx(ternary.NMSES[trits - 1], rel=0.02)
    steps = ternary.STEPS
    for factor in (0.9, 1.1):
        monkeypatch.setattr(ternary, "STEPS", tuple(factor * step for step in steps))
        assert nmse(y_TK, finely(y_TK, trits)) > best


def test_one_trit_per_element_is_the_codecs_quantiser() -> None:
    y_TK = gaussian(20)
    for ours, codecs in zip(ternary.quantize_finely(y_TK, 1), ternary.quantize(y_TK), strict=True):
        assert torch.equal(ours, codecs)


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_digits_are_those_of_the_nearest_integers(trits: int) -> None:
    y_TK = gaussian(5, 128)
    digits, _, _ = ternary.quantize_finely(y_TK, trits)
    assert digits.shape == (5, trits * 128)
    assert digits.abs().max() == 1
    step_T1 = ternary.STEPS[trits - 1] * y_TK.square().mean(1, keepdim=True).sqrt()
    top = (3**trits - 1) / 2
    nearest = (y_TK / step_T1).round().clamp(-top, top)
    assert torch.equal(ternary.dequantize_finely(digits, torch.ones(5), trits), nearest)


@pytest.mark.parametrize("trits", [2, 3])
def test_special_rows_of_several_trits(trits: int) -> None:
    assert not finely(torch.zeros(2, 8), trits).any()
    equal = torch.tensor([[0.25, -0.25, 0.25, 0.25]])
    assert torch.equal(finely(equal, trits), equal)
    y_TK = gaussian(2)
    y_TK[1, 5] = torch.inf
    assert finely(y_TK, trits)[0].isfinite().all()
    assert not finely(y_TK, trits)[1].isfinite().any()


def test_stochastic_rounding_is_unbiased_in_every_element() -> None:
    x = torch.linspace(-2, 1.5, 15)
    generator, draws = torch.Generator().manual_seed(0), 4000
    drawn = [ternary_quantize_stochastic(x, generator=generator) for _ in range(draws)]
    mean = torch.stack([q.dequantize() for q in drawn]).mean(0)
    deviation = (x.abs() * (2 - x.abs()) / draws).sqrt()
    assert drawn[0].scale == 2
    # fifteen elements, none beyond four of its standard deviations
    assert ((mean - x).abs() <= 4 * deviation + 1e-6).all()
    frequency = torch.stack([q.trits for q in drawn]).float().abs().mean(0)
    torch.testing.assert_close(frequency, x.abs() / 2, rtol=0, atol=0.035)  # four deviations of a half


def test_stochastic_rounding_has_the_noise_that_its_docstring_tells() -> None:
    y_TK = gaussian(200, 1000)
    generator = torch.Generator().manual_seed(0)
    estimate = torch.stack([ternary_quantize_stochastic(y, generator=generator).dequantize() for y in y_TK])
    assert nmse(y_TK, estimate) == pytest.approx(2.0, abs=0.1)


def test_stochastic_rounding_repeats_with_its_generator() -> None:
    x = gaussian(1)
    first, again, other = (
        ternary_quantize_stochastic(x, generator=torch.Generator().manual_seed(seed)).trits for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_scale_that_is_given_clips() -> None:
    q = ternary_quantize_stochastic(torch.tensor([-3.0, 0.0, 3.0]), scale=2.0)
    assert q.dequantize().tolist() == [-2.0, 0.0, 2.0]


@given(SHAPES, FLOATS, st.booleans())
def test_quantisers_of_a_tensor_keep_its_shape_and_signs(
    shape: tuple[int, ...], dtype: torch.dtype, stochastic: bool
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = (ternary_quantize_stochastic if stochastic else ternary_quantize_deterministic)(x)
    assert q.trits.shape == x.shape
    assert q.trits.dtype == torch.int8
    assert q.scale.dtype == torch.float32
    assert q.scale.shape == ()
    assert torch.where(q.trits == 0, True, q.trits == x.sign()).all()
    assert q.scale.isfinite()


@pytest.mark.parametrize("quantize", [ternary_quantize_stochastic, ternary_quantize_deterministic])
def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_the_scale(
    quantize: Callable[[torch.Tensor], ternary.Ternary],
) -> None:
    assert not quantize(torch.zeros(9)).dequantize().any()
    for bad in (torch.nan, torch.inf):
        q = quantize(torch.tensor([1.0, bad, -2.0]))
        assert not q.scale.isfinite()
        assert q.trits.abs().max() <= 1


def test_the_threshold_decides_and_the_scale_is_the_mean_of_what_is_beyond() -> None:
    x = torch.tensor([[0.1, -0.5, 0.5], [2.0, -4.0, 0.0]])
    q = ternary_quantize_deterministic(x, threshold=0.5)
    assert q.trits.tolist() == [[0, 0, 0], [1, -1, 0]]
    assert q.scale == 3
    assert ternary_quantize_deterministic(x, threshold=0.4).scale == 7 / 4
    assert ternary_quantize_deterministic(x, threshold=5.0).dequantize().tolist() == [[0] * 3] * 2


@given(st.integers(0, 99), st.floats(0, 3))
def test_no_other_scale_has_less_error(seed: int, threshold: float) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) ** 3
    q = ternary_quantize_deterministic(x, threshold)
    for factor in (0.98, 1.02):
        assert nmse(x, q.dequantize()) <= nmse(x, factor * q.dequantize()) + 1e-6


def test_the_default_threshold_is_the_codecs_and_meets_its_theory() -> None:
    y_TK = gaussian(1, 2**16)
    q = ternary_quantize_deterministic(y_TK)
    assert torch.equal(q.trits, ternary.quantize(y_TK)[0])
    assert nmse(y_TK, q.dequantize()) == pytest.approx(0.1902, rel=0.02)
    unbiased = ternary_quantize_deterministic(y_TK, scale="unbiased").dequantize()
    torch.testing.assert_close(unbiased, rounded(y_TK))
    assert ((unbiased * y_TK).sum() / y_TK.square().sum()).item() == pytest.approx(1, abs=1e-5)


def test_settings_of_the_quantisers_are_checked() -> None:
    x = torch.ones(3)
    for quantize in (ternary_quantize_stochastic, ternary_quantize_deterministic):
        with pytest.raises(TypeError, match=r"real floats, got torch\.int64"):
            quantize(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale must be above 0 and finite, got 0"):
        ternary_quantize_stochastic(x, scale=0)
    with pytest.raises(ValueError, match="threshold must be at least 0 and finite, got -1"):
        ternary_quantize_deterministic(x, threshold=-1)
    with pytest.raises(ValueError, match="scale must be least_squares or unbiased, got 'max'"):
        ternary_quantize_deterministic(x, scale="max")  # type: ignore[arg-type]
