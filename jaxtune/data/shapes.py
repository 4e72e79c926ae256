"""The few static shapes of a run's batches: which lengths to pad to, so that little is padded and little is compiled.

A batch of rows with images has several lengths: tokens of a row, patches of its images, windows, … They go together, so
what is chosen are whole shapes and not lengths one by one.
"""

from collections.abc import Mapping, Sequence

import numpy as np

SHAPES = 4  # each is a compilation of the training step; one more is kept for what comes once in a long while
MULTIPLE = 64  # lengths above it are rounded up to multiples: what matrix units and attention kernels like
SLACK = 1.05  # fewer shapes are taken if they cost no more than this times the least
_CANDIDATES = 96  # shapes that the choice is made among

Shape = dict[str, int]


def choose_shapes(
    needs: Mapping[str, np.ndarray],
    most: Mapping[str, int],
    weights: Mapping[str, float],
    count: int = SHAPES,
) -> list[Shape]:
    """At most `count` shapes that hold all batches with little padding, and one that holds any, cheapest first.

    Args:
        needs: name of a length -> int [N], what each of N batches needs.
        most: what any batch can need.
        weights: what one of each costs; a shape's cost is the weighted sum of its lengths.

    Returns:
        Shapes, each larger than the one before in its cost, the last at least `most`. Where all batches fit well into
        one, there is one.

    >>> choose_shapes({"length": np.array([10, 12, 60])}, {"length": 60}, {"length": 1.0}, count=2)
    [{'length': 12}, {'length': 60}]
    """
    names = list(needs)
    table = round_up(np.stack([needs[name] for name in names], -1))  # [N, lengths]
    weight = np.asarray([weights.get(name, 0.0) for name in names])
    table = table[np.argsort(table @ weight, kind="stable")]
    groups = np.array_split(table, min(len(table), _CANDIDATES))
    largest = np.stack([group.max(0) for group in groups])  # [C, lengths]
    sizes = np.asarray([len(group) for group in groups])
    chosen = [largest[first:stop].max(0) for first, stop in _partition(largest, sizes, weight, count)]
    top = round_up(np.asarray([most[name] for name in names]))
    shapes = [dict(zip(names, map(int, shape))) for shape in [*chosen, np.maximum(top, table.max(0))]]
    return [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]


def round_up(lengths: np.ndarray) -> np.ndarray:
    """Lengths above MULTIPLE, made multiples of it."""
    return np.where(lengths > MULTIPLE, -(-lengths // MULTIPLE) * MULTIPLE, lengths)


def fitting(shapes: Sequence[Shape], need: Mapping[str, int]) -> Shape:
    """The first shape that holds what a batch needs.

    Raises:
        ValueError: none does.
    """
    for shape in shapes:
        if all(shape[name] >= length for name, length in need.items()):
            return shape
    raise ValueError(f"no shape of {list(shapes)} holds {dict(need)}")


def _partition(
    largest: np.ndarray, sizes: np.ndarray, weight: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """Cuts a row of C candidates into at most `count` runs so that padding each to its largest costs little.

    Args:
        largest: int [C, lengths], in the order of cost. sizes: int [C], batches of each. weight: float [lengths].

    Returns:
        (first, stop) of each run.
    """
    total = len(largest)
    cost = np.full((total, total + 1), np.inf)  # of one run [first, stop)
    for first in range(total):
        tops = np.maximum.accumulate(largest[first:], 0) @ weight
        cost[first, first + 1 :] = tops * np.cumsum(sizes[first:])
    best = np.full((count + 1, total + 1), np.inf)
    best[0, 0] = 0.0
    came_from = np.zeros((count + 1, total + 1), int)
    for runs in range(1, count + 1):
        for stop in range(1, total + 1):
            options = best[runs - 1, :stop] + cost[:stop, stop]
            came_from[runs, stop] = options.argmin()
            best[runs, stop] = options.min()
    runs = int(np.argmax(best[1:, total] <= SLACK * best[1:, total].min())) + 1
    cuts, stop = [], total
    for left in range(runs, 0, -1):
        first = int(came_from[left, stop])
        cuts.append((first, stop))
        stop = first
    return cuts[::-1]
