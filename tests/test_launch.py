"""The launches, run for real: across network namespaces as hosts, on one machine, and through a rank's death."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from torch.distributed.run import get_args_parser

from benchmarks import netlab
from benchmarks.netlab import Job, NetLab, NetLabError
from launch import network, train
from launch.checkpoint import Checkpoint
from launch.train import History, TrainConfig, check_checkpoint, main
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
STEPS = 10
TRAINING = ["--steps", str(STEPS)]


@pytest.fixture
def hosts() -> Callable[[int], NetLab]:
    """Makes hosts, or skips the test."""
    if reason := netlab.why_not():
        pytest.skip(reason)
    return NetLab


def train_on_one_machine(ranks: int, file: Path) -> dict[str, Any]:
    """Figures of the one-machine launch. If it fails or hangs no rank is left: torchrun, told to end, ends its own."""
    argv = ["bash", str(LAUNCH / "one_machine.sh"), "--ranks", str(ranks), *TRAINING, "--json", str(file)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    try:
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(40)
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def start_training(lab: NetLab, *arguments: str) -> Job:
    """launch/multi_node.sh on every host, one rank each. It finds the interface itself."""
    environment = {name: value for name, value in lab.environment().items() if name != "GLOO_SOCKET_IFNAME"}
    environment |= {
        "RENDEZVOUS": f"{lab.address(0)}:29400",
        "NODES": str(lab.num_hosts),
        "RANKS_PER_NODE": "1",
        "PYTHON": sys.executable,
        "TQDM_DISABLE": "1",
    }
    argv = ["bash", str(LAUNCH / "multi_node.sh"), *TRAINING, *arguments]
    return lab.start_job(lambda host: argv, environment)


@pytest.mark.timeout(200)
def test_three_hosts_train_what_one_machine_trains_though_a_rank_is_killed(
    hosts: Callable[[int], NetLab], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(folder=tmp_path / "saved", every=4)
    saving = ["--checkpoint", str(checkpoint.folder), "--checkpoint-every", str(checkpoint.every)]
    with hosts(3) as lab:
        job = start_training(lab, *saving, "--json", str(tmp_path / "figures.json"))
        deadline = time.monotonic() + 60
        while not checkpoint.file.exists():
            assert time.monotonic() < deadline, "".join(map(job.stderr, range(3)))
            time.sleep(0.005)
        (rank,) = worker_pids(lab, host=1)
        os.kill(rank, signal.SIGKILL)
        job.wait(seconds=60)
        assert re.search(r"^resumed after step [48]$", "".join(map(job.stderr, range(3))), re.MULTILINE)
        counters = [lab.counters(host) for host in range(3)]
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = train_on_one_machine(3, tmp_path / "one_machine.json")
    # from then on also what ranks say when they meet again
    assert figures["wire_bytes"][: checkpoint.every] == expected["wire_bytes"][: checkpoint.every]
    # seed, data order and world size are the same, so every bit is
    assert len(figures["losses"]) == STEPS
    assert all(math.isfinite(loss) for loss in figures["losses"])
    assert figures["losses"] == expected["losses"]
    assert figures["heldout_loss"] == expected["heldout_loss"]
    # what a rank hands to the collectives leaves by its host's link and comes in by the others'
    for sent, received in counters:
        assert min(sent, received) >= sum(figures["wire_bytes"])


def worker_pids(lab: NetLab, host: int) -> list[int]:
    """The host's ranks, without the torchrun that watches them."""
    argv = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in lab.pids(host)}
    return [pid for pid, words in argv.items() if "launch.train" in words and "torch.distributed.run" not in words]


@pytest.mark.parametrize(
    ("launch", "environment", "named"),
    [
        ("multi_node.sh", {"NODES": "2"}, "RENDEZVOUS is not set"),
        ("multi_node.sh", {"NODES": "2", "RENDEZVOUS": "host0"}, "RENDEZVOUS must be host:port, as host0:29400, got"),
        ("multi_node.sh", {"NODES": "2", "RENDEZVOUS": "host0:99999"}, "RENDEZVOUS must be host:port"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400"}, "NODES is not set"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400", "NODES": "two"}, "NODES must be a number of machines, or MIN"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400", "NODES": "0"}, "NODES must be"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400", "NODES": "4:2"}, "MIN not above MAX, got 4:2"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400", "NODES": "2", "RANKS_PER_NODE": "0"}, "RANKS_PER_NODE must"),
        ("multi_node.sh", {"RENDEZVOUS": "host0:29400", "NODES": "2", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be"),
        ("one_machine.sh --ranks 0", {}, "--ranks must be a number of processes, got 0"),
        ("one_machine.sh --ranks", {}, "--ranks must be"),
        ("one_machine.sh", {"MAX_RESTARTS": "many"}, "MAX_RESTARTS must be"),
        ("one_machine.sh --ranks 1", {"PYTHON": "bare_python"}, "has no torch, numpy, typer, tqdm"),
    ],
)
def test_a_wrong_setting_gets_one_line_and_exit_code_2(
    launch: str, environment: dict[str, str], named: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare_python"  # an interpreter without site-packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment}
    outcome = subprocess.run(
        ["bash", "-c", f"exec bash {LAUNCH}/{launch}"], env=settings, capture_output=True, text=True, timeout=30
    )
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("error: ")
    assert named in outcome.stderr


def test_a_machine_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.main("127.0.0.1:29400").split()[0] == "127.0.0.1"
    assert network.main("localhost:29400").split()[2] == "1"
    monkeypatch.setattr(network, "own_address", lambda host, port: "127.0.1.1")
    with pytest.raises(ValueError, match="host0 resolves to loopback on this machine; give its address"):
        network.main("host0:29400")


def test_the_shell_scripts_parse() -> None:
    for script in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_slurm_launch_passes_on_its_nodes(tmp_path: Path) -> None:
    stubs = {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'echo "$RENDEZVOUS $NODES $JOB $*"'}
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    argv = ["bash", str(LAUNCH / "slurm.sbatch"), "--steps", "5"]
    said = subprocess.run(argv, check=True, env=environment, capture_output=True, text=True, timeout=30).stdout
    assert said.startswith("node7:23456 2 123456 ")
    assert said.endswith("bash launch/multi_node.sh --steps 5\n")


def test_the_kubernetes_launch_is_one_that_torchrun_and_the_script_take() -> None:
    text = (LAUNCH / "pytorchjob.yaml").read_text()
    command = re.search(r"command:\n((?: +- .*\n)+)", text)
    assert command
    program, *arguments = [line.strip().removeprefix("- ").split(" ")[0] for line in command[1].splitlines()]
    assert program == "torchrun"
    taken = get_args_parser().parse_args(arguments)
    assert taken.module
    assert taken.training_script == "launch.train"
    train_command().make_context("train", taken.training_script_args)


def test_every_option_in_the_launches_exists() -> None:
    known = {option for parameter in train_command().params for option in parameter.opts}
    known |= set(get_args_parser()._option_string_actions)
    known |= {"--ranks", "--parameters"}
    known |= {"--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"}
    known |= {"--job-name", "--output", "--partition", "--account", "--kill-on-bad-exit"}
    for file in LAUNCH.iterdir():
        if file.suffix in (".sh", ".sbatch", ".yaml", ".md") and file.name not in ("venv.sh", "quickstart.sh"):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", file.read_text())) <= known, file.name


def train_command() -> Any:
    app = typer.Typer()
    app.command()(main)
    return typer.main.get_command(app)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder=tmp_path / "new" / "folder", every=1)
    config = TrainConfig(steps=5)
    check_checkpoint(checkpoint, config)
    checkpoint.save(2, asdict(config), {}, {})
    check_checkpoint(checkpoint, config)
    with pytest.raises(typer.BadParameter, match="is a run with another compression, seed; give another folder"):
        check_checkpoint(checkpoint, TrainConfig(steps=5, compression=20, seed=3))
    with pytest.raises(typer.BadParameter, match="saves no residuals"):
        check_checkpoint(checkpoint, TrainConfig(method="powersgd"))
    with pytest.raises(typer.BadParameter, match="/dev/null"):
        check_checkpoint(Checkpoint(folder=Path("/dev/null/x"), every=1), config)


def _load_and_average(rank: int, world_size: int, folder: Path) -> tuple[str, bool, bool]:
    try:
        Checkpoint(folder=folder / str(rank == 1), every=1).load({}, {})
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    history, late = History(100), History(100)
    history.losses = late.losses = torch.randn(100, generator=torch.Generator().manual_seed(rank)).exp()
    late.average_losses(torch.device("cpu"))
    history.losses = history.losses.clone()
    history.losses[60:] = 0
    history.average_losses(torch.device("cpu"))
    early = history.losses[:60]
    history.average_losses(torch.device("cpu"))
    everyones = [torch.empty(100) for _ in range(world_size)]
    dist.all_gather(everyones, late.losses)
    same = all(torch.equal(losses, late.losses) for losses in everyones)
    return refusal, same, torch.equal(early, late.losses[:60]) and torch.equal(early, history.losses[:60])


def test_ranks_that_found_different_checkpoints_stop_and_averages_stay(tmp_path: Path) -> None:
    (tmp_path / "True").mkdir()
    Checkpoint(folder=tmp_path / "True", every=1).save(7, {}, {}, {})
    for refusal, same_on_all_ranks, same_whenever in run_ranks(_load_and_average, 3, tmp_path, tmp_path):
        assert "of steps [0, 7, 0]; it must be one folder that every host sees" in refusal
        assert same_on_all_ranks
        assert same_whenever


def _train_on(rank: int, world_size: int, folder: Path | None) -> Any:
    config = TrainConfig(method="vsa-local", period=3, steps=10, width=32, num_layers=2, batch=2)
    return train.train(config, Checkpoint(folder=folder, every=4) if folder else None)


def _train_with_a_break(rank: int, world_size: int, folder: Path) -> tuple[Any, Any]:
    """Figures of a run of local steps, and of one that ended after two checkpoints and went on."""
    whole = _train_on(rank, world_size, None)
    take_step, calls = train.take_step, 0

    def fails_in_the_tenth_step(*arguments: Any) -> tuple[float, bool]:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise ArithmeticError
        return take_step(*arguments)

    train.take_step = fails_in_the_tenth_step
    with pytest.raises(ArithmeticError):
        _train_on(rank, world_size, folder)
    train.take_step = take_step
    return whole, _train_on(rank, world_size, folder)


def test_local_steps_go_on_with_every_ranks_own_state_and_with_more_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    whole, resumed = run_ranks(_train_with_a_break, 2, tmp_path, folder, backend="metered")[0]
    assert resumed["losses"] == whole["losses"]
    assert resumed["heldout_loss"] == whole["heldout_loss"]
    assert {file.name for file in folder.iterdir()} == {
        "checkpoint.pt",
        *(f"checkpoint_step8_rank{r}.pt" for r in (0, 1)),
    }

    figures = run_ranks(_train_on, 3, tmp_path, folder, backend="metered")[0]
    assert figures["losses"][:8] == whole["losses"][:8]
    assert all(math.isfinite(loss) for loss in figures["losses"])


RECEIVE = """
import socket
with socket.create_server(("", 5000)) as server, server.accept()[0] as peer:
    count = 0
    while block := peer.recv(1 << 20):
        count += len(block)
    print(count)
"""
SEND = """
import socket, sys, time
for _ in range(1000):
    try:
        peer = socket.create_connection((sys.argv[1], 5000))
        break
    except OSError:
        time.sleep(0.01)
start = time.perf_counter()
peer.sendall(bytes(int(sys.argv[2])))
peer.shutdown(socket.SHUT_WR)
peer.recv(1)  # the receiver has it all and hung up
print(time.perf_counter() - start)
"""


def transfer(lab: NetLab, num_bytes: int) -> float:
    """Send from host 1 to host 0 by TCP. Returns seconds."""
    python = [sys.executable, "-I", "-S", "-c"]
    argvs = [[*python, RECEIVE], [*python, SEND, lab.address(0), str(num_bytes)]]
    received, seconds = lab.run_job(lambda host: argvs[host], seconds=30)
    assert int(received) == num_bytes
    return float(seconds)


def test_counters_count_what_crosses_the_link(hosts: Callable[[int], NetLab]) -> None:
    num_bytes = 20_000_000
    with hosts(2) as lab:
        before = lab.counters(0), lab.counters(1)
        transfer(lab, num_bytes)
        after = lab.counters(0), lab.counters(1)
    assert after[1][0] - before[1][0] == pytest.approx(num_bytes, rel=0.05)
    assert after[0][1] - before[0][1] == pytest.approx(num_bytes, rel=0.05)
    assert after[0][0] - before[0][0] < num_bytes / 20, "acknowledgements only"


def test_a_shaped_link_is_no_faster_than_its_rate(hosts: Callable[[int], NetLab]) -> None:
    if reason := netlab.why_not_shaped():
        pytest.skip(reason)
    num_bytes, mbit, burst = 2_000_000, 20, 128 * 1024
    with hosts(2) as lab:
        lab.shape(1000)
        lab.shape(mbit)
        shaped = transfer(lab, num_bytes)
        lab.shape(None)
        free = transfer(lab, num_bytes)
    # Each of the two queues lets one burst through at once
    assert shaped >= (num_bytes - 2 * burst) * 8 / (mbit * 1e6)
    assert free < shaped


def test_a_failed_host_ends_the_job_and_says_why(hosts: Callable[[int], NetLab]) -> None:
    with hosts(3) as lab:
        start = time.monotonic()
        with pytest.raises(NetLabError, match=r"host 1 exited with 3:\nout of luck"):
            lab.run_job(
                lambda host: ["bash", "-c", "sleep 50 & wait" if host != 1 else "echo out of luck >&2; exit 3"],
                seconds=40,
            )
        with pytest.raises(NetLabError, match=r"not finished after 0\.1 s:\nhost 0:\nbusy"):
            lab.run_job(lambda host: ["bash", "-c", "echo busy >&2; sleep 50"], seconds=0.1)
        assert time.monotonic() - start < 30
        assert [lab.pids(host) for host in range(3)] == [[], [], []]
        assert lab.run_job(lambda host: ["echo", lab.address(host)], seconds=30)[2] == "10.88.0.12\n"


def test_nothing_is_left_of_a_lab_that_could_not_be_built(
    hosts: Callable[[int], NetLab], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = netlab._command, 0

    def interrupted(*argv: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return run(*argv)

    lab = hosts(2)
    monkeypatch.setattr(netlab, "_command", interrupted)
    with pytest.raises(KeyboardInterrupt), lab:
        pass
    assert calls > 9
    assert lab._bridge.removesuffix("bridge") not in run("ip", "netns", "list")


def test_num_hosts_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_hosts must be in 1\.\.200 .* got 0"):
        NetLab(0)
