"""What an expert store counts.

An access is an expert that a layer's tokens were sent to, once per forward pass. What the store brings on its own, for
a prefetch, a backward pass or an update, is none.
"""

from dataclasses import asdict, dataclass


@dataclass
class StoreStats:
    """
    What a store has done since it was opened, or since [`~StoreStats.reset`].

    Args:
        hits (`int`): Experts that were in the fast tier when a layer asked for them.
        ram_hits (`int`), disk_misses (`int`): Those that were in RAM, and on disk only.
        prefetches (`int`): Experts that were asked for ahead of time, and were not in the fast tier.
        prefetches_useful (`int`): Those that were there when a layer asked for them.
        prefetches_late (`int`): Those that a layer asked for before they were there.
        prefetches_wasted (`int`): Those that left the fast tier unused.
        write_backs (`int`): Records written to disk because they had changed.
        stall_seconds (`float`): Time that the program has waited for records.
    """

    hits: int = 0
    ram_hits: int = 0
    disk_misses: int = 0
    prefetches: int = 0
    prefetches_useful: int = 0
    prefetches_late: int = 0
    prefetches_wasted: int = 0
    write_backs: int = 0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The fraction of all accesses that found their expert in the fast tier; 0 without any."""
        return self.hits / max(1, self.hits + self.ram_hits + self.disk_misses)

    def reset(self) -> None:
        """Starts to count anew."""
        self.__init__()

    def as_dict(self) -> dict[str, float]:
        """All of it, with the hit rate."""
        return {**asdict(self), "hit_rate": self.hit_rate}
