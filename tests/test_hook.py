"""The hook under DDP: the same bits on every rank, the exact paths exact, PyTorch's conventions kept."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, gradients, loss_of, net, step_digests
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig, VsaState, vsa_hook
from vsa_ddp.wires import WIRES


def fifty_steps(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    model = DDP(net(), bucket_cap_mb=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vsa_ddp.register(model, optimizer, **settings)
    digests = []
    for step in range(50):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
        digests.append(digest([*gradients(model).values(), *model.parameters()]))
    return digests


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"bundle": 1},
        {"bundle": 4},
        {"bundle": 4, "gain": "shrunk", "whiten": False},
        {},
        {"wire": "two_shot"},
        {"bundle": 4, "wire": "all_reduce"},
        {"bundle": 4, "wire": "two_shot"},
        {"bundle": 4, "wire": "all_reduce", "ranks_per_node": 2},
        {"bundle": 4, "wire": "two_shot", "ranks_per_node": 2},
    ],
)
def test_all_ranks_hold_the_same_bits_for_50_steps(tmp_path: Path, world_size: int, settings: dict[str, Any]) -> None:
    ranks = run_ranks(fifty_steps, world_size, tmp_path, settings)
    assert all(digests == ranks[0] for digests in ranks)
    assert len(set(ranks[0])) == 50


def ten_steps(
    rank: int, world_size: int, with_hook: bool, settings: dict[str, Any], view: bool = False
) -> list[dict[str, torch.Tensor]]:
    model = DDP(net(), bucket_cap_mb=0.05, gradient_as_bucket_view=view)
    if with_hook:
        vsa_ddp.register(model, **settings)
    history = []
    for step in range(10):
        model.zero_grad(set_to_none=not view)
        loss_of(model, step, rank).backward()
        history.append(gradients(model))
    return history


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_dense_wire_is_ddp_without_a_hook_bit_for_bit(tmp_path: Path, world_size: int, view: bool) -> None:
    plain = run_ranks(ten_steps, world_size, tmp_path, False, {}, view)
    dense = run_ranks(ten_steps, world_size, tmp_path, True, {"wire": "dense"}, view)
    for mine, theirs in zip(dense, plain, strict=True):
        for step in range(10):
            for name in theirs[step]:
                if view and world_size == 3:
                    # DDP divides what stays in its buckets by 3, and multiplies the others by 1/3
                    torch.testing.assert_close(mine[step][name], theirs[step][name], rtol=2e-7, atol=5e-8)
                else:
                    assert torch.equal(mine[step][name], theirs[step][name])


def test_the_first_steps_are_exact_and_so_are_small_parameters_always(tmp_path: Path) -> None:
    plain = run_ranks(ten_steps, 2, tmp_path, False, {})[0]
    ours = run_ranks(ten_steps, 2, tmp_path, True, {"exact_steps": 3})[0]
    for step in range(10):
        for name, gradient in plain[step].items():
            exact = gradient.dim() < 2 or gradient.numel() < 1024
            if step < 3:
                assert torch.equal(ours[step][name], gradient)
            elif exact:
                # two ranks' sum divided once instead of twice: one rounding
                torch.testing.assert_close(ours[step][name], gradient, rtol=2e-7, atol=1e-9)
            else:
                assert not torch.equal(ours[step][name], gradient)


def by_nodes(rank: int, world_size: int, settings: dict[str, Any], as_mesh: bool) -> list[str]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    model = DDP(net(), bucket_cap_mb=0.05)
    mesh = init_device_mesh("cpu", (2, 2)) if as_mesh else None
    vsa_ddp.register(model, mesh=mesh, **settings)
    return step_digests(model, rank, 4)


@pytest.mark.parametrize("wire", sorted(WIRES))
def test_nodes_may_be_given_by_number_by_torchrun_or_as_a_mesh(tmp_path: Path, wire: str) -> None:
    by_number = run_ranks(by_nodes, 4, tmp_path, {"wire": wire, "ranks_per_node": 2}, False)
    by_torchrun = run_ranks(by_nodes, 4, tmp_path, {"wire": wire, "ranks_per_node": "local"}, False)
    by_mesh = run_ranks(by_nodes, 4, tmp_path, {"wire": wire}, True)
    flat = run_ranks(by_nodes, 4, tmp_path, {"wire": wire}, False)
    assert by_number == by_torchrun == by_mesh
    assert all(digests == by_number[0] for digests in by_number)
    assert by_number[0][1:] != flat[0][1:]


def mean_over_steps(rank: int, world_size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same gradient sent 300 times, and its exact mean."""
    model = DDP(net())
    vsa_ddp.register(model, bundle=4)
    total: dict[str, torch.Tensor] = {}
    for step in range(301):
        model.zero_grad()
        loss_of(model, 0, rank).backward()
        if step == 0:
            exact = gradients(model)
        else:
            for name, gradient in gradients(model).items():
                total[name] = total.get(name, 0) + gradient / 300
    return {name: (total[name], exact[name]) for name in exact}


def test_the_mean_over_many_steps_is_the_exact_gradient(tmp_path: Path) -> None:
    for name, (mean, exact) in run_ranks(mean_over_steps, 2, tmp_path)[0].items():
        error = (mean - exact).square().sum() / exact.square().sum()
        # noise/signal 3.94 of the local gradients, over 300 draws; the ranks' mean is up to 2 times weaker than they
        assert error < 2 * 3.94 / 300, name
        projection = (mean * exact).sum() / exact.square().sum()
        # its standard deviation is below 1 / sqrt(300 * 1000) * the noise's root of 4; a wrong gain would be far off
        assert projection == pytest.approx(1.0, abs=0.03), name


def what_the_hook_returns(rank: int, world_size: int) -> list[bool]:
    state = VsaState(config=VsaConfig(bundle=2))
    seen = []

    def spy(state: VsaState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        def check(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            value = done.value()
            seen.append(value.data_ptr() == bucket.buffer().data_ptr() and value.dtype == bucket.buffer().dtype)
            return value

        return vsa_hook(state, bucket).then(check)

    model = DDP(net(), bucket_cap_mb=0.05)
    model.register_comm_hook(state, spy)
    for step in range(3):
        loss_of(model, step, rank).backward()
    return seen


def test_the_result_is_the_buckets_own_buffer(tmp_path: Path) -> None:
    seen = run_ranks(what_the_hook_returns, 2, tmp_path)[0]
    assert len(seen) > 4  # one bucket in the first step, several later
    assert all(seen)


def returns_at_once(rank: int, world_size: int, folder: Path, settings: dict[str, Any]) -> bool:
    """The other rank begins its second backward when this rank's hook has returned from its own: waiting would hang."""
    returned = folder / "returned"
    done_by_then = []

    def spy(state: VsaState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future = vsa_hook(state, bucket)
        if rank == 0 and state.step == 2:
            done_by_then.append(future.done())
            returned.touch()
        return future

    model = DDP(net())
    model.register_comm_hook(VsaState(config=VsaConfig(**settings)), spy)
    loss_of(model, 0, rank).backward()
    loss = loss_of(model, 1, rank)
    while rank == 1 and not returned.exists():
        time.sleep(0.01)
    loss.backward()
    return not any(done_by_then)


@pytest.mark.parametrize("settings", [*({"wire": wire} for wire in WIRES), {"ranks_per_node": 2}])
def test_the_hook_does_not_wait_for_anyone(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert run_ranks(returns_at_once, 2, tmp_path, tmp_path, settings, seconds=20) == [True, True]


def second_hook(rank: int, world_size: int) -> str:
    model = DDP(net())
    vsa_ddp.register(model)
    with pytest.raises(RuntimeError) as error:
        vsa_ddp.register(model)
    return str(error.value)


def test_a_model_takes_one_hook(tmp_path: Path) -> None:
    assert "only be called once" in run_ranks(second_hook, 1, tmp_path)[0]


def autocast_hook(state: VsaState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    with torch.autocast("cpu"):
        future = vsa_hook(state, bucket)
        future.wait()
        return future


def under_autocast(rank: int, world_size: int, wire: str, autocast: bool) -> list[str]:
    model = DDP(net(), bucket_cap_mb=0.05)
    state = VsaState(config=VsaConfig(wire=wire))  # type: ignore[arg-type]
    model.register_comm_hook(state, autocast_hook if autocast else vsa_hook)
    return step_digests(model, rank, 4)


@pytest.mark.parametrize("wire", sorted(WIRES))
def test_autocast_around_backward_changes_no_bit(tmp_path: Path, wire: str) -> None:
    plain = run_ranks(under_autocast, 2, tmp_path, wire, False)
    cast = run_ranks(under_autocast, 2, tmp_path, wire, True)
    assert plain == cast
    assert plain[0] == plain[1]


def with_default_dtype(rank: int, world_size: int, dtype: torch.dtype, wire: str) -> list[str]:
    model = DDP(net())
    vsa_ddp.register(model, wire=wire)
    loss_of(model, 0, rank).backward()
    torch.set_default_dtype(dtype)
    digests = []
    for _ in range(3):
        model.zero_grad()
        x = torch.ones(8, 4, 16, dtype=torch.float32) * (rank + 1)
        model(x).square().mean().backward()
        digests.append(digest(gradients(model).values()))
    return digests


@pytest.mark.parametrize("wire", sorted(WIRES))
def test_the_default_dtype_does_not_matter(tmp_path: Path, wire: str) -> None:
    expected = run_ranks(with_default_dtype, 2, tmp_path, torch.float32, wire)
    assert run_ranks(with_default_dtype, 2, tmp_path, torch.float64, wire) == expected
    assert run_ranks(with_default_dtype, 2, tmp_path, torch.bfloat16, wire) == expected
