"""Checkpoints of models with experts in a store are those of models in memory, and need less memory than these."""

import subprocess
import sys

import huggingface_hub
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mixturekit.modeling.expert_store import ExpertStoreConfig
from mixturekit.modeling.offloaded_checkpoints import export_offload_folder, import_offload_folder
from mixturekit.modeling.offloaded_experts import find_experts, load_offloaded, offload_experts

TOKENS = torch.arange(3, 21).view(2, 9)


def tensors_of(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "more"])
def test_checkpoints_are_the_ordinary_ones(name, build_mixture, tmp_path):
    model = build_mixture(name).eval()
    model.save_pretrained(tmp_path / "ordinary")
    config = ExpertStoreConfig(str(tmp_path / "loaded"), fast_capacity=3, ram_capacity=0)
    offloaded, store = load_offloaded(tmp_path / "ordinary", config)
    with store, torch.no_grad():
        torch.testing.assert_close(offloaded(TOKENS).logits, model(TOKENS).logits)
        for _ in range(2):
            offloaded.save_pretrained(tmp_path / "streamed")
    ordinary, streamed = tensors_of(tmp_path / "ordinary"), tensors_of(tmp_path / "streamed")
    assert ordinary.keys() == streamed.keys()
    assert all(torch.equal(ordinary[key], streamed[key]) for key in ordinary)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    # Another file for each layer of experts, and one for the rest.
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) == 1 + len(find_experts(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_go_to_accelerate_and_back(build_mixture, tmp_path, dtype):
    model = build_mixture("mixtral").to(dtype)
    names = list(find_experts(model))
    expected = {
        f"{name}.{part}": weight for name in names for part, weight in find_experts(model)[name].named_parameters()
    }
    expected = {key: weight.detach().clone() for key, weight in expected.items()}
    config = ExpertStoreConfig(str(tmp_path / "store"), fast_capacity=2)
    with offload_experts(model, config) as store:
        export_offload_folder(store, names, tmp_path / "offload")
        loader = OffloadedWeightsLoader(save_folder=str(tmp_path / "offload"))
        assert set(loader) == set(expected)
        assert all(torch.equal(loader[key], weight) for key, weight in expected.items())
        for layer in range(2):
            for expert in range(8):
                weights = store.read_weights(layer, expert)
                store.write_weights(
                    layer, expert, {part: torch.zeros_like(weight) for part, weight in weights.items()}
                )
        import_offload_folder(store, names, tmp_path / "offload")
        for part, weight in store.read_weights(1, 5).items():
            assert torch.equal(weight, expected[f"{names[1]}.{part}"][5])


@pytest.fixture
def hub_cache(build_mixture, tmp_path, monkeypatch):
    """What a download leaves behind: `commit` adds one, which is then the newest."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--tiny"

    def commit(number):
        commit_hash = f"{number:040x}"
        build_mixture("mixtral").save_pretrained(repository / "snapshots" / commit_hash)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit_hash)
        return commit_hash

    return tmp_path / "cache", commit


def load_and_save(name_or_path, folder, copy=None, **options):
    """Loads with the experts in `folder`, and saves a checkpoint of them as a training does."""
    _, store = load_offloaded(name_or_path, ExpertStoreConfig(str(folder), fast_capacity=2), **options)
    with store:
        copying = store.checkpoint(copy, {"step": 1})
        if copying is not None:
            copying.result()


def test_experts_of_another_checkpoint_are_refused_also_after_training(build_mixture, tmp_path):
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "store"
    for saved in (first, second):
        build_mixture("mixtral").save_pretrained(saved)
    for _ in range(2):
        load_and_save(first, folder)
    with pytest.raises(ValueError, match="store was not filled from .*second as it is now"):
        load_and_save(second, folder)
    # Nor by way of a copy that was made of the other one's experts.
    load_and_save(second, tmp_path / "other", tmp_path / "copy")
    _, store = load_offloaded(first, ExpertStoreConfig(str(folder), fast_capacity=2))
    with store:
        store.restore(tmp_path / "copy")
    with pytest.raises(ValueError, match="store was not filled from .*second"):
        load_and_save(second, folder)
    load_and_save(first, folder)
    (first / "model.safetensors").touch()
    with pytest.raises(ValueError, match="store was not filled from .*first as it is now"):
        load_and_save(first, folder)


def test_experts_of_unknown_origin_are_refused(build_mixture, tmp_path):
    model = build_mixture("mixtral")
    model.save_pretrained(tmp_path / "saved")
    offload_experts(model, ExpertStoreConfig(str(tmp_path / "store"), fast_capacity=2)).close()
    with pytest.raises(ValueError, match="store was not filled from .*saved"):
        load_and_save(tmp_path / "saved", tmp_path / "store")


def test_experts_of_an_earlier_commit_of_the_hub_are_refused(hub_cache, tmp_path):
    cache, commit = hub_cache
    first, options = commit(1), {"cache_dir": str(cache)}
    for _ in range(2):
        load_and_save("owner/tiny", tmp_path / "store", **options)
    commit(2)
    with pytest.raises(ValueError, match="not filled from owner/tiny as it is now"):
        load_and_save("owner/tiny", tmp_path / "store", **options)
    load_and_save("owner/tiny", tmp_path / "store", revision=first, **options)


def test_pushing_while_saving_is_refused(build_mixture, tmp_path):
    model = build_mixture("mixtral")
    with (
        offload_experts(model, ExpertStoreConfig(str(tmp_path / "store"))),
        pytest.raises(ValueError, match="call push_to_hub on the model"),
    ):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)


LIMITED = """
import resource, sys
import torch
from transformers import AutoModelForCausalLM
from mixturekit.modeling.expert_store import ExpertStoreConfig
from mixturekit.modeling.lazy_adamw import LazyAdamW
from mixturekit.modeling.offloaded_experts import load_offloaded
torch.set_num_threads(1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
limit = used + int(sys.argv[3]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
ids = torch.arange(3, 13)[None]
if sys.argv[2] == "memory":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    model, store = load_offloaded(sys.argv[1], ExpertStoreConfig(sys.argv[2], fast_capacity=4, ram_capacity=4))
    optimizer = LazyAdamW(store)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        print(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(model.generate(ids, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape[1])
    store.close()
"""


def run_limited(*arguments):
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_model_larger_than_memory_trains_and_generates(build_mixture, tmp_path):
    """192 MiB of weights, and 384 more of moments, in a process that may take 128 MiB.

    Besides the 192 that transformers maps to read the file: the limit counts them, too.
    """
    model = build_mixture("mixtral", 64, hidden_size=128, num_hidden_layers=4, head_dim=64, intermediate_size=512)
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    del model
    limit = 128 + 192
    failed = run_limited(tmp_path / "model", "memory", limit)
    assert failed.returncode != 0
    assert "allocate" in failed.stderr or "MemoryError" in failed.stderr, failed.stderr
    succeeded = run_limited(tmp_path / "model", tmp_path / "store", limit)
    assert succeeded.returncode == 0, succeeded.stderr
    *losses, length = map(float, succeeded.stdout.split())
    assert losses[2] < losses[0]
    assert length == 14
