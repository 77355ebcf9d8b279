"""Whatever is in a file or in an option, a reader takes it or says in one sentence what is wrong with it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixturekit.hub_cards.card_validation import card_problems
from mixturekit.modeling.expert_records import RecordError
from mixturekit.modeling.expert_store import ExpertStore, ExpertStoreConfig
from mixturekit.trainers.atari import check_games
from mixturekit.trainers.babi import read_babi
from mixturekit.trainers.babyai import check_levels
from mixturekit.trainers.checkpoints import MANIFEST, check_checkpoint
from mixturekit.trainers.gsm8k import load_gsm8k
from mixturekit.trainers.recipe_parser import parse_recipe

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


def open_store(folder):
    """Opens a store, and reads all that it holds."""
    with ExpertStore(ExpertStoreConfig(str(folder), 1, 1), {"up": (2, 3)}, num_layers=1, num_experts=2) as store:
        for expert in range(2):
            store.write_weights(0, expert, store.read_weights(0, expert))
        store.checkpoint()


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


CHECKPOINT = {"parameters": "p", "files": {"model.safetensors": {"size": 3, "xxh3_64": "06b05ab6733a6185"}}}


@fuzz
@given(damaged(json.dumps(CHECKPOINT).encode()) | replaced(CHECKPOINT).map(lambda value: json.dumps(value).encode()))
def test_checkpoints(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_bytes(content)
    problem = check_checkpoint(tmp_path, "p")
    assert problem is None or (problem and "\n" not in problem)
