"""Ports for servers that die and come back."""

import socket


def held_port() -> socket.socket:
    """Returns a socket that holds a free port of 127.0.0.1 until it is closed.

    It does not listen, which leaves a server free to. While that one is away, nobody else is given the port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
