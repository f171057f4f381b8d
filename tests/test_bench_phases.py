"""The phases' benchmark: its methods are what they are called, its costs are counted, its search finds the best."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer

from benchmarks import bench_phases, bench_training
from benchmarks.bench_phases import (
    FASTER,
    NAMES,
    SAME_COST,
    SEEDS,
    SUITES,
    TWICE,
    Suite,
    Trial,
    best_runs,
    run,
    verdict,
    waiting,
)
from benchmarks.phase_methods import METHODS, PhasedRun, predicted, rolled_back, scaled
from benchmarks.store import Record
from benchmarks.tasks import TASKS
from vsa_ddp import PhaseConfig

DIGITS = Trial(task="digits", optimizer="sgd", backwards=14, tuned=True, method="plain", lr=0.05)


def test_plain_training_is_that_of_the_other_benchmark() -> None:
    ours = run(DIGITS)
    theirs = bench_training.run(
        bench_training.Trial(task="digits", optimizer="sgd", method="dense", lr=0.05, momentum=0.9, steps=14)
    )
    # the same steps, whose ranks are averaged before or after the parameters' sums
    assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], rel=1e-4)
    assert (ours["steps"], ours["backwards_done"], ours["cost"], ours["gradients_sent"]) == (14, 14, 42, 14)


@pytest.mark.parametrize(
    ("method", "forwards", "backwards"),
    [
        ("fixed, linear", 1, 0.0),
        ("fixed, zero gradient", 1, 0.0),
        ("fixed, directional", 2, 0.0),
        ("fixed, debiased", 1, 0.25),
        ("fixed, rolled back", 2, 0.0),
    ],
)
def test_what_a_predicted_step_costs_is_counted(method: str, forwards: int, backwards: float) -> None:
    found = run(replace(DIGITS, task="fine-tuning", method=method, backwards=17, lr=1e-3, tuned=False))
    assert found["predicted"] > 0
    assert found["heldout_loss"] is not None
    real = found["steps"] - found["predicted"]
    assert found["backwards_done"] == real + backwards * found["predicted"]
    assert found["gradients_sent"] == found["backwards_done"]
    assert found["cost"] == real + forwards * found["predicted"] + 2 * found["backwards_done"]


def phased(skip: Any) -> PhasedRun:
    torch.manual_seed(0)
    model = TASKS["digits"].model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    orders = [torch.Generator().manual_seed(rank) for rank in range(2)]
    return PhasedRun(TASKS["digits"], model, optimizer, PhaseConfig(), orders, skip)


def test_a_derivative_along_a_direction_is_the_gradients_product_with_it() -> None:
    training = phased(predicted)
    states = [order.get_state() for order in training.orders]
    loss, gradients = training.backward()
    direction = {name: torch.randn_like(g) for name, g in gradients.items()}
    for order, state in zip(training.orders, states, strict=True):
        order.set_state(state)
    found_loss, slope = training.slope_along(direction)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert slope == pytest.approx(sum((g * direction[n]).sum().item() for n, g in gradients.items()), rel=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_up_is_rolled_back_and_a_step_down_is_kept(sign: float) -> None:
    training = phased(rolled_back)
    _, gradients = training.backward()
    training.take({name: g.clone() for name, g in gradients.items()})
    for group in training.optimizer.param_groups:
        group["lr"], group["momentum"] = 0.01, 0.0
    _, gradients = training.backward()
    before = [p.detach().clone() for p in training.model.parameters()]
    momentum = [s["momentum_buffer"].clone() for s in training.optimizer.state.values()]
    rolled_back(training, scaled({n: g.clone() for n, g in gradients.items()}, sign))
    kept = [torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True)]
    assert all(kept) if sign < 0 else not any(kept)
    if sign < 0:
        after = [s["momentum_buffer"] for s in training.optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(after, momentum, strict=True))


def test_at_the_highest_rate_predicted_steps_are_undone_and_training_converges() -> None:
    setting = {"task": "full batch", "optimizer": "sgd", "backwards": 60, "tuned": True, "lr": 0.2 * 2**0.5}
    found = bench_phases.run(Trial(method="gate, ema", **setting))  # type: ignore[arg-type]
    assert found["undone"] >= 1
    assert found["heldout_loss"] < 0.5


def told(trial: Trial, loss: float | None, cost: float = 0.0) -> Record:
    return {**vars(trial), "heldout_loss": loss, "cost": cost or 3.0 * trial.backwards}


def test_the_search_finds_the_best_learning_rate_and_then_runs_every_seed() -> None:
    suite = Suite(task="digits", optimizer="sgd", backwards=10, base_lr=0.1)
    runs: list[Record] = []
    while planned := list(waiting(suite, "gate, ema", runs)):
        runs += [told(t, abs(math.log2(t.lr / 0.4)) + 0.01 * t.seed) for t in planned]
    best = best_runs(suite, "gate, ema", runs)
    assert [r["lr"] for r in best] == pytest.approx([0.4] * len(SEEDS))
    assert sorted(r["seed"] for r in best) == list(SEEDS)


def test_a_rate_at_which_some_seed_diverges_is_not_taken() -> None:
    suite = Suite(task="digits", optimizer="sgd", backwards=10, base_lr=0.1)
    runs: list[Record] = []
    while planned := list(waiting(suite, "plain", runs)):
        runs += [told(t, None if t.seed == 1 and t.lr > 0.15 else abs(math.log2(t.lr / 0.4))) for t in planned]
    best = best_runs(suite, "plain", runs)
    assert [r["lr"] for r in best] == pytest.approx([0.1 * 2**0.5] * len(SEEDS))


def test_a_conservative_rate_is_not_searched_and_its_faster_twin_is() -> None:
    suite = SUITES["fine-tuning"]
    assert {t.lr for t in waiting(suite, "plain", [])} == {suite.base_lr}
    assert {t.lr for t in waiting(suite, FASTER, [])} == {suite.base_lr * (26 / 9)}
    assert not list(waiting(SUITES["digits"], FASTER, []))


def test_plain_training_at_the_same_cost_waits_for_what_the_predictions_cost() -> None:
    suite = SUITES["fine-tuning"]
    plain = [told(t, 1.0) for t in waiting(suite, "plain", [])]
    assert not list(waiting(suite, SAME_COST, plain))
    gated = [told(t, 1.0, 3.0 * t.backwards + 60) for t in waiting(suite, "gate, ema", [])]
    assert [t.extra for t in waiting(suite, SAME_COST, plain + gated)] == [20] * len(SEEDS)
    assert [t.extra for t in waiting(suite, TWICE, plain + gated)] == [suite.backwards] * len(SEEDS)


@pytest.mark.parametrize(("loss", "said"), [(1.0, "same"), (1.15, "same"), (0.7, "**better**"), (1.4, "worse")])
def test_a_verdict_asks_for_more_than_the_spread_of_seeds(loss: float, said: str) -> None:
    suite = SUITES["fine-tuning"]
    plain = [told(t, 1.0 + 0.1 * t.seed) for t in waiting(suite, "plain", [])]
    assert verdict([told(t, loss + 0.1 * t.seed) for t in waiting(suite, "gate, ema", [])], plain) == said
    assert verdict(plain[:1], plain[:1]) == "one seed"


def test_a_page_has_every_method_that_ran() -> None:
    suite = SUITES["fine-tuning"]
    extra = {"steps": 10, "backwards_done": 5, "gradients_sent": 5}
    runs = [
        {**told(t, None if name == "fixed, linear" else 0.5), **extra}
        for name in METHODS
        for t in waiting(suite, name, [])
    ]
    page = bench_phases.report({"environment": {"cores": 2}, "runs": runs})
    assert all(f"| {name} |" in page for name in METHODS)
    assert "inf" in page  # diverged
    assert set(METHODS) < set(NAMES)


def test_the_committed_page_is_what_its_runs_give() -> None:
    results = json.loads(bench_phases.RESULTS.read_text())
    assert bench_phases.RESULTS.with_suffix(".md").read_text() == bench_phases.report(results)


@pytest.mark.parametrize("benchmark", [bench_phases, bench_training])
def test_options_that_say_nothing_or_too_much_are_named(benchmark: Any) -> None:
    for modes in ({}, {"quick": True, "full": True}, {"full": True, "rebuild": True}):
        with pytest.raises(typer.BadParameter, match="choose one of --quick, --full and --report"):
            benchmark.main(**modes)
    with pytest.raises(typer.BadParameter, match=r"there is no chess; choose from .*digits"):
        benchmark.main(full=True, suite=[*benchmark.SUITES, "chess"])
