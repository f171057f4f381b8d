"""A state is saved, copied and resumed without a bit lost."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, loss_of, net
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig, VsaState, peers, state, vsa_hook
from vsa_ddp.codec import Codec
from vsa_ddp.kernels import TorchKernels
from vsa_ddp.layout import plan_bucket
from vsa_ddp.wires import WIRES


def start(
    named: bool, options: dict[str, Any], settings: dict[str, Any] | None = None
) -> tuple[DDP, torch.optim.Optimizer, VsaState]:
    model = DDP(net(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if named:
        return model, optimizer, vsa_ddp.register(model, optimizer, **(settings or {}))
    state = VsaState(config=VsaConfig(**(settings or {})))
    model.register_comm_hook(state, vsa_hook)
    return model, optimizer, state


def steps(model: DDP, optimizer: torch.optim.Optimizer, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def resume(
    rank: int, world_size: int, folder: Path, named: bool, options: dict[str, Any], settings: dict[str, Any]
) -> tuple[str, str, Any, Any]:
    model, optimizer, state = start(named, {"bucket_cap_mb": 0.05}, settings)
    steps(model, optimizer, rank, 0, 7)
    file = folder / f"{rank}.pt"
    torch.save(
        {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "hook": state.state_dict()}, file
    )
    steps(model, optimizer, rank, 7, 14)

    resumed, resumed_optimizer, resumed_state = start(named, options, settings)
    saved = torch.load(file, weights_only=True)
    resumed.module.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed_state.load_state_dict(saved["hook"])
    steps(resumed, resumed_optimizer, rank, 7, 14)
    return (
        digest(model.parameters()),
        digest(resumed.parameters()),
        state.compression_stats(),
        resumed_state.compression_stats(),
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "options", [{"bucket_cap_mb": 0.05}, {"bucket_cap_mb": 0.1}, {"bucket_cap_mb": 100, "static_graph": True}]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, named: bool, options: dict[str, Any]) -> None:
    for whole, resumed, stats, resumed_stats in run_ranks(resume, 2, tmp_path, tmp_path, named, options, {}):
        assert whole == resumed
        assert stats.steps == resumed_stats.steps == 14
        assert stats.dense_bytes == resumed_stats.dense_bytes
        # parts of a packet are filled to 8 bytes, and the first resumed step has other buckets
        assert stats.wire_bytes == pytest.approx(resumed_stats.wire_bytes, rel=0.01)


@pytest.mark.parametrize("settings", [*({"wire": wire} for wire in WIRES), {"ranks_per_node": 2, "wire": "two_shot"}])
def test_a_resumed_run_equals_an_uninterrupted_one_on_every_wire(tmp_path: Path, settings: dict[str, Any]) -> None:
    options = {"bucket_cap_mb": 0.1}
    for whole, resumed, *_ in run_ranks(resume, 4, tmp_path, tmp_path, True, options, settings):
        assert whole == resumed


def resume_by_dcp(rank: int, world_size: int, folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    model, optimizer, state = start(True, {"bucket_cap_mb": 0.05}, settings)
    steps(model, optimizer, rank, 0, 7)
    parts = {"model": model.module, "hook": state}
    dcp.save({name: part.state_dict() for name, part in parts.items()}, checkpoint_id=folder / "by hand")
    dcp.save(parts, checkpoint_id=folder / "stateful")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, rank, 7, 14)

    digests = []
    for kind in ("by hand", "stateful"):
        resumed, resumed_optimizer, resumed_state = start(True, {"bucket_cap_mb": 0.1}, settings)
        resumed_parts: dict[str, Any] = {"model": resumed.module, "hook": resumed_state}
        if kind == "by hand":
            target = {name: part.state_dict() for name, part in resumed_parts.items()}
            dcp.load(target, checkpoint_id=folder / kind)
            for name, part in resumed_parts.items():
                part.load_state_dict(target[name])
        else:
            dcp.load(resumed_parts, checkpoint_id=folder / kind)
        assert resumed_state.step == 7
        steps(resumed, resumed_optimizer, rank, 7, 14)
        digests.append(digest(resumed.parameters()))
    assert digests[0] == digests[1]
    return digest(model.parameters()), digests[0]


@pytest.mark.parametrize("settings", [{}, {"wire": "all_reduce", "whiten": False}, {"wire": "auto", "link_gbit": 1.0}])
def test_torchs_distributed_checkpoint_resumes_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    for whole, resumed in run_ranks(resume_by_dcp, 2, tmp_path, tmp_path, settings):
        assert whole == resumed


def load_for_another_model(rank: int, world_size: int, folder: Path) -> str:
    model, optimizer, state = start(True, {})
    steps(model, optimizer, rank, 0, 2)
    dcp.save({"hook": state}, checkpoint_id=folder / "saved")
    other = net()
    other.mix = torch.nn.Linear(96, 100, bias=False)
    other.head = torch.nn.Linear(100, 3)
    resumed = VsaState()
    resumed.name_parameters(other.named_parameters())
    with pytest.raises(CheckpointException, match=r"hook\.scales\.mix\.weight") as error:
        dcp.load({"hook": resumed}, checkpoint_id=folder / "saved")
    return str(error.value)


def test_torchs_distributed_checkpoint_of_another_model_names_what_differs(tmp_path: Path) -> None:
    run_ranks(load_for_another_model, 1, tmp_path, tmp_path)


def continue_at(rank: int, world_size: int, file: Path) -> tuple[int, str, float]:
    """Five more steps at another world size, on the data of one rank. Returns step, bits and the last loss."""
    model, optimizer, state = start(True, {"bucket_cap_mb": 0.1})
    saved = torch.load(file, weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state.load_state_dict(saved["hook"])
    steps(model, optimizer, rank, 7, 12)
    return state.step, digest(model.parameters()), loss_of(model, 0, 0).item()


def test_a_run_goes_on_at_another_world_size(tmp_path: Path) -> None:
    run_ranks(resume, 2, tmp_path, tmp_path, True, {}, {})
    for world_size in (1, 3, 4):
        ranks = run_ranks(continue_at, world_size, tmp_path, tmp_path / "0.pt")
        assert len(set(ranks)) == 1
        assert ranks[0][0] == 12
        assert ranks[0][2] < 2.0


def grown(seed: int = 0) -> torch.nn.Module:
    """The net with a layer more, and one of another name."""
    model = net(seed)
    model.late = torch.nn.Linear(64, 64)
    model.hidden_renamed = model.hidden
    del model.hidden
    return model


def test_added_and_renamed_parameters_begin_anew_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = run_ranks(a_saved_state, 1, tmp_path)[0]
    state = VsaState()
    state.name_parameters(grown().named_parameters())
    with pytest.raises(ValueError, match=r"hidden\.weight is \(96, 256\) there and absent here\. With strict=False"):
        state.load_state_dict(saved)
    with caplog.at_level(logging.WARNING):
        state.load_state_dict(saved, strict=False)
    (said,) = caplog.messages
    assert said.startswith("not in the model: hidden.weight, hidden.bias; begin anew: late.weight, late.bias, hidden_")
    loaded = state.state_dict()
    assert loaded["step"] == 3
    assert torch.equal(loaded["scales"]["mix.weight"]["row"], saved["scales"]["mix.weight"]["row"])
    assert not loaded["scales"]["hidden_renamed.weight"]["row"].any()
    assert "hidden.weight" not in loaded["scales"]


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not what VsaState\.state_dict gives: it has no chosen_wire, scales"):
        VsaState().load_state_dict(net().state_dict())


def a_saved_state(rank: int, world_size: int) -> dict[str, Any]:
    model, optimizer, state = start(True, {})
    steps(model, optimizer, rank, 0, 3)
    return state.state_dict()


def test_loading_for_other_parameters_names_the_first(tmp_path: Path) -> None:
    saved = run_ranks(a_saved_state, 1, tmp_path)[0]
    state = VsaState()
    state.load_state_dict(saved)
    model = net()
    model.mix = torch.nn.Linear(96, 100, bias=False)
    with pytest.raises(ValueError, match=r"mix\.weight is \(96, 96\) there and \(100, 96\) here"):
        state.name_parameters(model.named_parameters())
    named = VsaState()
    named.name_parameters(model.named_parameters())
    with pytest.raises(ValueError, match=r"mix\.weight is \(96, 96\) there"):
        named.load_state_dict(saved)


def load_bare(rank: int, world_size: int, saved: dict[str, Any]) -> str:
    model = DDP(torch.nn.Linear(4, 4))
    state = VsaState()
    state.load_state_dict(saved)
    model.register_comm_hook(state, vsa_hook)
    with pytest.raises(ValueError, match="belongs to other parameters") as error:
        model(torch.ones(4)).sum().backward()
    return str(error.value)


def test_a_bare_state_loaded_for_another_model_is_refused(tmp_path: Path) -> None:
    saved = run_ranks(a_saved_state, 1, tmp_path)[0]
    assert "is (4, 4)" in run_ranks(load_bare, 1, tmp_path, saved)[0]


def test_other_settings_than_saved_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = run_ranks(a_saved_state, 1, tmp_path)[0]
    state = VsaState(config=VsaConfig(sparsity=16))
    with caplog.at_level(logging.WARNING):
        state.load_state_dict(saved)
    assert caplog.messages == [
        "setting compression was 'default' in the loaded state and is None now",
        "setting sparsity was 8 in the loaded state and is 16 now",
    ]
    assert state.config.sparsity == 16
    assert state.state_dict()["scales"]
    unwhitened = VsaState(config=VsaConfig(whiten=False))
    unwhitened.load_state_dict(saved)  # whose scales would be out of date if whitening came back
    assert not unwhitened.state_dict()["scales"]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_state_is_made_copied_and_unpickled_without_a_group(tmp_path: Path, copier: Any) -> None:
    assert not dist.is_initialized()
    saved = run_ranks(a_saved_state, 1, tmp_path)[0]
    state = VsaState(config=VsaConfig(bundle=8))
    state.load_state_dict(saved)
    twin = copier(state)
    assert twin.config == state.config
    assert twin.step == 3
    assert twin.compression_stats() == state.compression_stats()
    ours, theirs = state.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["shapes"] == theirs["shapes"]
    assert all(
        torch.equal(ours["scales"][n][k], theirs["scales"][n][k]) for n in ours["scales"] for k in ("row", "col")
    )


def copies_continue(rank: int, world_size: int) -> tuple[str, str, list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vsa_ddp.state").addHandler(handler)
    model, optimizer, state = start(True, {})
    steps(model, optimizer, rank, 0, 5)
    twin = DDP(copy.deepcopy(model.module))
    twin_state = copy.deepcopy(state)
    twin.register_comm_hook(twin_state, vsa_hook)
    for m in (model, twin):
        m.zero_grad()
        loss_of(m, 5, rank).backward()
    return *(digest(p.grad for p in m.parameters()) for m in (model, twin)), records  # type: ignore[return-value]


def test_a_copy_continues_with_the_same_bits_and_one_warning(tmp_path: Path) -> None:
    for original, twin, records in run_ranks(copies_continue, 2, tmp_path):
        assert original == twin
        assert len([r for r in records if "process group" in r]) == 1


def load_in_use(rank: int, world_size: int) -> None:
    model, optimizer, state = start(True, {})
    saved = state.state_dict()
    steps(model, optimizer, rank, 0, 1)
    with pytest.raises(ValueError, match="this VsaState is in use, at step 1; load into a new one"):
        state.load_state_dict(saved)


def test_loading_into_a_state_in_use_is_refused(tmp_path: Path) -> None:
    run_ranks(load_in_use, 1, tmp_path)


def make_codec(state: VsaState) -> Codec:
    layout = plan_bucket((("weight", (32, 64)),), state.config)
    return Codec(layout, state.config, state.whitening, torch.device("cpu"), TorchKernels())


def test_a_saved_state_does_not_change_with_the_run() -> None:
    state = VsaState(config=VsaConfig(bundle=4))
    codec = make_codec(state)
    for value in (1.0, 2.0):
        state.update_scales(codec, 1, torch.full((96,), value), torch.full((1,), value))
        if value == 1.0:
            saved = state.state_dict()
    assert saved["scales"]["weight"]["row"].unique().tolist() == pytest.approx([0.1])
    assert saved["sigma"]["weight"].tolist() == [1.0]


def test_a_shared_sigma_doubles_at_most_and_falls_at_once() -> None:
    state = VsaState(config=VsaConfig(bundle=4))
    codec = make_codec(state)
    seen = []
    for value in (1.0, 8.0, 8.0, 8.0, float("inf"), 0.5, 0.0, 3.0):
        state.update_scales(codec, 1, torch.zeros(0), torch.full((1,), value))
        seen.append(state.state_dict()["sigma"]["weight"].item())
    assert seen == [1.0, 2.0, 4.0, 8.0, 8.0, 0.5, 0.0, 3.0]


def test_names_are_those_of_the_model_before_torch_compile() -> None:
    plain, compiled = VsaState(), VsaState()
    model = net()
    plain.name_parameters(model.named_parameters())
    compiled.name_parameters(torch.compile(model).named_parameters())
    assert plain.state_dict()["shapes"] == compiled.state_dict()["shapes"]


def test_stats_of_a_new_state() -> None:
    stats = VsaState().compression_stats()
    assert stats.compression == 1.0
    assert not any(value for name, value in stats._asdict().items() if name != "compression")


def chosen(rank: int, world_size: int, all_settings: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    found = []
    for settings in all_settings:
        given = {"mesh": init_device_mesh("cpu", (3, 2))} if "mesh" in settings else settings
        config = vsa_ddp.register(DDP(net()), **given).config
        found.append((config.wire, config.compression))
    part = dist.new_group(range(world_size))  # it could not make the groups that two_shot takes
    assert vsa_ddp.register(DDP(net(), process_group=part)).config.wire == "all_gather"
    return found


def test_more_than_4_peers_take_the_wire_whose_bytes_do_not_grow_if_nothing_else_is_asked_for(tmp_path: Path) -> None:
    cases: dict[tuple[str, Any], list[dict[str, Any]]] = {
        ("two_shot", "default"): [{}, {"check_interval": 7}, {"compression": None}],
        ("all_gather", "default"): [{"wire": "all_gather"}, {"ranks_per_node": 2}, {"mesh": "3 nodes"}],
        ("all_gather", 64): [{"compression": 64}],
        ("all_gather", None): [{"bundle": 4}, {"sparsity": 8}],
    }
    asked = [settings for several in cases.values() for settings in several]
    wanted = [choice for choice, several in cases.items() for _ in several]
    assert run_ranks(chosen, 6, tmp_path, asked) == [wanted] * 6
    assert run_ranks(chosen, 4, tmp_path, [{}]) == [[("all_gather", "default")]] * 4


def warnings_of(rank: int, world_size: int, settings: dict[str, Any], many: int) -> list[str]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vsa_ddp").addHandler(handler)
    peers.MANY_PEERS = state.MANY_PEERS = many
    model, optimizer, _ = start(True, {}, settings)
    steps(model, optimizer, rank, 0, 1)
    return found


@pytest.mark.parametrize(
    ("settings", "many", "warns"),
    [
        ({"compression": 64}, 1, True),
        ({}, 1, False),
        ({}, 2, False),
        ({"compression": 64, "ranks_per_node": 2}, 1, False),
    ],
)
def test_many_ranks_that_gather_are_told_what_they_receive(
    tmp_path: Path, settings: dict[str, Any], many: int, warns: bool
) -> None:
    first, other = run_ranks(warnings_of, 2, tmp_path, settings, many)
    said = [any("a rank receives 1 packets by wire" in message for message in found) for found in (first, other)]
    assert said == [warns, False]
