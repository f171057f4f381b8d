"""What will happen in a soak test: lives, crashes and faults, all drawn from the seed. See `tests.soak`."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.models import Net
from vsa_ddp.config import Adapt

WIRES: list[dict[str, Any]] = [
    {"wire": "all_gather", "bundle": 4},
    {"wire": "all_reduce", "bundle": 4},
    {"wire": "two_shot", "bundle": 4},
    {"wire": "all_gather", "bundle": 4, "ranks_per_node": 2},
    {"wire": "two_shot", "bundle": 4, "ranks_per_node": 2},
    {"wire": "all_gather", "bundle": 1, "sparsity": 16},
    {"wire": "two_shot", "bundle": 1, "sparsity": 16},
]
CRASHES = ("raise", "kill", "stall")
"""A rank raises inside backward and its process ends; is killed there; or stops there and does nothing any more."""
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Soak:
    """One run."""

    steps: int = 20_000
    ranks: int = 4
    """At most; a life has two or more."""
    seed: int = 0
    timeout: float = 30.0
    """Of the process groups, in seconds."""
    life_steps: int = 500
    """A life has once, twice or four times as many, and up to `checkpoint_every` more."""
    checkpoint_every: int = 100
    measure_every: int = 25
    intensity: float = 1.0
    """Times the probabilities in `FAULTS`."""
    crashes: tuple[str, ...] = CRASHES


class Branched(nn.Module):
    """What is trained: a net, and two branches that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.left, self.right = (nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)) for _ in range(2))

    def forward(self, x: Tensor, use_left: bool, use_right: bool) -> Tensor:
        y = self.net(x)
        for branch, is_used in ((self.left, use_left), (self.right, use_right)):
            if is_used:
                y = y + branch(x.flatten(1))
        return y


ALWAYS_USED = tuple(name for name, _ in Branched().named_parameters() if name.startswith("net."))


# Lives


@dataclass(frozen=True, kw_only=True)
class Life:
    """A group of ranks, from its start to its end."""

    number: int
    start: int
    end: int
    """The first step that it does not complete."""
    crash: str | None
    """What a rank does in step `end`; None: all leave before it."""
    crash_rank: int
    crash_parameter: str
    """Whose gradient it has just calculated."""
    world_size: int
    settings: dict[str, Any]
    find_unused: bool
    adapt: Adapt | None
    """How `PhasedTrainer` adapts; None: there is none."""

    def has_the_bits_of(self, other: "Life") -> bool:
        """Whether a step has the same result in both, from the same checkpoint."""
        names = ("world_size", "settings", "find_unused", "adapt")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __str__(self) -> str:
        words = [" ".join(f"{name}={value}" for name, value in self.settings.items()), f"{self.world_size} ranks"]
        words += ["find_unused_parameters"] if self.find_unused else []
        words += [f"phases, {self.adapt}"] if self.adapt else []
        return f"life {self.number}: {', '.join(words)}"


def lives(soak: Soak) -> Iterator[Life]:
    """A longer run has the same ones, and more."""
    draw, every, life = Random(f"lives of {soak.seed}"), soak.checkpoint_every, None
    start = number = 0
    while start < soak.steps:
        drawn = _draw_life(soak, draw, number, start)
        if life is not None and life.crash and draw.random() < 0.5:  # go on as before: all bits can be compared
            drawn = replace(life, number=number, start=start, end=drawn.end, crash=drawn.crash)
        life = drawn if drawn.end < soak.steps else replace(drawn, end=soak.steps, crash=None)
        yield life
        start = life.end if life.crash is None else max(life.start, life.end // every * every)
        number += 1


def _draw_life(soak: Soak, draw: Random, number: int, start: int) -> Life:
    length = soak.life_steps * draw.choice((1, 1, 2, 4)) + draw.randrange(soak.checkpoint_every)
    world_size = draw.randint(2, soak.ranks)
    return Life(
        number=number,
        start=start,
        end=start + length,
        crash=draw.choice((None, *soak.crashes)),
        crash_rank=draw.randrange(world_size),
        crash_parameter=draw.choice(ALWAYS_USED),
        world_size=world_size,
        settings=draw.choice([s for s in WIRES if "ranks_per_node" not in s or world_size == 4]),
        find_unused=draw.random() < 0.5,
        adapt=draw.choice((None, None, None, "gate", "trend", "none")),
    )


def ddp_options(draw: Random) -> dict[str, Any]:
    """How a new DDP model cuts its buckets: they change no bit."""
    return {"bucket_cap_mb": draw.choice((0.01, 0.05, 0.1, 25)), "gradient_as_bucket_view": draw.random() < 0.5}


# Steps


@dataclass(frozen=True)
class Spoil:
    """What happens to a gradient as soon as it is calculated."""

    change: Callable[[Tensor], Tensor]
    rank: int | None
    """None: on all."""
    parameter: str | None
    """None: to all."""


@dataclass
class Step:
    """What happens in one step. Lists are by rank."""

    number: int
    world_size: int
    sizes: list[int]
    """Of batches."""
    branches: list[tuple[bool, bool]]
    """Which of the model's are used."""
    micro_batches: int = 1
    idle_forwards: int = 0
    spoils: list[Spoil] = field(default_factory=list)
    overflows: bool = False
    """Whether the optimizer must not step."""
    inputs: list[int] | None = None
    """How many batches each rank has, inside `join`; None: one each, without it."""
    move: dict[str, Any] | None = None
    """Options of the new DDP model that takes the step."""
    faults: list[str] = field(default_factory=list)


def plan(soak: Soak, life: Life, number: int) -> Step:
    """The same on every rank, and in every life like this."""
    draw, size = Random(f"step {number} of {soak.seed}"), life.world_size
    step = Step(number, size, [BATCH] * size, [(True, True)] * size)
    for name, fault in FAULTS.items():
        if fault.can_be(life, number) and draw.random() < soak.intensity * fault.probability:
            fault.act(step, draw)
            step.faults.append(name)
    return step


def other_sizes(step: Step, draw: Random) -> None:
    step.sizes = [draw.randint(1, 2 * BATCH) for _ in range(step.world_size)]


def late(step: Step, draw: Random) -> None:
    seconds = draw.uniform(0.001, 0.03)

    def sleep(gradient: Tensor) -> Tensor:
        time.sleep(seconds)
        return gradient

    step.spoils.append(Spoil(sleep, draw.randrange(step.world_size), draw.choice(ALWAYS_USED)))


def one_element(value: float) -> Callable[[Step, Random], None]:
    """Of one gradient of one rank becomes something that is not finite."""

    def change(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(-1)[gradient.numel() // 2] = value
        return gradient

    def act(step: Step, draw: Random) -> None:
        step.spoils.append(Spoil(change, draw.randrange(step.world_size), draw.choice(ALWAYS_USED)))
        step.overflows = True

    return act


def all_elements(size: float, *, everywhere: bool = False) -> Callable[[Step, Random], None]:
    """Of one gradient or all gradients of one rank, or of all ranks everywhere, become this size."""

    def act(step: Step, draw: Random) -> None:
        rank, parameter = draw.randrange(step.world_size), draw.choice((None, *ALWAYS_USED))
        place = (None, None) if everywhere else (rank, parameter)
        step.spoils.append(Spoil(lambda gradient: gradient.sign() * size, *place))

    return act


def accumulation(step: Step, draw: Random) -> None:
    step.micro_batches = draw.randint(2, 4)


def unused(step: Step, draw: Random) -> None:
    step.branches = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(step.world_size)]


def idle_forwards(step: Step, draw: Random) -> None:
    step.idle_forwards = draw.randint(1, 2)


def uneven_inputs(step: Step, draw: Random) -> None:
    step.inputs = [draw.randint(0, 3) for _ in range(step.world_size)]
    step.inputs[draw.randrange(step.world_size)] = 3
    step.idle_forwards = 0  # a rank that has joined takes every forward pass for a step


def move(step: Step, draw: Random) -> None:
    step.move = ddp_options(draw)


class Fault(NamedTuple):
    probability: float
    """In each step where it can be."""
    act: Callable[[Step, Random], None]
    can_be: Callable[[Life, int], bool] = lambda life, number: True


FAULTS = {
    "batches of other sizes": Fault(0.2, other_sizes),
    "a late rank": Fault(0.03, late),
    "1e38": Fault(0.01, all_elements(1e38)),
    "denormals": Fault(0.02, all_elements(1e-42)),
    "zeros on one rank": Fault(0.02, all_elements(0.0)),
    "zeros on all ranks": Fault(0.01, all_elements(0.0, everywhere=True)),
    # After what overwrites whole gradients
    "nan": Fault(0.01, one_element(math.nan)),
    "inf": Fault(0.01, one_element(math.inf)),
    "accumulation": Fault(0.1, accumulation),
    "unused parameters": Fault(0.3, unused, lambda life, number: life.find_unused),
    "a forward pass alone": Fault(0.05, idle_forwards),
    "uneven inputs": Fault(0.01, uneven_inputs, lambda life, number: life.adapt is None),
    # The very first step is exact, and the network's sum of floats depends on the buckets
    "a move": Fault(0.003, move, lambda life, number: number > 0),
}
