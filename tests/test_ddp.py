"""DDP as it really behaves: whatever it does to its buckets, every parameter gets its own gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import batch, digest, gradients, loss_of, net
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig, VsaState, vsa_hook

STEPS = 5
WIRES: list[dict[str, Any]] = [
    {},
    {"wire": "all_reduce"},
    {"wire": "two_shot"},
    {"wire": "all_gather", "ranks_per_node": 2},
    {"wire": "two_shot", "ranks_per_node": 2},
]
on_every_wire = pytest.mark.parametrize("settings", WIRES, ids=lambda settings: "-".join(map(str, settings.values())))


class Branches(nn.Module):
    """Of two layers one is used: the first on even steps by even ranks, and so on; a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.left = nn.Linear(3, 500)
        self.right = nn.Linear(3, 500)
        self.never = nn.Linear(64, 64)

    def forward(self, x: Tensor, use_left: bool) -> Tensor:
        branch = self.left if use_left else self.right
        return branch(self.net(x)).unflatten(1, (-1, 5)).mean(2)


class Mixed(nn.Module):
    """Layers in three dtypes: DDP makes a bucket of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(64, 60).double()
        self.narrow = nn.Linear(60, 50).bfloat16()
        self.plain = nn.Linear(50, 40)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.wide(x.flatten(1).double()))
        return self.plain(torch.tanh(self.narrow(h.bfloat16())).float())[:, :3]


def compare(plain: nn.Module, ours: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Our gradients are plain DDP's up to the noise of bundle 1: cosine sqrt(0.81) = 0.90, length within 60 %.

    More noise where a wire rounds twice (0.82), or begins with signs (0.80).
    """
    cosine, length = (0.5, 2.0) if settings and "wire" in settings else (0.7, 1.6)
    reference, mine = gradients(plain), gradients(ours)
    assert mine.keys() == reference.keys()
    for name, gradient in reference.items():
        assert mine[name].dtype == gradient.dtype
        a, b = mine[name].double().flatten(), gradient.double().flatten()
        if not b.any():
            assert not a.any(), name
        elif gradient.dim() < 2 or gradient.numel() < 1024:
            torch.testing.assert_close(a, b, rtol=1e-2 if gradient.dtype == torch.bfloat16 else 1e-6, atol=1e-7)
        else:
            # ranks' gradients that partly cancel leave a mean weaker than its noise
            assert torch.nn.functional.cosine_similarity(a, b, dim=0) > cosine, name
            assert 0.6 < a.norm() / b.norm() < length, name


def registered(ours: DDP, settings: dict[str, Any] | None = None) -> nn.Module:
    vsa_ddp.register(ours, bundle=1, **(settings or {}))
    return ours


def side_by_side(
    make: Callable[[], nn.Module],
    rank: int,
    options: dict[str, object],
    loss: Callable[..., Tensor] = loss_of,
    prepare: Callable[[DDP], nn.Module] = registered,
    settings: dict[str, Any] | None = None,
) -> str:
    """Gradients of plain DDP and of ours for the same parameters and data, compared at every step.

    `prepare` gives ours its hook and returns what is called for the forward pass; or else `settings` are those of ours.
    """
    plain, ours = (DDP(make(), **options) for _ in range(2))
    callable_ours = prepare(ours) if settings is None else registered(ours, settings)
    seen = []
    for step in range(STEPS):
        for model in (plain, callable_ours):
            model.zero_grad()
            loss(model, step, rank).backward()
        compare(plain, ours, settings)
        seen += gradients(ours).values()
    return digest(seen)


def options_case(rank: int, world_size: int, options: dict[str, object], settings: dict[str, Any]) -> str:
    return side_by_side(net, rank, options, settings=settings)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"bucket_cap_mb": 0.05},
        {"bucket_cap_mb": 100},
        {"bucket_cap_mb": 0.05, "find_unused_parameters": True},
        {"bucket_cap_mb": 0.05, "static_graph": True},
        {"bucket_cap_mb": 0.05, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.05, "gradient_as_bucket_view": True, "static_graph": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_parameter_gets_its_own_gradient(tmp_path: Path, options: dict[str, object], world_size: int) -> None:
    digests = run_ranks(options_case, world_size, tmp_path, options, {})
    assert len(set(digests)) == 1


@on_every_wire
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_every_parameter_gets_its_own_gradient_by_every_wire(
    tmp_path: Path, option: str, settings: dict[str, Any]
) -> None:
    digests = run_ranks(options_case, 2, tmp_path, {"bucket_cap_mb": 0.05, option: True}, settings)
    assert len(set(digests)) == 1


class Norms(nn.Module):
    """A bucket with nothing to compress beside one of another dtype with nothing exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.mix = nn.Linear(64, 64, bias=False).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(x.flatten(1).bfloat16()).float())[:, :3]


def norms_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    return side_by_side(Norms, rank, {}, settings=settings)


@on_every_wire
def test_a_bucket_with_nothing_to_compress(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(norms_case, 2, tmp_path, settings))) == 1


def unused_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        x, _ = batch(step, rank)
        return model(x, (step + rank) % 3 > 0).square().mean()

    return side_by_side(
        Branches, rank, {"find_unused_parameters": True, "bucket_cap_mb": 0.02}, loss, settings=settings
    )


@on_every_wire
def test_parameters_unused_on_some_ranks_or_on_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(unused_case, 2, tmp_path, settings))) == 1


def mixed_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    return side_by_side(Mixed, rank, {}, settings=settings)


@on_every_wire
def test_buckets_of_several_dtypes(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(mixed_case, 2, tmp_path, settings))) == 1


def frozen_case(rank: int, world_size: int) -> str:
    def make() -> nn.Module:
        model = net()
        model.hidden.requires_grad_(False)
        model.norm.requires_grad_(False)
        return model

    return side_by_side(make, rank, {"bucket_cap_mb": 0.05})


def test_frozen_parameters_have_no_gradient(tmp_path: Path) -> None:
    assert len(set(run_ranks(frozen_case, 2, tmp_path))) == 1


def accumulation_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        with model.no_sync():
            for micro in range(2):
                loss_of(model, 100 + 10 * step + micro, rank).backward()
        return loss_of(model, step, rank)

    return side_by_side(net, rank, {"bucket_cap_mb": 0.05}, loss, settings=settings)


@on_every_wire
def test_accumulation_under_no_sync_sends_the_sum(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(accumulation_case, 2, tmp_path, settings))) == 1


def subgroup_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return side_by_side(net, rank, {"process_group": pairs[rank % 2], "bucket_cap_mb": 0.05}, settings=settings)


@on_every_wire
def test_a_subgroup_keeps_to_itself(tmp_path: Path, settings: dict[str, Any]) -> None:
    digests = run_ranks(subgroup_case, 4, tmp_path, settings)
    assert digests[0] == digests[2] != digests[1] == digests[3]


def channels_last_case(rank: int, world_size: int) -> str:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv2d(4, 96, (1, 5)), nn.Conv2d(96, 48, 1), nn.Flatten())
        return nn.Sequential(model, nn.Linear(48 * 12, 3)).to(memory_format=torch.channels_last)

    return side_by_side(make, rank, {"bucket_cap_mb": 0.02})


def test_parameters_in_another_memory_format(tmp_path: Path) -> None:
    assert len(set(run_ranks(channels_last_case, 2, tmp_path))) == 1


def two_models_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    first, second = (DDP(net(seed), bucket_cap_mb=0.05) for seed in (0, 1))
    states = [vsa_ddp.register(model, bundle=1, **settings) for model in (first, second)]
    plain = [DDP(net(seed), bucket_cap_mb=0.05) for seed in (0, 1)]
    seen = []
    for step in range(STEPS):
        for model, reference in zip((first, second), plain, strict=True):
            model.zero_grad()
            reference.zero_grad()
            loss_of(reference, step, rank).backward()
        (loss_of(first, step, rank) + loss_of(second, step, rank)).backward()  # one backward pass through both
        compare(plain[0], first, settings)
        compare(plain[1], second, settings)
        seen += [*gradients(first).values(), *gradients(second).values()]
    assert [state.step for state in states] == [STEPS, STEPS]
    return digest(seen)


@on_every_wire
def test_two_models_with_a_hook_each(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(two_models_case, 2, tmp_path, settings))) == 1


def unnamed_case(rank: int, world_size: int) -> str:
    def bare(ours: DDP) -> nn.Module:
        ours.register_comm_hook(VsaState(config=VsaConfig(bundle=1)), vsa_hook)
        return ours

    return side_by_side(net, rank, {"bucket_cap_mb": 0.05}, prepare=bare)


def test_a_bare_state_without_names_works_the_same(tmp_path: Path) -> None:
    assert len(set(run_ranks(unnamed_case, 2, tmp_path))) == 1


def half_case(rank: int, world_size: int) -> str:
    plain, ours = (DDP(net(), bucket_cap_mb=0.05) for _ in range(2))
    ours.register_comm_hook(VsaState(config=VsaConfig(bundle=1)), fp16_compress_wrapper(vsa_hook))
    for step in range(STEPS):
        for model in (plain, ours):
            model.zero_grad()
            loss_of(model, step, rank).backward()
        for name, gradient in gradients(plain).items():
            mine = gradients(ours)[name]
            assert mine.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(mine.flatten(), gradient.flatten(), dim=0) > 0.7, name
    return digest(gradients(ours).values())


def test_pytorchs_half_precision_wrapper_goes_around_the_hook(tmp_path: Path) -> None:
    assert len(set(run_ranks(half_case, 2, tmp_path))) == 1


def uneven_case(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, bundle=1, **settings)
    with model.join():
        for step in range(3 + 2 * rank):
            model.zero_grad()
            loss_of(model, step, rank).backward()
    assert state.step == 3 + 2 * (world_size - 1)  # a rank that has joined sends zeros for as long as others train
    return digest(model.parameters())


@on_every_wire
def test_uneven_inputs_under_join(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(set(run_ranks(uneven_case, 2, tmp_path, settings))) == 1


def compiled_case(rank: int, world_size: int) -> str:
    def compiled(ours: DDP) -> nn.Module:
        return torch.compile(registered(ours), backend="eager")

    return side_by_side(net, rank, {"bucket_cap_mb": 1}, prepare=compiled)


def test_a_compiled_ddp_model(tmp_path: Path) -> None:
    assert len(set(run_ranks(compiled_case, 2, tmp_path))) == 1
