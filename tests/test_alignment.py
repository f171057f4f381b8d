"""The mean of the updates of ranks that step by their own Adam gets the length of an update by all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsa_ddp.alignment import Alignment

CPU = torch.device("cpu")
N = 4096


def updates(world_size: int, noise: float, steps: int) -> torch.Tensor:
    """One update in common, and on each rank noise of so many times its energy. Shape: (steps, W, N)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(steps, 1, N, generator=generator)
    return common + noise**0.5 * torch.randn(steps, world_size, N, generator=generator)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.floats(0, 100), st.floats(0, 10))
def test_the_factor_is_what_the_noise_asks_for_whatever_decoding_adds(w: int, noise: float, decoding: float) -> None:
    alignments = [Alignment([N], w, 1, CPU) for _ in range(w)]
    for step, own_WN in enumerate(updates(w, noise, 30)):
        sent_WN = own_WN.clone()
        for alignment, sent_N in zip(alignments, sent_WN, strict=True):
            alignment.lengthen_(sent_N)
        mean_N = sent_WN.mean(0)
        error_N = torch.randn(N, generator=torch.Generator().manual_seed(step))
        mean_N += (decoding / w) ** 0.5 * sent_WN.square().mean().sqrt() * error_N
        for alignment, own_N in zip(alignments, own_WN, strict=True):
            alignment.observe(own_N, mean_N)
    expected = ((1 + noise) / (1 + noise / w)) ** 0.5
    mean = torch.stack([alignment.factors() for alignment in alignments]).mean()
    assert mean.item() == pytest.approx(expected, rel=0.1)


def test_each_parameter_has_its_own_and_stays_between_one_and_the_root_of_the_ranks() -> None:
    alignment = Alignment([3, 2, 2, 1], 4, 1, CPU)
    assert alignment.factors().tolist() == [1, 1, 1, 1]
    own_N = torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 5.0])
    mean_N = torch.tensor([0.5, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, -5.0])  # half of it, twice of it, of nothing, against it
    alignment.observe(own_N, mean_N)
    torch.testing.assert_close(alignment.factors(), torch.tensor([2**0.5, 1, 1, 2]))
    alignment.lengthen_(own_N)
    torch.testing.assert_close(own_N, torch.tensor([2**0.5, 8**0.5, 8**0.5, 1, 1, 0, 0, 10]))
    sixth = Alignment([3, 2, 2, 1], 4, 6, CPU)  # one step of six
    sixth.moments_2P.copy_(alignment.moments_2P)
    torch.testing.assert_close(sixth.factors(), 1 + (alignment.factors() - 1) / 6)
    alignment.observe(torch.zeros(8), torch.zeros(8))  # a rank whose step was skipped knows what it knew
    torch.testing.assert_close(alignment.factors(), torch.tensor([2**0.5, 1, 1, 2]))


@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_adams_of_ranks_apart_step_as_far_as_one_adam_of_all_gradients(signal: float) -> None:
    w, steps = 16, 100
    torch.manual_seed(0)
    apart = [torch.nn.Parameter(torch.zeros(N)) for _ in range(w)]
    together = torch.nn.Parameter(torch.zeros(N))
    adams = [torch.optim.Adam([p], 1e-3) for p in apart]
    adam = torch.optim.Adam([together], 1e-3)
    alignments = [Alignment([N], w, 1, CPU) for _ in range(w)]
    common_N, direction_N = torch.zeros(N), torch.randn(N)
    for _ in range(steps):
        gradients_WN = signal * direction_N + torch.randn(w, N)
        together.grad = gradients_WN.mean(0)
        before_N = together.detach().clone()
        adam.step()
        for p, own, gradient_N in zip(apart, adams, gradients_WN, strict=True):
            p.grad = gradient_N
            own.step()
        own_WN = torch.stack([common_N - p.detach() for p in apart])
        plain_N, sent_WN = own_WN.mean(0), own_WN.clone()
        for alignment, sent_N in zip(alignments, sent_WN, strict=True):
            alignment.lengthen_(sent_N)
        mean_N = sent_WN.mean(0)
        for alignment, own_N in zip(alignments, own_WN, strict=True):
            alignment.observe(own_N, mean_N)
        common_N = common_N - mean_N
        for p in apart:
            p.data.copy_(common_N)
    wanted = (before_N - together.detach()).norm()
    assert mean_N.norm() / wanted == pytest.approx(1, abs=0.25)
    if signal < 1:
        assert plain_N.norm() < 0.5 * mean_N.norm()
