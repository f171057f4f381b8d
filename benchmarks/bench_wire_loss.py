"""What a wire costs in loss: the quickstart's model on four ranks by every wire, over seeds.

    python -m benchmarks.bench_wire_loss              # 400 steps, 3 seeds, into benchmarks/results; about 15 min
    python -m benchmarks.bench_wire_loss --quick      # one seed, 40 steps, only printed
    python -m benchmarks.bench_wire_loss --report     # rebuild the page from the stored runs

Every run is stored as it ends; a benchmark that was stopped goes on where it was.
"""

import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.store import Record, Results, Store, find, page_head
from launch.cli import run_command
from launch.quickstart import figures_of, run_method
from launch.train import TrainConfig, learning_rate
from vsa_ddp.config import WireName

RESULTS = Path(__file__).parent / "results" / "wire_loss_cpu2_202611.json"
RANKS = 4
SEEDS = (0, 1, 2)
STEPS = 400
BUNDLE = 4
LR = learning_rate(TrainConfig(bundle=BUNDLE))
"""The same for all wires."""
WIRES: tuple[tuple[WireName, int], ...] = (
    ("all_gather", 1),
    ("all_reduce", 1),
    ("two_shot", 1),
    ("all_gather", 2),
    ("two_shot", 2),
)
"""Wires, and ranks per node."""


def key(run: Record) -> tuple[Any, ...]:
    return run["wire"], run["ranks_per_node"], run["seed"], run["steps"]


def excess(run: Record, runs: list[Record]) -> float:
    """Held-out loss over that of `all_gather` with the same seed, less one."""
    (reference,) = find(runs, wire="all_gather", ranks_per_node=1, seed=run["seed"], steps=run["steps"])
    ratio: float = run["heldout_loss"] / reference["heldout_loss"]
    return ratio - 1


def report(results: Results) -> str:
    runs = results["runs"]
    lines = page_head("Loss by wire: the quickstart's model on 4 ranks, B=4, AdamW", "bench_wire_loss", results)
    lines += [
        "",
        "Held-out loss in nats per character, and against all_gather with the same seed; what a rank hands over.",
    ]
    lines += [""]
    lines += [
        "| wire | ranks per node | steps | seeds | held-out loss | against all_gather | mean | KiB sent per step |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for wire, ranks in WIRES:
        at = sorted(find(runs, wire=wire, ranks_per_node=ranks), key=lambda r: r["seed"])
        if not at:
            continue
        excesses = [excess(run, runs) for run in at]
        losses = [f"{run['heldout_loss']:.3f}" for run in at]
        lines.append(
            f"| {wire} | {ranks} | {at[0]['steps']} | {', '.join(str(r['seed']) for r in at)} | "
            f"{', '.join(losses)} | "
            f"{', '.join(f'{100 * e:+.1f} %' for e in excesses)} | {100 * statistics.mean(excesses):+.1f} % | "
            f"{statistics.mean(r['wire_bytes_per_step'] for r in at) / 1024:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 40 steps; printed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild the page from the results.")] = False,
) -> None:
    """Compare the wires' losses over seeds."""
    store = Store(json_file or (None if quick else RESULTS), "runs", rebuild=rebuild, ranks=RANKS)
    done = {key(run) for run in store.list}
    configs = [
        TrainConfig(wire=wire, ranks_per_node=ranks, seed=seed, steps=40 if quick else STEPS, bundle=BUNDLE, lr=LR)
        for seed, (wire, ranks) in itertools.product(SEEDS[:1] if quick else SEEDS, WIRES)
    ]
    for config in tqdm([] if rebuild else [c for c in configs if key(vars(c)) not in done], unit="run"):
        store.add({**vars(config), **figures_of(run_method(config, RANKS, show_bar=False))})
    store.write_page(report)


if __name__ == "__main__":
    run_command(main)
