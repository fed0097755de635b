"""The memory budget and its reservations."""

import pytest

from deltaserve_server.memory import Budget, BudgetExceeded


def test_a_reservation_is_returned_once() -> None:
    budget = Budget(100)
    with budget.reserve(60) as reservation:
        assert budget.available == 40
        reservation.release()
        assert budget.available == 100
    assert budget.available == 100


def test_a_refused_reservation_takes_nothing() -> None:
    budget = Budget(100)
    budget.reserve(60)
    with pytest.raises(BudgetExceeded) as refused:
        budget.reserve(41)
    assert (refused.value.needed, refused.value.available, refused.value.is_temporary) == (41, 40, True)
    with pytest.raises(BudgetExceeded) as never:
        budget.reserve(101)
    assert not never.value.is_temporary
    assert budget.available == 40


@pytest.mark.parametrize(("upper", "lower"), [(100, 50), (50, 100)])
def test_a_nested_budget_has_both_limits(upper: int, lower: int) -> None:
    whole = Budget(upper)
    part = Budget(lower, parent=whole)
    with pytest.raises(BudgetExceeded):
        part.reserve(51)
    assert (whole.available, part.available) == (upper, lower)
    with part.reserve(50):
        assert (whole.available, part.available) == (upper - 50, lower - 50)
    assert (whole.available, part.available) == (upper, lower)
