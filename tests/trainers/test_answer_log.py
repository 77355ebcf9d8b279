"""The CSV file of questions and answers: quoted so that any reader gets back what was said, and whole at all times."""

import csv

import datasets
import pytest

from mixturekit.trainers.answer_log import COLUMNS, AnswerLog
from mixturekit.trainers.question_answering import AnsweredQuestion
from mixturekit.trainers.task_data import TaskExample

STORY = 'Mary said "hello, you".\nJohn went, he said, to the "garden".\r\nÉmile: ;\ttab'


def answer(predicted="kitchen", **overrides):
    facts = ("Mary went, at last, to the kitchen.", 'She took the "milk" there.')
    example = TaskExample("babi2", STORY, "Where is\nthe milk?", "", " kitchen", facts)
    given = {"log_likelihood": -0.125, "ranked": "office", "routes": "0:1@0.5", "recurrence_steps": 2.0, **overrides}
    return AnsweredQuestion(example, predicted, "kitchen", predicted == "kitchen", **given)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_the_columns_come_in_the_order_that_judges_expect(tmp_path):
    with AnswerLog(tmp_path / "answers.csv"):
        pass
    (line,) = (tmp_path / "answers.csv").read_text().splitlines()
    assert line.split(",") == list(COLUMNS)
    assert COLUMNS[:5] == ("context", "question", "true_answer", "predicted_answer", "is_correct")


def test_newlines_commas_and_quotation_marks_come_back_as_they_were(tmp_path):
    said = 'the "garden", or\nthe, kitchen'
    with AnswerLog(tmp_path / "answers.csv") as log:
        log.write([answer(), answer(said)], 2)
    first, second = read(tmp_path / "answers.csv")
    assert first == {
        "context": STORY, "question": "Where is\nthe milk?", "true_answer": "kitchen", "predicted_answer": "kitchen",
        "is_correct": "True", "task": "babi2",
        "supporting_facts": 'Mary went, at last, to the kitchen.\nShe took the "milk" there.',
        "answer_routes": "0:1@0.5", "recurrence_steps": "2", "log_likelihood": "-0.125", "ranked_answer": "office",
        "num_recurrences": "2",
    }  # fmt: skip
    assert second["predicted_answer"] == said and second["is_correct"] == "False"


def test_other_readers_agree(tmp_path):
    path = tmp_path / "answers.csv"
    with AnswerLog(path) as log:
        log.write([answer(), answer("garden")], None)
    rows = datasets.load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == list(COLUMNS)
    assert rows["context"][:] == [STORY, STORY] and rows["is_correct"][:] == [True, False]


def test_what_does_not_apply_is_empty(tmp_path):
    with AnswerLog(tmp_path / "answers.csv") as log:
        log.write([answer(ranked=None, routes="", recurrence_steps=None)], None)
    (row,) = read(tmp_path / "answers.csv")
    empty = ("answer_routes", "recurrence_steps", "ranked_answer", "num_recurrences")
    assert [row[name] for name in empty] == [""] * 4


def test_after_each_batch_the_file_on_the_disk_has_a_header_and_whole_rows(tmp_path):
    path = tmp_path / "new" / "folder" / "answers.csv"
    with AnswerLog(path) as log:
        assert read(path) == []
        for batch in range(1, 5):
            log.write([answer("garden\n" * 500)] * 8, 4)
            assert path.read_bytes().endswith(b"\r\n")
            rows = read(path)
            assert len(rows) == 8 * batch
            assert all(row["num_recurrences"] == "4" and None not in row for row in rows)


def test_an_error_within_a_run_keeps_what_was_written_before(tmp_path):
    with pytest.raises(KeyboardInterrupt), AnswerLog(tmp_path / "answers.csv") as log:
        log.write([answer()], 1)
        raise KeyboardInterrupt
    assert len(read(tmp_path / "answers.csv")) == 1
    assert not log.is_open


def test_a_new_log_replaces_an_old_one(tmp_path):
    for predicted in ("garden", "kitchen"):
        with AnswerLog(tmp_path / "answers.csv") as log:
            log.write([answer(predicted)], 1)
    assert [row["predicted_answer"] for row in read(tmp_path / "answers.csv")] == ["kitchen"]


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with AnswerLog(None) as log:
        log.write([answer()], 1)
        assert not log.is_open
    assert list(tmp_path.iterdir()) == []
