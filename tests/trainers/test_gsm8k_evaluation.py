"""Evaluation on GSM8K: its estimators, its graders beside lm-eval's, and a small model whose answers are known."""

import itertools
import json
import random
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PhimoeConfig, PhimoeForCausalLM

from mixturekit.trainers.expert_adapters import expert_lora_config
from mixturekit.trainers.gsm8k import make_prompt
from mixturekit.trainers.gsm8k_evaluation import (
    GSM8KEvaluation,
    figures,
    lm_eval_matches,
    load_evaluated_model,
    load_problems,
    majority_answer,
    pass_at_k,
    print_results,
    stop_token_ids,
)
from mixturekit.trainers.gsm8k_evaluation_config import GSM8KEvaluationArguments
from mixturekit.trainers.token_datasets import pad_blocks
from mixturekit.trainers.tokenization import encode_answers, encode_prompts, train_tokenizer

NAMES = ("Ann", "Bob", "Eve", "Jo", "Lea", "Max", "Pia", "Sam", "Tom", "Zoe")
SUMS = [(index + 1, 2 * index + 3) for index in range(len(NAMES))]
PROBLEMS = [
    {
        "question": f"{name} has {left} cups and buys {right}. How many now?",
        "answer": f"{left} + {right} = {left + right}\n#### {left + right}",
    }
    for name, (left, right) in zip(NAMES, SUMS, strict=True)
]
# What the model says: solutions as they are, one with decimals, a wrong one, and one without a marker.
SAID = [problem["answer"] for problem in PROBLEMS[:7]] + ["#### 25.0", "#### 5", "So it is 31."]
RIGHT = {"exact": [0, 1, 2, 3, 4, 5, 6, 7, 9], "strict_match": list(range(7)), "flexible_extract": [*range(7), 9]}


@pytest.fixture(scope="module")
def solver(tmp_path_factory, learn_by_heart):
    """A checkpoint of a small Phi-MoE that says `SAID`, and the problems beside it."""
    prompts = [make_prompt(problem["question"], False) for problem in PROBLEMS]
    tokenizer = train_tokenizer([*prompts, *SAID], 300)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, head_dim=16, max_position_embeddings=512, sliding_window=None,
        **marks,
    )  # fmt: skip
    # Out of training its routing has no noise.
    model = PhimoeForCausalLM(config).eval()
    rows = []
    for prompt, answer in zip(
        encode_prompts(tokenizer, prompts), encode_answers(tokenizer, [f" {said}" for said in SAID]), strict=True
    ):
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        rows.append(
            {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * len(prompt) + ids[len(prompt) :])}
        )
    learn_by_heart(model, pad_blocks(rows, tokenizer.pad_token_id))
    folder = tmp_path_factory.mktemp("solver")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return folder


@pytest.fixture
def arguments(solver, cache, tmp_path):
    return GSM8KEvaluationArguments(
        str(solver), dataset_name=str(solver / "problems.jsonl"), use_cpu=True, max_new_tokens=24, batch_size=4,
        output_dir=str(tmp_path / "eval"),
    )  # fmt: skip


def evaluate(arguments):
    """The report and the rows of `completions.jsonl`, by decoding, problem and sample."""
    problems, shots = load_problems(arguments)
    evaluation = GSM8KEvaluation(*load_evaluated_model(arguments), arguments, problems, shots)
    report = evaluation.run()
    assert json.loads((evaluation.folder / "eval_results.json").read_text()) == report
    lines = (evaluation.folder / "completions.jsonl").read_text("utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: (row["decoding"], row["problem"], row["sample"]))
    return report, rows


def value(report, decoding, metric, grader="exact"):
    wanted = {"decoding": decoding, "metric": metric, "grader": grader}
    return next(row for row in report["results"] if wanted.items() <= row.items())


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_one(count):
    for correct in range(count + 1):
        right = [index < correct for index in range(count)]
        for k in range(1, count + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(count, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias():
    rng = random.Random(0)
    draws = [sum(rng.random() < 0.3 for _ in range(6)) for _ in range(20_000)]
    mean = sum(pass_at_k(6, correct, 4) for correct in draws) / len(draws)
    assert mean == pytest.approx(1 - 0.7**4, abs=0.006)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1000, 500, 1) == 0.5
    assert 0 < pass_at_k(1000, 1, 999) < 1 == pass_at_k(1000, 2, 999)


def test_the_vote_goes_to_the_most_frequent_answer_and_the_first_of_equals():
    assert majority_answer(["3", "5", None, "5"]) == "5"
    assert majority_answer(["3", "5", "5", "3"]) == "3"
    assert majority_answer([None, None, "7"]) == "7"
    assert majority_answer([None]) is None


COMPLETIONS = [
    " 3 + 5 = 8\n#### 8", "#### 8.", "#### $8", "#### 8.0", "####8", "#### 9\n#### 8", "#### 8\n#### 9", "It is 8.",
    "It is $8", "8", "It is 8.00", "", "none", "#### none", "#### -8", "#### 1,008", "\\boxed{8}", "8 dollars",
    "5 8 6", "#### 8\n\nQuestion: 3 + 4?\nAnswer: #### 7", "#### 8<|im_end|> 9", "the 8th", "#### 8,", "#### ,.",
    "-$8", "$.",
]  # fmt: skip


@pytest.mark.parametrize("solution", ["3 + 5 = <<3+5=8>>8\n#### 8", "#### 1,008", "#### -8"])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_strict_and_flexible_matches_are_those_of_lm_eval(completion, solution):
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    # What lm-eval generates ends before these.
    until = completion
    for mark in ("Question:", "</s>", "<|im_end|>"):
        until = until.split(mark)[0]
    filters = (
        extraction.RegexFilter("#### (\\-?[0-9\\.\\,]+)"),
        extraction.RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    )
    theirs = []
    for regex in filters:
        found = regex.apply([[until]], [{}])[0][0]
        score = exact_match_hf_evaluate([found], [solution], regexes_to_ignore=ignored, ignore_case=True)
        theirs.append(bool(score["exact_match"]))
    assert lm_eval_matches(completion, solution) == tuple(theirs)


def row(extracted, exact, **more):
    shared = {"strict_match": exact, "flexible_extract": False, "marked": exact, "finished": True, "tokens": 4}
    return {"extracted": extracted, "exact": exact, "answer": "8", **shared, **more}


def test_figures_of_several_samples():
    right, wrong, empty = row("8", True), row("5", False), row(None, False, finished=False, tokens=8)
    records = figures([[right, right, wrong, empty], [wrong, wrong, right, empty]], "sampled", [1, 2, 4])
    by_name = {(record["metric"], record["grader"]): record for record in records}
    assert by_name["pass@1", "exact"]["value"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert by_name["pass@2", "exact"]["value"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert by_name["pass@4", "exact"]["value"] == 1.0 and by_name["pass@4", "flexible_extract"]["value"] == 0.0
    assert by_name["majority@4", "exact"]["value"] == 0.5
    assert by_name["extraction_rate", None] | {"value": 0.75, "count": 8} == by_name["extraction_rate", None]
    assert by_name["marker_rate", None]["value"] == 3 / 8 and by_name["mean_tokens", None]["value"] == 5.0
    assert by_name["finished_rate", None]["value"] == 0.75
    for record in records:
        assert "low" not in record or 0 <= record["low"] <= record["value"] <= record["high"] <= 1


def test_a_model_is_graded_greedily_by_three_graders(arguments, capsys):
    report, rows = evaluate(arguments)
    assert [row["completion"].strip() for row in rows] == SAID
    for grader, right in RIGHT.items():
        record = value(report, "greedy", "pass@1", grader)
        assert record["value"] == len(right) / 10 and record["count"] == 10
        assert [row["problem"] for row in rows if row[grader]] == right
    assert record["low"] == pytest.approx(0.4902, abs=1e-3) and record["high"] == pytest.approx(0.9433, abs=1e-3)
    assert value(report, "greedy", "finished_rate", None)["value"] == 1.0
    assert value(report, "greedy", "marker_rate", None)["value"] == 0.9
    assert {"problem", "question", "completion", "answer", "extracted", "tokens"} <= rows[0].keys()
    assert report["settings"]["temperature"] == 1.0 and report["problems"] == 10
    capsys.readouterr()
    print_results(report["results"])
    printed = capsys.readouterr().out
    assert "90.0 (59.6 to 98.2)" in printed and "80.0 (49.0 to 94.3)" in printed and "lm-eval strict" in printed


def test_the_batch_does_not_change_what_is_said(arguments):
    _, rows = evaluate(arguments)
    for batch_size in (1, 7):
        other = replace(arguments, batch_size=batch_size, output_dir=f"{arguments.output_dir}{batch_size}")
        assert evaluate(other)[1] == rows


def test_samples_give_pass_at_k_and_a_vote(arguments):
    arguments = replace(arguments, greedy=False, num_samples=4, pass_k=None, temperature=0.02, num_problems=8)
    report, rows = evaluate(arguments)
    assert [(row["problem"], row["sample"]) for row in rows] == list(itertools.product(range(8), range(4)))
    assert {row["metric"] for row in report["results"]} >= {"pass@1", "pass@2", "pass@4", "majority@4"}
    # At this temperature the samples are the greedy solutions.
    assert value(report, "sampled", "pass@1")["value"] == value(report, "sampled", "majority@4")["value"] == 1.0
    assert value(report, "sampled", "pass@4", "strict_match")["value"] == 7 / 8


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(arguments):
    arguments = replace(arguments, greedy=False, num_samples=2, pass_k=None, temperature=3.0)
    _, rows = evaluate(arguments)
    assert rows[0]["completion"] != rows[1]["completion"]
    assert evaluate(replace(arguments, output_dir=f"{arguments.output_dir}2"))[1] == rows
    assert evaluate(replace(arguments, seed=1, output_dir=f"{arguments.output_dir}3"))[1] != rows


@pytest.mark.parametrize("lines", [0, 1, 5, 9, 13, 20])
def test_an_interrupted_run_goes_on_to_the_same_results(arguments, lines):
    arguments = replace(arguments, num_samples=1, pass_k=None, temperature=2.0)
    report, rows = evaluate(arguments)
    path = f"{arguments.output_dir}/completions.jsonl"
    with open(path, "rb") as file:
        written = file.read().splitlines(keepends=True)
    with open(path, "wb") as file:
        # A killed process leaves a part of a line.
        file.write(b"".join(written[:lines]) + (written[lines][:40] if lines < len(written) else b""))
    again, same = evaluate(replace(arguments, resume=True))
    assert same == rows and again["results"] == report["results"]
    with open(path, "rb") as file:
        assert file.read() == b"".join(written)


def test_a_run_is_resumed_with_its_own_settings_only(arguments, tmp_path):
    evaluate(arguments)
    with pytest.raises(ValueError, match="max_new_tokens is 20, but the run in .* had 24: a run can be resumed"):
        evaluate(replace(arguments, resume=True, max_new_tokens=20))
    with pytest.raises(FileNotFoundError, match="There is no run in .*none to resume"):
        evaluate(replace(arguments, resume=True, output_dir=str(tmp_path / "none")))


def test_results_are_replaced_only_when_told(arguments):
    _, rows = evaluate(arguments)
    with pytest.raises(FileExistsError, match="eval_results.json is there: choose another --output_dir, go on with"):
        replace(arguments)
    assert len(evaluate(replace(arguments, overwrite=True, num_problems=3))[1]) == 3


def test_a_chat_is_ended_by_its_marks_and_not_by_the_tokenizers_end_alone(solver, arguments):
    model, tokenizer = load_evaluated_model(arguments)
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model.generation_config.eos_token_id = [0, 7]
    assert stop_token_ids(model, tokenizer) == sorted({0, 7, tokenizer.convert_tokens_to_ids("<|end|>")})


def test_a_chat_template_writes_the_special_tokens_itself(arguments, tmp_path):
    model, tokenizer = load_evaluated_model(arguments)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    problems, _ = load_problems(arguments)
    evaluation = GSM8KEvaluation(model, tokenizer, arguments, problems, PROBLEMS[:1])
    assert evaluation.prompts[0].count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(evaluation.prompts[3])
    assert text.count("user:") == 2 and text.endswith("assistant:") and PROBLEMS[0]["answer"] in text
    plain = GSM8KEvaluation(model, tokenizer, replace(arguments, prompt_format="plain"), problems)
    assert tokenizer.decode(plain.prompts[3]) == make_prompt(PROBLEMS[3]["question"], False)


def test_an_adapter_is_merged_into_its_model(solver, arguments, tmp_path):
    base, _ = load_evaluated_model(arguments)
    with_adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_adapter.save_pretrained(tmp_path / "adapter")
    model, _ = load_evaluated_model(replace(arguments, model_name_or_path=str(tmp_path / "adapter")))
    assert type(model) is PhimoeForCausalLM
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, with_adapter.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_in_4_bits_is_evaluated_too(arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "dtype": "bfloat16"}
    report, rows = evaluate(replace(arguments, **options))
    assert len(rows) == 10 and value(report, "greedy", "pass@1")["value"] > 0.3
    # With an adapter that does nothing it says the same.
    model, _ = load_evaluated_model(arguments)
    get_peft_model(model, expert_lora_config(model, target_parameters=[])).save_pretrained(tmp_path / "adapter")
    options |= {"model_name_or_path": str(tmp_path / "adapter"), "output_dir": str(tmp_path / "adapted")}
    assert [row["completion"] for row in evaluate(replace(arguments, **options))[1]] == [
        row["completion"] for row in rows
    ]


def test_adapters_of_experts_are_not_lost_to_4_bits(arguments, tmp_path):
    model, _ = load_evaluated_model(arguments)
    get_peft_model(model, expert_lora_config(model)).save_pretrained(tmp_path / "adapter")
    adapted = replace(arguments, model_name_or_path=str(tmp_path / "adapter"), load_in_4bit=True)
    with pytest.raises(ValueError, match="experts in 4 bits would lose the adapters that .*adapter has for them"):
        load_evaluated_model(adapted)


def test_shots_come_from_elsewhere_than_the_problems(arguments, tmp_path):
    with pytest.raises(ValueError, match="problems.jsonl has no split train, so give --shots_name"):
        load_problems(replace(arguments, num_shots=2))
    with pytest.raises(ValueError, match="the split train is solved itself"):
        load_problems(replace(arguments, num_shots=2, split="train", dataset_name="openai/gsm8k"))
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS[:2]))
    assert load_problems(replace(arguments, num_shots=2, shots_name=str(path)))[1] == PROBLEMS[:2]
    with pytest.raises(ValueError, match="num_shots is 3: .*shots.jsonl has only 2 problems"):
        load_problems(replace(arguments, num_shots=3, shots_name=str(path)))


def test_what_does_not_fit_into_the_context_is_refused_before_any_work(arguments):
    model, tokenizer = load_evaluated_model(arguments)
    long = replace(arguments, max_new_tokens=500)
    with pytest.raises(ValueError, match="max_new_tokens is 500: with the longest prompt, of .* more than the 512"):
        GSM8KEvaluation(model, tokenizer, long, datasets.Dataset.from_list(PROBLEMS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        ({"num_problems": 0}, "num_problems is 0: it must be at least 1."),
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0; --greedy is for the rest."),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1."),
        ({"greedy": False}, "There is nothing to do: leave greedy on, or give num_samples."),
        ({"num_samples": 4, "pass_k": [1, 8]}, "pass_k is [1, 8]: each must be from 1 to num_samples, 4."),
        ({"pass_k": [1]}, "pass_k is [1]: each must be from 1 to num_samples, 0."),
        ({"prompt_format": "xml"}, "prompt_format is 'xml': choose one of auto, plain, chat."),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float32, bfloat16 or float16."),
        ({"overwrite": True, "resume": True}, "Choose one of overwrite and resume: the one replaces results,"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        GSM8KEvaluationArguments("model", output_dir=str(tmp_path / "eval"), **options)
    assert str(error.value).startswith(message)


def test_the_k_are_powers_of_two_unless_given(tmp_path):
    def ks(**options):
        return GSM8KEvaluationArguments("model", output_dir=str(tmp_path), **options).pass_k

    assert ks() == [] and ks(num_samples=1) == [1] and ks(num_samples=6) == [1, 2, 4]
    assert ks(num_samples=8) == [1, 2, 4, 8] and ks(num_samples=8, pass_k=[5, 1, 5]) == [1, 5]
