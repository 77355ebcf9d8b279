"""A failing disk, an interruption or a forgotten hold costs an error at most: never weights, nor a wait for ever."""

import errno
import os
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch

from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig

EXPERTS = 4
SHAPES = {"weight": (32, 32)}


@pytest.fixture
def store(request, tmp_path):
    """Of its experts, each filled with its number, memory holds two; a test may ask for other options."""
    config = ExpertStoreConfig(
        str(tmp_path), **{"fast_capacity": 2, "ram_capacity": 0, **getattr(request, "param", {})}
    )
    with ExpertStore(config, SHAPES, 1, EXPERTS) as store:
        for expert in range(EXPERTS):
            store.write_weights(0, expert, filled_with(expert))
        store.checkpoint()
        yield store


@pytest.fixture(autouse=True)
def heeded_interruptions():
    """A shell lets what it runs in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def filled_with(value):
    return {"weight": torch.full((32, 32), float(value))}


def values(store, experts=range(EXPERTS)):
    """What each expert is filled with, by way of the fast tier."""
    found = []
    for expert in experts:
        with store.held(0, [expert]) as slots:
            weight = store.weights(0)["weight"][slots[0]]
            assert (weight == weight[0, 0]).all()
            found.append(weight[0, 0].item())
    return found


def change(store, experts):
    """Changes experts where they are, in the fast tier, which they then fill."""
    with store.held(0, experts):
        for expert in experts:
            store.write_weights(0, expert, filled_with(10 + expert))


def disturb(monkeypatch, operation, disturbance):
    """Calls `disturbance` before the next operation of this kind on the disk, in the thread that does it."""
    real, disturbances = getattr(os, operation), [disturbance]

    def disturbed(*args):
        with suppress(IndexError):
            disturbances.pop()()
        return real(*args)

    monkeypatch.setattr(os, operation, disturbed)


def break_down():
    raise OSError(errno.EIO, "broken")


def interrupt():
    """What Ctrl-C does, while the disk has not ended yet."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.2)


def dawdle():
    time.sleep(0.3)


def result_of(function):
    """What `function` returns, if it does at all: another thread could be left waiting."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(20)
    assert results, "It did not end."
    return results[0]


@pytest.mark.parametrize(("disturbance", "error"), [(break_down, OSError), (interrupt, KeyboardInterrupt)])
def test_experts_of_a_failed_checkpoint_stay_changed_until_the_next_one(store, monkeypatch, disturbance, error):
    change(store, [0, 1])
    disturb(monkeypatch, "pwritev", disturbance)
    with pytest.raises(error):
        store.checkpoint()
    # Others come to where they were written from.
    assert values(store, [2, 3, 0, 1]) == [2, 3, 10, 11]
    store.checkpoint()
    store.close()
    with ExpertStore(store.config, SHAPES, 1, EXPERTS) as again:
        assert values(again) == [10, 11, 2, 3]


def kept_after_a_failure(store):
    """The values that the next checkpoint keeps after one that fails."""
    with pytest.raises(OSError, match="broken"):
        store.checkpoint()
    store.checkpoint()
    store.close()
    with ExpertStore(store.config, SHAPES, 1, EXPERTS) as again:
        return values(again)


def test_expert_that_could_not_be_written_when_it_left_comes_back_and_is_written_again(store, monkeypatch):
    change(store, [0])
    disturb(monkeypatch, "pwritev", break_down)
    assert values(store, [2, 3, 0]) == [2, 3, 10]
    assert kept_after_a_failure(store) == [10, 1, 2, 3]


def test_expert_that_is_nowhere_but_on_its_way_to_a_broken_disk_is_not_lost(store, monkeypatch):
    disturb(monkeypatch, "pwritev", break_down)
    store.write_weights(0, 2, filled_with(12))
    with pytest.raises(OSError, match="broken"):
        store.checkpoint()
    assert values(store, [2]) == [12]


def test_write_that_failed_once_is_told_once_and_kept_by_the_next_checkpoint(store, monkeypatch):
    disturb(monkeypatch, "pwritev", break_down)
    store.write_weights(0, 2, filled_with(12))
    assert kept_after_a_failure(store) == [0, 1, 12, 3]


@pytest.mark.parametrize("store", [{"staging_records": 1}], indirect=True)
def test_failed_write_makes_way_for_the_next_one(store, monkeypatch):
    change(store, [0, 1])
    disturb(monkeypatch, "pwritev", break_down)
    assert values(store, [2]) == [2]
    # One of the changed experts is on its way to the disk, and the other one can leave only after it.
    with pytest.raises(OSError, match="broken"):
        values(store, [3, 0, 1])
    assert values(store, [3, 0, 1, 2]) == [3, 10, 11, 2]


def test_experts_of_a_hold_that_nobody_waited_for_can_be_held_again(store, monkeypatch):
    disturb(monkeypatch, "preadv", dawdle)
    store.hold(0, [2, 3])
    assert store.room(0) == 2
    assert result_of(lambda: values(store, [2, 3, 0, 1])) == [2, 3, 0, 1]


def test_what_such_a_hold_failed_to_read_is_told_once_to_who_needs_it(store, monkeypatch):
    disturb(monkeypatch, "preadv", break_down)
    store.hold(0, [2])
    with pytest.raises(OSError, match="broken"), store.held(0, [2, 3]):
        pass
    assert store.room(0) == 2
    assert values(store) == [0, 1, 2, 3]


def test_failed_read_keeps_nothing_of_who_waited_for_it(store, monkeypatch):
    def compute():
        """Like a layer whose graph holds its experts while those of the next layer are read."""
        graph = store.hold(0, [0])
        graph.wait()
        disturb(monkeypatch, "preadv", break_down)
        values(store, [2])

    # Not by pytest.raises, which keeps the error.
    with suppress(OSError):
        compute()
    assert store.room(0) == 2


@pytest.mark.parametrize("restored", [False, True])
def test_slot_is_not_given_to_another_expert_while_the_disk_writes_to_it(store, monkeypatch, tmp_path, restored):
    store.checkpoint(tmp_path / "copy").result()
    disturb(monkeypatch, "preadv", dawdle)
    store.hold(0, [2, 3])
    if restored:
        store.restore(tmp_path / "copy")
    with store.held(0, [0, 1]) as slots:
        dawdle()
        assert store.weights(0)["weight"][slots, 0, 0].tolist() == [0, 1]


def test_expert_may_be_waited_for_by_anyone(store, monkeypatch):
    disturb(monkeypatch, "preadv", dawdle)
    first, second = store.hold(0, [2]), store.hold(0, [3, 2])
    assert result_of(lambda: store.read_weights(0, 2))["weight"][0, 0] == 2
    assert result_of(second.wait)[1:] == first.wait()


def test_restore_that_cannot_be_committed_leaves_the_last_checkpoint(store, monkeypatch, tmp_path):
    store.checkpoint(tmp_path / "copy").result()
    store.write_weights(0, 2, filled_with(12))
    store.checkpoint(metadata={"step": 1})
    with monkeypatch.context() as patch:
        disturb(patch, "fdatasync", break_down)
        with pytest.raises(OSError, match="broken"):
            store.restore(tmp_path / "copy")
    assert store.metadata == {"step": 1}
    assert values(store) == [0, 1, 12, 3]


def test_restore_changes_nothing_if_a_write_under_way_has_failed(store, monkeypatch, tmp_path):
    store.checkpoint(tmp_path / "copy").result()
    change(store, [0, 1])
    disturb(monkeypatch, "pwritev", break_down)
    store.write_weights(0, 2, filled_with(12))
    with pytest.raises(OSError, match="broken"):
        store.restore(tmp_path / "copy")
    assert values(store) == [10, 11, 12, 3]


@pytest.mark.parametrize("store", [{"staging_records": 1}], indirect=True)
def test_expert_whose_new_weights_were_not_taken_stays_as_it_was(store, monkeypatch):
    """Its weights, and the count of its updates, by which its optimizer goes on."""
    with store.held(0, [1]):
        store.mark_updated(0, 1, step=3)
    assert values(store, [2, 3]) == [2, 3]
    store.checkpoint()
    before = store.info(0, 1)
    disturb(monkeypatch, "pwritev", break_down)
    store.write_weights(0, 0, filled_with(10))
    # There is no room for it before the other one is written.
    with pytest.raises(OSError, match="broken"):
        store.write_weights(0, 1, filled_with(11))
    assert store.info(0, 1) == before
    assert values(store, [0, 1]) == [10, 1]


def test_read_that_cannot_be_asked_for_costs_no_slot(store, monkeypatch):
    def run_out_of_memory(*_):
        raise MemoryError("pinned")

    with monkeypatch.context() as patch:
        patch.setattr(store.files, "read", run_out_of_memory)
        with pytest.raises(MemoryError):
            store.hold(0, [0])
    with store.held(0, [2, 3]) as slots:
        assert store.weights(0)["weight"][slots, 0, 0].tolist() == [2, 3]


def test_prefetching_goes_on_after_an_interruption(store, monkeypatch):
    started = threading.Event()

    def interrupt_who_waits():
        started.set()
        dawdle()
        interrupt()

    disturb(monkeypatch, "preadv", interrupt_who_waits)
    store.prefetch(0, [2])
    started.wait()
    with pytest.raises(KeyboardInterrupt):
        store.hold(0, [0, 1])
    store.prefetch(0, [3])
    ends = time.monotonic() + 20
    while 3 not in store.resident(0):
        assert time.monotonic() < ends
        time.sleep(0.01)
