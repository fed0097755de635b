"""Where two values of a dataclass differ."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def first_difference(ours: "DataclassInstance", theirs: "DataclassInstance") -> tuple[str, Any, Any] | None:
    """Returns the first field in which two values differ, with both values; None if they are equal."""
    for field in fields(ours):
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if left != right:
            return field.name, left, right
    return None
