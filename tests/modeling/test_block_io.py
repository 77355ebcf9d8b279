"""Blocks come back as they were written, and what fails says so."""

import errno
import os
import subprocess
import threading

import pytest
import torch

from mixturekit.modeling.block_io import BLOCK, DEMAND, PREFETCH, PreadEngine, aligned_buffer, as_memory


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def engine(request):
    engine = PreadEngine(threads=2, direct=request.param)
    yield engine
    engine.close()


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system of some kind for the time of a test."""
    mounted = []

    def mount_one(kind, options):
        folder = tmp_path / kind
        folder.mkdir()
        if subprocess.run(["mount", "-t", kind, "-o", options, "none", folder], capture_output=True).returncode:
            pytest.skip("mounting a file system needs more rights")
        mounted.append(folder)
        return folder

    yield mount_one
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def random_rows(rows, row_bytes):
    buffer = aligned_buffer(rows, row_bytes)
    return buffer.copy_(torch.randint(256, buffer.shape, dtype=torch.uint8))


def test_buffers_are_aligned_and_zero():
    buffer = aligned_buffer(3, 2 * BLOCK)
    assert buffer.shape == (3, 2 * BLOCK)
    assert not buffer.any()
    assert all(row.data_ptr() % BLOCK == 0 for row in buffer)
    assert aligned_buffer(0, BLOCK).shape == (0, BLOCK)


def test_many_operations_at_once_come_back(engine, tmp_path):
    rows, back = random_rows(40, 3 * BLOCK), aligned_buffer(40, 3 * BLOCK)
    file = engine.open(tmp_path / "blocks", 40 * 3 * BLOCK)
    writes = [
        engine.write(file, 3 * BLOCK * number, [as_memory(row[:BLOCK]), as_memory(row[BLOCK:])])
        for number, row in enumerate(rows)
    ]
    for write in writes:
        write.result()
    engine.sync(file)
    reads = [engine.read(file, 3 * BLOCK * number, [as_memory(row)]) for number, row in enumerate(back)]
    for read in reads:
        read.result()
    assert torch.equal(rows, back)


def test_an_error_belongs_to_its_operation(tmp_path):
    engine = PreadEngine(direct=True)
    file = engine.open(tmp_path / "blocks", 2 * BLOCK)
    buffer = aligned_buffer(1, BLOCK)[0]
    beyond = engine.read(file, 2 * BLOCK, [as_memory(buffer)])
    crooked = engine.write(file, 100, [as_memory(buffer)])
    fine = engine.write(file, BLOCK, [as_memory(buffer)])
    with pytest.raises(OSError, match="blocks ends at byte 8192, within a record"):
        beyond.result()
    with pytest.raises(OSError, match="Invalid argument"):
        crooked.result()
    fine.result()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.read(file, 0, [as_memory(buffer)])


def test_demand_overtakes_what_can_wait(tmp_path):
    engine = PreadEngine(threads=1)
    file = engine.open(tmp_path / "blocks", BLOCK)
    buffer, gate, order = aligned_buffer(1, BLOCK)[0], threading.Event(), []
    engine.read(file, 0, [as_memory(buffer)]).add_done_callback(lambda _: gate.wait())
    operations = [
        (engine.write, "write back", {}),
        (engine.read, "prefetch", {"priority": PREFETCH}),
        (engine.read, "demand", {"priority": DEMAND}),
    ]
    for operation, label, options in operations:
        future = operation(file, 0, [as_memory(buffer)], **options)
        future.add_done_callback(lambda _, label=label: order.append(label))
    gate.set()
    engine.close()
    assert order == ["demand", "prefetch", "write back"]


def test_a_file_system_without_direct_io_is_named(mount):
    folder = mount("ramfs", "mode=700")
    engine = PreadEngine(direct=True)
    with pytest.raises(OSError, match=r"has no direct I/O \(O_DIRECT\): .* set direct_io=False"):
        engine.open(folder / "blocks", BLOCK)
    engine.close()
    engine = PreadEngine(direct=False)
    with pytest.raises(OSError) as error:
        # There it cannot be had at all, because space cannot be allocated.
        engine.open(folder / "blocks", BLOCK)
    assert error.value.errno in (errno.EOPNOTSUPP, errno.ENOSPC)
    engine.close()


def test_a_full_disk_is_told_before_it_is_full(mount):
    folder = mount("tmpfs", "size=1m")
    engine = PreadEngine(direct=False)
    engine.open(folder / "small", 2**19)
    with pytest.raises(OSError, match="large needs 1.0 MiB more, but its disk has 0.5 MiB left") as error:
        engine.open(folder / "large", 2**20)
    assert error.value.errno == errno.ENOSPC
    assert os.statvfs(folder).f_bavail > 0
    engine.close()
