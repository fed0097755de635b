"""Runs a worker at the oldest versions it supports against the server of this environment: `run.py PYTHON`."""

import subprocess
import sys
from pathlib import Path

from deltaserve_server import LocalServer


def main() -> int:
    """Returns the worker's exit status."""
    with LocalServer() as server:
        worker = Path(__file__).with_name("worker.py")
        return subprocess.run([sys.argv[1], "-W", "error", worker, server.target], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
