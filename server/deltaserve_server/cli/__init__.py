"""The command line `deltaserve`. A command imports what it needs when it runs, so that `--help` is quick."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from deltaserve_server.cli.application import command
from deltaserve_server.cli.errors import INTERRUPTED, one_line


def main() -> NoReturn:
    """Runs the command of `sys.argv` and exits with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The arguments after `deltaserve`.

    Returns:
        The exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl+C. An error is one line on standard error.
    """
    try:
        # Not standalone: typer would print errors in its own format, and exit.
        status = command().main(list(arguments), prog_name="deltaserve", standalone_mode=False)
        sys.stdout.flush()  # here a closed pipe is still an exception, at exit it would be a traceback
    except BrokenPipeError:
        # The reader of the output is gone. The interpreter flushes at exit and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | typer.Abort):  # typer replaces Ctrl+C by an exception of its own
            return INTERRUPTED
        if not isinstance(error, Exception) or os.environ.get("DELTASERVE_TRACEBACK"):
            raise
        print(f"deltaserve: {one_line(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))  # typer's usage errors have it, as ours do
    return status if isinstance(status, int) else 0
