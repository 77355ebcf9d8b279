"""All experts of a model in a folder, with those in use in fast memory: weights and optimizer state move together.

The fast tier is one slab of memory, of which the weights are 3-D views `(slots, *shape)`: grouped products run on them
with slots for expert ids. On a machine without an accelerator it is RAM like the tier below.
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .block_io import BlockEngine, PreadEngine, aligned_buffer
from .deep_nvme import DeepNvmeEngine, is_built
from .expert_files import ExpertFiles
from .expert_policies import POLICIES
from .expert_records import RecordInfo, RecordLayout
from .expert_tiers import ExpertTiers, Hold

ENGINES = ("auto", "pread", "deepspeed")


@dataclass
class ExpertStoreConfig:
    """
    How much of the experts is kept where.

    Args:
        nvme_path (`str`): Folder of the store, on a fast disk with room for all experts twice.
        fast_capacity (`int`, *optional*, defaults to 8): Experts in the fast tier, per layer. A batch that needs more
            runs in waves; what a training batch usually needs should fit.
        ram_capacity (`int`, *optional*, defaults to 32): Experts in RAM, per layer, besides those of the fast tier.
        shared_pool (`bool`, *optional*, defaults to `False`): Whether the layers share one tier of each kind, with
            the capacities above in total.
        policy (`str`, *optional*, defaults to `"lru"`): Which expert leaves a full tier: `"lru"`, `"s3fifo"` or
            `"frequency"` (see [`TaskFrequency`]).
        training (`bool`, *optional*, defaults to `True`): Whether experts can be updated. If not, only their weights
            are read and kept.
        engine (`str`, *optional*, defaults to `"auto"`): What moves bytes to and from the disk: `"pread"`, or
            `"deepspeed"` (see [`DeepNvmeEngine`]). `"auto"` takes DeepNVMe beside an accelerator if it is built
            already; on memory that is not pinned it is slower.
        direct_io (`bool`, *optional*, defaults to `True`): Whether to pass the page cache of the system by.
        io_threads (`int`, *optional*, defaults to 2): Operations on the disk at once.
        staging_records (`int`, *optional*, defaults to 4): Records, per store, that may be on their way to the disk,
            in RAM of their own.
        prefetch_next_layer (`bool`, *optional*, defaults to `False`): Whether each layer of an offloaded model, when
            it computes no gradients, asks the next layer's router which experts to bring.
        record_trace (`bool`, *optional*, defaults to `False`): Whether to keep every access for
            [`~ExpertStore.save_trace`].
    """

    nvme_path: str
    fast_capacity: int = 8
    ram_capacity: int = 32
    shared_pool: bool = False
    policy: str = "lru"
    training: bool = True
    engine: str = "auto"
    direct_io: bool = True
    io_threads: int = 2
    staging_records: int = 4
    prefetch_next_layer: bool = False
    record_trace: bool = False

    def __post_init__(self):
        if self.fast_capacity < 1 or self.ram_capacity < 0 or self.staging_records < 1 or self.io_threads < 1:
            raise ValueError(
                f"fast_capacity ({self.fast_capacity}), staging_records ({self.staging_records}) and io_threads "
                f"({self.io_threads}) are at least 1, ram_capacity ({self.ram_capacity}) at least 0."
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {self.policy!r}.")
        if self.engine not in ENGINES:
            raise ValueError(f"engine is one of {', '.join(ENGINES)}, not {self.engine!r}.")
        if self.engine == "deepspeed" and not self.direct_io:
            raise ValueError("The deepspeed engine knows direct I/O only: set direct_io=True, or engine='pread'.")


class ExpertStore(ExpertTiers):
    """
    A store of experts on disk, with tiers of memory above it.

    Opening a folder that has a checkpoint gives the experts of that checkpoint, whatever was written after it. Use it
    as a context manager, or call [`~ExpertStore.close`]. One thread at a time may use it.

    Args:
        config ([`ExpertStoreConfig`]): Folder and capacities.
        parameters (`dict[str, tuple[int, ...]]`): Name and shape of each parameter of one expert.
        num_layers (`int`), num_experts (`int`): How many experts there are.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Of the fast tier.
        identity (`str`, *optional*, defaults to `""`): Of the model: a folder of another one is refused.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig

    >>> config = ExpertStoreConfig(tempfile.mkdtemp(), fast_capacity=2, ram_capacity=1)
    >>> with ExpertStore(config, {"weight": (8, 4)}, num_layers=1, num_experts=16) as store:
    ...     for expert in range(16):
    ...         store.write_weights(0, expert, {"weight": torch.full((8, 4), float(expert))})
    ...     with store.held(0, [3, 11]) as slots:
    ...         store.weights(0)["weight"][slots].mean(dim=(1, 2)).tolist()
    [3.0, 11.0]
    ```
    """

    def __init__(
        self,
        config: ExpertStoreConfig,
        parameters: dict[str, tuple[int, ...]],
        num_layers: int,
        num_experts: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        identity: str = "",
    ):
        self.config = config
        self.num_layers, self.num_experts = num_layers, num_experts
        layout = RecordLayout(
            tuple((name, tuple(shape)) for name, shape in parameters.items()), dtype, config.training
        )
        engine = _build_engine(config, torch.device(device))
        try:
            files = ExpertFiles(config.nvme_path, layout, num_layers, num_experts, engine, identity)
        except BaseException:
            engine.close()
            raise
        self.trace: list[tuple[Hashable, int, list[int]]] = []
        self.task: Hashable = None
        self._copying: Future | None = None
        self._copier = ThreadPoolExecutor(1)
        super().__init__(
            files,
            config.fast_capacity,
            config.ram_capacity,
            1 if config.shared_pool else num_layers,
            config.policy,
            config.staging_records,
            torch.device(device),
        )

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, Any]:
        """What was saved with the last checkpoint."""
        return self.files.metadata

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of all slots of a layer's fast tier: by name, `(slots, *shape)`, without a copy."""
        return self._pool(layer).weights

    def side_by_side(self, layer: int, slots: list[int]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """
        The weights of some slots alone, `(len(slots), *shape)` without a copy, and the place of each slot in them.

        What is computed for all of them, such as a gradient, then costs nothing for the other slots. Memory that
        cannot show them so, such as that of an accelerator, gives all slots.
        """
        windows = self._pool(layer).windows
        if windows is None:
            return self.weights(layer), slots
        return self.layout.weights(windows.window(slots)), list(range(len(slots)))

    def memory(self, layer: int, slot: int) -> torch.Tensor:
        """The record in a slot, uint8 `(layout.memory_bytes,)`."""
        return self._pool(layer).fast.memory[slot]

    def info(self, layer: int, expert: int) -> RecordInfo:
        """Version, and updates so far, of an expert."""
        with self._lock:
            return self._info((layer, expert))

    def set_task(self, task: Hashable) -> None:
        """Tells the policies which task, such as an environment, the accesses from now on are for."""
        with self._lock:
            self.task = task
            for pool in self._pools:
                pool.fast.policy.set_task(task)
                pool.ram.policy.set_task(task)

    def hold(self, layer: int, experts: Sequence[int], counted: bool = True) -> Hold:
        """See [`~ExpertTiers.hold`]."""
        if counted and self.config.record_trace:
            self.trace.append((self.task, layer, list(experts)))
        return super().hold(layer, experts, counted)

    @contextmanager
    def held(self, layer: int, experts: Sequence[int], counted: bool = True) -> Iterator[list[int]]:
        """The slots of experts, which stay there for the time of a block."""
        hold = self.hold(layer, experts, counted)
        try:
            yield hold.wait()
        finally:
            hold.release()

    def mark_updated(self, layer: int, expert: int, step: int) -> None:
        """Notes that update number `step` of the model has changed the record of an expert that is held."""
        with self._lock:
            self._dirty[layer, expert] = self._info((layer, expert)).updated(step)

    def add_gradient(self, layer: int, expert: int, gradient: dict[str, torch.Tensor]) -> None:
        """Adds to the gradient of an expert; it is kept in float32 where the optimizer works on a copy in float32."""
        if "master" in self.layout.sections:
            gradient = {name: part.float() for name, part in gradient.items()}
        with self._lock:
            known = self.gradients.setdefault((layer, expert), gradient)
            if known is not gradient:
                for name, part in gradient.items():
                    known[name] += part

    def clear_gradients(self) -> None:
        """Forgets all gradients."""
        with self._lock:
            self.gradients.clear()

    @torch.no_grad()
    def read_weights(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """A copy of an expert's weights on the host, from wherever they are; no expert moves."""
        key, part = (layer, expert), slice(self.layout.weights_bytes)
        memory = aligned_buffer(1, self.layout.memory_bytes)[0]
        with self._lock:
            self._check()
            self._wait_for(key)
            source = self._find(key)
            if source is not None:
                memory[part].copy_(source[part])
            else:
                pending = self.files.read(key, memory)
        if source is None:
            pending.result()
        return self.layout.weights(memory)

    @torch.no_grad()
    def write_weights(self, layer: int, expert: int, weights: dict[str, torch.Tensor]) -> None:
        """Gives an expert other weights, and the optimizer's state of one that was never updated."""
        key, memory = (layer, expert), aligned_buffer(1, self.layout.memory_bytes)[0]
        for name, view in self.layout.weights(memory).items():
            view.copy_(weights[name])
        self.layout.reset_state(memory)
        with self._lock:
            self._check()
            self._wait_for(key)
            known = key in self._dirty or key in self._writing or key in self.files.infos
            self._dirty[key] = RecordInfo(version=self._info(key).version if known else 0)
            pool = self._pool(layer)
            if key in pool.fast.rows or key in pool.ram.rows:
                self._find(key).copy_(memory)
            else:
                try:
                    self._write_back(key, memory)
                except BaseException:
                    # It is as it was, and what is in no tier is on the disk or on its way there.
                    self._dirty.pop(key, None)
                    raise

    def checkpoint(self, path: str | Path | None = None, metadata: dict[str, Any] | None = None) -> Future | None:
        """
        Makes the experts as they are now what the folder opens with.

        Args:
            path (`str` or `Path`, *optional*): A folder to copy them to as well, in the background. What has not
                changed since the last copy is linked, where the file system can.
            metadata (`dict`, *optional*): Anything that JSON can hold, such as the step of the trainer, to find in
                [`~ExpertStore.metadata`] of the store that opens it. Gradients are not part of a checkpoint.

        Returns:
            `Future`, *optional*: Of the copy. If it fails, the next call to the store raises the error as well.
        """
        self.wait_for_copy()
        with self._lock:
            self._check()
            try:
                for pool in self._pools:
                    for tier in (pool.fast, pool.ram):
                        for key, row in tier.rows.items():
                            # Nothing changes it before all is written, so that the host writes it from where it is.
                            memory = tier.memory[row]
                            self._write_back(key, memory, staged=memory.device.type != "cpu")
            finally:
                self._finish_writes()
            self.files.commit(metadata or {})
        if path is not None:
            self._copying = self._copier.submit(self.files.copy_checkpoint, path)
        return self._copying

    def wait_for_copy(self) -> None:
        """Waits for the copy of the last checkpoint; raises the error if it failed."""
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def checkpoint_moved(self, path: str | Path) -> None:
        """Takes note of where the copy of the last checkpoint is, after it has been moved to `path`."""
        self.wait_for_copy()
        self.files.copy_moved(path)

    def restore(self, path: str | Path) -> None:
        """
        Takes the experts from a copy of a checkpoint, instead of those of the folder. If that fails, they are those of
        the last checkpoint; they stay as they are if some are in use, or if a write that was under way has failed.
        """
        self.wait_for_copy()
        with self._lock:
            self._check()
            self._wanted.clear()
            self._wait_for(self._prefetching)
            if any(self._pins.values()):
                raise RuntimeError("Experts are in use: restore between steps.")
            for key in list(self._readings):
                self._settle(key)
            self._finish_writes()
            for pool in self._pools:
                for tier in (pool.fast, pool.ram):
                    for key in list(tier.rows):
                        tier.free.append(tier.remove(key))
            self._dirty.clear()
            self.gradients.clear()
            self.files.restore(path)

    def save_trace(self, path: str | Path) -> None:
        """Writes every access so far, a line of JSON for each: task, layer and experts."""
        lines = (json.dumps({"task": task, "layer": layer, "experts": experts}) for task, layer, experts in self.trace)
        Path(path).write_text("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Frees memory, files and the folder. What changed since the last checkpoint is gone."""
        if self._closed:
            return
        self._stop()
        self._copier.shutdown()
        self.files.close()
        self._pools.clear()
        del self._ram
        self.wait_for_copy()

    def _check(self) -> None:
        super()._check()
        if self._copying is not None and self._copying.done():
            self.wait_for_copy()

    def _wait_for(self, key: tuple[int, int] | None) -> None:
        self._settle(key)
        while key is not None and key == self._prefetching:
            self._lock.wait()


def _build_engine(config: ExpertStoreConfig, device: torch.device) -> BlockEngine:
    usable = config.direct_io and device.type == "cuda"
    if config.engine == "deepspeed" or (config.engine == "auto" and usable and is_built()):
        return DeepNvmeEngine(config.io_threads)
    return PreadEngine(config.io_threads, config.direct_io)
