"""Which expert leaves a tier when another one has to come in.

A key names an expert, such as `(layer, expert)`. A policy hears of every use, arrival and departure.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Protocol

Key = Hashable


class EvictionPolicy(Protocol):
    """What a tier asks of a policy. One instance serves one tier."""

    def add(self, key: Key) -> None:
        """`key` has arrived."""

    def use(self, key: Key) -> None:
        """`key`, which is there, is used."""

    def remove(self, key: Key) -> None:
        """`key` has left, by this policy's choice or not."""

    def candidates(self) -> Iterator[Key]:
        """The keys that are there, first the one that should leave first."""

    def set_task(self, task: Hashable) -> None:
        """From now on the uses are those of `task`."""


class LeastRecentlyUsed:
    """Evicts the expert whose last use is the longest ago."""

    def __init__(self, capacity: int):
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        """`key` has arrived."""
        self._keys[key] = None

    def use(self, key: Key) -> None:
        """`key`, which is there, is used."""
        self._keys.move_to_end(key)

    def remove(self, key: Key) -> None:
        """`key` has left."""
        del self._keys[key]

    def candidates(self) -> Iterator[Key]:
        """The keys that are there, the longest unused first."""
        return iter(list(self._keys))

    def set_task(self, task: Hashable) -> None:
        """Does nothing: recency knows no tasks."""


class SmallMainQueues:
    """
    S3-FIFO (Yang et al. 2023, SOSP): experts that are used once pass through a small queue, the others stay.

    A tenth of the tier is for newcomers. One that is used again there moves to the main queue, where each use buys
    another round; one that is not leaves, and goes straight to the main queue should it come back soon.
    """

    def __init__(self, capacity: int):
        self._small_capacity = max(1, capacity // 10)
        self._ghost_capacity = capacity
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghosts: deque[Key] = deque()

    def add(self, key: Key) -> None:
        """`key` has arrived."""
        (self._main if key in self._ghosts else self._small)[key] = 0

    def use(self, key: Key) -> None:
        """`key`, which is there, is used."""
        home = self._small if key in self._small else self._main
        home[key] = min(home[key] + 1, 3)

    def remove(self, key: Key) -> None:
        """`key` has left."""
        if key in self._small:
            del self._small[key]
            self._ghosts.append(key)
            if len(self._ghosts) > self._ghost_capacity:
                self._ghosts.popleft()
        else:
            del self._main[key]

    def candidates(self) -> Iterator[Key]:
        """The keys that are there, in the order in which the queues give them up."""
        self._promote()
        queues = [list(self._small), sorted(self._main, key=self._main.get)]
        if len(self._small) <= self._small_capacity and self._main:
            self._rotate()
            queues = [list(self._main), list(self._small)]
        return iter(queues[0] + queues[1])

    def _promote(self) -> None:
        # Only where the small queue has to give one up, as in the paper.
        while len(self._small) > self._small_capacity:
            key = next(iter(self._small))
            if self._small[key] == 0:
                return
            del self._small[key]
            self._main[key] = 0

    def _rotate(self) -> None:
        while (uses := self._main[key := next(iter(self._main))]) > 0:
            del self._main[key]
            self._main[key] = uses - 1

    def set_task(self, task: Hashable) -> None:
        """Does nothing: the queues know no tasks."""


class TaskFrequency:
    """
    Evicts the expert that the current task uses least, by an exponential average over its accesses.

    What a task used is remembered while another one runs, so that coming back does not start from nothing. Experts of
    the same frequency leave in the order of their last use.

    Args:
        capacity (`int`): Experts in the tier.
        half_life (`float`, *optional*): Accesses after which a use counts a half; 16 times the tier if unset.
    """

    def __init__(self, capacity: int, half_life: float | None = None):
        self._growth = 2 ** (1 / (half_life or 16 * max(capacity, 1)))
        self._weight = 1.0
        self._clock = 0
        self._task: Hashable = None
        self._scores: dict[Hashable, Counter] = {None: Counter()}
        self._last_use: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """`key` has arrived."""
        self._last_use[key] = 0
        self.use(key)

    def use(self, key: Key) -> None:
        """`key`, which is there, is used."""
        # Later uses weigh more, instead of earlier ones less, which would touch every score at every use.
        self._weight *= self._growth
        self._clock += 1
        self._scores[self._task][key] += self._weight
        self._last_use[key] = self._clock
        if self._weight > 1e100:
            self._scores = {
                task: Counter({other: score / self._weight for other, score in scores.items()})
                for task, scores in self._scores.items()
            }
            self._weight = 1.0

    def remove(self, key: Key) -> None:
        """`key` has left; what is known of its uses stays."""
        del self._last_use[key]

    def candidates(self) -> Iterator[Key]:
        """The keys that are there, the least used of the current task first."""
        scores = self._scores[self._task]
        return iter(sorted(self._last_use, key=lambda key: (scores[key], self._last_use[key])))

    def set_task(self, task: Hashable) -> None:
        """From now on the uses are those of `task`."""
        self._task = task
        self._scores.setdefault(task, Counter())


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "s3fifo": SmallMainQueues,
    "frequency": TaskFrequency,
}


def replay_hits(batches: Iterable[Sequence[Key]], policy: EvictionPolicy, capacity: int) -> int:
    """
    How many accesses would have found their expert in a tier of `capacity` under `policy`.

    Args:
        batches (`Iterable[Sequence[Key]]`): The different experts of each batch; those that are there are used first.
        policy ([`EvictionPolicy`]): New.
        capacity (`int`): Experts in the tier.
    """
    present: set[Key] = set()
    hits = 0
    for batch in batches:
        there = [key for key in batch if key in present]
        hits += len(there)
        for key in there:
            policy.use(key)
        pinned = set(there)
        for key in batch:
            if key in pinned:
                continue
            if len(present) >= capacity:
                # As in a store, those of the batch itself leave only if they are more than the tier holds.
                victims = list(policy.candidates())
                victim = next((other for other in victims if other not in pinned), victims[0])
                policy.remove(victim)
                present.remove(victim)
            policy.add(key)
            present.add(key)
            pinned.add(key)
    return hits


def optimal_hits(batches: Iterable[Sequence[Key]], capacity: int) -> int:
    """
    The most hits that any policy could have: keeping what is needed the soonest (Belady 1966).

    Needs to know the future, so it is a bound for recorded accesses and no policy. The arguments are those of
    [`replay_hits`].
    """
    batches = list(batches)
    following: list[dict[Key, int]] = []
    next_use: dict[Key, int] = {}
    for position in range(len(batches) - 1, -1, -1):
        following.append({key: next_use.get(key, len(batches)) for key in batches[position]})
        next_use |= dict.fromkeys(batches[position], position)
    present: dict[Key, int] = {}
    hits = 0
    for batch in batches:
        hits += len(present.keys() & set(batch))
        present |= following.pop()
        present = dict(sorted(present.items(), key=lambda entry: entry[1])[:capacity])
    return hits
