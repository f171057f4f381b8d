"""Local steps: what the ranks changed is averaged by the hook's own data flow, the same bits on all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import vsa_ddp
from benchmarks.lockstep import LockstepAverager, LockstepHook, shapes_of
from tests.models import digest, loss_of, net
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig, VsaModelAverager, changes, peers

PERIOD = 3


def make(
    model: torch.nn.Module, family: str = "AdamW", period: int = PERIOD, **settings: Any
) -> tuple[torch.optim.Optimizer, VsaModelAverager]:
    optimizer = getattr(torch.optim, family)(model.parameters(), 1e-2)
    return optimizer, VsaModelAverager(model, optimizer, period=period, **settings)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: VsaModelAverager, rank: int, steps: range
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
        average.average_parameters()


def in_small_buckets(
    rank: int, world_size: int, bucket_bytes: int, family: str, period: int
) -> tuple[torch.Tensor, Any]:
    changes._BUCKET_BYTES = bucket_bytes
    model = net()
    optimizer, average = make(model, family, period)
    train(model, optimizer, average, rank, range(4 * period))
    return parameters_to_vector(model.parameters()).detach(), average.compression_stats()


@pytest.mark.parametrize(
    ("bucket_bytes", "family", "period"),
    [(changes._BUCKET_BYTES, "AdamW", PERIOD), (1, "SGD", PERIOD), (1, "SGD", 1), (1, "AdamW", 1)],
)
def test_the_averages_have_the_bits_of_ranks_that_take_turns(
    tmp_path: Path, bucket_bytes: int, family: str, period: int
) -> None:
    (mine_N, stats), (theirs_N, _) = run_ranks(in_small_buckets, 2, tmp_path, bucket_bytes, family, period)
    assert torch.equal(mine_N, theirs_N)

    models = [net(), net()]
    optimizers = [getattr(torch.optim, family)(m.parameters(), 1e-2) for m in models]
    shapes = shapes_of(models[0])
    config = VsaConfig(sparsity=64, exact_steps=0, whiten=family == "AdamW")
    hook = LockstepAverager(LockstepHook(shapes, config), shapes, 2, rescale=family == "AdamW")
    common_N = parameters_to_vector(models[0].parameters()).detach()
    for step in range(4 * period):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()
        if (step + 1) % period == 0:
            apart = [common_N - parameters_to_vector(m.parameters()).detach() for m in models]
            common_N = common_N - hook.average(torch.stack(apart), period)
            for model in models:
                vector_to_parameters(common_N.clone(), model.parameters())
    assert torch.equal(mine_N, common_N)
    assert stats.dense_bytes == 4 * period * mine_N.nbytes
    assert stats.steps == 4
    if bucket_bytes > 1:  # each packet has its padding and its seal
        assert stats.wire_bytes == hook.sent_bytes


def by_the_dense_wire(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parameters after a warm-up by DDP; each rank's before an average; after it."""
    model = DDP(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    local = PostLocalSGDState(None, None, start_localSGD_iter=2, post_local_gradient_allreduce=False)
    model.register_comm_hook(local, post_localSGD_hook)
    average = VsaModelAverager(model, optimizer, period=PERIOD, warmup_steps=2, wire="dense")
    assert "whiten=False, gain='unbiased'" in repr(average)
    train(model, optimizer, average, rank, range(2))
    warm_N = parameters_to_vector(model.parameters()).detach().clone()
    train(model, optimizer, average, rank, range(2, 2 + PERIOD - 1))
    before_N = parameters_to_vector(model.parameters()).detach().clone()
    average.synchronize()
    after_N = parameters_to_vector(model.parameters()).detach().clone()
    average.synchronize()  # nothing happened since
    assert torch.equal(after_N, parameters_to_vector(model.parameters()))
    stats = average.compression_stats()
    assert stats.steps == 1
    assert stats.dense_bytes == (PERIOD - 1) * after_N.nbytes
    return warm_N, before_N, after_N


def test_without_compression_it_is_the_mean_of_the_models_after_ddps_warm_up(tmp_path: Path) -> None:
    warm, before, after = zip(*run_ranks(by_the_dense_wire, 3, tmp_path), strict=True)
    assert torch.equal(warm[0], warm[1])
    assert not torch.equal(before[0], before[1])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])
    torch.testing.assert_close(after[0], torch.stack(before).mean(0))


def resumed(rank: int, world_size: int, folder: Path, wire: str) -> tuple[str, str]:
    file = folder / f"{rank}.pt"
    model = net()
    optimizer, average = make(model, compression=20, wire=wire, rescale=True)
    train(model, optimizer, average, rank, range(2 * PERIOD + 1))
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
    torch.save(parts, file)
    average.synchronize()
    train(model, optimizer, average, rank, range(2 * PERIOD + 1, 4 * PERIOD))

    again = net()
    optimizer, average = make(again, compression=20, wire=wire, rescale=True)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    average.load_state_dict(saved["average"])
    average.synchronize()
    train(again, optimizer, average, rank, range(2 * PERIOD + 1, 4 * PERIOD))
    with pytest.raises(ValueError, match="it has no alignment, common, last_apart, state, steps_apart, steps_together"):
        average.load_state_dict({"step": 3})
    return digest(model.parameters()), digest(again.parameters())


@pytest.mark.parametrize("wire", ["all_gather", "all_reduce", "two_shot"])
def test_a_run_that_goes_on_between_two_averages_has_the_bits_of_one_without_a_break(tmp_path: Path, wire: str) -> None:
    digests = {each for pair in run_ranks(resumed, 2, tmp_path, tmp_path, wire) for each in pair}
    assert len(digests) == 1


def one_step_after_long_periods(rank: int, world_size: int, wire: str) -> tuple[float, float]:
    """Cosine and quotient of lengths of what an average of one step changed, and of that step."""
    torch.manual_seed(0)
    model, change = torch.nn.Linear(64, 64, bias=False), torch.randn(64, 64)
    average = VsaModelAverager(model, None, period=20, wire=wire, compression=20)
    for _ in range(41):
        with torch.no_grad():
            before = model.weight.clone()
            model.weight -= change
        average.average_parameters()
    average.synchronize()
    found = before - model.weight.detach()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), change.flatten(), dim=0)
    return cosine.item(), (found.norm() / change.norm()).item()


@pytest.mark.parametrize("wire", ["all_gather", "all_reduce"])
def test_an_average_off_the_period_keeps_the_step(tmp_path: Path, wire: str) -> None:
    for cosine, length in run_ranks(one_step_after_long_periods, 2, tmp_path, wire):
        assert cosine > 0.7
        assert 0.8 < length < 1.5


def by_torchs_optimizer(rank: int, world_size: int) -> list[str]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).bfloat16())
    model[0].weight.requires_grad_(False)
    own = torch.optim.SGD(model.parameters(), 0.1)
    average = VsaModelAverager(model, own, period=2)
    optimizer = PostLocalSGDOptimizer(own, average)
    found = []
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model[1](model[0](torch.randn(8, 64, generator=generator)).bfloat16()).float().square().mean().backward()
        optimizer.step()
        found.append(digest(model.parameters()))
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is none of the model's"):
        average.average_parameters([torch.nn.Parameter(torch.zeros(3))])
    return found


def test_torchs_optimizer_for_local_steps_takes_it_with_several_dtypes(tmp_path: Path) -> None:
    mine, theirs = run_ranks(by_torchs_optimizer, 2, tmp_path)
    assert [a == b for a, b in zip(mine, theirs, strict=True)] == [False, True] * 3
    assert len(set(mine)) == 6


def chosen(rank: int, world_size: int) -> list[str]:
    makes: list[tuple[type[torch.optim.Optimizer] | None, dict[str, Any]]] = [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"rescale": False}),
        (torch.optim.AdamW, {"gain": "shrunk"}),
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {"whiten": False}),
        (torch.optim.SGD, {"rescale": True}),
        (torch.optim.LBFGS, {}),
        (None, {}),
    ]
    return [
        repr(VsaModelAverager(model := net(), kind and kind(model.parameters()), **settings))
        for kind, settings in makes
    ]


def test_the_optimizer_decides_whether_its_changes_are_lengthened(tmp_path: Path) -> None:
    expected = [True, False, False, False, False, True, False, False]
    for made in run_ranks(chosen, 2, tmp_path):
        assert [f"rescale={rescale}" in each for each, rescale in zip(made, expected, strict=True)] == [True] * 8


def after_steps_in_common(rank: int, world_size: int, way: str) -> list[float]:
    """How far each average goes, over how far one Adam of all gradients goes, where ranks have noise alone."""
    holder = torch.nn.ParameterList([torch.zeros(4096)])
    (p,) = holder
    alone = torch.nn.Parameter(torch.zeros(4096))
    optimizer, of_all = torch.optim.Adam([p], 1e-3), torch.optim.Adam([alone], 1e-3)
    steps_together = 0 if way == "apart" else 100
    if way != "loaded":
        warmup_steps = steps_together
        average = VsaModelAverager(holder, optimizer, warmup_steps=warmup_steps, wire="dense")
    found = []
    for step in range(steps_together + 40):
        if way == "loaded" and step == steps_together:
            average = VsaModelAverager(holder, optimizer, wire="dense")
        gradients_WN = torch.randn(world_size, 4096, generator=torch.Generator().manual_seed(step))
        alone.grad = gradients_WN.mean(0)
        p.grad = alone.grad.clone() if step < steps_together else gradients_WN[rank]
        before = [t.detach().clone() for t in (p, alone)]
        optimizer.step()
        of_all.step()
        if way != "loaded" or step >= steps_together:
            average.average_parameters()
        mine, theirs = (a - b.detach() for a, b in zip(before, (p, alone), strict=True))
        found.append((mine.norm() / theirs.norm()).item())
    return found[steps_together:]


@pytest.mark.parametrize("way", ["apart", "warm-up", "loaded"])
def test_averages_go_as_far_as_one_adam_also_from_second_moments_in_common(tmp_path: Path, way: str) -> None:
    for found in run_ranks(after_steps_in_common, 2, tmp_path, way):
        assert max(found) < 1.2
        assert sum(found[-10:]) / 10 == pytest.approx(1, abs=0.1)  # 0.71 if nothing was lengthened


def chosen_wire(rank: int, world_size: int, many: int, settings: dict[str, Any]) -> tuple[str, str]:
    peers.MANY_PEERS = many
    model = net()
    optimizer, average = make(model, period=1, **settings)
    train(model, optimizer, average, rank, range(2))
    return repr(average._state.courier.wire), digest(model.parameters())


@pytest.mark.parametrize(
    ("many", "settings", "wire"),
    [(2, {}, "AllGather"), (1, {"wire": "all_gather"}, "AllGather"), (1, {"ranks_per_node": 2}, "AllGather")],
)
def test_few_peers_gather_unless_told_otherwise(tmp_path: Path, many: int, settings: dict[str, Any], wire: str) -> None:
    for found, _ in run_ranks(chosen_wire, 2, tmp_path, many, settings):
        assert wire in found


@pytest.mark.parametrize("asked", [{}, {"compression": 80}, {"sparsity": 8}])
def test_many_peers_take_the_wire_whose_bytes_do_not_grow(tmp_path: Path, asked: dict[str, Any]) -> None:
    chosen = run_ranks(chosen_wire, 2, tmp_path, 1, asked)
    assert "TwoShot" in chosen[0][0]
    assert chosen == run_ranks(chosen_wire, 2, tmp_path, 2, {**asked, "wire": "two_shot"})


def out_of_step(rank: int, world_size: int) -> list[str]:
    model = net()
    optimizer, average = make(model)
    train(model, optimizer, average, rank, range(PERIOD - 1))
    messages = []
    with pytest.raises(ValueError, match="step") as raised:
        (average.synchronize if rank else average.average_parameters)()
    messages.append(str(raised.value))
    if rank:
        model.scale = torch.nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match="was unfrozen or replaced") as raised:
        average.synchronize()
    return [*messages, str(raised.value)]


def test_ranks_out_of_step_and_parameters_that_came_later_are_refused_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(out_of_step, 2, tmp_path)
    for messages, which in zip(found, ("a parameter of another rank", "scale"), strict=True):
        assert "in the same step, but they differ in step (rank 0: 3, rank 1: 2). Call average_param" in messages[0]
        assert messages[1].startswith(f"{which} was unfrozen or replaced")


def step_set_from_outside(rank: int, world_size: int) -> str:
    model = net()
    optimizer, average = make(model)
    wrapped = PostLocalSGDOptimizer(optimizer, average)
    saved, own = wrapped.state_dict(), average.state_dict()
    wrapped.load_state_dict({**saved, "step": 5})
    with pytest.raises(ValueError, match="load its own state too") as raised:
        wrapped.step()
    average.load_state_dict({**own, "step": 5})
    wrapped.step()
    assert average.step == 6
    return str(raised.value)


def test_a_step_that_was_loaded_without_the_rest_is_refused(tmp_path: Path) -> None:
    (message,) = run_ranks(step_set_from_outside, 1, tmp_path)
    assert message.startswith("step was set to 5, ")


def fails_once(rank: int, world_size: int) -> str:
    model = net()
    optimizer, average = make(model)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    average._buckets[-1].finish = no_memory  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, average, rank, range(PERIOD))
    with pytest.raises(RuntimeError, match="go on from a checkpoint") as raised:
        train(model, optimizer, average, rank, range(PERIOD))
    with pytest.raises(RuntimeError, match="go on from a checkpoint"):
        average.state_dict()
    return str(raised.value)


def test_after_an_average_that_failed_there_is_no_other(tmp_path: Path) -> None:
    for message in run_ranks(fails_once, 2, tmp_path):
        assert "an average failed on this rank: OutOfMemoryError('no memory')" in message


def odd_parameters(rank: int, world_size: int, period: int) -> list[dict[str, torch.Tensor]]:
    """By name, at the last of two averages in full precision: where all ranks were, what this one changed, lengthened,
    and where it is."""
    torch.manual_seed(0)
    model = torch.nn.ParameterDict(
        {
            "channels last": torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
            "transposed": torch.randn(8, 4).T,
            "bfloat": torch.randn(64, 8).bfloat16(),
            "empty": torch.zeros(0, 3),
            "unused": torch.ones(5),
        }
    )
    optimizer, average = make(model, "AdamW", period, wire="dense")
    for step in range(2 * period):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for name, p in model.items():
            if name != "unused":
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        before = {name: p.detach().clone() for name, p in model.items()}
        common = {name: p.detach().clone() for name, p in average._common.items()}
        factors = {
            name: factor
            for bucket in average._buckets
            if bucket._alignment
            for name, factor in zip(bucket._common, bucket._alignment.factors(period, 1.0), strict=True)
        }
        average.average_parameters()
    sent = {name: (common[name] - before[name]) * factors[name].to(common[name].dtype) for name in common}
    return [common, sent, {name: p.detach() for name, p in model.items()}]


@pytest.mark.parametrize("period", [1, PERIOD])
def test_parameters_of_any_layout_and_dtype_are_lengthened_and_averaged(tmp_path: Path, period: int) -> None:
    (common, mine, found), (_, theirs, others) = run_ranks(odd_parameters, 2, tmp_path, period)
    for name in common:
        assert torch.equal(found[name], others[name]), name
        expected = common[name] - (mine[name] + theirs[name]) / 2
        tolerance = 2e-2 if name == "bfloat" else 1e-6
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found["unused"], torch.ones(5))
    assert not torch.equal(found["transposed"], common["transposed"])


def refused(rank: int, world_size: int) -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns in every process that imports it

    model, messages = net(), []
    for make_it in (
        lambda: VsaModelAverager(net(seed=rank), None),
        lambda: VsaModelAverager(net(), None, period=10 + rank),
        lambda: VsaModelAverager(net(), None, compression=20 + rank),
        lambda: VsaModelAverager(net(), None, period=0),
        lambda: VsaModelAverager(net(), None, warmup_steps=-1),
        lambda: VsaModelAverager(net(), None, rescale=rank == 0),
        lambda: VsaModelAverager(net(), None, rescale="auto"),
        lambda: VsaModelAverager(net(), None, rescale=True, gain="shrunk"),
        lambda: VsaModelAverager(net(), None, bundles=2),
        lambda: VsaModelAverager(net().requires_grad_(False), None),
        lambda: VsaModelAverager(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)),
        lambda: VsaModelAverager(net(), torch.optim.AdamW(model.parameters())),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  # the messages are compared below
            make_it()
        messages.append(str(raised.value))
    dist.barrier()
    return messages


def test_what_cannot_be_is_refused_on_every_rank(tmp_path: Path) -> None:
    for messages in run_ranks(refused, 2, tmp_path):
        for message, part in zip(
            messages,
            (
                "parameters at the start: conv.weight (rank 0: ",
                "period (rank 0: 10, rank 1: 11)",
                "compression (rank 0: 20, rank 1: 21)",
                "period must be an int of at least 1, got 0",
                "warmup_steps must be an int of at least 0, got -1",
                "rescale (rank 0: True, rank 1: False)",
                "rescale must be True, False or None, got 'auto'",
                'rescale=True needs gain="unbiased", got "shrunk"',
                "unknown setting bundles",
                "no parameter that requires a gradient",
                "give every rank an optimizer of its own",
                "the optimizer has none of the model's parameters",
            ),
            strict=True,
        ):
            assert part in message


def learns(rank: int, world_size: int) -> tuple[float, float, vsa_ddp.CompressionStats]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    average = VsaModelAverager(model, optimizer, period=10)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    y = x[:, :10].argmax(1)
    share = slice(rank * 256, rank * 256 + 256)  # each rank sees its own half alone
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[share]), y[share]).backward()
        optimizer.step()
        average.average_parameters()
    losses = [torch.nn.functional.cross_entropy(model(x[i : i + 256]), y[i : i + 256]).item() for i in (0, 256)]
    return losses[rank], losses[1 - rank], average.compression_stats()


def test_ranks_learn_from_what_only_others_see(tmp_path: Path) -> None:
    for own, other, stats in run_ranks(learns, 2, tmp_path):
        assert own == pytest.approx(other, rel=0.3)
        assert max(own, other) < 0.3
        assert stats.compression > 100  # an exact round of the ten would make it less
