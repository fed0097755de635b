"""The deltaserve server: `Server` and `ServerConfig`, and `LocalServer` for notebooks and tests."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaserve_server.app import LocalServer, Server
    from deltaserve_server.config import ServerConfig

__all__ = ["LocalServer", "Server", "ServerConfig"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: the client commands of `deltaserve` do without the server's libraries."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deltaserve_server import app, config

    return getattr(config if name == "ServerConfig" else app, name)
