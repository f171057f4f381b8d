"""What was kept comes back, bit for bit, and what came after it is gone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.models import digest
from tests.ranks import run_ranks
from vsa_ddp.phase import Verdict
from vsa_ddp.snapshot import Snapshot

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


class Trained:
    """A model with buffers, and its optimizer, some steps on."""

    def __init__(self, optimizer: str, steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.train(range(steps))

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            self.optimizer.step()

    def bits(self, *, buffers: bool = True) -> str:
        state = self.optimizer.state_dict()["state"]
        kept = [torch.as_tensor(v) for values in state.values() for v in values.values() if v is not None]
        return digest([*self.model.parameters(), *(self.model.buffers() if buffers else ()), *kept])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_back_and_then_on_as_if_nothing_had_been(optimizer: str, steps: int) -> None:
    trained, straight = Trained(optimizer, steps), Trained(optimizer, steps)
    before = Snapshot(trained.model, trained.optimizer)
    before.take()
    start = trained.bits()
    trained.train(range(100, 104))
    assert trained.bits() != start
    before.restore()
    assert trained.bits() == start
    assert not before.held
    for each in (trained, straight):
        each.train(range(steps, steps + 3))
    assert trained.bits() == straight.bits()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copy_survives_a_checkpoint_but_for_buffers(optimizer: str) -> None:
    trained = Trained(optimizer, 2)
    before = Snapshot(trained.model, trained.optimizer)
    assert before.to_bytes() is None
    before.take()
    start = trained.bits(buffers=False)
    trained.train(range(2, 4))
    saved = before.to_bytes()
    other = Trained(optimizer, 4)
    assert other.bits() == trained.bits()
    loaded = Snapshot(other.model, other.optimizer)
    loaded.from_bytes(saved)
    assert loaded.held
    loaded.restore()
    assert other.bits(buffers=False) == start
    loaded.from_bytes(None)
    assert not loaded.held


def test_what_was_kept_shares_nothing_with_what_goes_on() -> None:
    trained = Trained("adamw", 1)
    before = Snapshot(trained.model, trained.optimizer)
    before.take()
    saved = before.to_bytes()
    trained.train(range(1, 3))
    assert before.to_bytes() == saved
    before.restore()
    trained.train(range(1, 2))
    assert trained.bits() == Trained("adamw", 2).bits()


class Counting(nn.Module):
    """Puts a new tensor in its buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self) -> torch.Tensor:
        self.seen = self.seen + 1
        return self.weight.sum()


def test_a_buffer_that_the_module_has_replaced_comes_back() -> None:
    model = Counting()
    model()
    before = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before.take()
    model()
    before.restore()
    assert model.seen.tolist() == [1, 1]


def sharded(rank: int, world_size: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)

    def train(steps: range) -> str:
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        state = [value for values in optimizer.optim.state.values() for value in values.values()]
        assert state
        return digest([*model.parameters(), *state])

    before = Snapshot(model, optimizer)
    start = train(range(2))
    before.take()
    assert before.to_bytes() is None  # one rank's share is not the others'
    end = train(range(2, 4))
    before.restore()
    assert train(range(0)) == start
    assert train(range(2, 4)) == end


def test_each_rank_of_a_sharded_optimizer_keeps_its_share(tmp_path: Path) -> None:
    run_ranks(sharded, 2, tmp_path)


def test_verdicts() -> None:
    trained = Trained("sgd", 1)
    before = Snapshot(trained.model, trained.optimizer)
    with pytest.raises(RuntimeError, match="nothing to go back to"):
        before.settle(Verdict.UNDO, in_section=False)
    before.take()
    before.settle(None, in_section=True)
    assert before.held
    trained.train(range(1, 2))
    middle = trained.bits()
    before.settle(Verdict.KEEP, in_section=True)
    trained.train(range(2, 3))
    before.settle(Verdict.UNDO, in_section=True)
    assert trained.bits() == middle
    before.take()
    before.settle(Verdict.KEEP, in_section=False)
    assert not before.held
