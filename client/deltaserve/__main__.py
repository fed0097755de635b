"""Runs the command line `deltaserve`, also as `python -m deltaserve`.

The command line is part of the server package, whose dependencies a worker need not have installed. This entry point
always exists, and names the extra that is missing.
"""

import sys

_EXTRAS = {
    **dict.fromkeys(("grpc_health", "rich", "typer"), "cli"),
    **dict.fromkeys(("grpc_reflection", "llvmlite", "numba", "safetensors"), "server"),
}


def main() -> int:
    """Runs the command line.

    Returns:
        The exit status; 2 if a package that the command line needs is not installed.
    """
    try:
        from deltaserve_server.cli import main as run
    except ModuleNotFoundError as error:
        # The missing module may be within its package, as `grpc_health.v1`.
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:  # something else is broken: an extra would not help
            raise
        print(f"deltaserve: the command line needs an extra: pip install 'deltaserve[{extra}]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
