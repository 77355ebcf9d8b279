"""MoRE whose attention and vocabulary are split over two processes gives the logits of one."""

import os
import subprocess
import sys

import torch

from mixturekit.modeling import MoreConfig, MoreForCausalLM

PROGRAM = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from mixturekit.modeling import MoreForCausalLM

torch.set_num_threads(1)
tokens = torch.arange(1, 33).view(2, 16)
for folder in sys.argv[1:]:
    model = MoreForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, DTensor) and weight.to_local().shape[0] == weight.shape[0] // 2
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, torch.load(f"{folder}/logits.pt"), rtol=1e-5, atol=1e-6)
"""


def test_two_processes_give_the_logits_of_one(tmp_path):
    folders = []
    for expert_type in ("base", "more_a", "more_b", "more_c", "more_d"):
        torch.manual_seed(0)
        model = MoreForCausalLM(MoreConfig.from_preset("debug", expert_type)).eval()
        folders.append(tmp_path / expert_type)
        model.save_pretrained(folders[-1])
        with torch.no_grad():
            torch.save(model(torch.arange(1, 33).view(2, 16)).logits, folders[-1] / "logits.pt")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launch, *folders], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
