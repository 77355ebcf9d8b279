"""A store gives and updates the same experts, to the bit, as one that holds them all in memory."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.modeling.expert_tiers import NoRoomError
from mixturekit.modeling.lazy_adamw import LazyAdamW, clip_grad_norm_

LAYERS, EXPERTS = 2, 5
SHAPES = {"up": (6, 3), "gate": (5,)}
SOME_EXPERTS = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)


def random_weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


class InMemoryExpert:
    """One expert with an optimizer of its own, which rests while the expert has no gradient."""

    def __init__(self, weights):
        self.weights = weights
        self.masters = {name: part.float().clone().requires_grad_() for name, part in weights.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.01, weight_decay=0.1, fused=True)

    def step(self, gradients):
        for name, gradient in gradients.items():
            self.masters[name].grad = gradient
        self.optimizer.step()
        self.weights = {name: part.detach().to(self.weights[name].dtype) for name, part in self.masters.items()}


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of what a store can be asked for, beside the same experts in memory."""

    @initialize(
        fast=st.integers(1, EXPERTS + 1),
        ram=st.integers(0, 4),
        staging=st.integers(1, 3),
        policy=st.sampled_from(["lru", "s3fifo", "frequency"]),
        shared=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def build(self, fast, ram, staging, policy, shared, dtype):
        self.folder = Path(tempfile.mkdtemp())
        self.config = ExpertStoreConfig(
            str(self.folder / "store"), fast, ram, shared_pool=shared, policy=policy, staging_records=staging
        )
        self.dtype = dtype
        self.keys = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        self.experts, self.gradients, self.copies, self.steps = {}, {}, {}, 0
        self.open()
        for number, key in enumerate(self.keys):
            self.write(key, number)
        self.checkpoint(False)

    def open(self):
        self.store = ExpertStore(self.config, SHAPES, LAYERS, EXPERTS, self.dtype, identity="machine")
        self.optimizer = LazyAdamW(self.store, lr=0.01, weight_decay=0.1)

    def write(self, key, seed):
        weights = random_weights(seed, self.dtype)
        self.store.write_weights(*key, weights)
        self.experts[key] = InMemoryExpert(weights)

    def assert_weights(self, key, found):
        for name, part in self.experts[key].weights.items():
            torch.testing.assert_close(found[name], part, rtol=0, atol=0)

    @rule(layer=st.integers(0, LAYERS - 1), experts=SOME_EXPERTS)
    def use(self, layer, experts):
        while experts:
            now, experts = experts[: self.config.fast_capacity], experts[self.config.fast_capacity :]
            with self.store.held(layer, now) as slots:
                for expert, slot in zip(now, slots, strict=True):
                    found = {name: part[slot] for name, part in self.store.weights(layer).items()}
                    self.assert_weights((layer, expert), found)

    @rule(layer=st.integers(0, LAYERS - 1), experts=SOME_EXPERTS)
    def forget(self, layer, experts):
        """A hold that nobody waits for changes nothing."""
        self.store.hold(layer, experts[: self.config.fast_capacity])

    @rule(layer=st.integers(0, LAYERS - 1), experts=SOME_EXPERTS, seed=st.integers(0, 99))
    def add_gradients(self, layer, experts, seed):
        for number, expert in enumerate(experts):
            gradient = random_weights(1000 * seed + number, self.dtype)
            self.store.add_gradient(layer, expert, {name: part.clone() for name, part in gradient.items()})
            known = self.gradients.setdefault((layer, expert), {name: torch.zeros(SHAPES[name]) for name in gradient})
            for name, part in gradient.items():
                known[name] += part.float()

    @precondition(lambda self: self.gradients)
    @rule(clip=st.booleans())
    def step(self, clip):
        if clip:
            parts = [part for key in sorted(self.gradients) for part in self.gradients[key].values()]
            norm = torch.nn.utils.get_total_norm(parts)
            torch.testing.assert_close(clip_grad_norm_([], self.store, 1.0), norm, rtol=0, atol=0)
            for part in parts:
                part.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for key, gradient in self.gradients.items():
            self.experts[key].step(gradient)
        self.gradients = {}
        self.steps += 1

    @rule(layer=st.integers(0, LAYERS - 1), experts=SOME_EXPERTS)
    def prefetch(self, layer, experts):
        self.store.prefetch(layer, experts)

    @rule(task=st.sampled_from(["pong", "breakout"]))
    def set_task(self, task):
        self.store.set_task(task)

    @rule(key=st.sampled_from([(0, 0), (1, 3)]), seed=st.integers(100, 199))
    def overwrite(self, key, seed):
        self.write(key, seed)

    @rule(copied=st.booleans())
    def checkpoint(self, copied):
        path = self.folder / f"checkpoint-{len(self.copies)}" if copied else None
        self.store.checkpoint(path, {"steps": self.steps})
        self.saved = copy.deepcopy(self.experts), self.steps
        if copied:
            self.copies[path] = self.saved

    @rule()
    def crash(self):
        """Closing keeps nothing that no checkpoint has."""
        self.store.close()
        self.open()
        self.go_back(self.saved)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def restore(self, data):
        path = data.draw(st.sampled_from(sorted(self.copies)))
        self.store.restore(path)
        self.saved = self.copies[path]
        self.go_back(self.saved)

    def go_back(self, saved):
        experts, self.steps = copy.deepcopy(saved)
        self.experts, self.gradients = experts, {}
        assert self.store.metadata == {"steps": self.steps}

    @invariant()
    def tiers_are_exclusive_and_within_capacity(self):
        if hasattr(self, "store"):
            with self.store._lock:
                used = [write.row for write in self.store._writing.values() if write.row is not None]
                used += [row for pool in self.store._pools for row in pool.ram.rows.values()]
                assert sorted([*used, *self.store._free_ram]) == list(range(len(self.store._ram)))
                assert len(self.store._writing) <= self.config.staging_records
            for pool in self.store._pools:
                with self.store._lock:
                    assert not set(pool.fast.rows) & set(pool.ram.rows)
                    assert len(pool.fast.rows) <= self.config.fast_capacity
                    assert len(pool.ram.rows) <= self.config.ram_capacity
                    assert sorted([*pool.fast.rows.values(), *pool.fast.free]) == list(range(len(pool.fast.memory)))

    def teardown(self):
        if hasattr(self, "store"):
            for key in self.keys:
                self.assert_weights(key, self.store.read_weights(*key))
                assert self.store.info(*key).step == self.updates(key)
            self.store.close()
            shutil.rmtree(self.folder)

    def updates(self, key):
        states = self.experts[key].optimizer.state.values()
        return int(next((state["step"].item() for state in states), 0))


CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=CHECKS)


class LongStoreMachine(StoreMachine):
    pass


TestStoreForLong = pytest.mark.slow(LongStoreMachine.TestCase)
TestStoreForLong.settings = settings(
    max_examples=1000, stateful_step_count=60, deadline=None, suppress_health_check=CHECKS
)


@pytest.fixture
def build_store(tmp_path):
    """Opens stores, filled with different experts where they are new, and closes them."""
    stores = []

    def build(fill=True, folder="store", **options):
        config = ExpertStoreConfig(str(tmp_path / folder), **{"fast_capacity": 2, "ram_capacity": 2, **options})
        store = ExpertStore(config, SHAPES, LAYERS, EXPERTS)
        stores.append(store)
        if fill:
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    store.write_weights(layer, expert, random_weights(10 * layer + expert))
            store.checkpoint()
        return store

    yield build
    for store in stores:
        store.close()


def wait_for_prefetches(store):
    with store._lock:
        while store._wanted or store._prefetching is not None:
            store._lock.wait()


def test_statistics_count_each_access_once(build_store):
    store = build_store()
    for experts in ([0, 1], [0, 1], [2, 3], [0, 4]):
        with store.held(0, experts):
            pass
    # 2 and 3 send 0 and 1 to RAM, from where 0 comes back; 4 is still on disk.
    stats = store.stats
    assert (stats.hits, stats.ram_hits, stats.disk_misses) == (2, 1, 5)
    assert stats.hit_rate == 0.25
    assert stats.stall_seconds > 0
    assert store.files.bytes_read == 5 * store.layout.weights_bytes
    stats.reset()
    assert stats.as_dict()["disk_misses"] == 0


def test_prefetch_is_useful_late_or_wasted_and_no_access(build_store):
    store = build_store()
    store.prefetch(0, [1, 2])
    wait_for_prefetches(store)
    assert (store.stats.prefetches, store.stats.hits, store.stats.disk_misses) == (2, 0, 0)
    assert store.resident(0) == {1, 2}
    with store.held(0, [1]):
        store.prefetch(0, [3])
        wait_for_prefetches(store)
    assert (store.stats.hits, store.stats.prefetches_useful, store.stats.prefetches_wasted) == (1, 1, 1)
    with store._lock:
        store.prefetch(0, [4])
        hold = store.hold(0, [4])
    hold.wait()
    assert store.stats.prefetches_late == 1


def test_held_experts_stay_and_a_hold_beyond_the_room_is_refused(build_store):
    store = build_store()
    hold = store.hold(0, [0, 1])
    hold.wait()
    store.prefetch(0, [2])
    wait_for_prefetches(store)
    assert store.resident(0) == {0, 1}
    with pytest.raises(
        NoRoomError, match="needs 1 experts at once, and its fast tier of 2 has room for 0: the others"
    ):
        store.hold(0, [2])
    assert store.room(0, [1, 2]) == 1
    del hold
    with store.held(0, [2, 3]) as slots:
        assert sorted(slots) == [0, 1]


def test_experts_with_gradients_leave_last(build_store):
    store = build_store(ram_capacity=0)
    for expert in (0, 1):
        with store.held(0, [expert]):
            pass
    store.add_gradient(0, 0, random_weights(0))
    with store.held(0, [2]):
        assert store.resident(0) == {0, 2}
    store.add_gradient(0, 2, random_weights(0))
    with store.held(0, [1]):
        assert store.resident(0) == {1, 2}


def test_nothing_is_written_that_has_not_changed(build_store):
    store = build_store()
    written = store.files.bytes_written
    for _ in range(3):
        for expert in range(EXPERTS):
            with store.held(0, [expert]):
                pass
    store.checkpoint()
    assert store.files.bytes_written == written
    store.add_gradient(0, 1, random_weights(7))
    LazyAdamW(store).step()
    store.checkpoint()
    assert store.files.bytes_written == written + store.layout.disk_bytes


def test_weights_alone_are_read_and_kept_without_training(build_store):
    store = build_store()
    store.add_gradient(0, 1, random_weights(7))
    LazyAdamW(store).step()
    store.checkpoint()
    expected = store.read_weights(0, 1)
    store.close()
    store = build_store(fill=False, training=False)
    assert store.memory(0, 0).numel() == store.layout.weights_bytes
    with store.held(0, [1]) as slots:
        for name, part in store.weights(0).items():
            assert torch.equal(part[slots[0]], expected[name])


def test_trace_is_saved(build_store, tmp_path):
    store = build_store(record_trace=True)
    store.set_task("pong")
    with store.held(1, [3, 0]), store.held(0, [2], counted=False):
        pass
    store.save_trace(tmp_path / "trace.jsonl")
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"task": "pong", "layer": 1, "experts": [3, 0]}]


def test_error_of_the_prefetcher_reaches_the_caller(build_store):
    store = build_store()
    with (Path(store.config.nvme_path) / "layer_000.records").open("r+b") as file:
        file.truncate(0)
    store.prefetch(0, [3])
    wait_for_prefetches(store)
    with pytest.raises(OSError, match="ends at byte"):
        store.prefetch(1, [0])
    # It is told once, and what is whole is still there.
    with store.held(1, [0]):
        pass
    with pytest.raises(OSError, match="ends at byte"), store.held(0, [3]):
        pass
    assert store.room(0) == 2


@pytest.mark.parametrize("options", [{"fast_capacity": 0}, {"policy": "random"}, {"engine": "gds"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        ExpertStoreConfig("store", **options)
