"""Where a server listens."""

from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class Port:
    """An address to listen on, and who may connect.

    Attributes:
        address: HOST:PORT, where port 0 chooses a free one, or unix:PATH.
        credentials: The server's certificates; None means that connections are not encrypted.
    """

    address: str
    credentials: grpc.ServerCredentials | None = None

    def bind(self, server: grpc.Server) -> str:
        """Has a server listen here; returns the address with the port that was chosen.

        Raises:
            OSError: The address cannot be bound.
        """
        try:
            if self.credentials is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self.credentials)
        except RuntimeError:  # gRPC raises, or returns 0, depending on its version
            port = 0
        if not port:
            reason = "another server may use it, or it is not an address of this machine"
            raise OSError(f"cannot listen on {self.address}: {reason}")
        if self.address.startswith("unix:"):
            return self.address
        return f"{self.address.rpartition(':')[0]}:{port}"
