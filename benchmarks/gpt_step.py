"""What the hook adds to a training step of a GPT, on one rank: for `bench_codec`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import vsa_ddp
from launch.charlm import CharTransformer

WARMUP_STEPS = 3
STEPS_PER_TURN = 10
"""Scales are measured in one of them."""


@dataclass(frozen=True)
class GptConfig:
    """124 M parameters, the embedding shared with the head, as in GPT-2."""

    batch: int = 8
    length: int = 1024
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 50304


def gpt(config: GptConfig, device: torch.device) -> CharTransformer:
    torch.manual_seed(0)
    model = CharTransformer(config.width, config.num_layers, config.num_heads, config.length, config.vocabulary)
    model.head.weight = model.embed.weight
    return model.to(device, torch.bfloat16)


def step_of(model: DistributedDataParallel, config: GptConfig, device: torch.device) -> Callable[[], None]:
    """Forward, backward and AdamW, on the same batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    window = torch.randint(config.vocabulary, (config.batch, config.length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()

    return step


def measure(config: GptConfig, device: torch.device, backend: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per step of plain DDP and of the hook at B=4, in turns."""
    plain, ours = (DistributedDataParallel(gpt(config, device), gradient_as_bucket_view=True) for _ in range(2))
    vsa_ddp.register(ours, bundle=4, backend=backend)
    steps = {"plain DDP": step_of(plain, config, device), "hook": step_of(ours, config, device)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        _turn_ms(step, WARMUP_STEPS, device)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_turn_ms(step, STEPS_PER_TURN, device))
    num_parameters = sum(p.numel() for p in plain.parameters())
    shared = {"what": "step", "backend": backend, "num_parameters": num_parameters, **vars(config)}
    return [{**shared, "method": name, "ms": ms, "median_ms": statistics.median(ms)} for name, ms in times.items()]


def _turn_ms(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Milliseconds per step."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - start) / count * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
