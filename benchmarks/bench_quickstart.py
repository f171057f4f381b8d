"""The quickstart's comparison over seeds and learning rates: what its README table and its learning rates rest on.

    python -m benchmarks.bench_quickstart                  # all runs into benchmarks/results, about 100 min on 2 cores
    python -m benchmarks.bench_quickstart --method vsa     # one method's
    python -m benchmarks.bench_quickstart --quick          # one seed, few steps, only printed
    python -m benchmarks.bench_quickstart --report         # rebuild the tables from the stored runs

Every run is stored as it ends; a benchmark that was stopped goes on where it was.
"""

import itertools
import math
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.store import Record, Results, Store, find, page_head
from benchmarks.workers import check_names
from launch.cli import run_command
from launch.quickstart import FIGURES, LABELS, METHODS, default_ranks, figures_of, run_method
from launch.train import OptimizerName, TrainConfig, learning_rate
from vsa_ddp import learning_rate_factor

RESULTS = Path(__file__).parent / "results" / "quickstart_cpu2_202611.json"
SEEDS = (0, 1, 2)
# Ours is searched around the square-root rule, at the same spacing
GRIDS: dict[OptimizerName, dict[str, tuple[float, ...]]] = {
    "adamw": {
        "dense": (2.8e-3, 4e-3, 5.6e-3),
        "powersgd": (2.8e-3, 4e-3, 5.6e-3),
        "vsa": tuple(lr * learning_rate_factor() for lr in (2.8e-3, 4e-3, 5.6e-3)),
        "vsa-local": (2.8e-3, 4e-3, 5.6e-3, 8e-3),
    },
    "sgd": {
        "dense": (0.025, 0.05, 0.1),
        "powersgd": (0.0125, 0.025, 0.05),
        "vsa": (0.025, 0.05, 0.1, 0.2),
        "vsa-local": (0.025, 0.05, 0.1),
    },
}
LONG_STEPS = 3000
"""Compression noise shows on long runs: AdamW at the stated learning rates, not tuned again."""


def planned() -> list[TrainConfig]:
    """The stated learning rates first, then the rest of the grid, then long runs, then SGD."""
    configs = [
        TrainConfig(method=method, optimizer=optimizer, lr=lr, seed=seed)
        for optimizer, grid in GRIDS.items()
        for method, seed in itertools.product(METHODS, SEEDS)
        for lr in grid[method]
    ]
    configs.sort(key=lambda c: (not is_stated(vars(c)), c.seed))
    long = [replace(c, steps=LONG_STEPS) for c in configs if c.optimizer == "adamw" and is_stated(vars(c))]
    return sorted(configs + long, key=lambda c: c.optimizer != "adamw")


def is_stated(run: Record) -> bool:
    """Whether a run used the learning rate that the quickstart states for its method."""
    stated = TrainConfig(method=run["method"], optimizer=run["optimizer"])
    return math.isclose(run["lr"], learning_rate(stated), rel_tol=1e-6)


def key(run: Record) -> tuple[Any, ...]:
    return run["optimizer"], run["method"], f"{run['lr']:.4g}", run["seed"], run["steps"], run.get("bundle")


def report(results: Results) -> str:
    """The tables of a results file, as Markdown."""
    lines = page_head(
        "Quickstart: plain DDP, PowerSGD, vsa_ddp's hook and averager over seeds and learning rates",
        "bench_quickstart",
        results,
    )
    for optimizer, steps in sorted({(run["optimizer"], run["steps"]) for run in results["runs"]}):
        runs = find(results["runs"], optimizer=optimizer, steps=steps)
        stated = [run for run in runs if is_stated(run)]
        lines += ["", f"## {optimizer}, {steps} steps: every seed at the stated learning rate", ""]
        lines += ["| method | seed | lr | train loss | held-out loss | KiB/step | compression | ms/step | ms in hook |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for run in sorted(stated, key=lambda r: (METHODS.index(r["method"]), r["seed"])):
            lines.append(
                f"| {LABELS[run['method']]} | {run['seed']} | {run['lr']:.4g} | {_loss(run, 'train_loss')} | "
                f"{_loss(run, 'heldout_loss')} | {run['wire_bytes_per_step'] / 1024:.1f} | {run['compression']:.1f} | "
                f"{run['ms_per_step']:.1f} | {run['hook_ms']:.1f} |"
            )
        lines += ["", *_verdict(stated)]
        if steps == LONG_STEPS:
            continue
        lines += [
            "",
            f"## {optimizer}, {steps} steps: held-out loss over the learning rates, mean of seeds (each seed)",
            "",
        ]
        lines += ["| method | lr | mean | seeds |", "|---|---|---|---|"]
        for method, lr in sorted({(r["method"], r["lr"]) for r in runs}, key=lambda p: (METHODS.index(p[0]), p[1])):
            at = sorted(find(runs, method=method, lr=lr), key=lambda r: r["seed"])
            mark = " (stated)" if is_stated(at[0]) else ""
            each = ", ".join(_loss(r, "heldout_loss") for r in at)
            lines.append(f"| {LABELS[method]} | {lr:.4g}{mark} | {_mean(at)} | {each} |")
    return "\n".join(lines) + "\n"


def summary(results: Results) -> str:
    """The README's table: AdamW at the stated learning rates, mean over the seeds."""
    lines = ["| | learning rate | held-out loss | KiB per step | compression | ms per step | ms in hook or averager |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for method in METHODS:
        trained = find(results["runs"], optimizer="adamw", method=method, steps=TrainConfig.steps)
        runs = [run for run in trained if is_stated(run)]
        mean = {name: statistics.mean(run[name] for run in runs) for name in FIGURES}
        losses = sorted(run["heldout_loss"] for run in runs)
        spread = f"{losses[0]:.3f} to {losses[-1]:.3f}"
        lines.append(
            f"| {LABELS[method]} | {runs[0]['lr']:.4f} | {mean['heldout_loss']:.3f} ({spread}) | "
            f"{mean['wire_bytes_per_step'] / 1024:.1f} | {mean['compression']:.1f} x | {mean['ms_per_step']:.0f} | "
            f"{mean['hook_ms']:.0f} |"
        )
    return "\n".join(lines)


def _loss(run: Record, name: str) -> str:
    return "diverged" if run[name] is None else f"{run[name]:.3f}"


def _mean(runs: list[Record]) -> str:
    losses = [run["heldout_loss"] for run in runs]
    return "diverged" if None in losses else f"{statistics.mean(losses):.3f}"


def _verdict(stated: list[Record]) -> list[str]:
    """Ours against the others, seed by seed."""
    lines = []
    by = {(run["method"], run["seed"]): run for run in stated}
    for ours, seed in itertools.product(("vsa", "vsa-local"), SEEDS):
        three = [by.get((method, seed)) for method in (ours, "dense", "powersgd")]
        if any(run is None or run["heldout_loss"] is None for run in three):
            continue
        vsa, dense, powersgd = (run for run in three if run is not None)
        against = {
            m: 100 * (vsa["heldout_loss"] / run["heldout_loss"] - 1)
            for m, run in (("dense", dense), ("powersgd", powersgd))
        }
        fewer = powersgd["wire_bytes_per_step"] / vsa["wire_bytes_per_step"]
        lines.append(
            f"- {LABELS[ours]}, seed {seed}: held-out loss {against['dense']:+.1f} % against plain DDP, "
            f"{against['powersgd']:+.1f} % against PowerSGD, with {fewer:.1f} times fewer bytes than PowerSGD"
        )
    return lines


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 60 steps, stated learning rates; printed.")] = False,
    method: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild the page from the results.")] = False,
) -> None:
    """Compare the methods of the quickstart over seeds and learning rates."""
    check_names(method or (), METHODS)
    ranks = default_ranks()
    store = Store(json_file or (None if quick else RESULTS), "runs", rebuild=rebuild, ranks=ranks)
    done = {key(run) for run in store.list}
    if quick:
        configs = [TrainConfig(method=m, steps=60, lr=learning_rate(TrainConfig(method=m))) for m in METHODS]
    else:
        configs = planned()
    wanted = [config for config in configs if config.method in (method or METHODS)]
    waiting = [] if rebuild else [config for config in wanted if key(vars(config)) not in done]
    for config in tqdm(waiting, unit="run"):
        try:
            figures = run_method(config, ranks, show_bar=False)
        except subprocess.CalledProcessError as error:
            tqdm.write(f"{config} failed with exit code {error.returncode}; start again to retry.")
            continue
        store.add({**vars(config), **figures_of(figures)})
    store.write_page(report)


if __name__ == "__main__":
    run_command(main)
