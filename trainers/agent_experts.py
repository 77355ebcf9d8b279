"""The experts of an agent that learns, in memory or in a store: updates, checkpoints, and prefetches."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from ..modeling import (
    ExpertStore,
    ExpertStoreConfig,
    LazyAdamW,
    TieredMoeConfig,
    TieredMoeForActorCritic,
    initialize_offloaded,
    load_offloaded,
)
from ..modeling.expert_files import MANIFEST
from ..modeling.expert_statistics import StoreStats
from ..modeling.lazy_adamw import clip_grad_norm_
from ..modeling.lazy_adamw_in_memory import InMemoryLazyAdamW
from .checkpoints import EXPERTS
from .continual_ppo_config import AgentArguments, ContinualPpoConfig
from .whole_files import nearest_existing

Key = tuple[int, int]


class AgentExperts:
    """
    An agent, its optimizer, and its store if it has one.

    Args:
        agent ([`TieredMoeForActorCritic`]): With its experts in memory, or in `store`.
        store ([`ExpertStore`], *optional*): Where they are.
        config ([`ContinualPpoConfig`]): Of the learning.
    """

    def __init__(self, agent: TieredMoeForActorCritic, store: ExpertStore | None, config: ContinualPpoConfig):
        self.agent, self.store, self.config = agent, store, config
        self.modules = [layer.mlp.experts for layer in agent.model.layers]
        # What the detector learns from must not count in the norm by which the agent's gradient is clipped.
        detector = list(agent.model.detector.parameters())
        self.fused = [] if store else [part for module in self.modules for part in module.parameters()]
        held = {*detector, *self.fused}
        self.rest = [parameter for parameter in agent.parameters() if parameter not in held]
        self.optimizer = self._build_optimizer()
        self.detector_optimizer = torch.optim.Adam(detector, lr=3e-3)
        # (layers, experts): those that do not learn any more.
        self.frozen = torch.zeros(len(self.modules), agent.config.num_experts, dtype=torch.bool)
        self._last_stats = StoreStats()

    @property
    def is_lazy(self) -> bool:
        """Whether experts without a gradient stay as they are."""
        return self.store is not None or self.config.optimizer == "lazy"

    def _build_optimizer(self) -> torch.optim.Optimizer:
        given = {"lr": self.config.learning_rate, "eps": self.config.adam_eps, "weight_decay": 0.0}
        if self.store:
            return LazyAdamW(self.store, self.rest, **given)
        if self.config.optimizer == "lazy":
            return InMemoryLazyAdamW(self.modules, self.rest, **given)
        return torch.optim.AdamW([*self.fused, *self.rest], **given, fused=True)

    def set_learning_rate(self, rate: float) -> None:
        """Of everything but the detector."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def gradients(self) -> dict[Key, dict[str, Tensor]]:
        """The gradients of each expert that has one, as views; not with dense Adam, where all have."""
        if self.store:
            return self.store.gradients
        return {
            (layer, expert): {name: part.grad[expert] for name, part in self.modules[layer].named_parameters()}
            for layer, expert in self.optimizer.touched
        }

    def weights(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The weights of one expert: views, or of a store copies on the host."""
        if self.store:
            return self.store.read_weights(layer, expert)
        return {name: part.detach()[expert] for name, part in self.modules[layer].named_parameters()}

    def add_empty_gradient(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Gives an expert that has no gradient one that is 0, and returns it."""
        if self.store:
            shapes = dict(self.store.layout.parameters)
            zeros = {name: torch.zeros(shape, device=self.store.device) for name, shape in shapes.items()}
            self.store.add_gradient(layer, expert, zeros)
            return self.store.gradients[layer, expert]
        for part in self.modules[layer].parameters():
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        self.optimizer.touched.add((layer, expert))
        return {name: part.grad[expert] for name, part in self.modules[layer].named_parameters()}

    def freeze(self, used: Tensor) -> None:
        """Experts `(layers, experts)` that are true in `used` do not learn from now on."""
        self.frozen |= used

    def step(self) -> Tensor:
        """
        An update by the gradients, clipped by the norm of them all, which is returned.

        Where experts have a learning rule of their own, whose scale is another one, it is the norm of the rest.
        """
        if self.frozen.any():
            self._forget_frozen()
        if self.config.learns_locally:
            norm = torch.nn.utils.clip_grad_norm_(self.rest, self.config.max_grad_norm)
        elif self.store:
            norm = clip_grad_norm_(self.rest, self.store, self.config.max_grad_norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_([*self.fused, *self.rest], self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _forget_frozen(self) -> None:
        for layer, expert in self.frozen.nonzero().tolist():
            if self.store:
                self.store.gradients.pop((layer, expert), None)
            elif (layer, expert) in self.optimizer.touched:
                self.optimizer.touched.discard((layer, expert))
                for part in self.modules[layer].parameters():
                    part.grad[expert] = 0

    def set_task(self, task: str) -> None:
        """Tells the store which game it is."""
        if self.store:
            self.store.set_task(task)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """What is played here counts nowhere, and leaves in the fast tier what it has found there."""
        if not self.store:
            yield
            return
        task, layers = self.store.task, range(len(self.modules))
        present = [self.store.resident(layer) for layer in layers]
        recorded = len(self.store.trace)
        self.set_task("evaluation")
        try:
            yield
        finally:
            self.set_task(task)
            del self.store.trace[recorded:]
            for layer in layers:
                with self.store.held(layer, sorted(present[layer]), counted=False):
                    pass
            self.take_stats()

    def take_stats(self) -> dict[str, float]:
        """What the store has done since the last call; empty without one."""
        if not self.store:
            return {}
        now, before = self.store.stats.as_dict(), self._last_stats.as_dict()
        self._last_stats = StoreStats(**{name: value for name, value in now.items() if name != "hit_rate"})
        since = StoreStats(**{name: now[name] - before[name] for name in now if name != "hit_rate"})
        accesses = max(1, since.hits + since.ram_hits + since.disk_misses)
        return {
            **since.as_dict(),
            "ram_hit_rate": since.ram_hits / accesses,
            "miss_rate": since.disk_misses / accesses,
            "accesses": since.hits + since.ram_hits + since.disk_misses,
        }

    def save(self, folder: Path) -> dict:
        """
        Writes the agent and its optimizers to the folder of a checkpoint.

        Returns:
            `dict`: What belongs to it and is no tensor, for JSON.
        """
        weights = {name: part.detach().contiguous() for name, part in self.agent.state_dict().items()}
        save_file(weights, folder / "agent.safetensors")
        tensors, groups = {}, {}
        for name, optimizer in (("agent", self.optimizer), ("detector", self.detector_optimizer)):
            state = optimizer.state_dict()
            groups[name] = state["param_groups"]
            for number, parts in state["state"].items():
                tensors |= {f"{name}.{number}.{part}": value.contiguous() for part, value in parts.items()}
        save_file({**tensors, "frozen": self.frozen}, folder / "optimizer.safetensors")
        if self.store:
            self.store.checkpoint(folder / EXPERTS).result()
        return {"optimizer_groups": groups}

    def load(self, folder: Path, record: dict) -> None:
        """Takes everything from a checkpoint; `record` is what [`~AgentExperts.save`] has returned."""
        self.agent.load_state_dict(load_file(folder / "agent.safetensors"))
        tensors = load_file(folder / "optimizer.safetensors")
        self.frozen = tensors.pop("frozen")
        for name, optimizer in (("agent", self.optimizer), ("detector", self.detector_optimizer)):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, number, part = key.split(".")
                if owner == name:
                    state.setdefault(int(number), {})[part] = value
            optimizer.load_state_dict({"state": state, "param_groups": record["optimizer_groups"][name]})
        if self.store:
            self.store.restore(folder / EXPERTS)

    def close(self) -> None:
        """Frees the store."""
        if self.store:
            self.store.close()


def prefetch_experts(store: ExpertStore, experts: Tensor) -> None:
    """Asks a store for experts `(layers, count)` ahead of time; -1 is none."""
    for layer, wanted in enumerate(experts.tolist()):
        store.prefetch(layer, [expert for expert in wanted if expert >= 0])


class PrefetchTrial:
    """
    How well the experts of a game are foretold when it begins, and how long before they are needed.

    Args:
        experts ([`AgentExperts`]): With a store.
        kind (`str`): `none`, `recency` or `detector`: whose forecast is acted on; both are judged.
        frames (`torch.Tensor`): What is seen as the game begins.
    """

    def __init__(self, experts: AgentExperts, kind: str, frames: Tensor):
        detector = experts.agent.model.detector
        capacity = experts.agent.config.hbm_capacity
        self.forecasts = {
            "recency": detector.recent_experts(capacity),
            "detector": detector.predict_experts(frames, capacity),
        }
        self.leads: dict[int, float] = {}
        self._began = time.perf_counter()
        self._handles = [
            module.register_forward_pre_hook(lambda *_, layer=layer: self._arrived(layer))
            for layer, module in enumerate(experts.modules)
        ]
        if kind != "none":
            prefetch_experts(experts.store, self.forecasts[kind])

    def _arrived(self, layer: int) -> None:
        self.leads.setdefault(layer, time.perf_counter() - self._began)

    def finish(self, used: Sequence[set[int]]) -> dict[str, float]:
        """
        Figures, given the experts that the first rollout has used, by layer.

        Returns:
            `dict[str, float]`: `lead_ms`, mean over layers of the time from the forecast to the first use; and for
            each forecast `recall`, the share of the used experts that it named.
        """
        for handle in self._handles:
            handle.remove()
        figures = {"lead_ms": 1000 * sum(self.leads.values()) / max(1, len(self.leads))}
        total = max(1, sum(map(len, used)))
        for name, forecast in self.forecasts.items():
            named = sum(len(own & set(row)) for own, row in zip(used, forecast.tolist(), strict=True))
            figures[f"{name}_recall"] = named / total
        return figures


def build_agent(arguments: AgentArguments, model_config: TieredMoeConfig, config: ContinualPpoConfig) -> AgentExperts:
    """
    A new agent or that of a checkpoint, with its experts in the store that is asked for.

    Experts that go to a store are never in memory all at once.
    """
    torch.manual_seed(config.seed)
    known = arguments.model_name_or_path
    if not arguments.nvme_path:
        agent = AutoModel.from_pretrained(known, config=model_config) if known else AutoModel.from_config(model_config)
        return AgentExperts(agent.to(config.device), None, config)
    folder = store_folder(arguments, config)
    # What an earlier run has left belongs to its checkpoints, which have copies of their own.
    (folder / MANIFEST).unlink(missing_ok=True)
    store_config = ExpertStoreConfig(
        str(folder),
        fast_capacity=min(model_config.hbm_capacity, model_config.num_experts),
        ram_capacity=min(model_config.dram_capacity, model_config.num_experts),
        policy=arguments.eviction_policy,
        record_trace=arguments.store_trace is not None,
        # It is asked without the game, by which the next router decides as well where it knows it.
        prefetch_next_layer=arguments.prefetch_next_layer and model_config.routing_condition == "content",
    )
    if known:
        agent, store = load_offloaded(known, store_config, AutoModel, config.device, config=model_config)
    else:
        agent, store = initialize_offloaded(model_config, store_config, AutoModel, config.device)
    return AgentExperts(agent, store, config)


def store_folder(arguments: AgentArguments, config: ContinualPpoConfig) -> Path:
    """Of this process's store."""
    return Path(arguments.nvme_path, f"rank_{config.process_index}")


def check_room(arguments: AgentArguments, model_config: TieredMoeConfig, config: ContinualPpoConfig) -> None:
    """
    Raises `OSError` if a disk has no room for the experts with their optimizer's state.

    The stores of this machine's processes have them twice each, and each checkpoint once where all have changed; while
    one is written, there is one more.
    """
    size = 2 * model_config.num_layers * model_config.num_experts * model_config.expert_dim
    # Weights and two moments, each of four bytes.
    once = 3 * 4 * size * model_config.expert_hidden_dim
    stores, output = Path(arguments.nvme_path).absolute(), Path(config.output_dir).absolute()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    places = [(stores, processes * 2 * once, stores.glob("rank_*/*.records"))]
    if config.process_index == 0:
        copies = max(1, config.save_total_limit) + 1
        places.append((output, copies * once, output.glob(f"checkpoint-*/{EXPERTS}/*/*.record")))
    needed, free = Counter(), {}
    for folder, wanted, present in places:
        there = nearest_existing(folder)
        disk = there.stat().st_dev
        free[disk] = shutil.disk_usage(there).free
        needed[disk] += wanted - _held(present)
        if needed[disk] > free[disk]:
            raise OSError(
                f"The expert store and its checkpoints need {needed[disk] / 2**30:.1f} GiB more in {folder}, "
                f"where {free[disk] / 2**30:.1f} GiB are free: choose another --nvme_path or --output_dir, a smaller "
                "--save_total_limit, fewer --num_experts, or a smaller --expert_hidden_dim."
            )


def _held(files: Iterable[Path]) -> int:
    """Bytes on the disk of what is there already and will be replaced; checkpoints share files."""
    return sum({found.st_ino: 512 * found.st_blocks for found in (path.stat() for path in files)}.values())
