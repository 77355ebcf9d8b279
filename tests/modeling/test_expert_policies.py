"""Policies against plain descriptions of them, and against the most that any of them could reach."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixturekit.modeling.expert_policies import (
    POLICIES,
    LeastRecentlyUsed,
    SmallMainQueues,
    TaskFrequency,
    optimal_hits,
    replay_hits,
)

# The experts of each batch.
BATCHES = st.lists(st.lists(st.integers(0, 6), max_size=4, unique=True), max_size=12)


def one_by_one(*keys):
    return [[key] for key in keys]


def hits_of_recency(batches, capacity):
    order, hits = [], 0
    for batch in batches:
        there = [key for key in batch if key in order]
        hits += len(there)
        for key in [*there, *(key for key in batch if key not in there)]:
            order = [*(other for other in order if other != key), key][-capacity:]
    return hits


def hits_of_the_best_choice(batches, capacity):
    """By trying everything that could be kept after each batch."""
    states = {frozenset(): 0}
    for batch in batches:
        after = {}
        for present, hits in states.items():
            count = hits + len(present & set(batch))
            for kept in itertools.combinations(present | set(batch), min(capacity, len(present | set(batch)))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), count)
        states = after
    return max(states.values())


@given(BATCHES, st.integers(1, 5))
@settings(deadline=None)
def test_bound_is_the_best_that_any_choice_reaches(batches, capacity):
    assert optimal_hits(batches, capacity) == hits_of_the_best_choice(batches, capacity)


@pytest.mark.parametrize("policy", POLICIES)
@given(batches=BATCHES, capacity=st.integers(1, 8))
@settings(deadline=None)
def test_no_policy_beats_the_bound_and_none_misses_what_fits(policy, batches, capacity):
    hits = replay_hits(batches, POLICIES[policy](capacity), capacity)
    assert hits <= optimal_hits(batches, capacity)
    accesses = [key for batch in batches for key in batch]
    if len(set(accesses)) <= capacity:
        assert hits == len(accesses) - len(set(accesses))


@given(BATCHES, st.integers(4, 6))
@settings(deadline=None)
def test_least_recently_used(batches, capacity):
    assert replay_hits(batches, LeastRecentlyUsed(capacity), capacity) == hits_of_recency(batches, capacity)


@pytest.mark.parametrize("policy", POLICIES)
@given(st.lists(st.tuples(st.sampled_from(["use", "add", "remove", "task"]), st.integers(0, 6)), max_size=60))
@settings(deadline=None)
def test_candidates_are_what_is_there(policy, events):
    policy, present = POLICIES[policy](3), set()
    for event, key in events:
        if event == "task":
            policy.set_task(key)
        elif (event == "add") != (key in present):
            getattr(policy, event)(key)
            present = {"add": present | {key}, "remove": present - {key}}.get(event, present)
        candidates = list(policy.candidates())
        assert sorted(candidates) == sorted(present)


def test_small_and_main_queues_let_a_scan_pass():
    policy = SmallMainQueues(10)
    working = list(range(8)) * 4
    scan = list(itertools.chain.from_iterable((100 + number, number % 8) for number in range(40)))
    hits = replay_hits(one_by_one(*working, *scan), policy, 10)
    assert hits == 24 + 40
    assert set(range(8)) <= set(policy.candidates())


def test_frequency_keeps_what_each_task_uses():
    chance = random.Random(0)
    policy = TaskFrequency(4)
    accesses = {
        task: [chance.choice(experts) for _ in range(50)] for task, experts in (("a", range(3)), ("b", (7, 8)))
    }
    present = set()
    for task in ("a", "b"):
        policy.set_task(task)
        for key in accesses[task]:
            if key in present:
                policy.use(key)
                continue
            if len(present) == 4:
                victim = next(policy.candidates())
                policy.remove(victim)
                present.remove(victim)
            policy.add(key)
            present.add(key)
    # Each task would give up the experts of the other one first.
    assert next(policy.candidates()) in range(3)
    policy.set_task("a")
    assert next(policy.candidates()) in (7, 8)


def test_frequency_survives_any_number_of_uses():
    policy = TaskFrequency(1, half_life=0.5)
    policy.add("rare")
    policy.add("frequent")
    for _ in range(2000):
        policy.use("frequent")
    assert list(policy.candidates()) == ["rare", "frequent"]
