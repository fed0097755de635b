"""Addresses of servers."""

_MAX_PORT = 65_535


def check_target(target: str) -> None:
    """Raises ValueError unless an address reads HOST:PORT or unix:PATH."""
    host, _, port = target.rpartition(":")
    if target.startswith("unix:"):
        valid = target != "unix:"
    else:
        valid = bool(host) and "/" not in host and port.isdecimal() and int(port) <= _MAX_PORT
    if not valid:
        raise ValueError(f"{target!r} is no address; write HOST:PORT, as in localhost:50051, or unix:PATH")
