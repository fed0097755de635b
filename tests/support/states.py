"""Comparison of the states of models."""

import numpy as np

from deltaserve import ModelState


def assert_same_state(one: ModelState, other: ModelState) -> None:
    """Asserts that two states have the same update counts and the same bits; their versions may differ."""
    assert one.update_counts == other.update_counts
    assert one.slots is not None
    assert other.slots is not None
    assert one.slots.keys() == other.slots.keys()
    ours, theirs = ({"weights": state.weights, **(state.slots or {})} for state in (one, other))
    for vector, tensors in ours.items():
        assert tensors.keys() == theirs[vector].keys()
        for name, values in tensors.items():
            left, right = np.asarray(values).view(np.uint32), np.asarray(theirs[vector][name]).view(np.uint32)
            np.testing.assert_array_equal(left, right, f"{vector} of {name}")
