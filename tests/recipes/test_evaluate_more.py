"""The evaluation as a user runs it: its files, its refusals, and what an interruption leaves."""

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mixturekit.hub_cards import check_model_card

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "evaluate_more.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}


def read_csv(path):
    """The rows, each of which must have every column."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, solved):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("".join(f"{row.prompt}{row.answer}\n" for row in solved.stories))
    return path


@pytest.fixture(scope="module")
def finished(solved, text_file, tmp_path_factory, run_here):
    """What a new user's first evaluation prints, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(solved.folder, folder / "model")
    (folder / "eval.yaml").write_text("num_questions: 16\nnum_problems: 8\ntasks: [perplexity, babi2]\n")
    with redirect_stdout(StringIO()) as printed:
        code = run_here(
            "evaluate_more.py", "--config", "eval.yaml", "--model_name_or_path", "model", "--dataset_name", text_file,
            "--tasks", "perplexity", "babi2", "--tasks", "arithmetic", "generation", "--num_recurrences", 1, 2,
            "--digits", 1, 2, 3, "--max_digits", 2, "--output_dir", "results", "--csv", "results/answers.csv",
            "--update_model_card", "--use_cpu", folder=folder,
        )  # fmt: skip
    assert code is None
    return folder, printed.getvalue()


def test_an_evaluation_prints_its_results_and_where_they_are(finished):
    folder, printed = finished
    for text in ("perplexity per token", "bits per byte", "ranking accuracy", "multiplication, 3 digits, longer than"):
        assert text in printed
    assert "2 recurrences" in printed and "100.0 (80.6 to 100.0)" in printed
    for name in ("eval_results.json", "depth_sweep.png", "answers.csv", "answers.routes.html"):
        assert f"results/{name}" in printed and (folder / "results" / name).stat().st_size > 100


def test_the_questions_are_written_as_the_checkpoint_was_trained_unless_told_otherwise(finished):
    folder, _ = finished
    report = json.loads((folder / "results" / "eval_results.json").read_text())
    # Facts, length and what is held out are the checkpoint's, digits the command line's, questions the file's.
    assert report["tasks"]["max_facts"] == 4 and report["settings"]["sequence_length"] == 64
    assert report["settings"]["validation_fraction"] == 0.25
    assert report["tasks"]["max_digits"] == 2 and report["settings"]["num_questions"] == 16
    in_range = {row["digits"]: row["in_range"] for row in report["results"] if row["metric"] == "exact_match"}
    assert in_range == {1: True, 2: True, 3: False}
    assert report["settings"]["tasks"] == ["perplexity", "babi2", "arithmetic", "generation"]


def test_the_csv_has_a_row_for_each_question(finished):
    folder, _ = finished
    rows = read_csv(folder / "results" / "answers.csv")
    sums = [row for row in rows if row["task"] != "babi2"]
    assert len(rows) - len(sums) == 16
    assert {row["task"] for row in sums} == {"addition", "subtraction", "multiplication"}
    assert all("\n" in row["context"] and row["is_correct"] == "True" for row in rows if row["task"] == "babi2")


def test_the_card_of_the_checkpoint_has_the_results(finished):
    folder, printed = finished
    card = ModelCard.load(folder / "model" / "README.md")
    check_model_card(card)
    assert card.text.count("## Evaluation") == 1 and "| babi2 | generation accuracy | 16 |" in card.text
    assert "Updated: model/README.md" in printed


def test_the_metrics_load_from_this_repository_in_a_fresh_process(tmp_path):
    names = ["answer_accuracy", "corpus_perplexity", "text_diversity"]
    script = f"import evaluate\nfor name in {names}: print(evaluate.load(f'trainers/metrics/{{name}}.py').name)"
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == names


def broken_story(folder):
    path = folder / "qa2_two-supporting-facts_test.txt"
    path.write_text("1 Mary went to the garden.\n2 Mary took the milk.\n3 Where is the milk?\tgarden\n")
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "babi99"], "ValueError: tasks has 'babi99': choose of"),
        (["--tasks", "perplexity"], "ValueError: The task 'perplexity' needs a text: name it with --dataset_name."),
        (["--tasks", "perplexity", "--dataset_name", "./no.txt"], "FileNotFoundError: No file or folder './no.txt'"),
        (["--model_name_or_path", "./no"], "FileNotFoundError: No file or folder './no'"),
        (["--output_dir", "{folder}/old"], "old/eval_results.json is there: choose another --output_dir, or replace"),
        (["--output_dir", "{folder}/wrong.yaml"], "wrong.yaml cannot be a folder, because {folder}/wrong.yaml is a"),
        (["--babi_data", "{folder}/{broken}"], "{broken}, line 3: expected 'ID question<TAB>answer<TAB>supporting"),
        (["--babi_data", "{folder}/my.txt", "--tasks", "babi2", "babi3"], "my.txt has the same stories for babi2 as"),
        (["--babi_data", "./no_stories.txt"], "FileNotFoundError: No file or folder './no_stories.txt' with bAbI"),
        (["--config", "{folder}/wrong.yaml"], "wrong.yaml has unknown options: taks."),
        (["--update_model_card"], "FileNotFoundError: There is no model card in {model} to update."),
    ],
)
def test_bad_input_is_one_sentence(solved, tmp_path, run_here, options, message):
    names = {"folder": tmp_path, "broken": broken_story(tmp_path).name, "model": tmp_path / "model"}
    shutil.copytree(solved.folder, tmp_path / "model", ignore=shutil.ignore_patterns("README.md"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval_results.json").write_text("{}")
    pair = (f"1 {name} went home.\n2 Where is {name}?\thome\t1\n" for name in ("Mary", "John"))
    (tmp_path / "my.txt").write_text("".join(pair) * 5)
    (tmp_path / "wrong.yaml").write_text("taks: [babi2]\n")
    line = ["--model_name_or_path", names["model"], "--tasks", "babi2", "--output_dir", tmp_path / "new", "--use_cpu"]
    # What is given twice has the later value, except for the list of tasks.
    line = line[:2] + line[4:] if "--tasks" in options else line
    line += [option.format(**names) for option in options]
    told = run_here("evaluate_more.py", *line)
    assert message.format(**names) in told and "\n" not in told
    assert not (tmp_path / "new").exists()


def test_a_refusal_is_the_last_line_of_a_process_that_failed(solved, run_process):
    options = ["--model_name_or_path", solved.folder, "--tasks", "babi2", "--batch_size", 0]
    result = run_process("evaluate_more.py", *options)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "ValueError: batch_size is 0: it must be at least 1."


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_whole_rows_and_the_tasks_that_were_finished(solved, text_file, tmp_path, sent):
    answers, results = tmp_path / "answers.csv", tmp_path / "eval_results.json"
    command = [
        sys.executable, RECIPE, "--model_name_or_path", solved.folder, "--dataset_name", text_file, "--use_cpu",
        "--tasks", "perplexity", "babi2", "addition", "--num_questions", 100, "--digits", 3, "--num_problems", 5000,
        "--batch_size", 2, "--output_dir", tmp_path, "--csv", answers,
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that a shell runs in its background ignore SIGINT, and so would their children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, preexec_fn=listen, **pipes)
    try:
        deadline = time.monotonic() + 200
        while not answers.exists() or answers.read_bytes().count(b"\r\n") < 12:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if sent == signal.SIGINT:
        assert process.returncode == 1 and "Traceback" not in errors
        assert errors.strip().splitlines()[-1] == "Interrupted: what was finished is in the files."
    else:
        assert process.returncode == -signal.SIGKILL
    assert answers.read_bytes().endswith(b"\r\n")
    rows = read_csv(answers)
    assert 10 <= len(rows) < 5100 and len(rows) % 2 == 0
    for row, example in zip(rows, solved.stories, strict=False):
        assert row["context"] == example.context and row["num_recurrences"] == "2"
    figures = json.loads(results.read_text())["results"]
    assert [row["metric"] for row in figures][:3] == ["perplexity", "word_perplexity", "bits_per_byte"]


@pytest.mark.slow
def test_two_processes_share_the_questions_and_find_the_same(solved, text_file, tmp_path, run_process):
    # Nine questions in batches of eight: the last one leaves the second process without any.
    options = ["--model_name_or_path", solved.folder, "--dataset_name", text_file, "--use_cpu", "--num_questions", 9]
    options += ["--tasks", "perplexity", "babi2", "addition", "generation", "--digits", 1, 2, "--num_problems", 8]
    options += ["--temperature", 0, "--sequence_length", 32]
    rows, reports = [], []
    for name, configuration, batch in (("one", None, 8), ("two", "ddp", 4)):
        folder = tmp_path / name
        files = ["--output_dir", folder, "--csv", folder / "answers.csv", "--batch_size", batch]
        result = run_process("evaluate_more.py", *options, *files, configuration=configuration)
        assert result.returncode == 0, result.stderr[-5000:]
        assert result.stdout.count("Results: ") == 1
        rows.append(read_csv(folder / "answers.csv"))
        reports.append(json.loads((folder / "eval_results.json").read_text()))
    for one, two in zip(*(report["results"] for report in reports), strict=True):
        assert two == {**one, "value": pytest.approx(one["value"], rel=1e-5)}
    assert reports[0]["samples"] == reports[1]["samples"]
    compared = ("context", "question", "predicted_answer", "task", "ranked_answer", "recurrence_steps")
    for one, two in zip(*rows, strict=True):
        assert [one[column] for column in compared] == [two[column] for column in compared]
        assert two["answer_routes"]
