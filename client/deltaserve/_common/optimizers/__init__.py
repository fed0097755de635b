"""The optimizers that a server has: one definition each, which client and server share.

To add one, write its definition here, a reference in `deltaserve_server.optimizers.reference`, its message in
`proto/deltaserve/v1/optimizers.proto`, and its line in the table below.
"""

from deltaserve._common.optimizers.adadelta import Adadelta
from deltaserve._common.optimizers.adagrad import Adagrad
from deltaserve._common.optimizers.adam import Adam, AdamW
from deltaserve._common.optimizers.definition import Optimizer, Slot
from deltaserve._common.optimizers.lion import Lion
from deltaserve._common.optimizers.rmsprop import RMSprop
from deltaserve._common.optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop", "Slot"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adadelta": Adadelta,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
    "lion": Lion,
}
"""The optimizers by kind, which is also the name of their field in the message `Optimizer`."""
