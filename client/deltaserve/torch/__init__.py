"""torch optimizers whose parameters and state live on a deltaserve server.

`RemoteAdadelta`, `RemoteSGD`, `RemoteAdagrad`, `RemoteRMSprop`, `RemoteAdam` and `RemoteAdamW` are drop-ins for the
optimizers of `torch.optim`. `RemoteOptimizer` describes what they have in common; its method `of` puts a torch
optimizer onto a server. `model_state_of` and `state_dict_of` convert states between torch and a model. This package is
the only part of the client that imports torch.
"""

from deltaserve.torch._optimizers import (
    RemoteAdadelta,
    RemoteAdagrad,
    RemoteAdam,
    RemoteAdamW,
    RemoteRMSprop,
    RemoteSGD,
)
from deltaserve.torch._options import RemoteOptions
from deltaserve.torch._remote import RemoteOptimizer
from deltaserve.torch._states import model_state_of, state_dict_of

__all__ = [
    "RemoteAdadelta",
    "RemoteAdagrad",
    "RemoteAdam",
    "RemoteAdamW",
    "RemoteOptimizer",
    "RemoteOptions",
    "RemoteRMSprop",
    "RemoteSGD",
    "model_state_of",
    "state_dict_of",
]
