"""The tiers of an expert store above the disk, and how records move between them.

A record is in one of the tiers, fast and RAM, or in neither. It comes up when it is asked for, goes down one tier when
its slot is needed, and to the disk only if it has changed. A key is `(layer, expert)`.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import PAGESIZE

import torch

from .block_io import DEMAND, PREFETCH, aligned_buffer
from .expert_files import ExpertFiles, Pending
from .expert_policies import POLICIES, EvictionPolicy
from .expert_records import RecordInfo
from .expert_statistics import StoreStats
from .row_windows import RowWindows

Key = tuple[int, int]


class NoRoomError(RuntimeError):
    """Every slot of the fast tier is in use."""


@dataclass
class Tier:
    """
    Rows of memory for records, and the policy by which they leave.

    Args:
        memory (`torch.Tensor` of shape `(rows, bytes)`): The records, in uint8.
        free (`list[int]`): Rows without a record; tiers that share their memory share this list, too.
        capacity (`int`): Records at most.
        policy ([`EvictionPolicy`]): Hears of every use.
    """

    memory: torch.Tensor
    free: list[int]
    capacity: int
    policy: EvictionPolicy
    rows: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, row: int) -> None:
        """Gives a row, which is no longer free, to `key`."""
        self.rows[key] = row
        self.policy.add(key)

    def remove(self, key: Key) -> int:
        """The row of `key`, which is then neither in the tier nor free."""
        self.policy.remove(key)
        return self.rows.pop(key)


@dataclass
class Pool:
    """
    The tiers that a layer, or all of them, keep their experts in.

    Args:
        fast ([`Tier`]), ram ([`Tier`]): The tiers.
        weights (`dict[str, torch.Tensor]`): Views of the weights in the fast one, each `(slots, *shape)`.
        windows ([`RowWindows`], *optional*): What shows some slots side by side, where the memory can.
    """

    fast: Tier
    ram: Tier
    weights: dict[str, torch.Tensor]
    windows: RowWindows | None


@dataclass
class Writing:
    """
    A record on its way to the disk.

    Args:
        memory (`torch.Tensor`): What is written, which must not change meanwhile.
        row (`int`, *optional*): The row in RAM that is free once it has been written.
        info ([`RecordInfo`]): With the checksums of `memory`.
        pending ([`Pending`]): The operations.
    """

    memory: torch.Tensor
    row: int | None
    info: RecordInfo
    pending: Pending


@dataclass
class Reading:
    """
    A record on its way from the disk to its slot.

    Args:
        memory (`torch.Tensor`): The slot.
        target (`torch.Tensor`): What is read to: the slot, or memory on the host in its stead.
        pending ([`Pending`]): The operations.
    """

    memory: torch.Tensor
    target: torch.Tensor
    pending: Pending


class Hold:
    """
    Experts of a layer that stay in the fast tier until they are released, or the hold is forgotten.

    It is what [`~ExpertStore.hold`] returns; their records are there after [`~Hold.wait`].
    """

    def __init__(self, tiers: "ExpertTiers", keys: list[Key]):
        self._tiers, self._keys = tiers, keys
        self.released = False

    def wait(self) -> list[int]:
        """Returns the slots, in the order of the experts, once all are there; raises what reading them has raised."""
        started = time.perf_counter()
        try:
            return self._tiers._finish(self._keys)
        except BaseException:
            self.release()
            raise
        finally:
            self._tiers.stats.stall_seconds += time.perf_counter() - started

    def release(self) -> None:
        """Lets the experts leave again."""
        if not self.released:
            self.released = True
            # Without a lock, because Python may come here in the middle of anything, in any thread.
            self._tiers._released.append(self._keys)

    def __del__(self):
        self.release()


class ExpertTiers:
    """
    Brings records up and down; [`ExpertStore`] adds what they mean.

    Args:
        files ([`ExpertFiles`]): The tier below.
        fast_capacity (`int`), ram_capacity (`int`): Experts in each tier of a pool.
        num_pools (`int`): 1, or as many as there are layers.
        policy (`str`): One of [`POLICIES`].
        staging_records (`int`): Records that may be on their way to the disk.
        device (`torch.device`): Of the fast tier.
    """

    def __init__(
        self,
        files: ExpertFiles,
        fast_capacity: int,
        ram_capacity: int,
        num_pools: int,
        policy: str,
        staging_records: int,
        device: torch.device,
    ):
        self.files, self.layout, self.device = files, files.layout, device
        self.stats = StoreStats()
        self.gradients: dict[Key, dict[str, torch.Tensor]] = {}
        # All pools have their rows in RAM from one buffer, because a row that has left its tier may still be written
        # for a while. Each has one more than its capacity, for an expert that comes down while another one goes up.
        rows = num_pools * (ram_capacity + 1) + staging_records
        self._ram = aligned_buffer(rows, self.layout.memory_bytes, pinned=device.type == "cuda")
        self._free_ram, self._most_writes = list(range(rows))[::-1], staging_records
        self._pools = [self._build_pool(fast_capacity, ram_capacity, policy) for _ in range(num_pools)]
        # Guards all of the below. Copies in memory are made under it, operations on the disk are not.
        self._lock = threading.Condition(threading.RLock())
        self._pins: Counter[Key] = Counter()
        self._released: deque[list[Key]] = deque()
        # Records that come from the disk, and of these the ones that nobody waits for yet. They are not their hold's,
        # which may be forgotten before it is waited for.
        self._loading: set[Key] = set()
        self._readings: dict[Key, Reading] = {}
        # Records in memory that the disk does not have yet, and those on their way to it.
        self._dirty: dict[Key, RecordInfo] = {}
        self._writing: OrderedDict[Key, Writing] = OrderedDict()
        self._wanted: deque[Key] = deque()
        self._prefetching: Key | None = None
        self._prefetched: set[Key] = set()
        self._waiting = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._prefetcher = threading.Thread(target=self._prefetch_wanted, daemon=True)
        self._prefetcher.start()

    def hold(self, layer: int, experts: Sequence[int], counted: bool = True) -> Hold:
        """
        Starts to bring experts to the fast tier; they stay there until the hold is released.

        Args:
            layer (`int`), experts (`Sequence[int]`): Different experts of one layer.
            counted (`bool`, *optional*, defaults to `True`): Whether this is an access for the statistics.

        Raises:
            [`NoRoomError`]: If other holds leave too few slots. Nothing has happened then.
        """
        with self._lock:
            self._check()
            keys = [(layer, expert) for expert in experts]
            for key in keys:
                self._info(key)
            if len(keys) > self.room(layer, experts):
                raise NoRoomError(
                    f"Layer {layer} needs {len(keys)} experts at once, and its fast tier of "
                    f"{self._pool(layer).fast.capacity} has room for {self.room(layer, experts)}: the others are in "
                    "use, such as by forward passes whose backward pass is still to come."
                )
            self._count(self._pool(layer), keys, counted)
            # The slot of what the prefetcher is bringing can be taken only once the disk has filled it.
            self._waiting += 1
            try:
                while self._prefetching is not None and len(keys) > self._room(keys, self._pool(layer).fast):
                    self._lock.wait()
            finally:
                self._waiting -= 1
                self._lock.notify_all()
            return self._hold(keys, DEMAND)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Asks for experts ahead of time; they come in the background, unless the fast tier is full of held ones."""
        with self._lock:
            self._check()
            for expert in experts:
                key = (layer, expert)
                if key not in self._pool(layer).fast.rows and key not in self._wanted:
                    self._info(key)
                    self._wanted.append(key)
                    self.stats.prefetches += 1
            self._lock.notify_all()

    def room(self, layer: int, experts: Sequence[int] = ()) -> int:
        """How many experts of `layer` the fast tier could hold now, with those of `experts` that are held already."""
        with self._lock:
            self._unpin()
            keys = [(layer, expert) for expert in experts]
            return self._room([*keys, self._prefetching], self._pool(layer).fast)

    def resident(self, layer: int) -> set[int]:
        """The experts of `layer` in the fast tier."""
        with self._lock:
            return {expert for owner, expert in self._pool(layer).fast.rows if owner == layer}

    def _room(self, keys: list[Key | None], fast: Tier) -> int:
        return fast.capacity - sum(self._pins[key] > 0 for key in fast.rows if key not in keys)

    def _pool(self, layer: int) -> Pool:
        return self._pools[layer if len(self._pools) > 1 else 0]

    def _build_pool(self, fast_capacity: int, ram_capacity: int, policy: str) -> Pool:
        size, build, windows = self.layout.memory_bytes, POLICIES[policy], None
        if self.device.type != "cpu":
            memory = torch.zeros(fast_capacity, size, dtype=torch.uint8, device=self.device)
        elif self.layout.weights_bytes % PAGESIZE or size % PAGESIZE:
            memory = aligned_buffer(fast_capacity, size)
        else:
            windows = RowWindows(fast_capacity, size, self.layout.weights_bytes)
            memory = windows.memory
        # `data` has a version of its own: that one expert arrives must not invalidate what autograd saved of others.
        return Pool(
            Tier(memory, list(range(fast_capacity))[::-1], fast_capacity, build(fast_capacity)),
            Tier(self._ram, self._free_ram, ram_capacity, build(ram_capacity)),
            self.layout.weights(memory.data),
            windows,
        )

    def _check(self) -> None:
        if self._closed:
            raise ValueError(f"The store in {self.files.folder} is closed.")
        self._unpin()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _info(self, key: Key) -> RecordInfo:
        if key in self._dirty:
            return self._dirty[key]
        return self._writing[key].info if key in self._writing else self.files.info(key)

    def _count(self, pool: Pool, keys: list[Key], counted: bool) -> None:
        for key in keys:
            there = key in pool.fast.rows and key not in self._loading
            self.stats.prefetches_useful += there and key in self._prefetched
            self.stats.prefetches_late += key in self._wanted or (not there and key in self._prefetched)
            self._prefetched.discard(key)
            if counted:
                in_ram = not there and (key in pool.ram.rows or key in self._writing)
                self.stats.hits += there
                self.stats.ram_hits += in_ram
                self.stats.disk_misses += not there and not in_ram

    def _hold(self, keys: list[Key], priority: int) -> Hold:
        hold = Hold(self, keys)
        self._pins.update(keys)
        try:
            # The disk is the slowest: what comes from there is asked for first.
            for key in sorted(keys, key=lambda key: self._find(key) is not None):
                if key in self._wanted:
                    self._wanted.remove(key)
                if key in self._pool(key[0]).fast.rows:
                    self._pool(key[0]).fast.policy.use(key)
                else:
                    self._admit(key, priority)
        except BaseException:
            hold.release()
            raise
        return hold

    def _find(self, key: Key) -> torch.Tensor | None:
        """The record of `key` in memory, if it is there."""
        pool = self._pool(key[0])
        for tier in (pool.fast, pool.ram):
            if key in tier.rows:
                return tier.memory[tier.rows[key]]
        return self._writing[key].memory if key in self._writing else None

    def _admit(self, key: Key, priority: int) -> None:
        """Gives `key` a slot, and starts to read its record if it has to come from the disk."""
        pool = self._pool(key[0])
        slot = self._make_room(pool, key)
        target = memory = pool.fast.memory[slot]
        if key in pool.ram.rows:
            row = pool.ram.remove(key)
            memory.copy_(pool.ram.memory[row])
            pool.ram.free.append(row)
        elif key in self._writing:
            memory.copy_(self._writing[key].memory)
        else:
            try:
                if self.device.type != "cpu":
                    target = aligned_buffer(1, self.layout.memory_bytes, pinned=True)[0]
                self._readings[key] = Reading(memory, target, self.files.read(key, target, priority))
            except BaseException:
                pool.fast.free.append(slot)
                raise
            self._loading.add(key)
        pool.fast.add(key, slot)

    def _make_room(self, pool: Pool, arriving: Key) -> int:
        if pool.fast.free:
            return pool.fast.free.pop()
        leaving = self._victim(pool.fast)
        if leaving is None:
            raise NoRoomError("Every slot of the fast tier is in use.")
        if leaving in self._readings:
            # Its hold was forgotten, but the disk may not have ended.
            self._settle(leaving)
            return self._make_room(pool, arriving)
        ram = pool.ram
        room = ram.capacity + (arriving in ram.rows)
        if ram.capacity > 0 and len(ram.rows) >= room and (dropped := self._victim(ram)) is not None:
            row = ram.rows[dropped]
            if not self._write_back(dropped, ram.memory[row], row):
                ram.free.append(row)
            ram.remove(dropped)
        memory = pool.fast.memory[pool.fast.rows[leaving]]
        if len(ram.rows) < room:
            row = ram.free.pop()
            ram.memory[row].copy_(memory)
            ram.add(leaving, row)
        else:
            self._write_back(leaving, memory, staged=True)
        self.stats.prefetches_wasted += leaving in self._prefetched
        self._prefetched.discard(leaving)
        return pool.fast.remove(leaving)

    def _victim(self, tier: Tier) -> Key | None:
        """The expert that leaves a tier: none that is in use, and one that waits for its update only if all do."""
        free = [key for key in tier.policy.candidates() if self._pins[key] == 0]
        return next((key for key in free if key not in self.gradients), free[0] if free else None)

    def _write_back(self, key: Key, memory: torch.Tensor, row: int | None = None, staged: bool = False) -> bool:
        """
        Starts to write the record `memory` if it has changed, and says so. It is written from where it is, a `row` in
        RAM that is free afterwards, or from a copy if `staged`.
        """
        info = self._dirty.get(key)
        if info is None:
            return False
        if key in self._writing:
            self._finish_write(key)
        while len(self._writing) >= self._most_writes:
            self._finish_write(next(iter(self._writing)))
        if staged:
            row = self._free_ram.pop()
            memory = self._ram[row].copy_(memory)
        info = self.layout.sealed(memory, info)
        self._writing[key] = Writing(memory, row, info, self.files.write(key, memory, info))
        del self._dirty[key]
        self.stats.write_backs += 1
        return True

    def _finish_write(self, key: Key) -> None:
        writing, pool = self._writing[key], self._pool(key[0])
        try:
            writing.pending.result()
        except BaseException:
            # What is in a tier may have been written from there, where another record comes next: it is still to be
            # written. What is nowhere else stays where it is and is written again at once, as the disk may be well by
            # the time that somebody waits for it next.
            if key in pool.fast.rows or key in pool.ram.rows:
                self._dirty.setdefault(key, writing.info)
                self._forget_write(key)
            else:
                writing.pending = self.files.write(key, writing.memory, writing.info)
            raise
        self._forget_write(key)

    def _forget_write(self, key: Key) -> None:
        row = self._writing.pop(key).row
        if row is not None:
            self._free_ram.append(row)

    def _finish_writes(self) -> None:
        """Waits for all writes, and only then raises what the first one that failed has raised."""
        failure = None
        for key in list(self._writing):
            try:
                self._finish_write(key)
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _finish(self, keys: list[Key]) -> list[int]:
        while True:
            for key in keys:
                self._arrive(key)
            with self._lock:
                # What another thread has failed to read is tried again here, where the error belongs.
                for key in keys:
                    if key not in self._pool(key[0]).fast.rows:
                        self._admit(key, DEMAND)
                if not self._loading.intersection(keys):
                    return [self._pool(key[0]).fast.rows[key] for key in keys]

    def _arrive(self, key: Key | None) -> None:
        """Waits until the record of `key` is in its slot if it comes from the disk; raises what reading has raised."""
        with self._lock:
            while key in self._loading and key not in self._readings:
                self._lock.wait()
            reading = self._readings.pop(key, None)
        if reading is None:
            return
        try:
            reading.pending.result()
            if reading.target is not reading.memory:
                reading.memory.copy_(reading.target)
            with self._lock:
                self._loading.discard(key)
                self._lock.notify_all()
        except BaseException:
            self._abandon(key)
            raise

    def _settle(self, key: Key | None) -> None:
        """Waits as well, but for the sake of the slot, to which the disk writes until then."""
        with suppress(Exception):
            self._arrive(key)

    def _abandon(self, key: Key) -> None:
        """Takes back the slot of a record that did not arrive."""
        with self._lock:
            fast = self._pool(key[0]).fast
            self._loading.discard(key)
            self._prefetched.discard(key)
            fast.free.append(fast.remove(key))
            self._lock.notify_all()

    def _unpin(self) -> None:
        while self._released:
            for key in self._released.popleft():
                self._pins[key] -= 1
                if self._pins[key] == 0:
                    del self._pins[key]

    def _prefetch_wanted(self) -> None:
        while True:
            with self._lock:
                while (not self._wanted or self._waiting) and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                key = self._wanted.popleft()
                if key in self._pool(key[0]).fast.rows:
                    continue
                self._unpin()
                self._prefetching = key
            self._bring_ahead(key)

    def _bring_ahead(self, key: Key) -> None:
        hold = None
        try:
            with self._lock:
                hold = self._hold([key], PREFETCH)
                self._prefetched.add(key)
            self._finish([key])
        # Experts in use go first.
        except NoRoomError:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            with self._lock:
                if hold is not None:
                    hold.release()
                self._unpin()
                self._prefetching = None
                self._lock.notify_all()

    def _stop(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._prefetcher.join()
