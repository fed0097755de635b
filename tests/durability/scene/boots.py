"""Restarts of the machine, as the server sees them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deltaserve_server.durability import folder, model_storage


class Boots:
    """The boot id that the server reads.

    Attributes:
        number: Part of the boot id; another number stands for a restarted machine.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number = 1
        for module in (model_storage, folder):
            patch.setattr(module, "boot", lambda: f"boot {self.number}")

    @contextmanager
    def another(self, power: bool) -> Iterator[None]:
        """Restarts the machine for the block, if `power` failed."""
        self.number += power
        try:
            yield
        finally:
            self.number -= power
