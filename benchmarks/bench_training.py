"""Loss against bytes: every method on every task, each at its own best learning rate, over seeds.

    python -m benchmarks.bench_training --quick                     # one task, few steps, only printed
    python -m benchmarks.bench_training --full                      # all of it into benchmarks/results: days of 2 cores
    python -m benchmarks.bench_training --full --suite adamw-char --hours 2
    python -m benchmarks.bench_training --report                    # rebuild page and plots from the stored runs

The ranks take turns in one process (`lockstep`), with the hook's own codec and wires: `tests/test_training.py` compares
them with ranks that are processes. A method's learning rates are tried with the first seed, on a grid that grows while
its best is at an end, then other momenta at the best, and for plain DDP learning rates again at the best of these. The
other seeds run at the best of both, and at the next best if one of them cannot train there. With SGD ours are also run
at the largest learning rate at which plain DDP does not diverge.
Every run is stored as it ends, and a benchmark that was stopped goes on where it was.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from benchmarks import leads, rivals
from benchmarks.lockstep import Averager, LockstepAverager, LockstepHook, Shapes, shapes_of
from benchmarks.store import Record, Results, Store, find, page_head
from benchmarks.tasks import TASKS
from benchmarks.workers import check_names, check_options, work
from launch.cli import run_command
from launch.train import OptimizerName, make_optimizer, schedule
from vsa_ddp import VsaConfig, learning_rate_factor
from vsa_ddp.averager import default_settings
from vsa_ddp.register import FAMILY_SETTINGS, Family

RESULTS = Path(__file__).parent / "results" / "training_cpu2_202611.json"
SEEDS = (0, 1, 2)

METHODS = (
    "dense",
    "bf16",
    *(f"bundle {bundle}" for bundle in (1, 2, 4, 8, 16, 64)),
    *(f"sparsity {sparsity}" for sparsity in (2, 4, 8, 16, 32, 64, 128)),
    *(f"two-shot {compression}" for compression in (16, 32, 64)),
    *(f"compression {compression}" for compression in (320, 1280)),
    *(f"powersgd {rank}" for rank in (1, 2, 4, 8)),
    "powersgd 4, bf16",
    *(f"demo {count}" for count in (8, 32, 128)),
    "onebit-adam",
    "terngrad",
    "drive",
    "ef-sign",
    "top-1%",
    *(f"local {period}" for period in (1, 20, 80, 320, 1280)),
    "diloco 20",
    "diloco 20, momentum 0.5",
    "drive-local 1",
    *(f"vsa-local {period}, n={sparsity}" for period in (1, 2, 4, 8, 32) for sparsity in (8, 64)),
    "vsa-local 1, n=2",
    *(f"vsa-local 1, two-shot {compression}" for compression in (64, 128, 256)),
    *(f"vsa-local {period}, two-shot 256" for period in (2, 8)),
    "alone",
)
"""With their bundle, sparsity, compression, rank, coefficients or steps between averages, which "vsa-local" compresses
by a sparsity of n, or by the two_shot wire, and "drive-local" by DRIVE. "alone": no communication at all."""
LEADS = (
    "error-memory 8",
    "shared-prediction 8",
    "low-rank-head 16",
    "by-energy 4, 16",
    "by-energy 16, 4",
    "schedule 16, 4",
)
"""What was tried beside the hook, and the sparsities: `benchmarks.leads`."""
CHOICES: dict[str, dict[str, Any]] = {
    "whitened": {"whiten": True},
    "not whitened": {"whiten": False},
    "unbiased": {"gain": "unbiased"},
    "shrunk": {"gain": "shrunk"},
    "blocks of 256": {"rotation_block": 256},
    "blocks of 4096": {"rotation_block": 4096},
    "scales of every step": {"scale_interval": 1},
    "scales of every 100": {"scale_interval": 100},
}
"""Settings of ours other than the defaults."""
OURS = ("bundle", "sparsity", "two-shot", "compression", "vsa-local")
OUR_METHODS = tuple(method for method in METHODS if method.startswith(OURS))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    task: str
    optimizer: OptimizerName
    method: str
    lr: float
    momentum: float
    """beta1 of AdamW."""
    steps: int
    world_size: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A task with an optimizer, for all methods."""

    task: str
    optimizer: OptimizerName
    steps: int
    base_lr: float
    """Where the search begins: times two to the halves."""
    momenta: tuple[float, ...] = (0.9,)
    """Learning rates are searched at the first, for plain DDP also at the best; each other is tried if the one before
    was the best yet."""
    world_size: int = 4
    methods: tuple[str, ...] = METHODS
    bounded: bool = False
    """Whether ours are also run at the largest learning rate at which plain DDP does not diverge."""

    def among(self, runs: list[Record]) -> list[Record]:
        """Those of its runs that are among these."""
        return find(runs, task=self.task, optimizer=self.optimizer, steps=self.steps, world_size=self.world_size)


_FEWER = (
    "dense",
    "bundle 1",
    "bundle 4",
    "sparsity 8",
    "sparsity 16",
    "sparsity 64",
    "vsa-local 1, n=64",
    "vsa-local 8, n=64",
    "powersgd 1",
    "powersgd 4",
    "drive",
    "local 80",
    "alone",
)
_FOR_SGD = tuple(method for method in METHODS if not method.startswith(("demo", "onebit-adam")))
_MANY_RANKS = (
    *(method for method in _FEWER if method not in ("bundle 4", "sparsity 16")),
    *(f"two-shot {compression}" for compression in (32, 64)),
    "diloco 20",
    *(f"vsa-local 1, two-shot {compression}" for compression in (128, 256)),
    "vsa-local 8, two-shot 256",
)


def _variants(family: Family) -> tuple[str, ...]:
    """The leads, and what is not the family's default."""
    default = FAMILY_SETTINGS[family]
    return (*(f"sparsity 8, {name}" for name, choice in CHOICES.items() if {**default, **choice} != default), *LEADS)


_WITH_ADAMW = (*_variants("adam"), "vsa-local 1, n=64, not whitened")
_WITH_SGD = _variants("sgd")
SUITES = {
    "adamw-char": Suite(
        task="wide transformer", optimizer="adamw", steps=2000, base_lr=5.6e-3, momenta=(0.9, 0.8, 0.7, 0.5)
    ),
    "adamw-char-short": Suite(task="wide transformer", optimizer="adamw", steps=400, base_lr=4e-3 / 2**1.5),
    "sgd-char": Suite(
        task="wide transformer", optimizer="sgd", steps=400, base_lr=0.0354, methods=_FOR_SGD, bounded=True
    ),
    "sgd-digits": Suite(
        task="distorted digits", optimizer="sgd", steps=300, base_lr=0.05, methods=_FOR_SGD + _WITH_SGD, bounded=True
    ),
    "adamw-digits": Suite(
        task="distorted digits", optimizer="adamw", steps=300, base_lr=4e-3, methods=METHODS + _WITH_ADAMW
    ),
    "adamw-lstm": Suite(
        task="lstm", optimizer="adamw", steps=400, base_lr=4e-3 * 2**2.5, methods=METHODS + _WITH_ADAMW
    ),
    "adamw-large": Suite(task="large batch", optimizer="adamw", steps=100, base_lr=4e-3 / 2**1.5, methods=_FEWER),
    "adamw-char-16": Suite(
        task="wide transformer", optimizer="adamw", steps=400, base_lr=4e-3 / 2**1.5, world_size=16, methods=_MANY_RANKS
    ),
    "adamw-digits-16": Suite(
        task="distorted digits", optimizer="adamw", steps=300, base_lr=4e-3 * 2**1.5, world_size=16, methods=_MANY_RANKS
    ),
    "sgd-digits-16": Suite(
        task="distorted digits", optimizer="sgd", steps=300, base_lr=0.05 * 2**1.5, world_size=16, methods=_MANY_RANKS
    ),
}
OLDER = ("adamw-char-16", "adamw-digits-16", "sgd-digits-16")
"""Suites that ran before block codes were diagonals, and before each of DRIVE's ranks had a rotation of its own."""
README_SUITES = ("adamw-char", "sgd-char", "sgd-digits", "adamw-digits", "adamw-lstm", "adamw-char-16")
README_METHODS = (
    "dense",
    "bundle 1",
    "sparsity 8",
    "two-shot 32",
    "vsa-local 1, n=8",
    "vsa-local 1, n=64",
    "vsa-local 1, two-shot 256",
    "vsa-local 8, n=64",
    "powersgd 1",
    "powersgd 4",
    "drive",
    "alone",
)


# Running


def parse(method: str) -> tuple[str, str, str]:
    """What a method is, its number, and what comes after: "vsa-local 8, n=64" is "vsa-local", "8", "n=64"."""
    name, _, rest = method.partition(" ")
    number, _, code = rest.partition(", ")
    return name, number, code


def settings(method: str) -> dict[str, Any]:
    """Of ours, and of the hook in a lead, which are fields of `VsaConfig`."""
    name, number, choice = parse(method)
    if name == "vsa-local":
        code, _, choice = choice.partition(", ")
        name, number = ("sparsity", code[2:]) if code.startswith("n=") else code.split(" ")
    if name in ("two-shot", "compression"):
        return {"wire": "two_shot" if name == "two-shot" else "all_gather", "compression": float(number)}
    return {"sparsity" if method in LEADS else name: int(number), **CHOICES.get(choice, {})}


def make_averager(trial: Trial, shapes: Shapes) -> Averager:
    name, number, code = parse(trial.method)
    family: Family = "adam" if trial.optimizer == "adamw" else "sgd"
    if name in OURS or trial.method in LEADS:
        defaults = default_settings(family) if name == "vsa-local" else FAMILY_SETTINGS[family]
        config = VsaConfig.from_settings({"seed": trial.seed, **defaults, **settings(trial.method)})
        return make_lead(trial, shapes, config) if trial.method in LEADS else LockstepHook(shapes, config)
    if name == "powersgd":
        return rivals.PowerSGD(shapes, trial.seed, int(number), factors=torch.bfloat16 if code else torch.float32)
    if name == "diloco":
        return rivals.DiLoCo(shapes, trial.seed, float(code.removeprefix("momentum ") or 0.9))
    if name == "demo":
        return rivals.DeMo(shapes, trial.seed, int(number))
    if name == "onebit-adam":
        return rivals.OneBitAdam(shapes, trial.seed, trial.momentum, trial.steps * 3 // 20)
    kinds = {
        "dense": rivals.Dense,
        "local": rivals.Dense,
        "bf16": rivals.Bf16,
        "terngrad": rivals.TernGrad,
        "drive": rivals.RotatedSign,
        "drive-local": rivals.RotatedSign,
        "ef-sign": rivals.ErrorFeedbackSign,
        "top-1%": rivals.TopK,
    }
    return kinds[name](shapes, trial.seed)


def make_lead(trial: Trial, shapes: Shapes, config: VsaConfig) -> Averager:
    name, _, other = parse(trial.method)
    if name == "by-energy":
        return leads.ByEnergy(shapes, config, quiet=int(other))
    if name == "schedule":
        return leads.Schedule(shapes, config, later=int(other), steps=trial.steps)
    kinds = {
        "error-memory": leads.ErrorMemory,
        "shared-prediction": leads.SharedPrediction,
        "low-rank-head": leads.LowRankHead,
    }
    return kinds[name](shapes, config)


def period(method: str) -> int | None:
    """Steps between averages of the weights; None for methods that average gradients."""
    name, number, _ = parse(method)
    return int(number or 0) if name in ("local", "diloco", "drive-local", "vsa-local", "alone") else None


def run(trial: Trial) -> Record:
    """Train. The loss is None if one was not finite, or the mean of the last tenth above the first or above the mean of
    the first tenth, as where a model ends up guessing: after a spike a run may go on."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    losses, averager, models = (train_apart if period(trial.method) is not None else train_together)(trial)
    tenth = max(1, trial.steps // 10)
    end = statistics.mean(losses[-tenth:])
    good = math.isfinite(end) and end <= min(losses[0], statistics.mean(losses[:tenth]))
    num_parameters = sum(p.numel() for p in models[0].parameters())
    return {
        **asdict(trial),
        "heldout_loss": TASKS[trial.task].heldout_loss(models[0]) if good else None,
        "train_loss": end if good else None,
        "losses": [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)],
        "sent_bytes_per_step": averager.sent_bytes / trial.steps if averager else 0.0,
        "received_bytes_per_step": averager.received_bytes / trial.steps if averager else 0.0,
        "num_parameters": num_parameters,
        "seconds": time.perf_counter() - start,
    }


def train_together(trial: Trial) -> tuple[list[float], Averager | None, list[nn.Module]]:
    """One model, on which the ranks' gradients are averaged."""
    task = TASKS[trial.task]
    torch.manual_seed(trial.seed)
    model = task.model()
    parameters = list(model.parameters())
    averager = make_averager(trial, shapes_of(model))
    optimizer: torch.optim.Optimizer
    if isinstance(averager, rivals.DeMo | rivals.OneBitAdam):
        optimizer = torch.optim.SGD(parameters, trial.lr, weight_decay=0.1)  # as AdamW's in `make_optimizer`
    else:
        optimizer = make_optimizer(model, trial.optimizer, trial.lr, trial.momentum)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, trial.steps))
    orders = rank_orders(trial)
    gradient_WN = torch.empty(trial.world_size, sum(p.numel() for p in parameters))
    losses: list[float] = []
    for _ in range(trial.steps):
        total = 0.0
        for order, gradient_N in zip(orders, gradient_WN, strict=True):
            loss = task.loss(model, order)
            optimizer.zero_grad()
            loss.backward()
            torch.cat([p.grad.flatten() for p in parameters if p.grad is not None], out=gradient_N)
            total += loss.item() / trial.world_size
        losses.append(total)
        if not math.isfinite(total):
            break
        mean_N = averager.average(gradient_WN)
        for p, mean in zip(parameters, mean_N.split([p.numel() for p in parameters]), strict=True):
            p.grad = mean.view_as(p)
        optimizer.step()
        scheduler.step()
    return losses, averager, [model]


def train_apart(trial: Trial) -> tuple[list[float], Averager | None, list[nn.Module]]:
    """A model for each rank; what they changed is averaged every so many steps and at the end, or never."""
    task, every = TASKS[trial.task], period(trial.method)
    models, optimizers, schedulers = [], [], []
    for _ in range(trial.world_size):
        torch.manual_seed(trial.seed)
        models.append(task.model())
        optimizers.append(make_optimizer(models[-1], trial.optimizer, trial.lr, trial.momentum))
        rate = torch.optim.lr_scheduler.LambdaLR(optimizers[-1], lambda step: schedule(step, trial.steps))
        schedulers.append(rate)
    averager = None
    if every:
        shapes = shapes_of(models[0])
        rescale = trial.optimizer == "adamw" and parse(trial.method)[0] in ("vsa-local", "drive-local")
        averager = LockstepAverager(make_averager(trial, shapes), shapes, trial.world_size, rescale)
    common_N = parameters_to_vector(models[0].parameters()).detach()
    orders, losses = rank_orders(trial), list[float]()
    for step in range(1, trial.steps + 1):
        total = 0.0
        for model, optimizer, scheduler, order in zip(models, optimizers, schedulers, orders, strict=True):
            loss = task.loss(model, order)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() / trial.world_size
        losses.append(total)
        if not math.isfinite(total):
            break
        if averager and (step % every == 0 or step == trial.steps):
            changes_WN = torch.stack([common_N - parameters_to_vector(m.parameters()).detach() for m in models])
            common_N = common_N - averager.average(changes_WN, step % every or every)
            for model in models:
                vector_to_parameters(common_N.clone(), model.parameters())
    return losses, averager, models


def rank_orders(trial: Trial) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * trial.seed + rank) for rank in range(trial.world_size)]


# Planning


def score(run: Record) -> float:
    return math.inf if run["heldout_loss"] is None else run["heldout_loss"]


def trains(runs: list[Record]) -> bool:
    """Whether no seed diverged, or ended more than a tenth above the best: else others are searched too."""
    return max(map(score, runs)) <= 1.1 * min(map(score, runs)) < math.inf


def start_lr(suite: Suite, method: str) -> float:
    """The square-root rule for `register` with AdamW, a quarter for signs, half for ranks that step alone without being
    lengthened; the dense rate for all others."""
    name = parse(method)[0]
    if (name in ("bundle", "sparsity", "two-shot", "compression") or method in LEADS) and suite.optimizer == "adamw":
        config = VsaConfig.from_settings(settings(method))
        return suite.base_lr * learning_rate_factor(wire=config.wire, **config.asked())
    return suite.base_lr * {"demo": 0.25, "onebit-adam": 0.25, "local": 0.5, "diloco": 0.5, "alone": 0.5}.get(name, 1.0)


def first_trial(suite: Suite, method: str, lr: float) -> Trial:
    return Trial(
        task=suite.task,
        optimizer=suite.optimizer,
        method=method,
        lr=lr,
        momentum=suite.momenta[0],
        steps=suite.steps,
        world_size=suite.world_size,
    )


def waiting(suite: Suite, method: str, runs: list[Record]) -> Iterator[Trial]:
    """What can be run now, one search after the other: learning rates at the first momentum with the first seed, and
    more of them while the best is at an end; at the best one the other momenta, one after the other while that helps;
    for plain DDP, which all are measured by, learning rates at the best of these again; at the best of all the other
    seeds."""
    mine = find(suite.among(runs), method=method)
    start = start_lr(suite, method)
    trial = first_trial(suite, method, start)

    def value(tried: Record) -> float:
        return score(tried) if trains(find(mine, lr=tried["lr"], momentum=tried["momentum"])) else math.inf

    def at(momentum: float) -> dict[int, Record]:
        found = find(mine, seed=SEEDS[0], momentum=momentum)
        return {round(2 * math.log2(r["lr"] / start)): r for r in found}

    def best_of(rates: dict[int, Record]) -> int:
        return min(rates, key=lambda k: (value(rates[k]), k))

    def beside(k: int) -> set[int]:
        return {each for each in (k - 1, k + 1) if abs(each) <= 8}

    def at_rates(wanted: set[int], momentum: float) -> list[Trial]:
        return [replace(trial, lr=start * 2 ** (k / 2), momentum=momentum) for k in sorted(wanted)]

    rates = at(suite.momenta[0])
    wanted = {-1, 0, 1} - rates.keys() or beside(best_of(rates)) - rates.keys()
    if wanted:
        yield from at_rates(wanted, suite.momenta[0])
        return
    best = rates[best_of(rates)]
    if value(best) == math.inf:
        return
    momenta = () if method.startswith("demo") else suite.momenta
    by_momentum = find(mine, seed=SEEDS[0], lr=best["lr"])
    done = [m for m in momenta if find(by_momentum, momentum=m)]
    best = min(by_momentum, key=value)
    if len(done) < len(momenta) and best["momentum"] == done[-1]:
        yield replace(trial, lr=best["lr"], momentum=momenta[len(done)])
        return
    if method == "dense":
        rates = at(best["momentum"])
        if wanted := beside(best_of(rates)) - rates.keys():
            yield from at_rates(wanted, best["momentum"])
            return
        best = rates[best_of(rates)]
        if value(best) == math.inf:
            return
    chosen = {name: best[name] for name in ("lr", "momentum")}
    seeds = {r["seed"] for r in find(mine, **chosen)}
    yield from (replace(trial, **chosen, seed=seed) for seed in SEEDS if seed not in seeds)


def largest_rate(suite: Suite, runs: list[Record]) -> tuple[float, list[Trial]]:
    """The largest learning rate, from its best on, at which no seed of plain DDP diverges; and what can be run to find
    a larger one."""
    dense = find(suite.among(runs), method="dense", momentum=suite.momenta[0])
    rates = {round(2 * math.log2(r["lr"] / suite.base_lr)): r["lr"] for r in dense}
    largest = best_runs(suite, "dense", runs)[0]["lr"]
    for k in range(round(2 * math.log2(largest / suite.base_lr)), 9):
        lr = rates.get(k, suite.base_lr * 2 ** (k / 2))
        if math.inf in map(score, find(dense, lr=lr)):
            break
        if missing := missing_seeds(suite, "dense", lr, runs):
            return largest, missing
        largest = lr
    return largest, []


def missing_seeds(suite: Suite, method: str, lr: float, runs: list[Record]) -> list[Trial]:
    trial = first_trial(suite, method, lr)
    found = {r["seed"] for r in find(suite.among(runs), method=method, lr=lr, momentum=trial.momentum)}
    return [replace(trial, seed=seed) for seed in SEEDS if seed not in found]


def beyond(suite: Suite, runs: list[Record]) -> list[Trial]:
    """What can be run beyond the searches: plain DDP at ever larger learning rates, then ours at the largest."""
    if any(waiting(suite, "dense", runs)):
        return []
    largest, missing = largest_rate(suite, runs)
    if missing:
        return missing if "dense" in suite.methods else []
    ours = [method for method in suite.methods if method in OUR_METHODS]
    return [trial for method in ours for trial in missing_seeds(suite, method, largest, runs)]


def plan(suites: list[Suite], runs: list[Record]) -> list[Trial]:
    trials = [trial for suite in suites for method in suite.methods for trial in waiting(suite, method, runs)]
    trials += [trial for suite in suites if suite.bounded for trial in beyond(suite, runs)]
    return list(dict.fromkeys(trials))


# Reporting


def best_runs(suite: Suite, method: str, runs: list[Record]) -> list[Record]:
    """All seeds at the learning rate and momentum that have all seeds and the least mean loss."""
    groups: dict[tuple[float, float], list[Record]] = {}
    for r in find(suite.among(runs), method=method):
        groups.setdefault((r["lr"], r["momentum"]), []).append(r)
    full = [g for g in groups.values() if {r["seed"] for r in g} >= set(SEEDS)] or list(groups.values())
    return min(full, key=lambda g: statistics.mean(map(score, g)), default=[])


def label(method: str) -> str:
    """A method in words that need no page."""
    name, number, code = parse(method)
    return {
        "dense": "plain DDP",
        "sparsity": f"`register`, n={number}",
        "bundle": f"`register`, B={number}",
        "two-shot": f"`register`, two_shot, {number}",
        "vsa-local": f"`VsaModelAverager`, period {number}, {code.replace('two-shot', 'two_shot')}",
        "compression": f"`register`, compression {number}",
        "powersgd": f"PowerSGD {number}{code and ', bf16 factors'}",
        "drive": "DRIVE",
        "demo": f"DeMo, {number} coefficients",
        "onebit-adam": "1-bit Adam",
        "diloco": f"DiLoCo, period {number}{code and f', outer {code}'}",
        "drive-local": f"updates by DRIVE, period {number}",
        "local": f"local SGD, period {number}",
        "alone": "no communication",
    }.get(name, method)


def against(mean: float, dense: float) -> str:
    return f"{round(100 * (mean / dense - 1), 1) + 0.0:+.1f} %"  # + 0.0 takes the sign off -0.0


def summary(results: Results) -> str:
    """The README's table, by the bytes that methods save; empty where not all seeds ran."""
    suites = [name for name in README_SUITES if _complete(SUITES[name], "dense", results)]
    found = {m: {name: _complete(SUITES[name], m, results) for name in suites} for m in README_METHODS}
    found = {method: by for method, by in found.items() if any(by.values())}

    def saving(method: str) -> float:
        each = [compression(runs) or math.inf for runs in found[method].values() if runs]
        return statistics.geometric_mean(each) if math.isfinite(max(each)) else math.inf

    lines = [f"| | {' | '.join(suites)} |", "|---|" + "---|" * len(suites)]
    for method in sorted(found, key=saving):
        cells = [
            _cell(method, runs, found["dense"][name]) + _asterisk(SUITES[name], method, results) if runs else ""
            for name, runs in found[method].items()
        ]
        lines.append(f"| {label(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def envelope(suite: Suite, results: Results) -> set[str]:
    """Of the methods that ran with all seeds, those than which none loses less while as few bytes are received."""
    found = {m: runs for m in METHODS if (runs := _complete(suite, m, results))}
    points = {m: (runs[0]["received_bytes_per_step"], statistics.mean(map(score, runs))) for m, runs in found.items()}
    return {m for m, (at, loss) in points.items() if all(a > at or each >= loss for a, each in points.values())}


def _complete(suite: Suite, method: str, results: Results) -> list[Record]:
    """Its best runs, if they have all seeds and none diverged."""
    runs = best_runs(suite, method, results["runs"])
    return runs if len(runs) >= len(SEEDS) and math.isfinite(max(map(score, runs))) else []


def _asterisk(suite: Suite, method: str, results: Results) -> str:
    """Of a method whose search is not at its end."""
    return " *" if any(waiting(suite, method, results["runs"])) else ""


def _cell(method: str, runs: list[Record], dense: list[Record]) -> str:
    """Loss against plain DDP's, and times fewer bytes handed over and received; plain DDP's own loss and its range."""
    losses = [score(r) for r in runs]
    mean, reference = statistics.mean(losses), statistics.mean(map(score, dense))
    if method == "dense":
        return f"{mean:.3f} ({min(losses):.3f} to {max(losses):.3f})"
    handed, received = compression(runs), compression(runs, "received")
    return against(mean, reference) + (f", {handed:.0f} / {received:.0f} x" if handed and received else "")


def report(results: Results) -> str:
    """The tables of a results file, as Markdown."""
    lines = page_head("Loss against bytes: every method at its own best learning rate", "bench_training", results)
    lines += ["", "Each suite's plots lie beside this page, under its name."]
    lines += ["Handed over and received: times fewer bytes than plain DDP, whose all-reduce is a ring."]
    lines += ["Methods in bold are the lower envelope: none that ran with all seeds receives as little and loses less."]
    lines += ["An asterisk: the search for its learning rate, or its seeds, is not at its end."]
    lines += [
        "In brackets after the loss against dense its standard error, from the seeds, which share start and data."
    ]
    for name, suite in SUITES.items():
        found = {method: best_runs(suite, method, results["runs"]) for method in METHODS}
        if not any(found.values()):
            continue
        lines += ["", f"## {name}: {suite.task}, {suite.optimizer}, {suite.steps} steps, {suite.world_size} ranks", ""]
        if name in OLDER:
            lines += ["Block codes (n > 1) were no diagonals yet, and DRIVE had one rotation for all ranks.", ""]
        lines += [
            "| method | handed over | received | learning rate | momentum | held-out loss (seeds) | against dense |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        best = envelope(suite, results)
        for method, runs in found.items():
            if not runs:
                continue
            losses = [score(r) for r in sorted(runs, key=lambda r: r["seed"])]
            each = ", ".join(f"{loss:.3f}" for loss in losses)
            shown = (f"**{method}**" if method in best else method) + _asterisk(suite, method, results)
            lines.append(
                f"| {shown} | {_times(runs, 'sent')} | {_times(runs, 'received')} | {runs[0]['lr']:.4g} | "
                f"{runs[0]['momentum']:g} | {statistics.mean(losses):.3f} ({each}) | {_excess(runs, found['dense'])} |"
            )
        if suite.bounded:
            lines += at_the_largest_rate(suite, results["runs"])
    lines += ["", "## Other settings of ours, and what was tried beside them", ""]
    lines += ["Held-out loss against dense, and times fewer bytes handed over. What was tried: `benchmarks/leads.py`."]
    lines += ["", *choices(results)]
    return "\n".join(lines) + "\n"


def _excess(runs: list[Record], dense: list[Record]) -> str:
    """Loss against plain DDP's, and its standard error where there are the same seeds of both."""
    references = {r["seed"]: score(r) for r in dense}
    shown = against(statistics.mean(map(score, runs)), statistics.mean(references.values()) if dense else math.nan)
    ratios = [score(r) / references[r["seed"]] for r in runs if r["seed"] in references]
    if runs == dense or len(ratios) < len(SEEDS) or math.inf in ratios:
        return shown
    return f"{shown} ({100 * statistics.stdev(ratios) / math.sqrt(len(ratios)):.1f})"


def choices(results: Results) -> list[str]:
    """A table of settings of ours other than the defaults, and of what was tried beside them."""
    names = [name for name in SUITES if set(LEADS) <= set(SUITES[name].methods)]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for method in dict.fromkeys(("sparsity 8", "vsa-local 1, n=64", *_WITH_ADAMW, *_WITH_SGD)):
        cells = []
        for name in names:
            suite = SUITES[name]
            runs, dense = (best_runs(suite, m, results["runs"]) for m in (method, "dense"))
            shown = (
                f"{_excess(runs, dense)}, {_times(runs, 'sent')}" + _asterisk(suite, method, results) if runs else ""
            )
            cells.append(shown)
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def at_the_largest_rate(suite: Suite, runs: list[Record]) -> list[str]:
    """A paragraph on plain DDP and ours where plain DDP only just does not diverge, if that is known."""
    if not best_runs(suite, "dense", runs):
        return []
    largest, missing = largest_rate(suite, runs)
    if missing:
        return []
    found = {m: find(suite.among(runs), method=m, lr=largest) for m in ("dense", *OUR_METHODS)}
    each = [
        f"{method} {', '.join('diverged' if r['heldout_loss'] is None else f'{score(r):.3f}' for r in by_seed)}"
        for method, at in found.items()
        if len(by_seed := sorted(at, key=lambda r: r["seed"])) >= len(SEEDS)
    ]
    return [
        "",
        f"At {largest:.4g}, the largest learning rate at which no seed of plain DDP diverges: {'; '.join(each)}.",
    ]


def compression(runs: list[Record], way: Literal["sent", "received"] = "sent") -> float | None:
    """Times fewer bytes handed over or received than by plain DDP, a ring; None if nothing was sent."""
    r = runs[0]
    dense = 4 * r["num_parameters"] * (1 if way == "sent" else 2 * (r["world_size"] - 1) / r["world_size"])
    return dense / r[f"{way}_bytes_per_step"] if r["sent_bytes_per_step"] else None


def _times(runs: list[Record], way: Literal["sent", "received"]) -> str:
    times = compression(runs, way)
    return f"{times:.1f} x" if times else "nothing"


def plot(results: Results, beside: Path) -> None:
    """A picture for each suite, its name behind that of the results file: held-out loss against compression, and
    training loss against steps of the README's methods and of the lower envelope, over seeds."""
    for name, suite in SUITES.items():
        found = {method: best_runs(suite, method, results["runs"]) for method in METHODS}
        found = {method: runs for method, runs in found.items() if runs and math.isfinite(max(map(score, runs)))}
        if "dense" not in found:
            continue
        figure, (by_bytes, by_steps) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
        best = envelope(suite, results)
        _plot_bytes(by_bytes, found, best)
        shown = {m: runs for m, runs in found.items() if m in README_METHODS or m in best}
        _plot_steps(by_steps, {m: runs for m, runs in shown.items() if len(runs) >= len(SEEDS)})
        figure.suptitle(f"{name}: {suite.task}, {suite.steps} steps, {suite.world_size} ranks")
        figure.savefig(beside.with_name(f"{beside.stem}_{name}.png"), dpi=90)
        plt.close(figure)


def _plot_bytes(panel: plt.Axes, found: dict[str, list[Record]], best: set[str]) -> None:
    """A point for each method: mean, least and most of its seeds, ours in colour, named if none is better; and a line
    through the best."""
    edge: list[tuple[float, float]] = []
    for method, runs in found.items():
        losses = [score(r) for r in runs]
        mean = statistics.mean(losses)
        at = compression(runs, "received")
        if at is None:
            panel.axhline(mean, color="grey", linestyle=":")
            panel.annotate(label(method), (1, mean), xytext=(0, 2), textcoords="offset points", fontsize=7)
            continue
        ours = parse(method)[0] in OURS
        colour = "tab:blue" if ours else "dimgray"
        spread = [[mean - min(losses)], [max(losses) - mean]]
        panel.errorbar([at], [mean], spread, marker="o", color=colour, markersize=6 if ours else 4)
        if method in best or not ours:
            panel.annotate(method, (at, mean), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
        if method in best:
            edge.append((at, mean))
    panel.plot(*zip(*sorted(edge), strict=True), color="tab:blue", linewidth=1, alpha=0.5)
    panel.set(xscale="log", xlabel="times fewer bytes received than by plain DDP", ylabel="held-out loss")
    panel.margins(x=0.2)


def _plot_steps(panel: plt.Axes, found: dict[str, list[Record]]) -> None:
    """A line for each method: mean, and a band from the least to the most of its seeds, of a hundredth of the steps."""
    panel.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for method, runs in found.items():
        window = max(1, len(runs[0]["losses"]) // 100)
        curves = torch.tensor([r["losses"] for r in runs]).unfold(1, window, window).mean(2)
        steps = [runs[0]["steps"] * (i + 1) / curves.shape[1] for i in range(curves.shape[1])]
        (line,) = panel.plot(
            steps, curves.mean(0), label=f"{label(method).replace('`', '')}, {_times(runs, 'received')}"
        )
        panel.fill_between(steps, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.2, linewidth=0)
    panel.set(xscale="log", xlabel="step", ylabel="training loss")
    if found:
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Digits, 40 steps, four methods, one seed; printed.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every suite, or those named.")] = False,
    suite: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SUITES)}; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method, as the tables name it; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 2,
    hours: Annotated[float, typer.Option(min=0, help="Begin no run after so long.")] = 1000.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild page and plots.")] = False,
) -> None:
    """Compare what every method loses for the bytes it saves."""
    check_options(quick, full, rebuild, suite or (), SUITES)
    check_names(method or (), list(dict.fromkeys(METHODS + _WITH_ADAMW + _WITH_SGD)))
    store = Store(json_file or (None if quick else RESULTS), "runs", rebuild=rebuild)
    if full:
        suites = [replace(SUITES[name], methods=tuple(method or SUITES[name].methods)) for name in suite or SUITES]
        work(store, partial(plan, suites), run, lambda t: f"{t.method} {t.lr:.2g}", jobs, hours * 3600)
    elif quick:
        base = SUITES["sgd-digits"]
        for method in tqdm(("dense", "sparsity 8", "powersgd 1", "local 20"), unit="run"):
            trial = Trial(
                task=base.task, optimizer=base.optimizer, method=method, lr=base.base_lr, momentum=0.9, steps=40
            )
            store.add(run(trial))
        typer.echo("\n".join(f"{r['method']}: {score(r):.3f}, {_times([r], 'sent')}" for r in store.list))
        return
    store.write_page(report)
    if store.file is not None:
        plot(store.results, store.file)


if __name__ == "__main__":
    run_command(main)
