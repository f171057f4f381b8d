"""Small models and batches for the multi-process tests."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Matrices of several shapes, a convolution, one-dimensional, zero-dimensional and tiny parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 32, 9)
        self.hidden = nn.Linear(32 * 8, 96)
        self.norm = nn.LayerNorm(96)
        self.mix = nn.Linear(96, 96, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(96, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.hidden(torch.tanh(self.conv(x)).flatten(1)))
        return self.scale * self.head(torch.tanh(self.mix(h)) + h)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 4, 16, generator=generator), torch.randn(size, 3, generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x, target = batch(step, rank)
    return (model(x) - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    module = getattr(model, "module", model)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step_digests(model: nn.Module, rank: int, num_steps: int) -> list[str]:
    """Of the gradients of each of the first steps, without an optimizer."""
    digests = []
    for step in range(num_steps):
        model.zero_grad()
        loss_of(model, step, rank).backward()
        digests.append(digest(gradients(model).values()))
    return digests


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the bits of all tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
