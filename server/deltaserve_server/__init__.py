"""The deltaserve server: `Server` and `ServerConfig`, and `LocalServer` for notebooks and tests."""

from deltaserve_server.app import LocalServer, Server
from deltaserve_server.config import ServerConfig

__all__ = ["LocalServer", "Server", "ServerConfig"]
