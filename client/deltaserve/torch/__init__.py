"""torch optimizers whose parameters and state live on a deltaserve server.

`RemoteAdadelta` is a drop-in for `torch.optim.Adadelta`. `model_state_of` and `state_dict_of` move the state of a
`torch.optim.Adadelta` to a server and back. This package is the only part of the client that imports torch.
"""

from deltaserve.torch._remote import RemoteAdadelta
from deltaserve.torch._states import model_state_of, state_dict_of

__all__ = ["RemoteAdadelta", "model_state_of", "state_dict_of"]
