"""Is a skipped backward pass worth it: loss at equal backward passes and at equal cost, where it pays and where not.

    python -m benchmarks.bench_phases --quick                       # two small tasks, one seed, a minute; only printed
    python -m benchmarks.bench_phases --full                        # all of it into benchmarks/results: many hours
    python -m benchmarks.bench_phases --full --suite digits --suite full-batch --hours 2
    python -m benchmarks.bench_phases --report                      # rebuild the page from the stored runs

Ranks take turns in one process (`phase_methods`), with the package's own schedule and predictor. Every method has the
same number of backward passes, in which the learning rate runs through its whole schedule; "plain, same cost" has as
many more as the predicted steps of the default, "gate, ema", cost, at one for a forward pass and two for a backward
one. Learning rates are tried with the first seed on a grid that grows while its best is at an end; the best at which no
seed diverges is taken. Some suites have one rate instead, deliberately conservative. Every run is stored as it ends,
and a benchmark that was stopped goes on where it was.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks import bench_training
from benchmarks.bench_training import rank_orders, score
from benchmarks.phase_methods import METHODS, PhasedRun
from benchmarks.store import Record, Results, Store, page_head
from benchmarks.tasks import TASKS
from benchmarks.workers import check_names, check_options, work
from launch.cli import run_command
from launch.train import OptimizerName, make_optimizer, schedule

RESULTS = Path(__file__).parent / "results" / "phases_cpu2_202611.json"
SEEDS = (0, 1, 2)
RANKS = 4
PERIOD = 3
"""Steps between averages of local SGD: about the bytes per step of the fixed schedule, 26 steps to 9 gradients."""
LOCAL, SAME_COST, TWICE, FASTER = f"local {PERIOD}", "plain, same cost", "plain, twice the passes", "plain, lr x 2.89"
NAMES = (*METHODS, SAME_COST, TWICE, FASTER, LOCAL)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A task with an optimizer, for all methods."""

    task: str
    optimizer: OptimizerName
    backwards: int
    base_lr: float
    """Where the search begins: times two to the halves. The only one if not `tuned`."""
    tuned: bool = True
    methods: tuple[str, ...] = NAMES

    def matches(self, run: Record) -> bool:
        return all(run[name] == getattr(self, name) for name in ("task", "optimizer", "backwards", "tuned"))


SUITES = {
    "char": Suite(task="transformer", optimizer="adamw", backwards=300, base_lr=4e-3),
    "char-conservative": Suite(task="transformer", optimizer="adamw", backwards=300, base_lr=1e-4, tuned=False),
    "digits": Suite(task="digits", optimizer="sgd", backwards=300, base_lr=0.05),
    "full-batch": Suite(task="full batch", optimizer="adamw", backwards=200, base_lr=0.04),
    "full-batch-sgd": Suite(task="full batch", optimizer="sgd", backwards=200, base_lr=0.2),
    "fine-tuning": Suite(task="fine-tuning", optimizer="adamw", backwards=150, base_lr=2e-4, tuned=False),
    "fine-tuning-sgd": Suite(task="fine-tuning", optimizer="sgd", backwards=150, base_lr=2e-3, tuned=False),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    task: str
    optimizer: OptimizerName
    backwards: int
    """Budget."""
    tuned: bool
    method: str
    lr: float
    seed: int = 0
    extra: int = 0
    """Backward passes beyond the budget."""


# Running


def run(trial: Trial) -> Record:
    """Train. The loss is None once a loss was not finite or far above where it began."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = run_local(trial) if trial.method == LOCAL else run_phased(trial)
    return {**asdict(trial), **found, "seconds": time.perf_counter() - start}


def run_phased(trial: Trial) -> Record:
    budget = trial.backwards + trial.extra
    config, skip = METHODS.get(trial.method, METHODS["plain"])
    torch.manual_seed(trial.seed)
    model = TASKS[trial.task].model()
    setting = bench_training.Trial(
        task=trial.task,
        optimizer=trial.optimizer,
        method="dense",
        lr=trial.lr,
        momentum=0.9,
        steps=budget,
        seed=trial.seed,
    )
    optimizer = make_optimizer(model, setting.optimizer, setting.lr, setting.momentum)
    phased = PhasedRun(TASKS[trial.task], model, optimizer, config, rank_orders(setting), skip)
    good = True
    while phased.backwards < budget and good:
        # by backward passes: how many steps there will be, the gate has yet to find out
        share = schedule(min(int(phased.backwards), budget - 1), budget) if trial.tuned else 1.0
        for group in optimizer.param_groups:
            group["lr"] = trial.lr * share
        phased.step()
        good = phased.section_start.held or not phased.losses or not diverged(phased.losses)
    good = good and not diverged(phased.losses)
    steps = phased.schedule.total_step
    return {
        "heldout_loss": TASKS[trial.task].heldout_loss(model) if good else None,
        "steps": steps,
        "predicted": phased.schedule.steps["predict"],
        "undone": phased.schedule.stats(0, {}).undone,
        "backwards_done": phased.backwards,
        "cost": phased.forwards + 2.0 * phased.backwards,
        "gradients_sent": phased.gradients_sent,
        "error_by_horizon": phased.schedule.error_by_horizon(),
    }


def diverged(losses: list[float]) -> bool:
    return not math.isfinite(losses[-1]) or losses[-1] > 3 * losses[0] + 1


def run_local(trial: Trial) -> Record:
    """As many averages of the weights as the others have gradients, and a backward pass in each step between."""
    steps = trial.backwards * PERIOD
    setting = bench_training.Trial(
        task=trial.task,
        optimizer=trial.optimizer,
        method=LOCAL,
        lr=trial.lr,
        momentum=0.9,
        steps=steps,
        seed=trial.seed,
    )
    found = bench_training.run(setting)
    cost = {"backwards_done": steps, "cost": 3.0 * steps, "gradients_sent": trial.backwards, "error_by_horizon": {}}
    return {"heldout_loss": found["heldout_loss"], "steps": steps, "predicted": 0, **cost}


# Planning


def waiting(suite: Suite, method: str, runs: list[Record]) -> Iterator[Trial]:
    """What can be run now: the grid with the first seed, its extension while the best is at an end, other seeds."""
    mine = [r for r in runs if suite.matches(r) and r["method"] == method]
    trial = Trial(
        task=suite.task,
        optimizer=suite.optimizer,
        backwards=suite.backwards,
        tuned=suite.tuned,
        method=method,
        lr=suite.base_lr * (26 / 9 if method == FASTER else 1),
    )
    if method in (SAME_COST, TWICE):
        gated = best_runs(suite, "gate, ema", runs)
        plain = best_runs(suite, "plain", runs)
        if len(gated) < len(SEEDS) or len(plain) < len(SEEDS) or any(score(r) == math.inf for r in gated):
            return
        extra = round(statistics.mean(r["cost"] for r in gated) / 3) - suite.backwards
        trial = replace(trial, lr=plain[0]["lr"], extra=suite.backwards if method == TWICE else extra)
    elif method == FASTER and suite.tuned:
        return  # the search has it
    elif suite.tuned:
        first = {_exponent(r, suite): score(r) for r in mine if r["seed"] == SEEDS[0]}
        first |= {_exponent(r, suite): math.inf for r in mine if score(r) == math.inf}  # no rate to train at
        wanted = {-1, 0, 1} - first.keys()
        best = min(first, key=lambda k: first[k], default=0)
        if not wanted:
            wanted = {best - 1, best + 1} - first.keys()
        if wanted := {k for k in wanted if abs(k) <= 8}:
            yield from (replace(trial, lr=trial.lr * 2 ** (k / 2)) for k in sorted(wanted))
            return
        if first[best] == math.inf:
            return
        trial = replace(trial, lr=trial.lr * 2 ** (best / 2))
    done = {r["seed"] for r in mine if r["lr"] == trial.lr}
    yield from (replace(trial, seed=seed) for seed in SEEDS if seed not in done)


def _exponent(run: Record, suite: Suite) -> int:
    """Of the run's learning rate on the grid."""
    return round(2 * math.log2(run["lr"] / suite.base_lr))


def plan(suites: list[Suite], runs: list[Record]) -> list[Trial]:
    return [trial for suite in suites for method in suite.methods for trial in waiting(suite, method, runs)]


# Reporting


def best_runs(suite: Suite, method: str, runs: list[Record]) -> list[Record]:
    """All seeds at the learning rate that has all seeds, or most, and the least mean loss."""
    groups: dict[float, list[Record]] = {}
    for r in runs:
        if suite.matches(r) and r["method"] == method:
            groups.setdefault(r["lr"], []).append(r)
    most = max(map(len, groups.values()), default=0)
    full = [g for g in groups.values() if len(g) == most]
    return min(full, key=lambda g: statistics.mean(map(score, g)), default=[])


def verdict(runs: list[Record], plain: list[Record]) -> str:
    """Against plain training, seed by seed: better or worse only by more than plain training's own spread."""
    losses = {r["seed"]: score(r) for r in plain}
    pairs = [score(r) - losses[r["seed"]] for r in runs if r["seed"] in losses]
    if len(losses) < 2:
        return "one seed"
    spread = max(losses.values()) - min(losses.values())
    mean = statistics.mean(pairs)
    if not mean or abs(mean) <= spread:
        return "same"
    return "**better**" if mean < 0 else "worse"


def table(suite: Suite, runs: list[Record]) -> list[str]:
    """One suite's, as lines of Markdown."""
    plain = best_runs(suite, "plain", runs)
    lines = [
        "| method | learning rate | backward passes | steps | cost | gradients sent | loss (seeds) | against plain |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for method in NAMES:
        if mine := sorted(best_runs(suite, method, runs), key=lambda r: r["seed"]):
            mean = {
                n: statistics.mean(r[n] for r in mine) for n in ("backwards_done", "steps", "cost", "gradients_sent")
            }
            loss = f"{statistics.mean(map(score, mine)):.4g} ({', '.join(f'{score(r):.4g}' for r in mine)})"
            lines.append(
                f"| {method} | {mine[0]['lr']:.4g} | {mean['backwards_done']:.0f} | {mean['steps']:.0f} | "
                f"{mean['cost']:.0f} | {mean['gradients_sent']:.0f} | {loss} | {verdict(mine, plain)} |"
            )
    return lines


def report(results: Results) -> str:
    """The tables of a results file, as Markdown."""
    title = "Skipped backward passes: loss at equal backward passes, and at equal cost"
    lines = page_head(title, "bench_phases", results)
    lines += ["", "Cost: one for a forward pass, two for a backward one."]
    lines += ["Better and worse: by more than the range of plain training's seeds."]
    for name, suite in SUITES.items():
        if any(suite.matches(r) for r in results["runs"]):
            rate = "each at its best learning rate" if suite.tuned else f"learning rate {suite.base_lr:g}, conservative"
            lines += ["", f"## {name}: {suite.task}, {suite.optimizer}, {suite.backwards} backward passes, {rate}", ""]
            lines += table(suite, results["runs"])
    return "\n".join(lines) + "\n"


QUICK = ("full-batch", "fine-tuning")
QUICK_METHODS = ("plain", "gate, ema", "fixed, linear", "fixed, repeat the last", "fixed, zero gradient")


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two tasks at one learning rate, five methods, one seed.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Every suite, or those named.")] = False,
    suite: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SUITES)}; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method, as the tables name it; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 2,
    hours: Annotated[float, typer.Option(min=0, help="Begin no run after so long.")] = 1000.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild the page.")] = False,
) -> None:
    """Compare what backward passes, predicted steps and other ways to skip them are worth."""
    check_options(quick, full, rebuild, suite or (), SUITES)
    check_names(method or (), NAMES)
    store = Store(json_file or (None if quick else RESULTS), "runs", rebuild=rebuild)
    if full:
        suites = [replace(SUITES[name], methods=tuple(method or SUITES[name].methods)) for name in suite or SUITES]
        work(store, partial(plan, suites), run, lambda t: f"{t.task}, {t.method}, {t.lr:.2g}", jobs, hours * 3600)
    elif quick:
        trials = [next(waiting(SUITES[name], method, [])) for name in QUICK for method in QUICK_METHODS]
        for trial in tqdm(trials, unit="run"):
            store.add(run(trial))
    store.write_page(report)


if __name__ == "__main__":
    run_command(main)
