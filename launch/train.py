"""Train a character-level transformer on all ranks, in one of several ways.

    torchrun --standalone --nproc-per-node=2 -m launch.train --method vsa --compression 80
    torchrun --standalone --nproc-per-node=2 -m launch.train --method vsa-local --period 5
    torchrun --standalone --nproc-per-node=2 -m launch.train --method dense --json dense.json
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m launch.train --checkpoint runs/saved

gloo on CPU; NCCL with one rank per GPU when there are GPUs. The hook is the one line in `compress`; the averager is
made and called in `train`.
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
import typer
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vsa_ddp
from launch import metered
from launch.charlm import CharTransformer, Corpus, windows
from launch.checkpoint import Checkpoint, Stateful
from launch.cli import run_command
from launch.timing import TimedAverager, TimedDDP
from vsa_ddp.config import WireName
from vsa_ddp.nodes import RanksPerNode

Method = Literal["dense", "powersgd", "vsa", "vsa-local"]
OptimizerName = Literal["adamw", "sgd"]

# Each method's own best of the grid in benchmarks/results, but for vsa-local with SGD, which has plain DDP's; vsa with
# AdamW is dense times learning_rate_factor
LEARNING_RATES: dict[tuple[str, str], float] = {
    ("adamw", "dense"): 4e-3,
    ("adamw", "powersgd"): 4e-3,
    ("adamw", "vsa-local"): 4e-3,
    ("sgd", "dense"): 0.05,
    ("sgd", "powersgd"): 0.025,
    ("sgd", "vsa"): 0.1,
    ("sgd", "vsa-local"): 0.05,
}
POWERSGD_RANK = 4
HELDOUT_WINDOWS = 1024


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Equal on all ranks."""

    method: Method = "vsa"
    steps: int = 1000
    compression: float | None = None
    """None: that of `vsa_ddp.register` or of `vsa_ddp.VsaModelAverager`, unless there is a bundle."""
    bundle: int | None = None
    """Instead of the compression: the same code for every wire."""
    period: int = 1
    """Steps between two averages, for "vsa-local"."""
    wire: WireName | None = None
    """None: that of `vsa_ddp.register` or of `vsa_ddp.VsaModelAverager`."""
    ranks_per_node: RanksPerNode = 1
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
    phases: bool = False
    """Skip backward passes where predicted gradients prove right. `steps` counts the others."""


def check_settings(**given: Any) -> None:
    """Raises: typer.BadParameter if `VsaConfig` refuses them."""
    given = {name: value for name, value in given.items() if value is not None}
    try:
        vsa_ddp.VsaConfig.from_settings(given)
    except ValueError as error:
        options = [f"--{name.replace('_', '-')}" for name in given]
        raise typer.BadParameter(str(error), param_hint=f"'{', '.join(options)}'") from None


def check_checkpoint(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raises: typer.BadParameter if the run cannot be saved, or the folder has another run."""
    hint = "'--checkpoint'"
    if config.method == "powersgd":
        raise typer.BadParameter("saves no residuals of PowerSGD, without which it loses more.", param_hint=hint)
    try:
        checkpoint.check(asdict(config))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def take_gpu(local_rank: int) -> None:
    """Raises: typer.BadParameter if this machine has fewer GPUs than ranks."""
    if local_rank >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"rank {local_rank} of this machine needs a GPU of its own, and there are {torch.cuda.device_count()}; "
            "start fewer ranks, or set CUDA_VISIBLE_DEVICES= to train on CPU."
        )
    torch.cuda.set_device(local_rank)


def code(config: TrainConfig) -> dict[str, Any]:
    """Settings that decide what is sent, and how much noise there is; without those that were left out."""
    given = {name: getattr(config, name) for name in ("compression", "bundle", "wire")}
    return {name: value for name, value in given.items() if value is not None}


def settings(config: TrainConfig) -> dict[str, Any]:
    """Of the hook and of the averager."""
    return {**code(config), "ranks_per_node": config.ranks_per_node, "seed": config.seed}


def learning_rate(config: TrainConfig) -> float:
    """The stated learning rate of a method: a constant, or for ours with AdamW the square-root rule."""
    if config.lr is not None:
        return config.lr
    if (config.optimizer, config.method) == ("adamw", "vsa"):
        return LEARNING_RATES["adamw", "dense"] * vsa_ddp.learning_rate_factor(**code(config))
    return LEARNING_RATES[config.optimizer, config.method]


def make_optimizer(
    model: torch.nn.Module, name: OptimizerName, lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """`momentum` is beta1 of AdamW."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.95), weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def wrap(model: torch.nn.Module, device: torch.device, config: TrainConfig) -> TimedDDP:
    """The model in DDP."""
    # PowerSGD hangs or aborts on gloo with two buckets or more
    cap = {"bucket_cap_mb": 1024} if config.method == "powersgd" else {}
    return TimedDDP(model, device_ids=[device.index] if device.type == "cuda" else None, **cap)


def compress(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> dict[str, Stateful]:
    """Give the model its communication hook; none for plain DDP. Returns what a checkpoint keeps of it."""
    if config.method == "vsa":
        return {"hook": vsa_ddp.register(model, optimizer, **settings(config))}
    if config.method == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, POWERSGD_RANK, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return {}


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 5 % linear warm-up, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def take_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    phases: vsa_ddp.PhasedTrainer | None,
) -> tuple[float, bool]:
    """One optimizer step. Returns the loss of the batch, and whether there was a backward pass."""
    if phases is None:
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), True
    with phases.step() as step:
        loss = model(*batch)
        step.backward(loss)
        optimizer.step()
    return loss.item(), not step.predicted


class History:
    """What this rank measured, step by step: predicted steps count with the one that follows."""

    def __init__(self, steps: int) -> None:
        self.losses = torch.zeros(steps)
        self.wire_bytes: list[int] = []
        self.step_ms: list[float] = []
        self.hook_ms: list[float] = []

    def average_losses(self, device: torch.device) -> None:
        """Replace the losses by the mean of all ranks: exactly, so doing it again or in between changes nothing."""
        total = self.losses.to(device, torch.float64)  # where the sum of float32 has no rounding, in whatever order
        dist.all_reduce(total)
        self.losses = total.div_(dist.get_world_size()).to("cpu", torch.float32)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def train(config: TrainConfig, checkpoint: Checkpoint | None = None) -> dict[str, Any] | None:
    """Train as this rank of the default group, from the checkpoint on if it has one.

    Returns the figures of the run on rank 0, None on the others.
    """
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    corpus = Corpus()
    torch.manual_seed(config.seed)
    model = CharTransformer(config.width, config.num_layers, config.num_heads, config.length).to(device)
    optimizer = make_optimizer(model, config.optimizer, learning_rate(config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, config.steps))
    history = History(config.steps)
    parts: dict[str, Stateful] = {"scheduler": scheduler, "history": history}
    own: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    trained, phases, averager = model, None, None
    if config.method == "vsa-local":
        own["averager"] = averager = clock = TimedAverager(model, optimizer, period=config.period, **settings(config))
    else:
        trained = clock = wrap(model, device, config)
        parts, own = {**parts, **own, **compress(clock, optimizer, config)}, {}
        if config.phases:
            parts["phases"] = phases = vsa_ddp.PhasedTrainer(clock, optimizer)

    start_step = checkpoint.load(parts, own) if checkpoint is not None else 0
    order = torch.Generator().manual_seed(config.seed * 1000 + rank)
    for _ in range(
        phases.schedule.total_step if phases is not None else start_step
    ):  # draw what was drawn, so the data order is that of a run without a break
        windows(corpus.train, config.batch, config.length, order)
    if start_step and rank == 0:
        print(f"resumed after step {start_step}", file=sys.stderr, flush=True)
    hidden = rank != 0 or "TQDM_DISABLE" in os.environ
    description = {"desc": f"{config.method:>9}", "unit": "step", "mininterval": 0.5}
    bar = tqdm(total=config.steps, initial=start_step, disable=hidden, **description)
    sent_in_all, sent_before, ms, step = sum(history.wire_bytes), metered.wire_bytes(), 0.0, start_step
    while step < config.steps:
        x, target = (t.to(device) for t in windows(corpus.train, config.batch, config.length, order))
        start = time.perf_counter()
        loss, has_backward = take_step(trained, optimizer, (x, target), phases)
        if averager is not None:
            averager.average_parameters()
            if step == config.steps - 1:
                averager.synchronize()
        ms += (time.perf_counter() - start) * 1e3
        if not has_backward:
            continue
        scheduler.step()
        history.losses[step] = loss
        history.step_ms.append(ms)
        history.hook_ms.append(clock.take_hook_ms())
        history.wire_bytes.append(metered.wire_bytes() - sent_before)
        sent_in_all += history.wire_bytes[-1]
        sent_before, ms, step = metered.wire_bytes(), 0.0, step + 1
        recent = history.losses[max(0, step - 20) : step].mean()
        bar.set_postfix_str(f"loss {recent:.3f}, sent {sent_in_all / 2**20:.1f} MiB", refresh=False)
        bar.update()
        if checkpoint is not None and step % checkpoint.every == 0:
            history.average_losses(device)
            checkpoint.save(step, asdict(config), parts, own)
    bar.close()

    history.average_losses(device)
    if rank != 0:
        return None
    heldout = heldout_loss(model, corpus, config, device)
    outcome = figures(config, history, heldout, model, corpus)
    return (
        outcome if phases is None else {**outcome, "phases": phases.stats()._asdict(), "skipped": str(phases.stats())}
    )


def typical(values: list[float], period: int) -> float:
    """The median of all periods' means."""
    num_periods = max(1, len(values) // period)
    means = [statistics.mean(values[i * period : (i + 1) * period]) for i in range(num_periods)]
    return statistics.median(means)


def figures(
    config: TrainConfig, history: History, heldout: float, model: CharTransformer, corpus: Corpus
) -> dict[str, Any]:
    """What is reported of a run, from rank 0's history."""
    num_parameters = sum(p.numel() for p in model.parameters())
    dense_bytes = num_parameters * 4
    per_step = sum(history.wire_bytes) / config.steps
    tenth = config.steps // 10
    return {
        "train_loss": history.losses[-max(1, tenth) :].mean().item(),
        "heldout_loss": heldout,
        "wire_bytes_per_step": per_step,
        "compression": dense_bytes / per_step,
        "ms_per_step": typical(history.step_ms[tenth:], config.period),
        "hook_ms": typical(history.hook_ms[tenth:], config.period),
        "learning_rate": learning_rate(config),
        "num_parameters": num_parameters,
        "losses": history.losses.tolist(),
        "wire_bytes": history.wire_bytes,
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
    method: Annotated[
        Method, typer.Option(help="How ranks train together: vsa is the hook, vsa-local the averager.")
    ] = "vsa",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = TrainConfig.steps,
    compression: Annotated[
        float | None,
        typer.Option(
            help="Ours: times fewer bits than float32; by itself 64, by two_shot 32; vsa-local 256.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[int | None, typer.Option(help="Ours, instead of compression: slots per hypervector.")] = None,
    period: Annotated[int, typer.Option(min=1, help="vsa-local: steps between two averages.")] = 1,
    wire: Annotated[
        WireName | None,
        typer.Option(
            help="Ours: how messages travel; by itself all_gather, beyond 4 ranks two_shot if no compression is given "
            "or by vsa-local.",
            show_default=False,
        ),
    ] = None,
    ranks_per_node: Annotated[
        str,
        typer.Option(help='Ours: ranks that average in full precision before the wire; "local": those of a machine.'),
    ] = "1",
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model, the data order and the keys.")] = 0,
    phases: Annotated[
        bool,
        typer.Option(
            "--phases", help="Skip backward passes where predicted gradients prove right; --steps counts others."
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    checkpoint_folder: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Save into this folder, which all hosts see; go on from what is there."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
) -> None:
    """Train under torchrun, and print or write the figures."""
    ranks = int(ranks_per_node) if ranks_per_node.isdecimal() else ranks_per_node
    check_settings(ranks_per_node=ranks)
    check_settings(compression=compression, bundle=bundle, wire=wire)
    if phases and method == "vsa-local":
        raise typer.BadParameter("predicts averaged gradients, and vsa-local has none.", param_hint="'--phases'")
    if period > 1 and method != "vsa-local":
        raise typer.BadParameter(f"is for vsa-local, and the method is {method}.", param_hint="'--period'")
    config = TrainConfig(
        method=method,
        steps=steps,
        compression=compression,
        bundle=bundle,
        period=period,
        wire=wire,
        ranks_per_node=cast(RanksPerNode, ranks),
        optimizer=optimizer,
        lr=lr,
        seed=seed,
        phases=phases,
    )
    checkpoint = None
    if checkpoint_folder is not None:
        checkpoint = Checkpoint(folder=checkpoint_folder, every=checkpoint_every)
        check_checkpoint(checkpoint, config)
    if torch.cuda.is_available():
        take_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("metered", timeout=timedelta(minutes=2))
    outcome = train(config, checkpoint)
    if outcome is not None and json_file is not None:
        json_file.write_text(json.dumps(outcome))
    elif outcome is not None:
        typer.echo({k: v for k, v in outcome.items() if k not in ("losses", "wire_bytes")})
    dist.barrier()
    # gloo sometimes aborts in the interpreter's own teardown; everything is written by now
    os._exit(0)


if __name__ == "__main__":
    run_command(main)
