"""The evaluation on GSM8K as a user runs it: its files, its refusals, and how it goes on after an interruption."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "evaluate_gsm8k.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
FAST = ["--use_cpu", "--max_new_tokens", 12]


def read_rows(path):
    """The rows of a JSONL file, by what they answer."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {(row["decoding"], row["problem"], row["sample"]): row for row in rows}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "test.jsonl"
    rows = [
        {"question": f"Tom has {index} cups and buys {2 * index}.", "answer": f"#### {3 * index}"}
        for index in range(1, 13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(solved, problems, tmp_path_factory, run_here):
    """What a new user's first evaluation prints, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "eval.yaml").write_text("num_samples: 2\nmax_new_tokens: 3\nnum_problems: 6\nuse_cpu: true\n")
    with redirect_stdout(StringIO()) as printed:
        code = run_here(
            "evaluate_gsm8k.py", "--config", folder / "eval.yaml", "--model_name_or_path", solved.folder,
            "--dataset_name", problems, "--max_new_tokens", 12, "--output_dir", folder / "results",
        )  # fmt: skip
    assert code is None
    return folder / "results", printed.getvalue()


def test_an_evaluation_prints_its_results_and_where_they_are(finished):
    folder, printed = finished
    for text in ("lm-eval strict", "lm-eval flexible", "pass@1", "pass@2", "majority@2", "mean tokens", "Weights 0."):
        assert text in printed
    for name in ("eval_results.json", "completions.jsonl"):
        assert str(folder / name) in printed and (folder / name).stat().st_size > 100


def test_the_files_hold_every_completion_and_every_figure(finished):
    folder, _ = finished
    rows = read_rows(folder / "completions.jsonl")
    assert len(rows) == 6 + 6 * 2
    report = json.loads((folder / "eval_results.json").read_text())
    # The command line wins over the file.
    assert report["settings"]["max_new_tokens"] == 12 and report["problems"] == 6
    greedy = [row for key, row in rows.items() if key[0] == "greedy"]
    for record in report["results"]:
        if record["decoding"] == "greedy" and record["metric"] == "pass@1":
            assert record["value"] == sum(row[record["grader"]] for row in greedy) / 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_samples", -1], "ValueError: num_samples is -1: it must be at least 0."),
        (["--model_name_or_path", "./no"], "FileNotFoundError: No file or folder './no'"),
        (["--dataset_name", "./no.jsonl"], "FileNotFoundError: No file or folder './no.jsonl'"),
        (["--dataset_name", "{folder}/plain.jsonl"], "plain.jsonl, row 1: the answer has no `####` with the final"),
        (["--dataset_name", "{folder}/other.jsonl"], "other.jsonl has no column 'answer': it has only question."),
        (["--output_dir", "{folder}/old"], "old/eval_results.json is there: choose another --output_dir, go on with"),
        (
            ["--output_dir", "{folder}/plain.jsonl"],
            "plain.jsonl cannot be a folder, because {folder}/plain.jsonl is a",
        ),
        (["--resume"], "FileNotFoundError: There is no run in {folder}/new to resume."),
        (["--prompt_format", "chat"], "prompt_format is 'chat', but the tokenizer has no chat template: choose"),
        (["--max_new_tokens", 100000], "max_new_tokens is 100000: with the longest prompt, of"),
        (["--config", "{folder}/wrong.yaml"], "wrong.yaml has unknown options: model_name."),
    ],
)
def test_bad_input_is_one_sentence(solved, problems, tmp_path, run_here, options, message):
    (tmp_path / "plain.jsonl").write_text('{"question": "Why?", "answer": "8"}\n')
    (tmp_path / "other.jsonl").write_text('{"question": "Why?"}\n')
    (tmp_path / "wrong.yaml").write_text("model_name: a\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval_results.json").write_text("{}")
    line = ["--model_name_or_path", solved.folder, "--dataset_name", problems, "--output_dir", tmp_path / "new", *FAST]
    line += [str(option).format(folder=tmp_path) for option in options]
    told = run_here("evaluate_gsm8k.py", *line)
    assert message.format(folder=tmp_path) in told and "\n" not in told
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "old" / "eval_results.json").read_text() == "{}"


def interrupt(command, completions, rows, sent):
    """Runs the recipe until it has written so many rows, ends it with a signal, and returns its last words."""
    # Tests that a shell runs in its background ignore SIGINT, and so would their children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, preexec_fn=listen, **pipes
    )
    try:
        deadline = time.monotonic() + 200
        while not completions.exists() or completions.read_bytes().count(b"\n") < rows:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (1 if sent == signal.SIGINT else -sent)
    return errors


def test_a_run_that_is_interrupted_twice_ends_with_the_results_of_one_that_was_not(
    solved, problems, tmp_path, run_here
):
    options = ["--model_name_or_path", solved.folder, "--dataset_name", problems, "--num_samples", 6, *FAST]
    options += ["--batch_size", 1, "--temperature", 2.0, "--output_dir"]
    cut = [RECIPE, *options, tmp_path / "cut"]
    completions = tmp_path / "cut" / "completions.jsonl"
    errors = interrupt(cut, completions, 8, signal.SIGINT)
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("Interrupted: what was finished is in the files")
    first = read_rows(completions)
    interrupt([*cut, "--resume"], completions, 30, signal.SIGKILL)
    second = read_rows(completions)
    assert 8 <= len(first) < 30 <= len(second) < 12 * 7 and first.items() <= second.items()
    for arguments in ([*cut[1:], "--resume"], [*options, tmp_path / "whole"]):
        assert run_here("evaluate_gsm8k.py", *arguments) is None
    rows = read_rows(tmp_path / "whole" / "completions.jsonl")
    assert len(rows) == 12 * 7 and read_rows(completions) == rows and second.items() <= rows.items()
    reports = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("cut", "whole")]
    assert reports[0]["results"] == reports[1]["results"]


@pytest.mark.slow
def test_two_processes_share_the_problems_and_find_the_same(solved, problems, tmp_path, run_process):
    # Twelve problems in batches of ten: the last one leaves each process one.
    options = ["--model_name_or_path", solved.folder, "--dataset_name", problems, "--num_problems", 11, *FAST]
    rows = []
    for name, configuration, batch in (("one", None, 10), ("two", "ddp", 5)):
        place = ["--batch_size", batch, "--output_dir", tmp_path / name]
        result = run_process("evaluate_gsm8k.py", *options, *place, configuration=configuration)
        assert result.returncode == 0, result.stderr[-5000:]
        assert result.stdout.count("Results: ") == 1
        rows.append(read_rows(tmp_path / name / "completions.jsonl"))
    assert rows[0] == rows[1] and len(rows[0]) == 11
