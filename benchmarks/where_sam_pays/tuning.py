"""Tuning: a search on a lattice of factors √2, the same for every method.

A point is a tuple of whole exponents, one for each hyperparameter. A coarse grid is scored on one seed, its best points
on all seeds; from the best of these the search goes to the best neighbour while that is better. Neighbours differ by 1
in one exponent, or in two with opposite signs, because more decay and less rho may come to the same.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

Point = tuple[int, ...]
Limits = Sequence[tuple[int, int]]
FINALISTS = 8


def search(score: Callable[[Point, int], float], grid: Iterable[Point], limits: Limits, num_seeds: int) -> Point:
    """The point that no neighbour within the limits beats; of equal ones, the first.

    Args:
        score: of a point, on the first so many seeds; the higher the better.
        grid: the points to begin with.
        limits: the lowest and highest exponent on each axis; an axis whose limits are equal is fixed.
        num_seeds: how many there are.
    """
    finalists = sorted(grid, key=lambda point: -score(point, 1))[:FINALISTS]
    here = max(finalists, key=lambda point: score(point, num_seeds))
    while True:
        around = [here, *(point for point in _neighbours(here) if _is_within(point, limits))]
        there = max(around, key=lambda point: score(point, num_seeds))
        if there == here:
            return here
        here = there


def at_edge(point: Point, limits: Limits) -> list[int]:
    """The axes on which a point is at a limit that could have been wider."""
    pairs = enumerate(zip(point, limits, strict=True))
    return [axis for axis, (x, (low, high)) in pairs if low < high and x in (low, high)]


def _is_within(point: Point, limits: Limits) -> bool:
    return all(low <= x <= high for x, (low, high) in zip(point, limits, strict=True))


def _neighbours(point: Point) -> list[Point]:
    moves = [move for move in itertools.product((-1, 0, 1), repeat=len(point)) if _is_along_valley(move)]
    return [tuple(x + dx for x, dx in zip(point, move, strict=True)) for move in moves]


def _is_along_valley(move: Point) -> bool:
    """One step on one axis, or on two with opposite signs."""
    return sum(map(abs, move)) == 1 or (sum(map(abs, move)) == 2 and sum(move) == 0)
