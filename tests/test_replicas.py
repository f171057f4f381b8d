"""Ranks whose parameters have parted stop, and name the first."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import loss_of, net
from tests.ranks import run_ranks


def nudge(parameter: torch.Tensor) -> None:
    """One element by a unit in the last place."""
    with torch.no_grad():
        first = parameter.flatten()[:1]
        parameter.view(-1)[0] = torch.nextafter(first, first + 1)[0]


def parting_run(rank: int, world_size: int, interval: int, nudged_after: int, names: list[str]) -> tuple[int, str]:
    """Eight steps; after one of them the last rank's parameters change. Returns the step that raised, and the error."""
    model = DDP(net(), bucket_cap_mb=0.05)
    vsa_ddp.register(model, check_interval=interval)
    for step in range(8):
        if step == nudged_after and rank == world_size - 1:
            for name in names:
                nudge(model.module.get_parameter(name))
        try:
            loss_of(model, step, rank).backward()
        except RuntimeError as error:
            return step, str(error)
    return 8, ""


@pytest.mark.parametrize(
    ("world_size", "interval", "nudged_after", "raised_at"), [(2, 3, 2, 4), (3, 2, 5, 7), (2, 100, 0, 0)]
)
def test_parameters_that_differ_are_named_on_every_rank(
    tmp_path: Path, world_size: int, interval: int, nudged_after: int, raised_at: int
) -> None:
    compared = max(0, raised_at - 1)
    for step, message in run_ranks(parting_run, world_size, tmp_path, interval, nudged_after, ["mix.weight"]):
        assert step == raised_at
        assert f"parameters differ between ranks before step {compared}: mix.weight. Something" in message


def test_how_many_differ_is_said(tmp_path: Path) -> None:
    for step, message in run_ranks(parting_run, 2, tmp_path, 1, 3, ["head.weight", "hidden.weight"]):
        assert step == 4
        assert "before step 3: hidden.weight and 1 more of 10" in message


def unchecked_run(rank: int, world_size: int) -> tuple[int, int, list[int]]:
    """Without a check ranks may differ; with one each comparison is counted, and the same parameters are no alarm."""
    step, message = parting_run(rank, world_size, 0, 2, ["mix.weight"])
    assert message == ""
    sent = []
    for interval in (0, 4):
        model = DDP(net(), bucket_cap_mb=0.05)
        state = vsa_ddp.register(model, check_interval=interval)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()
        sent.append(state.compression_stats().wire_bytes)
    return step, sent[1] - sent[0], [sum(1 for _ in model.parameters())]


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_comparison_is_two_numbers_per_parameter(tmp_path: Path, world_size: int) -> None:
    for _, more, (num_parameters,) in run_ranks(unchecked_run, world_size, tmp_path):
        assert more == 2 * 8 * (1 + 2 * num_parameters)  # in steps 4 and 8


def joined_run(rank: int, world_size: int) -> int:
    """Ranks of uneven inputs: who has joined makes no optimizer steps, and gets the others' parameters at the end."""
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, check_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join():
        for step in range(3 + 3 * rank):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()
    for step in range(3):
        loss_of(model, step, rank).backward()
    return state.step


def test_a_rank_that_has_joined_is_no_alarm(tmp_path: Path) -> None:
    assert run_ranks(joined_run, 2, tmp_path) == [9, 9]


class Halves(nn.Module):
    """Parameters of two dtypes, one of them not a number, and one that DDP does not know."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(8, 64)
        self.narrow = nn.Linear(64, 64, bias=False).bfloat16()
        self.own = nn.Parameter(torch.full((4,), float(rank)))
        self.also = nn.LayerNorm(2, bias=False)
        with torch.no_grad():
            self.wide.bias[0] = float("nan")
            self.also.weight.fill_(rank + 2)
            self.narrow.weight[:, 0] = -0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).bfloat16()).float().mean(1) * self.own.sum() * self.also.weight.sum()


def odd_parameters_run(rank: int, world_size: int) -> bool:
    model = Halves(rank)
    DDP._set_params_and_buffers_to_ignore_for_model(model, [".own", "also.weight"])
    ddp = DDP(model)
    state = vsa_ddp.register(ddp, check_interval=1)
    for _ in range(4):
        ddp(torch.ones(2, 8)).sum().backward()
    return state.step == 4


def test_what_is_odd_but_the_same_is_no_alarm(tmp_path: Path) -> None:
    assert run_ranks(odd_parameters_run, 2, tmp_path) == [True, True]
