"""Evaluation of a causal language model: perplexity, bAbI, sums and generation, at several numbers of recurrences.

What is measured are records, one dictionary for each figure: `task`, `metric`, `value`, `num_recurrences` (or `None`),
and where it applies `low` and `high` (95 % interval), `count`, `digits` and `in_range`.
"""

import json
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .answer_log import AnswerLog
from .arithmetic import SYMBOLS, generate_problems
from .language_evaluation_config import EvaluationArguments
from .metrics.answer_accuracy import wilson_interval
from .metrics.text_diversity import text_diversity
from .perplexity import perplexity_by_position, score_texts
from .question_answering import AnsweredQuestion, QuestionAnswerer, few_shot_prefix
from .routes import record_routes
from .routing_report import write_report
from .task_data import BABI_TASKS, TaskArguments, TaskExample, arithmetic_example, check_sources, load_examples
from .text_data import dataset_splits, load_documents, split_documents
from .tokenization import encode_answers, encode_prompts, load_tokenizer
from .whole_files import write_whole_text

PROMPTS = (
    "The history of the town",
    "In the first half of the season ,",
    "The species is found in",
    "Mary went to the",
)
RESULTS = "eval_results.json"
# Beyond the training length, by position.
_LENGTHS = 4


@dataclass
class EvaluationData:
    """
    All that an evaluation asks, loaded before any of it runs.

    Args:
        texts (`list[str]`): Documents to score.
        questions (`dict[str, list[TaskExample]]`): By bAbI task.
        sums (`dict[tuple[str, int], list[TaskExample]]`): By operation and number of digits.
        shots (`dict[str, str]`): Text of the solved examples of each task.
        candidates (`dict[str, list[str]]`): Answers to rank, by bAbI task.
        prompts (`list[str]`): Texts to continue.
    """

    texts: list[str] = field(default_factory=list)
    questions: dict[str, list[TaskExample]] = field(default_factory=dict)
    sums: dict[tuple[str, int], list[TaskExample]] = field(default_factory=dict)
    shots: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, list[str]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)


def load_evaluation_data(arguments: EvaluationArguments, task_arguments: TaskArguments) -> EvaluationData:
    """Loads what the tasks of `arguments` ask, and so finds what is wrong with it before a model is loaded."""
    data = EvaluationData()
    for task in arguments.tasks:
        if task in BABI_TASKS:
            wanted = (arguments.split, arguments.num_questions, arguments.seed)
            data.questions[task] = load_examples(task, task_arguments, *wanted, at_most=True)
            data.candidates[task] = sorted({example.answer for example in data.questions[task]})
        elif task == "arithmetic" or task in SYMBOLS:
            for operation in SYMBOLS if task == "arithmetic" else (task,):
                for digits in arguments.digits:
                    data.sums[operation, digits] = _load_sums(operation, digits, arguments, task_arguments)
    check_sources(data.questions, task_arguments)
    if arguments.num_shots:
        for task in {*data.questions, *(operation for operation, _ in data.sums)}:
            data.shots[task] = _load_shots(task, arguments, task_arguments)
    if arguments.dataset_name is not None:
        data.texts = _load_texts(arguments)
    if "generation" in arguments.tasks:
        lines = Path(arguments.prompts_file).read_text("utf-8").splitlines() if arguments.prompts_file else PROMPTS
        data.prompts = [line for line in lines if line.strip()]
        if not data.prompts:
            raise ValueError(f"{arguments.prompts_file} has no prompt: expected one on each line.")
    return data


def _load_sums(
    operation: str, digits: int, arguments: EvaluationArguments, task_arguments: TaskArguments
) -> list[TaskExample]:
    length = {"min_digits": digits, "max_digits": digits, "at_most": True}
    problems = generate_problems(operation, arguments.num_problems, arguments.split, arguments.seed, **length)
    return [arithmetic_example(problem, task_arguments) for problem in problems]


def _load_shots(task: str, arguments: EvaluationArguments, task_arguments: TaskArguments) -> str:
    wanted, seed = arguments.num_shots, arguments.seed
    many = load_examples(task, task_arguments, "train", 50 * wanted, seed, at_most=True)
    if len(many) < wanted:
        raise ValueError(f"num_shots is {wanted}: there are only {len(many)} examples of {task} to train on.")
    return few_shot_prefix(random.Random(f"{task} {seed}").sample(many, wanted))


def _load_texts(arguments: EvaluationArguments) -> list[str]:
    name, config = arguments.dataset_name, arguments.dataset_config
    split = arguments.dataset_split
    if split is None:
        splits = dataset_splits(name, config)
        split = next((wanted for wanted in ("test", "validation") if wanted in splits), None)
    if split is None:
        whole = load_documents(name, config, "train", arguments.text_column)
        _, documents = split_documents(whole, arguments.validation_fraction)
    else:
        documents = load_documents(name, config, split, arguments.text_column)
    return documents["text"][: arguments.max_documents]


def load_evaluated_model(arguments: EvaluationArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, with its adapter if it is one, and its tokenizer."""
    source = arguments.model_name_or_path
    adapter = Path(source, "adapter_config.json")
    has_tokenizer = not adapter.is_file() or Path(source, "tokenizer_config.json").is_file()
    named = source if has_tokenizer else json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
    tokenizer = load_tokenizer(named, arguments.trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(PartialState(cpu=arguments.use_cpu).device).eval(), tokenizer


def recurrences_to_try(model: PreTrainedModel, wanted: Sequence[int] | None) -> list[int | None]:
    """The numbers of recurrences of the sweep; `[None]` for a model that has no recurrent experts."""
    if not getattr(model.config, "is_recurrent", False):
        return [None]
    return sorted(set(wanted)) if wanted else [model.config.num_recurrences]


class LanguageModelEvaluation:
    """
    Runs the tasks at each number of recurrences, and keeps what it has: `eval_results.json` is written after each.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        arguments ([`EvaluationArguments`]): What to do.
        task_arguments ([`TaskArguments`]): How the stories and sums are made and written.
        data ([`EvaluationData`]): What to ask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: EvaluationArguments,
        task_arguments: TaskArguments,
        data: EvaluationData,
    ):
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.arguments, self.task_arguments = arguments, task_arguments
        self.state = PartialState()
        self.depths = recurrences_to_try(model, arguments.num_recurrences)
        own = getattr(model.config, "num_recurrences", None)
        self.csv_depth = own if own in self.depths else self.depths[-1]
        self.records: list[dict] = []
        self.samples: list[dict] = []

    def run(self) -> dict:
        """Evaluates, and returns what `eval_results.json` has."""
        started = time.perf_counter()
        with AnswerLog(self._csv_path()) as log:
            for depth in self.depths:
                for name, evaluate in self._tasks():
                    self._say(f"{name}{'' if depth is None else f', recurrences {depth}'}")
                    self.records += evaluate(depth, log if depth == self.csv_depth else None)
                    self._save(time.perf_counter() - started)
        self._draw_sample()
        return self._results(time.perf_counter() - started)

    def _tasks(self) -> Iterator[tuple[str, Callable]]:
        if "perplexity" in self.arguments.tasks:
            yield "perplexity", self._perplexity
        for task, examples in self.data.questions.items():
            yield task, lambda depth, log, task=task, examples=examples: self._questions(task, examples, depth, log)
        for (task, digits), examples in self.data.sums.items():
            yield (
                f"{task}, digits {digits}",
                lambda depth, log, task=task, digits=digits, examples=examples: self._sums(
                    task, digits, examples, depth, log
                ),
            )
        if self.data.prompts:
            yield "generation", self._generation

    def _perplexity(self, depth: int | None, log: AnswerLog | None) -> list[dict]:
        options = self.arguments
        score = score_texts(
            self.model,
            self.tokenizer,
            self.data.texts,
            window=options.sequence_length,
            stride=options.stride,
            batch_size=options.batch_size,
            num_recurrences=depth,
            detokenize=options.detokenize,
        )
        counts = {"perplexity": score.tokens, "word_perplexity": score.words, "bits_per_byte": score.bytes}
        return [
            {"task": "perplexity", "metric": metric, "value": value, "num_recurrences": depth, "count": counts[metric]}
            for metric, value in score.figures().items()
        ]

    def _questions(self, task: str, examples: list[TaskExample], depth: int | None, log: AnswerLog | None):
        answers = self._answer(examples, task, depth, log, self.data.candidates[task])
        generated = sum(answer.is_correct for answer in answers)
        ranked = sum(answer.is_ranked_first for answer in answers)
        shared = {"task": task, "num_recurrences": depth}
        return [
            {**shared, "metric": "generation_accuracy", **_share(generated, len(answers))},
            {**shared, "metric": "ranking_accuracy", **_share(ranked, len(answers))},
        ]

    def _sums(self, task: str, digits: int, examples: list[TaskExample], depth: int | None, log: AnswerLog | None):
        correct = sum(answer.is_correct for answer in self._answer(examples, task, depth, log))
        in_range = digits <= self.task_arguments.max_digits
        shared = {"task": task, "num_recurrences": depth, "digits": digits, "in_range": in_range}
        return [{**shared, "metric": "exact_match", **_share(correct, len(examples))}]

    def _answer(
        self,
        examples: list[TaskExample],
        task: str,
        depth: int | None,
        log: AnswerLog | None,
        candidates: Sequence[str] = (),
    ) -> list[AnsweredQuestion]:
        longest = max(map(len, encode_answers(self.tokenizer, [example.answer for example in examples])))
        answerer = QuestionAnswerer(
            self.model,
            self.tokenizer,
            num_recurrences=depth,
            shots=self.data.shots.get(task, ""),
            candidates=candidates,
            reverse_answer=self.task_arguments.reverse_answer,
            # Only the main process has a file open, but all of them answer what goes into it.
            with_routes=log is not None and self.arguments.csv is not None,
            # An answer that goes on must be seen to go on.
            max_new_tokens=longest + 1,
        )
        answers: list[AnsweredQuestion] = []
        size = self.arguments.batch_size * self.state.num_processes
        starts = range(0, len(examples), size)
        for start in tqdm(starts, desc=task, leave=False, disable=not self.state.is_main_process):
            with self.state.split_between_processes(examples[start : start + size]) as mine:
                batch = gather_object(answerer(mine))
            answers += batch
            if log is not None and self.state.is_main_process:
                log.write(batch, depth)
        return answers

    def _generation(self, depth: int | None, log: AnswerLog | None) -> list[dict]:
        samples = self._continue(depth)
        texts = [sample["continuation"] for sample in samples]
        self.samples += samples
        shared = {"task": "generation", "num_recurrences": depth}
        figures = text_diversity(texts)
        records = [{**shared, "metric": name, "value": value, "count": len(texts)} for name, value in figures.items()]
        return records + (self._by_position(depth) if self.data.texts else [])

    def _by_position(self, depth: int | None) -> list[dict]:
        options = self.arguments
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = min(_LENGTHS * options.sequence_length, limit or _LENGTHS * options.sequence_length)
        try:
            buckets = perplexity_by_position(
                self.model,
                self.tokenizer,
                self.data.texts,
                length=length,
                bucket=max(1, options.sequence_length // 2),
                batch_size=max(1, options.batch_size // _LENGTHS),
                num_recurrences=depth,
                detokenize=options.detokenize,
            )
        except ValueError as error:
            # A text that is too short for this has a perplexity all the same.
            self._say(str(error))
            return []
        return [
            {
                "task": "generation",
                "num_recurrences": depth,
                "metric": f"perplexity_{bucket['first']}_to_{bucket['last']}",
                "value": bucket["perplexity"],
                "count": bucket["tokens"],
                "position": bucket["last"],
                "in_range": bucket["last"] <= options.sequence_length,
            }
            for bucket in buckets
        ]

    def _continue(self, depth: int | None) -> list[dict]:
        """Samples of every prompt, one prompt at a time, so that no sample depends on the padding of another."""
        options = self.arguments
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
        settings = sampling if options.temperature else {"do_sample": False}
        settings |= {} if depth is None else {"num_recurrences": depth}
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        torch.manual_seed(options.seed)
        samples = []
        for prompt in tqdm(self.data.prompts, desc="generation", leave=False, disable=not self.state.is_main_process):
            ids = torch.tensor(encode_prompts(self.tokenizer, [prompt]), device=self.model.device)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.max_new_tokens,
                num_return_sequences=options.num_samples if options.temperature else 1,
                pad_token_id=pad,
                **settings,
            )
            for text in self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True):
                samples.append({"num_recurrences": depth, "prompt": prompt, "continuation": text})
        return samples

    def _csv_path(self) -> str | None:
        return self.arguments.csv if self.state.is_main_process else None

    def _draw_sample(self) -> None:
        if self.arguments.csv is None or not self.state.is_main_process:
            return
        examples = [*self.data.questions.values(), *self.data.sums.values()]
        flat = [example for part in examples for example in part]
        if not flat:
            return
        example = flat[min(self.arguments.sample, len(flat) - 1)]
        text = self.data.shots.get(example.task, "") + example.prompt + example.answer
        try:
            routes = record_routes(self.model, self.tokenizer, text, num_recurrences=self.csv_depth)
        except ValueError as error:
            # A dense model has no routes.
            self._say(str(error))
        else:
            write_report(routes, routing_report_path(self.arguments.csv))

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            tqdm.write(text)

    def _results(self, seconds: float) -> dict:
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
        return {
            "model": self.arguments.model_name_or_path,
            "parameters": self.model.num_parameters(),
            "settings": {
                name: value for name, value in asdict(self.arguments).items() if name not in ("model_name_or_path",)
            },
            "tasks": asdict(self.task_arguments),
            "words": "words and one end of line for each line of the text as given",
            "hardware": f"{self.state.num_processes} x {name}, {torch.get_num_threads()} threads",
            "seconds": round(seconds, 1),
            "results": self.records,
            "samples": self.samples,
        }

    def _save(self, seconds: float) -> None:
        if self.state.is_main_process:
            text = json.dumps(self._results(seconds), indent=2) + "\n"
            write_whole_text(Path(self.arguments.output_dir, RESULTS), text)


def routing_report_path(csv: str) -> Path:
    """Where the routes of a question are drawn: beside the CSV file."""
    return Path(csv).with_suffix(".routes.html")


def _share(correct: int, count: int) -> dict[str, float]:
    low, high = wilson_interval(correct, count)
    return {"value": correct / count, "low": low, "high": high, "count": count}
