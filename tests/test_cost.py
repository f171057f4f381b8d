"""The cost model prices what the wires do, and its advice follows from it; `wire="auto"` takes it, on every rank."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import loss_of, net, step_digests
from tests.ranks import run_ranks
from tests.test_wires import traffic
from vsa_ddp import probe
from vsa_ddp.__main__ import main
from vsa_ddp.cost import CPU_CORE, WIRE_METHODS, advise, cost
from vsa_ddp.wires import WIRES


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("wire", WIRE_METHODS)
def test_bytes_are_those_that_the_wire_counts(tmp_path: Path, wire: Any, world_size: int) -> None:
    totals, num_trits = run_ranks(traffic, world_size, tmp_path, WIRES[wire], 64, None)[0]
    # the message has a few exact elements and scales beside its trits
    assert cost(wire, num_trits, world_size, 1, 1).received_bytes == pytest.approx(totals.received_bytes, rel=0.04)


def test_every_wire_has_its_price() -> None:
    assert set(WIRES) == set(WIRE_METHODS) == set(CPU_CORE.trit_ns) == {*CPU_CORE.sparse_trit_ns, "all_reduce"}


def test_few_ranks_gather_and_many_on_a_slow_link_take_two_shots() -> None:
    for gbit in (0.01, 0.1, 1.0):
        assert advise(10_000_000, 2, gbit_per_s=gbit).wire == "all_gather"
        assert advise(10_000_000, 2, gbit_per_s=gbit).pays
    assert advise(10_000_000, 64, gbit_per_s=0.01).wire == "two_shot"
    assert advise(10_000_000, 64, gbit_per_s=0.01).pays


def test_a_link_fast_enough_does_not_pay_and_the_line_says_so() -> None:
    slow, fast = (advise(10_000_000, 4, gbit_per_s=gbit, bundle=1) for gbit in (0.1, 400.0))
    assert slow.pays
    assert str(slow).startswith(f'use wire="{slow.wire}": ')
    assert not fast.pays
    assert str(fast).startswith("leave compression off, it does not pay here: ")
    for advice in (slow, fast):
        assert len(str(advice).splitlines()) == 1
        assert advice.ms[advice.wire] == min(advice.ms[wire] for wire in WIRE_METHODS)


def test_every_wire_is_priced_with_the_code_that_compression_chooses_for_it() -> None:
    many = advise(10_000_000, 64, gbit_per_s=0.01)
    assert (many.wire, many.bundle, many.sparsity) == ("two_shot", 1, 2)
    assert set(many.ms) == {"dense", "half", "all_gather", "two_shot"}
    assert "ms of communication a step by two_shot with bundle 1 and sparsity 2" in str(many)
    asked = advise(10_000_000, 64, gbit_per_s=0.01, compression=64)
    assert (asked.wire, asked.bundle, asked.sparsity) == ("two_shot", 2, 2)
    # two_shot's bundle of 16 is quicker to calculate, and has twice the noise
    few = advise(10_000_000, 2, gbit_per_s=0.1, compression=320)
    assert (few.wire, few.bundle, few.sparsity) == ("all_gather", 2, 32)
    assert few.ms["two_shot"] < few.ms["all_gather"]
    assert "all_reduce" in advise(10_000_000, 2, gbit_per_s=0.1, bundle=4).ms


def test_one_rank_sends_nothing() -> None:
    advice = advise(1_000_000, 1, gbit_per_s=float("inf"))
    assert cost("dense", 1_000_000, 1, 4, 1).received_bytes == 0
    assert not advice.pays


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_parameters": 0}, "num_parameters must be at least 1, got 0"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"bundle": 0}, r"bundle must be in 1\.\.4096, got 0"),
        ({"gbit_per_s": 0.0}, r"gbit_per_s must be greater than 0, got 0\.0"),
        ({"gbit_per_s": float("nan")}, "gbit_per_s must be greater than 0, got nan"),
        ({"latency_ms": -1.0}, r"latency_ms must be at least 0, got -1\.0"),
        ({"slowdown": 0.0}, r"slowdown must be greater than 0, got 0\.0"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        advise(**{"num_parameters": 10, "world_size": 2, "gbit_per_s": 1.0, **arguments})


def measured(rank: int, world_size: int) -> Any:
    group, cpu = dist.group.WORLD, torch.device("cpu")
    return probe.measure_link(group, cpu), probe.measure_slowdown(group, cpu)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_measurement_is_the_same_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    ranks = run_ranks(measured, world_size, tmp_path)
    link, slowdown = ranks[0]
    assert all(found == ranks[0] for found in ranks)
    assert slowdown > 0
    if world_size == 1:
        assert (link.bytes_per_s, link.latency_s) == (float("inf"), 0.0)
    else:
        assert 0 < link.bytes_per_s < float("inf")
        assert link.latency_s > 0


def auto_run(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[list[str], Any, list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vsa_ddp.state")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, **settings)
    digests = step_digests(model, rank, 3)
    return digests, state.state_dict(), [text for text in records if text.startswith("wire=")]


@pytest.mark.parametrize("code", [{"compression": 40}, {"bundle": 4, "gain": "shrunk", "whiten": False}])
def test_auto_is_the_wire_it_names(tmp_path: Path, code: dict[str, Any]) -> None:
    ranks = run_ranks(auto_run, 4, tmp_path, {"wire": "auto", "link_gbit": 0.0001, **code})
    plain = run_ranks(auto_run, 4, tmp_path, {"wire": "two_shot", **code})
    for (digests, saved, log), (expected, *_) in zip(ranks, plain, strict=True):
        assert digests == expected
        assert saved["chosen_wire"] == "two_shot"
        assert log[0].startswith('wire="auto" takes two_shot: use wire="two_shot": ')
        assert "4 ranks" in log[0]


def test_auto_measures_the_link_when_it_is_not_stated(tmp_path: Path) -> None:
    ranks = run_ranks(auto_run, 3, tmp_path, {"wire": "auto"})
    assert len({saved["chosen_wire"] for _, saved, _ in ranks}) == 1
    assert ranks[0][1]["chosen_wire"] in WIRES
    assert all(digests == ranks[0][0] for digests, *_ in ranks)


def resumed(rank: int, world_size: int, saved: dict[str, Any]) -> Any:
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, wire="auto", link_gbit=0.0001, bundle=4)
    state.load_state_dict(saved)
    loss_of(model, 3, rank).backward()
    return state.state_dict()["chosen_wire"]


def test_a_resumed_run_keeps_the_wire_that_was_chosen(tmp_path: Path) -> None:
    saved = {
        **run_ranks(auto_run, 2, tmp_path, {"wire": "auto", "link_gbit": 0.0001, "bundle": 4})[0][1],
        "chosen_wire": "all_reduce",
    }
    assert run_ranks(resumed, 2, tmp_path, saved) == ["all_reduce"] * 2


def test_the_command_answers_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parameters", "124e6", "--ranks", "8", "--gbit", "0.1"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert out.startswith('use wire="')


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--parameters"),
        (["--parameters", "many"], "--parameters"),
        (["--parameters", "nan", "--ranks", "2", "--gbit", "1"], "NaN"),
        (["--parameters", "0", "--ranks", "2", "--gbit", "1"], "num_parameters must be at least 1"),
        (["--parameters", "9", "--ranks", "2"], "both --ranks and --gbit"),
        (["--parameters", "9"], "start it with torchrun"),
        (["--parameters", "9", "--speed", "1"], "--speed"),
    ],
)
def test_a_wrong_value_gets_one_line_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert named in captured.err


def test_the_command_measures_a_running_group() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "vsa_ddp", "--parameters", "10e6"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "2 ranks, 10 M parameters" in done.stdout
