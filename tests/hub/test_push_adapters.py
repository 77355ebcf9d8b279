"""A policy that was trained by adapters travels as adapters to a base on the Hub, or as a part of it."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mixturekit.hub_cards import card_problems

TOKENS = torch.arange(3, 15)[None]
TERMS = ("--license", "mit", "--repo_id", "owner/adapters")
LOGITS = """
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained({name!r})
    {more}
    with torch.no_grad():
        torch.save(model.eval()(torch.arange(3, 15)[None]).logits, "logits.pt")
"""


@pytest.fixture(scope="module")
def adapted(owner, runs, run_options, tmp_path_factory):
    """The folder of a run that trained adapters, experts and all, on the policy of another run."""
    folder = tmp_path_factory.mktemp("adapted") / "out"
    script, *options = run_options("ppo")
    options[options.index("--warm_start_steps") + 1] = "0"
    options += ["--model_name_or_path", runs["ppo"], "--use_peft", "true", "--learning_rate", "1e-2"]
    owner.run_recipe(script, *options, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def expected(adapted, runs):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs["ppo"]), adapted)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_adapters_load_on_their_base_from_the_hub(hub, owner, stranger, runs, adapted, expected):
    owner.push("--model_name_or_path", runs["ppo"], "--repo_id", "owner/base")
    owner.push("--model_name_or_path", adapted, "--base_model", "owner/base", *TERMS)
    files = hub.model("owner/adapters").files
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= set(files)
    assert "model.safetensors" not in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    more = "from peft import PeftModel; model = PeftModel.from_pretrained(model, 'owner/adapters')"
    stranger.do(LOGITS.format(name="owner/base", more=more))
    assert torch.equal(torch.load(stranger.folder / "logits.pt"), expected)


def test_their_card_names_the_base_and_its_code_runs(hub, stranger, adapted, owner):
    card = hub.model("owner/adapters").files["README.md"].decode()
    assert card_problems(card) == []
    assert "base_model: owner/base\n" in card and "base_model_relation: adapter\n" in card
    assert "license: mit\n" in card and "mit, which owner/base asks for." in card
    assert "Question:" in stranger.do(card.split("```python\n")[1].split("```")[0])


def test_merged_they_need_no_base(hub, owner, stranger, runs, adapted, expected):
    options = ("--merge_adapter", "--base_model", runs["ppo"], "--repo_id", "owner/merged")
    told = owner.push("--model_name_or_path", adapted, *options, may_fail=True)
    assert told.endswith("The policy was made from another model, whose licence decides: name it with --license.")
    owner.push("--model_name_or_path", adapted, *options, "--license", "gemma")
    files = hub.model("owner/merged").files
    assert {"model.safetensors", "value_head.safetensors"} <= set(files)
    assert not any(name.startswith("adapter") for name in files)
    assert "license: gemma\n" in files["README.md"].decode()
    stranger.do(LOGITS.format(name="owner/merged", more=""))
    torch.testing.assert_close(torch.load(stranger.folder / "logits.pt"), expected, atol=1e-4, rtol=1e-4)
