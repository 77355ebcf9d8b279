"""Evaluation of a language model on GSM8K: pass@1, pass@k and majority vote, by our grader and by those of lm-eval.

What is measured are records, one dictionary for each figure: `decoding` (`greedy` or `sampled`), `metric`, `grader`,
`value`, `count`, and for shares `low` and `high` (95 % interval).
"""

import json
import math
import platform
import re
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from .expert_adapters import load_causal_lm
from .gsm8k import load_gsm8k, make_prompt, prompt_text, uses_chat
from .gsm8k_completions import read_completions, read_report
from .gsm8k_evaluation_config import COMPLETIONS, RESULTS, GSM8KEvaluationArguments
from .metrics.answer_accuracy import wilson_interval
from .number_extraction import extract_answer, gold_answer, has_marked_answer
from .text_data import local_path
from .tokenization import encode_answers, encode_prompts, load_tokenizer
from .training_record import size_of
from .whole_files import write_whole, write_whole_text
from .wide_console import wide_console

# Our own, and the two filters of lm-eval's task `gsm8k` (version 3).
GRADERS = ("exact", "strict_match", "flexible_extract")

_TURN_ENDS = ("<|im_end|>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "</s>")
_UNTIL = re.compile(r"Question:|</s>|<\|im_end\|>")
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def pass_at_k(count: int, correct: int, k: int) -> float:
    """
    The chance that one of `k` solutions is correct, estimated without bias from `count` of which `correct` were: one
    minus the share of the subsets of `k` that hold none (Chen et al. 2021, arXiv:2107.03374, equation 1).
    """
    return float(1 - Fraction(math.comb(count - correct, k), math.comb(count, k)))


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The answer that most solutions have, the earliest of those that share the lead; `None` if none has any."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def lm_eval_matches(completion: str, solution: str) -> tuple[bool, bool]:
    """
    Whether a completion is right by the filters `strict-match` and `flexible-extract` of lm-eval's task `gsm8k`: the
    first number after `#### `, and the last number anywhere, compared as text with `solution` and its `#### `.
    """
    completion = _UNTIL.split(completion, maxsplit=1)[0]
    strict = _STRICT.search(completion)
    numbers = deque(_FLEXIBLE.finditer(completion), maxlen=1)
    gold = _as_lm_eval_compares(solution)
    return (
        strict is not None and _as_lm_eval_compares(strict[1]) == gold,
        bool(numbers) and _as_lm_eval_compares(numbers[0].group()) == gold,
    )


def _as_lm_eval_compares(text: str) -> str:
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def load_problems(arguments: GSM8KEvaluationArguments) -> tuple[datasets.Dataset, list[dict]]:
    """The problems and the solved ones that are shown before each, so that what is wrong with them is found first."""
    name, config, wanted = arguments.dataset_name, arguments.dataset_config, arguments.num_shots
    source = arguments.shots_name or name
    if wanted and arguments.shots_name is None:
        path = local_path(name)
        if path is not None and path.is_file():
            raise ValueError(f"num_shots is {wanted}: {name} has no split train, so give --shots_name.")
        if arguments.split.startswith("train"):
            raise ValueError(f"num_shots is {wanted}: the split train is solved itself, so give --shots_name.")
    problems = load_gsm8k(name, arguments.split, config, arguments.num_problems)
    shots = load_gsm8k(source, "train", config, wanted).to_list() if wanted else []
    if len(shots) < wanted:
        raise ValueError(f"num_shots is {wanted}: {source} has only {len(shots)} problems.")
    return problems, shots


def load_evaluated_model(arguments: GSM8KEvaluationArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model in evaluation mode and its tokenizer; an adapter is merged into a model that is not in 4 bits.

    Raises:
        ValueError: If the adapter is one of experts, and these are to be in 4 bits.
    """
    source = str(local_path(arguments.model_name_or_path) or arguments.model_name_or_path)
    base, found = source, find_adapter_config_file(source)
    if found is not None:
        adapter = json.loads(Path(found).read_text("utf-8"))
        base = adapter["base_model_name_or_path"]
        # PEFT finds no such weight in 4 bits, and only warns.
        if arguments.load_in_4bit and adapter.get("target_parameters"):
            raise ValueError(f"load_in_4bit: experts in 4 bits would lose the adapters that {source} has for them.")
    has_tokenizer = base == source or Path(source, "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(source if has_tokenizer else base)
    uses_chat(arguments.prompt_format, tokenizer)
    device = PartialState(cpu=arguments.use_cpu).device
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    options = {"load_in_4bit": True, "device_map": {"": device}} if arguments.load_in_4bit else {}
    model = load_causal_lm(base, dtype, **options)
    if base != source:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source)
        model = model if arguments.load_in_4bit else model.merge_and_unload()
    return (model if arguments.load_in_4bit else model.to(device)).eval(), tokenizer


class GSM8KEvaluation:
    """
    Solves the problems and grades the solutions. Every batch is added to `completions.jsonl` at once, so that an
    interrupted run can go on from there; `eval_results.json` is written after each way of decoding.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        arguments ([`GSM8KEvaluationArguments`]): What to do.
        problems (`datasets.Dataset`): Rows with `question` and `answer`.
        shots (`Sequence[dict]`, *optional*): Solved problems to show before each.

    Raises:
        ValueError: If prompt and solution do not fit into the model's context, or the run to resume was another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: GSM8KEvaluationArguments,
        problems: datasets.Dataset,
        shots: Sequence[dict] = (),
    ):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.problems = problems.to_list()
        self.state = PartialState()
        conversational = uses_chat(arguments.prompt_format, tokenizer)
        prompts = [make_prompt(problem["question"], conversational, shots) for problem in self.problems]
        texts = [prompt_text(prompt, tokenizer) for prompt in prompts]
        # A chat template writes the special tokens itself.
        self.prompts = encode_answers(tokenizer, texts) if conversational else encode_prompts(tokenizer, texts)
        self._check_length()
        self.stop_ids = stop_token_ids(model, tokenizer)
        # Long prompts come first: what does not fit into memory shows at once, and batches need little padding.
        self.order = sorted(range(len(texts)), key=lambda index: (-len(self.prompts[index]), index))
        self.folder = Path(arguments.output_dir)
        self.rows: dict[tuple[str, int, int], dict] = {}
        if arguments.resume:
            self._read_rows()

    def _check_length(self) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.prompts))
        if limit is not None and longest + self.arguments.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {self.arguments.max_new_tokens}: with the longest prompt, of {longest} tokens, "
                f"this is more than the {limit} that the model takes."
            )

    def run(self) -> dict:
        """Solves what is not solved yet, and returns what `eval_results.json` has."""
        started = time.perf_counter()
        records: list[dict] = []
        # A process that is late must not find the files of this very run.
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save([], 0.0)
            self._write_rows(list(self.rows.values()), "w")
        if self.arguments.greedy:
            records += self._evaluate("greedy")
            self._save(records, time.perf_counter() - started)
        if self.arguments.num_samples:
            records += self._evaluate("sampled")
        seconds = time.perf_counter() - started
        self._save(records, seconds)
        return self._results(records, seconds)

    def _batches(self, decoding: str) -> list[list[tuple[str, int, int]]]:
        """What is solved at once by all processes: the way of decoding, the number of the sample, and the problem."""
        count = 1 if decoding == "greedy" else self.arguments.num_samples
        keys = [(decoding, sample, problem) for problem in self.order for sample in range(count)]
        size = self.arguments.batch_size * self.state.num_processes
        return [keys[start : start + size] for start in range(0, len(keys), size)]

    def _evaluate(self, decoding: str) -> list[dict]:
        batches = self._batches(decoding)
        for number, batch in enumerate(tqdm(batches, desc=decoding, disable=not self.state.is_main_process)):
            if all(key in self.rows for key in batch):
                continue
            with self.state.split_between_processes(batch) as mine:
                # Of the last batch, some process may have nothing, but weights that the others need.
                rows = self._solve(mine or batch[:1], number)
                rows = gather_object(rows if mine else [])
            self.rows |= {(row["decoding"], row["sample"], row["problem"]): row for row in rows}
            if self.state.is_main_process:
                self._write_rows(rows, "a")
        solved: list[list[dict]] = [[] for _ in self.problems]
        for key in sorted(key for batch in batches for key in batch):
            solved[key[2]].append(self.rows[key])
        return figures(solved, decoding, self.arguments.pass_k if decoding == "sampled" else [1])

    @torch.no_grad()
    def _solve(self, keys: Sequence[tuple[str, int, int]], number: int) -> list[dict]:
        options = self.arguments
        prompts = [torch.tensor(self.prompts[problem]) for _, _, problem in keys]
        pad = self.tokenizer.pad_token_id
        inputs = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left")
        sampling = {"do_sample": False, "num_beams": 1}
        if keys[0][0] == "sampled":
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        # A batch has the same samples wherever a run was interrupted before it.
        torch.manual_seed(zlib.crc32(f"{options.seed} {number} {self.state.process_index}".encode()))
        output = self.model.generate(
            input_ids=inputs.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self.stop_ids,
            **sampling,
        )
        return [self._grade(key, ids) for key, ids in zip(keys, output[:, inputs.shape[1] :].tolist(), strict=True)]

    def _grade(self, key: tuple[str, int, int], ids: list[int]) -> dict:
        decoding, sample, index = key
        problem = self.problems[index]
        length = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        completion = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        extracted, gold = extract_answer(completion), gold_answer(problem["answer"])
        strict, flexible = lm_eval_matches(completion, problem["answer"])
        return {
            "problem": index,
            "decoding": decoding,
            "sample": sample,
            "question": problem["question"],
            "completion": completion,
            "answer": str(gold),
            "extracted": None if extracted is None else str(extracted),
            "exact": extracted == gold,
            "strict_match": strict,
            "flexible_extract": flexible,
            "marked": has_marked_answer(completion),
            "tokens": min(length + 1, len(ids)),
            "finished": length < len(ids),
        }

    def _read_rows(self) -> None:
        """Takes over the whole batches of an interrupted run."""
        results, completions = self.folder / RESULTS, self.folder / COMPLETIONS
        if not results.is_file() or not completions.is_file():
            raise FileNotFoundError(f"There is no run in {self.folder} to resume.")
        before = read_report(results)["settings"]
        now = json.loads(json.dumps(self.arguments.settings()))
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name} is {value}, but the run in {self.folder} had {before.get(name)}: a run can be resumed "
                    "with the same settings only."
                )
        # A killed process, or a full disk, may leave a part of a batch.
        rows = {(row["decoding"], row["sample"], row["problem"]): row for row in read_completions(completions)}
        for batch in [*self._batches("greedy"), *self._batches("sampled")]:
            if all(key in rows for key in batch):
                self.rows |= {key: rows[key] for key in batch}

    def _write_rows(self, rows: Sequence[dict], mode: str) -> None:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
        path = self.folder / COMPLETIONS
        if mode == "w":
            write_whole(path, lambda aside: aside.write_bytes(data))
            return
        # Without a buffer that a killed process would lose half of.
        with open(path, "ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(f"{path} could not be written: the disk is full.")

    def _results(self, records: list[dict], seconds: float) -> dict:
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
        return {
            "model": self.arguments.model_name_or_path,
            # Of weights in 4 bits the one knows how many they are, of those that ZeRO-3 has split the other.
            "parameters": max(self.model.num_parameters(), sum(map(size_of, self.model.parameters()))),
            "problems": len(self.problems),
            "settings": self.arguments.settings(),
            "hardware": f"{self.state.num_processes} x {name}, {torch.get_num_threads()} threads",
            "seconds": round(seconds, 1),
            "results": records,
        }

    def _save(self, records: list[dict], seconds: float) -> None:
        if self.state.is_main_process:
            text = json.dumps(self._results(records, seconds), indent=2) + "\n"
            write_whole_text(self.folder / RESULTS, text)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn: those of the model's generation, the tokenizer's own, and the marks of chats."""
    configured = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    added = tokenizer.get_added_vocab()
    return sorted((ids | {added[mark] for mark in _TURN_ENDS if mark in added}) - {None})


def figures(solved: Sequence[Sequence[dict]], decoding: str, ks: Sequence[int]) -> list[dict]:
    """
    The records of solutions, a list for each problem: pass@k by each grader, a majority vote where there are several,
    and what the solutions look like.

    The interval is Wilson's for as many trials as problems. The variance of numbers between 0 and 1 is at most that of
    a share of the same mean, so that for pass@k of several solutions it is, if anything, too wide.
    """
    records = []
    for k in ks:
        for grader in GRADERS:
            chances = [pass_at_k(len(rows), sum(row[grader] for row in rows), k) for rows in solved]
            records.append({"metric": f"pass@{k}", "grader": grader, **_share(chances)})
    if len(solved[0]) > 1:
        right = [majority_answer([row["extracted"] for row in rows]) == rows[0]["answer"] for rows in solved]
        records.append({"metric": f"majority@{len(solved[0])}", "grader": "exact", **_share(right)})
    every = [row for rows in solved for row in rows]
    for metric, values in (
        ("extraction_rate", [row["extracted"] is not None for row in every]),
        ("marker_rate", [row["marked"] for row in every]),
        ("finished_rate", [row["finished"] for row in every]),
    ):
        records.append({"metric": metric, "grader": None, "value": sum(values) / len(every), "count": len(every)})
    mean = sum(row["tokens"] for row in every) / len(every)
    records.append({"metric": "mean_tokens", "grader": None, "value": mean, "count": len(every)})
    return [{"decoding": decoding, **record} for record in records]


def _share(values: Sequence[float]) -> dict[str, float]:
    low, high = wilson_interval(sum(values), len(values))
    return {"value": sum(values) / len(values), "low": low, "high": high, "count": len(values)}


def print_results(records: list[dict]) -> None:
    """Prints a table with a row for each figure and a column for each grader."""
    table = Table(title="GSM8K; shares in %, with 95 % interval")
    for column in ("decoding", "figure", "n"):
        table.add_column(column)
    for column in ("ours", "lm-eval strict", "lm-eval flexible"):
        table.add_column(column, justify="right")
    for decoding, metric in dict.fromkeys((record["decoding"], record["metric"]) for record in records):
        row = [record for record in records if (record["decoding"], record["metric"]) == (decoding, metric)]
        by_grader = {record["grader"] or "exact": _cell(record) for record in row}
        cells = [by_grader.get(grader, "") for grader in GRADERS]
        table.add_row(decoding, metric.replace("_", " "), f"{row[0]['count']:,}", *cells)
    wide_console().print(table)


def _cell(record: dict) -> str:
    if record["metric"] == "mean_tokens":
        return f"{record['value']:.1f}"
    shown = f"{100 * record['value']:.1f}"
    return f"{shown} ({100 * record['low']:.1f} to {100 * record['high']:.1f})" if "low" in record else shown
