"""Hosts on this one machine: Linux network namespaces on a bridge, with links of a chosen rate.

    with NetLab(4) as lab:
        lab.shape(1000)  # every host's link is 1 Gbit/s, each way
        lab.run_job(lambda host: ["python", "train.py", str(host), lab.address(0)], seconds=120)
        sent, received = lab.counters(0)

Needs root, iproute2 and a kernel with veth and bridge (and tbf, to shape): `why_not` and `why_not_shaped` say what is
missing. Each host has `lo` and `eth0`; the file system, processes and host name are those of the machine. The links
have the rate of real ones, and no delay.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_TAIL_CHARACTERS = 4000


class NetLabError(RuntimeError):
    """The kernel or iproute2 refused, or a process on a host failed."""


class NetLab:
    """`num_hosts` hosts, 10.88.0.10 and up. A context manager: on leaving it, all hosts and what runs there are gone.

    Raises: NetLabError on entering it, see `why_not`; ValueError for more hosts than addresses.
    """

    def __init__(self, num_hosts: int) -> None:
        if not 1 <= num_hosts <= 200:
            raise ValueError(f"num_hosts must be in 1..200 (one address each), got {num_hosts}.")
        self.num_hosts = num_hosts
        name = f"netlab-{os.getpid()}-{secrets.token_hex(2)}"
        self._bridge = f"{name}-bridge"
        self._hosts = [f"{name}-{host}" for host in range(num_hosts)]
        self._shaped = False
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="netlab-"))
        _command("ip", "netns", "add", self._bridge)
        _command("ip", "-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", self._bridge, "link", "set", "bridge", "up")
        for host, space in enumerate(self._hosts):
            _command("ip", "netns", "add", space)
            port = f"port{host}"
            ends = [port, "netns", self._bridge, "type", "veth", "peer", "name", "eth0", "netns", space]
            _command("ip", "link", "add", *ends)
            _command("ip", "-n", self._bridge, "link", "set", port, "master", "bridge", "up")
            _command("ip", "-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _command("ip", "-n", space, "link", "set", "eth0", "up")
            _command("ip", "-n", space, "link", "set", "lo", "up")

    def close(self) -> None:
        """Kill what runs on the hosts, and delete them. Does nothing the second time."""
        self.kill()
        for space in [*self._hosts, self._bridge]:
            with suppress(NetLabError):  # it was never made, or is gone
                _command("ip", "netns", "delete", space)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def address(self, host: int) -> str:
        return f"10.88.0.{10 + host}"

    def shape(self, mbit: float | None) -> None:
        """Give every host's link this rate in Mbit/s, each way; None for no limit. Takes effect at once."""
        links = [(space, "eth0") for space in self._hosts]
        links += [(self._bridge, f"port{host}") for host in range(self.num_hosts)]
        for space, device in links:
            if mbit is not None:
                # veth hands over up to 64 KiB at once, which a smaller burst would drop
                burst = max(128 * 1024, round(mbit * 1e6 / 8 / 250))
                rate = ["tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", str(burst), "latency", "50ms"]
                _command("tc", "-n", space, "qdisc", "replace", "dev", device, "root", *rate)
            elif self._shaped:
                _command("tc", "-n", space, "qdisc", "delete", "dev", device, "root")
        self._shaped = mbit is not None

    def counters(self, host: int) -> tuple[int, int]:
        """Bytes that the host's link has (sent, received) since it was made, headers included."""
        shown = _command("ip", "-n", self._hosts[host], "-j", "-s", "link", "show", "eth0")
        stats = json.loads(shown)[0]["stats64"]
        return stats["tx"]["bytes"], stats["rx"]["bytes"]

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """`argv` as the host runs it, for `subprocess`."""
        return ["ip", "netns", "exec", self._hosts[host], *argv]

    def environment(self) -> dict[str, str]:
        """This process's environment, with what gloo needs: its interface, since the host name means loopback."""
        gloo = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **gloo}

    def pids(self, host: int) -> list[int]:
        """Processes that run on the host."""
        return [int(pid) for pid in _command("ip", "netns", "pids", self._hosts[host]).split()]

    def kill(self) -> None:
        """Kill everything that runs on the hosts, and what it forks meanwhile."""
        deadline = time.monotonic() + 10  # for a process that the kernel does not let go
        for host in range(self.num_hosts):
            with suppress(NetLabError):  # the host was never made, or is gone
                while (pids := self.pids(host)) and time.monotonic() < deadline:
                    for pid in pids:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    time.sleep(0.01)

    def start_job(
        self,
        argv_of: Callable[[int], Sequence[str]],
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> "Job":
        """Start `argv_of(host)` on every host. Without an environment, in `environment()`."""
        assert self._folder is not None, "a job needs the lab entered"
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        return Job(self, folder, argv_of, environment or self.environment(), cwd)

    def run_job(
        self,
        argv_of: Callable[[int], Sequence[str]],
        seconds: float,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> list[str]:
        """`start_job` and `Job.wait` in one."""
        return self.start_job(argv_of, environment, cwd).wait(seconds)


class Job:
    """One process per host, begun together; see `NetLab.start_job`."""

    def __init__(
        self,
        lab: NetLab,
        folder: Path,
        argv_of: Callable[[int], Sequence[str]],
        environment: dict[str, str],
        cwd: Path | None,
    ) -> None:
        self._lab = lab
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        for host in range(lab.num_hosts):
            argv = lab.command(host, argv_of(host))
            # Files, not pipes: a full pipe that nobody reads would stop its process
            with open(folder / f"{host}.out", "wb") as out, open(folder / f"{host}.err", "wb") as err:
                self._processes.append(
                    subprocess.Popen(argv, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
                )

    def wait(self, seconds: float) -> list[str]:
        """Wait for all hosts. Returns what each wrote to stdout.

        Raises: NetLabError with the end of the host's stderr, when one failed or was not done after `seconds`; all
            that runs in the lab is killed then.
        """
        deadline = time.monotonic() + seconds
        try:
            while running := [h for h, process in enumerate(self._processes) if process.poll() is None]:
                self._raise_failure()
                if time.monotonic() > deadline:
                    tails = "".join(f"\nhost {h}:\n{self.stderr(h)[-_TAIL_CHARACTERS:]}" for h in running)
                    raise NetLabError(f"not finished after {seconds} s:{tails}")
                time.sleep(0.02)
            self._raise_failure()
            return [(self._folder / f"{host}.out").read_text(errors="replace") for host in range(self._lab.num_hosts)]
        except BaseException:
            self._lab.kill()
            raise
        finally:
            for process in self._processes:
                process.wait()

    def finished(self) -> bool:
        """Whether all hosts are done, or one has failed: then `wait` tells at once."""
        codes = [process.poll() for process in self._processes]
        return None not in codes or any(codes)

    def stderr(self, host: int) -> str:
        """What the host has written to stderr so far. Until the lab is closed."""
        return (self._folder / f"{host}.err").read_text(errors="replace")

    def _raise_failure(self) -> None:
        for host, process in enumerate(self._processes):
            if process.poll():
                tail = self.stderr(host)[-_TAIL_CHARACTERS:]
                raise NetLabError(f"host {host} exited with {process.returncode}:\n{tail}")


def _command(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise NetLabError(f"`{' '.join(argv)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be made here, as one line; None if they can."""
    if shutil.which("ip") is None:
        return "network namespaces need the command ip, from iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with NetLab(1):
            return None
    except NetLabError as error:
        return f"this machine makes no network namespaces: {error}"


@functools.cache
def why_not_shaped() -> str | None:
    """Why links cannot be given a rate here, as one line; None if they can."""
    if reason := why_not():
        return reason
    if shutil.which("tc") is None:
        return "shaping needs the command tc, from iproute2"
    try:
        with NetLab(1) as lab:
            lab.shape(100)
            return None
    except NetLabError as error:
        return f"this machine shapes no links: {error}"
