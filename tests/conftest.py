"""Settings of all tests, and commands without a process of their own."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

from launch.cli import run_command

# Two workers on two cores: more threads only wait for each other
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("steady")


class Shown(NamedTuple):
    """What a command left."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """`command(main, *arguments)`: what `python -m` would have done, without the seconds that importing torch takes."""

    def run(main: Callable[..., Any], *arguments: str) -> Shown:
        monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
        with pytest.raises(SystemExit) as left:
            run_command(main)
        assert left.value.code is None or isinstance(left.value.code, int)
        return Shown(left.value.code or 0, *capsys.readouterr())

    return run
