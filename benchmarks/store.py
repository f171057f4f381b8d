"""A benchmark's results file: what is measured is stored as it ends, and a benchmark that was stopped goes on."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from launch.quickstart import hardware

# What may differ between the parts of one file
_MAY_CHANGE = {"python", "vsa_ddp"}

Results = dict[str, Any]
Record = dict[str, Any]


def find(records: list[Record], **wanted: Any) -> list[Record]:
    """Those records that have all these values."""
    return [r for r in records if all(r.get(name) == value for name, value in wanted.items())]


def page_head(title: str, bench: str, results: Results) -> list[str]:
    """The first lines of a page: its title, the commands that make it, and the environment of its results."""
    made_by = f"`python -m benchmarks.{bench}` wrote the runs, `--report` this page."
    return [f"# {title}", "", made_by, "", *(f"- {name}: {value}" for name, value in results["environment"].items())]


class Store:
    """The results of one benchmark: `environment` of the machine, and a list of what was measured.

    Args:
        file: where they are kept, beside a page of the same name; None for results that are only printed.
        kind: name of the list.
        settings: what must be the same for all of the list, besides the machine.
        rebuild: whether nothing will be measured, so that the file may be another machine's.

    Raises: typer.BadParameter if the file was measured on another machine, with another torch or other settings.
    """

    def __init__(self, file: Path | None, kind: str, *, rebuild: bool, **settings: Any) -> None:
        self.file = file
        self._kind = kind
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        self._commit = commit.stdout.strip() or "unknown"
        here = {**settings, **hardware()}
        self.results: Results = {"environment": {**here, "commit": self._commit}, kind: []}
        if file is None or not file.exists():
            return
        self.results = json.loads(file.read_text())
        if rebuild:
            return
        there = self.results["environment"]
        if differ := [name for name in here if name not in _MAY_CHANGE and there.get(name) != here[name]]:
            values = ", ".join(f"{name} is {there.get(name)!r} there and {here[name]!r} here" for name in differ)
            raise typer.BadParameter(f"{file} cannot go on: {values}; name another file.", param_hint="'--json'")

    @property
    def list(self) -> list[Record]:
        """What was measured so far."""
        measured: list[Record] = self.results[self._kind]
        return measured

    def add(self, *measured: Record) -> None:
        """Keep what was measured, at once, and by which commit."""
        environment = self.results["environment"]
        if self._commit not in environment["commit"].split(", "):
            environment["commit"] += f", {self._commit}"
        self.list.extend(measured)
        if self.file is not None:
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.results, indent=1) + "\n")
            part.replace(self.file)  # whole, also if stopped in between

    def write_page(self, report: Callable[[Results], str]) -> None:
        """Print the page, and keep it beside the file."""
        page = report(self.results)
        if self.file is not None:
            self.file.with_suffix(".md").write_text(page)
        typer.echo(page)
