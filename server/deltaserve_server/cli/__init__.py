"""The command line `deltaserve`. A command imports what it needs when it runs, so that `--help` is quick."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deltaserve_server.cli.application import command
from deltaserve_server.cli.errors import INTERRUPTED, exit_status, is_interrupt, one_line


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
        status = command().main(list(arguments), prog_name="deltaserve", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output is gone. The interpreter flushes at exit and must not fail again.
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
