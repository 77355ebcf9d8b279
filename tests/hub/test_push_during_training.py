"""`--push_to_hub` in a training recipe: every revision that it makes can be loaded, the first as well as the last."""

import re

import pytest
from safetensors.torch import load
from transformers import Trainer

from mixturekit.hub_cards import card_problems

TOKEN = "hf_owner"
LOADED_BY = {"more": "AutoModelForCausalLM", "mop": "AutoModel", "ppo": "AutoModelForCausalLM"}


@pytest.fixture(scope="module", params=["more", "mop", "ppo"])
def pushed(request, hub, owner, run_options, tmp_path_factory):
    """The system, and the repository that its training has pushed to at every checkpoint."""
    script, *options = run_options(request.param)
    name = f"owner/{request.param}-in-training"
    folder = tmp_path_factory.mktemp("pushed") / request.param
    push = (
        "--push_to_hub",
        "true",
        "--hub_token",
        TOKEN,
        "--hub_model_id",
        name,
        "--hub_strategy",
        "every_save",
        "--hub_always_push",
        "true",
    )
    owner.run_recipe(script, *options, "--output_dir", folder, *push)
    return request.param, hub.model(name)


def test_revisions_during_training_are_complete(pushed, stranger):
    system, repository = pushed
    during = [sha for sha, title, _ in repository.revisions if title.startswith("Training in progress")]
    assert len(during) >= 1
    code = f"""
        from transformers import {LOADED_BY[system]}
        model = {LOADED_BY[system]}.from_pretrained({repository.name!r}, revision={{sha!r}}, trust_remote_code=True)
        print(sum(parameter.sum().item() for parameter in model.parameters()))
    """
    sums = [stranger.do(code.format(sha=sha)).split()[-1] for sha in [*during, repository.revisions[-1][0]]]
    assert len(set(sums)) > 1


def test_their_cards_are_in_order_and_know_only_what_was_measured_by_then(pushed):
    system, repository = pushed
    for _, title, files in repository.revisions[1:]:
        card = files["README.md"].data.decode()
        assert card_problems(card) == [], title
        assert f'("{repository.name}"' in card
    counts = [_updates(files) for _, _, files in repository.revisions[1:]]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert ("## Results" in card) and f"| updates | {counts[-1]} |" in card


def test_every_revision_of_a_language_model_knows_what_its_evaluation_asks(pushed):
    system, repository = pushed
    for _, title, files in repository.revisions[1:]:
        assert ("task_arguments.json" in files) == (system == "more"), title


def test_the_critic_is_in_every_revision(pushed):
    system, repository = pushed
    for _, title, files in repository.revisions[1:]:
        assert ("value_head.safetensors" in files) == (system == "ppo"), title
        if system == "ppo":
            assert "output.weight" in load(files["value_head.safetensors"].data)


def test_no_revision_has_the_token(pushed):
    system, repository = pushed
    for _, title, files in repository.revisions:
        assert [name for name, file in files.items() if TOKEN.encode() in file.data] == [], title


@pytest.mark.parametrize("hook", ["_finish_current_push", "_push_from_checkpoint", "push_to_hub", "init_hf_repo"])
def test_trainer_has_what_pushes_during_training_rely_on(hook):
    assert callable(getattr(Trainer, hook, None)), f"This transformers has no Trainer.{hook}: see publishing.py."


def _updates(files):
    return int(re.search(r"\| updates \| (\d+) \|", files["README.md"].data.decode())[1])
