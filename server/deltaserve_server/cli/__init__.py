"""The command line. What a command needs beyond typer is imported when the command runs."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deltaserve_server.cli.application import command
from deltaserve_server.cli.errors import INTERRUPTED, exit_status, is_interrupt, one_line


def main() -> NoReturn:
    """Runs the command that this process was started with, and ends the process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: What stands behind `deltaserve`.

    Returns:
        The exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl+C. An error has been told in one line on
        the standard error stream.
    """
    try:
        status = command().main(list(arguments), prog_name="deltaserve", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not fail again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if is_interrupt(error):
            return INTERRUPTED
        if not isinstance(error, Exception) or os.environ.get("DELTASERVE_TRACEBACK"):
            raise
        print(f"deltaserve: {one_line(error)}", file=sys.stderr)
        return exit_status(error)
    return status if isinstance(status, int) else 0
