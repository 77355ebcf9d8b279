"""How much an expert tells about the game: mutual information of game and expert, per layer, and what chance gives.

Shapes: episodes; games; experts. Counts are of the tokens that each expert of a layer was given.
"""

import numpy as np


def mutual_information(counts: np.ndarray) -> float:
    """Of the row and the column of a token, in bits, from counts `(games, experts)`: the plug-in estimate."""
    total = counts.sum()
    if total == 0:
        return 0.0
    joint = counts / total
    rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log2(joint[filled] / (rows * columns)[filled])).sum())


def miller_madow(counts: np.ndarray) -> float:
    """
    The same less its first-order bias (Miller 1955): plug-in information is too high, by about the number of free
    cells over twice the tokens. Tokens of one episode depend on each other, so that some bias stays.
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    cells, rows, columns = ((counts > 0).sum(), (counts.sum(axis=1) > 0).sum(), (counts.sum(axis=0) > 0).sum())
    return mutual_information(counts) - float(cells - rows - columns + 1) / (2 * total * np.log(2))


def entropy(counts: np.ndarray) -> float:
    """In bits, of counts of any shape."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum())


def specialisation(counts: np.ndarray, games: np.ndarray, shuffles: int = 100, seed: int = 0) -> dict[str, float]:
    """
    What one layer's experts tell about the game.

    Args:
        counts (`np.ndarray` of shape `(episodes, experts)`): Tokens of each episode that each expert was given.
        games (`np.ndarray` of shape `(episodes,)`): The game of each episode.
        shuffles (`int`, *optional*, defaults to 100): Permutations of the games over the episodes.
        seed (`int`, *optional*, defaults to 0): Of these.

    Returns:
        `dict[str, float]`: In bits `information` (plug-in), `information_corrected` (Miller-Madow), `shuffled` and
        `shuffled_high`, mean and 95th percentile when whole episodes are given other games, which keeps what the
        tokens of an episode have in common; and `normalised`, the information above `shuffled` as a share of what is
        possible, the lesser entropy of game and expert.
    """
    names = np.unique(games)

    def by_game(labels: np.ndarray) -> np.ndarray:
        return np.stack([counts[labels == name].sum(axis=0) for name in names])

    table = by_game(games)
    random = np.random.default_rng(seed)
    chance = [mutual_information(by_game(random.permutation(games))) for _ in range(shuffles)]
    information, shuffled = mutual_information(table), float(np.mean(chance))
    possible = min(entropy(table.sum(axis=1)), entropy(table.sum(axis=0)))
    return {
        "information": information,
        "information_corrected": miller_madow(table),
        "shuffled": shuffled,
        "shuffled_high": float(np.quantile(chance, 0.95)),
        "normalised": (information - shuffled) / possible if possible > 0 else 0.0,
    }
