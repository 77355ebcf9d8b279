"""GSM8K: word problems as prompts for a language model, and rewards for what it answers.

The rewards are plain reward functions of TRL. They take plain and conversational completions, and serve any trainer
that calls them as `GRPOTrainer` does. The data set is by Cobbe et al. 2021, "Training Verifiers to Solve Math Word
Problems", arXiv:2110.14168.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from .number_extraction import extract_answer, gold_answer, has_marked_answer
from .text_data import check_json, local_path

DATASET = "openai/gsm8k"
INSTRUCTION = 'Solve the problem step by step. Write the final answer as a number on the last line, after "#### ".'
PROMPT_FORMATS = ("auto", "plain", "chat")

MARKER_BONUS = 0.05
LENGTH_PENALTY = -0.05

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_gold_number = lru_cache(maxsize=20_000)(gold_answer)


def completion_text(completion: str | Sequence[dict]) -> str:
    """The text of a completion: itself, or what the assistant says last in a list of messages."""
    if isinstance(completion, str):
        return completion
    said = [message["content"] for message in completion if message.get("role") == "assistant"]
    if not said or said[-1] is None:
        return ""
    if isinstance(said[-1], str):
        return said[-1]
    return "".join(part.get("text", "") for part in said[-1])


def correctness_reward(
    prompts: Sequence,
    completions: Sequence,
    answer: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    log_extra: Callable | None = None,
    log_metric: Callable | None = None,
    **kwargs,
) -> list[float]:
    """
    1.0 for each completion whose final number is that of the solution, else 0.0. The number is found by
    [`~number_extraction.extract_answer`], and compared exactly.

    Args:
        prompts (`Sequence`): The prompts, which do not matter here.
        completions (`Sequence`): Texts, or lists of messages.
        answer (`Sequence[str]`): The solutions, with the number after `####`, or the numbers alone.
        completion_ids (`Sequence[Sequence[int]]`, *optional*): Tokens of the completions, which do not matter here.
        log_extra, log_metric (`Callable`, *optional*): Given by the trainer; the number that was read goes into its
            table of completions, and the share of completions with a number into its metrics as `extraction_rate`.

    Raises:
        ValueError: If a solution has no number.
    """
    read = [extract_answer(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", ["" if number is None else str(number) for number in read])
    if log_metric is not None and read:
        log_metric("extraction_rate", sum(number is not None for number in read) / len(read))
    return [float(number == _gold_number(solution)) for number, solution in zip(read, answer, strict=True)]


def marker_reward(
    prompts: Sequence,
    completions: Sequence,
    answer: Sequence[str] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    **kwargs,
) -> list[float]:
    """
    0.05 for each completion that marks an answer with `####`, `\\boxed{}` or `Final Answer` and gives a number after
    it, however often, else 0.0. The arguments are those of [`correctness_reward`].
    """
    return [MARKER_BONUS * has_marked_answer(completion_text(completion)) for completion in completions]


def length_penalty(
    prompts: Sequence,
    completions: Sequence,
    answer: Sequence[str] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 512,
    **kwargs,
) -> list[float]:
    """
    -0.05 for each completion of more than `max_tokens` tokens, else 0.0. The other arguments are those of
    [`correctness_reward`]. A threshold of one's own makes a reward function by `functools.partial`.

    Example:

    ```python
    >>> from functools import partial
    >>> from mixturekit.trainers.gsm8k import length_penalty

    >>> partial(length_penalty, max_tokens=2)(["1 + 1 ="] * 2, [" 2", " 2, as"], completion_ids=[[17], [17, 11, 355]])
    [0.0, -0.05]
    ```

    Raises:
        ValueError: If the tokens are not given.
    """
    if completion_ids is None:
        raise ValueError("The penalty for length counts tokens: give it completion_ids.")
    return [LENGTH_PENALTY if len(ids) > max_tokens else 0.0 for ids in completion_ids]


def load_gsm8k(
    name: str = DATASET, split: str = "train", config: str | None = "main", max_problems: int | None = None
) -> datasets.Dataset:
    """
    Load word problems, and check each solution.

    Args:
        name (`str`, *optional*, defaults to `"openai/gsm8k"`): A Hub id; a local file, `.jsonl`, `.json`, `.csv` or
            `.parquet`, which is the split that is asked for, whatever its name; or a folder of such files.
        split (`str`, *optional*, defaults to `"train"`): The split, or a slice of one such as `"train[:90%]"`.
        config (`str`, *optional*, defaults to `"main"`): The configuration of a Hub data set.
        max_problems (`int`, *optional*): Keeps only the first problems.

    Returns:
        `datasets.Dataset`: Rows with the columns `"question"` and `"answer"`, the solution with its `####`.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ValueError: If a column, the number of a solution, or all rows are missing.
    """
    rows = _load(name, split, config)
    for column in ("question", "answer"):
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}: it has only {', '.join(rows.column_names)}.")
        feature = rows.features[column]
        if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
            raise ValueError(f"Column {column!r} of {name} holds {feature}, not text.")
    rows = rows.select_columns(["question", "answer"])
    if max_problems is not None:
        rows = rows.select(range(min(max_problems, len(rows))))
    if not len(rows):
        raise ValueError(f"{name} is empty: split {split!r} holds no problems.")
    for number, solution in enumerate(rows["answer"], start=1):
        _check_solution(solution, f"{name}, row {number}")
    return rows


def _check_solution(solution: str | None, place: str) -> None:
    if solution is None or "####" not in solution:
        raise ValueError(f"{place}: the answer has no `####` with the final number after it.")
    try:
        gold_answer(solution)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _load(name: str, split: str, config: str | None) -> datasets.Dataset:
    path = local_path(name)
    try:
        if path is None:
            return datasets.load_dataset(name, config, split=split)
        for file in path.glob("**/*.json*") if path.is_dir() else [path] if path.suffix.startswith(".json") else []:
            check_json(file)
        if path.is_dir():
            return datasets.load_dataset(str(path), split=split)
        if path.suffix.lower() not in _BUILDERS:
            raise ValueError(f"expected a file that ends in {', '.join(_BUILDERS)}")
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        files = {re.split(r"\W", split)[0]: str(path)}
        return datasets.load_dataset(_BUILDERS[path.suffix.lower()], data_files=files, split=split)
    except ConnectionError as error:
        raise FileNotFoundError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}") from error
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ValueError(f"{name} cannot be loaded: {reason}.") from error


def uses_chat(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Whether problems are put as a conversation: `"chat"`, `"plain"`, or `"auto"` for what the tokenizer can do.

    Raises:
        ValueError: If it is none of these, or a chat is asked for and the tokenizer has no template for one.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format is {prompt_format!r}: choose one of {', '.join(PROMPT_FORMATS)}.")
    if prompt_format == "chat" and tokenizer.chat_template is None:
        raise ValueError("prompt_format is 'chat', but the tokenizer has no chat template: choose 'plain'.")
    return prompt_format != "plain" and tokenizer.chat_template is not None


def make_prompt(question: str, conversational: bool, shots: Sequence[dict] = ()) -> str | list[dict[str, str]]:
    """
    A problem as a prompt of TRL: a text that ends in `Answer:`, as in lm-eval, or a list of messages.

    Args:
        question (`str`): The problem.
        conversational (`bool`): Whether to return messages, each problem with [`INSTRUCTION`] after it.
        shots (`Sequence[dict]`, *optional*): Solved problems, `question` and `answer`, to show before it.
    """
    if not conversational:
        shown = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
        return f"{shown}Question: {question}\nAnswer:"
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": f"{shot['question']}\n\n{INSTRUCTION}"})
        messages.append({"role": "assistant", "content": shot["answer"]})
    return [*messages, {"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]


def with_prompts(rows: datasets.Dataset, conversational: bool, shots: Sequence[dict] = ()) -> datasets.Dataset:
    """The rows of [`load_gsm8k`] with a column `"prompt"` from [`make_prompt`], as TRL's trainers take them."""
    prompts = [make_prompt(question, conversational, shots) for question in rows["question"]]
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "question": list(rows["question"]), "answer": list(rows["answer"])}
    )


def prompt_text(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the model reads it: messages go through the tokenizer's chat template, which opens the next turn."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
