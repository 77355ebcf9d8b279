"""What of a run's folder is published, and what is taken out of it before."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mixturekit.hub_cards.published_files import comes_from_a_push, file_problems, shareable, stage_files

INDEX = '{"weight_map": {"weight": "model-1.safetensors"}}'


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it, of a model that brings its code."""
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "runs").mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "checkpoint-4" / "model.safetensors")
    config = {"auto_map": {"AutoModel": "modeling_x.XModel"}, "name_or_path": "/home/me/base", "hub_token": "hf_x"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("from .parts import Part\n")
    (folder / "parts.py").write_text("import torch\n")
    (folder / "notes.py").write_text("private = True\n")
    for name in ("optimizer.pt", "training_args.bin", "runs/events.out.tfevents.1.host", "checkpoint-4/rng_state.pth"):
        (folder / name).write_bytes(b"")
    return folder


def test_weights_and_the_code_that_they_need_are_published_and_nothing_else(run, tmp_path):
    staged, left = stage_files(run, tmp_path / "staged")
    assert staged == ["config.json", "model.safetensors", "modeling_x.py", "parts.py"]
    assert "training_args.bin" in left and "notes.py" in left and "checkpoint-4/model.safetensors" in left
    assert sorted(path.name for path in (tmp_path / "staged").iterdir()) == staged
    assert file_problems(tmp_path / "staged") == []


def test_secrets_and_paths_do_not_leave(run, tmp_path):
    stage_files(run, tmp_path / "staged")
    config = json.loads((tmp_path / "staged" / "config.json").read_text())
    assert config == {"auto_map": {"AutoModel": "modeling_x.XModel"}, "name_or_path": "base"}


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("/home/me/data/train.jsonl", "train.jsonl"),
        ("C:\\Users\\me\\out", "out"),
        ("~/out", "out"),
        ("a/b", "a/b"),
        ("/", "/"),
        ({"hub_token": "hf_x", "steps": 3}, {"steps": 3}),
        ({"token": "x", "push_to_hub_token": "x", "api_key": "x", "use_auth_token": True}, {"use_auth_token": True}),
        ({"wandb_token": "x", "hubToken": "x", "Bearer_token": "x", "mode": "x"}, {"mode": "x"}),
        ({"eos_token": "<|end|>", "pad_token": "[PAD]"}, {"eos_token": "<|end|>", "pad_token": "[PAD]"}),
        ([{"path": "/a/b"}, 1.5, None, True], [{"path": "b"}, 1.5, None, True]),
    ],
)
def test_what_may_be_shared(value, shared):
    assert shareable(value) == shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "There is no config.json, so this is no checkpoint."),
        (lambda run: (run / "model.safetensors").unlink(), "There are no weights: model.safetensors is missing."),
        (lambda run: (run / "parts.py").unlink(), "config.json asks for the code of parts.py, which is missing"),
        (
            lambda run: (run / "parts.py").write_text("from mixturekit.modeling import X\n"),
            "parts.py imports mixturekit, which a stranger does not have.",
        ),
        (
            lambda run: save_file({"w.exp_avg": torch.ones(1)}, run / "model.safetensors"),
            "model.safetensors holds the state of an optimizer.",
        ),
        (
            lambda run: (run / "parts.py").write_text("key = 'hf_abcdefghijklmnopqrstuvwxyz'\n"),
            "parts.py holds a token of the Hub.",
        ),
        (
            lambda run: (run / "model.safetensors.index.json").write_text(INDEX),
            "model.safetensors.index.json names model-1.safetensors, which is missing.",
        ),
        (
            lambda run: (run / "adapter_config.json").write_text('{"base_model_name_or_path": "out/warm/start"}'),
            "The adapter belongs to 'out/warm/start', which is on this machine only",
        ),
    ],
)
def test_what_would_be_useless_or_tell_too_much_is_named(run, change, message):
    change(run)
    assert any(problem.startswith(message) for problem in file_problems(run))


def test_an_update_removes_only_what_an_earlier_push_has_left():
    assert comes_from_a_push("model-00001-of-00002.safetensors") and comes_from_a_push("recurrence.py")
    assert not comes_from_a_push("notes/diary.md") and not comes_from_a_push(".gitattributes")
    assert comes_from_a_push("data/train-00000-of-00001.parquet", "dataset")
