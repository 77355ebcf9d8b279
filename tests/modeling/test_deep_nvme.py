"""DeepNVMe moves the same bytes, and fails aloud, where it is there; where it isn't, one sentence says what to do."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from mixturekit.modeling import deep_nvme
from mixturekit.modeling.block_io import BLOCK, aligned_buffer, as_memory
from mixturekit.modeling.deep_nvme import DeepNvmeEngine, is_built, load_extension
from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.modeling.lazy_adamw import LazyAdamW

needs_deep_nvme = pytest.mark.skipif(not is_built(), reason="needs DeepSpeed with its I/O extension built")


@pytest.fixture
def engine():
    engine = DeepNvmeEngine()
    yield engine
    engine.close()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is there")
def test_missing_deepspeed_is_told(tmp_path):
    assert not is_built()
    with pytest.raises(ImportError, match=r"pip install mixturekit\[offload\]"):
        load_extension()
    with pytest.raises(ImportError, match=r"pip install mixturekit\[offload\]"):
        ExpertStore(ExpertStoreConfig(str(tmp_path), engine="deepspeed"), {"weight": (2, 2)}, 1, 2)
    with ExpertStore(ExpertStoreConfig(str(tmp_path), engine="auto"), {"weight": (2, 2)}, 1, 2):
        pass


def test_handle_that_cannot_be_made_is_an_error_at_once(monkeypatch):
    def aio_handle(*_):
        raise RuntimeError("too many requests of all programs together")

    monkeypatch.setattr(deep_nvme, "load_extension", lambda: SimpleNamespace(aio_handle=aio_handle))
    with pytest.raises(RuntimeError, match="too many requests"):
        DeepNvmeEngine()


@needs_deep_nvme
def test_blocks_come_back(engine, tmp_path):
    rows, back = aligned_buffer(20, 3 * BLOCK), aligned_buffer(20, 3 * BLOCK)
    rows.copy_(torch.randint(256, rows.shape, dtype=torch.uint8))
    file = engine.open(tmp_path / "blocks", 20 * 3 * BLOCK)
    writes = [
        engine.write(file, 3 * BLOCK * number, [as_memory(row[:BLOCK]), as_memory(row[BLOCK:])])
        for number, row in enumerate(rows)
    ]
    for write in writes:
        write.result()
    reads = [engine.read(file, 3 * BLOCK * number, [as_memory(row)]) for number, row in enumerate(back)]
    for read in reads:
        read.result()
    assert torch.equal(rows, back)
    assert (tmp_path / "blocks").read_bytes() == rows.numpy().tobytes()


@needs_deep_nvme
def test_what_it_would_keep_to_itself_is_an_error(engine, tmp_path):
    file = engine.open(tmp_path / "blocks", 2 * BLOCK)
    buffer = aligned_buffer(1, 2 * BLOCK)[0]
    for offset, part in ((100, buffer[:BLOCK]), (0, buffer[:100]), (0, buffer[100 : 100 + BLOCK])):
        with pytest.raises(OSError, match="takes whole blocks of 4096 bytes"):
            engine.write(file, offset, [as_memory(part)]).result()
    with pytest.raises(OSError, match="ends at byte 8192, within a record"):
        engine.read(file, BLOCK, [as_memory(buffer)]).result()


@needs_deep_nvme
def test_store_opens_with_either_engine(tmp_path):
    for engine in ("deepspeed", "pread", "deepspeed"):
        config = ExpertStoreConfig(str(tmp_path), fast_capacity=1, ram_capacity=0, engine=engine)
        with ExpertStore(config, {"weight": (40, 30)}, 1, 4) as store:
            if not store.files.infos:
                for expert in range(4):
                    store.write_weights(0, expert, {"weight": torch.full((40, 30), float(expert))})
            step = store.metadata.get("step", 0)
            assert [store.info(0, expert).step for expert in range(4)] == [step] * 4
            for expert in range(4):
                store.add_gradient(0, expert, {"weight": torch.ones(40, 30)})
            LazyAdamW(store).step()
            store.checkpoint(metadata={"step": step + 1})
