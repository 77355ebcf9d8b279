"""The question-answering tasks, bAbI and arithmetic, as prompts with answers: for training and for evaluation.

A task is `babi1` to `babi20`, `addition`, `subtraction`, `multiplication`, or `arithmetic` for these three together.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
from transformers.utils import cached_file

from .arithmetic import SYMBOLS, ArithmeticProblem, format_problem, generate_problems
from .babi import (
    GENERATED_TASKS,
    BabiQuestion,
    format_question,
    generate_stories,
    read_babi,
    rename_entities,
    split_stories,
)
from .splits import SPLITS, check_split
from .text_data import local_path

GENERATED = "generated"
DEFAULT_TASKS = ("babi2", "babi3", "addition")
BABI_TASKS = tuple(f"babi{number}" for number in range(1, 21))
TASKS = (*BABI_TASKS, "arithmetic", *SYMBOLS)

TASK_FILE = "task_arguments.json"

_HELD_OUT = 0.1
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass
class TaskArguments:
    """Where the stories come from, what the generators make, and how a sum is written."""

    babi_data: str = field(
        default=GENERATED,
        metadata={"help": "bAbI stories: 'generated', a file or folder in the original format, or a Hub id."},
    )
    babi_config: str | None = field(default=None, metadata={"help": "Configuration of bAbI stories from the Hub."})
    max_facts: int = field(default=6, metadata={"help": "Facts of the longest generated story."})
    num_people: int = field(default=2, metadata={"help": "People of the generated stories."})
    num_places: int = field(default=4, metadata={"help": "Places of the generated stories."})
    num_objects: int = field(default=2, metadata={"help": "Objects of the generated stories."})
    num_wordings: int = field(default=1, metadata={"help": "Ways to say the same thing in the generated stories."})
    max_digits: int = field(default=3, metadata={"help": "Digits of the longest operand to train on."})
    reverse_answer: bool = field(
        default=True, metadata={"help": "Whether results are written with the least significant digit first."}
    )
    spaced_digits: bool = field(default=False, metadata={"help": "Whether there is a space between digits."})


# What is left beside a model for its evaluation; where its data lay is nobody else's business.
KEPT_ARGUMENTS = (
    *sorted({field.name for field in fields(TaskArguments)} - {"babi_data", "babi_config"}),
    "sequence_length",
    "validation_fraction",
)


def save_task_arguments(values: Mapping, folder: str | Path) -> None:
    """Leaves beside a checkpoint what its evaluation has to know, by [`DataArguments.for_evaluation`]."""
    Path(folder, TASK_FILE).write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")


def saved_task_arguments(name_or_path: str | Path) -> dict:
    """
    What [`save_task_arguments`] left beside a model, in a folder or on the Hub; nothing for any other model.

    Of what else a stranger's file may say, such as other options of an evaluation, nothing is returned.
    """
    source = str(local_path(str(name_or_path)) or name_or_path)
    try:
        path = cached_file(source, TASK_FILE, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise FileNotFoundError(f"{source} cannot be read: {str(error).splitlines()[0]}") from error
    if path is None:
        return {}
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    known = {name: saved[name] for name in KEPT_ARGUMENTS if name in saved} if isinstance(saved, dict) else {}
    return {name: value for name, value in known.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class TaskExample:
    """
    A prompt and the answer that should follow.

    Args:
        task (`str`): One of `TASKS`, but not `"arithmetic"`.
        context (`str`): What the question is about; empty for sums.
        question (`str`): The question.
        prompt (`str`): What the model reads: context and question.
        answer (`str`): What it should say, with the space before it.
        supporting (`tuple[str, ...]`): The facts of the context that the answer follows from.
        explanation (`str`): What a model should say after the answer in training.
        digits (`int`): Of a sum, the digits of its longer operand.
    """

    task: str
    context: str
    question: str
    prompt: str
    answer: str
    supporting: tuple[str, ...] = ()
    explanation: str = ""
    digits: int = 0


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The tasks without weights and with `arithmetic` spelt out; a `ValueError` if one is unknown or there is none."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(
            f"task is {unknown[0] if unknown else tasks!r}: choose babi1 to babi20, arithmetic, {', '.join(SYMBOLS)}."
        )
    return [name for task in tasks for name in (SYMBOLS if task == "arithmetic" else [task])]


def parse_task_weights(tasks: Sequence[str]) -> dict[str, float | None]:
    """
    The shares of a mixture such as `["babi2:3", "arithmetic"]`: here babi2 has 3 of 4 examples and each kind of sum a
    third of the rest. Without any weight, the shares are what the sizes of the tasks make them, and all are `None`.
    """
    weights: dict[str, float] = {}
    for item in tasks:
        task, colon, text = item.partition(":")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"task is {item!r}: its weight must be a number above 0, such as 'babi2:3'.")
        names = check_tasks([task])
        for name in names:
            if name in weights:
                raise ValueError(f"task has {name!r} twice: give it a weight instead, such as '{name}:2'.")
            weights[name] = weight / len(names)
    check_tasks(list(weights))
    has_weights = any(":" in item for item in tasks)
    return weights if has_weights else dict.fromkeys(weights)


def load_examples(
    task: str,
    arguments: TaskArguments,
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    *,
    supporting_facts: bool = False,
    num_renamings: int = 0,
    at_most: bool = False,
) -> list[TaskExample]:
    """
    The examples of one task.

    Args:
        task (`str`): One of `TASKS`, but not `"arithmetic"`.
        arguments ([`TaskArguments`]): Where they come from.
        split (`str`): `"train"`, `"validation"` or `"test"`. Where the data has no validation split, it is the last
            tenth of the training stories; where it has no test split, this is the validation split.
        num_examples (`int`, *optional*): How many; needed for what is generated. Of other data, the first.
        seed (`int`, *optional*, defaults to 0): Seed of the generators and of the renamings.
        supporting_facts (`bool`, *optional*, defaults to `False`): Whether the answers to stories are explained by the
            facts that they follow from.
        num_renamings (`int`, *optional*, defaults to 0): Copies of each story with other names, which generated ones
            do not take; see [`~babi.rename_entities`].
        at_most (`bool`, *optional*, defaults to `False`): Whether fewer will do where no more can be generated.
    """
    check_split(split)
    (task,) = check_tasks([task])
    if task in SYMBOLS:
        length = {"max_digits": arguments.max_digits, "at_most": at_most}
        problems = generate_problems(task, num_examples, split, seed, **length)
        return [arithmetic_example(problem, arguments) for problem in problems]
    if arguments.babi_data == GENERATED:
        if task not in GENERATED_TASKS:
            raise ValueError(f"task is {task!r}: only {' and '.join(GENERATED_TASKS)} can be generated.")
        if num_renamings:
            # What happens in a story decides its split, and with other names it is a story of any split.
            raise ValueError(
                f"num_renamings is {num_renamings}: generated stories have all names as it is, so ask for more."
            )
        world = {name: getattr(arguments, f"num_{name}") for name in ("people", "places", "objects", "wordings")}
        options = {f"num_{name}": value for name, value in world.items()}
        options |= {"max_facts": arguments.max_facts, "at_most": at_most}
        questions = generate_stories(task, num_examples, split, seed, **options)
    else:
        questions = _stored_questions(task, arguments, split)[:num_examples]
    questions = [*questions, *rename_entities(questions, num_renamings, seed)]
    return [babi_example(task, question, supporting_facts) for question in questions]


def check_sources(examples: Mapping[str, Sequence[TaskExample]], arguments: TaskArguments) -> None:
    """Raises a `ValueError` if two tasks have the same stories: their source is of one task, and does not know it."""
    stories: dict[tuple[str, ...], str] = {}
    for task in filter(BABI_TASKS.__contains__, examples):
        other = stories.setdefault(tuple(example.prompt for example in examples[task]), task)
        if other != task:
            raise ValueError(
                f"{arguments.babi_data} has the same stories for {other} as for {task}: name the one task that they "
                "are of, or give a folder with a file for each."
            )


def babi_example(task: str, question: BabiQuestion, supporting_facts: bool = False) -> TaskExample:
    """The example of a question of a story, explained by its supporting facts if asked for."""
    prompt, answer = format_question(question)
    supporting = tuple(question.facts[index] for index in question.supporting)
    explanation = "\n".join(["", *supporting, ""]) if supporting_facts else ""
    return TaskExample(task, "\n".join(question.facts), question.question, prompt, answer, supporting, explanation)


def arithmetic_example(problem: ArithmeticProblem, arguments: TaskArguments) -> TaskExample:
    """The example of a sum, written as `arguments` say."""
    prompt, answer = format_problem(problem, arguments.reverse_answer, arguments.spaced_digits)
    digits = max(len(str(problem.left)), len(str(problem.right)))
    return TaskExample(problem.operation, "", prompt, prompt, answer, digits=digits)


def mix_examples(
    weights: Mapping[str, float | None],
    arguments: TaskArguments,
    split: str,
    num_generated: int,
    seed: int = 0,
    **options,
) -> list[TaskExample]:
    """
    A mixture of tasks.

    Args:
        weights (`Mapping[str, float]`): The share of each task, from [`parse_task_weights`]. Where they are `None`,
            each example is there once; otherwise tasks are drawn by weight until each has been seen as a whole.
        arguments ([`TaskArguments`]): Where the examples come from.
        split (`str`): `"train"`, `"validation"` or `"test"`; only in training do weights count.
        num_generated (`int`): Examples of all generated tasks together, in equal shares.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same mixture on every machine.
        options: Those of [`load_examples`].
    """
    generated = [task for task in weights if task in SYMBOLS or arguments.babi_data == GENERATED]
    parts = []
    for task in weights:
        share = None
        if task in generated:
            index = generated.index(task)
            share = num_generated // len(generated) + (index < num_generated % len(generated))
        parts.append(load_examples(task, arguments, split, share, seed, **options))
    check_sources(dict(zip(weights, parts, strict=True)), arguments)
    examples = [example for part in parts for example in part]
    if split == "train" and None not in weights.values():
        total = sum(weights.values())
        starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
        numbers = [
            datasets.Dataset.from_dict({"index": range(start, start + len(part))})
            for start, part in zip(starts, parts, strict=True)
        ]
        mixture = datasets.interleave_datasets(
            numbers, [weight / total for weight in weights.values()], seed, stopping_strategy="all_exhausted"
        )
        return [examples[index] for index in mixture["index"]]
    # A hash orders examples the same way in every version of Python and numpy, which their shuffles do not promise.
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed} {example.prompt}".encode()).digest())


def _stored_questions(task: str, arguments: TaskArguments, split: str) -> list[BabiQuestion]:
    """The questions of `split` from files or the Hub; held out of the training questions if there is no such split."""
    path = Path(arguments.babi_data).expanduser()
    name = path.name if path.is_file() else "" if path.exists() else arguments.babi_config or ""
    named = re.search(r"(?<![a-zA-Z])qa(\d+)", name)
    if named and f"babi{int(named[1])}" != task:
        raise ValueError(f"{name} has the stories of babi{int(named[1])}, not of {task}.")
    if path.exists():
        splits = _babi_files(path, task)
        read = read_babi
    elif path.suffix == ".txt" or not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.babi_data):
        raise FileNotFoundError(f"No file or folder {arguments.babi_data!r} with bAbI stories: check the path.")
    else:
        names = datasets.get_dataset_split_names(arguments.babi_data, arguments.babi_config)
        splits = {name: name for name in names}

        def read(name):
            rows = datasets.load_dataset(arguments.babi_data, arguments.babi_config, split=name)
            return questions_of_rows(rows, task, arguments.babi_data)

    for wanted in (split, "validation") if split == "test" else (split,):
        for name in _SPLIT_NAMES[wanted]:
            if name in splits and (wanted != "train" or _has_validation(splits)):
                return read(splits[name])
    if "train" not in splits:
        raise ValueError(f"{arguments.babi_data} has no {split} questions of {task}, only {', '.join(splits)}.")
    train, held_out = split_stories(read(splits["train"]), _HELD_OUT)
    return train if split == "train" else held_out


def _has_validation(splits: Iterable[str]) -> bool:
    return any(name in splits for name in _SPLIT_NAMES["validation"])


def _babi_files(path: Path, task: str) -> dict[str, Path]:
    """The files of a task by split, such as `qa2_two-supporting-facts_train.txt`; a file alone is `train`."""
    if path.is_file():
        named = [name for name in SPLITS if path.stem.endswith(f"_{name}")]
        return {named[0] if named else "train": path}
    files = sorted(path.rglob(f"qa{task.removeprefix('babi')}_*.txt"))
    splits: dict[str, Path] = {}
    for file in files:
        name = file.stem.rpartition("_")[2]
        if name in splits:
            raise ValueError(f"{path} has both {splits[name]} and {file}: give the folder of one version of the data.")
        splits[name] = file
    if not splits:
        raise FileNotFoundError(f"{path} has no file such as qa{task.removeprefix('babi')}_..._train.txt for {task}.")
    return splits


def questions_of_rows(rows: datasets.Dataset, task: str, source: str) -> list[BabiQuestion]:
    """
    The questions in a data set of the Hub, in either of the two layouts that bAbI has there: a row per story, whose
    column `story` lists its sentences (`facebook/babi_qa`), or a row per question, with `passage`, `question` and
    `answer`, and the number of the task in `task` if there are several (`Muennighoff/babi`).
    """
    columns = set(rows.column_names)
    if "story" in columns:
        return [question for row in rows for question in _questions_of_story(row["story"])]
    if not {"passage", "question", "answer"} <= columns:
        raise ValueError(
            f"{source} has the columns {', '.join(rows.column_names)}: expected 'story', or 'passage', 'question' and "
            "'answer'."
        )
    number = int(task.removeprefix("babi"))
    questions = []
    for row in rows:
        if "task" in columns and int(row["task"]) != number:
            continue
        facts = tuple(line.strip() for line in row["passage"].splitlines() if line.strip())
        questions.append(BabiQuestion(facts, row["question"].strip(), row["answer"].strip(), ()))
    if not questions:
        raise ValueError(f"{source} has no question of {task}.")
    return questions


def _questions_of_story(story: dict[str, list]) -> list[BabiQuestion]:
    facts: list[str] = []
    fact_of_line: dict[str, int] = {}
    questions = []
    for line, kind, text, supporting, answer in zip(
        *(story[name] for name in ("id", "type", "text", "supporting_ids", "answer")), strict=True
    ):
        # The class labels are 0 for a sentence of the story and 1 for a question.
        if kind == 0:
            fact_of_line[str(line)] = len(facts)
            facts.append(text.strip())
        else:
            indices = tuple(fact_of_line[str(number)] for number in supporting)
            questions.append(BabiQuestion(tuple(facts), text.strip(), answer.strip(), indices))
    return questions
