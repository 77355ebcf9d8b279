"""What is wrong with a card, told without a network: `RepoCard.validate()` asks the Hub, and misses most of it.

A card is judged with the files that lie beside it, because a picture that is not there is as broken as a misspelt key.
"""

import ast
import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard, parse_eval_result_entries

REQUIRED = {
    "model": {"license", "library_name", "pipeline_tag", "tags"},
    "dataset": {"license", "pretty_name", "tags"},
}
_SHARED = {"language", "license", "license_name", "license_link", "tags", "metrics"}
KNOWN = {
    "model": REQUIRED["model"]
    | _SHARED
    | {"base_model", "base_model_relation", "co2_eq_emissions", "datasets", "model-index", "new_version", "widget"},
    "dataset": REQUIRED["dataset"]
    | _SHARED
    | {"annotations_creators", "configs", "dataset_info", "language_creators", "multilinguality", "size_categories"}
    | {"source_datasets", "task_categories", "task_ids"},
}
# Of https://huggingface.co/docs/hub/repositories-licenses
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0",
    "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "open-mdw", "openrail", "openrail++", "osl-3.0", "other", "pddl",
    "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
PIPELINES = {
    "feature-extraction", "fill-mask", "image-classification", "image-text-to-text", "other", "question-answering",
    "reinforcement-learning", "robotics", "summarization", "text-classification", "text-generation",
    "text2text-generation", "token-classification", "translation", "zero-shot-classification",
}  # fmt: skip
RELATIONS = {"adapter", "finetune", "merge", "quantized"}

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a|source)\b[^>]*\b(?:src|href)=\"([^\"]+)\"")
_PLACEHOLDER = re.compile(
    r"\b(?:None|nan|NaN|inf|TO-?DO|FIX-?ME|TBD|undefined)\b|\[More Information Needed\]|<[a-z]+[_ ][a-z_ ]+>"
)
_TEMPLATE = re.compile(r"\{\{|\}\}|\{%|%\}|\{#")
LOCAL_PATH = re.compile(
    r"(?<![\w:/.~-])(?:/(?:home|Users|root|tmp|mnt|var|opt|work|workspace|scratch|data|private)/|~/|[A-Z]:\\)[\w.\\/-]*"
)


def card_problems(card: RepoCard | str, folder: str | Path | None = None, kind: str = "model") -> list[str]:
    """
    All that the Hub would refuse, or show broken.

    Args:
        card (`RepoCard` or `str`): The card, or its text.
        folder (`str` or `Path`, *optional*): What is published with it. If unset, links are not followed, and paths of
            this machine may stay: the card is that of a run here.
        kind (`str`, *optional*, defaults to `"model"`): `model` or `dataset`.

    Returns:
        `list[str]`: A sentence for each; none for a card that is fine.
    """
    content = str(card)
    try:
        parsed = (ModelCard if kind == "model" else DatasetCard)(content)
        written = parsed.data.to_dict()
    # The library trusts the shape of what it reads.
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        return [f"The metadata cannot be read: {str(error).splitlines()[0]}"]
    metadata = _metadata(content)
    problems = [*_key_problems(metadata, kind), *_value_problems(metadata), *_index_problems(metadata)]
    if _without_empty(written) != _without_empty(metadata):
        problems.append("The metadata are others after they have been read and written once.")
    problems += [*_text_problems(parsed.text), *_table_problems(parsed.text), *_code_problems(parsed.text)]
    if folder is not None:
        problems += [*_link_problems(parsed.text, Path(folder)), *_eval_result_problems(Path(folder))]
    return problems


def check_model_card(card: RepoCard | str, folder: str | Path | None = None, kind: str = "model") -> None:
    """Raises `ValueError` with all [`card_problems`] if there are any."""
    problems = card_problems(card, folder, kind)
    if problems:
        raise ValueError(" ".join(problems))


def _metadata(content: str) -> dict:
    head = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    return (yaml.safe_load(head[1]) if head else None) or {}


def _without_empty(metadata: dict) -> dict:
    return {name: value for name, value in metadata.items() if value not in (None, [], {})}


def _key_problems(metadata: dict, kind: str) -> Iterator[str]:
    missing = sorted(REQUIRED[kind] - metadata.keys())
    if missing:
        yield f"The card lacks the metadata {', '.join(missing)}."
    for name in sorted(map(str, metadata.keys() - KNOWN[kind])):
        near = difflib.get_close_matches(name, KNOWN[kind], 1)
        yield f"The card has unknown metadata: {name}{f'; is {near[0]} meant?' if near else '.'}"
    for name, value in metadata.items():
        if value in (None, "", [], {}):
            yield f"The metadata {name} is empty."


def _value_problems(metadata: dict) -> Iterator[str]:
    licence = metadata.get("license")
    for name in licence if isinstance(licence, list) else [licence] if licence else []:
        if str(name) not in LICENSES:
            near = ", ".join(difflib.get_close_matches(str(name), LICENSES, 3, cutoff=0.4))
            yield f"The licence {name!r} is unknown{f'; the Hub knows {near}' if near else ''}."
    if licence == "other" and not metadata.get("license_name"):
        yield "The licence is other, so license_name and license_link have to say which."
    pipeline = metadata.get("pipeline_tag")
    if pipeline and str(pipeline) not in PIPELINES:
        yield f"The pipeline_tag {pipeline!r} is unknown."
    relation = metadata.get("base_model_relation")
    if relation and (str(relation) not in RELATIONS or not metadata.get("base_model")):
        yield f"The base_model_relation {relation!r} needs a base_model and is one of {', '.join(sorted(RELATIONS))}."
    for name in ("base_model", "datasets", "source_datasets"):
        values = metadata.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
                yield f"The metadata {name} has {value!r}, which is no repository of the Hub."
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        yield "The tags are not a list of words."


def _index_problems(metadata: dict) -> Iterator[str]:
    index = metadata.get("model-index")
    if index is None:
        return
    if not isinstance(index, list) or not all(isinstance(model, dict) and model.get("name") for model in index):
        yield "The model-index is not a list of models with a name and results."
        return
    for result in (result for model in index for result in model.get("results") or []):
        dataset, task = result.get("dataset") or {}, result.get("task") or {}
        if not (task.get("type") and dataset.get("type") and dataset.get("name")):
            yield "A result of the model-index lacks the type of its task, or type and name of its data."
        for metric in result.get("metrics") or [{}]:
            value = metric.get("value")
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not metric.get("type") or not is_number:
                yield f"The model-index has {metric.get('type')!r} with the value {value!r}, which is no figure."


def _text_problems(text: str) -> Iterator[str]:
    prose = re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text))
    if not re.search(r"^# \S", prose, re.MULTILINE):
        yield "The card has no heading."
    for found in dict.fromkeys(_TEMPLATE.findall(text)):
        yield f"The card has {found!r} of a template in its text."
    for found in dict.fromkeys(_PLACEHOLDER.findall(prose)):
        yield f"The card has {found!r} in its text, so a fact was left out."
    for found in dict.fromkeys(re.findall(r"[\"'](?:None|nan)[\"']", text)):
        yield f"The card has {found} in its code, so a fact was left out."


def _table_problems(text: str) -> Iterator[str]:
    expected = None
    for line in _FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            expected = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        expected = len(cells) if expected is None else expected
        if len(cells) != expected or not line.rstrip().endswith("|"):
            yield f"A row of a table has {len(cells)} cells and not {expected}: {line}"


def _code_problems(text: str) -> Iterator[str]:
    if len(re.findall(r"^```", text, re.MULTILINE)) % 2:
        yield "A block of code does not end."
    for language, code in _FENCE.findall(text):
        if language == "python":
            try:
                ast.parse(code)
            except SyntaxError as error:
                yield f"A block of Python code is broken: {error.msg}, line {error.lineno}."


def _link_problems(text: str, folder: Path) -> Iterator[str]:
    for found in dict.fromkeys(LOCAL_PATH.findall(text)):
        yield f"The card has the path {found}, which is of one machine."
    prose = _FENCE.sub("", text)
    for target in dict.fromkeys(first or second for first, second in _LINK.findall(prose)):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        if target.startswith("/") or not (folder / target.split("#")[0]).is_file():
            yield f"The card links to {target}, which is not there."


def _eval_result_problems(folder: Path) -> Iterator[str]:
    for path in sorted((folder / ".eval_results").glob("*.yaml")):
        try:
            entries = parse_eval_result_entries(yaml.safe_load(path.read_text("utf-8")))
        except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            yield f".eval_results/{path.name} cannot be read: {error}."
            continue
        for entry in entries:
            if not isinstance(entry.value, int | float) or not math.isfinite(entry.value):
                yield f".eval_results/{path.name} has the value {entry.value!r}, which is no figure."
