"""What people use beside a communication hook works, or says that it does not; and the hook keeps PyTorch's rules."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
    _hook_then_optimizer,
    _OptimizerHookState,
)
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward, as_functional_optim
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import vsa_ddp
from tests.models import digest, gradients, loss_of, net
from tests.ranks import run_ranks
from tests.test_ddp import on_every_wire, side_by_side
from vsa_ddp import VsaConfig, VsaState, vsa_hook

# Whatever changes gradients before or after the hook: ours are plain DDP's up to noise


class Checkpointed(nn.Module):
    """A part of it is calculated again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(64, 64)
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).view_as(x)
        y: Tensor = checkpoint(self.net, h, use_reentrant=self.use_reentrant)
        return y


class Tied(nn.Module):
    """One matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1))))[:, :3]


class Ignoring(nn.Module):
    """Parameters that DDP is told to leave alone, as with FSDP or tensor parallelism beside it."""

    def __init__(self) -> None:
        super().__init__()
        self._ddp_params_and_buffers_to_ignore = ["own.weight", "own.bias"]
        self.net, self.own = net(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.own(x.flatten(1)).detach().view_as(x))


def autocast_loss(dtype: torch.dtype) -> Callable[..., Tensor]:
    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return loss_of(model, step, rank)

    return loss


BESIDE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[..., Tensor]]] = {
    "autocast to bfloat16": (net, {}, autocast_loss(torch.bfloat16)),
    "autocast to float16": (net, {}, autocast_loss(torch.float16)),
    "checkpoints": (lambda: Checkpointed(False), {"bucket_cap_mb": 0.05}, loss_of),
    "checkpoints in a static graph": (lambda: Checkpointed(False), {"static_graph": True}, loss_of),
    "reentrant checkpoints": (lambda: Checkpointed(True), {"bucket_cap_mb": 0.05}, loss_of),
    "reentrant checkpoints in a static graph": (lambda: Checkpointed(True), {"static_graph": True}, loss_of),
    "a tied matrix": (Tied, {}, loss_of),
    "ignored parameters": (Ignoring, {}, loss_of),
    "a cap for each bucket": (net, {"bucket_cap_mb_list": [0.01, 0.05, 0.1]}, loss_of),
    "gradients copied at once": (net, {"bucket_cap_mb": 0.05, "batched_grad_copy": True}, loss_of),
}


def beside(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    for what, (make, options, loss) in BESIDE.items():
        try:
            found[what] = side_by_side(make, rank, options, loss)
        except Exception as error:
            raise AssertionError(what) from error
    return found


def test_gradients_are_plain_ddps_beside(tmp_path: Path) -> None:
    first, second = run_ranks(beside, 2, tmp_path)
    assert first == second
    assert list(first) == list(BESIDE)


def clipped(rank: int, world_size: int) -> list[tuple[float, float]]:
    model = DDP(net(), bucket_cap_mb=0.05)
    vsa_ddp.register(model)
    norms = []
    for step in range(5):
        model.zero_grad()
        loss_of(model, step, rank).backward()
        before = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append((before.item(), nn.utils.get_total_norm(gradients(model).values()).item()))
    return norms


def test_clipping_finds_the_same_norm_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(clipped, 2, tmp_path)
    assert first == second
    for before, after in first:
        assert before > 0.1
        assert after == pytest.approx(0.1, rel=1e-4)


def delayed(rank: int, world_size: int) -> bool:
    """DDP reduces one layer's gradients itself, when those of another are ready."""
    models = []
    for _ in range(2):
        module = net()
        later = [(f"head.{name}", p) for name, p in module.head.named_parameters()]
        models.append(DDP(module, delay_all_reduce_named_params=later, param_to_hook_all_reduce=module.conv.weight))
    plain, ours = models
    vsa_ddp.register(ours, bundle=1)
    for step in range(3):
        for model in models:
            model.zero_grad()
            loss_of(model, step, rank).backward()
        dist.barrier()  # DDP does not wait for those gradients
        found, expected = gradients(ours), gradients(plain)
        assert found.keys() == expected.keys()
        for name in ("head.weight", "head.bias", "norm.weight"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    return True


def test_parameters_that_ddp_reduces_later_get_its_own_mean(tmp_path: Path) -> None:
    assert run_ranks(delayed, 2, tmp_path) == [True, True]


# Optimizers


def trained(model: DDP, rank: int, step: Callable[[], Any], steps: int = 4) -> str:
    """Digest of the parameters after some steps."""
    for number in range(steps):
        model.zero_grad()
        loss_of(model, number, rank).backward()
        step()
    return digest(model.parameters())


def zero_case(rank: int, world_size: int) -> tuple[bool, list[bool], str]:
    digests, whitened = [], []
    for shards in (False, True):
        model = DDP(net(), bucket_cap_mb=0.05)
        if shards:
            optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.01)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        whitened.append(vsa_ddp.register(model, optimizer).config.whiten)
        digests.append(trained(model, rank, optimizer.step))
    model = DDP(net())
    overlapping = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.01)
    with pytest.raises(RuntimeError) as refused:
        hook_with_zero_step(vsa_hook, model, overlapping)
    with pytest.raises(ValueError, match="overlap_with_ddp=True") as error:
        vsa_ddp.register(model, overlapping)
    return digests[0] == digests[1], whitened, f"{refused.value}; {error.value}"


def test_zero_shards_the_optimizer_and_its_overlap_is_refused(tmp_path: Path) -> None:
    for same, whitened, messages in run_ranks(zero_case, 2, tmp_path):
        assert same
        assert whitened == [False, False]  # SGD's settings, also behind ZeRO
        assert "Gloo backend using Overlapping DDP with ZeRO may meet hangs" in messages


def inside_the_hook(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[str, str]:
    """PyTorch's wrapper that steps as soon as a bucket is there, against a step after backward."""
    digests = []
    for overlaps in (True, False):
        model = DDP(net(), bucket_cap_mb=0.05)
        state = VsaState(config=VsaConfig(**settings))
        state.name_parameters(model.module.named_parameters())
        if overlaps:
            optimizer = as_functional_optim(torch.optim.SGD, lr=0.01, momentum=0.9)
            model.register_comm_hook(state, _hook_then_optimizer(vsa_hook, _OptimizerHookState(optimizer)))
            digests.append(trained(model, rank, lambda: None))
        else:
            model.register_comm_hook(state, vsa_hook)
            after = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            digests.append(trained(model, rank, after.step))
    return digests[0], digests[1]


@on_every_wire
def test_an_optimizer_inside_the_hook_steps_on_the_decoded_gradients(tmp_path: Path, settings: dict[str, Any]) -> None:
    (first, expected), second = run_ranks(inside_the_hook, 2, tmp_path, settings)
    assert first == expected
    assert second == (first, first)


def hooks_of_ddp(rank: int, world_size: int) -> dict[str, str]:
    """What else registers a hook of its own, and what it says beside ours."""
    said = {}
    model = DDP(net())
    vsa_ddp.register(model)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.01})
    with pytest.raises(RuntimeError) as error:
        loss_of(model, 0, rank)
    said["_apply_optimizer_in_backward"] = str(error.value)
    model = DDP(net())
    vsa_ddp.register(model)
    with pytest.raises(RuntimeError) as error:
        model._register_fused_optim(torch.optim.SGD, 0.01)
    said["_register_fused_optim"] = str(error.value)
    model = DDP(net(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError) as error:
        vsa_ddp.register(model)
    said["mixed_precision"] = str(error.value)
    return said


def test_a_second_hook_is_refused_whoever_registers_it(tmp_path: Path) -> None:
    for said in run_ranks(hooks_of_ddp, 2, tmp_path):
        assert all("can only be called once" in text for text in said.values()), said
        assert "has a hook already: one of yours, or DDP's own for mixed_precision=" in said["mixed_precision"]


def joined(rank: int, world_size: int) -> list[str]:
    digests = []
    for divide_by_initial_world_size in (True, False):
        model = DDP(net(), bucket_cap_mb=0.05)
        vsa_ddp.register(model)
        seen = []
        with model.join(divide_by_initial_world_size=divide_by_initial_world_size):
            for step in range(2 + 2 * rank):
                model.zero_grad()
                loss_of(model, step, rank).backward()
                seen.append(digest(gradients(model).values()))
        digests.append(" ".join(seen))
    return digests


def test_join_divides_by_the_initial_world_size_whatever_it_is_told(tmp_path: Path) -> None:
    for divided, not_divided in run_ranks(joined, 2, tmp_path):
        assert divided == not_divided


def uneven_training(rank: int, world_size: int) -> tuple[str, str]:
    """Trains on when others have joined, their parameters behind; after that one of rank 1's really is another."""
    model = DDP(net(), bucket_cap_mb=0.05)
    vsa_ddp.register(model, check_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps: int) -> str:
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()
        return digest(model.parameters())

    with model.join():
        train(3 + 2 * rank)
    joined = digest(model.parameters())
    if rank == 1:
        with torch.no_grad():
            model.module.scale += 1.0
    with pytest.raises(RuntimeError) as error:
        train(2)
    return joined, str(error.value)


def test_ranks_that_have_joined_are_not_compared(tmp_path: Path) -> None:
    ranks = run_ranks(uneven_training, 3, tmp_path)
    for joined, message in ranks:
        assert joined == ranks[0][0]
        assert "parameters differ between ranks before step 7: scale. Something" in message


# What PyTorch asks of a communication hook, and its own tests' models


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.p + x


class OneTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t0 = Task()

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.t0(x + rank)


class UnusedTasks(nn.Module):
    """Each rank uses one of two; a third nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.t0, self.t1, self.unused = Task(), Task(), Task()

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.t0(x) if rank == 0 else self.t1(x)


class LineOfRank(nn.Linear):
    def forward(self, x: Tensor, rank: int) -> Tensor:
        return super().forward(x * (rank + 1))


PYTORCHS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "2 x 2": (OneTask, torch.full((2, 2), 8.0), {}),
    "a view of the bucket": (OneTask, torch.full((2, 2), 8.0), {"gradient_as_bucket_view": True}),
    "unused": (UnusedTasks, torch.full((2, 2), 8.0), {"find_unused_parameters": True}),
    "one to five": (lambda: LineOfRank(1, 5), torch.ones(3, 1), {}),
}


def pytorchs_models(rank: int, world_size: int) -> dict[str, list[tuple[str | None, ...]]]:
    """Digests of gradients, None where there is none: without a hook, by the dense wire, and by ours."""
    found: dict[str, list[tuple[str | None, ...]]] = {}
    for what, (make, x, options) in PYTORCHS.items():
        found[what] = []
        for settings in (None, {"wire": "dense"}, {}):
            torch.manual_seed(0)
            model = DDP(make(), **options)
            if settings is not None:
                vsa_ddp.register(model, **settings)
            grads: list[str | None] = []
            for _ in range(4):
                model.zero_grad()
                model(x, rank).mean().backward()
                grads += [None if p.grad is None else digest([p.grad]) for p in model.parameters()]
            found[what].append(tuple(grads))
    return found


def test_pytorchs_own_models_have_the_gradients_of_ddp(tmp_path: Path) -> None:
    for found in run_ranks(pytorchs_models, 2, tmp_path):
        for what, (plain, dense, ours) in found.items():
            assert dense == plain, what
            assert ours == plain, what  # nothing of them is large enough to be compressed
        plain = found["unused"][0]
        assert [grad is None for grad in plain] == [False, False, True] * 4


def conventions(rank: int, world_size: int) -> tuple[str, int, int]:
    model = DDP(net())
    model._check_comm_hook(vsa_hook)
    state = vsa_ddp.register(model)
    loss_of(model, 0, rank)
    before = state.compression_stats().steps
    loss_of(model, 0, rank).backward()
    return model._get_ddp_logging_data()["comm_hook"], before, state.compression_stats().steps


def test_the_hook_is_a_plain_function_of_ddps_signature(tmp_path: Path) -> None:
    assert run_ranks(conventions, 1, tmp_path) == [("vsa_hook", 0, 1)]
    assert vsa_hook.__name__ == vsa_hook.__qualname__ == "vsa_hook"
    signature = inspect.signature(vsa_hook)
    assert list(signature.parameters) == ["state", "bucket"]
    assert signature.parameters["bucket"].annotation is dist.GradBucket
    assert signature.return_annotation == torch.futures.Future[torch.Tensor]


def bfloat16_wrapper(rank: int, world_size: int) -> str:
    model = DDP(net())
    with pytest.raises(TypeError) as error:
        model.register_comm_hook(VsaState(), bf16_compress_wrapper(vsa_hook))
    return str(error.value)


@pytest.mark.skipif(torch.version.cuda is not None, reason="DDP takes it there")
def test_pytorchs_bfloat16_wrapper_is_refused_by_ddp_on_cpus(tmp_path: Path) -> None:
    assert "BF16 all reduce communication hook required CUDA" in run_ranks(bfloat16_wrapper, 1, tmp_path)[0]
