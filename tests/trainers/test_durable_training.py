"""Checkpoints of any `Trainer` here: whole or not there, checked before they are loaded, made when a signal comes."""

import copy
import errno
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixturekit.trainers.checkpoints import (
    MANIFEST,
    UNFINISHED,
    check_checkpoint,
    checkpoints_of,
    newest_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)
from mixturekit.trainers.durable_training import DurableTraining


class Line(nn.Module):
    """Fits `y = 2 x`."""

    def __init__(self, width=1):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x, y):
        return {"loss": ((self.linear(x) - y) ** 2).mean()}


class Points(Dataset):
    """Points of the line; the one of `poison` is not a number."""

    def __init__(self, width=1, poison=None):
        self.width, self.poison = width, poison

    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.full((self.width,), index / 64)
        return {"x": x, "y": torch.tensor([torch.nan if index == self.poison else index / 32])}


class DurableTrainer(DurableTraining, Trainer):
    """The smallest one."""


class At(TrainerCallback):
    """Does something after an update."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def make_trainer(folder, width=1, poison=None, callbacks=None, **changes):
    torch.manual_seed(0)
    settings = {"max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    settings |= {"lr_scheduler_type": "constant", "label_names": ["y"]} | changes
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **settings)
    data = Points(width, poison)
    return DurableTrainer(Line(width), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture
def run(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    return trainer


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "flipped": lambda folder: flip(folder / "model.safetensors"),
    "missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "without manifest": lambda folder: (folder / MANIFEST).unlink(),
    "unreadable manifest": lambda folder: (folder / MANIFEST).write_text("[]"),
}


def test_checkpoints_are_whole_and_nothing_else_is_left(run):
    folder = run.args.output_dir
    assert [path.name for path in checkpoints_of(folder)] == [f"checkpoint-{step}" for step in (8, 6, 4, 2)]
    assert all(check_checkpoint(path) is None for path in checkpoints_of(folder))
    assert not any(name.startswith("_") for name in os.listdir(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_resumed(run, damage):
    newest, before, *_ = checkpoints_of(run.args.output_dir)
    DAMAGES[damage](newest)
    with pytest.warns(UserWarning, match=f"{newest.name} (has|lacks) .*; it is skipped"):
        assert newest_checkpoint(run.args.output_dir) == before
    again = make_trainer(run.args.output_dir, max_steps=10)
    with pytest.warns(UserWarning, match=f"{newest.name} .*; it is skipped"):
        again.train(resume_from_checkpoint=str(newest))
    whole = make_trainer(f"{run.args.output_dir}_whole", max_steps=10)
    whole.train()
    # What was damaged has been written anew.
    assert check_checkpoint(newest) is None and losses(again) == losses(whole)


def test_no_later_checkpoint_is_taken_for_a_damaged_one(run):
    folder = run.args.output_dir
    damaged = checkpoints_of(folder)[2]
    assert damaged.name == "checkpoint-4"
    DAMAGES["missing"](damaged)
    again = make_trainer(folder, max_steps=10, save_strategy="no")
    begun = []
    again.add_callback(At(3, lambda: begun.append("after checkpoint-2")))
    with pytest.warns(UserWarning, match="checkpoint-4 lacks scheduler.pt; it is skipped"):
        again.train(resume_from_checkpoint=str(damaged))
    assert begun == ["after checkpoint-2"]


def test_nothing_to_resume_is_not_a_reason_to_begin_anew(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_checkpoint_of_another_model_is_not_resumed(run, tmp_path):
    other = make_trainer(tmp_path / "other", width=2, max_steps=12, save_steps=12)
    other.train()
    os.rename(tmp_path / "other" / "checkpoint-12", tmp_path / "run" / "checkpoint-12")
    again = make_trainer(tmp_path / "run", max_steps=10)
    with pytest.warns(UserWarning, match="checkpoint-12 is of a model with other parameters; it is skipped"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    assert again.state.global_step == 10
    with pytest.raises(
        ValueError, match="checkpoint-12 is of a model with other parameters, and there is no earlier one"
    ):
        make_trainer(tmp_path / "third", width=3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))


def test_token_of_the_hub_serves_in_the_process_and_is_in_no_file(tmp_path):
    trainer = make_trainer(tmp_path, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin"} <= {path.name for path in files}
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    assert copy.deepcopy(trainer.args).hub_token == trainer.args.hub_token == "hf_secret"
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None


def test_planted_pickle_is_not_run(run, tmp_path):
    """Nor could it be sealed: what would run on loading is refused by torch, too."""
    marker = tmp_path / "ran"

    class Planted:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    newest = checkpoints_of(run.args.output_dir)[0]
    torch.save(Planted(), newest / "optimizer.pt")
    with pytest.warns(UserWarning, match="has a optimizer.pt"):
        make_trainer(run.args.output_dir, max_steps=10).train(resume_from_checkpoint=str(newest))
    torch.save(Planted(), newest / "optimizer.pt")
    seal_checkpoint(newest, run._parameters())
    with pytest.raises(Exception, match="[Ww]eights"):
        make_trainer(run.args.output_dir, max_steps=12).train(resume_from_checkpoint=str(newest))
    assert not marker.exists()


def test_run_that_had_made_its_last_update_makes_no_other(run):
    again = make_trainer(run.args.output_dir)
    result = again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8 == result.global_step and losses(again) == losses(run)
    assert torch.equal(again.model.linear.weight, run.model.linear.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_makes_a_checkpoint_and_ends_the_run(tmp_path, number):
    listening = signal.getsignal(number)
    if listening is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        listening = signal.SIG_DFL
    trainer = make_trainer(tmp_path / "stopped", callbacks=[At(3, lambda: os.kill(os.getpid(), number))])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + number and signal.getsignal(number) is listening
    assert newest_checkpoint(tmp_path / "stopped").name == "checkpoint-3"
    resumed, whole = make_trainer(tmp_path / "stopped"), make_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)


def test_save_total_limit_keeps_the_best_and_the_newest(tmp_path):
    trainer = make_trainer(
        tmp_path, save_total_limit=2, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="loss", greater_is_better=True, learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    # The loss falls, and the largest is the best here.
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-8", "checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2") == trainer.state.best_model_checkpoint


def test_a_run_that_a_signal_ends_keeps_the_checkpoint_that_it_names_beside_the_best(tmp_path, capsys):
    options = {
        "save_total_limit": 1, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
        "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 0.05,
    }  # fmt: skip
    stop = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = make_trainer(tmp_path / "run", callbacks=[stop], **options)
    with pytest.raises(SystemExit):
        stopped.train()
    # The loss falls, and the largest is the best here.
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["checkpoint-5", "checkpoint-2"]
    assert f"stopped at {tmp_path / 'run' / 'checkpoint-5'};" in capsys.readouterr().err
    saved = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    assert torch.equal(stopped.model.linear.weight, saved["linear.weight"])
    resumed, whole = make_trainer(tmp_path / "run", **options), make_trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)


def test_rotation_removes_what_a_resumed_run_has_left_behind_and_then_the_oldest(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate_checkpoints(tmp_path / "checkpoint-6", 3, best=tmp_path / "checkpoint-2")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    rotate_checkpoints(tmp_path / "checkpoint-6", 1, best=tmp_path / "checkpoint-2")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-6", "checkpoint-2"]
    rotate_checkpoints(tmp_path / "checkpoint-6", None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6"]


def test_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is nan; no checkpoint|.*checkpoint-\d+"):
        make_trainer(tmp_path, poison=17, max_steps=32).train()
    assert all(check_checkpoint(path) is None for path in checkpoints_of(tmp_path))


def test_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = trainer.model.linear.weight.clone()
    with pytest.raises(
        FloatingPointError, match="the gradient of step 1 has the norm inf; no checkpoint had been saved"
    ):
        trainer.train()
    assert torch.equal(trainer.model.linear.weight, before)


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(4, lambda: trainer.model.linear.bias.data.fill_(torch.nan)))
    with pytest.raises(
        FloatingPointError, match="linear.bias has values that are not finite after step 4; .*checkpoint-2"
    ):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]


def test_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path):
    trainer = make_trainer(tmp_path)
    # A file where the folder of the checkpoint would be: what a full disk does is seen in the recipes' tests.
    trainer.add_callback(At(4, lambda: (tmp_path / UNFINISHED).write_text("in the way")))
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be written \(.*\); the last good .*checkpoint-2"
    ) as raised:
        trainer.train()
    assert raised.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
    assert check_checkpoint(tmp_path / "checkpoint-2") is None and not (tmp_path / "checkpoint-4").exists()


def test_published_checkpoint_replaces_one_of_the_same_name(tmp_path):
    for name, text in (("_unfinished/checkpoint-1", "new"), ("checkpoint-1", "old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(text)
        seal_checkpoint(tmp_path / name, "any")
    publish_checkpoint(tmp_path / "_unfinished" / "checkpoint-1", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
    assert check_checkpoint(tmp_path / "checkpoint-1") is None and os.listdir(tmp_path / "_unfinished") == []
