"""Commands for people: a wrong value gets one line and exit code 2, not a traceback."""

import sys
from collections.abc import Callable
from typing import Any

import typer


def run_command(function: Callable[..., Any]) -> None:
    """Run `function` as a typer command on this process's arguments, and exit."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except typer.TyperException as error:
        sys.exit(_complain(error.format_message(), 2))
    except typer.Abort:
        sys.exit(_complain("interrupted", 130))
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
