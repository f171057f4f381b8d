"""The wrapper steps a real optimizer on sums in trits, and is that optimizer in everything else."""

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from benchmarks.tasks import CharTask
from launch.charlm import CharTransformer
from tests.models import batch, loss_of, net
from vsa_ddp.accumulate import TernaryGradientAccumulator
from vsa_ddp.optimizer import OptimizerStats, TernaryOptimizerWrapper
from vsa_ddp.register import optimizer_family


def adamw(model: nn.Module, lr: float = 0.01) -> AdamW:
    return AdamW(model.parameters(), lr=lr)


def wrapped(model: nn.Module, steps: int = 4, *, seed: int = 0, sums: bool = False) -> TernaryOptimizerWrapper:
    reduction = "sum" if sums else "mean"
    return TernaryOptimizerWrapper(adamw(model), steps, seed=seed, reduction=reduction, backend="torch")  # type: ignore[arg-type]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train(model: nn.Module, optimizer: Optimizer, micro_batches: range) -> None:
    for step in micro_batches:
        loss_of(model, step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_one_accumulation_step_is_the_wrapped_optimizer_bit_for_bit() -> None:
    plain, ours = net(), net()
    train(plain, adamw(plain), range(5))
    train(ours, wrapped(ours, 1), range(5))
    assert equal(weights(plain), weights(ours))


@pytest.mark.parametrize("sums", [False, True])
def test_parameters_summed_exactly_train_as_with_sums_in_float32(sums: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    ours, steps, before = copy.deepcopy(plain), 4, weights(plain)
    reference, optimizer = SGD(plain.parameters(), lr=0.1), SGD(ours.parameters(), lr=0.1)
    reduction = "sum" if sums else "mean"
    wrapper = TernaryOptimizerWrapper(optimizer, steps, reduction=reduction, backend="torch")  # type: ignore[arg-type]
    for step in range(3 * steps):
        x, _ = batch(step, 0)
        (plain(x.flatten(1)).square().mean() / (1 if sums else steps)).backward()
        ours(x.flatten(1)).square().mean().backward()
        wrapper.step()
        if step % steps == steps - 1:
            reference.step()
            reference.zero_grad()
            wrapper.zero_grad()
    # the same sums in another order
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-6)
    assert not equal(weights(ours), before)


def test_it_steps_with_every_kth_micro_batch_and_frees_gradients_between() -> None:
    model = net()
    optimizer = wrapped(model, 3)
    for micro_batch in range(1, 10):
        before = weights(model)
        loss_of(model, micro_batch, 0).backward()
        optimizer.step()
        steps = micro_batch % 3 == 0
        assert optimizer.updated == steps
        assert equal(before, weights(model)) != steps
        assert all((p.grad is not None) == steps for p in model.parameters())
        assert optimizer.stats()[:3] == (micro_batch // 3, micro_batch, micro_batch % 3)
        optimizer.zero_grad()
    stats = optimizer.stats()
    num_parameters = sum(p.numel() for p in model.parameters())
    assert 0.80 < stats.memory_savings < 0.90
    assert stats.max_bytes == round((1 - stats.memory_savings) * 4 * num_parameters)
    assert optimizer.accumulator.num_bytes == 0


def test_an_update_has_the_mean_of_what_the_accumulator_says() -> None:
    model = net()
    optimizer, sums = wrapped(model, 3), TernaryGradientAccumulator(3, backend="torch")
    for step in range(3):
        loss_of(model, step, 0).backward()
        gradients = {f"parameter {i}": p.grad.clone() for i, p in enumerate(model.parameters()) if p.grad is not None}
        if step < 2:
            sums.accumulate(gradients)
        optimizer.step()
    sums.add_to(gradients, divisor=3)
    for i, p in enumerate(model.parameters()):
        assert p.grad is not None
        assert torch.equal(p.grad, gradients[f"parameter {i}"])


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned() -> None:
    model, calls = net(), []
    optimizer = wrapped(model, 2)
    before = weights(model)

    def closure() -> Tensor:
        optimizer.zero_grad()  # as is usual there; it does not drop the sums
        loss = loss_of(model, len(calls), 0)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(2)]
    assert losses == calls
    assert not equal(before, weights(model))

    reference = net()
    train(reference, wrapped(reference, 2), range(2))
    assert equal(weights(model), weights(reference))


def test_what_cannot_be_wrapped_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="LBFGS evaluates the loss several times in a step"):
        TernaryOptimizerWrapper(torch.optim.LBFGS(model.parameters()), 2)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Net"):
        TernaryOptimizerWrapper(model, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'max'"):
        TernaryOptimizerWrapper(adamw(model), 2, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accumulation_steps must be an int of at least 1, got 0"):
        TernaryOptimizerWrapper(adamw(model), 0)


def test_groups_state_and_defaults_are_the_wrapped_optimizers() -> None:
    model = net()
    inner = AdamW(model.conv.parameters(), lr=0.01)
    optimizer = TernaryOptimizerWrapper(inner, 2, backend="torch")
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    optimizer.add_param_group({"params": list(model.hidden.parameters()), "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.01, 0.5]
    assert optimizer_family(optimizer) == "adam"
    assert optimizer_family(TernaryOptimizerWrapper(SGD(model.parameters(), lr=0.1), 2)) == "sgd"
    assert "AdamW" in repr(optimizer)
    assert "0 of 2 micro-batches" in repr(optimizer)


def test_a_learning_rate_schedule_counts_updates() -> None:
    model = net()
    optimizer = wrapped(model, 2)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for step in range(4):
        loss_of(model, step, 0).backward()
        optimizer.step()
        if optimizer.updated:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.01, 0.005, 0.005, 0.0025]
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.0025


def test_hooks_run_at_updates_and_can_clip_the_whole_gradient() -> None:
    model = net()
    optimizer = wrapped(model, 2)
    norms: list[float] = []

    def clip(*_: object) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())

    handle = optimizer.register_step_pre_hook(clip)
    train(model, optimizer, range(4))
    assert len(norms) == 2
    assert min(norms) > 0.01
    handle.remove()
    loss_of(model, 0, 0).backward()
    optimizer.step()
    loss_of(model, 0, 0).backward()
    optimizer.step()
    assert len(norms) == 2
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert total > 0.01


def test_a_parameter_without_a_gradient_in_the_last_micro_batch_is_updated() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)])
    optimizer = TernaryOptimizerWrapper(SGD(model.parameters(), lr=1.0), 2, backend="torch")
    before = weights(model)
    for layer in model:
        layer(torch.ones(1, 40)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for was, now in zip(before, weights(model), strict=True):
        # a gradient of ones, half of it; the first layer's was rounded once
        assert (was - now - 0.5).square().mean() < 0.04 * 0.25
        assert abs((was - now).mean() - 0.5) < 0.02


def interrupted(cut: int, save: Callable[[TernaryOptimizerWrapper], TernaryOptimizerWrapper]) -> list[Tensor]:
    model = net()
    optimizer = wrapped(model)
    train(model, optimizer, range(cut))
    optimizer = save(optimizer)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    fresh = wrapped(resumed)
    fresh.load_state_dict(optimizer.state_dict())
    train(resumed, fresh, range(cut, 8))
    return weights(resumed)


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_a_run_resumed_between_micro_batches_has_the_bits_of_one_that_was_not(cut: int) -> None:
    def through_a_file(optimizer: TernaryOptimizerWrapper) -> TernaryOptimizerWrapper:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = wrapped(net())
        loaded.load_state_dict(torch.load(file, weights_only=True))
        return loaded

    model = net()
    train(model, wrapped(model), range(8))
    assert equal(interrupted(cut, through_a_file), weights(model))
    assert equal(interrupted(cut, lambda optimizer: pickle.loads(pickle.dumps(optimizer))), weights(model))


def test_states_of_plain_optimizers_can_be_exchanged() -> None:
    model = net()
    optimizer = wrapped(model)
    train(model, optimizer, range(6))
    plain = adamw(net(), lr=1.0)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.01
    assert len(plain.state) == len(list(model.parameters()))
    assert optimizer.accumulator.count == 2
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.accumulator.count == 0  # sums of another run are not taken into this one
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="made with"):
        wrapped(net(), 5).load_state_dict(optimizer.state_dict())


def test_a_grad_scaler_unscales_every_micro_batch_and_skips_what_overflows() -> None:
    plain, scaled = net(), net()
    train(plain, wrapped(plain, 2), range(2))
    optimizer, scaler = wrapped(scaled, 2), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, factor in ((0, 1.0), (7, math.inf), (1, 1.0)):
        scaler.scale(factor * loss_of(scaled, step, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.stats()[:3] == (1, 2, 0)
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-4, atol=1e-6)


def test_stats_start_at_nothing() -> None:
    assert wrapped(net()).stats() == OptimizerStats(0, 0, 0, 0, 0.0)


UPDATES, MICRO_BATCHES = 60, 8


def char_losses(ours: bool, seed: int) -> tuple[float, float]:
    """Training loss of the last ten updates and held-out loss of a character transformer."""
    task = CharTask(lambda: CharTransformer(64, 2, 4, 64), batch=4, heldout_windows=256)
    torch.manual_seed(seed)
    model = task.model()
    order = torch.Generator().manual_seed(seed)
    optimizer: Optimizer = AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    if ours:
        optimizer = TernaryOptimizerWrapper(optimizer, MICRO_BATCHES)
    losses = []
    for micro_batch in range(1, UPDATES * MICRO_BATCHES + 1):
        loss = task.loss(model, order)
        losses.append(loss.item())
        (loss if ours else loss / MICRO_BATCHES).backward()
        if ours or micro_batch % MICRO_BATCHES == 0:
            optimizer.step()
            optimizer.zero_grad()
    return sum(losses[-80:]) / 80, task.heldout_loss(model)


def test_a_character_model_learns_as_with_sums_in_float32() -> None:
    reference, found = char_losses(ours=False, seed=0), char_losses(ours=True, seed=0)
    assert reference[1] < 3.0  # it has learnt: characters alone have 3.3 nats
    for expected, loss in zip(reference, found, strict=True):
        assert loss == pytest.approx(expected, rel=0.02)
