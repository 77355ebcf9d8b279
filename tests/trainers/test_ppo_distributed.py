"""PPO in two processes: the same update as one process with twice the batch. As a program, this file trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixturekit.trainers.ppo_config import PPOConfig
from mixturekit.trainers.ppo_trainer import PPOTrainer

VOCABULARY = 24
PROMPTS = [f"w{3 + index} w{5 + index}" for index in range(8)]


def complete(prompts, trainer):
    """The same completion of a prompt in whichever process, of lengths from 1 to 4."""
    encoded = trainer._tokenizer(prompts)["input_ids"]
    completions = [[3 + (7 * ids[0] + step) % (VOCABULARY - 3) for step in range(1 + ids[0] % 4)] for ids in encoded]
    return {
        "prompt_ids": encoded,
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def train(folder: Path, processes: int) -> None:
    """One update of eight completions, by plain gradient descent; TRL's balancing loss is one of each process."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    policy = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    config = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, max_steps=1,
        optim="sgd", learning_rate=0.5, value_learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
        beta=0.0, lam=0.9, max_completion_length=4, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True, gradient_checkpointing=False, logging_steps=1, router_replay="r2", router_aux_loss_coef=0.0,
    )  # fmt: skip
    reward = lambda completion_ids, **kwargs: [sum(ids) % 5 / 4 for ids in completion_ids]  # noqa: E731
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = PPOTrainer(policy, reward, config, train_dataset=data, processing_class=tokenizer, rollout_func=complete)
    torch.nn.init.constant_(trainer._policy.value_head.output.weight, 0.1)
    trainer.train()
    trainer.save_model()
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_update_of_one_with_twice_the_batch(tmp_path):
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if processes == 2 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *launcher, __file__, str(tmp_path / str(processes)), str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("model.safetensors", "value_head.safetensors"):
        one, two = (load_file(tmp_path / processes / name) for processes in "12")
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-6, rtol=1e-4, msg=key)
    # A fresh head has no bias.
    assert one["output.bias"].abs() > 0.01


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
