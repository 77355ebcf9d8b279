"""What is on disk is what was written, or is named as damaged; a crash costs nothing that a checkpoint has."""

import multiprocessing
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from mixturekit.modeling.block_io import BLOCK
from mixturekit.modeling.expert_records import RecordError
from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.modeling.lazy_adamw import LazyAdamW

SHAPES = {"weight": (40, 30)}
EXPERTS = 4


def open_store(folder, **options):
    names = {"num_layers": 1, "num_experts": EXPERTS, "dtype": torch.float32, "identity": "tiny"}
    names.update({name: options.pop(name) for name in list(options) if name in names})
    config = ExpertStoreConfig(str(folder), **{"fast_capacity": 2, "ram_capacity": 1, **options})
    return ExpertStore(config, SHAPES, **names)


def fill(store):
    for expert in range(store.num_experts):
        store.write_weights(0, expert, {"weight": torch.full((40, 30), float(expert))})
    store.checkpoint(metadata={"step": 0})


def train(store, expert, value=1.0):
    store.add_gradient(0, expert, {"weight": torch.full((40, 30), value)})
    LazyAdamW(store, lr=0.5).step()
    store.clear_gradients()


def weights(store):
    return [store.read_weights(0, expert)["weight"] for expert in range(EXPERTS)]


@pytest.fixture
def folder(tmp_path):
    with open_store(tmp_path / "store") as store:
        fill(store)
    return tmp_path / "store"


def flip(folder, offset):
    """Flips a bit of a layer's file."""
    with (folder / "layer_000.records").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place_of(store, expert):
    """Where the record of the last write of an expert begins."""
    return store.files._location((0, expert), store.files._places[0, expert])[1]


def test_second_store_is_refused(folder):
    with (
        open_store(folder),
        pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}: a store has one user at a time"),
    ):
        open_store(folder)
    open_store(folder).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": "large"}, "with model 'tiny', not 'large'"),
        ({"num_experts": 5}, "with experts 4, not 5"),
        ({"num_layers": 2}, "with layers 1, not 2"),
        ({"dtype": torch.bfloat16}, "with dtype 'float32', not 'bfloat16'"),
    ],
)
def test_store_of_other_experts_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_store(folder, **options)
    # It is not held against the right one.
    open_store(folder).close()


def test_expert_that_was_never_filled_is_named(tmp_path):
    with open_store(tmp_path) as store:
        with pytest.raises(KeyError, match="no record of expert 3 of layer 0: it was never filled"):
            store.hold(0, [3])
        store.write_weights(0, 3, {"weight": torch.ones(40, 30)})
        with store.held(0, [3]):
            pass


@pytest.mark.parametrize("part", ["weights", "state", "header"])
def test_flipped_bit_is_detected_and_named(folder, part):
    with open_store(folder) as store:
        train(store, 2)
        store.checkpoint()
        layout = store.layout
        inner = {"weights": 0, "state": layout.weights_bytes, "header": layout.weights_bytes + layout.state_bytes}
        offset = place_of(store, 2) + inner[part] + 16
    flip(folder, offset)
    with open_store(folder) as store:
        with pytest.raises(RecordError, match="record of expert 2 of layer 0, version 2, is"), store.held(0, [2]):
            pass
        with store.held(0, [0, 1]):
            pass


def test_flipped_record_comes_from_the_copy_of_the_checkpoint(folder, tmp_path, caplog):
    with open_store(folder) as store:
        train(store, 2)
        store.checkpoint(tmp_path / "checkpoint").result()
        expected, offset = weights(store), place_of(store, 2) + 5
    flip(folder, offset)
    with open_store(folder) as store:
        assert all(map(torch.equal, weights(store), expected))
        assert "expert 2 of layer 0, version 2, is damaged" in caplog.text
        assert "taken from" in caplog.text
        caplog.clear()
        # It was put back, too, with its moments.
        train(store, 2)
        assert not caplog.text
        assert store.info(0, 2).step == 2


def test_torn_write_loses_nothing_of_the_checkpoint(folder):
    with open_store(folder) as store:
        train(store, 1)
        store.checkpoint()
        expected, kept = weights(store), place_of(store, 1)
        train(store, 1)
        with store._lock:
            store._write_back((0, 1), store._find((0, 1)))
            store._finish_writes()
        assert place_of(store, 1) != kept
        torn = place_of(store, 1)
    # A half of the record arrived before the power went.
    with (folder / "layer_000.records").open("r+b") as file:
        file.seek(torn + BLOCK)
        file.write(bytes(BLOCK))
    with open_store(folder) as store:
        assert all(map(torch.equal, weights(store), expected))


def test_copies_share_what_has_not_changed(folder, tmp_path):
    with open_store(folder) as store:
        train(store, 1)
        store.checkpoint(tmp_path / "first", {"step": 1})
        train(store, 2)
        store.checkpoint(tmp_path / "second", {"step": 2}).result()
        expected = weights(store)
    names = [f"layer_000/expert_{expert:04}.record" for expert in range(EXPERTS)]
    shared = [(tmp_path / "first" / name).samefile(tmp_path / "second" / name) for name in names]
    assert shared == [True, True, False, True]
    # A copy is whole without the store that it is of.
    with open_store(tmp_path / "other") as store:
        store.restore(tmp_path / "second")
        assert all(map(torch.equal, weights(store), expected))
        assert store.metadata == {"step": 2}
        assert [store.info(0, expert).step for expert in range(EXPERTS)] == [0, 1, 1, 0]


def test_copy_of_an_existing_checkpoint_is_refused_at_the_next_call(folder, tmp_path):
    with open_store(folder) as store:
        store.checkpoint(tmp_path / "first").result()
        copying = store.checkpoint(tmp_path / "first")
        with pytest.raises(FileExistsError, match="first is there already"):
            copying.result()
        with pytest.raises(FileExistsError, match="first is there already"):
            store.hold(0, [0])
        with store.held(0, [0]):
            pass


@pytest.mark.parametrize("damage", ["cut off", "damaged"])
def test_damaged_copy_is_refused_and_the_last_checkpoint_stays(folder, tmp_path, damage):
    with open_store(folder) as store:
        store.checkpoint(tmp_path / "copy").result()
        for expert in range(EXPERTS):
            train(store, expert)
        store.checkpoint(metadata={"step": 1})
        expected = weights(store)
        for expert in range(EXPERTS):
            train(store, expert)
        record = tmp_path / "copy" / "layer_000" / "expert_0001.record"
        content = record.read_bytes()
        record.write_bytes(content[:-1] if damage == "cut off" else content[:7] + b"x" + content[8:])
        with pytest.raises(RecordError, match=f"expert 1 .*{damage}"):
            store.restore(tmp_path / "copy")
        assert all(map(torch.equal, weights(store), expected))
        assert store.metadata == {"step": 1}
        store.checkpoint()
    with open_store(folder) as store:
        assert all(map(torch.equal, weights(store), expected))


def test_full_disk_leaves_the_last_checkpoint_intact(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        with open_store(folder) as store:
            train(store, 0)
            store.checkpoint(disk / "first").result()
            expected = weights(store)
            for expert in range(EXPERTS):
                train(store, expert)
            with pytest.raises(
                OSError, match=r"next-\d could not be written as the disk is full; .*store holds the same checkpoint"
            ):
                for number in range(9):
                    for expert in range(EXPERTS):
                        train(store, expert)
                    store.checkpoint(disk / f"next-{number}").result()
            store._copying = None
            assert not list(disk.glob("*.partial"))
            store.restore(disk / "first")
            assert all(map(torch.equal, weights(store), expected))
    finally:
        subprocess.run(["umount", disk], check=True)


def train_until_killed(folder, steps):
    """Trains all experts and saves a checkpoint, again and again; tells each step that it has saved."""
    with open_store(folder, fast_capacity=1, staging_records=1) as store:
        step = store.metadata["step"]
        while True:
            step += 1
            # The same gradient for all, so that any mixture of two steps shows.
            for expert in range(EXPERTS):
                train(store, expert)
            copy = folder.parent / f"copy-{step}" if step % 3 == 0 else None
            store.checkpoint(copy, {"step": step})
            steps.send(step)


class ExpectedWeights:
    """What the training above arrives at."""

    def __init__(self):
        self.weights = [torch.nn.Parameter(torch.full((40, 30), float(expert))) for expert in range(EXPERTS)]
        self.optimizers = [torch.optim.AdamW([weight], lr=0.5, fused=True) for weight in self.weights]
        self.step = 0

    def at(self, step):
        while self.step < step:
            self.step += 1
            for weight, optimizer in zip(self.weights, self.optimizers, strict=True):
                weight.grad = torch.ones(40, 30)
                optimizer.step()
        return self.weights


def kill_and_reopen(folder, times, seed):
    """Kills a training process again and again, and checks what each one left behind."""
    chance, expected = random.Random(seed), ExpectedWeights()
    # Forked, because a new process would take seconds to import what it needs, and milliseconds to train.
    context = multiprocessing.get_context("fork")
    for _ in range(times):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=train_until_killed, args=(folder, writer))
        process.start()
        writer.close()
        told = reader.recv()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while True:
            try:
                told = reader.recv()
            except EOFError:
                break
        reached = expected.step
        with open_store(folder) as store:
            step = store.metadata["step"]
            # It may have been killed after the checkpoint, but before it could say so.
            assert step in (told, told + 1)
            assert step > reached
            assert all(map(torch.equal, weights(store), expected.at(step)))
            assert [store.info(0, expert).step for expert in range(EXPERTS)] == [step] * EXPERTS
        for copy in folder.parent.glob("copy-*"):
            if copy.suffix != ".partial":
                assert (copy / "manifest.json").exists()
                assert len(list(copy.glob("layer_000/*.record"))) == EXPERTS


def test_killed_process_loses_nothing_up_to_its_last_checkpoint(folder):
    kill_and_reopen(folder, times=10, seed=0)


@pytest.mark.slow
def test_killed_200_times(folder):
    kill_and_reopen(folder, times=200, seed=1)


def _hold_folder(folder, ready, done):
    with open_store(folder):
        ready.set()
        done.wait()


def test_second_process_is_refused_until_the_first_is_gone(folder):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold_folder, args=(folder, ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {process.pid}"):
        open_store(folder)
    process.kill()
    process.join()
    open_store(folder).close()
