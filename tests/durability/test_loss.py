"""What recovery concludes about lost versions from what it has found."""

from itertools import product

import pytest

from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.folder import Served
from deltaserve_server.durability.recovery import Loss, assess_loss

BAD_JOURNAL, BAD_SNAPSHOT = CorruptError("journal-1", "bad"), CorruptError("snapshot-1", "bad")


@pytest.mark.parametrize(
    ("durability", "lost_power", "possible"),
    [
        (None, False, False),  # an orderly shutdown
        ("fsync", False, False),
        ("fsync", True, False),
        ("journal", False, False),
        ("journal", True, True),
        ("snapshot", False, True),
        ("snapshot", True, True),
        ("a later version's", False, True),
    ],
)
def test_without_damage_the_durability_decides(durability: str | None, lost_power: bool, possible: bool) -> None:
    served = Served(durability, "boot") if durability else None
    loss = assess_loss(
        served, lost_power=lost_power, journal_error=None, snapshot_error=None, has_journal=True, is_complete=True
    )
    assert loss == Loss(possible)


@pytest.mark.parametrize(
    ("durability", "lost_power", "refused"),
    [("fsync", False, True), ("fsync", True, True), ("journal", False, True), ("journal", True, False)],
)
def test_a_damaged_journal_is_refused_unless_a_power_failure_explains_it(
    durability: str, lost_power: bool, refused: bool
) -> None:
    loss = assess_loss(
        Served(durability, "boot"),
        lost_power=lost_power,
        journal_error=BAD_JOURNAL,
        snapshot_error=None,
        has_journal=True,
        is_complete=True,
    )
    assert loss == Loss(True, BAD_JOURNAL if refused else None)


def test_a_corrupt_snapshot_is_refused_only_if_it_alone_had_records() -> None:
    """Otherwise the snapshot before and its journals replace it, or there is no journal and the rest is lost."""
    for has_journal, is_complete in product((False, True), repeat=2):
        loss = assess_loss(
            Served("fsync", "boot"),
            lost_power=False,
            journal_error=None,
            snapshot_error=BAD_SNAPSHOT,
            has_journal=has_journal,
            is_complete=is_complete,
        )
        refusal = BAD_SNAPSHOT if has_journal and not is_complete else None
        assert loss == Loss(not (has_journal and is_complete), refusal)
