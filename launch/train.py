"""Train a character-level transformer with one way of sending gradients.

    torchrun --standalone --nproc-per-node=2 -m launch.train --method vsa --bundle 4
    torchrun --standalone --nproc-per-node=2 -m launch.train --method dense --json dense.json

gloo on CPU; NCCL with one rank per GPU when there are GPUs. The hook is the one line in `compress`.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vsa_ddp
from launch import metered
from launch.charlm import CharTransformer, Corpus, windows
from launch.cli import run_command
from launch.timing import TimedDDP
from vsa_ddp.config import WireName

Method = Literal["dense", "powersgd", "vsa"]
OptimizerName = Literal["adamw", "sgd"]

# Each method's own best of the grid in benchmarks/results; vsa with AdamW is dense times learning_rate_factor(bundle)
LEARNING_RATES: dict[tuple[str, str], float] = {
    ("adamw", "dense"): 4e-3,
    ("adamw", "powersgd"): 4e-3,
    ("sgd", "dense"): 0.05,
    ("sgd", "powersgd"): 0.025,
    ("sgd", "vsa"): 0.1,
}
POWERSGD_RANK = 4
HELDOUT_WINDOWS = 1024


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Equal on all ranks."""

    method: Method = "vsa"
    steps: int = 1000
    bundle: int = 4
    wire: WireName = "all_gather"
    optimizer: OptimizerName = "adamw"
    lr: float | None = None
    """None: the method's own, see `learning_rate`."""
    seed: int = 0
    batch: int = 8
    """Windows per rank and step."""
    length: int = 64
    width: int = 64
    num_layers: int = 8
    num_heads: int = 4


def check_bundle(bundle: int) -> None:
    """Raises: typer.BadParameter if `VsaConfig` refuses it."""
    try:
        vsa_ddp.VsaConfig(bundle=bundle)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--bundle'") from None


def learning_rate(config: TrainConfig) -> float:
    """The stated learning rate of a method: a constant, or for ours with AdamW the square-root rule."""
    if config.lr is not None:
        return config.lr
    if (config.optimizer, config.method) == ("adamw", "vsa"):
        return LEARNING_RATES["adamw", "dense"] * vsa_ddp.learning_rate_factor(config.bundle)
    return LEARNING_RATES[config.optimizer, config.method]


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    lr = learning_rate(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def compress(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    """Give the model its communication hook; none for plain DDP."""
    if config.method == "vsa":
        vsa_ddp.register(model, optimizer, bundle=config.bundle, wire=config.wire, seed=config.seed)
    elif config.method == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, POWERSGD_RANK, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 5 % linear warm-up, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train as this rank of the default group. Returns the figures of the run on rank 0, None on the others."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    corpus = Corpus()
    torch.manual_seed(config.seed)
    model = CharTransformer(config.width, config.num_layers, config.num_heads, config.length).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    # PowerSGD hangs or aborts on gloo with two buckets or more
    cap = {"bucket_cap_mb": 1024} if config.method == "powersgd" else {}
    ddp_model = TimedDDP(model, device_ids=[device.index] if device.type == "cuda" else None, **cap)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, config.steps))
    compress(ddp_model, optimizer, config)

    order = torch.Generator().manual_seed(config.seed * 1000 + rank)
    losses = torch.zeros(config.steps)
    wire_bytes, step_ms, hook_ms = [], [], []
    hidden = rank != 0 or "TQDM_DISABLE" in os.environ
    bar = tqdm(total=config.steps, desc=f"{config.method:>8}", unit="step", disable=hidden, mininterval=0.5)
    started = metered.wire_bytes()
    for step in range(config.steps):
        x, target = (t.to(device) for t in windows(corpus.train, config.batch, config.length, order))
        sent_before, start = metered.wire_bytes(), time.perf_counter()
        loss = ddp_model(x, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses[step] = loss.item()
        step_ms.append((time.perf_counter() - start) * 1e3)
        hook_ms.append(ddp_model.take_hook_ms())
        wire_bytes.append(metered.wire_bytes() - sent_before)
        recent = losses[max(0, step - 19) : step + 1].mean()
        sent = (metered.wire_bytes() - started) / 2**20
        bar.set_postfix_str(f"loss {recent:.3f}, sent {sent:.1f} MiB", refresh=False)
        bar.update()
    bar.close()

    dist.all_reduce(losses_on := losses.to(device).div_(world_size))
    heldout = heldout_loss(model, corpus, config, device)
    if rank != 0:
        return None
    dense_bytes = num_parameters * 4
    per_step = sum(wire_bytes) / config.steps
    return {
        "train_loss": losses_on[-max(1, config.steps // 10) :].mean().item(),
        "heldout_loss": heldout,
        "wire_bytes_per_step": per_step,
        "compression": dense_bytes / per_step,
        "ms_per_step": float(torch.tensor(step_ms[len(step_ms) // 10 :]).median()),
        "hook_ms": float(torch.tensor(hook_ms[len(hook_ms) // 10 :]).median()),
        "learning_rate": learning_rate(config),
        "num_parameters": num_parameters,
        "losses": losses_on.tolist(),
        "wire_bytes": wire_bytes,
        "config": asdict(config),
        "corpus": {"num_files": corpus.num_files, "train_bytes": len(corpus.train), "sha256": corpus.sha256},
    }


@torch.no_grad()
def heldout_loss(model: CharTransformer, corpus: Corpus, config: TrainConfig, device: torch.device) -> float:
    """Mean loss in nats per character on fixed windows of the held-out text."""
    fixed = torch.Generator().manual_seed(0)
    model.eval()
    total = 0.0
    for _ in range(HELDOUT_WINDOWS // 64):
        x, target = windows(corpus.heldout, 64, config.length, fixed)
        total += model(x.to(device), target.to(device)).item()
    return total / (HELDOUT_WINDOWS // 64)


def main(
    method: Annotated[Method, typer.Option(help="How gradients are sent.")] = "vsa",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = TrainConfig.steps,
    bundle: Annotated[int, typer.Option(help="vsa: slots per hypervector, 1 to 4096.")] = 4,
    wire: Annotated[WireName, typer.Option(help="vsa: how messages travel.")] = "all_gather",
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model, the data order and the keys.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Train under torchrun, and print or write the figures."""
    check_bundle(bundle)
    config = TrainConfig(method=method, steps=steps, bundle=bundle, wire=wire, optimizer=optimizer, lr=lr, seed=seed)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("metered", timeout=timedelta(minutes=2))
    figures = train(config)
    if figures is not None and json_file is not None:
        json_file.write_text(json.dumps(figures))
    elif figures is not None:
        typer.echo({k: v for k, v in figures.items() if k not in ("losses", "wire_bytes")})
    dist.barrier()
    # gloo sometimes aborts in the interpreter's own teardown; everything is written by now
    os._exit(0)


if __name__ == "__main__":
    run_command(main)
