"""Questions and answers as a CSV file that is whole at any moment, for a person or a language model to judge."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from .question_answering import AnsweredQuestion

COLUMNS = (
    "context", "question", "true_answer", "predicted_answer", "is_correct", "task", "supporting_facts",
    "answer_routes", "recurrence_steps", "log_likelihood", "ranked_answer", "num_recurrences",
)  # fmt: skip


class AnswerLog:
    """
    A CSV file with a row per question, each batch written at once: whatever interrupts the run, the file has a header
    and whole rows. To be used in a `with` statement.

    Args:
        path (`str` or `Path`, *optional*): The file, which is replaced if it is there; without one, nothing is kept.
    """

    def __init__(self, path: str | Path | None):
        self.path = path
        self._descriptor: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether rows are kept."""
        return self._descriptor is not None

    def __enter__(self) -> "AnswerLog":
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            self._write([COLUMNS])
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, answers: Sequence[AnsweredQuestion], num_recurrences: int | None) -> None:
        """Adds a row for each answer."""
        if self.is_open:
            self._write([_row(answer, num_recurrences) for answer in answers])

    def _write(self, rows: Sequence[Sequence]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode()
        # One call, without a buffer that a killed process would lose half of.
        if os.write(self._descriptor, data) != len(data):
            raise OSError(f"{self.path} could not be written: the disk is full.")


def _row(answer: AnsweredQuestion, num_recurrences: int | None) -> tuple:
    example = answer.example
    return (
        example.context,
        example.question,
        answer.true_answer,
        answer.predicted,
        answer.is_correct,
        example.task,
        "\n".join(example.supporting),
        answer.routes,
        "" if answer.recurrence_steps is None else f"{answer.recurrence_steps:.4g}",
        f"{answer.log_likelihood:.6g}",
        answer.ranked or "",
        "" if num_recurrences is None else num_recurrences,
    )
