"""The server under test, in a process of its own; or one with a planted defect, to see that the harness finds it."""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any

from account import Account
from plants import PLANTS

from deltaserve_server import Server, ServerConfig

_GRACE_SECONDS = 0.5
_LOOK_SECONDS = 0.02


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM; the argument is JSON, without which it is a plain server on a free port.

    port, data, durability, updates: As ServerConfig has them.
    account: Where the account is kept.
    plant: A defect.
    """
    settings: dict[str, Any] = json.loads(arguments[0]) if arguments else {}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    PLANTS[settings.get("plant", "none")]()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    account = Account(settings.get("account", os.devnull))
    account.keep()
    server = Server(_config(settings))
    account.write(life=server.incarnation)
    server.start()
    account.write(serving=monotonic())
    print(server.target, flush=True)
    while not stopping.wait(_LOOK_SECONDS):
        pass  # a signal that came while the process was stopped wakes any thread: this one has to look
    server.stop(_GRACE_SECONDS)
    account.write(ended=True)
    return 0


def _config(settings: dict[str, Any]) -> ServerConfig:
    return ServerConfig(
        bind=f"127.0.0.1:{settings.get('port', 0)}",
        device="cpu",
        threads=2,
        data_dir=Path(settings["data"]) if "data" in settings else None,
        durability=settings.get("durability", "none"),
        snapshot_updates=settings.get("updates"),
        snapshot_seconds=None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
