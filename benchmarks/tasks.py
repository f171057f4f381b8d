"""What the methods are compared on: small models on data that needs no download, the same for every method.

Shape letters: N batch, L sequence length, E model width, V characters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from launch.charlm import NUM_CHARACTERS, CharTransformer, Corpus, windows

_corpus = cache(Corpus)


class Task(Protocol):
    """A model and its data. Losses are mean cross-entropies in nats."""

    def model(self) -> nn.Module:
        """A new model, initialised from torch's generator."""

    def loss(self, model: nn.Module, order: torch.Generator) -> Tensor:
        """Of one rank's next batch; `order` is that rank's own."""

    def heldout_loss(self, model: nn.Module) -> float:
        """Of data that no rank trains on, always the same."""


@dataclass(frozen=True)
class CharTask:
    """Next characters of Python's standard library."""

    make: Callable[[], nn.Module]
    batch: int = 8
    length: int = 64
    heldout_windows: int = 1024

    def model(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, order: torch.Generator) -> Tensor:
        loss: Tensor = model(*windows(_corpus().train, self.batch, self.length, order))
        return loss

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module) -> float:
        fixed = torch.Generator().manual_seed(0)
        at_once = min(64, self.heldout_windows)
        rounds = self.heldout_windows // at_once
        batches = (windows(_corpus().heldout, at_once, self.length, fixed) for _ in range(rounds))
        return sum(model(*batch).item() for batch in batches) / rounds


class CharLSTM(nn.Module):
    """A recurrent language model. Returns the mean cross-entropy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_CHARACTERS, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, NUM_CHARACTERS)

    def forward(self, x_NL: Tensor, target_NL: Tensor) -> Tensor:
        h_NLE, _ = self.lstm(self.embed(x_NL))
        return F.cross_entropy(self.head(h_NLE).flatten(0, 1), target_NL.flatten())


class DigitsCNN(nn.Sequential):
    """Two convolutions and two layers, for 8 x 8 images of ten digits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, shuffled once. Shapes: (1797, 1, 8, 8) float32 of 0..1, (1797,) int64."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images).float().view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


@dataclass(frozen=True)
class DigitsTask:
    """Handwritten digits; the last 360 of them are held out."""

    batch: int = 32
    heldout: int = 360
    views: int = 1
    """How often a held-out image is looked at."""

    def model(self) -> nn.Module:
        return DigitsCNN()

    def loss(self, model: nn.Module, order: torch.Generator) -> Tensor:
        images, labels = _digits()
        chosen = torch.randint(len(labels) - self.heldout, (self.batch,), generator=order)
        return F.cross_entropy(model(self.seen(images[chosen], order)), labels[chosen])

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module) -> float:
        images, labels = (t[-self.heldout :].repeat_interleave(self.views, 0) for t in _digits())
        return F.cross_entropy(model(self.seen(images, torch.Generator().manual_seed(0))), labels).item()

    def seen(self, images: Tensor, order: torch.Generator) -> Tensor:
        """What the model sees of images. Shapes: (N, 1, 8, 8) -> (N, 1, 8, 8)."""
        return images


_DISTORTION = torch.tensor([[0.35], [0.2], [0.15], [0.15]])
"""Greatest angle in radians, change of size, and shifts in halves of an image."""


@dataclass(frozen=True)
class DistortedDigitsTask(DigitsTask):
    """Digits turned, scaled, shifted and noisy, anew in every batch: seeds differ by a few per cent, not by half as on
    the images themselves, which are few enough to be learned by heart."""

    views: int = 20
    noise: float = 0.2

    def seen(self, images: Tensor, order: torch.Generator) -> Tensor:
        """Up to 20 degrees, a fifth of the size and 0.6 pixels. Shapes: (N, 1, 8, 8) -> (N, 1, 8, 8)."""
        angle, size, right, down = (torch.rand(4, len(images), generator=order) * 2 - 1) * _DISTORTION
        cos, sin = angle.cos() * (1 + size), angle.sin() * (1 + size)
        maps = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
        seen = F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)
        return seen + self.noise * torch.randn(seen.shape, generator=order)


class DigitsMLP(nn.Sequential):
    """Two hidden layers, for 8 x 8 images of ten digits."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@dataclass(frozen=True)
class FullBatchTask(DigitsTask):
    """All digits that are not held out, in every step of every rank: gradients without noise."""

    def model(self) -> nn.Module:
        return DigitsMLP()

    def loss(self, model: nn.Module, order: torch.Generator) -> Tensor:
        images, labels = _digits()
        return F.cross_entropy(model(images[: -self.heldout]), labels[: -self.heldout])

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module) -> float:
        """Of the training set: what is asked here is how fast it is fitted."""
        return self.loss(model, torch.Generator()).item()


@dataclass(frozen=True)
class FineTuneTask(DigitsTask):
    """All ten digits, for a model that knows the first five."""

    def model(self) -> nn.Module:
        model = DigitsMLP()
        images, labels = (t[: -self.heldout] for t in _digits())
        images, labels = images[labels < 5], labels[labels < 5]
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(100):
            chosen = torch.randint(len(labels), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        return model


def transformer() -> nn.Module:
    return CharTransformer(width=64, num_layers=8, num_heads=4, length=64)


def wide_transformer() -> nn.Module:
    """As many parameters in fewer and larger operations: a CPU's step takes three fifths of the time."""
    return CharTransformer(width=128, num_layers=2, num_heads=4, length=64)


TASKS: dict[str, Task] = {
    "transformer": CharTask(transformer),
    "wide transformer": CharTask(wide_transformer, batch=4),
    "large batch": CharTask(wide_transformer, batch=32),
    "lstm": CharTask(lambda: CharLSTM(128)),
    "digits": DigitsTask(),
    "distorted digits": DistortedDigitsTask(),
    "full batch": FullBatchTask(),
    "fine-tuning": FineTuneTask(),
}
