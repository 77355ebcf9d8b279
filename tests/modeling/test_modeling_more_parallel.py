"""MoRE whose weights are split over two processes, by width or by expert, computes what one process does."""

import os
import subprocess
import sys

import pytest
import torch

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.modeling.configuration_more import EXPERT_TYPES

PROGRAM = """
import sys
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from mixturekit.modeling import MoreForCausalLM

def load(folder, **sizes):
    return MoreForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()

def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def own_share(parameter):
    return parameter.to_local().shape[0] / parameter.shape[0] if isinstance(parameter, DTensor) else 1

def check_inference(model, expected):
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6)

def check_gradients(model, tokens, expected):
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(full(parameter.grad), expected["gradients"][name], rtol=1e-4, atol=1e-7, msg=name)

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt")

    by_width = load(folder, tp_size=2)
    assert own_share(by_width.model.layers[0].self_attn.q_proj.weight) == 1 / 2
    check_inference(by_width, expected)
    check_gradients(by_width, expected["tokens"], expected)

    by_expert = load(folder, tp_size=2, ep_size=2)
    assert {own_share(parameter) for parameter in by_expert.model.layers[0].mlp.experts.parameters()} == {1 / 2}
    assert own_share(by_expert.model.layers[0].self_attn.q_proj.weight) == 1 / 2
    check_inference(by_expert, expected)
    check_gradients(by_expert, expected["tokens"], expected)
    # One token at a time may go to experts of one process only.
    generated = by_expert.generate(expected["tokens"][:1, :4], max_new_tokens=6, do_sample=False)
    assert generated.tolist() == expected["generated"]
    by_expert.save_pretrained(f"{folder}/saved")

    if by_expert.config.expert_type == "more_a":
        with pytest.raises(ValueError, match="all_reduce"):
            load(folder, tp_size=2, ep_size=2, ep_implementation="all_to_all")
    else:
        # Each process has half of the batch, half of the experts, and half of all other weights.
        sharded = load(folder, fsdp_size=2, ep_size=2)
        rank = torch.distributed.get_rank()
        check_gradients(sharded, expected["tokens"][rank : rank + 1], expected)
"""


def save_with_results(expert_type, folder):
    """Saves a model, and what it computes in one process."""
    torch.manual_seed(0)
    model = MoreForCausalLM(MoreConfig.from_preset("debug", expert_type, num_experts_per_tok=2)).eval()
    tokens = torch.randint(1, 512, (2, 16))
    model.train()(tokens, labels=tokens).loss.backward()
    model.eval()
    results = {
        "tokens": tokens,
        "logits": model(tokens).logits.detach(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "generated": model.generate(tokens[:1, :4], max_new_tokens=6, do_sample=False).tolist(),
    }
    model.save_pretrained(folder)
    torch.save(results, folder / "expected.pt")
    return model


def test_two_processes_compute_what_one_does(tmp_path):
    folders = [tmp_path / expert_type for expert_type in EXPERT_TYPES]
    models = [save_with_results(folder.name, folder) for folder in folders]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launch, *folders], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder, model in zip(folders, models, strict=True):
        saved = MoreForCausalLM.from_pretrained(folder / "saved").state_dict()
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state_initialization", ["zeros", "learned"])
@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
def test_the_plan_splits_every_parameter_of_the_experts(expert_type, state_initialization):
    config = MoreConfig.from_preset("debug", expert_type, state_initialization=state_initialization)
    with torch.device("meta"):
        experts = MoreForCausalLM(config).model.layers[0].mlp.experts
    split = [name.rpartition(".")[2] for name, style in config.base_model_ep_plan.items() if style == "grouped_gemm"]
    assert sorted(split) == sorted(name for name, _ in experts.named_parameters())
