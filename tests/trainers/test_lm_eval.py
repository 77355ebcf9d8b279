"""EleutherAI's evaluation harness on a MoRE checkpoint, which agrees with our perplexity of the same text."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.perplexity import score_texts
from mixturekit.trainers.tokenization import train_tokenizer

WINDOW = 32
TASK = {
    "task": "own_text",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in (
            ("bits_per_byte", "bits_per_byte"),
            ("byte_perplexity", "weighted_perplexity"),
            ("word_perplexity", "weighted_perplexity"),
        )
    ],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, solved):
    """A checkpoint that carries its own code, its model and tokenizer, and texts that are longer than the window."""
    story = "".join(f"{row.prompt}{row.answer} \n" for row in solved.stories)
    texts = [story, "Né en 1901 , he was – they say – the first . \n" * 9, "A short text ."]
    tokenizer = train_tokenizer(texts, 320)
    torch.manual_seed(0)
    config = MoreConfig.from_preset(
        "debug", "more_c", vocab_size=len(tokenizer), hidden_size=32, eos_token_id=tokenizer.eos_token_id
    )
    model = MoreForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.1)
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder, model, tokenizer, texts


def harness(folder, checkpoint, texts, **model_arguments):
    """The figures that `lm_eval` finds in a process of its own, which knows nothing of this repository."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "own_text.yaml").write_text(yaml.safe_dump(task))
    arguments = {"pretrained": checkpoint, "dtype": "float32", "trust_remote_code": True, **model_arguments}
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "own_text", "--include_path", folder,
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()), "--device", "cpu",
        "--batch_size", 4, "--output_path", folder / "out.json",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, env=environment, cwd=folder
    )
    assert run.returncode == 0, run.stderr[-5000:]
    (path,) = folder.glob("out*.json")
    figures = json.loads(path.read_text())["results"]["own_text"]
    return {name.removesuffix(",none"): value for name, value in figures.items()}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 1])
def test_the_harness_agrees_with_our_perplexity_of_the_same_texts(checkpoint, tmp_path, depth):
    folder, model, tokenizer, texts = checkpoint
    assert len(tokenizer(texts[0])["input_ids"]) > 3 * WINDOW
    options = {} if depth is None else {"num_recurrences": depth}
    theirs = harness(tmp_path, folder, texts, max_length=WINDOW, **options)
    # Windows that do not overlap, as the harness has them.
    ours = score_texts(model, tokenizer, texts, window=WINDOW, stride=WINDOW, num_recurrences=depth)
    if depth is not None:
        usual = score_texts(model, tokenizer, texts, window=WINDOW, stride=WINDOW)
        assert ours.nats != pytest.approx(usual.nats, rel=1e-3)
    assert theirs["bits_per_byte"] == pytest.approx(ours.figures()["bits_per_byte"], rel=1e-4)
    assert theirs["byte_perplexity"] == pytest.approx(math.exp(ours.nats / ours.bytes), rel=1e-4)
    # It counts pieces between white space, and no ends of lines.
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert math.log(theirs["word_perplexity"]) == pytest.approx(ours.nats / words, rel=1e-4)
