"""Real ranks: the same phases and bits on all of them whatever each sees, and an error on all where they part."""

import contextlib
import copy
import itertools
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import batch, digest, gradients, loss_of, net
from tests.ranks import run_ranks
from tests.test_ddp import Branches
from vsa_ddp import Phase, PhaseConfig, PhasedTrainer

OPTIONS: dict[str, Any] = {"bucket_cap_mb": 0.05}
SHORT = {"warmup_steps": 2, "full_steps": 2, "predict_steps": 4, "correct_every": 2, "adapt": "none"}
"""Two cycles in 16 steps: ww ff ppcpc ff ppcpc"""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train(
    phases: PhasedTrainer,
    model: nn.Module,
    rank: int,
    steps: range,
    loss: Callable[[nn.Module, int, int], Tensor] = loss_of,
) -> str:
    """First letters of the phases."""
    letters = ""
    for number in steps:
        with phases.step() as step:
            letters += step.phase.value[0]
            step.backward(loss(model, number, rank))
            phases.optimizer.step()
    return letters


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(Exception) as error:  # noqa: PT011  (the caller looks at type and text)
        call()
    return error.type.__name__, str(error.value)


# The schedule, on real ranks


def counts(rank: int, world_size: int, settings: dict[str, Any], steps: int) -> tuple[int, str, Any]:
    """Backward passes that were really made, the phases, and the stats."""
    calls = 0

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal calls
        calls += bucket.is_last()
        return (
            dist.all_reduce(bucket.buffer().div_(world_size), async_op=True).get_future().then(lambda f: f.value()[0])
        )

    torch.manual_seed(0)
    model = DDP(nn.Linear(4, 4))
    model.register_comm_hook(None, count)
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**settings))
    x = torch.randn(2, 4)
    letters = train(phases, model, rank, range(steps), lambda m, *_: m(x).square().mean())
    return calls, letters, phases.stats()


CYCLE: dict[str, Any] = {"warmup_steps": 0, "full_steps": 10, "predict_steps": 40, "correct_every": 10, "adapt": "none"}


@pytest.mark.parametrize(
    ("settings", "steps", "backwards"), [({"adapt": "none"}, 100, 43), ({"adapt": "none"}, 62, 28), (CYCLE, 51, 14)]
)
def test_backward_passes_are_counted_at_the_hook(
    tmp_path: Path, settings: dict[str, Any], steps: int, backwards: int
) -> None:
    for calls, letters, stats in run_ranks(counts, 2, tmp_path, settings, steps):
        assert calls == backwards == stats.backwards == steps - letters.count("p")
        assert stats.skipped == letters.count("p")
        assert stats.steps_by_phase == {phase.value: letters.count(phase.value[0]) for phase in Phase}
        assert stats.dense_bytes_skipped == stats.skipped * 20 * 4
        assert set(stats.seconds_by_phase) == {phase.value for phase in Phase}
        assert f"{backwards} backward passes in {steps} steps" in str(stats)


def adaptive(rank: int, world_size: int, folder: Path, delay: bool, adapt: str) -> dict[str, Any]:
    """Rank 3 may dawdle at random; losses differ by rank, and prediction pays by turns."""
    wait = torch.Generator().manual_seed(rank)
    settings = {"warmup_steps": 4, "full_steps": 3, "predict_steps": 8, "correct_every": 3, "decay": 0.8}
    config = PhaseConfig(**settings, adapt=adapt)  # type: ignore[arg-type]

    def loss(model: nn.Module, number: int, rank: int) -> Tensor:
        if delay and rank == 3 and torch.rand(1, generator=wait) < 0.3:
            time.sleep(0.01)
        # a batch that changes slowly or at once, and losses that rise on some ranks while they fall on others
        data = number // 20 if number // 20 % 2 == 0 else number
        return (1 + rank) * loss_of(model, data, rank) + 0.2 * rank * (2 - rank) * (number % 40)

    def start() -> tuple[DDP, vsa_ddp.VsaState, PhasedTrainer]:
        model = DDP(net(), **OPTIONS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
        # the hook, for its sums have the same bits in any buckets; those of four ranks by gloo have not
        return model, vsa_ddp.register(model, optimizer, bundle=1), PhasedTrainer(model, optimizer, config)

    model, hook, phases = start()
    letters = train(phases, model, rank, range(40), loss)
    file = folder / f"{delay}{adapt}.pt"
    if rank == 0:  # one rank saves for all
        parts = {"model": model.module, "optimizer": phases.optimizer, "hook": hook, "phases": phases}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    letters += train(phases, model, rank, range(40, 90), loss)
    dist.barrier()

    resumed, resumed_hook, again = start()
    saved = torch.load(file, weights_only=True)
    resumed.module.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    resumed_hook.load_state_dict(saved["hook"])
    again.load_state_dict(saved["phases"])
    resumed_letters = letters[:40] + train(again, resumed, rank, range(40, 90), loss)
    return {
        "letters": letters,
        "resumed letters": resumed_letters,
        "bits": digest(model.parameters()),
        "resumed bits": digest(resumed.parameters()),
        "stats": [s._replace(seconds_by_phase={}) for s in (phases.stats(), again.stats())],
    }


@pytest.mark.parametrize("adapt", ["gate", "trend"])
def test_four_ranks_go_through_the_same_phases_whatever_each_sees_and_whenever_they_stop(
    tmp_path: Path, adapt: str
) -> None:
    first, *others = run_ranks(adaptive, 4, tmp_path, tmp_path, False, adapt, seconds=90)
    assert first["letters"] == first["resumed letters"]
    assert first["bits"] == first["resumed bits"]
    assert first["stats"][0] == first["stats"][1]
    assert all(other == first for other in others)
    sections = {
        len(section) for section in first["letters"].replace("c", "p").replace("f", " ").split() if "p" in section
    }
    assert len(sections) > 2, sections  # the lengths did change
    delayed = run_ranks(adaptive, 4, tmp_path, tmp_path, True, adapt, seconds=90)
    assert all(other == first for other in delayed)


# What it takes back

TURN = 20
"""The first correction of the third section."""


def turning(model: nn.Module, number: int, rank: int) -> Tensor:
    """The same batch again and again, until all that was learnt is wrong."""
    loss = loss_of(model, 0, rank)
    return loss if number < TURN else 10.0 - loss


def undone(rank: int, world_size: int, folder: Path, roll_back: bool) -> dict[str, Any]:
    """A run whose third section goes wrong, and what becomes of it when it is saved around that."""
    import torch.distributed.checkpoint as dcp  # a second in each child, of these tests alone

    config = PhaseConfig(warmup_steps=4, full_steps=3, correct_every=2, predictor="last", roll_back=roll_back)

    def start() -> tuple[DDP, PhasedTrainer]:
        model = DDP(Normed())
        return model, PhasedTrainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config)

    def bits(model: DDP, phases: PhasedTrainer) -> tuple[str, str]:
        """Of parameters and optimizer, and of buffers."""
        state = [value for values in phases.optimizer.state.values() for value in values.values()]
        return digest([*model.parameters(), *state]), digest(model.buffers())

    def parts(model: DDP, phases: PhasedTrainer) -> dict[str, Any]:
        return copy.deepcopy({"model": model.module.state_dict(), "optimizer": phases.optimizer.state_dict()})

    model, phases = start()
    letters, after, saved = "", [], {}
    for number in range(30):
        letters += train(phases, model, rank, range(number, number + 1), turning)
        after.append(bits(model, phases))
        if number in (TURN - 2, TURN, TURN + 1):  # in the section, before the verdict, after it
            saved[number + 1] = parts(model, phases)
            dcp.save({"phases": phases}, checkpoint_id=folder / f"{number + 1}")
            if rank == 0:
                torch.save(phases.state_dict(), folder / f"{number + 1}.pt")
    dist.barrier()
    resumed = []
    for at, whole in saved.items():
        for load in (
            lambda p, at=at: dcp.load({"phases": p}, checkpoint_id=folder / f"{at}"),
            lambda p, at=at: p.load_state_dict(torch.load(folder / f"{at}.pt", weights_only=True)),
        ):
            other, again = start()
            other.module.load_state_dict(whole["model"])
            again.optimizer.load_state_dict(copy.deepcopy(whole["optimizer"]))  # it takes the tensors themselves
            load(again)
            tail = train(again, other, rank, range(at, 30), turning)
            resumed.append((letters[:at] + tail, bits(other, again)[0], again.stats().undone))
    return {"letters": letters, "bits": after, "undone": phases.stats().undone, "resumed": resumed}


@pytest.mark.parametrize("roll_back", [True, False])
def test_a_section_that_went_wrong_is_undone_on_all_ranks_and_after_a_checkpoint(
    tmp_path: Path, roll_back: bool
) -> None:
    ranks = run_ranks(undone, 2, tmp_path, tmp_path, roll_back)
    assert ranks[0]["letters"] == ranks[1]["letters"]
    for each in ranks:
        letters, bits = each["letters"], each["bits"]
        assert letters[: TURN + 2] == "wwwwfffpcfffppcfffppcp", letters
        assert each["undone"] == roll_back
        assert (bits[TURN + 1] == bits[TURN - 3]) is roll_back  # as the section found it: optimizer, buffers and all
        assert all(run == (letters, bits[-1][0], each["undone"]) for run in each["resumed"])


# Limit cases


def plain_or_phased(rank: int, world_size: int, settings: dict[str, Any] | None, hook: bool) -> tuple[str, str]:
    model = DDP(net(), **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if hook:
        vsa_ddp.register(model, optimizer)
    if settings is None:
        for number in range(12):
            optimizer.zero_grad()
            loss_of(model, number, rank).backward()
            optimizer.step()
        letters = "plain"
    else:
        letters = train(PhasedTrainer(model, optimizer, PhaseConfig(**settings)), model, rank, range(12))
    return digest(model.parameters()), letters


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(
    "settings", [{"predict_steps": 0}, {"min_slope": 1e9, "warmup_steps": 3}, {"warmup_steps": 12}]
)
def test_no_predicted_steps_is_plain_training_bit_for_bit(tmp_path: Path, settings: dict[str, Any], hook: bool) -> None:
    plain = run_ranks(plain_or_phased, 2, tmp_path, None, hook)
    phased = run_ranks(plain_or_phased, 2, tmp_path, settings, hook)
    assert len({bits for bits, _ in plain + phased}) == 1
    assert "p" not in phased[0][1]


def predicted_gradients(rank: int, world_size: int, predictor: str) -> None:
    """`last` under SGD repeats a step; no rank's own batch shows in a predicted step."""
    model = DDP(net(), **OPTIONS)
    config = PhaseConfig(warmup_steps=0, full_steps=1, predict_steps=2, predictor="last", adapt="none")
    phases = PhasedTrainer(model, torch.optim.SGD(model.parameters(), lr=0.01), config)
    real: dict[str, Tensor] = {}
    for number in range(8):
        with phases.step() as step:
            assert all(p.grad is None for p in model.parameters())
            loss = loss_of(model, number, rank)
            assert loss.requires_grad is not step.predicted
            step.backward(loss)
            assert torch.is_grad_enabled()
            if step.predicted:
                assert gradients(model).keys() == real.keys()
                assert all(torch.equal(real[name], g) for name, g in gradients(model).items())
            else:
                real = gradients(model)
            phases.optimizer.step()
    assert phases.stats().skipped == 4


def test_a_predicted_step_repeats_the_last_gradient_if_told_so(tmp_path: Path) -> None:
    run_ranks(predicted_gradients, 2, tmp_path, "last")


# What a training loop does besides


def consistent(rank: int, world_size: int, name: str) -> tuple[str, str]:
    letters, model = CASES[name](rank)
    return letters, digest(model.parameters())


def accumulation(rank: int) -> tuple[str, nn.Module]:
    """Gradients and history are those of the sum, under no_sync as without."""
    model, whole = DDP(net(), **OPTIONS), DDP(net(), **OPTIONS)
    phases, reference = (PhasedTrainer(m, sgd(m), PhaseConfig(**SHORT)) for m in (model, whole))
    letters = ""
    for number in range(16):
        with phases.step() as step:
            letters += step.phase.value[0]
            for micro in range(3):
                with model.no_sync() if micro < 2 else contextlib.nullcontext():
                    step.backward(loss_of(model, 10 * number + micro, rank) / 3)
            phases.optimizer.step()
        with reference.step() as step:
            x = torch.cat([batch(10 * number + micro, rank)[0] for micro in range(3)])
            y = torch.cat([batch(10 * number + micro, rank)[1] for micro in range(3)])
            step.backward((whole(x) - y).square().mean())
            reference.optimizer.step()
        if number:
            assert phases.schedule.loss == pytest.approx(reference.schedule.loss, rel=1e-4)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    return letters, model


def grad_scaler(rank: int) -> tuple[str, nn.Module]:
    """The same as without; overflows are skipped together, and leave nothing in the history."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    model, plain = DDP(net(), **OPTIONS), DDP(net(), **OPTIONS)
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT), scaler=scaler)
    reference = PhasedTrainer(plain, sgd(plain), PhaseConfig(**SHORT))
    letters = ""
    for number in range(32):
        overflow = number == 23
        with phases.step() as step:
            letters += step.phase.value[0]
            assert overflow <= (step.phase is Phase.FULL)
            loss = loss_of(model, number, rank)
            step.backward(loss * (1e38 * 1e38 if overflow and rank == 1 else 1.0))
            scaler.unscale_(phases.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(phases.optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0 ** (10 - (number >= 23))
        if number < 23:
            with reference.step() as step:
                step.backward(loss_of(plain, number, rank))
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                reference.optimizer.step()
            assert digest(plain.parameters()) == digest(model.parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return letters, model


def overflow_first(rank: int) -> tuple[str, nn.Module]:
    """GradScaler often begins too high: nothing is predicted from a gradient that was not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    model = DDP(net(), **OPTIONS)
    start = digest(model.parameters())
    config = PhaseConfig(warmup_steps=0, full_steps=1, predict_steps=3, predictor="last", adapt="none")
    phases = PhasedTrainer(model, sgd(model), config, scaler=scaler)
    letters = ""
    for number in range(8):
        with phases.step() as step:
            letters += step.phase.value[0]
            step.backward(loss_of(model, number, rank) * (1e38 * 1e38 if number == 0 else 1.0))
            scaler.step(phases.optimizer)
            scaler.update()
        assert (digest(model.parameters()) == start) is (number < 2)
    assert letters == "fpfpppcf"
    return "wwffppcpcffppcpc", model


def clipping_and_scheduler(rank: int) -> tuple[str, nn.Module]:
    """A clipped gradient does not enter the history, and a schedule of learning rates goes its own way."""
    model = DDP(net(), **OPTIONS)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    phases = PhasedTrainer(model, optimizer, PhaseConfig(**{**SHORT, "predictor": "last"}))
    letters, norm = "", 0.0
    for number in range(16):
        with phases.step() as step:
            letters += step.phase.value[0]
            step.backward(loss_of(model, number, rank))
            before, norm = norm, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()
            assert norm == before or not step.predicted
            assert norm > 0.1
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 16)
    return letters, model


def with_hook(rank: int) -> tuple[str, nn.Module]:
    """Predicted steps do not call the hook."""
    model = DDP(net(), **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = vsa_ddp.register(model, optimizer, bundle=1)
    phases = PhasedTrainer(model, optimizer, PhaseConfig(**SHORT))
    letters = train(phases, model, rank, range(16))
    assert state.step == phases.stats().backwards == 10
    return letters, model


def compiled(rank: int) -> tuple[str, nn.Module]:
    """Around the DDP model, and inside it."""
    letters = ""
    for outside in (True, False):
        inner = DDP(net() if outside else torch.compile(net(), backend="eager"), bucket_cap_mb=1)  # type: ignore[arg-type]
        model = torch.compile(inner, backend="eager") if outside else inner
        phases = PhasedTrainer(model, sgd(inner), PhaseConfig(**SHORT))
        letters = train(phases, model, rank, range(16))
        assert all(not name.startswith("_orig") for name in phases.predictor.state_dict()["sums"]["ema"][0])
    return letters, inner


def inductor(rank: int) -> tuple[str, nn.Module]:
    inner = DDP(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    model = torch.compile(inner)
    return train(PhasedTrainer(model, sgd(inner), PhaseConfig(**SHORT)), model, rank, range(16)), inner


def option(**options: Any) -> Callable[[int], tuple[str, nn.Module]]:
    def case(rank: int) -> tuple[str, nn.Module]:
        model = DDP(net(), bucket_cap_mb=0.05, **options)
        return train(PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT)), model, rank, range(16)), model

    return case


def unused(rank: int) -> tuple[str, nn.Module]:
    """Parameters without a gradient stay without one, and unchanged."""
    torch.manual_seed(0)
    model = DDP(Branches(), find_unused_parameters=True, bucket_cap_mb=0.02)
    never = model.module.never.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    phases = PhasedTrainer(model, optimizer, PhaseConfig(**SHORT))

    def loss(model: nn.Module, number: int, rank: int) -> Tensor:
        x, _ = batch(number, rank)
        return model(x, (number + rank) % 3 > 0).square().mean()

    letters = train(phases, model, rank, range(16), loss)
    assert model.module.never.weight.grad is None
    assert torch.equal(model.module.never.weight, never)
    return letters, model


class Normed(nn.Sequential):
    """Buffers, which DDP's forward pass broadcasts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


def buffers(rank: int) -> tuple[str, nn.Module]:
    model = DDP(Normed())
    letters = train(PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT)), model, rank, range(16))
    model(batch(0, rank)[0])  # broadcasts once more
    assert model.require_forward_param_sync
    return letters, model


def without_forward(rank: int) -> tuple[str, nn.Module]:
    """The forward pass may be left out where nothing comes back from it."""
    model = DDP(net(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT), scaler=scaler)
    letters = ""
    for number in range(16):
        with phases.step() as step:
            letters += step.phase.value[0]
            step.backward(None if step.predicted else loss_of(model, number, rank))
            scaler.step(phases.optimizer)
            scaler.update()
    return letters, model


CASES: dict[str, Callable[[int], tuple[str, nn.Module]]] = {
    "accumulation": accumulation,
    "grad scaler": grad_scaler,
    "overflow first": overflow_first,
    "clipping and scheduler": clipping_and_scheduler,
    "with hook": with_hook,
    "compiled": compiled,
    "inductor": inductor,
    "bucket views": option(gradient_as_bucket_view=True),
    "static graph": option(static_graph=True),
    "static graph and views": option(static_graph=True, gradient_as_bucket_view=True),
    "find unused": option(find_unused_parameters=True),
    "unused": unused,
    "buffers": buffers,
    "without forward": without_forward,
}


@pytest.mark.parametrize("name", CASES)
def test_phases_in_a_training_loop_that(tmp_path: Path, name: str) -> None:
    if name == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a compiler")
    results = run_ranks(consistent, 2, tmp_path, name)
    assert results[0] == results[1]
    assert results[0][0][:16] == "wwffppcpcffppcpc"


def frozen_and_subgroup(rank: int, world_size: int) -> tuple[str, str]:
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = net()
    model.hidden.requires_grad_(False)
    ddp = DDP(model, process_group=pairs[rank % 2], **OPTIONS)
    phases = PhasedTrainer(ddp, sgd(ddp), PhaseConfig(**SHORT))
    letters = train(phases, ddp, rank, range(16))
    assert "hidden.weight" not in phases.predictor.state_dict()["sums"]["ema"][0]
    return letters, digest(ddp.parameters())


def test_frozen_parameters_and_a_group_of_some_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(frozen_and_subgroup, 4, tmp_path)
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    assert ranks[0][1] != ranks[1][1]


def through_folders(rank: int, world_size: int, folder: Path, history_dtype: Any) -> list[Any]:
    """Runs that were saved by torch.distributed.checkpoint after so many steps, and again before the next one."""
    import torch.distributed.checkpoint as dcp  # a second in each child, of these tests alone

    config = PhaseConfig(**SHORT, correction=0.5, history_dtype=history_dtype)

    def start() -> tuple[DDP, PhasedTrainer]:
        model = DDP(net(), **OPTIONS)
        return model, PhasedTrainer(model, sgd(model), config)

    def outcome(letters: str, model: DDP, phases: PhasedTrainer) -> tuple[str, str, Any]:
        return letters, digest(model.parameters()), phases.stats()._replace(seconds_by_phase={})

    model, phases = start()
    letters, found = "", []
    for at in (0, 1, 5, 9):
        letters += train(phases, model, rank, range(len(letters), at))
        dcp.save({"phases": phases}, checkpoint_id=folder / f"{at}")
        saved = copy.deepcopy((model.module.state_dict(), phases.optimizer.state_dict()))
        _, between = start()
        dcp.load({"phases": between}, checkpoint_id=folder / f"{at}")
        dcp.save({"phases": between}, checkpoint_id=folder / f"{at} again")
        other, resumed = start()
        dcp.load({"phases": resumed}, checkpoint_id=folder / f"{at} again")
        other.module.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        found.append(outcome(letters + train(resumed, other, rank, range(at, 16)), other, resumed))
    letters += train(phases, model, rank, range(9, 16))
    return [outcome(letters, model, phases), *found]


@pytest.mark.parametrize("history_dtype", ["float32", "trits"])
def test_torch_distributed_checkpoint_saves_and_loads_the_trainer_itself(tmp_path: Path, history_dtype: str) -> None:
    first, second = run_ranks(through_folders, 2, tmp_path, tmp_path, history_dtype)
    whole, *resumed = first
    assert whole[0] == "wwffppcpcffppcpc"
    assert resumed == [whole] * 4
    assert second == first


def others_folders(rank: int, world_size: int, folder: Path) -> None:
    """Checkpoints of another model or predictor, and what is left of one without its history."""
    import torch.distributed.checkpoint as dcp

    def trainer(model: nn.Module, **settings: Any) -> tuple[DDP, PhasedTrainer]:
        ddp = DDP(model, **OPTIONS)
        return ddp, PhasedTrainer(ddp, sgd(ddp), PhaseConfig(**SHORT, **settings))

    def frozen() -> nn.Module:
        model = net()
        model.norm.weight.requires_grad_(False)
        return model

    wider, more = net(), net()
    wider.head = nn.Linear(96, 4)
    more.extra = nn.Linear(3, 3)
    model, phases = trainer(net())
    assert train(phases, model, rank, range(6)) == "wwffpp"
    dcp.save({"phases": phases}, checkpoint_id=folder / "saved")
    for (_, other), text in (
        (trainer(wider), "phases.predictor.sums.ema.0.head.weight"),
        (trainer(more), "phases.predictor.sums.ema.0.extra.weight"),
        (trainer(frozen()), "norm.weight is (96,) there and absent here"),
        (trainer(net(), predictor="momentum"), "phases.predictor.sums.momentum.0"),
        (trainer(net(), correction=0.5), "phases.predictor.residual"),
    ):
        with pytest.raises((ValueError, dcp.CheckpointException), match=re.escape(text)):
            dcp.load({"phases": other}, checkpoint_id=folder / "saved")

    ddp, other = trainer(frozen())
    other.load_state_dict(phases.state_dict(), strict=False)
    letters = train(other, ddp, rank, range(6, 16))
    assert letters == "ffppcpcffp", letters  # first as many gradients as a line needs
    assert other.stats().steps_by_phase["warmup"] == 2
    assert other.schedule.total_step == 16


def test_checkpoints_of_others_are_named_and_loaded_without_their_history(tmp_path: Path) -> None:
    run_ranks(others_folders, 2, tmp_path, tmp_path)


# Where ranks part


def part(rank: int, world_size: int, how: str) -> tuple[tuple[str, str], float]:
    """After some steps in common, rank 1 is somewhere else. Returns the error, and how long it took."""
    model = DDP(Normed())
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))
    train(phases, model, rank, range(4))  # the next two steps are predicted ones
    if rank == 1:
        if how == "phase":
            phases.schedule._at.run = 5
        elif how == "step":
            phases.schedule._at.total_step += 1
        elif how == "history":
            phases.predictor.num_recorded += 1
        else:
            phases.predictor._sums[0].read(["1.weight"])["1.weight"][0, 0] += 1e-6
    start = time.perf_counter()
    error = error_of(lambda: train(phases, model, rank, range(4, 16)))
    seconds = time.perf_counter() - start
    assert error_of(lambda: train(phases, model, rank, range(1)))[1] == error[1]  # and it stays
    return error, seconds


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("phase", "phase (rank 0: 'predict', rank 1: 'correct', rank 2: 'predict')"),
        ("step", "step (rank 0: 5, rank 1: 6, rank 2: 5)"),
        ("history", "gradients in the history (rank 0: 4, rank 1: 5, rank 2: 4)"),
        ("prediction", "last predicted gradient (rank 0: "),
    ],
)
def test_ranks_that_part_raise_the_same_error_on_all(tmp_path: Path, how: str, text: str) -> None:
    ranks = run_ranks(part, 3, tmp_path, how, seconds=30)
    for (kind, message), seconds in ranks:
        assert kind == "ValueError"
        assert text in message
        assert message == ranks[0][0][1]
        assert seconds < 5  # a moment, but machines may be busy


def different_settings(rank: int, world_size: int) -> tuple[str, str]:
    model = DDP(net())
    return error_of(lambda: PhasedTrainer(model, sgd(model), PhaseConfig(predict_steps=10 + rank)))


def test_settings_that_differ_are_named_before_the_first_step(tmp_path: Path) -> None:
    for kind, message in run_ranks(different_settings, 2, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert "predict_steps (rank 0: 10, rank 1: 11)" in message


def one_rank_loads(rank: int, world_size: int) -> tuple[str, str]:
    model = DDP(net())
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))
    train(phases, model, rank, range(6))
    saved = phases.state_dict()
    new = DDP(net())
    again = PhasedTrainer(new, sgd(new), PhaseConfig(**SHORT))
    if rank == 1:
        again.load_state_dict(saved)
    return error_of(lambda: train(again, new, rank, range(6, 9)))


def test_a_checkpoint_loaded_on_some_ranks_only_is_named(tmp_path: Path) -> None:
    for kind, message in run_ranks(one_rank_loads, 2, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert "step (rank 0: 0, rank 1: 6)" in message


def leave() -> None:
    """Close all connections, as a process that ends does."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def one_rank_raises(rank: int, world_size: int, folder: Path, at: int, after: bool, lingers: bool) -> tuple[str, str]:
    model = DDP(net(), **OPTIONS)
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))

    def run() -> None:
        for number in range(16):
            with phases.step() as step:
                if rank == 1 and number == at and not after:
                    raise OSError("no data")
                step.backward(loss_of(model, number, rank))
                if rank == 1 and number == at:
                    raise OSError("no disk")
                phases.optimizer.step()

    error = error_of(run)
    (folder / f"{rank} has its error").touch()
    if rank == 1:
        kind, message = error_of(lambda: train(phases, model, rank, range(1)))
        assert kind == "RuntimeError"
        assert f"step {at} failed on this rank" in message
        while lingers and len(list(folder.glob("* has its error"))) < world_size:
            time.sleep(0.01)
    leave()
    return error


@pytest.mark.parametrize(("at", "after"), [(4, False), (4, True), (5, False), (1, True), (3, True), (6, True)])
def test_a_rank_that_raises_is_an_error_on_all(tmp_path: Path, at: int, after: bool) -> None:
    first, second, third = run_ranks(one_rank_raises, 3, tmp_path, tmp_path, at, after, True, seconds=30)
    assert second[0] == "OSError"
    assert first == third == ("RuntimeError", "1 of 3 ranks failed in the step before. Why is in their own logs.")


@pytest.mark.parametrize(("at", "after"), [(1, False), (4, False), (6, False), (6, True)])
def test_a_rank_that_raises_and_ends_is_an_error_on_all(tmp_path: Path, at: int, after: bool) -> None:
    first, second, third = run_ranks(one_rank_raises, 3, tmp_path, tmp_path, at, after, False, seconds=30)
    assert second[0] == "OSError"
    assert first[0] == third[0] == "RuntimeError"


def one_rank_dies(rank: int, world_size: int, at: int) -> tuple[str, float] | None:
    model = DDP(net(), **OPTIONS)
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))

    train(phases, model, rank, range(at))
    dist.barrier()
    if rank == 1:
        leave()
        return None
    start = time.perf_counter()
    kind, _ = error_of(lambda: train(phases, model, rank, range(at, 16)))
    seconds = time.perf_counter() - start
    leave()
    return kind, seconds


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_rank_that_dies_is_an_error_within_the_groups_timeout(tmp_path: Path, at: int) -> None:
    first, gone = run_ranks(one_rank_dies, 2, tmp_path, at, seconds=20)
    assert gone is None
    assert first[0] == "RuntimeError"
    assert first[1] < 20


def misuse(rank: int, world_size: int) -> None:
    with pytest.raises(TypeError, match="needs a DistributedDataParallel model, got Net; wrap it first"):
        PhasedTrainer(net(), sgd(net()))
    model = DDP(net())

    def trainer() -> PhasedTrainer:
        return PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))

    phases = trainer()
    with pytest.raises(ValueError, match=r"without step\.backward\(loss\)"), phases.step():
        pass
    phases = trainer()
    with phases.step() as step:
        step.backward(loss_of(model, 0, rank))
        with pytest.raises(ValueError, match=r"gradients are complete; for several micro-batches.*no_sync"):
            step.backward(loss_of(model, 0, rank))
        with pytest.raises(RuntimeError, match="between steps"):
            phases.state_dict()
    saved = phases.state_dict()
    with pytest.raises(ValueError, match="in use, at step 1; load into a new one"):
        phases.load_state_dict(saved)
    with pytest.raises(ValueError, match="a warmup step needs its loss, got None"), phases.step() as step:
        step.backward()
    other = PhasedTrainer(model, sgd(model), PhaseConfig(**{**SHORT, "full_steps": 9}))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vsa_ddp.trainer").addHandler(handler)
    other.load_state_dict(saved)
    assert records == ["setting full_steps was 2 in the loaded state and is 9 now"]


def other_rules(rank: int, world_size: int) -> None:
    """States with an open section, for trainers that go back where the saved one did not, or the other way round."""

    def start(**settings: Any) -> tuple[DDP, PhasedTrainer]:
        model = DDP(Normed())
        config = PhaseConfig(warmup_steps=4, full_steps=3, correct_every=2, predictor="last", **settings)
        return model, PhasedTrainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config)

    for before, after in itertools.product((True, False), repeat=2):
        model, phases = start(roll_back=before)
        train(phases, model, rank, range(TURN - 1), turning)
        saved = phases.state_dict()
        assert (saved["section_start"] is not None) is before
        other, again = start(roll_back=after)
        other.module.load_state_dict(model.module.state_dict())
        again.optimizer.load_state_dict(phases.optimizer.state_dict())
        again.load_state_dict(saved)
        train(again, other, rank, range(TURN - 1, 40), turning)
        assert again.stats().undone == (before and after)
        assert not again._section_start.held or after


def test_a_state_goes_on_under_other_rules(tmp_path: Path) -> None:
    run_ranks(other_rules, 2, tmp_path)


def test_misuse_is_named(tmp_path: Path) -> None:
    run_ranks(misuse, 1, tmp_path)


@contextlib.contextmanager
def all_reduces() -> Iterator[list[int]]:
    """Bytes of each all-reduce that is asked for."""
    seen: list[int] = []
    original = dist.all_reduce

    def watch(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = watch
    try:
        yield seen
    finally:
        dist.all_reduce = original


def messages(rank: int, world_size: int) -> list[int]:
    model = DDP(net(), **OPTIONS)  # whose own all-reduces are in C++
    phases = PhasedTrainer(model, sgd(model), PhaseConfig(**SHORT))
    with all_reduces() as seen:
        train(phases, model, rank, range(16))
    return seen


def test_one_small_message_per_step(tmp_path: Path) -> None:
    for seen in run_ranks(messages, 2, tmp_path):
        assert len(seen) == 16 + 1  # and one before the first
        assert max(seen) < 256
