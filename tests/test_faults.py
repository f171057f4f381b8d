"""What must not work fails on every rank with a clear error; what overflows leaves no trace."""

import importlib.util
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, gradients, loss_of, net, step_digests
from tests.ranks import run_ranks
from tests.test_ddp import on_every_wire
from vsa_ddp import VsaConfig, VsaState, vsa_hook
from vsa_ddp.codec import Codec
from vsa_ddp.kernels import TorchKernels
from vsa_ddp.wires import WIRES


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(Exception) as error:  # noqa: PT011  (the caller looks at type and text)
        call()
    return error.type.__name__, str(error.value)


def overflow_run(rank: int, world_size: int, bad_step: int, bad_value: float | None) -> dict[str, Any]:
    """Twelve steps without an optimizer; at `bad_step` one gradient of rank 1 becomes `bad_value`."""
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model)
    digests, finite = [], []
    for step in range(12):
        model.zero_grad()
        loss = loss_of(model, step, rank)
        if bad_value is not None and step == bad_step and rank == 1:
            parameter = model.module.mix.weight
            handle = parameter.register_hook(lambda g: torch.full_like(g, bad_value))
            loss.backward()
            handle.remove()
        else:
            loss.backward()
        finite.append(bool(gradients(model)["mix.weight"].isfinite().all()))
        digests.append(digest(gradients(model).values()))
    scales = state.state_dict()["scales"]
    return {
        "digests": digests,
        "finite": finite,
        "scales": digest(t for pair in scales.values() for t in pair.values()),
        "mix": digest(scales["mix.weight"].values()),
        "finite_scales": all(bool(t.isfinite().all()) for pair in scales.values() for t in pair.values()),
    }


@pytest.mark.parametrize("bad_value", [float("inf"), float("nan")])
def test_an_overflow_on_one_rank_shows_on_all_and_leaves_no_trace(tmp_path: Path, bad_value: float) -> None:
    clean = run_ranks(overflow_run, 2, tmp_path, 5, None)[0]
    for rank in run_ranks(overflow_run, 2, tmp_path, 5, bad_value):
        assert rank["finite"] == [step != 5 for step in range(12)]
        assert rank["digests"][6:] == clean["digests"][6:]
        assert rank["scales"] == clean["scales"]


@pytest.mark.parametrize("bad_step", [0, 8])
def test_an_overflow_while_scales_are_measured_does_not_enter_them(tmp_path: Path, bad_step: int) -> None:
    ranks = run_ranks(overflow_run, 2, tmp_path, bad_step, float("inf"))
    for rank in ranks:
        assert rank["finite"] == [step != bad_step for step in range(12)]
        assert rank["digests"] == ranks[0]["digests"]
        assert rank["finite_scales"]


def grad_scaler_run(rank: int, world_size: int) -> tuple[list[float], list[bool], bool]:
    model = DDP(net(), bucket_cap_mb=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vsa_ddp.register(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales, stepped = [], []
    for step in range(12):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(model, step, rank))
        if step in (0, 4) and rank == 1:
            loss = loss * 1e38 * 1e38
        loss.backward()
        before = digest(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        stepped.append(digest(model.parameters()) != before)
        scales.append(scaler.get_scale())
    return scales, stepped, all(bool(p.isfinite().all()) for p in model.parameters())


def test_gradscaler_skips_the_step_together_and_recovers(tmp_path: Path) -> None:
    ranks = run_ranks(grad_scaler_run, 2, tmp_path)
    scales, stepped, finite = ranks[0]
    assert ranks[1] == ranks[0]
    assert stepped == [step not in (0, 4) for step in range(12)]
    assert scales[0] == 512.0
    assert scales[3] == 1024.0  # three good steps: grown again
    assert scales[-1] > scales[4]
    assert finite


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 32, sparse=True)

    def forward(self) -> torch.Tensor:
        return self.table(torch.arange(5)).square().mean()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 50, dtype=torch.complex64))

    def forward(self) -> torch.Tensor:
        return self.weight.abs().square().mean()


def unsupported(rank: int, world_size: int, make: Callable[[], nn.Module]) -> tuple[str, str]:
    model = DDP(make())
    vsa_ddp.register(model)
    return error_of(lambda: model().backward())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Sparse, r"gradients of table\.weight are sparse, which vsa_hook cannot bundle; use sparse=False"),
        (Complex, r"parameter weight is torch\.complex64, but vsa_hook compresses real numbers"),
    ],
)
def test_sparse_and_complex_gradients_are_refused(tmp_path: Path, make: type[nn.Module], text: str) -> None:
    ranks = run_ranks(unsupported, 2, tmp_path, make)
    assert all(kind == "TypeError" for kind, _ in ranks)
    for _, message in ranks:
        assert re.search(text, message), message


def shared_state(rank: int, world_size: int, named: bool) -> tuple[str, str]:
    first, second = DDP(net(0)), DDP(net(1))
    if named:
        state = vsa_ddp.register(first)
    else:
        state = VsaState()
        first.register_comm_hook(state, vsa_hook)
    second.register_comm_hook(state, vsa_hook)
    loss_of(first, 0, rank).backward()
    return error_of(lambda: loss_of(second, 0, rank).backward())


@pytest.mark.parametrize("named", [True, False])
def test_a_state_serves_one_model(tmp_path: Path, named: bool) -> None:
    for kind, message in run_ranks(shared_state, 2, tmp_path, named):
        assert kind == "ValueError"
        assert "make one VsaState for each DDP model" in message


def different_settings(rank: int, world_size: int) -> tuple[str, str]:
    model = DDP(net())
    vsa_ddp.register(model, bundle=4 + rank, seed=7 if rank == 2 else 0)
    return error_of(lambda: loss_of(model, 0, rank).backward())


def test_settings_that_differ_are_named_on_every_rank(tmp_path: Path) -> None:
    for kind, message in run_ranks(different_settings, 3, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert "bundle (rank 0: 4, rank 1: 5, rank 2: 6)" in message
        assert "seed (rank 0: 0, rank 1: 0, rank 2: 7)" in message
        assert "rotation_block" not in message


def one_rank_loads(rank: int, world_size: int) -> tuple[str, str]:
    model = DDP(net())
    state = vsa_ddp.register(model)
    for step in range(3):
        loss_of(model, step, rank).backward()
    saved = state.state_dict()
    resumed = DDP(net())
    new = vsa_ddp.register(resumed)
    if rank == 1:
        new.load_state_dict(saved)
    return error_of(lambda: loss_of(resumed, 3, rank).backward())


def test_a_checkpoint_loaded_on_some_ranks_only_is_named(tmp_path: Path) -> None:
    for kind, message in run_ranks(one_rank_loads, 2, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert "step (rank 0: 0, rank 1: 3)" in message


def different_models(rank: int, world_size: int, kind: str) -> tuple[str, str]:
    model = net()
    if rank == 1 and kind == "name":
        layer = model.mix
        del model.mix
        model.mixing, model.mix = layer, layer.forward
    elif rank == 1:
        model.mix.bfloat16()
    ddp = DDP(model, init_sync=False)
    state = VsaState()
    state.name_parameters(ddp.module.named_parameters())
    ddp.register_comm_hook(state, vsa_hook)
    return error_of(lambda: ddp(torch.ones(2, 4, 16)).sum().backward()) if kind == "name" else begin(ddp, state)


def begin(ddp: DDP, state: VsaState) -> tuple[str, str]:
    """The hook on a bucket of the parameters as they are: backward would stop at mixed dtypes before it."""
    buffer = torch.zeros(sum(p.numel() for p in ddp.module.parameters()))
    return error_of(lambda: state._meet(dist.group.WORLD, buffer))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("name", r"parameter mix\.weight \(rank 0: 'number \d+, \(96, 96\) torch\.float32', rank 1: 'absent'\)"),
        ("dtype", r"parameter mix\.weight \(rank 0: '.*\) torch\.float32', rank 1: '.*\) torch\.bfloat16'\)"),
    ],
)
def test_models_that_differ_are_named_by_parameter(tmp_path: Path, kind: str, text: str) -> None:
    for error, message in run_ranks(different_models, 2, tmp_path, kind, seconds=20):
        assert error == "ValueError"
        assert re.search(text, message), message


def different_scales(rank: int, world_size: int) -> tuple[str, str]:
    model = DDP(net())
    state = vsa_ddp.register(model)
    for step in range(3):
        loss_of(model, step, rank).backward()
    saved = state.state_dict()
    if rank == 1:
        saved["scales"]["mix.weight"]["col"][5] *= 2
    resumed = DDP(net())
    vsa_ddp.register(resumed).load_state_dict(saved)
    return error_of(lambda: loss_of(resumed, 3, rank).backward())


def test_different_checkpoints_of_one_step_are_named(tmp_path: Path) -> None:
    for kind, message in run_ranks(different_scales, 2, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert re.search(r"loaded scales of mix\.weight by col \(rank 0: \d+, rank 1: \d+\)", message), message


def peer_dies(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    model = DDP(net(), bucket_cap_mb=0.05)
    vsa_ddp.register(model, **settings)
    for step in range(2):
        loss_of(model, step, rank).backward()
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return "gone"
    kind, _ = error_of(lambda: loss_of(model, 2, rank).backward())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return kind


@pytest.mark.parametrize("settings", [*({"wire": wire} for wire in WIRES), {"ranks_per_node": 2}])
def test_a_peer_that_is_gone_is_an_error_not_a_local_gradient(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert run_ranks(peer_dies, 2, tmp_path, settings, seconds=20) == ["RuntimeError", "gone"]


def broken_on_rank_1(rank: int, place: str) -> Callable[[], None]:
    """Let a stage of the second bucket of a step raise on rank 1 alone. Returns what mends it."""
    owner, name, error = {
        "encode": (Codec, "encode", torch.OutOfMemoryError("no memory to encode")),
        "decode": (Codec, "decode_", MemoryError("no memory to decode")),
        "second round": (TorchKernels, "mean", torch.OutOfMemoryError("no memory for the second round")),
    }[place]
    whole, calls = getattr(owner, name), itertools.count()

    def broken(*args: Any) -> Any:
        if rank == 1 and next(calls) == 1:
            raise error
        return whole(*args)

    setattr(owner, name, broken)
    return lambda: setattr(owner, name, whole)


def one_rank_raises(rank: int, world_size: int, settings: dict[str, Any], places: list[str]) -> dict[str, Any]:
    """By place: what backward raised, and the seconds until then; and "after decode", what the next one raised."""
    found: dict[str, Any] = {}
    for place in places:
        group = dist.new_group(timeout=timedelta(seconds=3))
        model = DDP(net(), bucket_cap_mb=0.05, process_group=group)
        vsa_ddp.register(model, backend="torch", **settings)
        for step in range(2):
            loss_of(model, step, rank).backward()
        loss = loss_of(model, 2, rank)
        mend = broken_on_rank_1(rank, place)
        start = time.monotonic()
        try:
            loss.backward()
            found[place] = None
        except Exception as error:
            found[place] = type(error).__name__, str(error), time.monotonic() - start
        mend()
        if place == "decode":
            found["after decode"] = error_of(lambda model=model: loss_of(model, 3, rank).backward())
        dist.barrier()
    return found


@on_every_wire
def test_what_is_raised_on_one_rank_is_read_there_and_an_error_elsewhere(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    several_rounds = settings.get("wire") == "two_shot" or "ranks_per_node" in settings
    places = ["encode", "decode", *(["second round"] if several_rounds else [])]
    peer, failed = run_ranks(one_rank_raises, 2, tmp_path, settings, places)
    # raised in the hook itself: backward gets it as it is
    assert failed["encode"][:2] == ("OutOfMemoryError", "no memory to encode")
    # raised in a callback: torch wraps it
    for place, text in (("decode", "MemoryError: no memory to decode"), ("second round", "no memory for the second")):
        if place in places:
            kind, message, _ = failed[place]
            assert kind == "RuntimeError"
            assert text in message
    assert peer["decode"] is None  # it had all that it needed
    assert "an earlier exchange of gradients failed: no memory to decode; start again" in failed["after decode"][1]
    assert peer["after decode"][0] == "RuntimeError"
    for place in set(places) - {"decode"}:
        kind, _, seconds = peer[place]
        assert kind == "RuntimeError"
        assert seconds < 30


def impossible_nodes(rank: int, world_size: int) -> list[tuple[str, str]]:
    errors = []
    for value in (2, "local"):
        model = DDP(net())
        vsa_ddp.register(model, ranks_per_node=value)
        errors.append(error_of(lambda model=model: loss_of(model, 0, rank).backward()))
    model = DDP(net())
    mesh = dist.device_mesh.DeviceMesh("cpu", [[0, 1], [2, 3]], _init_backend=False)
    vsa_ddp.register(model, mesh=mesh)
    errors.append(error_of(lambda: loss_of(model, 0, rank).backward()))
    flat = dist.device_mesh.DeviceMesh("cpu", [0, 1, 2], _init_backend=False)
    errors.append(error_of(lambda: VsaState(mesh=flat)))
    errors.append(error_of(lambda: VsaState(mesh=mesh, config=VsaConfig(ranks_per_node=3))))
    return errors


def test_nodes_that_cannot_be_are_named_on_every_rank(tmp_path: Path) -> None:
    for errors in run_ranks(impossible_nodes, 3, tmp_path, seconds=20):
        assert [kind for kind, _ in errors] == ["ValueError"] * 5
        uneven, unset, foreign, flat, twice = (message for _, message in errors)
        assert "ranks_per_node must divide the 3 ranks of the DDP model's group, got 2" in uneven
        assert "reads LOCAL_WORLD_SIZE, which torchrun sets, got None" in unset
        assert "must hold the ranks of the DDP model's group [0, 1, 2], got [[0, 1], [2, 3]]" in foreign
        assert "must have two dimensions, nodes and ranks of a node, got [0, 1, 2]" in flat
        assert "give either a mesh or ranks_per_node, got both" in twice


def without_numba(rank: int, world_size: int, backends: list[str], missing_on: list[int]) -> Any:
    """Digests of five steps, the backend and the log; or the error."""
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == "numba" and rank in missing_on else find_spec(name)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vsa_ddp.state").addHandler(handler)
    logging.getLogger("vsa_ddp.state").setLevel(logging.INFO)
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, backend=backends[rank])
    try:
        digests = step_digests(model, rank, 5)
    except ValueError as error:
        return str(error)
    return digests, re.findall(r"kernels='(\w+)'", repr(state)), [r for r in records if "backend" in r][-1]


def test_ranks_may_have_different_backends_and_the_same_bits(tmp_path: Path) -> None:
    ranks = run_ranks(without_numba, 4, tmp_path, ["auto", "auto", "torch", "numba"], [1])
    assert [backend for _, backend, _ in ranks] == [["numba"], ["torch"], ["torch"], ["numba"]]
    assert all(digests == ranks[0][0] for digests, _, _ in ranks)
    assert ranks[1][2].endswith("backend torch")


@pytest.mark.parametrize("missing_on", [[1], [0, 1]])
def test_a_backend_that_is_not_there_is_named_on_every_rank(tmp_path: Path, missing_on: list[int]) -> None:
    for message in run_ranks(without_numba, 2, tmp_path, ["numba", "numba"], missing_on, seconds=20):
        assert 'backend="numba" needs numba, which is not installed: pip install "vsa-ddp[numba]"' in message


def different_histories(rank: int, world_size: int) -> tuple[str, str] | None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    model = DDP(net(), process_group=pairs[rank // 2])
    vsa_ddp.register(model, wire="two_shot")
    if rank >= 2:
        loss_of(model, 0, rank).backward()
        return None
    return error_of(lambda: loss_of(model, 0, rank).backward())


def test_ranks_that_could_not_make_a_group_together_are_told(tmp_path: Path) -> None:
    first, second, *others = run_ranks(different_histories, 4, tmp_path, seconds=20)
    assert others == [None, None]
    for kind, message in (first, second):
        assert kind == "ValueError"
        assert re.search(r"process groups made \(rank 0: \d+, rank 1: \d+\)", message), message


def different_local_sizes(rank: int, world_size: int) -> tuple[str, str]:
    if rank:
        os.environ["LOCAL_WORLD_SIZE"] = str(rank)
    model = DDP(net())
    vsa_ddp.register(model, ranks_per_node="local")
    return error_of(lambda: loss_of(model, 0, rank).backward())


def test_nodes_of_unlike_size_are_named_on_every_rank(tmp_path: Path) -> None:
    for kind, message in run_ranks(different_local_sizes, 3, tmp_path, seconds=20):
        assert kind == "ValueError"
        assert "LOCAL_WORLD_SIZE (rank 0: None, rank 1: '1', rank 2: '2')" in message


def test_a_call_per_parameter_by_compiled_autograd_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimize_ddp"):
        vsa_hook(VsaState(config=VsaConfig()), (torch.zeros(3), nn.Parameter(torch.zeros(3))))
