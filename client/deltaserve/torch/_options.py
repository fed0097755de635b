"""The keyword arguments of the drop-ins that torch's optimizers do not have."""

from typing import TypedDict

from deltaserve._common.element_types import WireType
from deltaserve._common.policies import Policy
from deltaserve._credentials import Credentials
from deltaserve._transport.protocol import TransportName
from deltaserve.torch._local_steps import LocalOptimizer


class RemoteOptions(TypedDict, total=False):
    """The keyword arguments that all drop-ins have in common; `RemoteOptimizer` describes them."""

    policy: Policy | None
    worker: str | None
    local_steps: int
    local_optimizer: LocalOptimizer | None
    overlap: bool
    transport: TransportName
    wire: WireType
    timeout_seconds: float
    credentials: Credentials | None
