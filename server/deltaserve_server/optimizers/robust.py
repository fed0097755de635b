"""The trimmed mean, which a few malicious gradients cannot move far: per coordinate, in numpy, float32."""

import functools

import numpy as np
from numpy.typing import NDArray

_NETWORK_MOST = 64
"""Largest number of rows for the sorting network. It works on whole rows, ten times as fast as numpy's sort for 8."""


def trimmed_mean(rows: NDArray[np.float32], trim: int, out: NDArray[np.float32]) -> None:
    """Computes the coordinate-wise trimmed mean (Yin et al., 2018, arXiv:1803.01498, Definition 2).

    For each coordinate, it sorts the n values, drops the `trim` lowest and the `trim` highest, and averages the rest:

        out = (x_(trim + 1) + ... + x_(n - trim)) / (n - 2 trim)

    With trim = 0 this is the mean, and with trim = (n - 1) // 2 the median (Definition 1). The sum starts at +0, adds
    in float64 and in ascending order, and the quotient is rounded to float32, so the order of the rows does not change
    a bit. Each rounding is monotonic, so the result lies between the lowest and the highest value that was averaged: up
    to `trim` arbitrary rows cannot move it out of the range of the others.

    Args:
        rows: n vectors, float32 [n, m], finite; overwritten.
        trim: Number of values to drop at either end, 0 <= 2 * trim < n.
        out: Output, the means, float32 [m]; must not overlap `rows`.

    Raises:
        ValueError: There are no more than 2 * trim rows.
    """
    count = len(rows) - 2 * trim
    if trim < 0 or count < 1:
        raise ValueError(f"expected more than {2 * trim} vectors to trim {trim} at either end, got {len(rows)}")
    # -0 and +0 compare equal, so sorting may replace one by the other.
    if len(rows) > _NETWORK_MOST:
        ascending = list(np.sort(rows.T, axis=1).T)
    else:
        ascending, spare = list(rows), np.empty_like(rows[0])
        for low, high in comparators(len(rows)):
            np.minimum(ascending[low], ascending[high], out=spare)
            np.maximum(ascending[low], ascending[high], out=ascending[high])
            ascending[low], spare = spare, ascending[low]
    total = np.zeros(out.size)
    for row in ascending[trim : trim + count]:
        np.add(total, row, out=total)
    np.divide(total, count, out=total)
    out[:] = total


@functools.lru_cache(maxsize=16)
def comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Returns Batcher's sorting network (1968; Knuth, volume 3, section 5.2.2, algorithm M, merge exchange).

    Args:
        count: Number of values to sort.

    Returns:
        Pairs of indices, the lower one first. Ordering the two values of each pair, pair after pair, sorts them all.
    """
    pairs = []
    widths = [1 << bit for bit in reversed(range((count - 1).bit_length()))]
    for p in widths:
        distance, remainder = p, 0
        for q in widths:
            if q < p:
                break
            pairs += [(i, i + distance) for i in range(count - distance) if i & p == remainder]
            distance, remainder = q - p, p
    return tuple(pairs)
