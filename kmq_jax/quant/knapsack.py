"""The multiple-choice knapsack, solved exactly: of each class one choice, of the least total cost within a size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ROUNDING = 1e-9  # relative: a bound that exceeds the best known total by less is not told from it


class _Step(NamedTuple):
    """A step along the lower convex hull of a class's choices, by size."""

    slope: float  # cost by size, negative; steps of a class have rising ones
    owner: int  # the class
    size: float  # what it adds
    saved: float  # the cost that it takes off
    choice: int  # where it ends


def _hull(owner: int, cost: np.ndarray, size: np.ndarray) -> tuple[int, list[_Step]]:
    """The smallest choice of a class, and the steps from there to its cheapest."""
    at = int(np.lexsort((cost, size))[0])
    first, steps = at, []
    while len(larger := np.flatnonzero((size > size[at]) & (cost < cost[at]))):
        slopes = (cost[larger] - cost[at]) / (size[larger] - size[at])
        to = int(larger[np.argmin(slopes)])
        steps.append(_Step(float(slopes.min()), owner, float(size[to] - size[at]), float(cost[at] - cost[to]), to))
        at = to
    return first, steps


def cheapest(costs: Sequence[np.ndarray], sizes: Sequence[np.ndarray], budget: float) -> list[int]:
    """Chooses one of each class so that the costs sum to the least that fits.

    Classes are added one by one to a list of partial sums. Of these stay those that no other beats in both size and
    cost, and whose bound does not exceed what a greedy choice costs: the rest of the classes along their convex hulls,
    where a step may be taken in part (Dyer, Riha and Walker, J. Comput. Appl. Math. 58(1), 1995).

    >>> cheapest([np.array([9.0, 1.0]), np.array([9.0, 2.0])], [np.array([10.0, 20.0])] * 2, budget=30.0)
    [1, 0]

    Args:
        costs: of each class, those of its choices `[choices]`, none negative.
        sizes: likewise; whole numbers, so that their sums are exact.
        budget: what the sizes may sum to; the smallest choices must fit.

    Returns:
        The place of the choice in each class.
    """
    hulls = [_hull(owner, cost, size) for owner, (cost, size) in enumerate(zip(costs, sizes))]
    steps = sorted(step for _, own in hulls for step in own)
    smallest = np.array([size.min() for size in sizes])
    least = np.array([cost.min() for cost in costs])
    known = _greedy([first for first, _ in hulls], costs, steps, budget - smallest.sum())

    size, cost = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # of each class: the sum that each one goes on from, and its choice
    for owner, (own_costs, own_sizes) in enumerate(zip(costs, sizes)):
        size, cost = (size[:, None] + own_sizes).ravel(), (cost[:, None] + own_costs).ravel()
        later = [step for step in steps if step.owner > owner]
        added = np.cumsum([0.0] + [step.size for step in later])
        # Summed from the cheapest end, where nothing cancels.
        rest = least[owner + 1 :].sum() + np.cumsum([0.0] + [step.saved for step in reversed(later)])[::-1]
        room = budget - size - smallest[owner + 1 :].sum()
        bound = cost + np.interp(room, added, rest)
        kept = np.flatnonzero((room >= 0) & (bound <= known * (1 + _ROUNDING)))
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        before = np.minimum.accumulate(cost[kept])
        kept = kept[np.concatenate([[True], cost[kept][1:] < before[:-1]])]
        trail.append((kept // len(own_costs), kept % len(own_costs)))
        size, cost = size[kept], cost[kept]

    at, chosen = int(np.argmin(cost)), []
    for came_from, choice in reversed(trail):
        chosen.append(int(choice[at]))
        at = int(came_from[at])
    return chosen[::-1]


def _greedy(first: list[int], costs: Sequence[np.ndarray], steps: Sequence[_Step], room: float) -> float:
    """The total cost of taking steps as they fit, the most saving for their size first."""
    chosen, closed = list(first), set()
    for step in steps:
        if step.owner not in closed and step.size <= room:
            room -= step.size
            chosen[step.owner] = step.choice
        else:
            closed.add(step.owner)
    return float(sum(cost[choice] for cost, choice in zip(costs, chosen)))
