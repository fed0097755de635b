"""`RemoteAdadelta`: a `torch.optim.Optimizer` whose state and update live on a deltaserve server.

And what moves the state of a `torch.optim.Adadelta` onto a server and off it. The only place of the client that imports
torch.
"""

from deltaserve.torch._remote import RemoteAdadelta
from deltaserve.torch._states import model_state_of, state_dict_of

__all__ = ["RemoteAdadelta", "model_state_of", "state_dict_of"]
