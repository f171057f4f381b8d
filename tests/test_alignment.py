"""The mean of the updates of ranks that step by their own Adam gets the length of an update by all gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsa_ddp.alignment import Alignment, SecondMoment

CPU = torch.device("cpu")
N = 4096


def average(
    alignments: list[Alignment], own_WN: torch.Tensor, num_steps: int = 1, own_share: float = 1
) -> torch.Tensor:
    """The ranks' mean of what they lengthened, which they then look at."""
    sent_WN = own_WN.clone()
    for alignment, sent_N in zip(alignments, sent_WN, strict=True):
        alignment.lengthen_(sent_N, num_steps, own_share)
    mean_N = sent_WN.mean(0)
    for alignment, own_N in zip(alignments, own_WN, strict=True):
        alignment.observe([(own_N, mean_N)])
    return mean_N


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.floats(0, 100), st.floats(0, 10))
def test_the_factor_is_what_the_noise_asks_for_whatever_decoding_adds(w: int, noise: float, decoding: float) -> None:
    """One update in common, and on each rank noise of so many times its energy."""
    generator = torch.Generator().manual_seed(0)
    alignments = [Alignment([N], w, CPU) for _ in range(w)]
    for _ in range(30):
        own_WN = torch.randn(N, generator=generator) + noise**0.5 * torch.randn(w, N, generator=generator)
        for alignment, sent_N in zip(alignments, sent_WN := own_WN.clone(), strict=True):
            alignment.lengthen_(sent_N, 1)
        error_N = sent_WN.square().mean().sqrt() * torch.randn(N, generator=generator)
        for alignment, own_N in zip(alignments, own_WN, strict=True):
            alignment.observe([(own_N, sent_WN.mean(0) + (decoding / w) ** 0.5 * error_N)])
    expected = ((1 + noise) / (1 + noise / w)) ** 0.5
    for alignment in alignments:
        assert alignment.factors(1, 1.0).item() == pytest.approx(expected, rel=0.2)


def test_each_parameter_has_its_own_and_stays_between_one_and_the_root_of_the_ranks() -> None:
    sizes = [3, 2, 2, 1]
    alignment = Alignment(sizes, 4, CPU)
    assert alignment.factors(1, 1.0).tolist() == [1, 1, 1, 1]
    own_N = torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 5.0])
    mean_N = torch.tensor([0.5, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, -5.0])  # half of it, twice of it, of nothing, against it
    alignment.observe(zip(own_N.split(sizes), mean_N.split(sizes), strict=True))
    expected_P = torch.tensor([2**0.5, 1, 1, 2])
    torch.testing.assert_close(alignment.factors(1, 1.0), expected_P)
    torch.testing.assert_close(alignment.factors(6, 1.0), 1 + (expected_P - 1) / 6)
    torch.testing.assert_close(alignment.factors(1, 0.25), (0.75 + 0.25 * expected_P**2).sqrt())
    alignment.lengthen_(own_N, 1)
    torch.testing.assert_close(own_N, torch.tensor([2**0.5, 8**0.5, 8**0.5, 1, 1, 0, 0, 10]))
    alignment.observe(
        zip(torch.zeros(8).split(sizes), torch.zeros(8).split(sizes), strict=True)
    )  # a rank whose step was skipped knows what it knew
    alignment.observe((own, own * torch.nan) for own in own_N.split(sizes))
    torch.testing.assert_close(alignment.factors(1, 1.0), expected_P)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_updates_keep_their_dtype_and_are_measured_in_single_precision(dtype: torch.dtype) -> None:
    alignment = Alignment([N, 0, 1], 4, CPU)
    own_N = torch.full((N + 1,), 8.0, dtype=dtype)  # whose squares' sum is beyond float16
    alignment.observe((own, own / 2) for own in own_N.split([N, 0, 1]))
    alignment.lengthen_(own_N, 1)
    assert own_N.dtype == dtype
    torch.testing.assert_close(own_N, torch.full((N + 1,), 8 * 2**0.5, dtype=dtype))


def lengths(signal: float, beta1: float, steps_together: int = 0) -> torch.Tensor:
    """Of the ranks' mean update, as it is and lengthened, over one by all gradients. Shape: (steps apart, 2)."""
    w, steps, betas = 16, 100, (beta1, 0.99)
    torch.manual_seed(0)
    apart, together = [torch.nn.Parameter(torch.zeros(N)) for _ in range(w)], torch.nn.Parameter(torch.zeros(N))
    adams = [torch.optim.Adam([p], 1e-3, betas) for p in (*apart, together)]
    alignments = [Alignment([N], w, CPU) for _ in range(w)]
    moment = SecondMoment(adams[0], steps_together)
    direction_N = torch.randn(N)
    found = []
    for step in range(steps_together + steps):
        gradients_WN = signal * direction_N + torch.randn(w, N)
        mean_N = gradients_WN.mean(0)
        before = [p.detach().clone() for p in (*apart, together)]
        for p, gradient_N in zip(apart, gradients_WN, strict=True):
            p.grad = mean_N if step < steps_together else gradient_N
        together.grad = mean_N
        for adam in adams:
            adam.step()
        *own, wanted_N = (b - p.detach() for b, p in zip(before, (*apart, together), strict=True))
        if step >= steps_together:
            own_WN, own_share = torch.stack(own), moment.own_share(step - steps_together + 1)
            each = own_WN.mean(0).norm(), average(alignments, own_WN, 1, own_share).norm()
            found.append(torch.stack(each) / wanted_N.norm())
    return torch.stack(found)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.5])
def test_without_momentum_ranks_apart_step_as_far_as_one_adam_of_all_gradients(signal: float) -> None:
    plain, lengthened = lengths(signal, 0.0)[-10:].mean(0).tolist()
    assert plain < 0.6
    assert lengthened == pytest.approx(1, abs=0.1)


def test_with_momentum_too_where_noise_prevails() -> None:
    plain, lengthened = lengths(0.0, 0.9)[-10:].mean(0).tolist()
    assert plain < 0.3
    assert lengthened == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("signal", [0.1, 0.5])
def test_with_momentum_and_signal_it_is_nearer_and_not_too_far(signal: float) -> None:
    plain, lengthened = lengths(signal, 0.9)[-10:].mean(0).tolist()
    assert 1.1 * plain < lengthened < 1


def test_after_steps_in_common_nothing_overshoots() -> None:
    found = lengths(0.0, 0.9, 100)
    assert found[-10:, 0].mean() < 0.35
    assert found[:, 1].max() < 1.15
    assert found[-10:, 1].mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("steps_together", [0, 7, 300])
@pytest.mark.parametrize(
    ("kind", "settings", "moment", "correct"),
    [
        (torch.optim.AdamW, {"betas": (0.9, 0.99)}, "exp_avg_sq", lambda steps: 1 - 0.99**steps),
        (torch.optim.AdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}, "exp_avg_sq", lambda n: 1 - 0.99**n),
        (torch.optim.RMSprop, {"alpha": 0.9}, "square_avg", lambda steps: 1 - 0.9**steps),
        (torch.optim.Adadelta, {"rho": 0.9}, "square_avg", lambda steps: 1 - 0.9**steps),
        (torch.optim.Adagrad, {}, "sum", lambda steps: steps),
    ],
)
def test_the_own_share_is_that_of_the_optimizers_second_moment(
    steps_together: int, kind: Any, settings: dict[str, Any], moment: str, correct: Callable[[int], float]
) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = kind([p], **settings)
    for step in range(steps_together + 20):
        p.grad = torch.tensor([float(step >= steps_together)])  # so that the second moment is the share
        optimizer.step()
    counted = SecondMoment(optimizer, 0)
    expected = optimizer.state[p][moment].item() / correct(steps_together + 20)
    assert counted.own_share(20) == pytest.approx(expected, rel=1e-4)
    assert counted.steps_together == steps_together


def test_an_optimizer_that_counts_no_steps_has_a_warm_up_alone() -> None:
    assert SecondMoment(None, 0).own_share(3) == 1
    assert SecondMoment(None, 9).own_share(3) == 0.25
