"""Train the same model by plain DDP, PowerSGD, and vsa_ddp's hook and averager, and show loss and bytes side by side.

bash launch/quickstart.sh
bash launch/quickstart.sh --steps 200 --compression 320 --seed 1
bash launch/quickstart.sh --phases
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import matplotlib as mpl
import torch
import typer
from rich.console import Console
from rich.table import Table

from launch.cli import run_command
from launch.train import POWERSGD_RANK, Method, OptimizerName, TrainConfig, check_settings
from vsa_ddp import __version__

mpl.use("Agg")
from matplotlib import pyplot as plt

METHODS: tuple[Method, ...] = get_args(Method)
LABELS = {
    "dense": "plain DDP",
    "powersgd": f"PowerSGD {POWERSGD_RANK}",
    "vsa": "vsa_ddp, hook",
    "vsa-local": "vsa_ddp, averager",
    "phases": "vsa_ddp, hook, phases",
}
PASSED_ON = ("method", "steps", "compression", "bundle", "period", "wire", "ranks_per_node", "optimizer", "lr", "seed")
"""Settings that `launch.train` has an option for."""
FIGURES = ("train_loss", "heldout_loss", "wire_bytes_per_step", "compression", "ms_per_step", "hook_ms")


def default_ranks() -> int:
    """One rank per GPU, or two on CPU."""
    return torch.cuda.device_count() or 2


def run_method(config: TrainConfig, ranks: int, *, show_bar: bool = True) -> dict[str, Any]:
    """Train in a `torchrun` of its own. Returns the figures of `launch.train`.

    Raises: subprocess.CalledProcessError if a rank failed; what it said is on stderr already.
    """
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not show_bar:
        environment["TQDM_DISABLE"] = "1"
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, whatever the host's name resolves to
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "launch.train", "--json", str(file)]
        for name in PASSED_ON:
            if getattr(config, name) is not None:
                command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
        command += ["--phases"] if config.phases else []
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent.parent)
        figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
            platform.processor(),
        ),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vsa_ddp": __version__,
    }


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []


def print_table(runs: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="One model, one data order, and how ranks train it together")
    table.add_column("method")
    for column in (
        "lr",
        "train\nloss",
        "held-out\nloss",
        "KiB sent\nper step",
        "compres-\nsion",
        "ms per\nstep",
        "hook\nms",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for method, run in runs.items():
        losses = [f"{run[n]:.3f}" if math.isfinite(run[n]) else "diverged" for n in ("train_loss", "heldout_loss")]
        table.add_row(
            LABELS[method],
            f"{run['learning_rate']:.4f}",
            *losses,
            f"{run['wire_bytes_per_step'] / 1024:.1f}",
            f"{run['compression']:.1f} x",
            f"{run['ms_per_step']:.1f}",
            f"{run['hook_ms']:.1f}",
        )
    console.print(table)
    console.print(
        "Loss: nats per character. Sent: what one rank hands to the collectives, the\n"
        "exact first steps included. Hook: from a bucket to its result, codec and wire;\n"
        "the averager's: from the optimizer's step to the next one.\n"
        "All ranks are on this machine: times show what a codec costs, not what it saves."
    )


def plot(runs: dict[str, dict[str, Any]], file: Path) -> None:
    """Training loss against steps, and against bytes sent."""
    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for method, run in runs.items():
        losses = torch.tensor(run["losses"])
        window = max(1, len(losses) // 50)
        smooth = torch.stack([losses[max(0, i - window + 1) : i + 1].mean() for i in range(len(losses))])
        sent = torch.tensor(run["wire_bytes"], dtype=torch.float64).cumsum(0) / 2**20
        by_step.plot(range(1, len(losses) + 1), smooth, label=LABELS[method])
        by_bytes.plot(sent, smooth, label=f"{LABELS[method]}, {run['compression']:.0f} x")
    by_step.set(xlabel="step", ylabel="training loss (nats per character)")
    by_bytes.set(xlabel="MiB sent by one rank", xscale="log")
    for axis in (by_step, by_bytes):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = TrainConfig.steps,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one per GPU, or 2 on CPU.", show_default=False)
    ] = None,
    compression: Annotated[
        float | None,
        typer.Option(
            help="vsa_ddp: times fewer bits than float32; by itself 64, by two_shot 32, the averager 256.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer of all runs.")] = TrainConfig.optimizer,
    seed: Annotated[int, typer.Option(min=0, help="Seed of model, data order and keys.")] = TrainConfig.seed,
    phases: Annotated[
        bool, typer.Option("--phases", help="Also the hook with as many backward passes, and predicted steps between.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for quickstart.json and quickstart.png.")] = Path("runs"),
) -> int:
    """Train a character transformer by plain DDP, PowerSGD and vsa_ddp's hook and averager; show loss and bytes."""
    check_settings(compression=compression)
    ranks = default_ranks() if ranks is None else ranks
    if 0 < torch.cuda.device_count() < ranks:
        raise typer.BadParameter(
            f"{ranks} ranks need {ranks} GPUs, and there are {torch.cuda.device_count()}; set CUDA_VISIBLE_DEVICES= to "
            "train on CPU.",
            param_hint="'--ranks'",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder: {error}.", param_hint="'--out'") from None

    console = Console()
    runs: dict[str, dict[str, Any]] = {}
    config = TrainConfig(steps=steps, compression=compression, optimizer=optimizer, seed=seed, lr=None)
    configs = {method: replace(config, method=method) for method in METHODS}
    if phases:
        configs["phases"] = replace(config, method="vsa", phases=True)
    for name, each in configs.items():
        try:
            runs[name] = run_method(each, ranks)
        except subprocess.CalledProcessError as error:
            print(f"error: {LABELS[name]} failed with exit code {error.returncode}; see above.", file=sys.stderr)
            return 1
    print_table(runs, console)
    if phases:
        console.print(f"Phases: {runs['phases']['skipped']}.")
    plot(runs, out / "quickstart.png")
    report = {
        "methods": {method: figures_of(run) for method, run in runs.items()},
        "config": {
            **{name: value for name, value in asdict(config).items() if name not in ("method", "lr", "phases")},
            "ranks": ranks,
            "learning_rates": {method: run["learning_rate"] for method, run in runs.items()},
            "num_parameters": runs["vsa"]["num_parameters"],
            "corpus": runs["vsa"]["corpus"],
            "hardware": hardware(),
        },
    }
    if phases:
        report["phases"] = runs["phases"]["phases"]
    (out / "quickstart.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Written: {out / 'quickstart.json'} and {out / 'quickstart.png'}", soft_wrap=True)
    return 0


def figures_of(run: dict[str, Any]) -> dict[str, float | None]:
    """What is written down of a run. JSON has no NaN: a run that diverged has null."""
    return {name: run[name] if math.isfinite(run[name]) else None for name in FIGURES}


if __name__ == "__main__":
    run_command(main)
