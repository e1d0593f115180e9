"""Put pieces of many lengths into rows of one length, with little room left over."""

import numpy as np


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: each piece, longest first, goes where the least room is left.

    Pieces of one size are placed together, so the work grows with the number of different sizes.
    The places do not depend on which piece of a size takes which: a shuffle needs no new packing.

    Args:
        sizes: room each piece takes, in 1..capacity.
        capacity: room of a row.

    Returns:
        order: places, numbered by falling size, grouped by row, int64 [pieces].
        bounds: where each row begins and ends in `order`, int64 [rows + 1].
    """
    capacity = min(capacity, max(int(sizes.sum()), 1))  # a row takes no more than there is
    different, counts = np.unique(sizes, return_counts=True)
    open_rows: dict[int, list[np.ndarray]] = {}  # room left -> rows
    available = 0  # bit r is set where open_rows[r] has rows
    rows = 0
    placed = []

    def leave_open(room: int, group: np.ndarray) -> None:
        nonlocal available
        if room and len(group):
            open_rows.setdefault(room, []).append(group)
            available |= 1 << room

    for size, count in zip(different[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = available >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                group = np.concatenate(open_rows.pop(room))
                available &= ~(1 << room)
                each = room // size
                needed = min(-(-count // each), len(group))
                leave_open(room, group[needed:])
                group = group[:needed]
            else:
                room, each = capacity, capacity // size
                needed = -(-count // each)
                group = np.arange(rows, rows + needed)
                rows += needed
            here = min(count, needed * each)
            placed.append(np.repeat(group, each)[:here])
            in_last = here - each * (needed - 1)
            leave_open(room - each * size, group[:-1])
            leave_open(room - in_last * size, group[-1:])
            count -= here
    row_of = np.concatenate(placed) if placed else np.empty(0, np.int64)
    return np.argsort(row_of, kind="stable"), _bounds(np.bincount(row_of, minlength=rows))


def in_order(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill each row with the next pieces until one does not fit; keeps the pieces' order.

    Returns:
        order: 0, 1, ..., and bounds, as in `best_fit`.
    """
    ends = np.cumsum(sizes)
    bounds, used = [0], 0
    while bounds[-1] < len(sizes):
        bounds.append(int(np.searchsorted(ends, used + capacity, side="right")))
        used = int(ends[bounds[-1] - 1])
    return np.arange(len(sizes)), np.array(bounds)


def one_each(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row for each piece."""
    return np.arange(len(sizes)), np.arange(len(sizes) + 1)


def _bounds(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
