"""The server under test, in a process of its own, with a planted defect if asked for one."""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any

from defects import DEFECTS
from server_log import ServerLog

from deltaserve_server import Server, ServerConfig

_GRACE_SECONDS = 0.5
_LOOK_SECONDS = 0.02


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM. The argument is a JSON object; without it the server is plain and takes a free port.

    port, data, durability, updates: As in ServerConfig.
    log: Path of the server's log.
    defect: Key of DEFECTS.
    """
    settings: dict[str, Any] = json.loads(arguments[0]) if arguments else {}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    DEFECTS[settings.get("defect", "none")]()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    log = ServerLog(settings.get("log", os.devnull))
    log.install()
    server = Server(_config(settings))
    log.write(life=server.incarnation)
    server.start()
    log.write(serving=monotonic())
    print(server.target, flush=True)
    while not stopping.wait(_LOOK_SECONDS):
        pass  # polls, because a signal that arrives while the process is stopped may wake another thread
    server.stop(_GRACE_SECONDS)
    log.write(ended=True)
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
