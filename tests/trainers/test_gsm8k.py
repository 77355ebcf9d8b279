"""GSM8K: its problems as prompts, and the rewards that any trainer of TRL may call."""

import json
import os
import pickle
from functools import partial
from pathlib import Path

import datasets
import pytest
from trl import GRPOConfig, GRPOTrainer

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.gsm8k import (
    INSTRUCTION,
    completion_text,
    correctness_reward,
    length_penalty,
    load_gsm8k,
    make_prompt,
    marker_reward,
    prompt_text,
    uses_chat,
    with_prompts,
)
from mixturekit.trainers.number_extraction import extract_answer, gold_answer
from mixturekit.trainers.tokenization import train_tokenizer

TRAIN = Path(os.environ.get("MIXTUREKIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "gsm8k" / "train.jsonl"

PROBLEMS = [
    {"question": "Tom has 3 dogs and gets 5. How many has he?", "answer": "3 + 5 = <<3+5=8>>8\n#### 8"},
    {"question": "How many are left of 2 after 2 go?", "answer": "2 - 2 = 0\n#### 0"},
    {"question": "What do 2 cars cost at $1,080?", "answer": "2 * 1,080 = 2,160\n#### 2,160"},
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_problems(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(text):
    """A conversational completion."""
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row[column] for row in PROBLEMS for column in ("question", "answer")], 300)


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    tokenizer = train_tokenizer(["a chat"], 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.skipif(not TRAIN.is_file(), reason=f"there is no {TRAIN}; set MIXTUREKIT_DATA")
def test_every_training_answer_of_the_real_data_scores_as_correct():
    rows = [json.loads(line) for line in TRAIN.read_text("utf-8").splitlines()]
    answers = [row["answer"] for row in rows]
    prompts = [row["question"] for row in rows]
    assert len(rows) == 7473
    assert sum(correctness_reward(prompts, answers, answers)) == 7473.0
    assert sum(marker_reward(prompts, answers)) == pytest.approx(0.05 * 7473)
    # The comma is the only mark within the numbers of this data.
    for answer in answers:
        assert gold_answer(answer) == int(answer.rpartition("#### ")[2].replace(",", ""))
    # The answer of the next problem is right only where the numbers happen to be equal.
    others = answers[1:] + answers[:1]
    equal = sum(gold_answer(one) == gold_answer(other) for one, other in zip(answers, others, strict=True))
    assert sum(correctness_reward(prompts, others, answers)) == equal < 200


@pytest.mark.skipif(not TRAIN.is_file(), reason=f"there is no {TRAIN}; set MIXTUREKIT_DATA")
def test_the_last_number_of_a_real_solution_is_mostly_its_answer():
    rows = [json.loads(line) for line in TRAIN.read_text("utf-8").splitlines()]
    unmarked = [row["answer"].rpartition("####")[0] for row in rows]
    right = sum(extract_answer(text) == gold_answer(row["answer"]) for text, row in zip(unmarked, rows, strict=True))
    assert right / len(rows) > 0.96


def test_a_right_number_earns_1_and_a_wrong_one_nothing():
    completions = ["It is 8.\n#### 8.0", "#### 9", "\\boxed{8}", "8 or 9", "", "the answer is $8, not 9"]
    expected = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    answers = ["3 + 5 = 8\n#### 8"] * 6
    assert correctness_reward([""] * 6, completions, answers) == expected
    assert (
        correctness_reward([""] * 6, list(map(said, completions)), answer=answers, completion_ids=[[]] * 6) == expected
    )


def test_an_answer_of_zero_is_one_and_no_answer_is_not_zero():
    assert correctness_reward([""] * 3, ["#### 0", "", "none"], ["#### 0"] * 3) == [1.0, 0.0, 0.0]


def test_the_gold_column_may_hold_the_number_alone():
    assert correctness_reward([""] * 2, ["#### 1,080", "#### 18"], ["1080", "$18"]) == [1.0, 1.0]


def test_a_gold_column_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="must end in one number, after `####`"):
        correctness_reward([""], ["#### 1"], ["none"])


def test_the_bonus_for_a_marker_is_paid_once_and_only_with_a_number():
    completions = [
        "#### 8",
        "#### 8\n#### 8\n\\boxed{8}",
        "####",
        "#### Step 1",
        "it is 8",
        "\\boxed{}",
        "Final Answer: 7",
    ]
    assert marker_reward([""] * 7, completions) == [0.05, 0.05, 0.0, 0.0, 0.0, 0.0, 0.05]
    assert marker_reward([""], [said("#### 8")], answer=["#### 9"], completion_ids=[[1]]) == [0.05]


def test_the_penalty_begins_above_the_threshold_which_a_partial_sets():
    ids = [[1] * 4, [1] * 5, []]
    assert partial(length_penalty, max_tokens=4)([""] * 3, [""] * 3, completion_ids=ids) == [0.0, -0.05, 0.0]
    assert length_penalty([""], [""], completion_ids=[[1] * 513]) == [-0.05]
    with pytest.raises(ValueError, match="counts tokens: give it completion_ids"):
        length_penalty([""], [""])


def test_what_the_assistant_says_last_is_the_completion():
    turns = [*said("#### 1"), {"role": "tool", "content": "#### 2"}, *said("#### 3")]
    assert completion_text(turns) == "#### 3"
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "#### 4"}]}]) == "#### 4"
    assert completion_text([{"role": "assistant", "content": None}]) == completion_text([]) == ""


def test_rewards_can_be_sent_to_other_processes():
    for reward in (correctness_reward, marker_reward, partial(length_penalty, max_tokens=3)):
        copy = pickle.loads(pickle.dumps(reward))
        assert copy([""], ["#### 8"], answer=["#### 8"], completion_ids=[[1] * 9]) == reward(
            [""], ["#### 8"], answer=["#### 8"], completion_ids=[[1] * 9]
        )


@pytest.mark.parametrize("conversational", [False, True])
def test_grpo_trains_with_the_rewards(tokenizer, chat_tokenizer, tmp_path, conversational):
    tokenizer = chat_tokenizer if conversational else tokenizer
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MoreConfig.from_preset("debug", "base", vocab_size=len(tokenizer), **marks)
    arguments = GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        MoreForCausalLM(config),
        reward_funcs=[correctness_reward, marker_reward, partial(length_penalty, max_tokens=3)],
        args=arguments,
        train_dataset=with_prompts(datasets.Dataset.from_list(PROBLEMS), conversational),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/length_penalty/mean"] == pytest.approx(-0.05)
    assert 0 <= logged["extraction_rate"] <= 1 and "rewards/correctness_reward/mean" in logged


@pytest.mark.parametrize("name", ["train.jsonl", "anything.jsonl"])
def test_a_local_file_is_the_split_that_is_asked_for(cache, tmp_path, name):
    path = write_problems(tmp_path / name, [row | {"id": 7} for row in PROBLEMS])
    for split in ("train", "test"):
        rows = load_gsm8k(str(path), split)
        assert rows.to_list() == PROBLEMS
    assert load_gsm8k(str(path), "train[:1]").to_list() == PROBLEMS[:1]
    assert load_gsm8k(str(path), max_problems=2).to_list() == PROBLEMS[:2]


def test_a_folder_has_a_file_for_each_split(cache, tmp_path):
    write_problems(tmp_path / "train.jsonl", PROBLEMS[:2])
    write_problems(tmp_path / "test.jsonl", PROBLEMS[2:])
    assert load_gsm8k(str(tmp_path), "test").to_list() == PROBLEMS[2:]
    with pytest.raises(ValueError, match='cannot be loaded: Unknown split "dev"'):
        load_gsm8k(str(tmp_path), "dev")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "has no column 'answer': it has only question."),
        ([{"problem": "a", "answer": "#### 1"}], "has no column 'question': it has only problem, answer."),
        ([{"question": "a", "answer": 1}], "Column 'answer' of .* holds .*, not text."),
        (
            [*PROBLEMS, {"question": "a", "answer": "It is 8."}],
            "row 4: the answer has no `####` with the final number",
        ),
        ([{"question": "a", "answer": None}, *PROBLEMS], "row 1: the answer has no `####`"),
        ([{"question": "a", "answer": "#### eight"}], "row 1: The answer '#### eight' must end in one number"),
        ([], "cannot be loaded: the file is empty."),
    ],
)
def test_data_that_cannot_be_scored_is_refused_in_one_sentence(cache, tmp_path, rows, message):
    path = write_problems(tmp_path / "wrong.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_gsm8k(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_data_or_not_there_is_refused_in_one_sentence(cache, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer"\n')
    with pytest.raises(ValueError, match="broken.jsonl cannot be loaded: "):
        load_gsm8k(str(tmp_path / "broken.jsonl"))
    (tmp_path / "notes.txt").write_text("#### 8")
    with pytest.raises(ValueError, match="notes.txt cannot be loaded: expected a file that ends in .jsonl"):
        load_gsm8k(str(tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError, match="No file or folder './none.jsonl'"):
        load_gsm8k("./none.jsonl")
    with pytest.raises(FileNotFoundError, match="nobody/none cannot be downloaded"):
        load_gsm8k("nobody/none")


def test_a_plain_prompt_is_that_of_lm_eval():
    assert make_prompt("Why?", False) == "Question: Why?\nAnswer:"
    shown = make_prompt("Why?", False, PROBLEMS[:1])
    assert shown == f"Question: {PROBLEMS[0]['question']}\nAnswer: {PROBLEMS[0]['answer']}\n\nQuestion: Why?\nAnswer:"


def test_a_conversational_prompt_goes_through_the_chat_template(chat_tokenizer):
    prompt = make_prompt("Why?", True)
    assert prompt == [{"role": "user", "content": f"Why?\n\n{INSTRUCTION}"}]
    assert prompt_text(prompt, chat_tokenizer) == f"<|user|>Why?\n\n{INSTRUCTION}<|end|><|assistant|>"
    shown = make_prompt("Why?", True, PROBLEMS[:1])
    assert [message["role"] for message in shown] == ["user", "assistant", "user"]
    assert shown[1]["content"] == PROBLEMS[0]["answer"]


def test_the_format_of_prompts_follows_the_tokenizer_unless_told(tokenizer, chat_tokenizer):
    assert uses_chat("auto", chat_tokenizer) and not uses_chat("auto", tokenizer)
    assert not uses_chat("plain", chat_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no chat template: choose 'plain'"):
        uses_chat("chat", tokenizer)
    with pytest.raises(ValueError, match="prompt_format is 'xml': choose one of auto, plain, chat"):
        uses_chat("xml", tokenizer)


def test_the_columns_of_training_rows():
    rows = with_prompts(datasets.Dataset.from_list(PROBLEMS), conversational=True)
    assert rows.column_names == ["prompt", "question", "answer"]
    assert rows[1]["prompt"] == make_prompt(PROBLEMS[1]["question"], True)
