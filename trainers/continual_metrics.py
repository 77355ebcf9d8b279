"""How much is forgotten and carried over when games are learned one after another.

Returns are in matrices `(phases + 1, games)`: the first row is of the agent before any game, each other one of the
agent after a phase. `trained[p]` is the number of the game of phase `p`.
"""

from collections.abc import Sequence

import numpy as np


def normalise(returns: np.ndarray, random: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns `(..., games)` on a scale on which chance is 0 and `reference` 1; nan where this is no better."""
    span = np.asarray(reference, dtype=float) - random
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(span > 1e-9, (np.asarray(returns) - random) / span, np.nan)


def own_reference(returns: np.ndarray, trained: Sequence[int]) -> np.ndarray:
    """For each game the return just after it was first learned, `(games,)`: the scale where no other is given."""
    first = [
        list(trained).index(game) + 1 if game in trained else len(returns) - 1 for game in range(returns.shape[1])
    ]
    return returns[first, np.arange(returns.shape[1])]


def average_forgetting(scores: np.ndarray, trained: Sequence[int]) -> float:
    """
    Mean over the games of the score at the end of their own (last) training less the score at the very end.

    As in Continual World (Wolczyk et al. 2021, arXiv:2105.10919), but for the game that was learned last: it cannot
    have been forgotten, and is left out of the mean, where they count it as 0. nan if no other game has a score.
    """
    last = {game: phase for phase, game in enumerate(trained)}
    lost = [scores[phase + 1, game] - scores[-1, game] for game, phase in last.items() if game != trained[-1]]
    # Games that have no scale have no score.
    known = [loss for loss in lost if not np.isnan(loss)]
    return float(np.mean(known)) if known else float("nan")


def backward_transfer(scores: np.ndarray, trained: Sequence[int]) -> float:
    """As in Lopez-Paz and Ranzato (2017, arXiv:1706.08840): what later games gave to earlier ones."""
    return -average_forgetting(scores, trained)


def isolated_forgetting(returns: np.ndarray, trained: Sequence[int]) -> np.ndarray:
    """
    CORA's `F(i, j)` (Powers et al. 2021, arXiv:2110.10067): what game `i` loses while `j` is learned after it, as a
    share of the largest return in size that `i` had; `(games, games)`, nan where `i` was not learned before `j`.
    """
    return _changes(-returns, trained, after=True)


def zero_shot_transfer(returns: np.ndarray, trained: Sequence[int]) -> np.ndarray:
    """CORA's `Z(i, j)`: what game `i` gains, on the same scale, while `j` is learned before it."""
    return _changes(returns, trained, after=False)


def _changes(returns: np.ndarray, trained: Sequence[int], after: bool) -> np.ndarray:
    games = returns.shape[1]
    largest = np.abs(returns).max(axis=0)
    result = np.full((games, games), np.nan)
    for phase, learned in enumerate(trained):
        for game in range(games):
            known = game in trained[:phase]
            if game != learned and known == after and largest[game] > 0:
                change = (returns[phase + 1, game] - returns[phase, game]) / largest[game]
                result[game, learned] = np.nansum([result[game, learned], change])
    return result


def area_under_curve(curve: Sequence[tuple[float, float]], steps: float) -> float:
    """Mean height of a curve of `(step, score)` from its first point on until `steps`."""
    points = np.array(sorted(curve), dtype=float)
    if len(points) == 0:
        return float("nan")
    grid = np.linspace(0, steps, 200)
    return float(np.interp(grid, points[:, 0], points[:, 1]).mean())


def forward_transfer(area: float, single_area: float) -> float:
    """Continual World's: the area under a game's curve against that of learning it from nothing, as a share of the
    area above the latter."""
    return (area - single_area) / (1 - single_area) if single_area < 1 else float("nan")
