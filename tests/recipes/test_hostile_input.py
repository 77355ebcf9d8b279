"""Whatever is in a file or in an option, a reader takes it or says in one sentence what is wrong with it."""

import codecs
import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixturekit.hub_cards import render_model_card
from mixturekit.hub_cards.card_validation import KNOWN, card_problems
from mixturekit.modeling.block_io import BLOCK
from mixturekit.modeling.expert_records import HEADER, RecordError, RecordInfo, RecordLayout
from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.trainers.atari import check_games
from mixturekit.trainers.babi import read_babi
from mixturekit.trainers.babyai import check_levels
from mixturekit.trainers.babyai_demonstrations import load_demonstrations
from mixturekit.trainers.checkpoints import MANIFEST, check_checkpoint
from mixturekit.trainers.dataset_cards import load_completions
from mixturekit.trainers.gsm8k import load_gsm8k
from mixturekit.trainers.recipe_parser import parse_recipe
from mixturekit.trainers.text_data import load_documents

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# A reader may not hang either.
fuzz = settings(max_examples=80, deadline=5000, suppress_health_check=CHECKS)
fuzz_slow_reader = settings(fuzz, max_examples=15, deadline=20000)

STORY = b"1 Mary moved to the bathroom.\n2 Mary got the football there.\n3 Where is the football? \tbathroom\t2 1\n"
PROBLEM = json.dumps({"question": "What is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"}).encode() + b"\n"
CARD = """---
library_name: mixturekit
license: apache-2.0
pipeline_tag: text-generation
tags: [more]
model-index:
- name: m
  results:
  - task: {type: text-generation}
    dataset: {type: babi, name: bAbI}
    metrics: [{type: accuracy, value: 0.5}]
---
# A model
"""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DEEP = st.sampled_from([b"[" * 3_000, b'{"a":' * 3_000, b"\xff\xfe", b"\x00", b""])


def damaged(whole):
    """A file in which something was cut out or put in, and files of anything else."""

    def splice(at, cut, put):
        return whole[: at % len(whole)] + put + whole[at % len(whole) + cut :]

    pieces = st.builds(splice, st.integers(0, 10**6), st.integers(0, 30), st.binary(max_size=9) | st.just(b"\xff"))
    return st.one_of(pieces, st.binary(max_size=99), JSON.map(lambda value: json.dumps(value).encode()), DEEP)


def replaced(whole):
    """A JSON document in which one value, at any depth, is another."""

    def places(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield from places(inner, (*path, key))

    def put(path, new):
        changed = {"": json.loads(json.dumps(whole))}
        holder, key = changed, ""
        for step in path:
            holder, key = holder[key], step
        holder[key] = new
        return changed[""]

    return st.builds(put, st.sampled_from(list(places(whole))), JSON)


def assert_told(read, *arguments, place=""):
    """That reading works, or that the error is one sentence of no great length that names the place."""
    try:
        read(*arguments)
    except (ValueError, OSError, RecordError) as error:
        told = str(error)
        assert 10 < len(told) < 600 and "\n" not in told.strip() and str(place) in told, told


@fuzz
@given(damaged(STORY))
def test_babi_files(tmp_path, content):
    path = tmp_path / "qa2_train.txt"
    path.write_bytes(content)
    assert_told(read_babi, path, place=path)


@fuzz_slow_reader
@given(damaged(PROBLEM) | replaced(json.loads(PROBLEM)).map(lambda row: json.dumps(row).encode()))
@example(b"null\n")
@example(b'[null, null, {"a": null}]')
@example(codecs.BOM_UTF8 + b'[null, {"a": null}]')
def test_gsm8k_files(tmp_path, content):
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(dir=tmp_path) as folder:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache"))
        path = Path(folder, "train.jsonl")
        path.write_bytes(content)
        assert_told(load_gsm8k, str(path), place=path)


@dataclass
class Options:
    """One of each kind that recipes have."""

    steps: int = 1
    rate: float = 0.1
    quick: bool = False
    name: str = "a"
    limit: int | None = None
    tasks: list[str] = field(default_factory=lambda: ["babi2"])


def parse(path):
    (options,) = parse_recipe((Options,), ["--config", str(path)])
    assert type(options.steps) is int and type(options.rate) is float and type(options.quick) is bool
    assert type(options.name) is str and type(options.limit) in (int, type(None))
    assert type(options.tasks) is list and all(type(task) is str for task in options.tasks)


VALUES = JSON | st.sampled_from(["1", "1e-4", "1.5", "yes", "None", float("nan"), 10**30, -1, 2.0])


@fuzz
@given(
    damaged(b"steps: 3\nrate: 1.0e-4\nquick: yes\ntasks: [babi2, babi3]\n")
    | st.dictionaries(st.sampled_from(list(Options.__dataclass_fields__)), VALUES, max_size=3).map(
        lambda values: yaml.safe_dump(values).encode()
    )
    | st.dictionaries(st.integers() | st.text(max_size=5) | st.none(), JSON, max_size=3).map(
        lambda values: yaml.safe_dump(values).encode()
    )
)
def test_recipe_configurations(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert_told(parse, path, place=path)


LEVELS = st.sampled_from(
    ["BabyAI-GoToLocal-v0", "babyai-gotolocal", "ALE/Pong-v5", "builtin:catch", "Pong", "-v0", ""]
)


@fuzz
@given(st.lists(LEVELS | st.text(max_size=300), max_size=3) | st.text(max_size=9))
@pytest.mark.parametrize("check", [check_levels, check_games])
def test_environment_ids(check, names):
    assert_told(check, names)


@fuzz
@given(
    damaged(CARD.encode()).map(lambda content: content.decode("utf-8", "replace"))
    | replaced(yaml.safe_load(CARD.split("---")[1])).map(
        lambda metadata: f"---\n{yaml.safe_dump(metadata)}---\n# A model\n"
    )
)
def test_model_cards(text):
    problems = card_problems(text)
    assert all(problem.strip() and "\n" not in problem for problem in problems), problems


FACTS = {
    "model_name": "a", "repository": "user/a", "revision": None, "parameters": "1,000", "num_experts": 4,
    "experts_per_token": 1, "expert_kind": "GRU", "is_recurrent": True, "generate_options": "", "prompt": "The",
    "dataset_name": "stories", "vocab_size": "400", "steps": "3", "loss": "2.5", "perplexity": "12.34",
    "architecture": {"layers": 2}, "training": {"updates": 3}, "routing": [{"layer": "0"}], "pictures": {},
    "command": "run it", "licence": "apache-2.0", "citations": [],
}  # fmt: skip
METADATA = {"license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["more"]}
MARKUP = st.sampled_from(["|", "```", "---", "{{ x }}", "{% if %}", '"', "a\nb", "](x)", "$", "\\", "None", "\x00"])


@fuzz
@given(replaced(FACTS) | st.builds(lambda name, text: FACTS | {name: text}, st.sampled_from(list(FACTS)), MARKUP))
def test_facts_of_model_cards(facts):
    assert_card(METADATA, facts)


@fuzz
@given(replaced(METADATA) | st.dictionaries(st.sampled_from(sorted(KNOWN["model"])), JSON | MARKUP, max_size=3))
def test_metadata_of_model_cards(metadata):
    assert_card(metadata, FACTS)


def assert_card(metadata, facts):
    """That a card is made that is in order, or that one line says what it lacks."""
    if not isinstance(metadata, dict) or not isinstance(facts, dict):
        return
    try:
        card = render_model_card("language_model", metadata, **facts)
    except ValueError as error:
        assert len(str(error)) > 10 and "\n" not in str(error), error
    else:
        assert card_problems(card) == []


TEXT = st.text(max_size=9) | st.sampled_from(["#### 3", "#### ", "= A =", "1 + 2 = 3\n#### 3"])
CELLS = st.one_of(*(st.lists(kind | st.none(), min_size=1, max_size=3) for kind in (
    TEXT, st.integers(-9, 9), st.floats(), st.booleans(), st.binary(max_size=4), st.lists(TEXT, max_size=2),
    st.fixed_dictionaries({"a": TEXT}),
)))  # fmt: skip


@settings(fuzz_slow_reader, max_examples=10)
@given(st.dictionaries(st.sampled_from(["question", "answer", "text", "mission"]), CELLS, max_size=2))
def test_rows_of_data_sets_as_the_hub_has_them(tmp_path, columns):
    rows = min(map(len, columns.values()), default=0)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(dir=tmp_path) as folder:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache"))
        repository = Path(folder, "rows")
        (repository / "data").mkdir(parents=True)
        table = datasets.Dataset.from_dict({name: cells[:rows] for name, cells in columns.items()})
        table.to_parquet(repository / "data" / "train-00000-of-00001.parquet")
        for read in (load_gsm8k, load_documents, load_demonstrations):
            assert_told(read, str(repository), place=repository)


SOLUTION = {
    "problem": 0, "decoding": "greedy", "sample": 0, "question": "1 + 2?", "completion": "#### 3", "answer": "3",
    "extracted": None, "exact": True, "strict_match": True, "flexible_extract": True, "marked": True, "tokens": 4,
    "finished": True,
}  # fmt: skip


@fuzz
@given(
    damaged(json.dumps(SOLUTION).encode() + b"\n")
    | replaced(SOLUTION).map(lambda row: json.dumps(row).encode() + b"\n"),
    damaged(b'{"settings": {}}') | st.just(b'{"settings": {}}'),
)
def test_solutions_and_reports(tmp_path, rows, report):
    (tmp_path / "completions.jsonl").write_bytes(rows)
    (tmp_path / "eval_results.json").write_bytes(report)
    assert_told(load_completions, tmp_path, place=tmp_path)


def open_store(folder, weights=None):
    """Opens a store, writes what is given or what it holds, and returns that."""
    with ExpertStore(ExpertStoreConfig(str(folder), 1, 1), {"up": (2, 3)}, num_layers=1, num_experts=2) as store:
        held = []
        for expert in range(2):
            held.append(store.read_weights(0, expert) if weights is None else {"up": weights[expert]})
            store.write_weights(0, expert, held[-1])
        store.checkpoint()
    return held


def store_manifest():
    return {
        "format": 1, "model": "", "layers": 1, "experts": 2, "parameters": {"up": [2, 3]}, "dtype": "float32",
        "checksum": "xxh3_64", "metadata": {}, "records": [[0, 0, 0, 1, 0, 0, 5, 0], [0, 1, 0, 1, 0, 0, 5, 0]],
    }  # fmt: skip


@settings(fuzz, max_examples=50)
@given(
    damaged(json.dumps(store_manifest()).encode())
    | replaced(store_manifest()).map(lambda manifest: json.dumps(manifest).encode())
)
def test_expert_stores(tmp_path, content):
    with TemporaryDirectory(dir=tmp_path) as folder:
        Path(folder, "manifest.json").write_bytes(content)
        try:
            open_store(folder)
        except KeyError as error:
            assert "has no record of expert" in str(error)
        except (ValueError, OSError, RecordError) as error:
            assert folder in str(error) or "expert" in str(error), error


LAYOUT = RecordLayout((("up", (2, 3)),))
SOUND = RecordInfo(version=3, step=2, last_step=7)


@fuzz
@given(damaged(LAYOUT.pack_header(1, 2, SOUND)[: HEADER.size]))
def test_headers_of_expert_records(content):
    block = content.ljust(BLOCK, b"\0")
    # What was put in may be what was cut out. A header of another place, or with a bit flipped, is none.
    expected = SOUND if block == LAYOUT.pack_header(1, 2, SOUND) else None
    assert LAYOUT.unpack_header(block, 1, 2) == expected
    assert LAYOUT.unpack_header(block, 2, 1) is None


@settings(fuzz, max_examples=25)
@given(st.data())
def test_bytes_of_expert_records(tmp_path, data):
    with TemporaryDirectory(dir=tmp_path) as folder:
        open_store(folder, {expert: torch.full((2, 3), expert + 1.0) for expert in range(2)})
        path = max(Path(folder).glob("*"), key=lambda file: file.stat().st_size)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        try:
            weights = open_store(folder)
        except (ValueError, OSError, RecordError) as error:
            assert folder in str(error) or "expert" in str(error), error
        else:
            assert [torch.unique(part["up"]).tolist() for part in weights] == [[1.0], [2.0]]


CHECKPOINT = {"parameters": "p", "files": {"model.safetensors": {"size": 3, "xxh3_64": "06b05ab6733a6185"}}}


@fuzz
@given(damaged(json.dumps(CHECKPOINT).encode()) | replaced(CHECKPOINT).map(lambda value: json.dumps(value).encode()))
def test_checkpoints(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_bytes(content)
    problem = check_checkpoint(tmp_path, "p")
    assert problem is None or (problem and "\n" not in problem)
