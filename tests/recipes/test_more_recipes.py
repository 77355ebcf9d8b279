"""The recipes of MoRE, run as a user runs them."""

import importlib.util
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest

from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
from mixturekit.trainers.recipe_parser import parse_recipe
from mixturekit.trainers.task_data import mix_examples, parse_task_weights

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_the_demo_prints_accuracy_by_variant_and_recurrences_and_draws_the_routing(tmp_path, run_process):
    demo = run_process("demo_more.py", "--output_dir", tmp_path, "--max_steps", 20)
    assert demo.returncode == 0, demo.stderr[-3000:]
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert set(accuracy) == {"base", "more_c"}
    assert set(accuracy["more_c"]["accuracy"]) == {"1", "2", "4", "8"}
    for result in accuracy.values():
        for by_task in result["accuracy"].values():
            assert set(by_task) == {"babi2", "babi3", "addition"}
            assert all(0 <= share <= 1 for share in by_task.values())
    assert "Held-out accuracy" in demo.stdout and "more_c" in demo.stdout
    page = (tmp_path / "routing.html").read_text()
    assert "Sankey" in page or "sankey" in page
    assert 'src="http' not in page


@pytest.mark.slow
def test_the_throughput_benchmark_measures_every_variant_beside_mixtral(tmp_path, run_process):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "recurrent_size": 64, "layers": 1, "heads": 2, "experts": 2}
    sizes |= {"batch": 2, "sequence": 32, "vocab": 100, "repeats": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    benchmark = run_process("benchmarks/more_throughput.py", *options, "--json", tmp_path / "figures.json")
    assert benchmark.returncode == 0, benchmark.stderr[-3000:]
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["mixtral", "base", "more_a", "more_b", "more_c", "more_d"]
    mixtral, base = rows[:2]
    assert mixtral["parameters"] == base["parameters"]
    assert all(row["tokens_per_second"] > 0 and 0 < row["share_of_peak"] < 1.5 for row in rows)


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, RECIPES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trigram_model():
    return load_recipe("benchmarks/wikitext_comparison.py").TrigramModel


def test_the_trigram_model_is_judged_on_the_documents_that_the_runs_are_judged_on(solved, tmp_path, run_here):
    rng = random.Random(0)
    documents = ["".join(rng.choice("abc ") for _ in range(60)) for _ in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    for name in load_recipe("benchmarks/wikitext_comparison.py").RUNS:
        run = shutil.copytree(solved.folder, tmp_path / "comparison" / name)
        (run / "eval_results.json").write_text('{"parameters": 1, "eval_perplexity": 1.0, "steps": 1}')
        (run / "train_results.json").write_text('{"train_runtime": 1.0}')
    options = ["--text_column", "body", "--validation_fraction", 0.25, "--output_dir", tmp_path / "comparison"]
    data = ["--dataset_name", tmp_path / "text.jsonl"]
    assert run_here("benchmarks/wikitext_comparison.py", *data, *options) is None
    ended = [solved.tokenizer(text)["input_ids"] + [solved.tokenizer.eos_token_id] for text in documents]
    train, held_out = (list(itertools.chain.from_iterable(part)) for part in (ended[:15], ended[15:]))
    row = json.loads((tmp_path / "comparison" / "comparison.json").read_text())[-1]
    assert row == {"model": "trigram", "perplexity": pytest.approx(trigram_model()(train).perplexity(held_out))}


def test_the_demo_asks_what_no_checkpoint_was_chosen_by():
    examples = load_recipe("demo_more.py").held_out()
    types = (ModelArguments, DataArguments, LanguageModelingConfig)
    _, data, _ = parse_recipe(types, ["--config", str(RECIPES / "more" / "quickstart.yaml")])
    of_split = {
        split: {row.prompt for row in mix_examples(parse_task_weights(data.task), data, split, 300)}
        for split in ("validation", "test")
    }
    assert len(examples) == data.num_validation_examples == 300
    assert {row.prompt for row in examples} == of_split["test"]
    assert not of_split["test"] & of_split["validation"]


def test_trigram_probabilities_sum_to_one_in_seen_and_unseen_contexts():
    source = random.Random(0)
    tokens = [source.randrange(20) for _ in range(3000)]
    model = trigram_model()(tokens)
    for context in ((3, 4), (3, 99), (98, 99)):
        assert sum(model.probability(context, token) for token in range(20)) == pytest.approx(1)


def test_a_trigram_model_learns_what_two_tokens_tell_and_no_more():
    source = random.Random(0)
    cycle = [0, 1, 2, 0, 2, 1] * 500
    assert trigram_model()(cycle).perplexity(cycle[:200]) < 1.01
    noise = [source.randrange(4) for _ in range(20_000)]
    assert trigram_model()(noise[:16_000]).perplexity(noise[16_000:]) == pytest.approx(4, rel=0.05)


def test_a_recipe_says_in_one_sentence_what_is_wrong(tmp_path, run_here):
    assert run_here("train_more.py", "--expert_type", "more_z", "--output_dir", tmp_path / "out", "--use_cpu") == (
        "ValueError: `expert_type` is 'more_z'; choose one of base, more_a, more_b, more_c, more_d."
    )
