"""`RemoteAdadelta`: a `torch.optim.Optimizer` whose state and update live on a deltaserve server.

The only place of the client that imports torch.
"""

from deltaserve.torch._remote import RemoteAdadelta

__all__ = ["RemoteAdadelta"]
