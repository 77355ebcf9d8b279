"""The tasks: mixtures have their shares, splits share nothing, and every source of stories says the same."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest

from mixturekit.trainers.babi import BabiQuestion, generate_stories, read_babi
from mixturekit.trainers.language_modeling_config import DataArguments
from mixturekit.trainers.task_data import (
    BABI_TASKS,
    TaskArguments,
    load_examples,
    mix_examples,
    parse_task_weights,
    questions_of_rows,
    save_task_arguments,
    saved_task_arguments,
)

BABI = Path(os.environ.get("MIXTUREKIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "babi"
DEFAULT = dict.fromkeys(("babi2", "babi3", "addition"))


def stories(count, seed=0, task="babi2"):
    return generate_stories(task, count, "train", seed, max_facts=8)


@pytest.fixture
def folder(tmp_path, write_babi):
    """A folder with the training file of task 2, of 50 questions."""
    write_babi(stories(50), tmp_path / "qa2_two-supporting-facts_train.txt")
    return tmp_path


def prompts(examples):
    return [example.prompt for example in examples]


def test_generated_tasks_are_mixed_in_equal_shares():
    examples = mix_examples(DEFAULT, TaskArguments(), "train", 100)
    assert Counter(example.task for example in examples) == {"babi2": 34, "babi3": 33, "addition": 33}
    assert {example.task for example in examples[:15]} == set(DEFAULT)
    assert all(row.answer.startswith(" ") and not row.prompt.endswith(" ") for row in examples)


def test_generated_splits_share_no_prompt():
    train, validation, test = (
        set(prompts(mix_examples(DEFAULT, TaskArguments(), split, 300))) for split in ("train", "validation", "test")
    )
    assert not (train & validation or train & test or validation & test)


def test_a_mixture_depends_on_the_seed_alone():
    assert mix_examples(DEFAULT, TaskArguments(), "train", 30) == mix_examples(DEFAULT, TaskArguments(), "train", 30)
    assert mix_examples(DEFAULT, TaskArguments(), "train", 30) != mix_examples(
        DEFAULT, TaskArguments(), "train", 30, seed=1
    )


def test_weights_are_the_shares_of_a_mixture_and_no_example_is_left_out():
    weights = parse_task_weights(["babi2:3", "addition:1"])
    examples = mix_examples(weights, TaskArguments(), "train", 600)
    counts = Counter(example.task for example in examples)
    assert counts["babi2"] / len(examples) == pytest.approx(0.75, abs=0.04)
    whole = mix_examples(dict.fromkeys(weights), TaskArguments(), "train", 600)
    assert set(prompts(examples)) == set(prompts(whole))
    assert examples == mix_examples(weights, TaskArguments(), "train", 600)


def test_equal_weights_are_equal_shares_of_tasks_of_different_sizes(folder):
    arguments = TaskArguments(babi_data=str(folder))
    shares = []
    for tasks in (["babi2:1", "addition:1"], ["babi2", "addition"]):
        examples = mix_examples(parse_task_weights(tasks), arguments, "train", 400)
        shares.append(sum(example.task == "babi2" for example in examples) / len(examples))
    assert shares == [pytest.approx(0.5, abs=0.05), 45 / 445]
    # One task has all of its examples once, whatever its weight.
    alone = (mix_examples(parse_task_weights([task]), arguments, "train", 0) for task in ("babi2:5", "babi2"))
    assert len({tuple(sorted(prompts(examples))) for examples in alone}) == 1


def test_weights_change_training_only():
    arguments, weights = TaskArguments(), {"babi2": 3.0, "addition": 1.0}
    assert mix_examples(weights, arguments, "validation", 40) == mix_examples(
        dict.fromkeys(weights), arguments, "validation", 40
    )


def test_arithmetic_is_its_three_operations_in_equal_shares():
    assert parse_task_weights(["arithmetic"]) == dict.fromkeys(("addition", "subtraction", "multiplication"))
    weights = parse_task_weights(["babi2:1", "arithmetic:3"])
    assert weights == {"babi2": 1.0, "addition": 1.0, "subtraction": 1.0, "multiplication": 1.0}


@pytest.mark.parametrize(
    "tasks, reason",
    [
        ([], "choose babi1 to babi20"),
        (["babi21"], "task is 'babi21'"),
        (["babi2:none"], "its weight must be a number above 0"),
        (["babi2:0"], "its weight must be a number above 0"),
        (["babi2:inf"], "its weight must be a number above 0"),
        (["addition", "arithmetic"], "task has 'addition' twice"),
    ],
)
def test_senseless_tasks_are_named(tasks, reason):
    with pytest.raises(ValueError, match=reason):
        parse_task_weights(tasks)


def test_without_other_files_the_last_tenth_is_held_out(folder):
    arguments = TaskArguments(babi_data=str(folder))
    train, validation, test = (load_examples("babi2", arguments, split) for split in ("train", "validation", "test"))
    questions = read_babi(folder / "qa2_two-supporting-facts_train.txt")
    assert [example.context for example in train + validation] == ["\n".join(row.facts) for row in questions]
    assert len(validation) == 5
    assert test == validation


def test_what_is_held_out_is_cut_between_two_stories(tmp_path, write_babi):
    facts = tuple(f"Mary moved to the {place}." for place in ("garden", "office", "kitchen", "hallway"))
    growing = [BabiQuestion(facts[: end + 1], "Where is Mary?", "garden", (0,)) for end in range(4)]
    alone = BabiQuestion(("John moved to the garden.",), "Where is John?", "garden", (0,))
    write_babi([alone] * 8 + growing, tmp_path / "qa1_single-supporting-fact_train.txt")
    train, validation = (
        load_examples("babi1", TaskArguments(babi_data=str(tmp_path)), split) for split in ("train", "validation")
    )
    assert [len(train), len(validation)] == [8, 4]


def test_test_and_validation_files_are_used_where_they_are(folder, write_babi):
    write_babi(stories(7, seed=1), folder / "qa2_two-supporting-facts_test.txt")
    arguments = TaskArguments(babi_data=str(folder))
    assert [len(load_examples("babi2", arguments, split)) for split in ("train", "validation", "test")] == [45, 5, 7]
    write_babi(stories(6, seed=2), folder / "qa2_two-supporting-facts_valid.txt")
    assert [len(load_examples("babi2", arguments, split)) for split in ("train", "validation", "test")] == [50, 6, 7]


@pytest.mark.parametrize("task", BABI_TASKS)
def test_each_of_the_twenty_tasks_is_found_by_its_file(tmp_path, task, write_babi):
    for number in range(1, 21):
        write_babi(stories(2, seed=number) * 10, tmp_path / f"qa{number}_some-name_test.txt")
    number = int(task.removeprefix("babi"))
    found = load_examples(task, TaskArguments(babi_data=str(tmp_path)), "test", 2)
    assert [example.context for example in found] == ["\n".join(row.facts) for row in stories(2, seed=number)]


def test_a_file_alone_is_enough(folder):
    file = folder / "qa2_two-supporting-facts_train.txt"
    alone, whole = (TaskArguments(babi_data=str(path)) for path in (file, folder))
    assert load_examples("babi2", alone, "train") == load_examples("babi2", whole, "train")


def test_the_file_of_one_task_has_no_stories_of_another(folder, tmp_path):
    alone = TaskArguments(babi_data=str(folder / "qa2_two-supporting-facts_train.txt"))
    with pytest.raises(ValueError, match="qa2_two-supporting-facts_train.txt has the stories of babi2, not of babi3"):
        load_examples("babi3", alone, "train")
    on_hub = TaskArguments(babi_data="owner/babi", babi_config="en-10k-qa12")
    with pytest.raises(ValueError, match="en-10k-qa12 has the stories of babi12, not of babi1"):
        load_examples("babi1", on_hub, "train")


def test_stories_that_do_not_say_of_which_task_they_are_are_of_one(tmp_path, write_babi):
    write_babi(stories(50), tmp_path / "mine.txt")
    arguments = TaskArguments(babi_data=str(tmp_path / "mine.txt"))
    one, two = ({"babi7": None, "addition": None}, {"babi7": None, "babi8": None})
    assert Counter(example.task for example in mix_examples(one, arguments, "train", 9)) == {
        "babi7": 45,
        "addition": 9,
    }
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="mine.txt has the same stories for babi7 as for babi8"):
            mix_examples(two, arguments, split, 9)


def test_two_versions_of_the_data_in_one_folder_are_refused(folder, write_babi):
    (folder / "en").mkdir()
    write_babi(stories(2), folder / "en" / "qa2_two-supporting-facts_train.txt")
    with pytest.raises(ValueError, match="has both .* give the folder of one version"):
        load_examples("babi2", TaskArguments(babi_data=str(folder)), "train")


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match="has no file such as qa3_..._train.txt for babi3"):
        load_examples("babi3", TaskArguments(babi_data=str(folder)), "train")
    with pytest.raises(FileNotFoundError, match="No file or folder '/no/such/folder' with bAbI stories"):
        load_examples("babi2", TaskArguments(babi_data="/no/such/folder"), "train")
    with pytest.raises(ValueError, match="task is 'babi5': only babi2 and babi3 can be generated"):
        load_examples("babi5", TaskArguments(), "train", 5)


def test_a_broken_line_is_named_by_file_and_number(folder):
    file = folder / "qa2_two-supporting-facts_train.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], "nonsense\n", *lines[4:]]))
    with pytest.raises(ValueError, match=rf"{file}, line 5: expected ID"):
        load_examples("babi2", TaskArguments(babi_data=str(folder)), "train")


@pytest.mark.parametrize("task, name", [("babi2", "qa2_two"), ("babi3", "qa3_three")])
def test_the_original_files_are_split_without_a_shared_story(task, name):
    if not BABI.is_dir():
        pytest.skip(f"no folder {BABI}")
    arguments = TaskArguments(babi_data=str(BABI))
    train, validation = (load_examples(task, arguments, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 10_000
    assert 1_000 <= len(validation) <= 1_005
    # The first question of what is held out begins a story.
    assert not validation[0].context.startswith(train[-1].context)


def test_both_layouts_of_the_hub_say_what_the_text_file_says(folder, tmp_path):
    questions = read_babi(folder / "qa2_two-supporting-facts_train.txt")
    kind = datasets.ClassLabel(names=["context", "question"])
    text = datasets.Value("string")
    sentence = {"id": text, "type": kind, "text": text, "supporting_ids": datasets.List(text), "answer": text}
    nested = []
    for question in questions:
        lines = [
            {"id": str(number), "type": 0, "text": fact, "supporting_ids": [], "answer": ""}
            for number, fact in enumerate(question.facts, start=1)
        ]
        supporting = [str(index + 1) for index in question.supporting]
        asked = {"type": 1, "text": question.question, "supporting_ids": supporting, "answer": question.answer}
        lines.append({"id": str(len(lines) + 1), **asked})
        nested.append({"story": {name: [line[name] for line in lines] for name in sentence}})
    features = datasets.Features({"story": {name: datasets.List(kind) for name, kind in sentence.items()}})
    flat = [
        {"passage": "\n".join(row.facts), "question": row.question, "answer": row.answer, "task": 2}
        for row in questions
    ] + [{"passage": "John sat.", "question": "Who sat?", "answer": "John", "task": 1}]
    datasets.Dataset.from_list(nested, features=features).to_parquet(tmp_path / "nested.parquet")
    datasets.Dataset.from_list(flat).to_parquet(tmp_path / "flat.parquet")
    read = {
        layout: questions_of_rows(
            datasets.Dataset.from_parquet(str(tmp_path / f"{layout}.parquet"), cache_dir=str(tmp_path / "cache")),
            "babi2",
            layout,
        )
        for layout in ("nested", "flat")
    }
    assert read["nested"] == questions
    assert [(row.facts, row.question, row.answer) for row in read["flat"]] == [
        (row.facts, row.question, row.answer) for row in questions
    ]


def test_a_table_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="source has the columns text: expected 'story', or 'passage'"):
        questions_of_rows(datasets.Dataset.from_dict({"text": ["a"]}), "babi2", "source")


def test_an_answer_is_explained_by_its_supporting_facts(folder):
    arguments = TaskArguments(babi_data=str(folder))
    plain = load_examples("babi2", arguments, "train")
    explained = load_examples("babi2", arguments, "train", supporting_facts=True)
    for without, example in zip(plain, explained, strict=True):
        assert without.explanation == ""
        assert example.explanation == "\n" + "".join(f"{fact}\n" for fact in example.supporting)
        assert all(fact in example.context for fact in example.supporting)
        assert (example.prompt, example.answer) == (without.prompt, without.answer)


def test_renamed_copies_come_on_top(folder):
    arguments = TaskArguments(babi_data=str(folder))
    plain = load_examples("babi2", arguments, "train")
    renamed = load_examples("babi2", arguments, "train", num_renamings=2)
    assert renamed[: len(plain)] == plain
    assert len(renamed) == 3 * len(plain)
    assert load_examples("babi2", arguments, "train", num_renamings=2) == renamed


def test_generated_stories_are_not_renamed_into_those_held_out():
    with pytest.raises(ValueError, match="num_renamings is 2: generated stories have all names as it is"):
        load_examples("babi2", TaskArguments(), "train", 20, num_renamings=2)
    # Of sums nothing is renamed, so that a mixture of them and stored stories may be asked for.
    assert load_examples("addition", TaskArguments(), "train", 20, num_renamings=2)


def test_what_is_left_beside_a_checkpoint_says_how_to_ask_and_names_no_path(tmp_path):
    asked = {"max_digits": 5, "reverse_answer": False}
    cut = {"sequence_length": 64, "validation_fraction": 0.25}
    arguments = DataArguments(babi_data="/home/someone/babi", dataset_name="/home/someone/text", **asked, **cut)
    save_task_arguments(arguments.for_evaluation(), tmp_path)
    saved = saved_task_arguments(tmp_path)
    assert "someone" not in json.dumps(saved)
    kept = {name: value for name, value in asdict(TaskArguments(**asked)).items() if not name.startswith("babi_")}
    assert saved == kept | cut
    (tmp_path / "elsewhere").mkdir()
    assert saved_task_arguments(tmp_path / "elsewhere") == {}
    # A stranger's file, which must not choose what an evaluation runs, reads or writes.
    hostile = {"trust_remote_code": True, "output_dir": "/", "babi_data": "/", "max_facts": 5, "max_digits": [1]}
    (tmp_path / "elsewhere/task_arguments.json").write_text(json.dumps(hostile))
    assert saved_task_arguments(tmp_path / "elsewhere") == {"max_facts": 5}
    with pytest.raises(FileNotFoundError, match="No file or folder '.*/nowhere'"):
        saved_task_arguments(tmp_path / "nowhere")
