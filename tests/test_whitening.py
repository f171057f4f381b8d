"""The shared scales: right where the gradient factorises, safe where it is zero or not finite."""

import pytest
import torch

from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import plan_bucket
from vsa_ddp.whitening import Whitening, mean_squares

LAYOUT = plan_bucket((("norm", (32,)), ("weight", (32, 2, 20))), VsaConfig())


def measured(weight: torch.Tensor) -> torch.Tensor:
    return mean_squares(LAYOUT, torch.cat([torch.randn(32), weight.flatten()]))


def scale(whitening: Whitening) -> torch.Tensor:
    row, col = whitening.factors(LAYOUT).tensor_split([32])
    return row[:, None] * col


def test_a_separable_scale_is_found_up_to_one_factor() -> None:
    true = torch.rand(32, 1) + 0.1, torch.rand(1, 40) + 0.1
    whitening = Whitening(0.9)
    signs = torch.randint(0, 2, (32, 40)) * 2.0 - 1
    whitening.update(LAYOUT, measured((signs * true[0] * true[1]).view(32, 2, 20)))
    ratio = scale(whitening) / (true[0] * true[1])
    # bfloat16's rounding of a mean square, half of it in a root mean square; a row and a column, and those of the first
    torch.testing.assert_close(ratio, ratio[0, 0].expand(32, 40), rtol=4 * 2**-9, atol=0)


def test_before_any_measurement_and_for_zeros_the_scale_is_one() -> None:
    whitening = Whitening(0.9)
    assert torch.equal(scale(whitening), torch.ones(32, 40))
    whitening.update(LAYOUT, measured(torch.zeros(32, 2, 20)))
    assert torch.equal(scale(whitening), torch.ones(32, 40))


def test_a_row_of_zeros_gets_a_small_scale_not_none() -> None:
    weight = torch.ones(32, 2, 20)
    weight[5] = 0
    whitening = Whitening(0.9)
    whitening.update(LAYOUT, measured(weight))
    assert 0 < scale(whitening)[5].max() < 0.1 * scale(whitening)[6].min()


def test_the_mean_runs() -> None:
    whitening = Whitening(0.75)
    for value in (1.0, 2.0):
        whitening.update(LAYOUT, measured(torch.full((32, 2, 20), value)))
    row = whitening.state_dict()["weight"]["row"]
    torch.testing.assert_close(row, torch.full((32,), 0.75 * 0.25 * 1 + 0.25 * 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_measurement_that_is_not_finite_leaves_no_trace(bad: float, first: bool) -> None:
    whitening, untouched = Whitening(0.9), Whitening(0.9)
    good = [torch.randn(32, 2, 20) for _ in range(3)]
    poisoned = torch.randn(32, 2, 20)
    poisoned[0, 0, 0] = bad
    for i, weight in enumerate(good):
        if (i == 0) == first:
            whitening.update(LAYOUT, measured(poisoned))
        for w in (whitening, untouched):
            w.update(LAYOUT, measured(weight))
    assert torch.equal(scale(whitening), scale(untouched))


def test_scales_survive_their_state_dict() -> None:
    whitening, loaded = Whitening(0.9), Whitening(0.9)
    whitening.update(LAYOUT, measured(torch.randn(32, 2, 20)))
    loaded.load_state_dict(whitening.state_dict())
    assert torch.equal(scale(whitening), scale(loaded))


def test_the_scales_of_many_rows_do_not_depend_on_the_order_of_summation() -> None:
    layout = plan_bucket((("embedding", (20_011, 3)),), VsaConfig())
    scales_S = torch.rand(20_014, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for seed in range(20):
        order = torch.randperm(20_011, generator=torch.Generator().manual_seed(seed))
        factors = []
        for rows in (order, torch.arange(20_011)):
            whitening = Whitening(0.0)
            whitening.update(layout, torch.cat([scales_S[rows], scales_S[20_011:]]))
            factors.append(whitening.factors(layout)[:20_011])
        assert torch.equal(factors[0], factors[1][order])
