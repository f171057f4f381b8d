"""Ranks that take turns give the bits of processes; rivals are what their papers say; the search finds the best."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from benchmarks import bench_training, leads, rivals
from benchmarks.bench_training import SEEDS, Suite, Trial, run, waiting
from benchmarks.lockstep import LockstepHook, Shapes, shapes_of
from benchmarks.store import Record
from benchmarks.tasks import TASKS
from launch.train import make_optimizer, schedule
from tests.models import gradients, loss_of, net
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig
from vsa_ddp.cost import LEVEL_BITS
from vsa_ddp.layout import is_compressed
from vsa_ddp.rates import bits_per_trit, num_roundings, unbiased_nmse
from vsa_ddp.wires import WIRES

STEPS = 6
MATRIX: Shapes = (("weight", (64, 48)), ("bias", (48,)))


def by_processes(rank: int, world_size: int, wire: str, exact_steps: int) -> tuple[list[dict[str, Tensor]], int]:
    model = DDP(net())
    state = vsa_ddp.register(model, wire=wire, exact_steps=exact_steps)
    history = []
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step, rank).backward()
        history.append(gradients(model))
    return history, state.compression_stats().wire_bytes


@pytest.mark.parametrize(("world_size", "exact_steps"), [(2, 0), (4, 1)])
@pytest.mark.parametrize("wire", sorted(WIRES))
def test_ranks_that_take_turns_have_the_bits_of_processes(
    tmp_path: Path, wire: str, world_size: int, exact_steps: int
) -> None:
    history, wire_bytes = run_ranks(by_processes, world_size, tmp_path, wire, exact_steps)[0]
    model = net()
    named = list(model.named_parameters())
    hook = LockstepHook(shapes_of(model), VsaConfig(wire=wire, exact_steps=exact_steps))  # type: ignore[arg-type]
    for step in range(STEPS):
        rows = []
        for rank in range(world_size):
            model.zero_grad()
            loss_of(model, step, rank).backward()
            rows.append(torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]))
        mean_N = hook.average(torch.stack(rows))
        for (name, p), mine in zip(named, mean_N.split([p.numel() for _, p in named]), strict=True):
            expected = history[step][name].flatten()
            if step < exact_steps or p.dim() < 2 or p.numel() < 1024:  # summed by the network, in its own order
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(mine, expected), (step, name)
    assert hook.sent_bytes == wire_bytes


TRAINED: dict[str, Any] = {"task": "digits", "momentum": 0.9, "steps": 25}


def losses_by_processes(rank: int, world_size: int, optimizer_name: Any, lr: float, method: str) -> list[float]:
    task = TASKS[TRAINED["task"]]
    torch.manual_seed(0)
    model = task.model()
    optimizer = make_optimizer(model, optimizer_name, lr, TRAINED["momentum"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, TRAINED["steps"]))
    ours, averager = bench_training.settings(method), None
    if period := bench_training.period(method):
        averager = vsa_ddp.VsaModelAverager(model, optimizer, period=period, seed=0, **ours)
    else:
        model = DDP(model)
        vsa_ddp.register(model, optimizer, seed=0, **ours)
    order, losses = torch.Generator().manual_seed(rank), []
    for _ in range(TRAINED["steps"]):
        loss = task.loss(model, order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if averager:
            averager.average_parameters()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("world_size", "optimizer", "lr", "method"),
    [
        (2, "adamw", 4e-3, "sparsity 8"),
        (4, "sgd", 0.2, "two-shot 32"),
        (2, "sgd", 0.1, "vsa-local 1, n=8"),
        (4, "adamw", 4e-3, "vsa-local 2, two-shot 256"),
    ],
)
def test_ranks_that_take_turns_have_the_losses_of_processes(
    tmp_path: Path, world_size: int, optimizer: Any, lr: float, method: str
) -> None:
    trial = Trial(method=method, optimizer=optimizer, lr=lr, world_size=world_size, **TRAINED)
    train = bench_training.train_apart if bench_training.period(method) else bench_training.train_together
    losses, *_ = train(trial)
    by_rank = run_ranks(losses_by_processes, world_size, tmp_path, optimizer, lr, method)
    # what is not compressed the network sums in its own order
    assert losses == pytest.approx([sum(each) / world_size for each in zip(*by_rank, strict=True)], rel=1e-3)
    assert losses[-1] < 0.95 * losses[0]


def constant(shapes: Shapes, world_size: int = 4) -> Tensor:
    size = sum(math.prod(shape) for _, shape in shapes)
    return torch.randn(world_size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (rivals.Dense, 32),
        (rivals.Bf16, 16),
        (rivals.TernGrad, 1.6),
        (rivals.RotatedSign, 1 + 16 / 1024),
        (rivals.ErrorFeedbackSign, 1),
        (rivals.TopK, 0.28),
    ],
)
def test_a_rivals_mean_is_right_over_many_steps_and_its_bytes_are_counted(kind: type, bits: float) -> None:
    gradient_WN = constant(MATRIX)
    rival, total, steps = kind(MATRIX), torch.zeros_like(gradient_WN[0]), 300
    for _ in range(steps):
        total += rival.average(gradient_WN.clone())
    error = (total / steps - gradient_WN.mean(0)).norm() / gradient_WN.mean(0).norm()
    # clipping at 2.5 standard deviations takes 2 % off; the largest hundredth comes round every hundred steps
    assert error < (0.2 if kind in (rivals.TopK, rivals.TernGrad) else 0.1)
    assert rival.sent_bytes / steps == pytest.approx(64 * 48 * bits / 8 + 4 * 48, rel=0.01)
    # by a ring of 4 ranks, or from 3 others
    each_way = 1.5 if kind in (rivals.Dense, rivals.Bf16) else 3
    assert rival.received_bytes / steps == pytest.approx(64 * 48 * bits / 8 * each_way + 4 * 48 * 1.5, rel=0.01)


def test_what_each_rank_rounds_is_its_own_with_drive() -> None:
    one_N = constant(MATRIX)[0]
    mean_N = rivals.RotatedSign(MATRIX).average(one_N.repeat(16, 1))
    error = ((mean_N - one_N).square().sum() / one_N.square().sum()).item()
    assert error == pytest.approx((math.pi / 2 - 1) / 16, rel=0.2)


def test_powersgd_sends_a_matrix_of_its_rank_exactly_and_forgets_nothing() -> None:
    left, right = torch.randn(64, 4), torch.randn(4, 48)
    low = torch.cat([(left @ right).flatten(), torch.randn(48)]).expand(3, -1)
    power = rivals.PowerSGD(MATRIX, rank=4)
    for _ in range(6):
        mean_N = power.average(low.clone())
    torch.testing.assert_close(mean_N, low[0], rtol=1e-3, atol=1e-3)

    gradient_WN = constant(MATRIX)
    power, total = rivals.PowerSGD(MATRIX, rank=1), torch.zeros_like(gradient_WN[0])
    for _ in range(10):
        total += power.average(gradient_WN.clone())
    kept = power._error["weight"].mean(0).flatten()
    sent = 8 * 4 * (64 + 48) + 2 * 4 * 64 * 48 + 10 * 4 * 48
    assert power.sent_bytes == sent
    torch.testing.assert_close(total[: 64 * 48] + kept, 10 * gradient_WN.mean(0)[: 64 * 48], rtol=1e-3, atol=1e-3)


def by_torchs_powersgd(rank: int, world_size: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """A rank's own gradient and what came of it, step by step; factor Q and error before the last three."""
    torch.manual_seed(0)
    model = DDP(torch.nn.Linear(48, 64, bias=False))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    history = []
    for step in range(6):
        if step == 3:
            q, error = state.q_memory_dict[0].clone(), state.error_dict[0].clone()
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(10 * step + rank))
        (own,) = torch.autograd.grad(model.module(x).square().mean(), list(model.parameters()))
        model.zero_grad()
        model(x).square().mean().backward()
        history.append((own.flatten(), model.module.weight.grad.flatten().clone()))
    return history, q.view(48, 2), error.view(64, 48)


def test_powersgd_is_torchs(tmp_path: Path) -> None:
    by_rank = run_ranks(by_torchs_powersgd, 2, tmp_path)
    power = rivals.PowerSGD((("weight", (64, 48)),), rank=2)
    power.step = 3
    power._q["weight"] = torch.linalg.qr(by_rank[0][1]).Q
    power._error["weight"] = torch.stack([error for _, _, error in by_rank])
    for step in range(3, 6):
        mean_N = power.average(torch.stack([history[step][0] for history, _, _ in by_rank]))
        torch.testing.assert_close(mean_N, by_rank[0][0][step][1], rtol=1e-4, atol=1e-7)


def test_powersgds_factors_are_rounded_where_they_count_as_halves() -> None:
    gradient_WN = constant(MATRIX)
    whole, half = (rivals.PowerSGD(MATRIX, start_step=0, factors=t) for t in (torch.float32, torch.bfloat16))
    error = half.average(gradient_WN.clone()) - whole.average(gradient_WN.clone())
    assert 1e-4 < error.norm() / gradient_WN.mean(0).norm() < 1e-2
    assert whole.sent_bytes - half.sent_bytes == 2 * 4 * (64 + 48)


TWO: Shapes = (("first", (64, 48)), ("second", (48, 64)), ("bias", (48,)))


@pytest.mark.parametrize("method", bench_training.LEADS)
def test_what_was_tried_has_the_right_mean_over_many_steps(method: str) -> None:
    steps = 400
    trial = Trial(task="digits", optimizer="adamw", method=method, lr=1.0, momentum=0.9, steps=steps)
    lead, gradient_WN = bench_training.make_averager(trial, TWO), constant(TWO)
    sent, total = [0.0], torch.zeros_like(gradient_WN[0])
    for _ in range(steps):
        total += lead.average(gradient_WN.clone())
        sent.append(lead.sent_bytes)
    error = (total / steps - gradient_WN.mean(0)).norm() / gradient_WN.mean(0).norm()
    assert error < 0.2
    assert lead.received_bytes > lead.sent_bytes
    early, late = sent[240] - sent[1], sent[400] - sent[242]  # the first step is exact
    if method == "schedule 16, 4":
        assert late / 158 > 1.3 * early / 239
    else:
        assert late / 158 == pytest.approx(early / 239, rel=0.05)


def test_the_loudest_parameters_have_a_code_of_their_own() -> None:
    shapes: Shapes = (("quiet", (64, 64)), ("loud", (32, 64)), ("bias", (48,)))
    gradient_WN = constant(shapes)
    gradient_WN[:, : 64 * 64] *= 0.01
    noises = {}
    for method in ("by-energy 2, 64", "by-energy 64, 2"):
        config = VsaConfig(sparsity=int(method.split()[1][:-1]), gain="unbiased")
        lead = leads.ByEnergy(shapes, config, quiet=int(method.split()[2]))
        lead.average(gradient_WN.clone())
        error_N = lead.average(gradient_WN.clone()) - gradient_WN.mean(0)
        errors, true = (each.split([64 * 64, 32 * 64, 48]) for each in (error_N, gradient_WN.mean(0)))
        noises[method] = [e.norm() / g.norm() for e, g in zip(errors, true, strict=True)]
    assert noises["by-energy 2, 64"][0] > 2 * noises["by-energy 64, 2"][0]
    assert noises["by-energy 64, 2"][1] > 2 * noises["by-energy 2, 64"][1]
    assert noises["by-energy 2, 64"][2] < 1e-6


def test_the_first_component_of_a_matrix_goes_ahead_of_the_hook() -> None:
    trial = Trial(task="digits", optimizer="adamw", method="low-rank-head 16", lr=1.0, momentum=0.9, steps=1)
    lead = bench_training.make_averager(trial, MATRIX)
    row_N = torch.cat([(torch.randn(64, 1) @ torch.randn(1, 48)).flatten(), torch.randn(48)])
    for _ in range(5):
        mean_N = lead.average(row_N.repeat(4, 1))
    torch.testing.assert_close(mean_N, row_N, rtol=1e-3, atol=1e-3)


def test_a_shared_prediction_is_taken_where_it_is_right() -> None:
    """A gradient that stays has less noise, one that is new in each step is sent whole."""
    trial = Trial(task="digits", optimizer="adamw", method="shared-prediction 8", lr=1.0, momentum=0.9, steps=1)
    stays, new = (bench_training.make_averager(trial, MATRIX) for _ in range(2))
    hook = LockstepHook(MATRIX, VsaConfig(sparsity=8))
    one_WN, errors = constant(MATRIX), torch.zeros(3)
    for step in range(60):
        other_WN = torch.randn_like(one_WN)
        for i, (averager, given) in enumerate([(stays, one_WN), (new, other_WN), (hook, other_WN)]):
            error = averager.average(given.clone()) - given.mean(0)
            errors[i] += (step >= 40) * error.square().sum() / given.mean(0).square().sum()
    assert errors[0] < 0.8 * errors[2]
    assert errors[1] == pytest.approx(errors[2].item(), rel=0.15)


def test_onebit_adam_begins_as_adam_and_then_forgets_no_momentum() -> None:
    gradient_WN = constant(MATRIX)
    size = gradient_WN.shape[1]
    ours, theirs = (torch.nn.Parameter(torch.ones(size)) for _ in range(2))
    rival = rivals.OneBitAdam(MATRIX, 0, beta1=0.9, warmup_steps=5)
    by_rival = torch.optim.SGD([ours], 0.01, weight_decay=0.1)
    adam = torch.optim.AdamW([theirs], 0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(5):
        ours.grad = rival.average(gradient_WN + step)
        theirs.grad = gradient_WN.mean(0) + step
        by_rival.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)
    assert rival.sent_bytes == 5 * 4 * size

    steps, total = 2000, torch.zeros(size)
    for _ in range(steps):
        rival.average(gradient_WN)
        total += rival._momentum_N
    error = (total / steps - gradient_WN.mean(0)).norm() / gradient_WN.mean(0).norm()
    assert error < 0.1
    bits = 64 * 48 + 8 * 4 + 32 * 48  # signs, a scale, and what has one dimension
    assert rival.sent_bytes == pytest.approx(5 * 4 * size + steps * bits / 8 * (1 + 1 / 4))  # and its shard's, to all
    assert rival.received_bytes == pytest.approx((5 * 4 * size + steps * bits / 8) * 2 * 3 / 4)


def test_diloco_steps_on_by_its_momentum() -> None:
    gradient_WN = constant(MATRIX)
    mean_N, rival = gradient_WN.mean(0), rivals.DiLoCo(MATRIX)
    torch.testing.assert_close(rival.average(gradient_WN), 0.7 * 1.9 * mean_N)
    torch.testing.assert_close(rival.average(0 * gradient_WN), 0.7 * 0.9 * 0.9 * mean_N)


def test_demo_keeps_in_its_momentum_what_it_does_not_send() -> None:
    g_WRC = torch.randn(3, 97, 128)
    everything = rivals.DeMo(MATRIX, count=64 * 64)
    torch.testing.assert_close(everything.average_matrix("weight", g_WRC), g_WRC.mean(0), rtol=1e-4, atol=1e-5)
    assert everything._momentum["weight"].abs().max() < 1e-5
    assert rivals.DeMo(MATRIX).average(constant(MATRIX)).unique().tolist() == [-1.0, 1.0]

    some, wanted = rivals.DeMo(MATRIX, count=32), torch.zeros(97, 128)
    for _ in range(5):
        wanted = wanted * 0.999 + g_WRC[0]
        sent = some.average_matrix("weight", g_WRC[:1])
        wanted -= sent
    torch.testing.assert_close(some._momentum["weight"][0, :97], wanted, rtol=1e-4, atol=1e-5)
    assert some.sent_bytes == 5 * 2 * 2 * 32 * 3.5

    # over those that sent a coefficient
    mine, silent = g_WRC[:1], torch.zeros_like(g_WRC[:1])
    alone, beside = (rivals.DeMo(MATRIX).average_matrix("weight", w) for w in (mine, torch.cat([mine, silent])))
    torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("code", [{}, {"compression": 320}, {"bundle": 3}])
def test_what_arrives_has_the_noise_and_the_bytes_that_the_settings_mean(wire: Any, code: dict[str, Any]) -> None:
    config = VsaConfig(wire=wire, whiten=False, **code)
    hook = LockstepHook((("weight", (384, 512)),), config)
    gradient_1N = torch.randn(1, 384 * 512, generator=torch.Generator().manual_seed(0))
    for _ in range(4):  # the first is exact, and the next finds out the standard deviation
        hook.average(gradient_1N.clone())
    before, noise = hook.sent_bytes, []
    for _ in range(5):
        decoded_N = hook.average(gradient_1N.clone())
        noise.append(((decoded_N - gradient_1N[0]).square().sum() / gradient_1N.square().sum()).item())
    assert sum(noise) / 5 == pytest.approx(unbiased_nmse(config.bundle, config.sparsity, num_roundings(wire)), rel=0.03)
    if wire == "all_gather":
        bits = 8 * (hook.sent_bytes - before) / 5 / gradient_1N.numel()
        assert bits == pytest.approx((bits_per_trit(config.sparsity) + LEVEL_BITS) / config.bundle, rel=0.01)
        assert 32 / bits > 0.9 * code.get("compression", 0 if code else 64)


@pytest.mark.parametrize("settings", [{"sparsity": 8}, {"sparsity": 64}, {"wire": "two_shot", "sparsity": 8}])
@pytest.mark.parametrize("task", ["transformer", "lstm"])
def test_each_parameters_own_gradient_has_the_noise_of_theory(task: str, settings: dict[str, Any]) -> None:
    """A model's gradients are no Gaussians: rows and columns prevail in them."""
    torch.manual_seed(0)
    model = TASKS[task].model()
    TASKS[task].loss(model, torch.Generator().manual_seed(0)).backward()
    true = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    config = VsaConfig(whiten=False, gain="unbiased", bundle=1, exact_steps=0, **settings)
    hook, noise = LockstepHook(shapes_of(model), config), torch.zeros(len(true))
    for _ in range(8):
        decoded = hook.average(torch.cat(true)[None]).split([len(g) for g in true])
        noise += (
            torch.stack([(d - g).square().sum() / g.square().sum() for d, g in zip(decoded, true, strict=True)]) / 8
        )
    theory = unbiased_nmse(1, config.sparsity, num_roundings(config.wire))
    compressed = torch.tensor([is_compressed(p.shape, config) for p in model.parameters()])
    assert (noise[compressed] / theory).sub(1).abs().max() < 0.2
    assert not noise[~compressed].any()


@pytest.mark.parametrize("wire", WIRES)
def test_a_first_step_without_scales_spoils_none_that_follows(wire: Any) -> None:
    """Rows so loud that no other would be heard at their standard deviation."""
    hook = LockstepHook((("weight", (512, 128)),), VsaConfig(wire=wire, bundle=1, exact_steps=0))
    loudness = torch.ones(512, 1)
    loudness[:8] = 100.0  # a rotation block
    gradient_N = (torch.randn(512, 128, generator=torch.Generator().manual_seed(0)) * loudness).flatten()
    for _ in range(4):
        decoded_N = hook.average(gradient_N.clone()[None])
        for rows in (slice(0, 8 * 128), slice(8 * 128, None)):
            noise = (decoded_N - gradient_N)[rows].square().sum() / gradient_N[rows].square().sum()
            assert noise < 0.9


@pytest.mark.parametrize(("method", "lr", "num_more"), [("bf16", 0.4, 0), ("dense", 0.566, 3)])
def test_the_search_finds_the_best_learning_rate_and_then_runs_every_seed(
    method: str, lr: float, num_more: int
) -> None:
    """Where a smaller momentum wants a larger rate, which is looked for with plain DDP."""

    def loss(trial: Trial) -> float:
        return abs(math.log2(trial.lr / (0.4 if trial.momentum > 0.85 else 0.566))) + 9 * abs(trial.momentum - 0.8)

    suite = Suite(task="digits", optimizer="sgd", steps=10, base_lr=0.1, momenta=(0.9, 0.8, 0.7, 0.5))
    runs: list[Record] = []
    while planned := list(waiting(suite, method, runs)):
        runs += [{**vars(t), "heldout_loss": 5 + loss(t)} for t in planned]
    best = bench_training.best_runs(suite, method, runs)
    assert [(r["lr"], r["momentum"]) for r in best] == [(pytest.approx(lr, rel=1e-3), 0.8)] * len(SEEDS)
    assert sorted(r["seed"] for r in best) == list(SEEDS)
    rates = {round(r["lr"], 3) for r in runs if r["momentum"] == 0.9}
    assert sorted(rates) == [0.071, 0.1, 0.141, 0.2, 0.283, 0.4, 0.566]
    assert len(runs) == 7 + 2 + num_more + len(SEEDS) - 1


@pytest.mark.parametrize("bad_loss", [None, 5.0])
def test_settings_at_which_some_seed_cannot_train_are_not_taken(bad_loss: float | None) -> None:
    suite = Suite(task="digits", optimizer="sgd", steps=10, base_lr=0.1)
    runs: list[Record] = []
    while planned := list(waiting(suite, "dense", runs)):
        bad = [t.seed == 2 and t.lr > 0.15 for t in planned]
        runs += [
            {**vars(t), "heldout_loss": bad_loss if b else abs(math.log2(t.lr / 0.4))}
            for t, b in zip(planned, bad, strict=True)
        ]
    best = bench_training.best_runs(suite, "dense", runs)
    assert [r["lr"] for r in best] == pytest.approx([0.1 * 2**0.5] * len(SEEDS))


def test_of_settings_with_all_seeds_the_least_mean_is_taken_and_its_standard_error_told() -> None:
    suite = Suite(task="digits", optimizer="sgd", steps=10, base_lr=0.1)
    losses = {("dense", 0.1): (1.0, 1.0, 1.0), ("drive", 0.1): (2.0, 2.0, 2.0), ("drive", 0.2): (1.0, 1.1, 1.5)}
    runs = [
        {**vars(bench_training.first_trial(suite, method, lr)), "seed": seed, "heldout_loss": loss}
        for (method, lr), each in losses.items()
        for seed, loss in enumerate(each)
    ]
    best, dense = (bench_training.best_runs(suite, method, runs) for method in ("drive", "dense"))
    assert {r["lr"] for r in best} == {0.2}
    assert bench_training._excess(best, dense) == "+20.0 % (15.3)"
    assert bench_training._excess(dense, dense) == "+0.0 %"
    assert bench_training._excess(best[:2], dense) == "+5.0 %"


def test_a_method_that_always_diverges_is_given_up() -> None:
    suite = Suite(task="digits", optimizer="sgd", steps=10, base_lr=0.1)
    runs: list[Record] = []
    for _ in range(20):
        runs += [{**vars(t), "heldout_loss": None} for t in waiting(suite, "dense", runs)]
    assert not list(waiting(suite, "dense", runs))
    assert min(r["lr"] for r in runs) == 0.1 / 2**4


@pytest.mark.parametrize("suite", bench_training.SUITES.values(), ids=list(bench_training.SUITES))
def test_every_method_of_a_suite_has_a_first_run_that_can_be_made(suite: Suite) -> None:
    for method in suite.methods:
        trials = list(waiting(suite, method, []))
        assert len({t.lr for t in trials}) == 3, method
        if bench_training.parse(method)[0] != "alone":
            bench_training.make_averager(trials[0], MATRIX)


def test_ours_are_run_at_the_largest_learning_rate_at_which_plain_ddp_does_not_diverge() -> None:
    suite = Suite(
        task="digits", optimizer="sgd", steps=10, base_lr=0.1, methods=("dense", "bundle 1", "drive"), bounded=True
    )
    runs: list[Record] = []
    while planned := bench_training.plan([suite], runs):
        failed = [t.method == "dense" and t.lr > 0.45 and t.seed == 1 for t in planned]
        runs += [
            {**vars(t), "heldout_loss": None if f else 1 + abs(math.log2(t.lr / 0.1)) / 100}
            for t, f in zip(planned, failed, strict=True)
        ]
    assert bench_training.largest_rate(suite, runs) == (pytest.approx(0.4), [])
    largest = [r for r in runs if r["lr"] == pytest.approx(0.4)]
    assert [r["method"] for r in largest] == ["dense"] * len(SEEDS) + ["bundle 1"] * len(SEEDS)
    assert {r["method"] for r in runs if r["lr"] > 0.45} == {"dense"}
    assert bench_training.at_the_largest_rate(suite, runs) == [
        "",
        "At 0.4, the largest learning rate at which no seed of plain DDP diverges: "
        "dense 1.020, 1.020, 1.020; bundle 1 1.020, 1.020, 1.020.",
    ]
    assert bench_training.at_the_largest_rate(suite, []) == []


def test_the_lower_envelope_has_those_that_nothing_beats_at_as_few_bytes() -> None:
    suite = Suite(task="digits", optimizer="sgd", steps=10, base_lr=0.1)
    points = {
        "dense": (100, 2.1),
        "bf16": (50, 2),
        "drive": (4, 2.5),
        "ef-sign": (4, 3),
        "bundle 1": (5, 2.4),
        "alone": (0, 9),
    }
    unfinished = {"method": "powersgd 1", "received_bytes_per_step": 1, "heldout_loss": 1, "seed": 0}
    runs = [
        {"method": method, "received_bytes_per_step": sent, "heldout_loss": loss, "seed": seed}
        for method, (sent, loss) in points.items()
        for seed in SEEDS
    ]
    shared = {"task": "digits", "optimizer": "sgd", "steps": 10, "world_size": 4, "lr": 0.1, "momentum": 0.9}
    results = {"runs": [{**shared, **run} for run in [*runs, unfinished]]}
    assert bench_training.envelope(suite, results) == {"bf16", "drive", "bundle 1", "alone"}


def test_averaging_weights_in_every_step_of_plain_sgd_is_averaging_gradients() -> None:
    plain = {"task": "digits", "optimizer": "sgd", "lr": 0.2, "momentum": 0.0, "steps": 5}
    apart = run(Trial(method="local 1", **plain))  # type: ignore[arg-type]
    together = run(Trial(method="dense", **plain))  # type: ignore[arg-type]
    assert apart["heldout_loss"] == pytest.approx(together["heldout_loss"], rel=1e-4)
    assert apart["sent_bytes_per_step"] == together["sent_bytes_per_step"]


@pytest.mark.parametrize("wire", ["all_gather", "all_reduce", "two_shot"])
def test_ranks_that_take_turns_keep_no_message(wire: Any) -> None:
    hook = LockstepHook((("weight", (512, 128)),), VsaConfig(wire=wire, bundle=1))
    gradient_N = torch.randn(1, 512 * 128)

    def num_tensors() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    hook.average(gradient_N)
    hook.average(gradient_N)
    before = num_tensors()
    for _ in range(10):
        hook.average(gradient_N)
    assert num_tensors() == before


@pytest.mark.parametrize(
    "method",
    [
        "dense",
        "sparsity 8",
        "sparsity 8, unbiased",
        "two-shot 64",
        "powersgd 1",
        "powersgd 1, bf16",
        "local 4",
        "diloco 4",
        "diloco 4, momentum 0.5",
        "drive-local 4",
        "vsa-local 4, n=64",
        "alone",
    ],
)
def test_every_kind_of_method_learns(method: str) -> None:
    found = run(Trial(task="digits", optimizer="sgd", method=method, lr=0.05, momentum=0.9, steps=30))
    assert found["losses"][-1] < found["losses"][0]
    assert found["heldout_loss"] < 2.3  # the logarithm of ten classes


@pytest.mark.parametrize(
    ("method", "lr"),
    [
        ("demo 32", 2e-3),
        ("onebit-adam", 1e-4),
        ("compression 320", 8e-3),
        ("vsa-local 1, two-shot 256", 2e-3),
        *((lead, 4e-3) for lead in bench_training.LEADS),
    ],
)
def test_every_kind_of_method_for_adam_learns(method: str, lr: float) -> None:
    found = run(Trial(task="digits", optimizer="adamw", method=method, lr=lr, momentum=0.9, steps=30))
    assert found["losses"][-1] < found["losses"][0]
    assert found["heldout_loss"] < 2.3


def test_a_run_that_diverges_says_so() -> None:
    diverged = run(Trial(task="digits", optimizer="sgd", method="dense", lr=1e6, momentum=0.9, steps=30))
    assert diverged["heldout_loss"] is None
    assert len(diverged["losses"]) == 1
    stuck = run(Trial(task="digits", optimizer="sgd", method="dense", lr=3.0, momentum=0.9, steps=30))
    assert stuck["heldout_loss"] is None
    assert math.isfinite(sum(stuck["losses"]))
