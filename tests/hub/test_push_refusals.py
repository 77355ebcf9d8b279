"""What goes wrong on the way to the Hub: a sentence for each, and nothing there is half done."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def push(owner, runs):
    """Pushes the smallest run with other options, and returns what the recipe ended with."""

    def push(*options, folder=None, who=None):
        folder = runs["mop"] if folder is None else folder
        told = (who or owner).push("--model_name_or_path", folder, *options, may_fail=True)
        assert told is None or "\n" not in told
        return told

    return push


@pytest.fixture
def broken(runs, tmp_path):
    """A copy of a run to break."""

    def broken(system="mop"):
        ignored = shutil.ignore_patterns("checkpoint-*", "runs", "warm_start")
        return shutil.copytree(runs[system], tmp_path / system, ignore=ignored)

    return broken


def test_a_wrong_token_is_told_before_anything_is_sent(hub, push):
    told = push("--repo_id", "owner/new", "--token", "hf_wrong")
    assert told == "The Hub did not accept the token: log in with `hf auth login`, or give another with --token."
    assert ("model", "owner/new") not in hub.repositories


def test_without_a_token_there_is_a_hint_where_to_get_one(hub, owner, runs):
    owner.do("import os; kept = os.environ.pop('HF_TOKEN')")
    told = owner.push("--model_name_or_path", runs["mop"], "--repo_id", "owner/new", may_fail=True)
    owner.do("import os; os.environ['HF_TOKEN'] = 'hf_owner'")
    assert told == "There is no token of the Hub: log in with `hf auth login`, or give --token."


def test_nobody_writes_to_what_is_not_theirs(push):
    told = push("--repo_id", "other/new")
    assert told == "owner may not write to other/new: choose a name of your own, or a token that may write."


def test_a_repository_that_exists_is_not_replaced_unasked(hub, push):
    assert push("--repo_id", "owner/once") is None
    revisions = len(hub.model("owner/once").revisions)
    told = push("--repo_id", "owner/once")
    assert told == "owner/once is on the Hub already: give it a new revision with --update, or choose another."
    assert len(hub.model("owner/once").revisions) == revisions
    assert push("--repo_id", "owner/once", "--update") is None
    assert len(hub.model("owner/once").revisions) > revisions


def test_a_hub_that_is_not_there_is_named(arrive, push):
    lost = arrive("owner", HF_ENDPOINT="http://127.0.0.1:9")
    told = push("--repo_id", "owner/new", who=lost)
    assert told.startswith("http://127.0.0.1:9 cannot be reached (")
    assert told.endswith("). owner/new is as before; run the same command again.")


@pytest.mark.parametrize(
    ("system", "missing", "message"),
    [
        ("mop", "config.json", "There is no config.json, so this is no checkpoint."),
        ("mop", "model.safetensors", "There are no weights: model.safetensors is missing."),
        ("more", "recurrence.py", "config.json asks for the code of recurrence.py, which is missing"),
        ("mop", "training_record.json", "has no training_record.json, from which its card is written"),
    ],
)
def test_a_missing_file_is_named(hub, push, broken, system, missing, message):
    folder = broken(system)
    (folder / missing).unlink()
    assert message in push("--repo_id", "owner/new", folder=folder)
    assert ("model", "owner/new") not in hub.repositories


def test_weights_that_are_cut_short_are_not_sent(push, broken):
    folder = broken()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors cannot be read" in push("--repo_id", "owner/new", folder=folder)


def test_a_folder_that_is_not_there_is_named(push, tmp_path):
    assert "There is no folder" in push("--repo_id", "owner/new", folder=tmp_path / "nowhere")
    assert "has no eval_results.json" in push("--repo_id", "owner/new", "--evaluation", tmp_path)


def test_a_figure_that_is_not_a_number_stops_the_push(push, broken):
    folder = broken()
    record = json.loads((folder / "training_record.json").read_text())
    record["evaluation"]["eval_return"] = float("nan")
    (folder / "training_record.json").write_text(json.dumps(record))
    assert "The card has 'nan' in its text, so a fact was left out." in push("--repo_id", "owner/new", folder=folder)


def test_an_adapter_to_a_base_of_this_machine_is_no_use_to_others(push, broken):
    folder = broken("ppo")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))
    told = push("--repo_id", "owner/new", folder=folder)
    assert "The adapter belongs to 'base', which is on this machine only" in told
    told = push("--repo_id", "owner/new", "--base_model", "owner/base", folder=folder)
    assert "The policy was made from owner/base, whose licence decides: name it with --license." in told


@pytest.mark.parametrize("system", ["more", "mop", "ppo", "tiered_moe"])
def test_a_licence_that_is_named_is_that_of_the_card(owner, runs, system):
    options = ("--model_name_or_path", runs[system], "--repo_id", "owner/new", "--dry_run")
    before, card = owner.push(*options), owner.push(*options, "--license", "cc-by-4.0")
    assert "license: apache-2.0\n" in before and "Apache-2.0: weights, code and card." in before
    assert "license: cc-by-4.0\n" in card and "apache" not in card.lower()


def changed(folder, factor):
    """Changes the weights of a run."""
    path = folder / "model.safetensors"
    save_file({name: factor * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def test_an_upload_that_is_cut_off_leaves_the_revision_before_whole(hub, arrive, push, broken, stranger):
    assert push("--repo_id", "owner/whole") is None
    revisions = list(hub.model("owner/whole").revisions)
    unlucky, folder = arrive("owner"), changed(broken(), 2)
    hub.stall_uploads_after = 1000
    try:
        unlucky.begin_push("--model_name_or_path", folder, "--repo_id", "owner/whole", "--update")
        assert hub.stalled.wait(timeout=60)
        unlucky.leave()
    finally:
        hub.stall_uploads_after = None
    assert hub.model("owner/whole").revisions == revisions
    stranger.do("from transformers import AutoModel; AutoModel.from_pretrained('owner/whole', trust_remote_code=True)")
    # What was cut off is done by doing it again.
    assert push("--repo_id", "owner/whole", "--update", folder=folder) is None
    assert hub.model("owner/whole").files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_card_that_is_not_taken_does_not_hide_that_the_files_were(hub, push):
    hub.refused_title = "Pin the revision on the card"
    try:
        told = push("--repo_id", "owner/half")
    finally:
        hub.refused_title = None
    repository = hub.model("owner/half")
    assert "model.safetensors" in repository.files
    landed = f"owner/half has the files already, as revision {repository.revisions[-1][0]}"
    assert told.endswith(f"{landed}: run the same command again with --update.") and "as before" not in told
    assert push("--repo_id", "owner/half", "--update") is None
    assert hub.model("owner/half").titles[-1] == "Pin the revision on the card"


def test_a_collection_of_others_does_not_hide_that_the_model_is_there(hub, push):
    told = push("--repo_id", "owner/alone", "--collection", "other/agents-0123456789abcdef01234567")
    assert told.startswith("owner may not write to other/agents-0123456789abcdef01234567")
    assert "owner/alone has the files already" in told and "README.md" in hub.model("owner/alone").files


@pytest.mark.slow
def test_a_connection_that_breaks_again_and_again_ends_in_a_sentence(hub, push, broken):
    assert push("--repo_id", "owner/shaky") is None
    revisions = list(hub.model("owner/shaky").revisions)
    hub.cut_uploads_after = 1000
    try:
        told = push("--repo_id", "owner/shaky", "--update", folder=changed(broken(), 3))
    finally:
        hub.cut_uploads_after = None
    assert "owner/shaky is as before; run the same command again" in told
    assert hub.model("owner/shaky").revisions == revisions


@pytest.mark.slow
def test_a_first_upload_that_is_cut_off_is_done_by_doing_it_again(hub, push, broken):
    folder = changed(broken(), 4)
    hub.cut_uploads_after = 1000
    try:
        assert "owner/unborn is as before" in push("--repo_id", "owner/unborn", folder=folder)
    finally:
        hub.cut_uploads_after = None
    assert set(hub.model("owner/unborn").files) == {".gitattributes"}
    assert push("--repo_id", "owner/unborn", folder=folder) is None
