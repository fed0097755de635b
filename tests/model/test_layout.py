"""The layout: ranges of tensors and groups in the flat vector."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

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
def test_runs_and_groups_cover_what_is_present_once(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    held = layout(parts)
    absent = data.draw(st.frozensets(st.sampled_from(range(len(parts)))))
    owner = [k for k, (size, _) in enumerate(parts) for _ in range(size)]
    present = [index for index, k in enumerate(owner) if k not in absent]
    runs = list(held.runs(len(parts), absent))
    groups = list(held.groups(absent))
    assert [index for start, stop in runs for index in range(start, stop)] == present
    assert [(index, g) for start, stop, g in groups for index in range(start, stop)] == [
        (index, parts[owner[index]][1]) for index in present
    ]
    assert all(left[1] < right[0] for left, right in pairwise(runs))
