"""No way of loading anything runs what a pickle in a folder asks for."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM

from mixturekit.modeling import (
    MopConfig,
    MopForActionPrediction,
    MoreConfig,
    MoreForCausalLM,
    TieredMoeConfig,
    TieredMoeForActorCritic,
)
from mixturekit.modeling.expert_records import RecordError
from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.trainers.agent_experts import build_agent
from mixturekit.trainers.checkpoints import check_checkpoint
from mixturekit.trainers.continual import load_agent_config
from mixturekit.trainers.continual_checkpoints import load_checkpoint, save_checkpoint
from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from mixturekit.trainers.continual_ppo_trainer import ContinualPpoTrainer
from mixturekit.trainers.expert_adapters import load_causal_lm
from mixturekit.trainers.gsm8k_completions import read_completions, read_report
from mixturekit.trainers.imitation_trainer import load_source
from mixturekit.trainers.policy_value_model import ValueHead, load_value_head
from mixturekit.trainers.task_data import saved_task_arguments
from mixturekit.trainers.tokenization import load_tokenizer
from mixturekit.trainers.training_record import load_training_record

# What is compared before a checkpoint is loaded, or is for other programs, as its code is.
UNREAD = ("checkpoint_manifest.json", "config.json")
NAMES = (
    "pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
    "model.safetensors", "adapter_model.safetensors", "value_head.safetensors", "environments_0.safetensors",
    "environments_0.json", "manifest.json", "task_arguments.json", "training_record.json", "tokenizer.json",
    "checkpoint_manifest.json", "model.pkl", "model.pt", "state.pt", "completions.jsonl", "eval_results.json",
)  # fmt: skip
CONFIGS = {
    "more": MoreConfig.from_preset("debug"),
    "mop": MopConfig(),
    "tiered": TieredMoeConfig(),
}
LOADERS = {
    "MoreForCausalLM": ("more", MoreForCausalLM.from_pretrained),
    "AutoModel": ("more", AutoModel.from_pretrained),
    "AutoModelForCausalLM": ("more", AutoModelForCausalLM.from_pretrained),
    "MopForActionPrediction": ("mop", MopForActionPrediction.from_pretrained),
    "TieredMoeForActorCritic": ("tiered", TieredMoeForActorCritic.from_pretrained),
    "policy of PPO": ("more", load_causal_lm),
    "value head": ("more", lambda folder: load_value_head(ValueHead(4), folder)),
    "adapters": ("more", lambda folder: _with_adapter(folder)),
    "tokenizer": ("more", load_tokenizer),
    "environments": ("mop", lambda folder: load_source(SimpleNamespace(load_state_dict=dict), None, folder, 0)),
    "expert store": ("tiered", lambda folder: _store(folder)),
    "copy of an expert store": ("tiered", lambda folder: _restored(folder)),
    "tasks of a checkpoint": ("more", saved_task_arguments),
    "record of a training": ("more", load_training_record),
    "solutions to go on with": ("more", lambda folder: list(read_completions(folder / "completions.jsonl"))),
    "report to go on with": ("more", lambda folder: read_report(folder / "eval_results.json")),
    "checkpoint of a run": ("more", lambda folder: _refused(check_checkpoint(folder))),
}


class Planted:
    """What a pickle of it does on being loaded: a file appears."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def _with_adapter(folder):
    from peft import PeftModel

    config = '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": ""}'
    Path(folder, "adapter_config.json").write_text(config)
    PeftModel.from_pretrained(MoreForCausalLM(CONFIGS["more"]), folder)


def _store(folder):
    return ExpertStore(ExpertStoreConfig(str(folder), 1, 1), {"up": (2, 3)}, num_layers=1, num_experts=1)


def _restored(folder):
    _store(folder / "store").restore(folder)


def _refused(problem):
    if problem is not None:
        raise ValueError(problem)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("planted", ["pickles only", "under every name"])
@pytest.mark.parametrize("loader", LOADERS)
def test_planted_pickles_are_never_run(tmp_path, loader, planted, kind):
    folder, marker = tmp_path / "checkpoint", tmp_path / "ran"
    config, load = LOADERS[loader]
    CONFIGS[config].save_pretrained(folder)
    for name in NAMES:
        if planted == "under every name" or not name.endswith((".safetensors", ".json")):
            if kind == "torch":
                torch.save(Planted(marker), folder / name)
            else:
                (folder / name).write_bytes(pickle.dumps(Planted(marker)))
    # A tokenizer and a store can begin without a file. Whatever is loaded, it is not from a pickle.
    with pytest.raises(Exception) as refused:  # noqa: B017, PT011
        load(folder)
        raise FileNotFoundError("nothing was loaded")
    assert not isinstance(refused.value, AttributeError | TypeError), refused.value
    assert not marker.exists()


def agent_trainer(folder, store):
    """A trainer of a small agent, with its experts in memory or in a store."""
    own = AgentArguments(
        expert_dim=32, expert_hidden_dim=16, num_layers=1, num_attention_heads=2, num_experts=4, hbm_capacity=2,
        dram_capacity=2, context_len=3, encoder_channels=[4, 8], nvme_path=str(folder / "store") if store else None,
    )  # fmt: skip
    games = GameArguments(games=["builtin:catch"], num_envs=2, steps_per_game=16)
    config = ContinualPpoConfig(output_dir=str(folder), num_steps=8, segment_len=4, num_minibatches=1, use_cpu=True)
    trainer = ContinualPpoTrainer(build_agent(own, load_agent_config(own, games.games), config), config, games, own)
    trainer.open_games()
    trainer.player.begin()
    return trainer


@pytest.mark.parametrize("store", [False, True], ids=["in memory", "in a store"])
def test_no_file_of_an_agents_checkpoint_may_be_a_pickle(tmp_path, store):
    marker, whole = tmp_path / "ran", agent_trainer(tmp_path / "run", store)
    try:
        checkpoint = save_checkpoint(whole)
        load_checkpoint(whole, checkpoint)
        files = [path for path in checkpoint.rglob("*") if path.is_file() and path.suffix != ".py"]
        read = [path for path in files if path.relative_to(checkpoint).as_posix() not in UNREAD]
        assert {"agent.safetensors", "optimizer.safetensors", "process_0.safetensors"} <= {path.name for path in read}
        for path in read:
            kept = path.read_bytes()
            torch.save(Planted(marker), path)
            with pytest.raises((ValueError, OSError, SafetensorError, RecordError)):
                load_checkpoint(whole, checkpoint)
            path.write_bytes(kept)
        assert not marker.exists()
    finally:
        whole.experts.close()


def test_the_pickles_would_run(tmp_path):
    torch.save(Planted(tmp_path / "ran"), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
