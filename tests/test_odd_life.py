"""Gradients of any size, parameters of any shape, training loops of any habit."""

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, gradients, loss_of, net, step_digests
from tests.ranks import run_ranks
from tests.test_ddp import on_every_wire
from vsa_ddp import VsaConfig, VsaState, vsa_hook
from vsa_ddp.wires import WIRES, link

Shapes = Sequence[tuple[int, ...]]

SIZES = {
    torch.float32: (3e38, 1e38, 1e-38, 1e-45),
    torch.bfloat16: (3e38, 1e38, 1e-38, 1e-40),
    torch.float16: (65504.0, 6e4, 6e-5, 6e-8),
}
"""Near the largest number of a dtype, and near its smallest normal and denormal one."""


class Parameters(nn.Module):
    """Parameters whose gradients are what `forward` is given."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum().float() for p, g in zip(self.list, gradients, strict=True)]).sum()


def made(shapes: Shapes, step: int, rank: int) -> list[Tensor]:
    """Gradients of up to 1 in size that the ranks have half in common."""
    common, own = (torch.Generator().manual_seed(seed) for seed in (step, 1000 * step + rank + 1))
    return [(torch.randn(s, generator=common) + torch.randn(s, generator=own)).clamp(-1, 1) for s in shapes]


def of_size(gradients: list[Tensor], size: float | str, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Of that size, or rank 0's alone; a size that is not finite is one element's of rank 1."""
    for g in gradients:
        if size == "alone":
            g.mul_(rank == 0)
        elif math.isfinite(size):
            g.mul_(size)
        elif rank == 1:
            g.view(-1)[7] = size
    return [g.to(dtype) for g in gradients]


def is_exact(gradient: Tensor) -> bool:
    return gradient.dim() < 2 or gradient.numel() < 1024


def assert_near(found: Tensor, mean: Tensor, case: str) -> None:
    """Up to the noise of bundle 1 where it is compressed, and up to a rounding where not."""
    a, b = found.double().flatten(), mean.flatten()
    if not a.numel():
        return
    if is_exact(found):
        rounding = 1e-2 if found.dtype.itemsize == 2 else 1e-6
        assert (a - b).abs().max() <= rounding * b.abs().max(), case
    else:
        # cosine 0.80 each: a sigma that was far off in the step before, two roundings
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.5, case
        assert 0.4 < a.norm() / b.norm() < 2.5, case


def assert_bearable(found: Tensor, mean: Tensor, size: float | str, case: str) -> None:
    """What a gradient of an odd size becomes."""
    if size in ("alone", 1.0):
        assert_near(found, mean, case)
    elif not math.isfinite(size):
        assert not found.isfinite().all(), case
    elif size > 1.0:
        # the sum of a row's squares overflows from some 1e17 on, that of two ranks' 3e38 too: not finite on all ranks
        if is_exact(found) and size < 3e38:
            assert_near(found, mean, case)
    else:
        assert found.isfinite().all(), case
        assert found.abs().max() <= 20 * size, case


def odd_sizes(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    shapes, digests = [(40, 128), (64,)], []
    for dtype, whiten in itertools.product(SIZES, (True, False)):
        model = DDP(Parameters(shapes, dtype))
        state = vsa_ddp.register(model, bundle=1, whiten=whiten, **settings)
        odd = [0.0, *SIZES[dtype], "alone", 0.0, math.inf, math.nan]
        for step, size in enumerate(itertools.chain(*((size, 1.0) for size in odd))):
            everyones = [of_size(made(shapes, step, r), size, r, dtype) for r in range(world_size)]
            model.zero_grad()
            model(everyones[rank]).backward()
            found = list(gradients(model).values())
            digests.append(digest(found))
            for g, *theirs in zip(found, *everyones, strict=True):
                mean = torch.stack(theirs).double().mean(0)
                case = f"step {step}, {tuple(g.shape)} {dtype} of size {size}, whiten={whiten}"
                assert_bearable(g, mean, size, case)
        saved = state.state_dict()
        kept = [*saved["sigma"].values(), *(t for pair in saved["scales"].values() for t in pair.values())]
        assert all(t.isfinite().all() for t in kept)
        assert bool(saved["scales"]) == whiten
    return digests


@on_every_wire
def test_a_gradient_of_any_size_is_forgotten_in_the_next_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks = run_ranks(odd_sizes, 2, tmp_path, settings)
    assert all(digests == ranks[0] for digests in ranks)


def backends(rank: int, world_size: int, settings: dict[str, Any]) -> list[list[str]]:
    """Digests by backend, of buckets from one rotation block to one more than there are ranks."""
    digests: list[list[str]] = []
    shapes = [[(32 * num_blocks, 32)] for num_blocks in range(1, world_size + 2)]
    for backend in ("torch", "numba"):
        digests.append([])
        for shape in shapes:
            model = DDP(Parameters(shape))
            vsa_ddp.register(model, bundle=1, backend=backend, **settings)
            for step in range(3):
                model.zero_grad()
                model(made(shape, step, rank)).backward()
                digests[-1].append(digest(gradients(model).values()))
    return digests


@on_every_wire
def test_backends_have_the_same_bits_in_the_smallest_buckets(tmp_path: Path, settings: dict[str, Any]) -> None:
    for by_torch, by_numba in run_ranks(backends, 4, tmp_path, settings):
        assert by_torch == by_numba


def sizes_alike(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    """The same gradients in units of 1, 2**-59 and 2**49."""
    shapes, digests = [(80, 128), (64,)], []
    for unit in (1.0, 2.0**-59, 2.0**49):
        model = DDP(Parameters(shapes))
        vsa_ddp.register(model, bundle=4, **settings)
        found = []
        for step in range(6):
            model.zero_grad()
            model([g * unit for g in made(shapes, step, rank)]).backward()
            found += [g / unit for g in gradients(model).values()]
        digests.append(digest(found))
    return digests


@on_every_wire
def test_from_1e_18_to_1e_15_the_unit_of_gradients_changes_no_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    for digests in run_ranks(sizes_alike, 2, tmp_path, settings):
        assert digests == digests[:1] * 3


ODD_SHAPES: Shapes = [(), (1,), (1, 1), (0,), (0, 5), (7, 0, 3), (1, 1024), (2048, 1), (1024, 1, 1), (1023,), (33, 32)]


def odd_shapes(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    digests = []
    # all in one bucket, and each as a model of one parameter
    for shapes in ([*ODD_SHAPES], *([shape] for shape in ODD_SHAPES)):
        model = DDP(Parameters(shapes))
        state = vsa_ddp.register(model, bundle=1, **settings)
        for step in range(4):
            model.zero_grad()
            model(made(shapes, step, rank)).backward()
            found = list(gradients(model).values())
            digests.append(digest(found))
            everyones = [made(shapes, step, r) for r in range(world_size)]
            for g, *theirs in zip(found, *everyones, strict=True):
                assert_near(g, torch.stack(theirs).double().mean(0), f"step {step}, {tuple(g.shape)} of {shapes}")
        assert state.compression_stats().steps == 4
    return digests


@on_every_wire
def test_parameters_of_any_shape_also_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks = run_ranks(odd_shapes, 2, tmp_path, settings)
    assert all(digests == ranks[0] for digests in ranks)


class NothingInHalf(nn.Module):
    """DDP makes a bucket for each dtype: here one of a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.nothing.float().sum()


def a_bucket_of_nothing(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    model = DDP(NothingInHalf(), bucket_cap_mb=0.05)
    vsa_ddp.register(model, **settings)
    return step_digests(model, rank, 4)


def without_it(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    model = DDP(net(), bucket_cap_mb=0.05)
    state = VsaState(config=VsaConfig(**settings))
    # keys follow from names
    state.name_parameters((f"net.{name}", p) for name, p in model.module.named_parameters())
    model.register_comm_hook(state, vsa_hook)
    return step_digests(model, rank, 4)


@pytest.mark.parametrize("wire", sorted(WIRES))
def test_a_bucket_without_elements_changes_no_bit(tmp_path: Path, wire: str) -> None:
    # a gradient without elements adds nothing to a digest
    with_it = run_ranks(a_bucket_of_nothing, 2, tmp_path, {"wire": wire})
    assert with_it == run_ranks(without_it, 2, tmp_path, {"wire": wire})


HABITS = ["none", "forward passes without backward", "forward passes without grad", "zeros instead of none"]


def habits(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, tuple[list[str], int, bool]]:
    """Digests of eight steps, how many the hook counted, and whether it left torch's random numbers alone."""
    found = {}
    for habit in HABITS:
        model = DDP(net(), bucket_cap_mb=0.05, **options)
        state = vsa_ddp.register(model)
        torch.manual_seed(5)
        digests = []
        for step in range(8):
            if habit == "forward passes without backward":
                for _ in range(step % 3):
                    loss_of(model, 100 + step, rank)
            if habit == "forward passes without grad":
                with torch.no_grad():
                    loss_of(model, 100 + step, rank)
            model.zero_grad(set_to_none=habit != "zeros instead of none")
            loss_of(model, step, rank).backward()
            digests.append(digest(gradients(model).values()))
        untouched = torch.randn(4, generator=torch.Generator().manual_seed(5))
        found[habit] = digests, state.compression_stats().steps, torch.equal(torch.randn(4), untouched)
    return found


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_a_habit_changes_no_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = run_ranks(habits, 2, tmp_path, options)
    assert first == second
    digests, *rest = first["none"]
    assert rest == [8, True]
    assert len(set(digests)) == 8
    for habit in HABITS:
        assert first[habit] == (digests, 8, True), habit


class HalfUsed(nn.Module):
    """DDP puts what is registered first into its last buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(200, 200)
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def buckets_left_out(rank: int, world_size: int, leaves_out: bool) -> tuple[list[str], int]:
    options = {"find_unused_parameters": True, "skip_all_reduce_unused_params": leaves_out}
    model = DDP(HalfUsed(), bucket_cap_mb=0.02, **options)
    state = vsa_ddp.register(model)
    return step_digests(model, rank, 6), state.compression_stats().steps


def test_steps_are_counted_where_ddp_leaves_out_the_last_buckets(tmp_path: Path) -> None:
    all_sent, left_out = (run_ranks(buckets_left_out, 2, tmp_path, leaves_out) for leaves_out in (False, True))
    assert all_sent == left_out
    assert left_out[0][1] == 6


def two_passes(rank: int, world_size: int) -> tuple[bool, int]:
    """Two backward passes through one graph: DDP sends the first alone, with a hook or without."""
    plain, ours = (DDP(net(), bucket_cap_mb=0.05) for _ in range(2))
    state = vsa_ddp.register(ours, wire="dense")
    for step in range(3):
        for model in (plain, ours):
            model.zero_grad()
            loss = loss_of(model, step, rank)
            loss.backward(retain_graph=True)
            loss.backward()
    same = digest(gradients(plain).values()) == digest(gradients(ours).values())
    return same, state.compression_stats().steps


def test_two_backward_passes_of_one_graph_are_as_without_a_hook(tmp_path: Path) -> None:
    assert run_ranks(two_passes, 2, tmp_path) == [(True, 3)] * 2


def senders(rank: int, world_size: int, settings: dict[str, Any]) -> set[str]:
    """The threads that issue collectives."""
    names = set()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **keywords: Any) -> Any:
            names.add(threading.current_thread().name)
            return call(*args, **keywords)

        return watch

    for name in ("all_reduce", "all_gather", "all_to_all_single"):
        setattr(dist, name, watched(getattr(dist, name)))
    link._all_gather = watched(link._all_gather)
    model = DDP(net(), bucket_cap_mb=0.05, find_unused_parameters=True)
    vsa_ddp.register(model, **settings)
    for step in range(10):
        loss_of(model, step, rank).backward()
    return names


@on_every_wire
def test_no_collective_is_issued_from_a_callback(tmp_path: Path, settings: dict[str, Any]) -> None:
    # gloo's own threads have no such names
    later = {"vsa_ddp later rounds"} if settings.get("wire") == "two_shot" or "ranks_per_node" in settings else set()
    assert run_ranks(senders, 2, tmp_path, settings) == [{"MainThread"} | later] * 2


def fewer_ranks(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    """The first three steps with all ranks, three more without the last."""
    shapes = [(40, 128), (64,)]
    model = DDP(Parameters(shapes))
    state = vsa_ddp.register(model, bundle=1, **settings)
    digests = []
    for step in range(6):
        num_ranks = world_size - (step > 2)
        if step == 3:
            smaller = dist.new_group(list(range(num_ranks)))
            if rank == num_ranks:
                break
            model._update_process_group(smaller)
            state.process_group = smaller
        model.zero_grad()
        model(made(shapes, step, rank)).backward()
        found = list(gradients(model).values())
        digests.append(digest(found))
        for g, *theirs in zip(found, *(made(shapes, step, r) for r in range(num_ranks)), strict=True):
            assert_near(g, torch.stack(theirs).double().mean(0), f"step {step}")
    return digests


@pytest.mark.parametrize("wire", sorted(WIRES))
def test_a_group_may_lose_a_rank(tmp_path: Path, wire: str) -> None:
    first, second, lost = run_ranks(fewer_ranks, 3, tmp_path, {"wire": wire})
    assert first == second
    assert first[:3] == lost
