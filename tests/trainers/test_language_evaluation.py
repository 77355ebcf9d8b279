"""The evaluation of a checkpoint as a whole: what it measures, what it leaves on the disk, and what it refuses."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixturekit.hub_cards import check_model_card
from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.evaluation_report import draw_results, print_results, update_model_card
from mixturekit.trainers.language_evaluation import (
    LanguageModelEvaluation,
    load_evaluated_model,
    load_evaluation_data,
    recurrences_to_try,
)
from mixturekit.trainers.language_evaluation_config import EvaluationArguments
from mixturekit.trainers.metrics.answer_accuracy import wilson_interval
from mixturekit.trainers.perplexity import score_texts
from mixturekit.trainers.question_answering import few_shot_prefix
from mixturekit.trainers.task_data import load_examples

TASKS = ["perplexity", "babi2", "addition", "generation"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, solved):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("".join(f"{row.prompt}{row.answer}\n" for row in solved.stories * 3))
    return path


@pytest.fixture(scope="module")
def evaluate(solved, text_file):
    """Evaluates a checkpoint on what the model of `solved` knows, and on a little more."""

    def run(output_dir, model=solved.folder, **options):
        given = {
            "tasks": TASKS, "dataset_name": str(text_file), "sequence_length": 32, "num_questions": 16,
            "digits": [1, 2], "num_problems": 20, "max_new_tokens": 8, "batch_size": 8, "use_cpu": True,
            "output_dir": str(output_dir), "model_name_or_path": str(model),
        }  # fmt: skip
        arguments = EvaluationArguments(**{**given, **options})
        data = load_evaluation_data(arguments, solved.task_arguments)
        return LanguageModelEvaluation(*load_evaluated_model(arguments), arguments, solved.task_arguments, data)

    return run


@pytest.fixture(scope="module")
def finished(evaluate, tmp_path_factory):
    """The folder and the report of an evaluation at two depths."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, evaluate(folder, num_recurrences=[2, 1, 2], csv=str(folder / "answers.csv")).run()


def pick(report, **wanted):
    """The records that have these values."""
    return [row for row in report["results"] if all(row.get(name) == value for name, value in wanted.items())]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_the_folder_has_the_report_and_the_report_has_every_figure_at_every_depth(finished):
    folder, report = finished
    stored = json.loads((folder / "eval_results.json").read_text())
    assert stored["results"] == report["results"] and stored["samples"] == report["samples"]
    assert [path.name for path in folder.glob("*.part")] == []
    figures = {
        "perplexity": ["perplexity", "word_perplexity", "bits_per_byte"],
        "babi2": ["generation_accuracy", "ranking_accuracy"],
        "addition": ["exact_match", "exact_match"],
    }
    for depth in (1, 2):
        for task, metrics in figures.items():
            assert [row["metric"] for row in pick(report, task=task, num_recurrences=depth)] == metrics
        measured = {row["metric"] for row in pick(report, task="generation", num_recurrences=depth)}
        assert {"distinct_1", "distinct_2", "repetition_4", "words", "perplexity_1_to_16"} <= measured
    assert {row["num_recurrences"] for row in report["results"]} == {1, 2}


def test_what_the_model_knows_by_heart_is_right_at_the_depth_it_was_trained_at(finished):
    _, report = finished
    for metric in ("generation_accuracy", "ranking_accuracy"):
        (row,) = pick(report, task="babi2", metric=metric, num_recurrences=2)
        assert (row["value"], row["count"]) == (1.0, 16)
    (known,) = pick(report, task="addition", digits=1, num_recurrences=2)
    assert known["value"] == 1.0 and known["in_range"]


def test_sums_are_told_apart_by_digits_and_by_whether_they_are_longer_than_trained(finished, solved):
    _, report = finished
    assert solved.task_arguments.max_digits == 1
    rows = pick(report, task="addition", num_recurrences=2)
    # Of one digit there are no more in this split.
    assert [(row["digits"], row["in_range"], row["count"]) for row in rows] == [
        (1, True, len(solved.sums)),
        (2, False, 20),
    ]


def test_every_share_has_the_interval_of_its_count(finished):
    _, report = finished
    shares = [row for row in report["results"] if "low" in row]
    assert len(shares) == 8
    for row in shares:
        right = round(row["value"] * row["count"])
        assert (row["low"], row["high"]) == wilson_interval(right, row["count"])


def test_perplexities_are_those_of_the_library_on_the_same_text(finished, solved, evaluate, tmp_path):
    _, report = finished
    texts = evaluate(tmp_path).data.texts
    assert len(texts) == 1
    for depth in (1, 2):
        score = score_texts(solved.model, solved.tokenizer, texts, window=32, num_recurrences=depth)
        for name, value in score.figures().items():
            (row,) = pick(report, task="perplexity", metric=name, num_recurrences=depth)
            assert row["value"] == pytest.approx(value, rel=1e-5)
    (row,) = pick(report, metric="perplexity", num_recurrences=2)
    assert row["count"] == score.tokens


def test_perplexity_by_position_goes_beyond_the_training_length_and_says_so(finished):
    _, report = finished
    rows = [row for row in pick(report, num_recurrences=1) if "position" in row]
    assert [row["position"] for row in rows] == list(range(16, 129, 16))
    assert [row["in_range"] for row in rows] == [True] * 2 + [False] * 6


def test_all_perplexities_are_of_the_same_writing(evaluate, tmp_path):
    written = "Mary went to the well-known garden, and the milk was there.\n" * 30
    pieces = written.replace("-", " @-@ ").replace(",", " ,").replace(".", " .")
    values = []
    for name, text, detokenize in (("written", written, False), ("pieces", pieces, True), ("left", pieces, False)):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        options = {"dataset_name": str(path), "dataset_split": "train", "detokenize": detokenize}
        report = evaluate(tmp_path / name, tasks=["perplexity", "generation"], **options).run()
        values.append(
            [row["value"] for row in report["results"] if "position" in row or row["metric"] == "perplexity"]
        )
    assert len(values[0]) > 1 and values[1] == values[0] != values[2]


def test_the_csv_has_one_row_per_question_at_the_models_own_depth(finished, solved):
    folder, report = finished
    rows = read_csv(folder / "answers.csv")
    assert len(rows) == 16 + len(solved.sums) + 20
    assert {row["num_recurrences"] for row in rows} == {"2"} == {row["recurrence_steps"] for row in rows}
    stories = [row for row in rows if row["task"] == "babi2"]
    for row, example in zip(stories, solved.stories, strict=True):
        assert (row["context"], row["question"]) == (example.context, example.question)
        assert row["true_answer"] == row["predicted_answer"] == row["ranked_answer"] == example.answer.strip()
        assert row["supporting_facts"].split("\n") == list(example.supporting)
        assert row["is_correct"] == "True" and float(row["log_likelihood"]) > -0.7
    for row in rows:
        layers = [choice.split(":")[0] for choice in row["answer_routes"].split()]
        assert layers == ["0", "1"]
    sums = [row for row in rows if row["task"] == "addition"]
    right = sum(row["is_correct"] == "True" for row in sums)
    assert right == sum(row["value"] * row["count"] for row in pick(report, task="addition", num_recurrences=2))


def test_the_routes_of_the_chosen_question_are_drawn_beside_the_csv(finished, evaluate, solved, tmp_path):
    folder, _ = finished
    page = (folder / "answers.routes.html").read_text()
    assert solved.stories[0].question.split()[-1].rstrip("?") in page and 'src="http' not in page
    evaluate(tmp_path, csv=str(tmp_path / "a.csv"), sample=17, tasks=["babi2", "addition"]).run()
    assert " =" in (tmp_path / "a.routes.html").read_text()


def test_samples_are_the_same_for_the_same_seed_and_continue_their_prompt(evaluate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Mary\n\nJohn went\n")
    options = {"tasks": ["generation"], "dataset_name": None, "prompts_file": str(prompts), "num_samples": 3}
    runs = [evaluate(tmp_path / str(seed), **options, seed=seed).run()["samples"] for seed in (5, 6)]
    again = evaluate(tmp_path / "again", **options, seed=5).run()["samples"]
    assert runs[0] == again != runs[1]
    assert [sample["prompt"] for sample in again] == ["Mary"] * 3 + ["John went"] * 3


def test_without_a_temperature_there_is_one_sample_of_each_prompt(evaluate, tmp_path, solved):
    report = evaluate(tmp_path, tasks=["generation"], dataset_name=None, temperature=0.0, max_new_tokens=5).run()
    assert len(report["samples"]) == 4
    sample = report["samples"][-1]
    ids = solved.tokenizer(sample["prompt"], return_tensors="pt")
    output = solved.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert sample["continuation"] == solved.tokenizer.decode(output, skip_special_tokens=True)


def test_of_a_text_with_one_split_only_what_training_held_out_is_scored(evaluate, tmp_path):
    lines = [f"Document {index} says that water is wet." for index in range(20)]
    for index, line in enumerate(lines):
        (tmp_path / f"{index:02}.txt").write_text(line)
    for fraction, held_out in ((0.1, 2), (0.25, 5)):
        options = {"tasks": ["perplexity"], "dataset_name": str(tmp_path), "validation_fraction": fraction}
        assert list(evaluate(tmp_path / "results", **options).data.texts) == lines[-held_out:]


def test_a_text_too_short_for_perplexity_by_position_is_evaluated_all_the_same(evaluate, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("Mary moved to the garden.\n" * 3)
    report = evaluate(tmp_path, tasks=["perplexity", "generation"], dataset_name=str(short)).run()
    assert pick(report, metric="distinct_1") and not [row for row in report["results"] if "position" in row]
    assert "there is no sequence of 128" in capsys.readouterr().out


def test_batches_of_one_and_of_sixteen_give_the_same_results(evaluate, tmp_path):
    options = {"tasks": ["babi2", "addition"], "num_recurrences": [1, 2]}
    reports = [evaluate(tmp_path / str(size), batch_size=size, **options).run() for size in (1, 16)]
    assert reports[0]["results"] == reports[1]["results"]


def test_a_model_without_recurrent_experts_is_evaluated_once(evaluate, tmp_path, solved):
    config = MoreConfig.from_preset("debug", "base", vocab_size=len(solved.tokenizer), hidden_size=32)
    model = MoreForCausalLM(config)
    assert recurrences_to_try(model, [1, 2, 4]) == [None]
    for part in (model, solved.tokenizer):
        part.save_pretrained(tmp_path / "base")
    csv_file = tmp_path / "base.csv"
    report = evaluate(tmp_path, tmp_path / "base", tasks=["babi2"], num_recurrences=[1, 2], csv=str(csv_file)).run()
    assert [row["num_recurrences"] for row in report["results"]] == [None, None]
    assert {row["recurrence_steps"] for row in read_csv(csv_file)} == {""}


def test_a_model_without_routers_has_no_routes_to_draw(evaluate, tmp_path, solved, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(solved.tokenizer), **sizes))
    for part in (model, solved.tokenizer):
        part.save_pretrained(tmp_path / "llama")
    report = evaluate(tmp_path, tmp_path / "llama", csv=str(tmp_path / "llama.csv")).run()
    assert {row["task"] for row in report["results"]} == set(TASKS)
    assert {row["answer_routes"] for row in read_csv(tmp_path / "llama.csv")} == {""}
    assert not (tmp_path / "llama.routes.html").exists() and "router" in capsys.readouterr().out


def test_a_recurrent_model_is_evaluated_at_its_own_depth_unless_told_otherwise(solved):
    assert recurrences_to_try(solved.model, None) == [2]
    assert recurrences_to_try(solved.model, [8, 1, 8]) == [1, 8]


def test_solved_examples_are_of_the_training_split_and_the_same_in_every_run(evaluate, tmp_path, solved):
    shots = [evaluate(tmp_path, tasks=["babi2"], num_shots=2).data.shots["babi2"] for _ in range(2)]
    assert shots[0] == shots[1]
    train = load_examples("babi2", solved.task_arguments, "train", 100)
    prefixes = {few_shot_prefix([example]) for example in train}
    begins = [prefix for prefix in prefixes if shots[0].startswith(prefix)]
    assert begins and shots[0].removeprefix(begins[0]) in prefixes
    plain, shown = (evaluate(tmp_path / str(n), tasks=["babi2"], num_shots=n).run()["results"] for n in (0, 2))
    # The model has never seen two stories in one prompt.
    assert plain[0]["value"] == 1.0 > shown[0]["value"]


def test_of_few_stories_all_are_asked(evaluate, tmp_path):
    questions = evaluate(tmp_path, tasks=["babi2"], num_questions=5000).data.questions["babi2"]
    assert 16 < len(questions) < 5000
    assert len({example.prompt for example in questions}) == len(questions)


def test_of_few_sums_as_many_are_shown_as_there_are(evaluate, tmp_path):
    shots = evaluate(tmp_path, tasks=["addition"], num_shots=40).data.shots["addition"]
    assert len(set(shots.split("\n\n"))) == 41
    with pytest.raises(ValueError, match="num_shots is 200: there are only 88 examples of addition"):
        evaluate(tmp_path, tasks=["addition"], num_shots=200)


def test_what_was_measured_before_a_failure_is_in_the_results(evaluate, tmp_path):
    evaluation = evaluate(tmp_path, tasks=["babi2", "addition"], csv=str(tmp_path / "answers.csv"))
    evaluation.data.sums["addition", 2].clear()
    with pytest.raises(IndexError):
        evaluation.run()
    stored = json.loads((tmp_path / "eval_results.json").read_text())
    assert [row["metric"] for row in stored["results"]] == ["generation_accuracy", "ranking_accuracy", "exact_match"]
    assert len(read_csv(tmp_path / "answers.csv")) == 16 + stored["results"][-1]["count"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ["babi21"]}, "tasks has 'babi21': choose of perplexity, generation and babi1"),
        ({"tasks": ["perplexity"], "dataset_name": None}, "The task 'perplexity' needs a text"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"stride": 0}, "stride is 0: it must be at least 1"),
        ({"stride": 33}, "stride is 33: it must be at most sequence_length, 32"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"temperature": -1.0}, "temperature is -1.0: it must be at least 0"),
        ({"num_recurrences": [4, 0]}, r"num_recurrences is \[4, 0\]: each must be at least 1"),
        ({"digits": [0]}, r"digits is \[0\]"),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto"),
        ({"split": "valid"}, "split is 'valid': choose one of train, validation, test"),
        ({"tasks": ["babi1"]}, "only babi2 and babi3 can be generated"),
        ({"prompts_file": "nowhere.txt"}, "There is no file nowhere.txt with prompts"),
        ({"dataset_name": "./nowhere.txt"}, "No file or folder './nowhere.txt'"),
        ({"model": "./nowhere"}, "No file or folder './nowhere'"),
    ],
)
def test_bad_options_are_named_before_anything_runs(evaluate, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_prompts_without_a_line_are_refused(evaluate, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty.txt has no prompt: expected one on each line"):
        evaluate(tmp_path, prompts_file=str(tmp_path / "empty.txt"))


def test_a_folder_without_a_model_is_refused_in_a_sentence(evaluate, tmp_path, solved):
    solved.tokenizer.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="half cannot be loaded: ") as refusal:
        evaluate(tmp_path, tmp_path / "half")
    assert "\n" not in str(refusal.value)


def test_results_are_replaced_only_on_demand(evaluate, tmp_path):
    evaluate(tmp_path, tasks=["addition"], digits=[1]).run()
    before = (tmp_path / "eval_results.json").read_bytes()
    with pytest.raises(FileExistsError, match="eval_results.json is there: choose another --output_dir"):
        evaluate(tmp_path)
    (tmp_path / "answers.csv").write_text("precious")
    with pytest.raises(FileExistsError, match="answers.csv is there: choose another --csv"):
        evaluate(tmp_path / "new", csv=str(tmp_path / "answers.csv"))
    assert (tmp_path / "eval_results.json").read_bytes() == before
    evaluate(tmp_path, tasks=["addition"], digits=[2], overwrite=True).run()
    assert (tmp_path / "eval_results.json").read_bytes() != before


def test_the_table_and_the_picture_show_every_task(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    _, report = finished
    print_results(report["results"])
    table = capsys.readouterr().out
    assert "1 recurrence " in table and "2 recurrences" in table and "100.0 (80.6 to 100.0)" in table
    for text in ("perplexity per word", "bits per byte", "addition, 2 digits, longer than trained", "distinct 1"):
        assert text in table
    draw_results(report["results"], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def published(solved, tmp_path):
    """A copy of the checkpoint and its card, to change."""
    folder = tmp_path / "published"
    shutil.copytree(solved.folder, folder)
    return folder


def test_a_card_that_is_updated_twice_has_one_section_and_stays_valid(finished, published):
    _, report = finished
    path = published / "README.md"
    path.write_text(path.read_text() + "\n## Notes\n\nWritten by hand.\n")
    before = ModelCard.load(path).text
    changed = {**report, "results": [{**row, "value": 0.25} for row in report["results"]]}
    for version in (changed, report, report):
        assert update_model_card(version, published) == [path]
    card = ModelCard.load(path)
    check_model_card(card)
    assert card.text.count("## Evaluation") == 1 and card.text.count("Written by hand.") == 1
    head, _, section = card.text.partition("## Evaluation")
    assert head.strip() == before.strip()
    assert "| babi2 | ranking accuracy | 16 |" in section and "(80.6 to 100.0)" in section
    assert "25.0" not in section
    (index,) = yaml.safe_load(path.read_text().split("---\n")[1])["model-index"]
    values = {
        (entry["dataset"]["config"], metric["type"], metric["name"]): metric["value"]
        for entry in index["results"]
        for metric in entry["metrics"]
    }
    assert values["babi2", "generation_accuracy", "generation accuracy, 2 recurrences"] == 1.0
    assert values["addition", "exact_match", "exact match, 1 digit, 2 recurrences"] == 1.0
    (row,) = pick(report, metric="word_perplexity", num_recurrences=1)
    assert values["perplexity", "word_perplexity", "perplexity per word, 1 recurrence"] == round(row["value"], 5)


def test_figures_of_others_stay_on_the_card(finished, published):
    _, report = finished
    path = published / "README.md"
    card = ModelCard.load(path)
    card.data.model_name = "published"
    measured = {
        "dataset_type": "openai/gsm8k",
        "dataset_name": "GSM8K",
        "metric_type": "accuracy",
        "metric_value": 0.5,
    }
    card.data.eval_results = [EvalResult(task_type="text-generation", **measured)]
    card.save(path)
    for _ in range(2):
        update_model_card(report, published)
    kept = [entry for entry in ModelCard.load(path).data.eval_results if entry.dataset_name == "GSM8K"]
    assert [entry.metric_value for entry in kept] == [0.5]


def test_results_for_the_hub_are_of_data_of_the_hub_only(finished, published):
    _, report = finished
    results = published / ".eval_results" / "mixturekit.yaml"
    update_model_card(report, published)
    assert not results.parent.exists()
    on_hub = {**report, "settings": {**report["settings"], "dataset_name": "Salesforce/wikitext"}}
    assert update_model_card(on_hub, published) == [published / "README.md", results]
    entries = yaml.safe_load(results.read_text())
    assert len(entries) == 6
    for entry, row in zip(entries, pick(report, task="perplexity"), strict=True):
        assert entry["dataset"] == {"id": "Salesforce/wikitext", "task_id": "perplexity"}
        assert entry["value"] == row["value"] and str(row["num_recurrences"]) in entry["notes"]
    check_model_card(ModelCard.load(published / "README.md"))
    update_model_card(report, published)
    assert not results.exists()


def test_a_card_that_is_not_there_is_not_made(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model card"):
        update_model_card(finished[1], tmp_path)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_an_adapter_evaluates_like_the_model_that_it_is_merged_into(evaluate, solved, tmp_path, with_tokenizer):
    base = AutoModelForCausalLM.from_pretrained(solved.folder)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        solved.folder
    )
    if with_tokenizer:
        solved.tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    solved.tokenizer.save_pretrained(tmp_path / "merged")
    reports, rows = {}, {}
    for name in ("adapter", "merged"):
        path = tmp_path / f"{name}.csv"
        options = {"csv": str(path), "num_recurrences": [1, 2], "temperature": 0.0}
        reports[name] = evaluate(tmp_path / f"{name}_results", tmp_path / name, **options).run()
        rows[name] = read_csv(path)
    for one, other in zip(*(report["results"] for report in reports.values()), strict=True):
        assert one == {**other, "value": pytest.approx(other["value"], rel=1e-3)}
    assert reports["adapter"]["samples"] == reports["merged"]["samples"]
    for one, other in zip(*rows.values(), strict=True):
        assert one["predicted_answer"] == other["predicted_answer"]
        assert float(one["log_likelihood"]) == pytest.approx(float(other["log_likelihood"]), rel=1e-3)
    # The adapter does something.
    plain = evaluate(tmp_path / "plain", tasks=["perplexity"]).run()["results"][0]["value"]
    adapted_value = pick(reports["adapter"], metric="perplexity", num_recurrences=2)[0]["value"]
    assert adapted_value != pytest.approx(plain, rel=0.01)
