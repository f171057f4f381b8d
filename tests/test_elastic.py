"""Training under torchrun survives faults: ranks killed at exact places, nodes that join and are lost, exceptions."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import train
from launch.checkpoint import Checkpoint
from tests.elastic_worker import CHECKPOINT_EVERY, CONFIG, num_happened
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parent.parent
SECONDS = 200  # of one job, against a hang: each is ten starts of Python or so, slow where others use the machine


class Job:
    """Agents of torchrun and their ranks. The folder is in the command line of each of these processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._agents: list[subprocess.Popen[bytes]] = []
        self._deadline = time.monotonic() + SECONDS

    def start(self, faults: list[str], *options: str) -> subprocess.Popen[bytes]:
        """An agent, which plays a node. What it and its ranks write goes to `output`."""
        worker = ["-m", "tests.elastic_worker", str(self.folder), *faults]
        argv = [sys.executable, "-m", "torch.distributed.run", *options, *worker]
        # As the launches set them
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["TQDM_DISABLE"] = "1"
        with (self.folder / "output").open("ab") as output:
            agent = subprocess.Popen(
                argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._agents.append(agent)
        return agent

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Fails with all that was written if an agent ends before, or it takes too long."""
        while not happened():
            if any(agent.poll() is not None for agent in self._agents) or time.monotonic() > self._deadline:
                pytest.fail(self.output())
            time.sleep(0.02)

    def exit_code(self, agent: subprocess.Popen[bytes]) -> int:
        """Waits for it. Fails with all that was written if it takes too long."""
        try:
            return agent.wait(self._deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            pytest.fail(f"not finished after {SECONDS} s:\n{self.output()}")

    def pids(self) -> list[int]:
        """What still runs. Ranks are in sessions of their own, so the agents' process groups do not have them."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if os.fsencode(self.folder) in (process / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def close(self) -> None:
        """Agents first: they would start again what was killed."""
        for agent in self._agents:
            agent.kill()
            agent.wait()
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self.folder / "figures.json").read_text())
        return figures

    def worlds(self) -> list[int]:
        """The world size of each attempt."""
        return [int(size) for size in (self.folder / "worlds").read_text().split()]

    def resumed_after(self) -> list[int]:
        """The step of each resumption, as `train` said it."""
        return [int(step) for step in re.findall(r"^resumed after step (\d+)$", self.output(), re.MULTILINE)]

    def num_faults(self) -> int:
        return num_happened(self.folder)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


def train_to_the_end(rank: int, world_size: int, folder: Path) -> dict[str, Any] | None:
    return train.train(CONFIG, Checkpoint(folder=folder, every=CHECKPOINT_EVERY))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and last checkpoint of two ranks that nothing befell."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    figures, _ = run_ranks(train_to_the_end, 2, folder, folder, backend="metered")
    return figures, last_checkpoint(folder)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == CONFIG.steps
    return saved


def same(mine: Any, theirs: Any) -> bool:
    """Bit for bit."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    return bool(mine == theirs)


def test_a_rank_that_is_killed_anywhere_changes_no_bit(
    uninterrupted: tuple[dict[str, Any], dict[str, Any]], job: Job
) -> None:
    faults = ["killed_in_backward", "killed_in_the_collective", "killed_in_the_checkpoint"]
    agent = job.start(faults, "--standalone", "--nproc-per-node=2", "--max-restarts=3")
    assert job.exit_code(agent) == 0, job.output()
    assert job.num_faults() == 3
    assert job.worlds() == [2, 2, 2, 2]
    assert job.resumed_after() == [4, 4, 4]
    (figures, saved), (expected, expected_saved) = (job.figures(), last_checkpoint(job.folder)), uninterrupted
    for name in ("losses", "train_loss", "heldout_loss"):
        assert figures[name] == expected[name], name
    for name in ("model", "optimizer", "scheduler", "hook"):  # the hook's has the bytes that it sent in all
        assert same(saved["parts"][name], expected_saved["parts"][name]), name
    # The meter has also what ranks say when they meet: settings and parameters, and a step later DDP's order of buckets
    more = [mine - theirs for mine, theirs in zip(figures["wire_bytes"], expected["wire_bytes"], strict=True)]
    assert [step for step, num_bytes in enumerate(more) if num_bytes] == [4, 5]
    assert sum(more) < 1500


def test_a_node_joins_and_is_lost_and_training_goes_on_from_the_checkpoints(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    node += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    soon = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
    first = job.start(["waits_for_another_node"], *node, f"--rdzv-conf=is_host=1,{soon}")
    job.wait_until((job.folder / "checkpoint.pt").exists)
    second = job.start(["is_lost_with_its_node"], *node, f"--rdzv-conf=is_host=0,{soon}")
    assert job.exit_code(first) == 0, job.output()
    assert job.exit_code(second) == -signal.SIGKILL
    assert job.num_faults() == 1
    assert job.worlds() == [1, 2, 1]
    assert job.resumed_after() == [4, 8]
    figures = job.figures()
    assert len(figures["losses"]) == len(figures["wire_bytes"]) == CONFIG.steps
    assert all(math.isfinite(loss) for loss in [*figures["losses"], figures["heldout_loss"]])
    assert all(num_bytes > 0 for num_bytes in figures["wire_bytes"])


def test_a_rank_that_raises_is_heard_and_ends_the_job(job: Job) -> None:
    logs = ["--log-dir", str(job.folder / "logs"), "--redirects=2"]
    agent = job.start(["raises"], "--standalone", "--nproc-per-node=2", "--max-restarts=0", *logs)
    assert job.exit_code(agent) == 1, job.output()
    assert job.num_faults() == 1
    (own_output,) = (job.folder / "logs").glob("*/attempt_0/1/stderr.log")
    said = own_output.read_text()
    assert "Traceback (most recent call last)" in said
    assert re.search(r'elastic_worker\.py", line \d+, in fail\n', said), said
    assert "ArithmeticError: the fault of rank 1\n" in said
    assert job.pids() == []
    assert not (job.folder / "figures.json").exists()
