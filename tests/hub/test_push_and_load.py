"""What `push_to_hub.py` pushes, a stranger loads: the same model to the bit, with a card that is in order."""

import json
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from mixturekit.hub_cards import card_problems
from mixturekit.hub_cards.published_files import file_problems
from mixturekit.modeling import MopForActionPrediction, TieredMoeForActorCritic

SYSTEMS = ("more", "mop", "ppo", "tiered_moe")
TOKENS = torch.arange(3, 15)[None]
FRAMES = torch.arange(2 * 4 * 84 * 84).view(2, 1, 4, 84, 84).remainder(251).byte()
CODE_OF = {"more": "modeling_more.py", "mop": "modeling_mop.py", "tiered_moe": "modeling_tiered_moe.py"}
# What the code on the cards prints.
PRINTED = {"more": "Mary went to the kitchen", "ppo": "Question:", "tiered_moe": "tensor(["}

# Of a folder or a name on the Hub, logits of the same input.
LOGITS = {
    "more": """
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({place!r}, {options}).eval()
        with torch.no_grad():
            torch.save(model(torch.arange(3, 15)[None]).logits, {file!r})
        print(type(model).__module__.split(".")[0])
    """,
    "mop": """
        import numpy as np, torch
        from transformers import AutoModel
        policy = AutoModel.from_pretrained({place!r}, {options}).eval()
        images = np.random.default_rng(0).integers(3, size=(2, 7, 7, 3), dtype=np.uint8)
        with torch.no_grad():
            logits = policy.step(images, np.array([0, 3]), ["go to a red ball", "pick up the grey key"]).logits
        torch.save(logits, {file!r})
        print(type(policy).__module__.split(".")[0])
    """,
    "tiered_moe": """
        import torch
        from transformers import AutoModel
        agent = AutoModel.from_pretrained({place!r}, {options}).eval()
        frames = torch.arange(2 * 4 * 84 * 84).view(2, 1, 4, 84, 84).remainder(251).byte()
        start = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
        with torch.no_grad():
            torch.save(agent(frames, *start).logits, {file!r})
        print(type(agent).__module__.split(".")[0])
    """,
}
LOGITS["ppo"] = LOGITS["more"]


def logits_of(person, system, place, **options):
    """The logits that somebody gets, and where the code came from."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    told = person.do(LOGITS[system].format(place=str(place), options=given, file="logits.pt"))
    return torch.load(person.folder / "logits.pt"), told.split()[-1]


@torch.no_grad()
def expected_logits(system, folder):
    if system in ("more", "ppo"):
        return AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    if system == "tiered_moe":
        start = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
        return TieredMoeForActorCritic.from_pretrained(folder).eval()(FRAMES, *start).logits
    images = np.random.default_rng(0).integers(3, size=(2, 7, 7, 3), dtype=np.uint8)
    policy = MopForActionPrediction.from_pretrained(folder).eval()
    return policy.step(images, np.array([0, 3]), ["go to a red ball", "pick up the grey key"]).logits


@pytest.fixture(scope="module")
def pushed(hub, owner, runs):
    """The repositories, by system."""
    for system in SYSTEMS:
        told = owner.push("--model_name_or_path", runs[system], "--repo_id", f"owner/{system}")
        assert f"{hub.url}/owner/{system} is there" in told
    return {system: hub.model(f"owner/{system}") for system in SYSTEMS}


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def test_a_stranger_loads_the_same_model_to_the_bit(system, pushed, runs, stranger):
    trust = {} if system == "ppo" else {"trust_remote_code": True}
    logits, source = logits_of(stranger, system, f"owner/{system}", **trust)
    assert source == ("transformers" if system == "ppo" else "transformers_modules")
    assert torch.equal(logits, expected_logits(system, runs[system]))


def test_who_has_the_package_needs_no_remote_code(system, pushed, runs, owner):
    owner.do("import mixturekit.modeling")
    logits, source = logits_of(owner, system, f"owner/{system}")
    assert source == ("transformers" if system == "ppo" else "mixturekit")
    assert torch.equal(logits, expected_logits(system, runs[system]))


def test_what_was_loaded_once_loads_without_a_network(pushed, runs, stranger, arrive):
    for system in SYSTEMS:
        logits_of(stranger, system, f"owner/{system}", **({} if system == "ppo" else {"trust_remote_code": True}))
    offline = arrive("stranger", home=stranger.folder / "home", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    for system in SYSTEMS:
        trust = {} if system == "ppo" else {"trust_remote_code": True}
        logits, _ = logits_of(offline, system, f"owner/{system}", **trust)
        assert torch.equal(logits, expected_logits(system, runs[system]))


def test_the_card_is_in_order_and_has_the_figures_of_the_run(system, pushed, runs, tmp_path):
    unpack(pushed[system], tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card_problems(card, tmp_path) == [] and file_problems(tmp_path) == []
    record = json.loads((runs[system] / "training_record.json").read_text())
    assert f"{record['parameters']['total']:,}-parameter" in card
    assert f"accelerate launch recipes/{record['command'].split('/')[1].split()[0]}" in card
    assert f'("owner/{system}"' in card and "figures/training.png" in pushed[system].files


def test_the_card_pins_the_revision_that_it_came_with(system, pushed, stranger, runs):
    revision = re.search(r'revision = "([0-9a-f]{40})"', pushed[system].files["README.md"].decode())[1]
    assert pushed[system].revision(revision) is not None
    trust = {} if system == "ppo" else {"trust_remote_code": True}
    logits, _ = logits_of(stranger, system, f"owner/{system}", revision=revision, **trust)
    assert torch.equal(logits, expected_logits(system, runs[system]))


def test_the_code_on_the_card_runs(system, pushed, stranger):
    code = pushed[system].files["README.md"].decode().split("```python\n")[1].split("```")[0]
    told = stranger.do(code)
    # A tokenizer reads the configuration of its model, too, and asks whoever has not said that its code may run.
    assert "Do you wish to run" not in told
    if system == "mop":
        assert 0 <= float(told.split()[-1]) <= 1
    else:
        assert PRINTED[system] in told


def test_nothing_of_this_machine_and_of_the_training_is_published(system, pushed, runs):
    files = pushed[system].files
    assert {"README.md", "config.json", "training_record.json"} <= set(files)
    # Where experts are on a disk, they are saved a layer at a time.
    assert ("model.safetensors.index.json" if system == "tiered_moe" else "model.safetensors") in files
    assert ("tokenizer.json" in files) == (system in ("more", "ppo"))
    assert (CODE_OF.get(system) in files) == (system in CODE_OF)
    assert not any(name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name for name in files)
    assert not any("tfevents" in name or "environments" in name for name in files)
    for name, content in files.items():
        if not name.endswith((".png", ".safetensors")):
            for secret in (str(runs[system]), str(runs[system].parent), socket.gethostname(), "hf_owner"):
                assert secret not in content.decode(), name


def test_the_critic_travels_with_its_policy(pushed, runs):
    published = load(pushed["ppo"].files["value_head.safetensors"])
    saved = load_file(runs["ppo"] / "value_head.safetensors")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], value) for name, value in saved.items())


def test_a_dry_run_shows_files_and_card_and_sends_nothing(hub, owner, runs):
    asked = len(hub.requests)
    told = owner.push("--model_name_or_path", runs["more"], "--repo_id", "owner/dry", "--dry_run")
    assert "model.safetensors" in told and "# dry" in told and "Files and card are in order." in told
    assert "Stays here: " in told and "checkpoint-6/" in told
    assert len(hub.requests) == asked


def test_an_update_leaves_no_file_of_the_revision_before(hub, owner, runs, tmp_path):
    owner.push("--model_name_or_path", runs["more"], "--repo_id", "owner/updated")
    shutil.copytree(runs["more"], tmp_path / "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    owner.do(f"""
        from mixturekit.modeling import MoreForCausalLM
        model = MoreForCausalLM.from_pretrained({str(runs["more"])!r})
        model.save_pretrained({str(tmp_path / "sharded")!r}, max_shard_size="60KB")
    """)
    owner.push("--model_name_or_path", tmp_path / "sharded", "--repo_id", "owner/updated", "--update")
    files = hub.model("owner/updated").files
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1 and {name for name in files if name.startswith("model-")} == shards
    assert "model.safetensors" not in files


def test_a_private_repository_is_for_its_owner(owner, stranger, runs):
    owner.push("--model_name_or_path", runs["mop"], "--repo_id", "owner/hidden", "--private")
    read = "from huggingface_hub import hf_hub_download; hf_hub_download('owner/hidden', 'config.json')"
    owner.do(read)
    assert stranger.do(read, may_fail=True).startswith("RepositoryNotFoundError")


def test_a_collection_takes_what_is_pushed(hub, owner, runs):
    options = ("--repo_id", "owner/collected", "--collection", "owner/agents-0123456789abcdef01234567")
    owner.push("--model_name_or_path", runs["mop"], *options)
    assert hub.collections["owner/agents-0123456789abcdef01234567"] == [{"type": "model", "id": "owner/collected"}]


def test_the_command_line_of_the_hub_uploads_and_downloads(hub, owner, runs, stranger):
    owner.do(f"""
        import sys
        from huggingface_hub.cli.hf import main
        sys.argv = ["hf", "upload", "owner/by-hand", {str(runs["mop"])!r}, "--exclude", "checkpoint-*/*"]
        main()
    """)
    assert "model.safetensors" in hub.model("owner/by-hand").files
    told = stranger.do("""
        import os
        from huggingface_hub import snapshot_download
        print(sorted(os.listdir(snapshot_download("owner/by-hand"))))
    """)
    assert "modeling_mop.py" in told and "model.safetensors" in told


def unpack(repository, folder):
    """Writes the files of a repository."""
    for name, content in repository.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
