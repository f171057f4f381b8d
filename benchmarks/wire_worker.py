"""One host of `bench_wire`: the same model trained by every method in turn, timed, its interface's bytes read.

Started by `bench_wire` on each host of a `NetLab`; rank 0 writes the records.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import vsa_ddp

BATCH = 64
INPUTS, OUTPUTS = 784, 10
SECONDS_PER_TURN = 0.6
MOST_STEPS_PER_TURN = 5
WARMUP_STEPS = 2
WARMUP_STEPS_LOSSY = 5  # PowerSGD starts at its third, ours at its second


@dataclass
class Contender:
    """One method with its own copy of the model."""

    method: str
    bundle: int
    sparsity: int
    bucket_mib: int
    """DDP's `bucket_cap_mb`."""
    model: torch.nn.Module
    ours: vsa_ddp.VsaState | vsa_ddp.VsaModelAverager | None
    optimizer: torch.optim.Optimizer
    num_steps: int = 1

    @property
    def period(self) -> int:
        """Steps between what is sent."""
        return self.ours.period if isinstance(self.ours, vsa_ddp.VsaModelAverager) else 1


def mlp(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = [INPUTS, width, width, width, OUTPUTS]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())][:-1])


def half_hook(cast: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of torch's under another name: by its own, torch refuses the bfloat16 one on gloo, which can do it."""

    def half(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return cast(state, bucket)

    return half


def contender(method: str, bundle: int, sparsity: int, bucket_mib: int, width: int) -> Contender:
    model: torch.nn.Module = mlp(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ours: vsa_ddp.VsaState | vsa_ddp.VsaModelAverager | None = None
    name, _, period = method.partition(" ")
    if name == "averager":
        # its settings for Adam's changes, without the state of so many Adams
        adams: dict[str, Any] = {"bundle": bundle, "sparsity": sparsity, "whiten": True, "rescale": True}
        ours = vsa_ddp.VsaModelAverager(model, optimizer, period=int(period), **adams)
    elif name != "compute":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mib)
        if name == "powersgd":
            power = powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2)
            model.register_comm_hook(power, powerSGD_hook.powerSGD_hook)
        elif name in ("bf16", "fp16"):
            hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
            model.register_comm_hook(None, half_hook(hooks[name]))
        elif name != "dense":
            ours = vsa_ddp.register(model, bundle=bundle, sparsity=sparsity, wire=name)
    return Contender(method, bundle, sparsity, bucket_mib, model, ours, optimizer)


def train(c: Contender, x: torch.Tensor, steps: int) -> float:
    """Seconds of so many steps of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        c.optimizer.zero_grad()
        c.model(x).square().mean().backward()
        c.optimizer.step()
        if isinstance(c.ours, vsa_ddp.VsaModelAverager):
            c.ours.average_parameters()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def interface_bytes() -> tuple[int, int]:
    folder = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def measure(
    methods: list[tuple[str, int, int, int]], width: int, rounds: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    contenders = [contender(*method, width) for method in methods]
    x = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(dist.get_rank()))
    for c in contenders:
        note(f"width {width}: warm up {c.method}")
        train(c, x, c.period * (WARMUP_STEPS_LOSSY if c.ours or c.method == "powersgd" else WARMUP_STEPS))
        rounds_a_turn = min(MOST_STEPS_PER_TURN, max(1, int(SECONDS_PER_TURN / train(c, x, c.period))))
        c.num_steps = c.period * rounds_a_turn
    num_parameters = sum(p.numel() for p in contenders[0].model.parameters())
    records = [
        {
            "method": c.method,
            "bundle": c.bundle,
            "sparsity": c.sparsity,
            "bucket_mib": c.bucket_mib,
            "num_parameters": num_parameters,
            "num_steps": c.num_steps,
            "step_ms": [],
        }
        for c in contenders
    ]
    sent = [[0, 0, 0, 0] for _ in contenders]
    for turn in range(rounds):
        for c, record, totals in zip(contenders, records, sent, strict=True):
            note(f"width {width}: round {turn + 1} of {rounds}, {c.method}")
            before = interface_bytes()
            counted = c.ours.compression_stats() if c.ours else None
            record["step_ms"].append(train(c, x, c.num_steps) / c.num_steps * 1e3)
            after = interface_bytes()
            totals[0] += after[0] - before[0]
            totals[1] += after[1] - before[1]
            if c.ours and counted:
                stats = c.ours.compression_stats()
                totals[2] += stats.sent_bytes - counted.sent_bytes
                totals[3] += stats.received_bytes - counted.received_bytes
    names = ("interface_sent", "interface_received", "counted_sent", "counted_received")
    for c, record, totals in zip(contenders, records, sent, strict=True):
        record["median_ms"] = statistics.median(record["step_ms"])
        for name, total in zip(names, totals, strict=True):
            record[name] = total / (rounds * c.num_steps)
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--master", required=True)
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--methods", nargs="+", required=True, help="method:bundle:sparsity:MiB of a bucket")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{options.master}:29500",
        rank=options.rank,
        world_size=options.hosts,
        timeout=timedelta(minutes=5),
    )

    def note(text: str) -> None:
        if options.rank == 0:
            options.out.with_suffix(".note").write_text(text)

    parts = (text.split(":") for text in options.methods)
    methods = [(name, int(bundle), int(sparsity), int(mib)) for name, bundle, sparsity, mib in parts]
    records = [record for width in options.widths for record in measure(methods, width, options.rounds, note)]
    if options.rank == 0:
        options.out.write_text(json.dumps(records))
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts in the interpreter's own teardown


if __name__ == "__main__":
    main()
