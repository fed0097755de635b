"""The layout: ranges of tensors and groups in the flat vector."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, Optimizer
from deltaserve_server.model import Layout, Tensor

TENSORS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=8)


def layout(parts: list[tuple[int, int]]) -> Layout:
    return Layout(tuple(Tensor(f"t{k}", (size,), group) for k, (size, group) in enumerate(parts)))


def test_a_scalar_has_one_element() -> None:
    assert Layout((Tensor("s", ()), Tensor("m", (2, 3)))).offsets == (0, 1, 7)


def test_locate_skips_empty_tensors() -> None:
    held = layout([(2, 0), (0, 0), (3, 0)])
    assert [held.locate(index) for index in range(5)] == [("t0", 0), ("t0", 1), ("t2", 0), ("t2", 1), ("t2", 2)]


@given(TENSORS, st.data())
def test_runs_cover_what_is_present_once(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    held = layout(parts)
    absent = data.draw(st.frozensets(st.sampled_from(range(len(parts)))))
    runs = list(held.runs(len(parts), absent))
    owner = [k for k, (size, _) in enumerate(parts) for _ in range(size)]
    assert [index for run in runs for index in range(*run)] == [i for i, k in enumerate(owner) if k not in absent]
    assert all(left[1] < right[0] for left, right in pairwise(runs))


@pytest.mark.parametrize("optimizer", [Adadelta(), SGD(), SGD(momentum=0.9), Adagrad(), Adagrad(lr_decay=0.1), Adam()])
@given(parts=TENSORS, data=st.data())
def test_ranges_say_how_each_element_is_updated(
    optimizer: Optimizer, parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """They split by hyperparameters and by the part of the count that matters, and by nothing else."""
    groups = [optimizer, replace(optimizer, lr=0.5), replace(optimizer)]
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(parts), max_size=len(parts)))
    absent = data.draw(st.frozensets(st.sampled_from(range(len(parts)))))
    ranges = list(layout(parts).ranges(absent, groups, counts))
    expected = [
        (groups[group], optimizer.relevant_count(count)) if k not in absent else None
        for k, ((size, group), count) in enumerate(zip(parts, counts, strict=True))
        for _ in range(size)
    ]
    got: list[tuple[Optimizer, int] | None] = [None] * len(expected)
    for start, stop, used, count in ranges:
        assert got[start:stop] == [None] * (stop - start)
        got[start:stop] = [(used, count)] * (stop - start)
    assert got == expected
    assert all(left[1] < right[0] or left[2:] != right[2:] for left, right in pairwise(ranges)), "not merged"
    assert all(left[1] <= right[0] for left, right in pairwise(ranges))


def test_counts_split_ranges_only_where_they_matter() -> None:
    held, counts = layout([(2, 0), (3, 0), (4, 0)]), (1, 2, 5)
    assert list(held.ranges((), [Adadelta()], counts)) == [(0, 9, Adadelta(), 0)]
    sgd = SGD(momentum=0.9)
    assert list(held.ranges((), [sgd], counts)) == [(0, 2, sgd, 1), (2, 9, sgd, 2)]
    assert list(held.ranges({1}, [Adam()], counts)) == [(0, 2, Adam(), 1), (5, 9, Adam(), 5)]
    assert list(held.ranges((), [Adam()], (4, 4, 4))) == [(0, 9, Adam(), 4)]
